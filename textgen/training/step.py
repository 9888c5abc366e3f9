"""One optimizer step.

A batch comes from data/lanes.py. `StepLoader` reads this process's micro-batches of a step, `train_step` computes the
gradient and updates the weights of a `Learner`. The model and its loss are in model/lstm.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import record_function

from textgen.config import TrainConfig
from textgen.data.lanes import Course, LaneSampler, build_loader
from textgen.data.mixed_lanes import Mixture, build_mixed_loader
from textgen.data.store import TokenStore
from textgen.model.lstm import DropoutMasks, LSTMLanguageModel, State
from textgen.training.optim import learning_rate_at, update_weights


@dataclass(kw_only=True)
class Progression:
    """The part of the training state that is plain numbers. A checkpoint stores it as JSON."""

    step: int = 0
    """optimizer steps taken"""
    total_steps: int
    epoch_nats: float = 0.0
    epoch_tokens: int = 0
    unlogged_nats: float = 0.0
    """sum over all processes since the last row of metrics; only set when a checkpoint is made"""
    unlogged_steps: int = 0
    evaluated_step: int = 0
    """the last step with a validation score and samples"""
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_better: int = 0
    skipped_steps: int = 0
    """steps without an update because float16 overflowed"""
    finished: bool = False


@dataclass
class StepRecord:
    """The losses and the gradient norm of a step. They show whether the step is nan or infinite, and where."""

    step: int
    parts: list[tuple[Tensor, Tensor]]
    """lanes and nats of each micro-batch of this process"""
    norm: Tensor | None = None
    """of the gradient of all processes"""


@dataclass
class StepInputs:
    """The values that differ from step to step. A CUDA graph reads a copy of them at fixed addresses."""

    step: int | Tensor
    learning_rate: float | Tensor
    ema_update: float | Tensor
    """share by which the averaged weights move towards the updated weights; 0 leaves them as they are"""
    micro_batches: Sequence[Mapping[str, Tensor]]
    states: list[State]
    """LSTM state before each micro-batch; a step replaces it by the state after the micro-batch"""

    def copy(self) -> StepInputs:
        """Return a copy in new tensors on the device."""
        device = self.micro_batches[0]["tokens"].device
        rate_dtype = torch.float32 if device.type == "cuda" else torch.float64  # the dtypes that fused Adam reads
        return StepInputs(
            torch.tensor(self.step, dtype=torch.int64, device=device),
            torch.tensor(self.learning_rate, dtype=rate_dtype, device=device),
            torch.tensor(self.ema_update, dtype=torch.float32, device=device),
            [{name: value.clone() for name, value in batch.items()} for batch in self.micro_batches],
            # The LSTM returns float32, float16 or bfloat16 states. float32 holds all of them without rounding.
            [(hidden.float().clone(), cell.float().clone()) for hidden, cell in self.states],
        )

    def load(self, inputs: StepInputs) -> None:
        """Copy another step's inputs, of the same shapes, into these tensors. Nothing waits for the device."""
        for name in ("step", "learning_rate", "ema_update"):
            getattr(self, name).fill_(getattr(inputs, name))
        for kept, batch in zip(self.micro_batches, inputs.micro_batches, strict=True):
            for name, value in batch.items():
                _copy(kept[name], value)
        for kept_state, state in zip(self.states, inputs.states, strict=True):
            for kept_part, part in zip(kept_state, state, strict=True):
                _copy(kept_part, part)


def _copy(kept: Tensor, value: Tensor) -> None:
    assert kept.shape == value.shape  # copy_ would broadcast
    if kept is not value:
        kept.copy_(value)


def span(name: str) -> AbstractContextManager[object]:
    """Return a context that names a part of a step in a profile; without a profile it does nothing.

    A `record_function` of torch takes 6 us also without a profile (2026-11-29).
    """
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


Compute = Callable[[StepInputs, StepRecord], Tensor]
"""changes the weights and `inputs.states`, fills the `StepRecord`, returns this process's nats"""


class GraphedSteps(Protocol):
    """Takes steps from a CUDA graph. `StepGraph` of cuda_graph.py is the implementation."""

    warming: int
    """number of first steps that take longer than the later ones"""

    @property
    def is_refused(self) -> bool:
        """Whether capturing has failed. All later steps then run without a graph."""

    def take(self, compute: Compute, inputs: StepInputs, record: StepRecord) -> Tensor:
        """Take a step with the same results as `compute(inputs, record)`."""

    def forget(self) -> None:
        """Drop the graph, because weights, optimizer or batches will be at other addresses."""


