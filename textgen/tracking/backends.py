"""The trackers that a training asks for: W&B, and TensorBoard and trackio through Accelerate."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textgen.config import TrackingConfig
from textgen.errors import TextgenError
from textgen.packages import require_packages
from textgen.tracking.accelerate_trackers import AccelerateTracker
from textgen.tracking.tracker import Backend
from textgen.tracking.wandb import WANDB_ID, WandbRun
from textgen.tracking.wandb_settings import find_mode, find_setting

log = logging.getLogger("textgen")

# Slurm's variables that identify the job of a run.
SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
)


def check_trackers(config: TrackingConfig) -> None:
    """Raise TextgenError if a tracker is not installed, or if W&B's own settings cannot be used."""
    for name in active_trackers(config):
        require_packages(f"`tracking.backends` {name}", name, extra=None if name == "wandb" else name)
        run_id = find_setting("run_id")
        if name == "wandb" and run_id and not re.fullmatch(WANDB_ID, run_id.value):
            raise TextgenError(
                f"{run_id.place} is {run_id.value!r}, not 1 to 64 letters, digits, underscores, hyphens and periods"
            )


def active_trackers(config: TrackingConfig) -> list[str]:
    """Return the names of the trackers that the user has not switched off."""
    if config.mode == "disabled":
        return []
    return [name for name in config.backends if name != "wandb" or find_mode(config).value != "disabled"]


def build_trackers(
    config: TrackingConfig,
    run_dir: Path,
    settings: Mapping[str, Any],
    *,
    wandb_id: str,
    resumed: bool,
    first_step: int,
) -> dict[str, Backend]:
    """Return the trackers that the settings name; none is opened yet.

    Args:
        config: names and modes of the trackers.
        run_dir: the run's folder.
        settings: recorded as the run's config.
        wandb_id: id of the run in W&B.
        resumed: whether an earlier part of the training has begun the run.
        first_step: the step that the training continues from.
    """
    trackers: dict[str, Backend] = {}
    if config.mode == "auto" and "wandb" in config.backends and (mode := find_mode(config)).value == "disabled":
        log.info("W&B is switched off by %s", mode.place)
    for name in active_trackers(config):
        if name == "wandb":
            trackers["W&B"] = WandbRun(config, run_dir, settings, run_id=wandb_id, resumed=resumed)
        else:
            trackers[name] = AccelerateTracker(name, config, run_dir, settings, resumed=resumed, first_step=first_step)
    return trackers


def describe_launch(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the launcher of this process and its Slurm job. No other variable of the environment is read."""
    launcher = "python"
    if "TORCHELASTIC_RUN_ID" in environment or "ACCELERATE_MIXED_PRECISION" in environment:
        launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in environment else "torchrun"
    elif "SLURM_STEP_ID" in environment:
        launcher = "srun"
    return {"launcher": launcher} | {name: environment[name] for name in SLURM_VARIABLES if name in environment}
