"""Summaries of runs from their files, and a table of them for `textgen compare`. This module imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from textgen.config import TrainConfig
from textgen.runs.directory import SETTINGS_NAME, read_status
from textgen.runs.metrics_file import MetricsRow, read_metrics_strict
from textgen.settings import COMMAND_SETTINGS, complete_record, flatten

# Characters of a setting in the table. A list of prompts would fill a screen; `--json` prints all of it.
MAX_CELL = 40


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Figures and settings of a run; None for a figure that the run has not reached."""

    run: str
    state: str | None
    """of status.json, which still has `running` after a kill"""
    reason: str | None
    """why the training ended; None if it finished"""
    step: int | None
    """of the last row of metrics"""
    total_steps: int | None
    bits_per_byte: float | None
    """of the last validation"""
    best_bits_per_byte: float | None
    """of all validations, those on `evaluate_documents` alone included"""
    valid_loss: float | None
    """of the last validation, in nats per token; the only figure if the tokenizer is not lossless"""
    train_loss: float | None
    """of the last row of metrics"""
    tokens_per_second: float | None
    """median of all rows"""
    minutes: float | None
    """spent on steps, over all parts of a resumed run"""
    data_share: float | None
    """of the time of steps, evaluations and saves: waiting for data"""
    exchange_share: float | None
    """waiting for other processes and their gradients; None for one process"""
    evaluate_share: float | None
    """scoring and sampling"""
    save_share: float | None
    """pauses for checkpoints; a background thread writes them"""
    processes: int | None
    """number of processes of the training that wrote the newest checkpoint"""
    settings: dict[str, Any]
    """by dotted name: all of them, or after `keep_differences` those that differ between runs"""


def read_run(path: Path) -> RunSummary:
    """Read the figures and all settings of a run.

    Raises:
        OSError: the settings or the metrics cannot be read.
        ValueError: the folder is not a run, or one of these files is damaged; the message is one line.
    """
    if not path.is_dir():
        raise ValueError(f"`{path}` is not a run folder" if path.exists() else f"`{path}` does not exist")
    return summarize(path, read_settings(path / SETTINGS_NAME), read_metrics_strict(path))


def summarize(path: Path, settings: dict[str, Any], rows: Sequence[MetricsRow]) -> RunSummary:
    """Summarize a run from its settings and metrics, and from its status and newest checkpoint if they are readable."""
    trainer, status = _read_newest_trainer(path), read_status(path)
    if isinstance(trainer.get("mixed_precision"), str):  # config.yaml has null if the hardware decided
        settings = settings | {"mixed_precision": trainer["mixed_precision"]}
    bits, speeds = _values(rows, "valid/bits_per_byte"), _values(rows, "train/tokens_per_second")
    steps = _values(rows, "step")
    return RunSummary(
        run=str(path),
        state=_if_type(status.get("state"), str),
        reason=_if_type(status.get("reason"), str),
        step=int(steps[-1]) if steps else _if_type(status.get("step"), int),
        total_steps=_if_type(status.get("total_steps"), int),
        bits_per_byte=_last(bits),
        best_bits_per_byte=min(bits, default=None),
        valid_loss=_last(_values(rows, "valid/loss")),
        train_loss=_last(_values(rows, "train/loss")),
        tokens_per_second=median(speeds) if speeds else None,
        minutes=_minutes(rows),
        **_shares_of_time(rows),
        processes=_if_type(trainer.get("processes"), int),
        settings=settings,
    )


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of config.yaml by dotted name; settings that the file lacks have their defaults.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged; the message is one line.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is not YAML: {' '.join(str(error).split())[:80]}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`{path}` holds no settings: {str(settings)[:40]}")
    return flatten(json.loads(json.dumps(asdict(TrainConfig())))) | flatten(complete_record(settings))


def _read_newest_trainer(run_dir: Path) -> dict[str, Any]:
    """Return trainer.json of the newest checkpoint with a readable one; empty if no checkpoint has one."""
    # Not `runs.checkpoint`, which imports torch. A longer name is a later step.
    paths = run_dir.glob("checkpoints/step-*[0-9]/trainer.json")
    for path in sorted(paths, key=lambda path: (len(path.parent.name), path), reverse=True):
        try:
            trainer = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(trainer, dict):
            return trainer
    return {}


