"""What a training ran on: versions, commit and machine, kept in its run so that it can be told and made again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ENVIRONMENT_NAME = "environment.json"
PACKAGES = ("textgen", "torch", "accelerate", "numpy", "sentencepiece", "safetensors", "wandb")


def describe_environment() -> dict[str, str]:
    """Return versions, commit and machine of this process; no variable of the environment, and no flag."""
    import torch

    told = {"commit": _commit() or "unknown", "python": platform.python_version()}
    for package in PACKAGES:
        try:
            told[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            told[package] = "not installed"
    told |= {"system": platform.platform(), "processor": _processor()}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        told |= {"GPUs": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))}
        told |= {"CUDA": str(torch.version.cuda)}
    return told


def _commit() -> str | None:
    """Return the commit of the working copy that this code stands in, and whether it was changed since."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a repository around it would be another one
        return None
    try:
        told = [
            subprocess.run(
                ["git", "-C", str(root), *argv], capture_output=True, text=True, timeout=5, check=True
            ).stdout
            for argv in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0].strip() + (", with changes" if told[1].strip() else "")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{allowed} x {name or platform.machine()}"
