"""What a figure was measured on."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Return processor or GPU, versions and commit."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    try:
        answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = answer.stdout.strip()
    except OSError:  # there is no git: the figures are kept without the commit
        commit = ""
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def joules(device: torch.device, powercap: Path = Path("/sys/class/powercap")) -> float:
    """Return what a GPU (by NVML) or the processors' packages (by RAPL) have taken so far; 0 where untold."""
    if device.type == "cuda":
        try:
            pynvml = import_module("pynvml")  # of nvidia-ml-py
            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1e3
        except Exception:  # no library, or a GPU without the counter
            return 0.0
    try:
        return sum(int((path / "energy_uj").read_text()) for path in powercap.glob("intel-rapl:?")) / 1e6
    except OSError:
        return 0.0


def save(name: str, figures: Any) -> None:
    """Write figures with the machine's description to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": describe(), "figures": figures}, indent=2) + "\n")
