"""The model of benchmarks/scaling.py against values computed by hand, and docs/scaling.md against what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

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
    assert len(re.findall(r"<!-- /\w+ -->", text)) == 5
    assert "-->\n<!-- /" not in text, "a table is missing"


def test_measured_bytes_are_those_of_a_ring_and_half_with_bfloat16() -> None:
    """Headers of Ethernet, IP and TCP add 66 bytes to 1,448, and acknowledgements a few more."""
    rows = json.loads((RESULTS / "communication.json").read_text())["bytes"]["figures"]
    assert {row["preset"] for row in rows} == {"quick", "original-char", "default", "large"}
    for row in rows:
        expected = bytes_sent(4 * row["parameters"], row["processes"])
        assert 1.04 < row["sent"]["none"]["least"] / expected < 1.08
        assert 1.04 < row["sent"]["bf16"]["least"] / (expected / 2) < 1.08
