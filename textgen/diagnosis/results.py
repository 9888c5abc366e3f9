"""The result of a check, and one report from the results of all processes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]
Value = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Check:
    """The result of one check on one process."""

    name: str
    status: Status
    value: Value
    """figures and texts by name; the names carry the units"""
    advice: str = ""
    """one line with the problem and the remedy; empty if the status is ok"""


def merge(everyone: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per check; several rows if processes differ in status, advice or a text.

    Args:
        everyone: for each process a mapping with `machine` and `checks`.

    Returns:
        Rows with name, status, machines (None for all), value and advice. A figure that differs between the processes
        of a row is a list: smallest, median, largest.
    """
    rows = []
    names = dict.fromkeys(check["name"] for one in everyone for check in one["checks"])
    for name in names:
        results = [(one["machine"], check) for one in everyone for check in one["checks"] if check["name"] == name]
        # Processes share a row if everything but their figures is equal.
        groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for machine, check in results:
            texts = {key: value if isinstance(value, str) else None for key, value in check["value"].items()}
            groups.setdefault(json.dumps([check["status"], check["advice"], texts]), []).append((machine, check))
        for group in groups.values():
            machines = None if len(groups) == 1 else list(dict.fromkeys(machine for machine, _ in group))
            first = group[0][1]
            value = {key: _summary([check["value"][key] for _, check in group]) for key in first["value"]}
            rows.append(first | {"machines": machines, "value": value})
    return rows


def _summary(values: Sequence[Any]) -> Any:
    """Return the common value, or else smallest, median and largest."""
    if len(set(values)) == 1:
        return values[0]
    return [min(values), statistics.median(values), max(values)]


def as_json(rows: Sequence[Mapping[str, Any]], everyone: Sequence[Mapping[str, Any]]) -> str:
    """Return the report as one JSON object.

    Args:
        rows: from `merge`.
        everyone: the argument of `merge`.
    """
    machines = list(dict.fromkeys(one["machine"] for one in everyone))
    worst = next(status for status in ("fail", "warn", "ok") if status in {row["status"] for row in rows})
    return json.dumps({"status": worst, "processes": len(everyone), "machines": machines, "checks": rows})


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the report as lines; the last line names the failed checks and the warnings."""
    lines = []
    for row in rows:
        where = f"[{', '.join(row['machines'][:3])}{', ...' * (len(row['machines']) > 3)}] " if row["machines"] else ""
        values = ", ".join(f"{name} {_format(value)}" for name, value in row["value"].items())
        lines.append(f"{row['name']:12}{row['status']:6}{where}{values}".rstrip())
        if row["advice"]:
            lines.append(f"{'':18}-> {row['advice']}")
    named = {status: [row["name"] for row in rows if row["status"] == status] for status in ("fail", "warn")}
    if not any(named.values()):
        return "\n".join([*lines, "all checks passed"])
    verdict = [f"{status}: {', '.join(dict.fromkeys(names))}" for status, names in named.items() if names]
    return "\n".join([*lines, "; ".join(verdict)])


def _format(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(_format(one) for one in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value
