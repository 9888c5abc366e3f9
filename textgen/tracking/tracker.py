"""metrics.jsonl as it is written, and the threads on which trackers follow it."""

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
from typing import Literal, Protocol

from textgen.errors import first_line
from textgen.files import write_atomic
from textgen.runs.metrics import METRICS_NAME, MetricsRow, read_metrics
from textgen.runs.samples import SampledText

log = logging.getLogger("textgen")

# Rows that a tracker may be behind, which is hours of a training; then it is dead, whatever it says.
MAX_WAITING = 10_000


@dataclass(frozen=True)
class RunEnd:
    """How a training ended."""

    state: Literal["finished", "preempted", "failed"]
    exit_code: int
    reason: str


class Backend(Protocol):
    """A tracker as the thread that follows a training calls it; every method may raise."""

    patience: float
    """seconds that the end of a training waits for it"""
    catches_up: bool
    """whether `open` records the rows that an earlier part of the training has lost"""

    def open(self, rows: Sequence[MetricsRow]) -> None:
        """Begin, or go on with the run of an earlier part of the training, given its rows.

        It may lack the last ones, which a kill loses, and it may have later ones.
        """

    def log(self, number: int, row: MetricsRow, samples: Sequence[SampledText]) -> None:
        """Record a row of metrics.jsonl, its number counted from 0 through all parts of the training."""

    def checkpoint(self, path: Path, *, best: bool, about: MetricsRow) -> None:
        """Record a checkpoint that is on disk."""

    def finish(self, end: RunEnd) -> None:
        """Tell how the training ended, and close."""

    def abandon(self) -> None:
        """Leave nothing behind that the end of this process would wait for."""


class Tracker:
    """Writes metrics of the main process; on the others every method does nothing.

    `metrics.jsonl` is the source of truth. Other trackers are given its rows: whatever fails there is said once and the
    training goes on.

    Args:
        run_dir: the run's folder.
        backends: what follows, by name.
        main: whether this is the main process.
        first_step: metrics of later steps are dropped from the file: they are about to be made again.
        evaluated_step: the same of evaluations; one may have been interrupted before it was saved.
    """

    def __init__(
        self, run_dir: Path, backends: Mapping[str, Backend], *, main: bool, first_step: int, evaluated_step: int
    ) -> None:
        self._main, self._path = main, run_dir / METRICS_NAME
        self._followers: list[Follower] = []
        if not main:
            return
        kept = [
            row
            for row in read_metrics(run_dir)
            if row["step"] <= (first_step if "train/loss" in row else evaluated_step)
        ]
        write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._number = len(kept)
        self._followers = [Follower(name, backend, kept) for name, backend in backends.items()]

    def log(self, step: int, values: Mapping[str, float], samples: Sequence[SampledText] = ()) -> None:
        """Append a row of metrics; samples of text go to the trackers alone."""
        if not self._main:
            return
        row, number = {"step": step, **values}, self._number
        self._number += 1
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for follower in self._followers:
            follower.put(lambda backend: backend.log(number, row, samples))

    def checkpoint(self, path: Path, *, best: bool, about: MetricsRow) -> None:
        """Tell of a checkpoint that is on disk."""
        for follower in self._followers:
            follower.put(lambda backend: backend.checkpoint(path, best=best, about=about))

    def sync(self) -> None:
        """Wait until the rows so far are on disk: a checkpoint must not outlive them."""
        if self._main:
            with self._path.open("a") as file:
                os.fsync(file.fileno())

    def finish(self, end: RunEnd) -> None:
        """Tell the trackers how the training ended, and wait a little for them."""
        for follower in self._followers:
            follower.put(lambda backend: backend.finish(end))
        for follower in self._followers:
            follower.end()


class Follower:
    """Calls a tracker on a thread of its own, where it can neither end nor slow a training (law 7).

    What fails is said once, and from then on nothing is done.

    Args:
        name: what the tracker is called.
        backend: the tracker.
        rows: of metrics.jsonl so far.
    """

    def __init__(self, name: str, backend: Backend, rows: Sequence[MetricsRow]) -> None:
        self._name, self._backend, self._off = name, backend, False
        self._waiting: queue.Queue[Callable[[Backend], None] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._follow, args=(rows,), name=name, daemon=True)
        self._thread.start()

    def put(self, action: Callable[[Backend], None]) -> None:
        """Have the thread do something when it comes to it."""
        try:
            if not self._off:
                self._waiting.put_nowait(action)
        except queue.Full:
            self._give_up(f"it is {MAX_WAITING} rows behind")

    def end(self) -> None:
        """Wait until all is done, a few seconds at most."""
        with suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(self._backend.patience)
        if self._thread.is_alive():
            reason = f"it has not ended within {self._backend.patience:.0f} s"
            if self._backend.catches_up:
                reason += "; rows that it lacks come when a start goes on with this run"
            self._give_up(reason)
            self._backend.abandon()

    def _follow(self, rows: Sequence[MetricsRow]) -> None:
        try:
            self._backend.open(rows)
            while not self._off and (action := self._waiting.get()) is not None:
                action(self._backend)
        except Exception as error:
            self._give_up(first_line(error))
        if self._off:
            self._backend.abandon()

    def _give_up(self, reason: str) -> None:
        if not self._off:
            self._off = True
            log.warning("%s is off from here on, `%s` goes on: %s", self._name, METRICS_NAME, reason)
