"""The model of benchmarks/scaling.py against values computed by hand, and scaling.md against what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.communication import summed_up
from benchmarks.machine import RESULTS
from benchmarks.scaling import (
    DOCUMENT,
    Bucket,
    Network,
    Processor,
    Work,
    all_reduce_seconds,
    bytes_sent,
    compute_seconds,
    predict,
    rendered,
    scaled_table,
    step_seconds,
)

# 100 bytes a second, a second for each hop: sums of 200 bytes by 2 processes take 2 s of sending and 2 hops
SLOW = Network(bytes_per_second=100, hop_seconds=1)
PROCESSOR = Processor(flops_per_second=600, recurrence_seconds=0.5, memory_bytes_per_second=280)
# 6 x 10 parameters x 8 tokens = 480 operations for a lane: 0.8 s; 3 layers x 8 time steps x 0.5 s = 12 s
WORK = Work(parameters=10, layers=3, lanes=4, window=8, buckets=(300, 100))


def test_a_ring_sends_twice_all_but_a_processes_own_share() -> None:
    assert [bytes_sent(1000, processes) for processes in (1, 2, 4, 1000)] == [0, 1000, 1500, 1998]


def test_an_all_reduce_takes_its_bytes_and_its_hops() -> None:
    assert all_reduce_seconds(200, 2, SLOW) == 2 + 2
    assert all_reduce_seconds(200, 4, SLOW) == 3 + 6
    assert all_reduce_seconds(200, 1, SLOW) == 0


def test_a_tree_spares_hops_where_there_are_many_processes() -> None:
    tree = replace(SLOW, tree=True)
    assert all_reduce_seconds(0, 1024, SLOW) == 2046
    assert all_reduce_seconds(0, 1024, tree) == 20
    assert all_reduce_seconds(0, 1, tree) == 0


def test_sums_hide_behind_the_backward_pass_and_the_last_one_cannot() -> None:
    early, late = Bucket(200, ready=5), Bucket(100, ready=10)  # sums of 4 s and 3 s
    assert step_seconds([early, late], 0.5, 2, SLOW) == 10 + 3 + 0.5


def test_a_sum_waits_for_the_one_before_it() -> None:
    assert step_seconds([Bucket(200, ready=1), Bucket(200, ready=2)], 0, 2, SLOW) == 1 + 4 + 4


def test_one_process_waits_for_nobody() -> None:
    assert step_seconds([Bucket(1e9, ready=3)], 1, 1, SLOW) == 4


def test_lanes_shrink_the_products_and_not_the_recurrence() -> None:
    assert compute_seconds(WORK, 4, PROCESSOR) == pytest.approx(3.2 + 12)
    assert compute_seconds(WORK, 1, PROCESSOR) == pytest.approx(0.8 + 12)


def test_a_step_is_computing_then_what_is_left_of_the_sums_then_the_update() -> None:
    """2 processes: 13.6 s; the first bucket is there after (1 + 2 x 3/4) / 3 of it and takes 5 s, the second 3 s."""
    first = 13.6 * 2.5 / 3 + 3 + 2
    assert predict(WORK, 2, PROCESSOR, SLOW) == pytest.approx(max(first, 13.6) + 1 + 2 + 28 * 10 / 280)


def test_tables_of_scaling_are_what_was_measured_and_computed() -> None:
    """`python -m benchmarks.scaling` puts them there; nobody types a figure."""
    text = DOCUMENT.read_text()
    assert rendered(text) == text
    assert len(re.findall(r"<!-- /\w+ -->", text)) == 6
    assert "-->\n<!-- /" not in text, "a table is missing"


def test_measured_bytes_are_those_of_a_ring_and_half_with_bfloat16() -> None:
    """Headers of Ethernet, IP and TCP add 66 bytes to 1,448, and acknowledgements a few more."""
    rows = json.loads((RESULTS / "communication.json").read_text())["bytes"]["figures"]
    assert {row["preset"] for row in rows} == {"quick", "original-char", "default", "large"}
    for row in rows:
        expected = bytes_sent(4 * row["parameters"], row["processes"])
        assert 1.04 < row["sent"]["none"]["least"] / expected < 1.08
        assert 1.04 < row["sent"]["bf16"]["least"] / (expected / 2) < 1.08


def taken(seconds: float, *there: float) -> dict[str, Any]:
    """Return a step and when each of its buckets was there."""
    return {"seconds": seconds, "ready": [[100, at] for at in there]}


def test_steps_of_two_processes_are_summed_up() -> None:
    network = {"bytes_per_second": 50.0, "small_seconds": 0.25}
    first = {"network": network, "steps": {"none": [taken(5, 1, 2)] * 3, "nothing": [taken(3, 1, 2)] * 3}}
    second = {"network": network, "steps": {"none": [taken(5, 1, 2)] * 3, "nothing": [taken(3.5, 2, 3)] * 3}}
    told = summed_up([[first, second]] * 2)
    assert told["seconds"] == [5, 5]
    assert told["steps"] == 6
    assert told["alone"] == 3.5  # the slower one's
    assert told["waited"] == 0.5  # one has its gradient at 2, the other at 3
    assert told["buckets"] == [[100, 2], [100, 3]]
    assert told["network"] == network
    assert "alone" not in summed_up([[first]])


def test_scaling_on_a_machine_is_predicted_from_one_process_and_the_network() -> None:
    """Two halves of 2 s and two sums of 200 bytes, one behind the other, at 100 bytes a second and 0.25 s a hop."""
    alone = {"preset": "x", "threads": 1, "steps": 9}
    two = {"alone": 3.0, "waited": 0.5, "buckets": [[200, 1.5], [200, 2.25]]}
    two |= {"network": {"bytes_per_second": 100.0, "small_seconds": 0.5}}
    rows = [
        alone | {"processes": 1, "shape": (4, 8), "seconds": [2.0]},
        alone | {"processes": 1, "shape": (8, 8), "seconds": [4.0]},
        alone | two | {"processes": 2, "shape": (8, 8), "seconds": [8.0]},
        alone | two | {"processes": 2, "shape": (16, 8), "seconds": [8.0, 9.0, 10.0]},
    ]
    strong, weak = (line.split(" | ") for line in scaled_table({"scaled": rows}).splitlines()[4:6])
    # 1.0 (first bucket, at two thirds of its time) + 2.5 + 2.5 + 0.5 (update) + 0.5 (agreement)
    assert strong[3:] == ["8000.0", "8000.0-8000.0", "8", "0.50", "6%", "6%", "62%", "7000.0", "-12% |"]
    assert weak[3:7] == ["9000.0", "8000.0-10000.0", "14", "0.89"]
