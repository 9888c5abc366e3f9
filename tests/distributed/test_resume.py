"""Law 2 on several processes: a training that goes on where it stood, on as many processes or on others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Launch = Callable[..., list[dict[str, Any]]]

pytestmark = pytest.mark.slow
FLAGS = ("--model.dropout", "0.1", "--ema_decay", "0.9", "--max_grad_norm", "1")


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def uninterrupted(launch_training: Launch) -> list[float]:
    return losses(launch_training("whole", "--max_steps", "30", *FLAGS, processes=2))


def test_resume_on_two_processes_is_bitwise(launch_training: Launch, uninterrupted: list[float]) -> None:
    for steps in ("10", "30"):
        rows = launch_training("two", "--max_steps", steps, *FLAGS, processes=2)
    assert losses(rows) == uninterrupted


def test_resume_on_other_numbers_of_processes_goes_on_alike(
    launch_training: Launch, uninterrupted: list[float]
) -> None:
    """2 processes, then 1 with 2 micro-batches, then 4."""
    for steps, processes, micro_batches in (("10", 2, "1"), ("20", 1, "2"), ("30", 4, "1")):
        flags = ("--max_steps", steps, "--gradient_accumulation_steps", micro_batches)
        rows = launch_training("mixed", *flags, *FLAGS, processes=processes)
    assert losses(rows) == pytest.approx(uninterrupted, rel=1e-5)


def test_training_that_turns_to_nan_stops_all_processes(launch_training: Launch) -> None:
    """The launcher's own exit code is 1; that it ends at all shows that no process waits for another."""
    rows = launch_training("nan", "--max_steps", "6", "--learning_rate", "1e38", processes=2, expect=1)
    assert len(losses(rows)) < 6
