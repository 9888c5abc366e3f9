"""The duration of an action on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def median_seconds(action: Callable[[], object], device: torch.device, *, rounds: int) -> float:
    """Return the median duration of an action, after one warm-up round; on CUDA until its kernels have ended."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
