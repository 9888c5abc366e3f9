"""What a step takes on more processes: a small model, held against what was measured, and its tables.

`python -m benchmarks.scaling` puts the tables into docs/explanation/scaling.md; nobody types a figure there.

An optimizer step computes, and each bucket of the gradient is summed over all processes as soon as it is there and the
one before it is through; the step ends once the last sum and the update are done.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

DOCUMENT = Path(__file__).parents[1] / "docs" / "explanation" / "scaling.md"

# Of 1,514 bytes of a full Ethernet frame 1,448 are the sender's: the rest is Ethernet, IP and TCP with its timestamps.
PAYLOAD_SHARE = 1448 / 1514


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """What joins the processes."""

    bytes_per_second: float
    """that a process sends, and receives at the same time"""
    hop_seconds: float
    """until a small message is there"""
    tree: bool = False
    """whether small sums may go up and down a tree, as NCCL's, instead of twice around a ring, as gloo's"""


@dataclass(frozen=True)
class Bucket:
    """A part of the gradient that is summed as one."""

    size: float
    """bytes"""
    ready: float
    """seconds from the step's beginning"""


@dataclass(frozen=True)
class Processor:
    """What computes."""

    flops_per_second: float
    """that the matrix products reach"""
    recurrence_seconds: float
    """of one time step of one layer, forward and backward, however few lanes there are"""
    memory_bytes_per_second: float


@dataclass(frozen=True)
class Work:
    """What a preset asks for at a step."""

    parameters: int
    layers: int
    lanes: int
    window: int
    buckets: tuple[int, ...]
    """bytes of the gradient's buckets, in the order of their sums"""


def bytes_sent(size: float, processes: int) -> float:
    """Return what each process sends while `size` bytes are summed around a ring: each piece goes around twice."""
    return 2 * (processes - 1) / processes * size


def all_reduce_seconds(size: float, processes: int, network: Network) -> float:
    """Return how long a sum over all processes takes."""
    hops = 2 * (processes - 1)
    if network.tree:
        hops = min(hops, 2 * math.ceil(math.log2(processes)))
    return bytes_sent(size, processes) / network.bytes_per_second + hops * network.hop_seconds


def step_seconds(buckets: Sequence[Bucket], update_seconds: float, processes: int, network: Network) -> float:
    """Return how long a step takes: what of the sums does not fit beside the backward pass comes on top."""
    end = 0.0
    for bucket in buckets:
        end = max(end, bucket.ready) + all_reduce_seconds(bucket.size, processes, network)
    return end + update_seconds


def compute_seconds(work: Work, lanes: float, processor: Processor) -> float:
    """Return seconds of forward and backward pass over the lanes of one process.

    The matrix products shrink with the lanes (6 operations per parameter and token: 2 forward, 4 backward). The
    recurrence does not: a window is `window` dependent time steps in each layer, however few lanes take them at once.
    """
    products = 6 * work.parameters * lanes * work.window / processor.flops_per_second
    return products + work.layers * work.window * processor.recurrence_seconds


def predict(work: Work, processes: int, processor: Processor, network: Network) -> float:
    """Return the seconds of a step on a cluster.

    The gradient is taken to come evenly over the backward pass, two thirds of the computing. The update reads gradient,
    weight and two moments and writes the last three: 28 bytes per parameter.
    """
    computing = compute_seconds(work, work.lanes / processes, processor)
    total, there, buckets = sum(work.buckets), 0, []
    for size in work.buckets:
        there += size
        buckets.append(Bucket(size, computing * (1 + 2 * there / total) / 3))
    return step_seconds(buckets, 28 * work.parameters / processor.memory_bytes_per_second, processes, network)


# --- assumptions of the tables of clusters ---------------------------------------------------------------------------

# H100 SXM: 989 TFLOP/s of dense bf16, a fifth of it reached; 3.35 TB/s, 70 % of it reached. FlashRNN (Poeppel et al.
# 2024) publishes 5.07 us for forward and backward of a time step with cuDNN (H100, float16, 768 wide, 16 lanes); double
# for wider layers in bfloat16, whose weights are read anew at every time step.
H100 = Processor(flops_per_second=0.2 * 989e12, recurrence_seconds=10e-6, memory_bytes_per_second=0.7 * 3.35e12)
# 450 GB/s each way between the GPUs of a machine; else one adapter for all of a machine's GPUs. 80 % of either.
NETWORKS = {
    "NVLink": Network(0.8 * 450e9, 3e-6, tree=True),
    "400 Gb/s": Network(0.8 * 50e9, 10e-6, tree=True),
    "200 Gb/s": Network(0.8 * 25e9, 10e-6, tree=True),
}


# --- tables ----------------------------------------------------------------------------------------------------------