@dataclass(kw_only=True)
class Learner:
    """All that an optimizer step reads and changes."""

    config: TrainConfig
    accelerator: Accelerator
    unwrapped_model: LSTMLanguageModel
    model: nn.Module
    """`unwrapped_model` as Accelerate prepared it"""
    optimizer: AcceleratedOptimizer
    average: LSTMLanguageModel | None
    """holds the averaged weights; None without `ema_decay`"""
    progression: Progression
    lane_states: list[State] = field(default_factory=list)
    """LSTM state of this process's lanes, one entry per micro-batch"""
    nonfinite: Tensor
    """bool scalar: a loss or gradient was nan or infinite; from then on no step updates anything"""
    recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=2))
    """the last two steps: `distributed.launch.Agreement` may report a nan one step late"""
    skips_in_a_row: int = 0
    graph: GraphedSteps | None = None
    """takes the steps if `cuda_graph` is set"""

    @property
    def eval_model(self) -> LSTMLanguageModel:
        """The model to score, sample and publish: the averaged weights if there are any."""
        return self.average or self.unwrapped_model


class StepLoader:
    """Reads the micro-batches of each step, through one loader that Accelerate prepared.

    Accelerate gives this process its rows of every micro-batch. It reads one micro-batch ahead.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, store: TokenStore) -> None:
        self.per_epoch = steps_per_epoch(config, store)
        self.mixture = mixture_of(config, store)
        self._micro_batches = config.gradient_accumulation_steps
        self._sampler = LaneSampler(batch_size=config.batch_size, micro_batches=self._micro_batches)
        if self.mixture is not None:
            loader = build_mixed_loader(self.mixture, self._sampler, seed=config.seed)
        else:
            self._course = _course_of(config, store)
            loader = build_loader(store.train, self._sampler, seq_len=config.seq_len, seed=config.seed)
        loader.pin_memory = accelerator.device.type == "cuda"  # a copy to a GPU then need not be waited for
        self._loader = accelerator.prepare(loader)

    def begun(self, step: int) -> NDArray[np.bool_]:
        """Return for each lane of the global batch whether it begins another order of documents in a step.

        Orders are those of an epoch, of a shard, or of a source's pass.
        """
        if self.mixture is not None:
            return self.mixture.begun(step)
        return np.full(self._sampler.num_lanes, self._course.find(step).window == 0)

    def sample(self, count: int) -> NDArray[np.int32]:
        """Return a sample of the training text, of each source as much as its share: (at most count,) tokens.

        Of a text in shards it is of the shard that the first step reads too.
        """
        if self.mixture is None:
            return self._course.first_part.sample(count)
        shares = self.mixture.shares
        return np.concatenate([s.split.sample(int(count * shares[s.name])) for s in self.mixture.sources])

    def read(self, first_step: int, last_step: int) -> Iterator[tuple[list[dict[str, Tensor]], float]]:
        """Yield the micro-batches of each step from `first_step` up to `last_step`, and the seconds waited for them."""
        self._sampler.steps = range(first_step, last_step)
        batches = iter(self._loader)
        for _ in range(first_step, last_step):
            started = time.perf_counter()
            with span("data"):
                micro_batches = list(islice(batches, self._micro_batches))
            yield micro_batches, time.perf_counter() - started


def mixture_of(config: TrainConfig, store: TokenStore) -> Mixture | None:
    """Return the sources of the training text with their lanes; None if there is one source.

    Raises:
        TextgenError: a source has too few tokens.
    """
    if not config.data.sources:
        return None
    weights = {source.name: source.weight for source in config.data.sources}
    return Mixture(store.split_by_source("train"), weights, batch_size=config.batch_size, seq_len=config.seq_len)


def steps_per_epoch(config: TrainConfig, store: TokenStore) -> int:
    """Return the optimizer steps of one epoch; of several sources, those that read as many tokens as all of them have.

    Raises:
        TextgenError: the training split, or a source's part of it, has too few tokens for one step.
    """
    if (mixture := mixture_of(config, store)) is not None:
        return mixture.steps_per_epoch
    return _course_of(config, store).per_epoch


def _course_of(config: TrainConfig, store: TokenStore) -> Course:
    return Course(store.train, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.seed)


def step_batches(learner: Learner, loader: StepLoader, until: int) -> Iterator[tuple[list[dict[str, Tensor]], float]]:
    """Yield the micro-batches of each step up to `until`, and the seconds waited for them.

    Sets the LSTM state of a lane to zero where another order of documents begins in it, such as at the start of an
    epoch.
    """
    first = learner.progression.step
    for step, (micro_batches, waited) in enumerate(loader.read(first, until), start=first):
        begun = loader.begun(step)
        if begun.all() or not learner.lane_states:
            learner.lane_states = zero_lanes(learner)
        elif begun.any():
            kept = torch.from_numpy(~begun).to(learner.accelerator.device)
            pairs = zip(learner.lane_states, micro_batches, strict=True)
            learner.lane_states = [_keep_lanes(state, kept[batch["lanes"]]) for state, batch in pairs]
        yield micro_batches, waited


def _keep_lanes(state: State, kept: Tensor) -> State:
    """Return the LSTM state of lanes, with zeros for those that are not kept."""
    hidden, cell = (part.masked_fill(~kept[:, None], 0) for part in state)  # (num_layers, lanes, size)
    return hidden, cell


def zero_lanes(learner: Learner) -> list[State]:
    """Return zero states for this process's lanes, one entry per micro-batch."""
    micro = learner.config.gradient_accumulation_steps
    rows = learner.config.batch_size // (micro * learner.accelerator.num_processes)
    return [learner.unwrapped_model.zero_state(rows) for _ in range(micro)]


