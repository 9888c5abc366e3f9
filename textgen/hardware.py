"""What this machine multiplies fast."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch


def has_bfloat16(*, use_cpu: bool) -> bool:
    """Tell whether the hardware multiplies bfloat16 matrices itself, and so faster than float32."""
    if not use_cpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(processor_flags() & {"avx512_bf16", "amx_bf16"})


@functools.cache
def processor_flags() -> frozenset[str]:
    """Return what this processor can do, as Linux names it; nothing elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is asked for next, in all of this process. Other C libraries go on as is.

    It would give blocks as large as activations back to the kernel, which has to find and clear a page for every 4 KiB
    of them at the next step: a tenth of a step, or a fifth of a small one.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
