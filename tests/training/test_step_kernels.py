"""How many kernels a training step takes with torch's operators and with Triton's kernels, and that both learn alike.

There is no GPU here. A step is counted on a CPU: each operator that computes something is a kernel, and so is each
launch of Triton and each LSTM layer, there and back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from textgen.config import ModelConfig, TrainConfig
from textgen.kernels import fused
from textgen.kernels import training as training_kernels
from textgen.model.lstm import LSTMLanguageModel
from textgen.training.cuda_graph import WARM_UP, StepGraph
from textgen.training.setup import build_learner
from textgen.training.step import Learner, train_step, zero_lanes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets kernels

LANES, WINDOW, VOCABULARY = 4, 6, 50
# operators that only allocate or look at memory in another way, besides those that torch calls views
NO_KERNELS = ("empty", "_unsafe_view", "detach", "lift_fresh", "_record_function")


@pytest.fixture
def kernels(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return Triton's kernels. Code that is compiled for a CPU is not used: here the CPU stands for a GPU."""
    from textgen.kernels import triton_training

    monkeypatch.setattr(training_kernels, "compiled_code", lambda: None)
    yield triton_training
    AcceleratorState._reset_state(True)


class Count(TorchDispatchMode):
    """Counts kernels by name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(NO_KERNELS):
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


class Launches:
    """A Triton kernel whose launches are counted, and not the operators that interpret it."""

    def __init__(self, kernel: Any, count: Count) -> None:
        self.kernel, self.count = kernel, count

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.count.kernels[f"Triton's {self.kernel.fn.__name__}"] += 1
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch


class _CountedLSTM(torch.autograd.Function):
    """Stands for cuDNN's kernels of a layer, which are not counted one by one; computes nothing of use."""

    @staticmethod
    def forward(ctx: Any, count: Count, x: Tensor, hidden: Tensor, cell: Tensor, *weights: Tensor) -> Any:
        count.kernels["cuDNN's LSTM"] += 1
        ctx.count, ctx.shapes = count, [t.shape for t in (x, hidden, cell, *weights)]
        with _disable_current_modes():
            return x.new_zeros(*x.shape[:2], hidden.shape[2]), hidden.clone(), cell.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        ctx.count.kernels["cuDNN's LSTM, backward"] += 1
        with _disable_current_modes():
            return None, *(grad.new_zeros(shape) for shape in ctx.shapes)


def build(shape: Mapping[str, Any], precision: str = "bf16") -> Learner:
    AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    model = ModelConfig(embedding_dim=16, hidden_size=16, **shape)
    config = TrainConfig(batch_size=LANES, seq_len=WINDOW, model=model, max_grad_norm=0.5)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    learner = build_learner(config, accelerator, LSTMLanguageModel(model, VOCABULARY), total_steps=20)
    learner.lane_states = zero_lanes(learner)
    return learner


def batch(step: int) -> dict[str, Tensor]:
    tokens = (torch.arange(LANES * (WINDOW + 1)) * (7 + step) % VOCABULARY).view(LANES, -1)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "lanes": torch.arange(LANES)}


def count_step(
    monkeypatch: pytest.MonkeyPatch, kernels: ModuleType, shape: Mapping[str, Any], *, with_triton: bool
) -> Counter[str]:
    """Return the kernels of the second step, when Adam has its state."""
    learner, count, second = build(shape), Count(), batch(1)
    train_step(learner, [batch(0)])
    with monkeypatch.context() as patch:
        for name in ("_drop", "_weight_mask", "_cross_entropy"):
            patch.setattr(kernels, name, Launches(getattr(kernels, name), count))
        patch.setattr(fused, "kernels", lambda _: kernels if with_triton else None)

        def layer(x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], **_: object) -> Any:
            return _CountedLSTM.apply(count, x, *state, *weights)  # type: ignore[no-untyped-call]

        patch.setattr(torch, "lstm", layer)
        with count:
            train_step(learner, [second])
    return count.kernels


EVERYTHING = {"num_layers": 3, "dropout": 0.2, "weight_drop": 0.3, "layer_norm": True, "residual": True}
# Kernels with torch's operators and with Triton's, of torch 2.13. docs/decisions/0029 has them too.
STEPS: dict[str, tuple[dict[str, Any], int, int]] = {
    "no masks": ({"num_layers": 3}, 125, 108),
    "dropout": ({"num_layers": 3, "dropout": 0.2}, 428, 116),
    "everything": (EVERYTHING, 609, 135),
}


@pytest.mark.parametrize("name", STEPS)
def test_kernels_of_a_step_are_as_many_as_the_docs_say(
    monkeypatch: pytest.MonkeyPatch, kernels: ModuleType, name: str
) -> None:
    shape, before, after = STEPS[name]
    plain = count_step(monkeypatch, kernels, shape, with_triton=False)
    ours = count_step(monkeypatch, kernels, shape, with_triton=True)
    assert (plain.total(), ours.total()) == (before, after)
    sites, layers = 4 * ("dropout" in shape), 3 * ("weight_drop" in shape)
    launched = {kernel: number for kernel, number in ours.items() if kernel.startswith("Triton's")}
    wanted = {"Triton's _drop": 2 * sites, "Triton's _weight_mask": layers, "Triton's _cross_entropy": 1}
    assert launched == {kernel: number for kernel, number in wanted.items() if number}


def losses(learner: Learner, number: int) -> Tensor:
    """Take steps and return the nats of each."""
    nats = []
    for step in range(number):
        nats.append(train_step(learner, [batch(step)]))
        learner.progression.step += 1
    return torch.stack(nats)


TWO_LAYERS = EVERYTHING | {"num_layers": 2}


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 2e-6), ("bf16", 2e-3)])
def test_a_training_with_tritons_kernels_is_the_one_without(
    monkeypatch: pytest.MonkeyPatch, kernels: ModuleType, precision: str, tolerance: float
) -> None:
    wanted = losses(build(TWO_LAYERS, precision), 3)
    monkeypatch.setattr(fused, "kernels", lambda _: kernels)
    torch.testing.assert_close(losses(build(TWO_LAYERS, precision), 3), wanted, rtol=tolerance, atol=0)


def test_steps_from_a_graph_have_the_masks_of_their_own_step(
    monkeypatch: pytest.MonkeyPatch, kernels: ModuleType
) -> None:
    """A graph's kernels read the step from a tensor. Here the graph is the plain function, run again."""
    monkeypatch.setattr(fused, "kernels", lambda _: kernels)
    plain, graphed = build(TWO_LAYERS), build(TWO_LAYERS)
    graphed.graph = StepGraph(lambda work: work)
    assert torch.equal(losses(graphed, WARM_UP + 2), losses(plain, WARM_UP + 2))
    pairs = zip(graphed.unwrapped_model.parameters(), plain.unwrapped_model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
