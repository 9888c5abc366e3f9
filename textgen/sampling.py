"""Pure filters on logits, then a draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from textgen.config import SamplingConfig
from textgen.noise import uniform


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest of logits (..., vocab_size) to -inf; equals of the k-th stay."""
    threshold = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Set all but the nucleus of logits (..., vocab_size) to -inf: the fewest tokens whose probabilities reach p.

    Source: Holtzman et al., "The curious case of neural text degeneration" (2020), section 3.1.
    """
    if p >= 1:
        return logits  # a rounded sum may reach 1 before its last tokens
    ordered, order = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= p  # what stands before a token already reaches p
    outside[..., 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -math.inf)


def draw(logits: Tensor, config: SamplingConfig, *, samples: Tensor, step: int) -> Tensor:
    """Draw one token per row.

    The draw is the argmax of probabilities over exponential noise, in logarithms (the Gumbel-max trick). The noise is
    a hash of (seed, sample, step, token): a row's draw depends on nothing but its own logits and numbers, not on the
    batch, the device or a generator.

    Args:
        logits: (batch, vocab_size).
        config: temperature, filters and seed.
        samples: (batch,) int64, the number of each row's sample.
        step: how many tokens were drawn before.

    Returns:
        (batch,) int64.
    """
    if config.temperature < torch.finfo(torch.float32).tiny:  # which the division would take for 0
        return logits.argmax(-1)
    # the likeliest at 0: a tiny temperature sends the others to -inf, not all to inf
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None:
        logits = keep_top_p(logits, config.top_p)
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    gumbel = -(-uniform(config.seed, samples[:, None], step, tokens).log()).log()  # (batch, vocab_size)
    return (logits + gumbel).argmax(-1)
