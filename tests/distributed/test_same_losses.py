"""Law 1: the losses do not depend on how many processes and micro-batches computed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Launch = Callable[..., list[dict[str, Any]]]
DROPOUT = ("--model.dropout", "0.1", "--model.weight_drop", "0.2")
LAYOUTS = [(1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1)]


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["train/loss"] for row in rows if "train/loss" in row]


def norms(rows: list[dict[str, Any]]) -> list[float]:
    return [row["train/gradient_norm"] for row in rows if "train/gradient_norm" in row]


@pytest.fixture(scope="session")
def alone(launch_training: Launch) -> list[dict[str, Any]]:
    return launch_training("1x1", "--max_steps", "50", *DROPOUT)


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("processes", "micro_batches"), LAYOUTS)
def test_any_layout_has_the_losses_of_one_process(
    launch_training: Launch, alone: list[dict[str, Any]], processes: int, micro_batches: int
) -> None:
    """50 steps in fp32, dropout on: its masks are functions of seed and step, and of lane or weight."""
    rows = launch_training(
        f"{processes}x{micro_batches}", "--max_steps", "50", *DROPOUT,
        "--gradient_accumulation_steps", str(micro_batches), processes=processes,
    )  # fmt: skip
    assert len(losses(rows)) == 50
    assert largest_difference(losses(rows), losses(alone)) <= 1e-5
    # Adam hides the scale of a gradient: averaged over processes instead of summed, it would give the same losses.
    assert largest_difference(norms(rows), norms(alone)) <= 1e-4
    assert rows[-1]["valid/loss"] == pytest.approx(alone[-1]["valid/loss"], rel=1e-5)


def test_another_seed_has_other_losses(launch_training: Launch, alone: list[dict[str, Any]]) -> None:
    """The band above is far below what a different order of data makes."""
    rows = launch_training("seed", "--max_steps", "5", *DROPOUT, "--seed", "43")
    assert largest_difference(losses(rows), losses(alone)[:5]) > 1e-4


LABELS = (*DROPOUT, "--data.label_column", "label", "--max_steps", "20", "--batch_size", "32")


@pytest.fixture(scope="session")
def labelled(launch_training: Launch) -> list[dict[str, Any]]:
    return launch_training("labels", *LABELS)


@pytest.mark.parametrize(("processes", "micro_batches"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_labels_are_the_same_inputs_in_any_layout(
    launch_training: Launch, labelled: list[dict[str, Any]], processes: int, micro_batches: int
) -> None:
    accumulated = ("--gradient_accumulation_steps", str(micro_batches))
    rows = launch_training(f"labels-{processes}", *LABELS, *accumulated, processes=processes)
    assert largest_difference(losses(rows), losses(labelled)) <= 1e-5
    assert largest_difference(norms(rows), norms(labelled)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("hidden_size", ["32", "64"])  # compiled code takes multiples of 64
def test_bfloat16_on_two_processes_stays_within_its_band(launch_training: Launch, hidden_size: str) -> None:
    """Rounding differs with the shape of a micro-batch: the band is measured, see exactness.md."""
    flags = ("--max_steps", "50", "--mixed_precision", "bf16", "--model.hidden_size", hidden_size)
    alone = launch_training(f"bf16-1x1-{hidden_size}", *flags)
    rows = launch_training(f"bf16-2x2-{hidden_size}", *flags, "--gradient_accumulation_steps", "2", processes=2)
    assert largest_difference(losses(rows), losses(alone)) <= 5e-4
