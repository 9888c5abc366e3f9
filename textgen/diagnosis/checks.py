"""All checks in their order. A failed check is a result, never an exception, so the other checks still run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from textgen.config import TrainConfig
from textgen.diagnosis.inputs import check_data, check_wandb, find_data
from textgen.diagnosis.machine import check_gpus, check_limits, check_processors, check_versions
from textgen.diagnosis.network import check_all_reduce, check_clocks
from textgen.diagnosis.precision import check_precision
from textgen.diagnosis.process_group import ProcessGroup
from textgen.diagnosis.results import Check
from textgen.diagnosis.storage import check_disk, check_space
from textgen.errors import first_line


def examine(group: ProcessGroup, config: TrainConfig) -> list[Check]:
    """Run all checks except `check_world`, which needs the results of all processes. Collective."""
    run_dir, device = Path(config.run_dir).absolute(), group.device
    data, store = find_data(config)
    return [
        check_versions(group),
        _guard("gpus", lambda: check_gpus(device)),
        check_processors(group),
        _guard("precision", lambda: check_precision(config, device, group.precision)),
        check_all_reduce(group),
        check_disk(group, run_dir),
        _guard("space", lambda: check_space(config, run_dir, store)),
        check_data(group, data, store),
        _guard("wandb", lambda: check_wandb(config)),
        check_clocks(group),
        _guard("limits", lambda: check_limits(device)),
    ]


def _guard(name: str, check: Callable[[], Check]) -> Check:
    """Run a check that needs no other process; an exception becomes a failed check."""
    try:
        return check()
    except Exception as error:  # drivers, file systems and torch raise many classes
        return Check(name, "fail", {}, first_line(error))
