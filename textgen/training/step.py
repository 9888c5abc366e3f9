"""One optimizer step: what it needs, and its micro-batches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from textgen.config import TrainConfig
from textgen.data.lanes import LaneSampler, build_loader, windows_per_epoch
from textgen.data.store import Split, TokenStore
from textgen.distributed.signals import StopSignals
from textgen.model.lstm import DropoutMasks, LSTMLanguageModel, State
from textgen.runs.checkpoint import Saver
from textgen.training.optim import learning_rate_at


@dataclass(kw_only=True)
class Progression:
    """The training state beside tensors: plain numbers, saved as JSON, whole at every step."""

    step: int = 0
    total_steps: int
    epoch_nats: float = 0.0
    epoch_tokens: int = 0
    unlogged_nats: float = 0.0
    """of all processes, since the last row of metrics; brought up to date when a checkpoint is made"""
    unlogged_steps: int = 0
    evaluated_step: int = 0
    """the last step that was scored and sampled"""
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_better: int = 0
    skipped_steps: int = 0
    """steps without an update since float16 overflowed"""
    finished: bool = False


@dataclass
class StepRecord:
    """What tells whether a step went wrong, and where."""

    step: int
    parts: list[tuple[Tensor, Tensor]]
    """lanes and nats of each micro-batch of this process"""
    norm: Tensor | None = None
    """of the gradient of all processes"""


@dataclass
class StepInputs:
    """What differs from step to step: as it comes, or at the fixed addresses that a graph reads."""

    step: int | Tensor
    learning_rate: float | Tensor
    ema_update: float | Tensor
    """share of the way that averaged weights go towards the updated ones"""
    micro_batches: Sequence[Mapping[str, Tensor]]
    states: list[State]
    """of the LSTM before each micro-batch; a step puts those after it in their place"""

    def copy(self) -> StepInputs:
        """Return the same as tensors at addresses of their own."""
        device = self.micro_batches[0]["tokens"].device
        rate_dtype = torch.float32 if device.type == "cuda" else torch.float64  # what fused Adam reads there
        return StepInputs(
            torch.tensor(self.step, dtype=torch.int64, device=device),
            torch.tensor(self.learning_rate, dtype=rate_dtype, device=device),
            torch.tensor(self.ema_update, dtype=torch.float32, device=device),
            [{name: value.clone() for name, value in batch.items()} for batch in self.micro_batches],
            # float32 holds what an LSTM computes in, and what training states come in: nothing is rounded
            [(hidden.float().clone(), cell.float().clone()) for hidden, cell in self.states],
        )

    def load(self, inputs: StepInputs) -> None:
        """Take in what another step is made of, of the same shapes; nothing waits for the device."""
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


Compute = Callable[[StepInputs, StepRecord], Tensor]
"""takes a step in place, notes in `StepRecord` what it made, and returns its nats"""


class GraphedSteps(Protocol):
    """Takes steps from a CUDA graph; `StepGraph` of cuda_graph.py is one."""

    warming: int
    """steps that take longer than those to come"""

    @property
    def is_refused(self) -> bool:
        """Tell whether a step could not be captured, so that steps run without a graph."""

    def take(self, compute: Compute, inputs: StepInputs, record: StepRecord) -> Tensor:
        """Take a step as `compute` does."""

    def forget(self) -> None:
        """Drop the graph: weights, optimizer or batches will be at other addresses."""


class StepLoader:
    """Reads the micro-batches of each step, through one loader that Accelerate prepared.

    Accelerate gives this process its rows of every micro-batch. It reads one micro-batch ahead.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, split: Split) -> None:
        self._micro_batches = config.gradient_accumulation_steps
        self._sampler = LaneSampler(batch_size=config.batch_size, micro_batches=self._micro_batches)
        self._loader = accelerator.prepare(build_loader(split, self._sampler, seq_len=config.seq_len, seed=config.seed))

    def read(self, first_step: int, last_step: int) -> Iterator[tuple[list[dict[str, Tensor]], float]]:
        """Yield the micro-batches of each step from `first_step` up to `last_step`, and the seconds waited for them."""
        self._sampler.steps = range(first_step, last_step)
        batches = iter(self._loader)
        for _ in range(first_step, last_step):
            started = time.perf_counter()
            micro_batches = list(islice(batches, self._micro_batches))
            yield micro_batches, time.perf_counter() - started


@dataclass(kw_only=True)
class Training:
    """What outlives a step."""

    config: TrainConfig
    accelerator: Accelerator
    store: TokenStore
    loader: StepLoader
    unwrapped_model: LSTMLanguageModel
    model: nn.Module
    """`unwrapped_model` as Accelerate prepared it"""
    optimizer: AcceleratedOptimizer
    progression: Progression
    stop: StopSignals
    average: LSTMLanguageModel | None = None
    """holds the averaged weights, where they are wanted"""
    saver: Saver | None = None
    """of the main process"""
    lane_states: list[State] = field(default_factory=list)
    """LSTM state of this process's lanes, one entry per micro-batch"""
    wandb_id: str | None = None
    origin: str | None = None
    """checkpoint of another run that this one began with"""
    nats: Tensor
    """float64 scalar: of this process, since the last row of metrics. Sums of float32 values are exact in it, so that
    no order of summation, and no resume, shows in a row"""
    nonfinite: Tensor
    """bool scalar: a loss or gradient was nan or infinite; from then on no step updates anything"""
    recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=2))
    """the last steps, to tell which of them went wrong"""
    skips_in_a_row: int = 0
    graph: GraphedSteps | None = None
    """takes the steps, where `cuda_graph` asks for one"""

    @property
    def eval_model(self) -> LSTMLanguageModel:
        """The model to score, sample and publish."""
        return self.average or self.unwrapped_model


