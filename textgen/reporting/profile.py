"""Where the time of profiled steps went: the traces of `--profile`, read and summed. This module imports no torch.

A trace is JSON in the format of Chrome's tracing, which torch.profiler writes; ui.perfetto.dev shows it.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textgen.errors import TextgenError
from textgen.reporting.compare import align

PROFILE_DIR = "profile"
TRACE_SUFFIX = ".json.gz"
MAX_TRACE_BYTES = 1 << 30  # unpacked

PARTS = ("data", "forward", "backward", "update", "agree", "log", "checkpoint")
"""parts of a step that `training.profile.span` names"""
SHOWN_OPERATORS = 8

Interval = tuple[float, float]
"""start and end in microseconds"""


@dataclass(frozen=True, kw_only=True)
class ProfiledSteps:
    """The time of the profiled steps of one process, in milliseconds per step."""

    path: Path
    first: int
    """number of steps that were taken before"""
    count: int
    """profiled steps"""
    step: float
    parts: Mapping[str, float]
    """by part, in the order of a step; `other` is the rest of `step`"""
    operators: Mapping[str, float]
    """of each operator without those that it calls, or of each kernel of a GPU; the slowest first"""
    exchange: float
    """an exchange between processes ran, and this process computed nothing"""
    idle: float | None
    """the GPU ran no kernel; None without a GPU"""

    def share(self, milliseconds: float) -> str:
        """Return a part of a step as text."""
        return f"{100 * milliseconds / self.step:.0f} %" if self.step else "0 %"


def find_traces(run_dir: Path) -> list[Path]:
    """Return the traces of the processes of a run's latest profile, by process; none without a profile."""
    traces = list((run_dir / PROFILE_DIR).glob(f"process-*-of-*{TRACE_SUFFIX}"))
    if not traces:
        return []
    world = _world(max(traces, key=lambda path: path.stat().st_mtime))
    return sorted((path for path in traces if _world(path) == world), key=lambda path: (len(path.name), path.name))


def _world(path: Path) -> str:
    return path.name.rpartition("-")[2]


def read_profile(path: Path) -> ProfiledSteps:
    """Read the trace of a process.

    Raises:
        OSError: the file cannot be read.
        TextgenError: the file is not a trace of `--profile`.
    """
    try:
        with gzip.open(path, "rb") as file:
            text = file.read(MAX_TRACE_BYTES + 1)
        if len(text) > MAX_TRACE_BYTES:
            raise ValueError("too large")
        trace = json.loads(text)
        return _sum_up(path, trace["traceEvents"], **trace["textgen"])
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, LookupError, TypeError, AttributeError,
            ArithmeticError, RecursionError) as error:  # fmt: skip
        raise TextgenError(f"`{path}` is not a trace of `--profile`: {type(error).__name__}") from error


