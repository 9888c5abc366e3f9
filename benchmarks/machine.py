"""Describes the machine of a measurement, reads its energy counters, and writes results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from textgen.hardware import processor_model, read_cpuinfo

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
"""folder of the results"""


def describe() -> dict[str, Any]:
    """Return processor or GPU, versions and commit."""
    try:
        answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = answer.stdout.strip()
    except OSError:  # without git figures are kept without the commit
        commit = ""
    return {
        "processor": _name_processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def _name_processor() -> str:
    """Return the model name with family and model: clouds call all generations `AMD EPYC` or `Intel Xeon`.

    AMD's family 25 is Zen 3 and Zen 4, family 26 Zen 5.
    """
    read = read_cpuinfo()
    numbers = [f"{field.removeprefix('cpu ')} {read[field][0]}" for field in ("cpu family", "model") if read.get(field)]
    return f"{processor_model()} ({', '.join(numbers)})" if numbers else processor_model()


def joules(device: torch.device, powercap: Path = Path("/sys/class/powercap")) -> float:
    """Return the energy that a GPU (by NVML) or all processors (by RAPL) have used so far; 0 if it is not counted."""
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


def load(name: str) -> dict[str, Any]:
    """Return the figures that `save` wrote under this name; {} if there are none."""
    path = RESULTS / f"{name}.json"
    figures: dict[str, Any] = json.loads(path.read_text())["figures"] if path.exists() else {}
    return figures


def save(name: str, figures: Any, *, beside: bool = False) -> None:
    """Write figures with the machine's description to NAME.json in RESULTS; a kill leaves what was there before.

    With `beside`, other figures that the file has of the same machine, versions and commit stay.
    """
    RESULTS.mkdir(exist_ok=True, parents=True)
    path, machine = RESULTS / f"{name}.json", describe()
    if beside and path.exists() and (before := json.loads(path.read_text()))["machine"] == machine:
        figures = before["figures"] | figures
    text = json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n"
    new = RESULTS / f".{name}.json.new"
    new.write_text(text)
    new.replace(path)
