"""metrics.jsonl: one row of figures per log interval or evaluation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl; a last line cut off by a kill is left out."""
    path = run_dir / METRICS_NAME
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def tells_of_the_machine(name: str) -> bool:
    """Tell whether a metric is what clock and memory say: equal runs differ in it."""
    return re.search(r"per_second|_seconds$|_share$|^memory/|^machine/", name) is not None
