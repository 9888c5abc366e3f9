"""The rows that a tracker's run was given, on disk, so that a later start knows rows of an abandoned history.

A training that resumes from an earlier checkpoint makes rows again. After a kill they are the same rows, which the
tracker has. With other settings they are others, which belong to a new run of the tracker.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from textgen.runs.metrics_file import MetricsRow

# Rows of the same training differ by this relative difference at most: another number of processes rounds otherwise
# (docs/explanation/exactness.md has the bounds: 1e-5 over 50 steps, 1e-4 of an evaluation).
TOLERANCE = 1e-4
FIGURES = ("step", "tokens", "train/learning_rate", "train/loss", "valid/loss")
"""figures that tell two histories apart; the others depend on the clock, or follow from these"""


class RecordedRows:
    """Rows by their number in metrics.jsonl, as a tracker's run was given them last.

    Each line of the file is `[number, figures]`, or the object with the run's id that begins it. A run that an earlier
    version of textgen began has no file; its rows count as the same.

    Args:
        run_dir: the run's folder.
        tracker: the tracker's name.
    """

    def __init__(self, run_dir: Path, tracker: str) -> None:
        self._path = run_dir / "trackers" / f"{tracker}.jsonl"
        self.run_id: str | None = None
        self.folders: list[str] = []
        """folders in which the tracker keeps this run's files"""
        self._rows: dict[int, dict[str, Any]] = {}
        for line in self._path.read_bytes().splitlines() if self._path.exists() else []:
            try:
                entry = json.loads(line)
                if isinstance(entry, dict):
                    self.run_id, self.folders = entry["run"], [*self.folders, entry["folder"]]
                else:
                    self._rows[entry[0]] = dict(entry[1])
            except (ValueError, TypeError, LookupError):  # a kill or a full disk cut the line off
                continue

    def __len__(self) -> int:
        """Return the number of rows, with those that metrics.jsonl no longer has."""
        return max(self._rows, default=-1) + 1

    def begin(self, run_id: str, folder: str = "", *, empty: bool) -> None:
        """Note the run that gets the rows.

        Args:
            run_id: id of the run.
            folder: in which the tracker keeps the run's files.
            empty: whether the run has no rows yet.
        """
        if empty or run_id != self.run_id:
            self._path.parent.mkdir(exist_ok=True)
            self._path.write_bytes(b"")
            self.run_id, self.folders, self._rows = run_id, [], {}
        if folder not in self.folders:
            self.folders.append(folder)
            self._append({"run": run_id, "folder": folder})

    def add(self, number: int, row: MetricsRow) -> None:
        """Note a row, before the tracker gets it."""
        figures = {name: row[name] for name in FIGURES if name in row}
        if self._rows.get(number) != figures:
            self._rows[number] = figures
            self._append([number, figures])

    def differs(self, number: int, row: MetricsRow) -> bool:
        """Return whether the run was given a row of another history under this number."""
        given = self._rows.get(number)
        if given is None:
            return False
        return any(
            not math.isclose(given.get(name, math.inf), row.get(name, math.inf), rel_tol=TOLERANCE) for name in FIGURES
        )

    def _append(self, entry: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry))  # the last line may have been cut off
            file.flush()
            os.fsync(file.fileno())  # the tracker never has rows that the list lacks, after a machine's crash too
