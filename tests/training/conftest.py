"""A signal in the middle of a training, and trainings of several precisions in one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from textgen.training import loop as training


@pytest.fixture
def any_precision() -> Iterator[None]:
    """Accelerate fixes the precision of a process with its first Accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Return a function that has this process get a SIGTERM while it takes the given step; None for none."""
    original = training.train_step
    chosen: int | None = None

    def step(state: training.Learner, *args: Any, **options: Any) -> torch.Tensor:
        if state.progression.step + 1 == chosen:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(state, *args, **options)

    def choose(number: int | None) -> None:
        nonlocal chosen
        chosen = number

    monkeypatch.setattr(training, "train_step", step)
    return choose
