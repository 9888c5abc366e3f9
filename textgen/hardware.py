"""What this machine multiplies fast."""

from __future__ import annotations

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
