"""A step of a learner that is built without a run, data or settings file."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from textgen.config import ModelConfig, TrainConfig
from textgen.data.split import Split
from textgen.distributed import launch
from textgen.model.lstm import LSTMLanguageModel
from textgen.training.optim import update_weights
from textgen.training.setup import build_learner
from textgen.training.step import Learner, StepLoader, train_step, zero_lanes

CONFIG = TrainConfig(
    batch_size=4, seq_len=6, model=ModelConfig(embedding_dim=8, hidden_size=8, num_layers=1), ema_decay=0.9
)


@pytest.fixture
def learner() -> Iterator[Learner]:
    torch.manual_seed(0)
    accelerator = launch.start("no", batch_size=CONFIG.batch_size)
    made = build_learner(CONFIG, accelerator, LSTMLanguageModel(CONFIG.model, 20), total_steps=10)
    made.lane_states = zero_lanes(made)
    yield made
    AcceleratorState._reset_state(True)


def take_steps(learner: Learner, count: int) -> None:
    tokens = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "lanes": torch.arange(4)}
    for _ in range(count):
        train_step(learner, [batch])
        learner.progression.step += 1


def test_averaged_weights_have_no_gradient_history(learner: Learner) -> None:
    """A history would grow with every step, in memory and in time."""
    assert learner.average is not None
    before = [parameter.clone() for parameter in learner.average.parameters()]
    take_steps(learner, 3)
    after = list(learner.average.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [parameter.grad_fn for parameter in after] == [None] * len(after)
    assert not any(parameter.requires_grad for parameter in after)


def test_an_update_leaves_weights_and_moments_alone_after_nan(learner: Learner) -> None:
    take_steps(learner, 2)
    parameters = list(learner.unwrapped_model.parameters())

    def state() -> list[torch.Tensor]:
        moments = [value for p in parameters for value in learner.optimizer.state[p].values()]
        return [tensor.clone() for tensor in (*parameters, *moments)]

    def update(nonfinite: bool) -> bool:
        """Update with a gradient of ones; return whether anything changed."""
        before = state()
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        assert update_weights(learner.optimizer, None, torch.tensor(nonfinite)) is False
        return any(not torch.equal(a, b) for a, b in zip(before, state(), strict=True))

    assert not update(True)
    assert update(False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_for_a_gpu_are_pinned(device: str, learner: Learner) -> None:
    """A copy from other memory makes the host wait for the GPU."""
    found: list[DataLoader[dict[str, torch.Tensor]]] = []

    def prepare(loader: DataLoader[dict[str, torch.Tensor]]) -> DataLoader[dict[str, torch.Tensor]]:
        found.append(learner.accelerator.prepare(loader))
        return found[-1]

    split = Split(np.arange(900, dtype=np.uint16), np.array([0, 900]), np.ones(1, dtype=np.uint32))
    accelerator = SimpleNamespace(device=torch.device(device), prepare=prepare)
    store = SimpleNamespace(train=split)
    StepLoader(TrainConfig(batch_size=4, seq_len=8), accelerator, store)  # type: ignore[arg-type]
    assert found[0].pin_memory == (device == "cuda")
    assert learner.accelerator.non_blocking
