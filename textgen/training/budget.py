"""What a training costs: timed steps, `max_minutes`, the dry run, lines that describe it."""

from __future__ import annotations

import logging
import statistics
import time

import torch

from textgen.config import TrainConfig
from textgen.console import say
from textgen.model.lstm import LSTMLanguageModel
from textgen.training.metrics import peak_memory
from textgen.training.step import Training, step_batches, steps_per_epoch, train_step

log = logging.getLogger("textgen")

# Share of `max_minutes` that is spent on timing steps, at most; they are not counted and leave no trace.
TIMING_SHARE = 0.05


def time_steps(training: Training, *, budget_seconds: float, at_most: int = 200) -> float:
    """Return the median seconds of a few steps that leave no trace: learning rate 0, Adam's state cleared after."""
    seconds: list[float] = []
    warming = 1 if training.graph is None else training.graph.warming
    scaler = training.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else {}
    started = time.perf_counter()
    for micro_batches, _ in step_batches(training, training.progression.step + at_most):
        before = time.perf_counter()
        nats = train_step(training, micro_batches, learning_rate=0.0)
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
    config, store, progress = training.config, training.store, training.progression
    return (
        f"{training.unwrapped_model.num_parameters:,} parameters, "
        f"{store.split('train').num_tokens:,} training tokens of {store.bytes_per_token('train'):.2f} bytes, "
        f"{config.batch_size} x {config.seq_len} tokens per step, "
        f"steps {progress.step} to {progress.total_steps}, {steps_per_epoch(config, store)} per epoch"
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
