"""The optimizer and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from textgen.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    """Build torch.optim.Adam over all parameters, fused: the training relies on its `found_inf`."""
    return torch.optim.Adam(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0): a pure function, so a resume needs no state.

    Linear warm-up over `warmup_steps`, then constant, or decay that reaches zero after step `total_steps` - 1.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    decayed = min((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 1.0)
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - decayed)
    if config.lr_schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * decayed))
    return config.learning_rate
