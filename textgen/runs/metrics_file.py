"""metrics.jsonl: one row of figures per log interval or evaluation.

A kill may cut off the last line, and a disk may damage any line. The three readers differ in what they do then:
`read_metrics` ends before the line, `read_metrics_strict` refuses the file, `read_metrics_lenient` leaves the line out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"

MetricsRow = Mapping[str, Any]
"""`step`, and figures by name"""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run up to the first damaged line; none if the file does not exist."""
    rows: list[dict[str, Any]] = []
    for line in _read_lines(run_dir):
        try:
            row = _parse(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def read_metrics_strict(run_dir: Path) -> list[MetricsRow]:
    """Return the rows of a run, all numbers as floats; a last line that a kill cut off is left out.

    Raises:
        ValueError: a line is damaged; the message is one line.
    """
    lines, path = _read_lines(run_dir), run_dir / METRICS_NAME
    rows: list[MetricsRow] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = _parse(line, parse_int=float)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"`{path}` line {number} is not JSON: {line[:40]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"`{path}` line {number} is not a row of metrics: {str(row)[:40]}")
        rows.append(row)
    return rows


def read_metrics_lenient(run_dir: Path) -> tuple[list[MetricsRow], int]:
    """Return the rows that have a step, all numbers as floats, and the number of other lines."""
    lines = _read_lines(run_dir)
    rows: list[MetricsRow] = []
    for line in lines:
        try:
            row = _parse(line, parse_int=float)
        except ValueError:
            continue
        if isinstance(row, dict) and is_number(row.get("step")):
            rows.append(row)
    return rows, len(lines) - len(rows)


def _read_lines(run_dir: Path) -> list[bytes]:
    path = run_dir / METRICS_NAME
    return path.read_bytes().splitlines() if path.exists() else []


def _parse(line: bytes, *, parse_int: type[int] | type[float] = int) -> Any:
    """Return the value of a line of JSON; with `parse_int=float`, an integer of more than 4,300 digits is readable.

    Raises:
        ValueError: the line is not JSON, or is nested too deeply for Python.
    """
    try:
        return json.loads(line, parse_int=parse_int)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def is_number(value: object) -> bool:
    """Return whether a value is a number below 1e300, so that the difference of two is finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def is_machine_metric(name: str) -> bool:
    """Return whether a metric depends on the clock or the memory; equal trainings differ in these metrics."""
    return re.search(r"per_second|_seconds$|_share$|^memory/|^machine/", name) is not None