def table(columns: str, rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown; the columns are separated by bars."""
    names = columns.split(" | ")
    lines = [names, ["---"] * len(names), *([str(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bytes_table(figures: dict[str, Any]) -> str:
    """Return what a process sends at a step."""
    rows = []
    for row in figures["bytes"]:
        none, bf16 = row["sent"]["none"], row["sent"]["bf16"]
        expected = bytes_sent(4 * row["parameters"], row["processes"])
        cells = (
            row["preset"], f"{row['parameters']:,}", " x ".join(map(str, row["shape"])), row["processes"],
            f"{expected / 1e6:.2f}", between(none["least"], none["most"]), f"{none['most'] / expected - 1:+.1%}",
            between(bf16["least"], bf16["most"]), f"{bf16['most'] / none['most']:.3f}",
        )  # fmt: skip
        rows.append(cells)
    columns = "preset | parameters | lanes x window | processes | 2 (N-1)/N x 4 bytes, MB | sent, MB | more than that"
    return table(f"{columns} | with bf16, MB | of float32", rows)


def between(least: float, most: float) -> str:
    """Return a range in megabytes."""
    return f"{least / 1e6:.2f}-{most / 1e6:.2f}"


def network_of(row: dict[str, Any], rate: int) -> Network:
    """Return what joined the measured processes: a rate in Mbit/s, or 0 for what a sum of 32 MiB was seen to reach."""
    processes, seen = row["processes"], row["network"]
    reached = bytes_sent(seen["bytes_per_second"], processes)
    limit = rate * 1e6 / 8 * PAYLOAD_SHARE if rate else math.inf
    return Network(min(reached, limit), seen["small_seconds"] / (2 * (processes - 1)))


def without_exchange(row: dict[str, Any], rate: int) -> dict[str, Any]:
    """Return the measured steps that exchanged nothing."""
    cases: list[dict[str, Any]] = row["cases"]
    return next(case for case in cases if case["rate"] == rate and case["kind"] == "nothing")


def predict_measured(row: dict[str, Any], rate: int, kind: str) -> float:
    """Return the seconds of a measured step, from a step without exchange and the network; nothing is fitted."""
    alone, share = without_exchange(row, rate), 0.5 if kind == "bf16" else 1
    buckets = [Bucket(share * size, ready) for size, ready in alone["ready"]]
    update = min(alone["seconds"]) - buckets[-1].ready
    agreement: float = row["network"]["small_seconds"]
    return step_seconds(buckets, update, row["processes"], network_of(row, rate)) + agreement


def times_table(figures: dict[str, Any]) -> str:
    """Return predicted and measured seconds of the fastest step: other work on the machine only adds."""
    rows, errors = [], []
    measured_steps = [(row, case) for row in figures["times"] for case in row["cases"] if case["kind"] != "nothing"]
    for row, case in measured_steps:
        alone = min(without_exchange(row, case["rate"])["seconds"])
        predicted, measured = predict_measured(row, case["rate"], case["kind"]), min(case["seconds"])
        errors.append(predicted / measured - 1)
        cells = (
            row["preset"], row["processes"], case["rate"] or "no limit", case["kind"], len(case["ready"]),
            f"{alone:.2f}", f"{predicted:.2f}", f"{measured:.2f} ({statistics.median(case['seconds']):.2f})",
            f"{errors[-1]:+.0%}", f"{case['early']:.0%}",
        )  # fmt: skip
        rows.append(cells)
    columns = "preset | processes | Mbit/s | compression | buckets | without exchange, s | predicted, s"
    shown = table(f"{columns} | measured, s (median) | error | summed before the last gradient was there", rows)
    typical, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
    return f"{shown}\n\nMedian error {typical:.0%}, largest {worst:+.0%}."


def rows_table(figures: dict[str, Any]) -> str:
    """Return seconds of a pass by number of lanes, and the straight line through the first and the last."""
    seconds = {int(lanes): value for lanes, value in figures["rows"]["seconds"].items()}
    first, *_, last = seconds
    slope = (seconds[last] - seconds[first]) / (last - first)
    rows = []
    for lanes, value in seconds.items():
        line = seconds[first] + slope * (lanes - first)
        rows.append((lanes, f"{1e3 * value:.0f}", f"{1e3 * value / lanes:.1f}", f"{1e3 * line:.0f}"))
    return table("lanes | measured, ms | per lane, ms | line through first and last, ms", rows)


def scaled_table(figures: dict[str, Any]) -> str:
    """Return what two processes bring on one machine: as many lanes as one has (strong), and twice as many (weak).

    Predicted from steps of one process with as many lanes as each of the two has, and from the network: what the two
    lose by sharing a machine's memory is not in it.
    """
    rows, errors = [], []
    seconds = {layout_of(row): statistics.median(row["seconds"]) for row in figures["scaled"]}
    for row in figures["scaled"]:
        (preset, processes, threads, lanes), window = layout_of(row), row["shape"][1]
        full = max(s["shape"][0] for s in figures["scaled"] if s["preset"] == preset) // 2
        step = statistics.median(row["seconds"])
        rate = lanes / step / (full / seconds[preset, 1, 1, full])
        cells: tuple[object, ...] = (
            preset, f"{lanes} x {window}", f"{processes} x {threads}", f"{1e3 * step:.1f}",
            between_ms(row["seconds"]), f"{lanes * window / step:,.0f}", f"{rate:.2f}",
        )  # fmt: skip
        lost: tuple[object, ...] = ("", "", "", "", "")
        if processes > 1:
            alone = seconds[preset, 1, 1, lanes // processes]
            network = network_of(row, 0)
            share = alone / row["alone"]
            buckets = [Bucket(size, ready * share) for size, ready in row["buckets"]]
            update = alone - buckets[-1].ready
            predicted = step_seconds(buckets, update, processes, network) + row["network"]["small_seconds"]
            errors.append(predicted / step - 1)
            parts = (row["alone"] - alone - row["waited"], row["waited"], step - row["alone"])
            lost = (*(f"{part / step:.0%}" for part in parts), f"{1e3 * predicted:.1f}", f"{errors[-1]:+.0%}")
        rows.append((*cells, *lost))
    columns = "preset | lanes x window | processes x threads | step, ms | lowest to highest | tokens/s"
    columns += " | times one process | slower beside each other | waiting | exchange | predicted, ms | error"
    typical, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
    return f"{table(columns, rows)}\n\nMedian error {typical:.0%}, largest {worst:+.0%}."


def layout_of(row: dict[str, Any]) -> tuple[str, int, int, int]:
    """Return preset, processes, threads of each, and lanes."""
    return row["preset"], row["processes"], row["threads"], row["shape"][0]


def between_ms(seconds: Sequence[float]) -> str:
    """Return a range in milliseconds."""
    return f"{1e3 * min(seconds):.1f}-{1e3 * max(seconds):.1f}"


def works(figures: dict[str, Any]) -> dict[str, Work]:
    """Return what each preset asks for, with the measured buckets."""
    from textgen.commands.parsing import parse_train_config

    found = {}
    parameters = {row["preset"]: row["parameters"] for row in figures["bytes"]}
    for row in figures["times"]:
        config = parse_train_config(["--config", str(DOCUMENT.parents[2] / f"launch/presets/{row['preset']}.yaml")])
        buckets = tuple(size for size, _ in row["cases"][0]["ready"])
        found[row["preset"]] = Work(
            parameters[row["preset"]], config.model.num_layers, config.batch_size, config.seq_len, buckets
        )
    return found


def clusters_table(figures: dict[str, Any]) -> str:
    """Return what the model says of clusters of H100."""
    rows: list[tuple[object, ...]] = []
    for preset, work in works(figures).items():
        alone = predict(work, 1, H100, NETWORKS["NVLink"])
        for processes, factor in ((1, 1), (8, 1), (64, 1), (64, 8), (1024, 1), (1024, 128)):
            case = replace(work, lanes=work.lanes * factor)
            if case.lanes % processes:
                rows.append((preset, processes, case.lanes, "does not divide", "", "", ""))
                continue
            steps = [predict(case, processes, H100, network) for network in NETWORKS.values()]
            cells = (
                preset, processes, f"{case.lanes:,}", case.lanes // processes,
                f"{1e3 * compute_seconds(case, case.lanes / processes, H100):.1f}",
                " / ".join(f"{1e3 * seconds:.1f}" for seconds in steps),
                " / ".join(f"{alone * factor / seconds:.1f}" for seconds in steps),
            )  # fmt: skip
            rows.append(cells)
    columns = "preset | GPUs | lanes | lanes each | computing, ms | step, ms: NVLink / 400 / 200 Gb/s"
    return table(f"{columns} | times the tokens/s of one GPU", rows)


def quality_table(figures: dict[str, Any]) -> str:
    """Return losses with and without compression."""
    rows = []
    for row in figures["quality"]:
        none, bf16 = row["none_valid"], row["bf16_valid"]
        rows.append(
            (row["seed"], f"{none:.4f}", f"{bf16:.4f}", f"{bf16 - none:+.4f}", f"{row['largest_difference']:.1e}")
        )
    columns = "seed | validation, nats per token | with bf16 | difference"
    return table(f"{columns} | largest relative difference of a step's training loss", rows)


TABLES = {
    "bytes": bytes_table, "times": times_table, "rows": rows_table, "scaled": scaled_table,
    "clusters": clusters_table, "quality": quality_table,
}  # fmt: skip


def rendered(text: str) -> str:
    """Return the document with every table in its place, `<!-- NAME -->` to `<!-- /NAME -->`."""
    parts = json.loads((RESULTS / "communication.json").read_text())
    figures = {part: measured["figures"] for part, measured in parts.items()}
    for name, render in TABLES.items():
        block = render(figures)
        if name in parts:
            machine = parts[name]["machine"]
            block += (
                f"\n\n`python -m benchmarks.communication {name}`, working tree on {machine['commit']}, "
                f"{parts[name]['date']}; {machine['processor']}, Linux {machine['kernel']}, torch {machine['torch']}."
            )
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"`{DOCUMENT.name}` must have one place for `{name}`")
        text = text[: text.index(begin)] + begin + block + "\n" + text[text.index(end) :]
    return text


def main() -> None:
    """Bring the document up to date."""
    DOCUMENT.write_text(rendered(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
