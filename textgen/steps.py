"""One optimizer step: what it needs, its micro-batches, and what it costs."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from textgen.config import TrainConfig
from textgen.console import say
from textgen.data.lanes import Epoch, build_loader, windows_per_epoch
from textgen.data.store import TokenStore
from textgen.distributed.launch import LSTM_DTYPES
from textgen.distributed.signals import StopSignals
from textgen.distributed.world import LaunchError
from textgen.kernels.capture import CudaCapture, Replay
from textgen.model.lstm import DropoutMasks, LSTMLanguageModel, State
from textgen.optim import build_optimizer, learning_rate
from textgen.runs.checkpoint import Saver
from textgen.step_graph import Capture, StepGraph, StepInputs, Taken
from textgen.usage import peak_memory

log = logging.getLogger("textgen")

# Share of `max_minutes` that is spent on timing steps, at most; they are not counted and leave no trace.
TIMING_SHARE = 0.05


class TrainingError(ValueError):
    """A training that cannot go on; the message is one line."""


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


@dataclass(kw_only=True)
class Training:
    """What outlives a step."""

    config: TrainConfig
    accelerator: Accelerator
    store: TokenStore
    bare: LSTMLanguageModel
    model: nn.Module
    """`bare` as Accelerate prepared it"""
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
    recent: deque[Taken] = field(default_factory=lambda: deque(maxlen=2))
    """the last steps, to tell which of them went wrong"""
    skips_in_a_row: int = 0
    graph: StepGraph | None = None
    """takes the steps, where `cuda_graph` asks for one"""

    @property
    def best_weights(self) -> LSTMLanguageModel:
        """The model to score, sample and publish."""
        return self.average or self.bare


def build(config: TrainConfig, accelerator: Accelerator, store: TokenStore, stop: StopSignals) -> Training:
    """Build model, optimizer and the counting of steps."""
    set_seed(config.seed)
    text = {"tokenizer_sha256": store.tokenizer.sha256, "normalization": store.record["normalization"]}
    counts = store.unigram_counts
    bare = LSTMLanguageModel(config.model, len(counts), unigram_counts=counts, text=text)
    optimizer = build_optimizer(bare, config)
    assert_precision(bare, accelerator)
    model, prepared = accelerator.prepare(bare, optimizer)
    average = None
    if config.ema_decay is not None:
        average = LSTMLanguageModel(config.model, len(counts), text=text).to(accelerator.device).requires_grad_(False)
        average.load_state_dict(bare.state_dict())
    if config.early_stopping_patience is not None and "validation" not in store.record["splits"]:
        raise TrainingError("`early_stopping_patience` needs a validation split, and the data has none")
    total = config.max_epochs * steps_per_epoch(config, store)
    device = accelerator.device
    if isinstance(model, DistributedDataParallel):
        if config.gradient_compression == "bf16":
            # torch's hook, which Accelerate would register too. Behind a lambda, since DDP knows it by its name and
            # then wants NCCL; gloo adds up bfloat16 as well.
            model.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
        settle_buckets(accelerator, bare, model)
    return Training(
        config=config, accelerator=accelerator, store=store, bare=bare, model=model, optimizer=prepared,
        average=average, progression=Progression(total_steps=min(total, config.max_steps or total)), stop=stop,
        nats=torch.zeros((), dtype=torch.float64, device=device),
        nonfinite=torch.zeros((), dtype=torch.bool, device=device),
        graph=StepGraph(capture_on(bare.embedding.weight.device, prepared)) if config.cuda_graph else None,
    )  # fmt: skip


def refuse_graph(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise LaunchError where `cuda_graph` is asked for and there can be none."""
    if not config.cuda_graph:
        return
    if accelerator.device.type != "cuda":
        raise LaunchError(f"`cuda_graph` needs a GPU, and this training runs on the device {accelerator.device.type}")
    if accelerator.num_processes > 1:
        raise LaunchError(f"`cuda_graph` is for one process, and there are {accelerator.num_processes}: leave it out")
    if accelerator.mixed_precision == "fp16":
        raise LaunchError(
            "`cuda_graph` does not go with mixed_precision fp16, whose scaler asks the device at every step: "
            "leave it out, or use `--mixed_precision bf16`"
        )