def steps_per_epoch(config: TrainConfig, store: TokenStore) -> int:
    """Return the optimizer steps of one epoch; raise TextgenError where the text is too short for one."""
    return windows_per_epoch(store.split("train"), batch_size=config.batch_size, seq_len=config.seq_len)


def step_batches(training: Training, until: int) -> Iterator[tuple[list[dict[str, Tensor]], float]]:
    """Yield the micro-batches of each step up to `until`, and the seconds waited for them.

    Sets the LSTM states of the lanes to zero at the start of an epoch.
    """
    first = training.progression.step
    per_epoch = steps_per_epoch(training.config, training.store)
    for step, batches in enumerate(training.loader.read(first, until), start=first):
        if step % per_epoch == 0 or not training.lane_states:
            training.lane_states = zero_lanes(training)
        yield batches


def zero_lanes(training: Training) -> list[State]:
    """Return the state before any text of this process's lanes, one entry per micro-batch."""
    micro = training.config.gradient_accumulation_steps
    rows = training.config.batch_size // (micro * training.accelerator.num_processes)
    return [training.unwrapped_model.zero_state(rows) for _ in range(micro)]


def train_step(
    training: Training, micro_batches: Sequence[dict[str, Tensor]], *, learning_rate: float | None = None
) -> Tensor:
    """Take one optimizer step. Collective.

    Each micro-batch's nats are summed and divided once by the step's tokens over all processes, so that neither the
    number of processes nor of micro-batches shows in the gradient.

    Args:
        training: weights, optimizer and lane states are changed in place.
        micro_batches: this process's rows of each.
        learning_rate: overrides the learning rate of the step.

    Returns:
        Nats summed over this process's tokens, on the device: nothing waits for it.
    """
    config, step = training.config, training.progression.step
    ema_update = 0.0
    if learning_rate is None:
        learning_rate = learning_rate_at(step, training.progression.total_steps, config)
        if config.ema_decay is not None:
            ema_update = 1 - min(config.ema_decay, (1 + step) / (10 + step))  # early weights are soon forgotten
    if training.accelerator.device.type == "cuda":
        # as a graph's Adam reads it, so that all learn the same
        learning_rate = torch.tensor(learning_rate, dtype=torch.float32).item()
    inputs = StepInputs(step, learning_rate, ema_update, micro_batches, training.lane_states)
    record = StepRecord(step, [])
    training.recent.append(record)
    compute = partial(_compute, training)
    return compute(inputs, record) if training.graph is None else training.graph.take(compute, inputs, record)


def _compute(training: Training, inputs: StepInputs, record: StepRecord) -> Tensor:
    """Take a step of given inputs. Collective.

    A graph may hold this, but for float16's scaler: nothing is asked of the device, and nothing that the host changes
    here differs from step to step.
    """
    config, accelerator, model = training.config, training.accelerator, training.model
    scale = accelerator.num_processes / (config.batch_size * config.seq_len)  # DDP averages over processes
    nats = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(inputs.micro_batches):
        masks = DropoutMasks(config.seed, inputs.step, batch["lanes"]) if config.model.drops else None
        with accelerator.no_sync(model) if i + 1 < len(inputs.micro_batches) else nullcontext():
            part, (hidden, cell) = model(batch["tokens"], inputs.states[i], batch["targets"], masks=masks)
            accelerator.backward(part * scale)
        inputs.states[i] = hidden.detach(), cell.detach()
        nats += part.detach()
        record.parts.append((batch["lanes"], part.detach()))
    for group in training.optimizer.param_groups:
        group["lr"] = inputs.learning_rate
    _update(training, nats, record)
    if training.average is not None and (isinstance(inputs.ema_update, Tensor) or inputs.ema_update > 0):
        averaged: list[Tensor] = list(training.average.parameters())
        current: list[Tensor] = list(training.unwrapped_model.parameters())
        if isinstance(inputs.ema_update, Tensor):
            torch._foreach_lerp_(averaged, current, [inputs.ema_update] * len(current))
        else:
            torch._foreach_lerp_(averaged, current, inputs.ema_update)
    return nats


def _update(training: Training, nats: Tensor, record: StepRecord) -> None:
    """Clip the gradient and update the weights, unless loss or gradient is not finite.

    Nothing waits for the device, except where float16 is scaled.
    """
    parameters = list(training.model.parameters())
    max_norm = training.config.max_grad_norm
    norm: Tensor
    if max_norm is not None:
        norm = training.accelerator.clip_grad_norm_(parameters, max_norm)
    else:
        training.accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if training.accelerator.scaler is None:
        training.nonfinite |= ~(norm.isfinite() & nats.isfinite())
        # What GradScaler tells a fused optimizer: leave everything as it is. Gradients are the same on all processes.
        training.optimizer.optimizer.found_inf = training.nonfinite.float()
        training.optimizer.step()
    else:
        training.nonfinite |= ~nats.isfinite()
        scale = training.accelerator.scaler.get_scale()
        training.optimizer.step()
        # A fused optimizer is always called, and leaves weights alone by itself: Accelerate's `step_was_skipped` is
        # never true of one. But the scale is halved.
        skipped = training.accelerator.scaler.get_scale() < scale
        training.progression.skipped_steps += skipped
        training.skips_in_a_row = training.skips_in_a_row + 1 if skipped else 0
    record.norm = norm
    training.optimizer.zero_grad()