def _values(rows: Sequence[MetricsRow], name: str) -> list[float]:
    """Return the finite figures of a name."""
    values = [row.get(name) for row in rows]
    return [value for value in values if isinstance(value, float) and math.isfinite(value)]


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def _if_type(value: Any, kind: type) -> Any:
    """Return a value if it is of the type, else None."""
    return value if type(value) is kind else None


def _minutes(rows: Sequence[MetricsRow]) -> float | None:
    """Return the minutes of the steps; None without figures."""
    return sum(seconds for seconds, _ in timed) / 60 if (timed := _timed_rows(rows)) else None


def _timed_rows(rows: Sequence[MetricsRow]) -> list[tuple[float, MetricsRow]]:
    """Return the seconds of the steps of each row with a speed: its tokens since the one before over its speed."""
    timed = [row for row in rows if all(_values([row], name) for name in ("tokens", "train/tokens_per_second"))]
    tokens, speeds = _values(timed, "tokens"), _values(timed, "train/tokens_per_second")
    parts = zip(tokens, [0.0, *tokens][:-1], speeds, timed, strict=True)
    return [((end - start) / speed if speed > 0 else 0.0, row) for end, start, speed, row in parts]


def _shares_of_time(rows: Sequence[MetricsRow]) -> dict[str, float | None]:
    """Return the parts of a run's time as `RunSummary` names them; None for those without figures."""
    timed = _timed_rows(rows)
    seconds: dict[str, float | None] = {}
    for name in ("data_share", "exchange_share"):
        parts = []
        for steps, row in timed:
            for share in _values([row], f"train/{name}"):  # of all the time since the row before
                elsewhere = sum(_values([row], "train/evaluate_share") + _values([row], "train/save_share"))
                parts.append(share * steps / (1 - elsewhere) if elsewhere < 1 else 0.0)
        seconds[name] = sum(parts) if parts else None
    for name, pauses in (("evaluate_share", "evaluate"), ("save_share", "checkpoint")):
        values = _values(rows, f"{pauses}/pause_seconds")
        seconds[name] = sum(values) if values else None
    total = sum(steps for steps, _ in timed) + (seconds["evaluate_share"] or 0) + (seconds["save_share"] or 0)
    return {name: None if value is None or not total else value / total for name, value in seconds.items()}


def keep_differences(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """Return the runs with only the settings that differ between them."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    different = [
        n
        for n in names
        if n not in COMMAND_SETTINGS and len({json.dumps(run.settings.get(n), default=str) for run in runs}) > 1
    ]
    return [replace(run, settings={name: run.settings.get(name) for name in different}) for run in runs]


def format_table(runs: Sequence[RunSummary], *, width: int) -> str:
    """Return a table with a line for each run, or with a column for each run if lines would be wider than `width`."""
    lines = [["run", "state", "step", "bits/byte", "best", "train loss", "tokens/s", "minutes", "processes"]]
    lines[0] += ["data", "exchange", "evaluate", "save"]
    lines[0] += runs[0].settings
    lines += [_cells(run) for run in runs]
    table = align(lines)
    fits = max(map(len, table.splitlines())) <= width
    return table if fits else align([list(column) for column in zip(*lines, strict=True)])


def _cells(run: RunSummary) -> list[str]:
    """Return the cells of a run's line."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    step = "-" if run.step is None else f"{run.step}" + (f"/{run.total_steps}" if run.total_steps else "")
    figures = [
        number(run.bits_per_byte, ".4f"),
        number(run.best_bits_per_byte, ".4f"),
        number(run.train_loss, ".4f"),
        number(run.tokens_per_second, ",.0f"),
        number(run.minutes, ".1f"),
        number(run.processes, "d"),
        *(number(share, ".1%") for share in (run.data_share, run.exchange_share, run.evaluate_share, run.save_share)),
    ]
    return [run.run, run.state or "-", step, *figures, *map(_setting_cell, run.settings.values())]


def _setting_cell(value: Any) -> str:
    """Return a setting as JSON, printable text without quotes, cut to the width of a cell."""
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value, default=str)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."


def align(lines: Sequence[Sequence[str]]) -> str:
    """Return lines whose columns are padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)