def capture_on(device: torch.device, optimizer: AcceleratedOptimizer) -> Capture:
    """Return what makes a CUDA graph of a step."""
    made: list[CudaCapture] = []  # kept: torch may still ask a capture that failed

    def capture(work: Callable[[], None]) -> Replay:
        # With a memory pool of its own: torch refuses to go on with one whose graph was dropped while something of it,
        # such as cuBLAS's workspace, lives on.
        made.append(CudaCapture(device))
        torch.cuda.empty_cache()  # the graph takes memory of its own, as much as the steps before it had
        for group in optimizer.param_groups:
            group["capturable"] = True  # else torch's Adam refuses; and outside of a capture it would warn
        try:
            return made[-1].record(work)
        except RuntimeError:
            optimizer.zero_grad()  # gradients of a step that was not taken
            raise
        finally:
            for group in optimizer.param_groups:
                group["capturable"] = False

    return capture


def settle_buckets(accelerator: Accelerator, bare: LSTMLanguageModel, model: nn.Module) -> None:
    """Have DDP sum gradients in their final buckets from the first step on. Collective.

    DDP reduces all gradients as one in its first backward pass and in buckets in the order of arrival ever after. Where
    three processes or more add up, that decides in which order they do: a resumed run's first step would have other
    last bits than the same step of a run that went on.
    """
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=accelerator.device)
    nats, _ = model(tokens, bare.zero_state(1), tokens)
    accelerator.backward(nats)
    bare.zero_grad()


def assert_precision(model: LSTMLanguageModel, accelerator: Accelerator) -> None:
    """Raise LaunchError in the first forward pass if the LSTM does not compute in the dtype that was asked for."""
    wanted = LSTM_DTYPES[accelerator.mixed_precision]

    def check(_module: nn.Module, _inputs: object, output: tuple[Tensor, State]) -> None:
        handle.remove()
        if output[0].dtype != wanted:
            raise LaunchError(f"the LSTM computes in {output[0].dtype}, wanted {wanted}")

    handle = model.layers[0].register_forward_hook(check)


def steps_per_epoch(config: TrainConfig, store: TokenStore) -> int:
    """Return the optimizer steps of one epoch; raise DataError where the text is too short for one."""
    return windows_per_epoch(store.split("train"), batch_size=config.batch_size, seq_len=config.seq_len)


def step_batches(training: Training, until: int) -> Iterator[tuple[list[dict[str, Tensor]], float]]:
    """Yield each remaining step's micro-batches, dealt to this process by Accelerate, and the seconds waited for them.

    Sets the lanes' states to zero at the start of an epoch.
    """
    config, now = training.config, training.progression
    split = training.store.split("train")
    per_epoch = steps_per_epoch(config, training.store)
    micro = config.gradient_accumulation_steps
    while now.step < until:
        started = time.perf_counter()
        number, window = divmod(now.step, per_epoch)
        epoch = Epoch(split, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.seed, epoch=number)
        last = min(per_epoch, window + until - now.step)
        loader = training.accelerator.prepare(
            build_loader(epoch, micro_batches=micro, first_window=window, last_window=last)
        )
        if window == 0 or not training.lane_states:
            training.lane_states = zero_lanes(training)
        batches = iter(loader)
        try:
            for _ in range(window, last):
                micro_batches = list(islice(batches, micro))
                yield micro_batches, time.perf_counter() - started
                started = time.perf_counter()
        finally:
            # Accelerate keeps every loader it has prepared, and with it the epoch's order of documents
            training.accelerator._dataloaders.remove(loader)


def zero_lanes(training: Training) -> list[State]:
    """Return the state before any text of this process's lanes, one entry per micro-batch."""
    micro = training.config.gradient_accumulation_steps
    rows = training.config.batch_size // (micro * training.accelerator.num_processes)
    return [training.bare.zero_state(rows) for _ in range(micro)]


def train_step(training: Training, micro_batches: Sequence[dict[str, Tensor]], *, rate: float | None = None) -> Tensor:
    """Take one optimizer step. Collective.

    Each micro-batch's nats are summed and divided once by the step's tokens over all processes, so that neither the
    number of processes nor of micro-batches shows in the gradient.

    Args:
        training: weights, optimizer and lane states are changed in place.
        micro_batches: this process's rows of each.
        rate: overrides the learning rate of the step.

    Returns:
        Nats summed over this process's tokens, on the device: nothing waits for it.
    """
    config, step = training.config, training.progression.step
    approach = 0.0
    if rate is None:
        rate = learning_rate(step, training.progression.total_steps, config)
        if config.ema_decay is not None:
            approach = 1 - min(config.ema_decay, (1 + step) / (10 + step))  # early weights are soon forgotten
    if training.accelerator.device.type == "cuda":
        rate = torch.tensor(rate, dtype=torch.float32).item()  # as a graph's Adam reads it, so that all learn the same
    inputs, taken = StepInputs(step, rate, approach, micro_batches, training.lane_states), Taken(step, [])
    training.recent.append(taken)
    compute = partial(_compute, training)
    return compute(inputs, taken) if training.graph is None else training.graph.take(compute, inputs, taken)


