"""The trackers that a training asks for: W&B, and TensorBoard and trackio by Accelerate."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from textgen.config import TrackingConfig
from textgen.errors import TextgenError
from textgen.settings import flatten
from textgen.tracking.tracker import Backend, Row, RunEnd, SampledText
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
            trackers[name] = AccelerateTracker(name, config, run_dir, settings, first_step=first_step)
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

    Args:
        name: of the tracker, as Accelerate knows it.
        config: the project.
        run_dir: the run's folder.
        settings: shown as the run's parameters.
        first_step: where the training goes on; TensorBoard leaves out what it has of later steps.
    """

    def __init__(
        self, name: str, config: TrackingConfig, run_dir: Path, settings: Mapping[str, Any], *, first_step: int
    ) -> None:
        self._name, self._config, self._dir, self._first = name, config, run_dir, first_step
        plain = {key: value for key, value in flatten(settings).items() if value is not None}
        self._settings = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in plain.items()}
        self._tracker: Any = None
        self.patience: float = PATIENCE_SECONDS

    def open(self, rows: Sequence[Row]) -> None:
        """Begin or go on."""
        from accelerate.tracking import TensorBoardTracker, TrackioTracker

        if self._name == "tensorboard":
            self._tracker = TensorBoardTracker("tensorboard", self._dir, purge_step=self._first + 1)
        else:
            self._tracker = TrackioTracker(self._config.project, name=self._dir.name, resume="allow")
        self._tracker.start()
        self._tracker.store_init_configuration(self._settings)

    def log(self, number: int, row: Row, samples: Sequence[SampledText]) -> None:
        """Record a row, and samples as text."""
        values = {name: value for name, value in row.items() if name != "step"}
        if samples and self._name == "tensorboard":
            values["samples"] = "\n\n".join(f"{t}: **{prompt}**{text}" for t, prompt, text in samples)
        self._tracker.log(values, step=row["step"])

    def checkpoint(self, path: Path, *, best: bool, about: Row) -> None:
        """Nothing: there is no place for it."""

    def finish(self, end: RunEnd) -> None:
        """Close."""
        self._tracker.finish()

    def abandon(self) -> None:
        """Nothing waits."""
