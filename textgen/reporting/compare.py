"""`textgen compare`: a table of runs, the best first, from the files that they have left. No torch here."""

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
from textgen.settings import COMMAND_SETTINGS, flatten

# Characters of a setting in the table; a list of prompts would fill a screen. `--json` has all of it.
LONGEST = 40


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run by its figures; None where it has not come to one."""

    run: str
    state: str | None
    """of status.json; a killed training still says `running`"""
    reason: str | None
    """why it ended, unless it finished"""
    step: int | None
    """of the last row of metrics"""
    total_steps: int | None
    bits_per_byte: float | None
    """of the last validation"""
    best_bits_per_byte: float | None
    """of all validations, also those that `evaluate_documents` kept short"""
    valid_loss: float | None
    """of the last validation, in nats per token; all there is where the tokenizer loses text"""
    train_loss: float | None
    """of the last row of metrics"""
    tokens_per_second: float | None
    """median of all rows"""
    minutes: float | None
    """spent on steps, over all parts of a run that was resumed"""
    processes: int | None
    """that wrote the newest checkpoint"""
    settings: dict[str, Any]
    """by dotted name; in the end those that are not the same in all runs"""


def read_run(path: Path) -> Run:
    """Read the figures and all settings of a run.

    Raises:
        OSError: a file that every run has cannot be read.
        ValueError: it does not hold what it should; the message is one line.
    """
    if not path.is_dir():
        raise ValueError(f"`{path}` is no run folder" if path.exists() else f"`{path}` does not exist")
    return summarize(path, read_settings(path / SETTINGS_NAME), read_metrics_strict(path))


def summarize(path: Path, settings: dict[str, Any], rows: Sequence[MetricsRow]) -> Run:
    """Return the figures of a run by its settings and metrics, and what else can be read in its folder."""
    trainer, status = _read_newest_trainer(path), read_status(path)
    if isinstance(trainer.get("mixed_precision"), str):  # config.yaml has null where hardware decided
        settings = settings | {"mixed_precision": trainer["mixed_precision"]}
    bits, speeds = _values(rows, "valid/bits_per_byte"), _values(rows, "train/tokens_per_second")
    steps = _values(rows, "step")
    return Run(
        run=str(path),
        state=_one(status.get("state"), str), reason=_one(status.get("reason"), str),
        step=int(steps[-1]) if steps else _one(status.get("step"), int),
        total_steps=_one(status.get("total_steps"), int),
        bits_per_byte=_last(bits), best_bits_per_byte=min(bits, default=None),
        valid_loss=_last(_values(rows, "valid/loss")), train_loss=_last(_values(rows, "train/loss")),
        tokens_per_second=median(speeds) if speeds else None, minutes=_minutes(rows),
        processes=_one(trainer.get("processes"), int), settings=settings,
    )  # fmt: skip


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings by dotted name; the defaults of those that are younger than the run.

    Raises:
        OSError, ValueError: as `read_run`.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is not YAML: {' '.join(str(error).split())[:80]}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`{path}` holds no settings: {str(settings)[:40]}")
    return flatten(json.loads(json.dumps(asdict(TrainConfig())))) | flatten(settings)


def _read_newest_trainer(run_dir: Path) -> dict[str, Any]:
    """Return what the newest checkpoint that can be read says of its training; nothing where there is none."""
    found = run_dir.glob("checkpoints/step-*[0-9]/trainer.json")
    for path in sorted(found, key=lambda path: (len(path.parent.name), path), reverse=True):
        try:
            trainer = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(trainer, dict):
            return trainer
    return {}


def _values(rows: Sequence[MetricsRow], name: str) -> list[float]:
    """Return the finite numbers under a name."""
    values = [row.get(name) for row in rows]
    return [value for value in values if isinstance(value, float) and math.isfinite(value)]


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def _one(value: Any, kind: type) -> Any:
    return value if type(value) is kind else None


def _minutes(rows: Sequence[MetricsRow]) -> float | None:
    """Return the minutes that the steps took: tokens of each row by tokens per second."""
    timed = [row for row in rows if all(_values([row], name) for name in ("tokens", "train/tokens_per_second"))]
    tokens, speeds = _values(timed, "tokens"), _values(timed, "train/tokens_per_second")
    parts = zip(tokens, [0.0, *tokens[:-1]], speeds, strict=True)
    return sum((now - before) / speed for now, before, speed in parts if speed > 0) / 60 if timed else None


def keep_differences(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with those settings alone that are not the same in all of them."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    told = [
        n
        for n in names
        if n not in COMMAND_SETTINGS and len({json.dumps(run.settings.get(n), default=str) for run in runs}) > 1
    ]
    return [replace(run, settings={name: run.settings.get(name) for name in told}) for run in runs]


def format_table(runs: Sequence[Run], *, width: int) -> str:
    """Return a line for each run, or a column where lines would be wider than `width`."""
    lines = [["run", "state", "step", "bits/byte", "best", "train loss", "tokens/s", "minutes", "processes"]]
    lines[0] += runs[0].settings
    lines += [_cells(run) for run in runs]
    table = _align(lines)
    fits = max(map(len, table.splitlines())) <= width
    return table if fits else _align([list(column) for column in zip(*lines, strict=True)])


def _cells(run: Run) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    step = "-" if run.step is None else f"{run.step}" + (f"/{run.total_steps}" if run.total_steps else "")
    figures = [
        number(run.bits_per_byte, ".4f"), number(run.best_bits_per_byte, ".4f"), number(run.train_loss, ".4f"),
        number(run.tokens_per_second, ",.0f"), number(run.minutes, ".1f"), number(run.processes, "d"),
    ]  # fmt: skip
    return [run.run, run.state or "-", step, *figures, *map(_text, run.settings.values())]


def _text(value: Any) -> str:
    """Return a setting as JSON has it, a text without its quotes, in a column's width."""
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _align(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)
