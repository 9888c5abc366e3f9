"""Adam, the learning rate of each step, and the update that skips what is not finite."""

from __future__ import annotations

import math

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from textgen.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    """Build torch.optim.Adam over all parameters, fused: `update_weights` needs its `found_inf`."""
    return torch.optim.Adam(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def update_weights(optimizer: AcceleratedOptimizer, scaler: torch.amp.GradScaler | None, nonfinite: Tensor) -> bool:
    """Update the weights, unless `nonfinite` is set or float16's scaler finds an overflow in the gradient.

    The gradient must be unscaled and clipped. It is the same on all processes, so all of them skip the same steps.

    Args:
        optimizer: over a fused torch.optim.Adam.
        scaler: of float16; None without one. With a scaler `nonfinite` is not looked at.
        nonfinite: bool scalar on the device.

    Returns:
        Whether the scaler skipped the update; this waits for the device. False without a scaler, which does not wait.
    """
    if scaler is None:
        # A fused optimizer reads this attribute on the device and leaves weights and moments as they are if it is 1.
        # GradScaler sets it in the same way.
        optimizer.optimizer.found_inf = nonfinite.float()
        optimizer.step()
        return False
    # The scaler sets `found_inf` itself. Accelerate's `step_was_skipped` is never true with a fused optimizer, which
    # is always called; but the scaler reduces its scale after an overflow.
    scale = scaler.get_scale()
    optimizer.step()
    return scaler.get_scale() < scale


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
