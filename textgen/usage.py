"""What a training makes of its machines: floating-point operations, memory, processors."""

from __future__ import annotations

import os
import re
import resource
import sys

import psutil
import torch
from accelerate import Accelerator
from torch import nn

# Dense peak of matrix products in 10^12 operations per second: bfloat16 or float16 with float32 sums, and float32
# without TF32. From the makers' data sheets (those of NVIDIA print bfloat16 with sparsity for some: halved here).
PEAKS = {
    r"B200": (2250, 75), r"H200": (989, 67), r"GH200.*": (989, 67), r"H100 NVL": (835, 60), r"H100 PCIe": (756, 51),
    r"H100 80GB HBM3": (989, 67), r"A100.*": (312, 19.5), r"A30": (165, 10.3), r"A40": (149.7, 37.4),
    r"A10": (125, 31.2), r"RTX A6000": (154.8, 38.7), r"L40S": (362, 91.6), r"L40": (181, 90.5), r"L4": (121, 30.3),
    r"V100-SXM2.*": (125, 15.7), r"T4": (65, 8.1), r"GeForce RTX 5090": (209.5, 104.8),
    r"GeForce RTX 4090": (165.2, 82.6), r"GeForce RTX 3090": (71, 35.6),
}  # fmt: skip


def flops_per_token(model: nn.Module) -> int:
    """Return the floating-point operations of matrix products for a token of training.

    A product with a matrix of n weights takes 2n operations for a token forward, and as many again for each of the two
    gradients: 6n. The matrices are those of the LSTM layers, 4 x hidden_size x (input_size + hidden_size) each, of the
    projection and of the output layer, tied or not; an embedding is looked up. What goes element by element (gates,
    softmax, dropout, the optimizer) is left out, as in the figures that others give of their models (Kaplan et al.
    2020, section 2.1; Chowdhery et al. 2022, appendix B).
    """
    matrices = [
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 2 and not isinstance(module, nn.Embedding)
    ]
    return 6 * sum(parameter.numel() for parameter in matrices)


def peak_flops(accelerator: Accelerator) -> float | None:
    """Return the peak operations per second of this process's device in its precision; None where nobody has said."""
    if accelerator.device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(accelerator.device), half=accelerator.mixed_precision != "no")


def known_peak(gpu: str, *, half: bool) -> float | None:
    """Return the peak operations per second of a GPU by its name; a part of one (MIG) has another, which is unknown."""
    for pattern, (low, full) in PEAKS.items():
        if re.fullmatch(rf"(NVIDIA |Tesla )?{pattern}", gpu) and "MIG" not in gpu:
            return (low if half else full) * 1e12
    return None


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far: of a GPU's memory as torch allots it, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:  # getrusage's figure on Linux is at least what the process held that started this one
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def measure_machines(accelerator: Accelerator) -> dict[str, float]:
    """Return the largest process's memory, and how busy and how full each machine is. Collective.

    Returns:
        `memory/peak_gib`, and for each machine N `machine/N/cpu_share` since the last call and
        `machine/N/memory_share`, both from 0 to 1.
    """
    machine = float(os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or 0)
    busy, full = psutil.cpu_percent() / 100, psutil.virtual_memory().percent / 100
    ours = torch.tensor([[machine, peak_memory(accelerator.device) / 2**30, busy, full]], device=accelerator.device)
    values: dict[str, float] = {}
    for number, gib, cpu, memory in accelerator.gather(ours).tolist():  # of a machine, its last process's word counts
        values["memory/peak_gib"] = max(gib, values.get("memory/peak_gib", 0.0))
        values[f"machine/{number:.0f}/cpu_share"] = cpu
        values[f"machine/{number:.0f}/memory_share"] = memory
    return values