def _sum_up(path: Path, events: Sequence[Mapping[str, Any]], *, first: int, last: int) -> ProfiledSteps:
    """Sum the events of a trace of the steps after `first` up to `last`."""
    timed = [event for event in events if event.get("ph") == "X"]
    named = [e for e in timed if e["cat"] == "user_annotation" and e["name"] in PARTS]
    main = named[0]["tid"] if named else None
    start, end = min((e["ts"] for e in named), default=0), max((e["ts"] + e["dur"] for e in named), default=0)
    timed = [event for event in timed if start <= event["ts"] <= end]
    scale = 1 / 1e3 / (last - first)  # to milliseconds per step
    kernels = [e for e in timed if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    operators = [e for e in timed if e["cat"] == "cpu_op"]
    computing = kernels or [e for e in operators if e["tid"] == main]
    exchanging = [e for e in kernels or timed if re.match(r"(gloo|nccl)", e["name"])]
    work = [e for e in computing if not re.match(r"(gloo|nccl|c10d)", e["name"])]
    parts = {name: sum(e["dur"] for e in named if e["name"] == name) * scale for name in PARTS}
    step = (end - start) * scale
    slowest = _kernel_times(kernels) if kernels else _own_times(operators)
    return ProfiledSteps(
        path=path,
        first=first,
        count=last - first,
        step=step,
        parts={name: value for name, value in parts.items() if value} | {"other": step - sum(parts.values())},
        operators={name: value * scale for name, value in slowest.most_common(SHOWN_OPERATORS)},
        exchange=_length(_without(_union(exchanging), _union(work))) * scale,
        idle=step - _length(_union(kernels)) * scale if kernels else None,
    )


def _kernel_times(kernels: Iterable[Mapping[str, Any]]) -> Counter[str]:
    times: Counter[str] = Counter()
    for event in kernels:
        times[event["name"][:60]] += event["dur"]
    return times


def _own_times(operators: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Return the time of each operator without that of the operators that it calls, in microseconds."""
    times: Counter[str] = Counter()
    open_ones: dict[Any, list[Mapping[str, Any]]] = {}  # by thread: the operators that the next one may be part of
    for event in sorted(operators, key=lambda e: (e["ts"], -e["dur"])):
        outer = open_ones.setdefault(event["tid"], [])
        while outer and outer[-1]["ts"] + outer[-1]["dur"] <= event["ts"]:
            outer.pop()
        times[event["name"]] += event["dur"]
        if outer:
            times[outer[-1]["name"]] -= event["dur"]
        outer.append(event)
    return times


def _union(events: Iterable[Mapping[str, Any]]) -> list[Interval]:
    """Return the times in which at least one event ran, in order."""
    merged: list[Interval] = []
    for start, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Return the times of `intervals` that are in none of `others`; both come from `_union`."""
    rest = []
    for start, end in intervals:
        for low, high in others:
            if high > start and low < end:
                rest.append((start, low))
                start = high
        rest.append((start, end))
    return [(start, end) for start, end in rest if start < end]


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def format_profile(profile: ProfiledSteps) -> str:
    """Return a table: milliseconds per step and share of the parts of a step, then of the slowest operators."""
    lines = [["part or operator", "ms per step", "share"], ["step", f"{profile.step:.2f}", ""]]
    for name, value in [*profile.parts.items(), *profile.operators.items()]:
        lines.append([name, f"{value:.2f}", profile.share(value)])
    return align(lines)


def explain_profile(profiles: Sequence[ProfiledSteps]) -> list[str]:
    """Return five lines: where the time of a step goes, and what to try.

    Args:
        profiles: of all processes of a training, at least one.
    """
    slowest = max(profiles, key=lambda profile: profile.step - profile.exchange)
    last = slowest.first + slowest.count
    shares = ", ".join(f"{name} {slowest.share(value)}" for name, value in slowest.parts.items())
    kind = "kernels" if slowest.idle is not None else "operators"
    operators = ", ".join(f"{name} {slowest.share(value)}" for name, value in list(slowest.operators.items())[:4])
    waiting = f"waiting for other processes {slowest.share(slowest.exchange)}"
    idle = "" if slowest.idle is None else f"; the GPU idle {slowest.share(slowest.idle)}"
    processes = "1 process" if len(profiles) == 1 else f"{len(profiles)} processes"
    return [
        f"steps {slowest.first + 1} to {last}, {processes}: {slowest.step:.1f} ms per step (`{slowest.path}`)",
        f"parts of a step: {shares}",
        f"slowest {kind}: {operators or 'none'}",
        f"not computing: {waiting}{idle}",
        f"try: {_advise(profiles, slowest)}",
    ]


def _advise(profiles: Sequence[ProfiledSteps], slowest: ProfiledSteps) -> str:
    """Return what may make the steps faster, by the first thing that takes much of them."""

    def takes(milliseconds: float | None, share: float) -> bool:
        steps = slowest.step - slowest.parts.get("checkpoint", 0)  # one of few steps may be saved, but not of many
        return milliseconds is not None and milliseconds > share * steps

    own = [profile.step - profile.exchange for profile in profiles]
    if takes(slowest.parts.get("data"), 0.1):
        return "a token store on a local disk (`--data.cache_dir`), and nothing else that reads from it"
    if max(own) > 1.2 * min(own):
        return f"`textgen doctor` under the launcher: `{slowest.path.name}` computes 20 % longer than the fastest one"
    if takes(slowest.exchange, 0.2):
        return "`--gradient_compression bf16`, a larger `--batch_size`, or fewer processes"
    if takes(slowest.idle, 0.3):
        return "`--cuda_graph` on one GPU, or a larger `--batch_size`: the GPU waits for the processor"
    if takes(slowest.parts.get("update"), 0.25):
        return "a larger `--batch_size`: fewer updates for the same text"
    return "more processes, or `--mixed_precision bf16` if it is off: nearly all of the time is computing"
