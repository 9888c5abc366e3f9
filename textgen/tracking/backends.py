"""The trackers that a training asks for: W&B, and TensorBoard and trackio by Accelerate."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from textgen.config import TrackingConfig
from textgen.errors import TextgenError
from textgen.runs.metrics import MetricsRow
from textgen.runs.samples import SampledText
from textgen.settings import flatten
from textgen.tracking.tracker import Backend, RunEnd
from textgen.tracking.wandb import PATIENCE_SECONDS, WandbRun


def assert_installed(config: TrackingConfig) -> None:
    """Raise TextgenError where a tracker is asked for that is not installed."""
    for name in config.backends:
        if config.mode != "disabled" and importlib.util.find_spec(name) is None:
            raise TextgenError(f"`tracking.backends` names {name}, which is not installed: `pip install {name}`")


log = logging.getLogger("textgen")

# What Slurm tells that finds a run's job again.
SLURM_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT",
    "SLURM_CLUSTER_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES",
)  # fmt: skip


def build_trackers(
    config: TrackingConfig,
    run_dir: Path,
    settings: Mapping[str, Any],
    *,
    wandb_id: str,
    resumed: bool,
    first_step: int,
) -> dict[str, Backend]:
    """Return the trackers that are asked for, by name; none is opened yet.

    Args:
        config: which, and how.
        run_dir: the run's folder.
        settings: shown as the run's config.
        wandb_id: of the run in W&B.
        resumed: whether an earlier part of the training has begun it.
        first_step: where the training goes on.
    """
    if config.mode == "disabled":
        return {}
    trackers: dict[str, Backend] = {}
    for name in config.backends:
        if name == "wandb":
            trackers["W&B"] = WandbRun(config, run_dir, settings, run_id=wandb_id, resumed=resumed)
        else:
            trackers[name] = AccelerateTracker(name, config, run_dir, settings, resumed=resumed, first_step=first_step)
    return trackers


def describe_launch(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what started this process, and its Slurm job; of the environment's variables no others."""
    launcher = "python"
    if "TORCHELASTIC_RUN_ID" in environment or "ACCELERATE_MIXED_PRECISION" in environment:
        launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in environment else "torchrun"
    elif "SLURM_STEP_ID" in environment:
        launcher = "srun"
    return {"launcher": launcher} | {name: environment[name] for name in SLURM_VARIABLES if name in environment}


# --- what Accelerate has trackers for --------------------------------------------------------------------------------


class AccelerateTracker:
    """TensorBoard or trackio by Accelerate's own trackers: figures, and samples where there is a place for text.

    A training that goes on looks up which rows of metrics.jsonl the tracker has, and gives it the others: each row is
    there once. Where trackio sends rows to a server or to its inbox of files, it cannot be asked, and a line says so.

    Args:
        name: of the tracker, as Accelerate knows it.
        config: the project.
        run_dir: the run's folder.
        settings: shown as the run's parameters.
        resumed: whether an earlier part of the training has begun the run.
        first_step: where the training goes on; TensorBoard leaves out what it has of later steps.
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
        self._name, self._config, self._dir, self._first = name, config, run_dir, first_step
        plain = {key: value for key, value in flatten(settings).items() if value is not None}
        self._settings = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in plain.items()}
        self._tracker: Any = None
        self._resumed, self._recorded = resumed, set[tuple[int, str]]()
        self.patience: float = PATIENCE_SECONDS
        remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        self.catches_up: bool = name == "tensorboard" or not remote

    def open(self, rows: Sequence[MetricsRow]) -> None:
        """Begin, or go on with the run and give it the rows that it lacks."""
        while _given_up:  # an earlier part of the training in this process, which may still be writing
            _given_up.pop().finish()
        self._tracker = self._open_tensorboard(rows) if self._name == "tensorboard" else self._open_trackio()
        self._tracker.store_init_configuration(self._settings)
        if self.catches_up:
            for number, row in enumerate(rows):
                self.log(number, row, ())
        elif rows:
            log.info("%s cannot be asked for its rows: those that it lost are in `metrics.jsonl` alone", self._name)

    def _open_tensorboard(self, rows: Sequence[MetricsRow]) -> Any:
        """Have TensorBoard leave out what it has from the first row on that it lacks; that is logged again."""
        from accelerate.tracking import TensorBoardTracker

        recorded = recorded_events(self._dir / "tensorboard") if rows else set()
        purged = min([self._first + 1, *(row["step"] for row in rows if not names_at_step(row) <= recorded)])
        self._recorded = {(step, name) for step, name in recorded if step < purged}
        tracker = TensorBoardTracker("tensorboard", self._dir, purge_step=purged)
        tracker.start()
        return tracker

    def _open_trackio(self) -> Any:
        """Go on with the latest run of this name; a training that begins has a new one."""
        from accelerate.tracking import TrackioTracker
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.utils import get_storage_mode

        resume = "allow" if self._resumed else "never"
        tracker = TrackioTracker(self._config.project, name=self._dir.name, resume=resume)
        tracker.start()
        run = tracker.run
        self.catches_up = run.url is None and get_storage_mode() == "sqlite"
        if self.catches_up:
            recorded = SQLiteStorage.get_logs(run.project, run.name, run_id=run.id)
            self._recorded = {(row["step"], name) for row in recorded for name in row}
        return tracker

    def log(self, number: int, row: MetricsRow, samples: Sequence[SampledText]) -> None:
        """Record a row, and samples as text."""
        if names_at_step(row) <= self._recorded:
            return
        values = {name: value for name, value in row.items() if name != "step"}
        if samples and self._name == "tensorboard":
            values["samples"] = "\n\n".join(f"{t}: **{prompt}**{text}" for t, prompt, text in samples)
        self._tracker.log(values, step=row["step"])

    def checkpoint(self, path: Path, *, best: bool, about: MetricsRow) -> None:
        """Nothing: there is no place for it."""

    def finish(self, end: RunEnd) -> None:
        """Close."""
        self._tracker.finish()

    def abandon(self) -> None:
        """Nothing waits; another part of the training in this process lets it finish first."""
        if self._tracker is not None:
            _given_up.append(self._tracker)


_given_up: list[Any] = []
"""trackers of Accelerate that were abandoned in this process"""


def names_at_step(row: MetricsRow) -> set[tuple[int, str]]:
    """Return the step and name of each figure of a row."""
    return {(row["step"], name) for name in row if name != "step"}


def recorded_events(folder: Path) -> set[tuple[int, str]]:
    """Return the step and name of each figure that TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog

    recorded: set[tuple[int, str]] = set()
    for path in sorted(folder.glob("events.out.tfevents.*")):  # by time
        for event in EventFileLoader(str(path)).Load():
            if event.session_log.status == SessionLog.START:  # leaves out later steps of the files before
                recorded = {(step, name) for step, name in recorded if step < event.step}
            recorded |= {(event.step, value.tag) for value in event.summary.value}
    return recorded
