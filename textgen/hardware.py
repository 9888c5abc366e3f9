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
    flags = processor_flags()
    # From Sapphire Rapids on Intel leaves it to AMX. Where a hypervisor hides that, AVX512-BF16 takes twice as long as
    # float32: 86 against 169 GFLOP/s of a large product, one thread, 2026-11-28.
    slow = "avx512_fp16" in flags and processor_vendor() == "GenuineIntel"
    return "amx_bf16" in flags or ("avx512_bf16" in flags and not slow)


def processor_flags() -> frozenset[str]:
    """Return what this processor can do, as Linux names it; nothing elsewhere."""
    return frozenset(_told("flags").split())


def processor_vendor() -> str:
    """Return who made this processor, as Linux names it; nothing elsewhere."""
    return _told("vendor_id")


@functools.cache
def _told(name: str) -> str:
    """Return what Linux tells of the first processor under a name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines()) if cpuinfo.exists() else ()
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is asked for next, in all of this process. Other C libraries go on as is.

    It would give blocks as large as activations back to the kernel, which has to find and clear a page for every 4 KiB
    of them at the next step: a tenth of a step, or a fifth of a small one.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