def _compute(training: Training, inputs: StepInputs, taken: Taken) -> Tensor:
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
        taken.parts.append((batch["lanes"], part.detach()))
    for group in training.optimizer.param_groups:
        group["lr"] = inputs.rate
    _update(training, nats, taken)
    if training.average is not None and (isinstance(inputs.approach, Tensor) or inputs.approach > 0):
        averaged: list[Tensor] = list(training.average.parameters())
        current: list[Tensor] = list(training.bare.parameters())
        if isinstance(inputs.approach, Tensor):
            torch._foreach_lerp_(averaged, current, [inputs.approach] * len(current))
        else:
            torch._foreach_lerp_(averaged, current, inputs.approach)
    return nats


def _update(training: Training, nats: Tensor, taken: Taken) -> None:
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
    taken.norm = norm
    training.optimizer.zero_grad()


# --- what a training costs -------------------------------------------------------------------------------------------


def time_steps(training: Training, *, budget_seconds: float, at_most: int = 200) -> float:
    """Return the median seconds of a few steps that leave no trace: learning rate 0, Adam's state cleared after."""
    seconds: list[float] = []
    warming = 1 if training.graph is None else training.graph.warming
    scaler = training.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else {}
    started = time.perf_counter()
    for micro_batches, _ in step_batches(training, training.progression.step + at_most):
        before = time.perf_counter()
        nats = train_step(training, micro_batches, rate=0.0)
        nats.item()  # wait for the device
        seconds.append(time.perf_counter() - before)
        spent = time.perf_counter() - started > budget_seconds
        enough = (spent and len(seconds) > warming) or len(seconds) == at_most
        if float(training.accelerator.reduce(torch.tensor(float(enough), device=nats.device), "sum")) > 0:
            break
    if training.graph is not None:
        training.graph.forget()
    training.optimizer.state.clear()
    training.lane_states = []
    training.nonfinite.zero_()
    training.recent.clear()
    training.progression.skipped_steps = training.skips_in_a_row = 0
    if scaler is not None:
        scaler.load_state_dict(scale)
    return statistics.median_high(seconds[warming:] or seconds)


def fit_steps(training: Training) -> int:
    """Return how many steps fit into `max_minutes`: timed once, decided by the main process. Collective."""
    config, accelerator = training.config, training.accelerator
    assert config.max_minutes is not None
    budget = config.max_minutes * 60
    seconds = time_steps(training, budget_seconds=budget * TIMING_SHARE)
    decided = torch.tensor(max(int(budget / seconds), 1), device=accelerator.device)
    if not accelerator.is_main_process:
        decided.zero_()
    steps = int(accelerator.reduce(decided, "sum"))
    log.info("%d steps of %.3f s fit into %g minutes", steps, seconds, config.max_minutes)
    return steps


def describe_request(config: TrainConfig, config_file: str | None) -> str:
    """Return what is asked for, in a line, before there is a vocabulary; a small text may have fewer pieces."""
    with torch.device("meta"):
        parameters = LSTMLanguageModel(config.model, config.tokenizer.vocab_size).num_parameters
    known = config.tokenizer.path is None and config.data.store is None
    size = f"up to {parameters:,} parameters, " if known else ""
    return f"{size}{config.batch_size} x {config.seq_len} tokens per step, config {config_file or 'from flags'}"


def describe_training(training: Training) -> str:
    """Return what is about to be trained, in a line."""
    config, store, now = training.config, training.store, training.progression
    return (
        f"{training.bare.num_parameters:,} parameters, {store.split('train').num_tokens:,} training tokens of "
        f"{store.bytes_per_token('train'):.2f} bytes, {config.batch_size} x {config.seq_len} tokens per step, "
        f"steps {now.step} to {now.total_steps}, {steps_per_epoch(config, store)} per epoch"
    )


def describe_cost(training: Training) -> None:
    """Print what the training would cost, from two steps. Collective."""
    seconds = time_steps(training, budget_seconds=0.0)
    accelerator, steps = training.accelerator, training.progression.total_steps
    memory = peak_memory(accelerator.device) / 2**30
    if training.config.max_minutes is not None:
        steps = min(steps, max(int(training.config.max_minutes * 60 / seconds), 1))
    say(
        accelerator,
        f"dry run: {describe_training(training)}\n"
        f"{steps:,} steps of {seconds:.3f} s: {steps * seconds / 3600:.2f} hours, "
        f"{memory:.2f} GiB of memory at its peak so far per process; nothing was written but the token store",
    )
