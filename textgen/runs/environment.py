"""The environment of a training: versions, commit and machine, kept in its run so that it can be repeated."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from textgen.hardware import processor_model

ENVIRONMENT_NAME = "environment.json"
PACKAGES = ("textgen", "torch", "accelerate", "numpy", "sentencepiece", "safetensors", "wandb")


def describe_environment() -> dict[str, str]:
    """Return versions, commit and machine of this process, without its environment variables and flags."""
    import torch

    facts = {"commit": _commit() or "unknown", "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts |= {"system": platform.platform(), "processor": _describe_processors()}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["GPUs"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        facts["CUDA"] = str(torch.version.cuda)
    return facts


def _commit() -> str | None:
    """Return the commit of this code's working copy, and whether files differ from it; None if git cannot tell."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package; a repository around it would be another project's
        return None
    git = ["git", "-C", str(root)]
    try:
        commit, changes = (
            subprocess.run([*git, *argv], capture_output=True, timeout=5, check=True)
            .stdout.decode(errors="replace")
            .strip()
            for argv in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + (", with changes" if changes else "")


def _describe_processors() -> str:
    """Return the number of processors that this process may use, and their model."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{allowed} x {processor_model() or platform.machine()}"
