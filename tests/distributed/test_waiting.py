"""What one process does while the others wait for it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from textgen.distributed import launch


def test_a_failure_is_raised_after_the_others_have_been_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An action that fails while its process tells that it is busy: otherwise the others would ask it for ever."""
    monkeypatch.setattr(launch, "TOGETHER_SECONDS", 0.01)
    fail, told = threading.Event(), []

    def action() -> None:
        fail.wait(10)
        raise ValueError("the storage is gone")

    def reduce(state: torch.Tensor, _: str) -> torch.Tensor:
        told.append(state.tolist())
        fail.set()
        for thread in threading.enumerate():
            if thread.name == "together":
                thread.join()
        return state

    accelerator: Any = SimpleNamespace(device="cpu", reduce=reduce)
    with pytest.raises(ValueError, match="the storage is gone"):
        launch.wait_together(accelerator, action)
    assert told == [[1.0, 0.0], [0.0, 1.0]]