def train_step(
    learner: Learner, micro_batches: Sequence[Mapping[str, Tensor]], *, learning_rate: float | None = None
) -> Tensor:
    """Take one optimizer step. Collective: all processes must call it together.

    The nats of all micro-batches are summed and divided once by the step's tokens over all processes. The gradient
    therefore does not depend on the number of processes or micro-batches, up to rounding.

    Args:
        learner: weights, optimizer and lane states are changed in place.
        micro_batches: this process's rows of each.
        learning_rate: replaces the schedule's, without an update of the averaged weights; 0 only times a step.

    Returns:
        Nats summed over this process's tokens, a scalar on the device. Nothing waits for it.
    """
    config, step = learner.config, learner.progression.step
    ema_update = 0.0
    if learning_rate is None:
        learning_rate = learning_rate_at(step, learner.progression.total_steps, config)
        if config.ema_decay is not None:
            ema_update = 1 - min(
                config.ema_decay, (1 + step) / (10 + step)
            )  # initial weights soon lose their influence
    if learner.accelerator.device.type == "cuda":
        # A graph's Adam reads a float32 learning rate. Round here too, so that steps with and without a graph agree.
        learning_rate = torch.tensor(learning_rate, dtype=torch.float32).item()
    inputs = StepInputs(step, learning_rate, ema_update, micro_batches, learner.lane_states)
    record = StepRecord(step, [])
    learner.recent.append(record)
    compute = partial(_compute, learner)
    return compute(inputs, record) if learner.graph is None else learner.graph.take(compute, inputs, record)


def _compute(learner: Learner, inputs: StepInputs, record: StepRecord) -> Tensor:
    """Take a step with the given inputs. Collective.

    A CUDA graph can capture this function, except with float16's scaler: nothing waits for the device, and values of
    the host that change from step to step come from `inputs`.
    """
    config, accelerator, model = learner.config, learner.accelerator, learner.model
    # The mean over the step's tokens. DDP divides gradients by the number of processes, so multiply by it.
    scale = accelerator.num_processes / (config.batch_size * config.seq_len)
    nats = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(inputs.micro_batches):
        masks = DropoutMasks(config.seed, inputs.step, batch["lanes"]) if config.model.drops else None
        # Only the last micro-batch's backward pass exchanges gradients between processes.
        with accelerator.no_sync(model) if i + 1 < len(inputs.micro_batches) else nullcontext():
            with span("forward"):
                part, (hidden, cell) = model(batch["tokens"], inputs.states[i], batch["targets"], masks=masks)
            with span("backward"):
                accelerator.backward(part * scale)
        # Truncated backpropagation: the next window gets the state, but no gradient flows back through it.
        inputs.states[i] = hidden.detach(), cell.detach()
        nats += part.detach()
        record.parts.append((batch["lanes"], part.detach()))
    with span("update"):
        for group in learner.optimizer.param_groups:
            group["lr"] = inputs.learning_rate
        _update(learner, nats, record)
        if learner.average is not None:
            _update_average(learner.average, learner.unwrapped_model, inputs.ema_update)
    return nats


def _update(learner: Learner, nats: Tensor, record: StepRecord) -> None:
    """Clip the gradient and update the weights, unless the loss or the gradient is nan or infinite.

    Nothing waits for the device, except if float16 is scaled.
    """
    accelerator = learner.accelerator
    parameters = list(learner.model.parameters())
    if learner.config.max_grad_norm is not None:
        norm: Tensor = accelerator.clip_grad_norm_(parameters, learner.config.max_grad_norm)
    else:
        accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # An infinite gradient is an error. With float16's scaler it only means that the scale was too large: the scaler
    # skips the update and halves the scale.
    scaled = accelerator.scaler is not None
    finite = nats.isfinite() if scaled else norm.isfinite() & nats.isfinite()
    learner.nonfinite |= ~finite
    skipped = update_weights(learner.optimizer, accelerator.scaler, learner.nonfinite)
    if scaled:
        learner.progression.skipped_steps += skipped
        learner.skips_in_a_row = learner.skips_in_a_row + 1 if skipped else 0
    record.norm = norm
    learner.optimizer.zero_grad()


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, ema_update: float | Tensor) -> None:
    """Move the averaged weights towards the model's by a share of the difference."""
    averaged: list[Tensor] = list(average.parameters())
    current: list[Tensor] = list(model.parameters())
    if isinstance(ema_update, Tensor):  # in a CUDA graph; lerp takes a tensor for each weight
        torch._foreach_lerp_(averaged, current, [ema_update] * len(current))
    elif ema_update > 0:
        torch._foreach_lerp_(averaged, current, ema_update)
