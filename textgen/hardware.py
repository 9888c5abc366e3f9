"""What this machine multiplies fast, and by which of its kernels."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path

import torch


def has_bfloat16(*, use_cpu: bool) -> bool:
    """Tell whether the hardware multiplies bfloat16 matrices itself, and so faster than float32."""
    if not use_cpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = processor_flags()
    # Intel's processors with AVX512-FP16 (Sapphire Rapids and later) have AMX for it. Where a hypervisor hid AMX,
    # AVX512-BF16 took twice as long as float32: 86 against 169 GFLOP/s of a large product, one thread, 2026-11-28.
    slow = "avx512_fp16" in flags and processor_vendor() == "GenuineIntel"
    return "amx_bf16" in flags or ("avx512_bf16" in flags and not slow)


def processor_flags() -> frozenset[str]:
    """Return what this processor can do, as Linux names it; nothing elsewhere."""
    return frozenset(_told("flags").split())


def processor_vendor() -> str:
    """Return who made this processor, as Linux names it; nothing elsewhere."""
    return _told("vendor_id")


def has_float16() -> bool:
    """Tell whether the GPU multiplies float16 matrices faster than float32: Volta was the first."""
    return torch.cuda.get_device_capability() >= (7, 0)


def prefers_float16(
    input_sizes: Iterable[int],
    hidden_size: int,
    *,
    rows: int,
    seq_len: int,
    capability: tuple[int, int],
    multiprocessors: int,
) -> bool:
    """Tell whether cuDNN runs LSTM layers, one a call, by its persistent kernel in float16, and not in bfloat16.

    The conditions are those of ATen: `get_algo`, `use_persist_common_heuristics`, `use_persist_device_heuristics` and
    `use_rnn_persist_small_h` of aten/src/ATen/native/cudnn/RNN.cpp, read in a version that has bfloat16 LSTMs. That
    kernel keeps the recurrent weights on the chip from one time step to the next.

    Args:
        input_sizes: of each layer.
        hidden_size: of all layers.
        rows: of a batch.
        seq_len: time steps of a call; only Volta asks for it.
        capability: of the GPU, major and minor.
        multiprocessors: that it has.
    """
    if hidden_size <= 128:  # another persistent kernel, for all dtypes
        return False
    if hidden_size > 1024 or any(size % 128 for size in (hidden_size, *input_sizes)):
        return False
    if (7, 0) <= capability < (7, 5):
        long_enough = any(seq_len >= steps and rows <= most for steps, most in ((40, 128), (20, 96), (10, 32)))
        return long_enough and (rows == 8 or (rows % 16 == 0 and rows not in (80, 112)))
    # an A30 has too few multiprocessors; with 8.6 (A40, A10) some calls failed
    return capability >= (8, 0) and capability[1] != 6 and multiprocessors >= 98 and rows % 8 == 0 and rows <= 128


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
