"""TensorBoard and trackio, through Accelerate's trackers."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from textgen.config import DEFAULT_PROJECT, TrackingConfig
from textgen.runs.metrics_file import MetricsRow, read_metrics
from textgen.runs.samples import SampledText
from textgen.settings import flatten
from textgen.tracking.recorded import RecordedRows
from textgen.tracking.tracker import FINISH_SECONDS, RunEnd

log = logging.getLogger("textgen")

EVENT_FILES = "events.out.tfevents.*"  # of TensorBoard

# Trackers that this process has abandoned; they may still be writing.
_abandoned: list[Any] = []


class AccelerateTracker:
    """Record figures with TensorBoard or trackio, and samples with TensorBoard, which shows text.

    A training that continues a run asks the tracker for its rows and records the missing ones: each row of
    metrics.jsonl is recorded once. A trackio that sends rows to a server, or keeps them as files, cannot list its rows;
    then nothing is recorded again, and one line is logged.

    A row may differ from the one that the tracker was given, if the training went back and on with other settings.
    TensorBoard hides the old rows from there on; trackio gets a new run.

    Args:
        name: of the tracker, as Accelerate knows it.
        config: holds the project.
        run_dir: the run's folder.
        settings: recorded as the run's parameters.
        resumed: whether an earlier part of the training has begun the run.
        first_step: the step that the training continues from. TensorBoard hides its figures of later steps.
    """

    def __init__(
        self,
        name: str,
        config: TrackingConfig,
        run_dir: Path,
        settings: Mapping[str, Any],
        *,
        resumed: bool,
        first_step: int,
    ) -> None:
        self._name, self._config, self._run_dir, self._first_step = name, config, run_dir, first_step
        # TensorBoard's parameters are scalars or text, without null.
        present = {key: value for key, value in flatten(settings).items() if value is not None}
        self._settings = {
            k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in present.items()
        }
        self._tracker: Any = None
        self._resumed, self._has = resumed, set[tuple[int, str]]()
        self._recorded, self._given, self._seen = RecordedRows(run_dir, name), 0, 0
        self.finish_seconds: float = FINISH_SECONDS
        remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        self.catches_up: bool = name == "tensorboard" or not remote

    def open(self, rows: Sequence[MetricsRow]) -> None:
        """Begin or continue the run, and record the rows that it lacks."""
        # An earlier part of the training in this process may still be writing; its rows would be recorded twice.
        while _abandoned:
            _abandoned.pop().finish()
        continued = self._recorded.run_id
        if self._name == "tensorboard":
            self._open_tensorboard(rows)
        else:
            self._open_trackio("allow" if self._resumed else "never")
        if not self.catches_up and rows:
            self._given = max(self._given, len(rows))
            new = "" if continued in (None, self._recorded.run_id) else "; this part of the training is a new run"
            log.info("%s cannot list its rows here: rows that it lost are only in `metrics.jsonl`%s", self._name, new)
        for number, row in enumerate(rows):
            self.log(number, row, ())

    def _open_tensorboard(self, rows: Sequence[MetricsRow]) -> None:
        """Open a file that hides all figures from the first missing row on; `open` records these rows again."""
        from accelerate.tracking import TensorBoardTracker

        recorded = recorded_events(self._run_dir / "tensorboard") if rows else set()
        purge_step = min(
            [
                self._first_step + 1,
                *(
                    row["step"]
                    for number, row in enumerate(rows)
                    if not named_figures(row) <= recorded or self._recorded.differs(number, row)
                ),
            ],
        )
        self._has = {(step, name) for step, name in recorded if step < purge_step}
        self._recorded.begin("tensorboard", empty=not self._has)
        wait_for_a_later_name(self._run_dir / "tensorboard")
        self._tracker = TensorBoardTracker("tensorboard", self._run_dir, purge_step=purge_step)
        self._tracker.start()
        self._tracker.store_init_configuration(self._settings)

    def _open_trackio(self, resume: Literal["allow", "never"]) -> None:
        """Continue the latest run of this name, or begin a new one."""
        from accelerate.tracking import TrackioTracker
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.utils import get_storage_mode

        project = self._config.project or DEFAULT_PROJECT
        self._tracker = TrackioTracker(project, name=self._run_dir.name, resume=resume)
        self._tracker.start()
        run = self._tracker.run
        self.catches_up = run.url is None and get_storage_mode() == "sqlite"
        logs = SQLiteStorage.get_logs(run.project, run.name, run_id=run.id) if self.catches_up else []
        self._has = {(row["step"], name) for row in logs for name in row}
        self._recorded.begin(run.id, empty=self.catches_up and not self._has)
        self._given = len(self._recorded)
        self._tracker.store_init_configuration(self._settings)

    def log(self, number: int, row: MetricsRow, samples: Sequence[SampledText]) -> None:
        """Record a row unless the tracker has it, and with TensorBoard the samples as text."""
        self._seen = number + 1
        if named_figures(row) <= self._has if self.catches_up else number < self._given:
            if not self._recorded.differs(number, row):
                return
            self._begin_again(number)
        self._record(number, row, samples)

    def _begin_again(self, number: int) -> None:
        """Hide TensorBoard's figures from a row's step on, or begin a new trackio run; record the rows before."""
        rows = read_metrics(self._run_dir)
        self._tracker.finish()
        if self._name == "tensorboard":
            self._open_tensorboard(rows[: number + 1])
        else:
            log.warning(
                "trackio: the run has other rows than `metrics.jsonl` from row %d on, and keeps them; a new run begins",
                number + 1,
            )
            self._settings["replaces"] = self._tracker.run.id
            self._open_trackio("never")
        for earlier, row in enumerate(rows[:number]):
            self.log(earlier, row, ())

    def _record(self, number: int, row: MetricsRow, samples: Sequence[SampledText]) -> None:
        values = {name: value for name, value in row.items() if name != "step"}
        if samples and self._name == "tensorboard":
            values["samples"] = "\n\n".join(f"{t}: **{prompt}**{text}" for t, prompt, text in samples)
        self._recorded.add(number, row)
        self._tracker.log(values, step=row["step"])

    def checkpoint(self, path: Path, *, best: bool, metadata: Mapping[str, Any]) -> None:
        """Do nothing: these trackers record no checkpoints."""

    def finish(self, end: RunEnd) -> None:
        """Close the run."""
        if self._name == "trackio" and end.state == "finished" and self._seen < self._given:
            self._begin_again(self._seen)  # the abandoned history was longer
        self._tracker.finish()

    def abandon(self) -> None:
        """Leave the tracker to the next `open` in this process, which lets it finish first; nothing blocks the exit."""
        if self._tracker is not None:
            _abandoned.append(self._tracker)


def named_figures(row: MetricsRow) -> set[tuple[int, str]]:
    """Return the step and name of each figure of a row."""
    return {(row["step"], name) for name in row if name != "step"}


def wait_for_a_later_name(folder: Path) -> None:
    """Wait, a second at most, until a new event file is later by name than those of a folder.

    TensorBoard reads files in the order of their names: the second, the host, the process, and a counter as text, so
    that file 10 of a process precedes file 9 if both began in one second.
    """
    now = time.time()
    if list(folder.glob(f"{EVENT_FILES[:-1]}{int(now)}.*")):
        time.sleep(int(now) + 1.01 - now)


def recorded_events(folder: Path) -> set[tuple[int, str]]:
    """Return the step and name of each figure that TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog

    recorded: set[tuple[int, str]] = set()
    for path in sorted(folder.glob(EVENT_FILES)):  # the names begin with the time
        for event in EventFileLoader(str(path)).Load():
            # A start with a purge step hides the figures of earlier files from that step on.
            if event.session_log.status == SessionLog.START:
                recorded = {(step, name) for step, name in recorded if step < event.step}
            recorded |= {(event.step, value.tag) for value in event.summary.value}
    return recorded
