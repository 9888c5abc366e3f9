"""Losses of a run, in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from textgen.runs.metrics_file import read_metrics


def train_losses(rows: Sequence[dict[str, Any]]) -> list[float]:
    return [row["train/loss"] for row in rows if "train/loss" in row]


def all_losses(run_dir: Path) -> list[float]:
    """Return those of validation too."""
    return [row[name] for row in read_metrics(run_dir) for name in ("train/loss", "valid/loss") if name in row]
