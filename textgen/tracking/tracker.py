"""The writer of metrics.jsonl, and the threads that pass its rows to trackers."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from textgen.errors import first_line
from textgen.files import write_atomic
from textgen.runs.metrics_file import METRICS_NAME, MetricsRow, read_metrics
from textgen.runs.samples import SampledText

log = logging.getLogger("textgen")

# Rows that may wait for a tracker: hours of a training. A tracker that is further behind does not recover.
MAX_WAITING = 10_000

# Seconds that the end of a training waits for a tracker to write its last rows to the disk. That takes a moment, unless
# the training was shorter than the tracker's start.
FINISH_SECONDS = 10


@dataclass(frozen=True)
class RunEnd:
    """How a training ended."""

    state: Literal["finished", "preempted", "failed"]
    exit_code: int
    reason: str


class Backend(Protocol):
    """A tracker, as its thread calls it. Every method may raise."""

    finish_seconds: float
    """seconds that the end of a training waits for the tracker"""
    catches_up: bool
    """whether `open` records the rows that an earlier part of the training has lost"""

    def open(self, rows: Sequence[MetricsRow]) -> None:
        """Begin the run, or continue the run of an earlier part of the training.

        Args:
            rows: of the earlier parts. The tracker may lack the last of them, since a kill loses rows, and it may have
                rows of later steps.
        """

    def log(self, number: int, row: MetricsRow, samples: Sequence[SampledText]) -> None:
        """Record a row of metrics.jsonl; its number counts from 0 through all parts of the training."""

    def checkpoint(self, path: Path, *, best: bool, metadata: Mapping[str, Any]) -> None:
        """Record a checkpoint that is on disk."""

    def finish(self, end: RunEnd) -> None:
        """Record how the training ended, and close the run."""

    def abandon(self) -> None:
        """Stop everything that would make this process wait at its exit."""


class Tracker:
    """Write metrics.jsonl on the main process, and pass its rows to trackers. Other processes do nothing.

    metrics.jsonl is the source of truth. A tracker that fails is logged once, and the training continues without it.

    Args:
        run_dir: the run's folder.
        backends: trackers by name.
        main: whether this is the main process.
        first_step: the last step of the training that is kept. Training rows of later steps are dropped from the file,
            since the training makes them again.
        evaluated_step: the last evaluation that is kept. An evaluation may have been interrupted before it was saved.
        on_row: called with each new row, in the thread that trains. What it raises ends the training.
        require: called before each write to metrics.jsonl; raises if the run is no longer held.
    """

    def __init__(
        self,
        run_dir: Path,
        backends: Mapping[str, Backend],
        *,
        main: bool,
        first_step: int,
        evaluated_step: int,
        on_row: Callable[[dict[str, float]], None] | None = None,
        require: Callable[[], None] | None = None,
    ) -> None:
        self._main, self._path, self._on_row = main, run_dir / METRICS_NAME, on_row
        self._threads: list[TrackerThread] = []
        self._require = require
        if not main:
            return
        kept = [
            row
            for row in read_metrics(run_dir)
            if row["step"] <= (first_step if "train/loss" in row else evaluated_step)
        ]
        write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in kept), require=require)
        self._number = len(kept)
        self._threads = [TrackerThread(name, backend, kept) for name, backend in backends.items()]

    def log(self, step: int, values: Mapping[str, float], samples: Sequence[SampledText] = ()) -> None:
        """Append a row of metrics; samples of text go to the trackers only."""
        if not self._main:
            return
        row, number = {"step": step, **values}, self._number
        self._number += 1
        with self._path.open("a", encoding="utf-8") as file:
            # After the opening: a training that takes the run over replaces the file, and a late row misses that one.
            if self._require is not None:
                self._require()
            file.write(json.dumps(row) + "\n")
        for thread in self._threads:
            thread.put(lambda backend: backend.log(number, row, samples))
        if self._on_row is not None:
            self._on_row(dict(row))

    def checkpoint(self, path: Path, *, best: bool, metadata: Mapping[str, Any]) -> None:
        """Pass a checkpoint that is on disk to the trackers."""
        for thread in self._threads:
            thread.put(lambda backend: backend.checkpoint(path, best=best, metadata=metadata))

    def sync(self) -> None:
        """Wait until all rows are on disk. A checkpoint is written after its rows, so that it never outlives them."""
        if self._main:
            with self._path.open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def finish(self, end: RunEnd) -> None:
        """Pass the end of the training to the trackers, and wait for each at most its `finish_seconds`."""
        for thread in self._threads:
            thread.put(lambda backend: backend.finish(end))
        for thread in self._threads:
            thread.close()


class TrackerThread:
    """Call a tracker on a separate thread, where it can neither end nor slow a training (law 7).

    After the first failure the tracker is switched off: one line is logged, and nothing more is passed to it.

    Args:
        name: the tracker's name in the log.
        backend: the tracker.
        rows: rows of metrics.jsonl that earlier parts of the training wrote.
    """

    def __init__(self, name: str, backend: Backend, rows: Sequence[MetricsRow]) -> None:
        self._name, self._backend, self._off = name, backend, False
        self._waiting: queue.Queue[Callable[[Backend], None] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, args=(rows,), name=name, daemon=True)
        self._thread.start()

    def put(self, action: Callable[[Backend], None]) -> None:
        """Queue an action for the thread; never waits."""
        try:
            if not self._off:
                self._waiting.put_nowait(action)
        except queue.Full:
            self._switch_off(f"it is {MAX_WAITING} rows behind")

    def close(self) -> None:
        """Wait until the queue is done, at most `finish_seconds` of the tracker; then abandon the tracker."""
        with suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(self._backend.finish_seconds)
        if self._thread.is_alive():
            reason = f"it has not ended within {self._backend.finish_seconds:.0f} s"
            if self._backend.catches_up:
                reason += "; start this run again to record its missing rows"
            self._switch_off(reason)
            self._backend.abandon()

    def _run(self, rows: Sequence[MetricsRow]) -> None:
        try:
            self._backend.open(rows)
            while not self._off and (action := self._waiting.get()) is not None:
                action(self._backend)
        except Exception as error:
            self._switch_off(first_line(error))
        if self._off:
            self._backend.abandon()

    def _switch_off(self, reason: str) -> None:
        if not self._off:
            self._off = True
            log.warning("%s is off from here on, `%s` continues: %s", self._name, METRICS_NAME, reason)
