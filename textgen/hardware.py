"""Facts about this machine: its processor, its GPUs, and the precision that they compute fast in.

torch is imported where it is used, so that a program that needs only the processor's name starts without it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from textgen.errors import TextgenError

if TYPE_CHECKING:
    import torch

# --- the processor ---------------------------------------------------------------------------------------------------


@functools.cache
def read_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> dict[str, list[str]]:
    """Return the different values of each field, in the file's order; {} if there is no file, as outside Linux.

    Every logical processor repeats all fields. A field has several values if processors differ, as on ARM machines
    with large and small cores.
    """
    fields: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        name, value = (part.strip() for part in (*line.split(":", 1), "")[:2])
        if value not in (values := fields.setdefault(name, [])):
            values.append(value)
    return fields


def _read_first(field: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo; "" if it has no field of this name."""
    return next(iter(read_cpuinfo().get(field, ())), "")


def processor_flags() -> frozenset[str]:
    """Return the instruction sets of this processor by Linux's names; empty if the system does not list them."""
    return frozenset(_read_first("flags").split())


def processor_vendor() -> str:
    """Return the vendor of this processor by Linux's name, for example `GenuineIntel`; "" if it is unknown."""
    return _read_first("vendor_id")


def processor_model() -> str:
    """Return the model name of this processor; "" if it is unknown."""
    return _read_first("model name") or platform.processor()


def processor_identity() -> list[tuple[str, list[str]]]:
    """Return the fields that differ between processors whose machine code differs."""
    # ARM has `Features` and `CPU ...` in place of `model name` and `flags`
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return [(name, sorted(read_cpuinfo().get(name, []))) for name in names]


def keep_freed_memory() -> None:
    """Tell glibc's malloc not to return freed memory to the kernel, in all of this process.

    By default glibc returns blocks as large as activations. The kernel then has to find and clear a page for every
    4 KiB of them at the next step: a tenth of a step, or a fifth of a small one. Other C libraries are not changed.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


# --- Apple's GPU ------------------------------------------------------------------------------------------------------


def wants_mps() -> bool:
    """Return whether the user asks for Apple's GPU, by `TEXTGEN_DEVICE=mps`. It is not tried, so it is not a default.

    Raises:
        TextgenError: the variable names another device, or torch finds no such GPU.
    """
    import torch

    if (device := os.environ.get("TEXTGEN_DEVICE", "")) not in ("", "mps"):
        raise TextgenError(f"`TEXTGEN_DEVICE` must be `mps`, Apple's GPU, or not set: {device}")
    if device == "mps" and not torch.backends.mps.is_available():
        raise TextgenError("`TEXTGEN_DEVICE` is mps, and torch finds no GPU of Apple here")
    return device == "mps"


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which losses are summed: float64, or float32 on Apple's GPU, which has no float64."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


# --- precision -------------------------------------------------------------------------------------------------------


def has_bfloat16(*, use_cpu: bool) -> bool:
    """Return whether the CPU or GPU multiplies bfloat16 matrices in hardware, and so faster than float32."""
    if not use_cpu:
        import torch

        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = processor_flags()
    # Intel's processors with AVX512-FP16 (Sapphire Rapids and later) have AMX for bfloat16. Under a hypervisor that
    # hid AMX, AVX512-BF16 took twice as long as float32: 86 against 169 GFLOP/s of a large product, one thread,
    # measured 2026-11-28.
    slow = "avx512_fp16" in flags and processor_vendor() == "GenuineIntel"
    return "amx_bf16" in flags or ("avx512_bf16" in flags and not slow)


def has_float16() -> bool:
    """Return whether the GPU multiplies float16 matrices faster than float32; Volta was the first that does."""
    import torch

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
    """Return whether cuDNN has its persistent LSTM kernel for these layers in float16, and not in bfloat16.

    That kernel keeps the recurrent weights on the chip from one time step to the next. Layers are assumed to run one
    per call. The conditions are those of ATen: `get_algo`, `use_persist_common_heuristics`,
    `use_persist_device_heuristics` and `use_rnn_persist_small_h` of aten/src/ATen/native/cudnn/RNN.cpp, read in a
    version that has bfloat16 LSTMs.

    Args:
        input_sizes: input size of each layer.
        hidden_size: hidden size of all layers.
        rows: number of rows in a batch.
        seq_len: time steps of a call; only Volta's rule depends on it.
        capability: the GPU's compute capability, major and minor.
        multiprocessors: number of the GPU's multiprocessors.
    """
    if hidden_size <= 128:  # cuDNN has another persistent kernel here, for all dtypes
        return False
    if hidden_size > 1024 or any(size % 128 for size in (hidden_size, *input_sizes)):
        return False
    if (7, 0) <= capability < (7, 5):
        long_enough = any(seq_len >= steps and rows <= most for steps, most in ((40, 128), (20, 96), (10, 32)))
        return long_enough and (rows == 8 or (rows % 16 == 0 and rows not in (80, 112)))
    # An A30 has too few multiprocessors. ATen leaves out 8.6 (A40, A10), where some calls failed.
    return capability >= (8, 0) and capability[1] != 6 and multiprocessors >= 98 and rows % 8 == 0 and rows <= 128


# --- peaks of GPUs ---------------------------------------------------------------------------------------------------

# Peak rates of dense matrix products in 10^12 operations per second, by a pattern of the GPU's name: bfloat16 or
# float16 with float32 sums, then float32 without TF32. From the data sheets of the makers. NVIDIA prints bfloat16 with
# sparsity for some GPUs; those figures are halved here.
PEAKS = {
    r"B200": (2250, 75),
    r"H200": (989, 67),
    r"GH200.*": (989, 67),
    r"H100 NVL": (835, 60),
    r"H100 PCIe": (756, 51),
    r"H100 80GB HBM3": (989, 67),
    r"A100.*": (312, 19.5),
    r"A30": (165, 10.3),
    r"A40": (149.7, 37.4),
    r"A10": (125, 31.2),
    r"RTX A6000": (154.8, 38.7),
    r"L40S": (362, 91.6),
    r"L40": (181, 90.5),
    r"L4": (121, 30.3),
    r"V100-SXM2.*": (125, 15.7),
    r"T4": (65, 8.1),
    r"GeForce RTX 5090": (209.5, 104.8),
    r"GeForce RTX 4090": (165.2, 82.6),
    r"GeForce RTX 3090": (71, 35.6),
}


def known_peak(gpu: str, *, half: bool) -> float | None:
    """Return the peak operations per second of a GPU; None if it is unknown, as for a part of a GPU (MIG).

    Args:
        gpu: its name, as torch.cuda.get_device_name returns it.
        half: the peak in bfloat16 or float16, else in float32.
    """
    for pattern, (low, full) in PEAKS.items():
        if re.fullmatch(rf"(NVIDIA |Tesla )?{pattern}", gpu) and "MIG" not in gpu:
            return (low if half else full) * 1e12
    return None


def peak_flops(device: torch.device, *, half: bool) -> float | None:
    """Return the peak operations per second of a device; None for CPUs and unknown GPUs. Arguments as `known_peak`."""
    import torch

    return known_peak(torch.cuda.get_device_name(device), half=half) if device.type == "cuda" else None
