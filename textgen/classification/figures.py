"""How well labels were found: accuracy with its interval, confusion table, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959964  # the normal distribution has 95 % of its mass within this many standard deviations
CALIBRATION_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Found labels beside the true ones."""

    labels: tuple[str, ...]
    confusion: NDArray[np.int64]
    """(labels, labels): the number of texts by true label (rows) and found label (columns)"""
    log_loss: float
    """mean of minus the logarithm of the true label's probability, in bits; infinity if one is 0"""
    calibration_error: float
    """mean distance of the found label's probability from the share of texts that have it, over ten ranges of
    probability weighted by their texts (Guo et al. 2017, section 2)"""

    @property
    def documents(self) -> int:
        """Return the number of texts."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Return the share of texts whose label was found."""
        return float(np.trace(self.confusion)) / self.documents

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the accuracy."""
        return wilson_interval(int(np.trace(self.confusion)), self.documents)

    def as_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "documents": self.documents,
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "log_loss": self.log_loss if math.isfinite(self.log_loss) else None,
            "calibration_error": self.calibration_error,
            "labels": list(self.labels),
            "confusion": self.confusion.tolist(),
        }

    def as_lines(self) -> list[str]:
        """Return the figures as lines for a terminal; the table of more than 20 labels is left to JSON."""
        low, high = self.interval
        lines = [
            f"documents          {self.documents:,}",
            f"accuracy           {self.accuracy:.2%} (95 % interval {low:.2%} to {high:.2%})",
            f"log loss           {self.log_loss:.4f} bits",
            f"calibration error  {self.calibration_error:.4f}",
        ]
        if len(self.labels) > 20:
            return [*lines, f"confusion table of {len(self.labels)} labels: see `--json`"]
        width = max(10, *(len(label) + 2 for label in self.labels))
        lines += ["", "true label, and the number of texts by found label:"]
        lines.append(" " * width + "".join(f"{label:>{width}}" for label in self.labels))
        for label, row in zip(self.labels, self.confusion.tolist(), strict=True):
            lines.append(f"{label:<{width}}" + "".join(f"{count:>{width},}" for count in row))
        return lines


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927): within 0 and 1 for any share, also for few texts."""
    share, z2 = hits / count, Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def compute_figures(labels: Sequence[str], probabilities: NDArray[np.float64], true: NDArray[np.int64]) -> Figures:
    """Compare found labels with true ones.

    Args:
        labels: the names.
        probabilities: (texts, labels); the most probable label is the found one.
        true: (texts,) indices of labels.
    """
    found = probabilities.argmax(1)
    confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(confusion, (true, found), 1)
    with np.errstate(divide="ignore"):
        log_loss = -np.log2(probabilities[np.arange(len(true)), true]).mean()
    sure = probabilities.max(1)
    bins = np.minimum((sure * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    off = np.bincount(bins, sure - (found == true), minlength=CALIBRATION_BINS)
    error = float(np.abs(off).sum()) / len(true)
    return Figures(labels=tuple(labels), confusion=confusion, log_loss=float(log_loss), calibration_error=error)
