"""The cost of a training: timed steps, `max_minutes`, the dry run, and the lines that describe a training."""

from __future__ import annotations

import logging
import statistics
import time

import torch

from textgen.config import TrainConfig
from textgen.console import say
from textgen.data.store import TokenStore
from textgen.model.lstm import LSTMLanguageModel
from textgen.training.metrics import peak_memory
from textgen.training.step import Learner, StepLoader, mixture_of, step_batches, steps_per_epoch, train_step

log = logging.getLogger("textgen")

# Largest share of `max_minutes` that may be spent on timed steps. They do not count as steps of the training.
TIMING_SHARE = 0.05


def time_steps(learner: Learner, loader: StepLoader, *, budget_seconds: float, at_most: int = 200) -> float:
    """Return the median seconds of a few steps. They leave no trace in the training. Collective.

    The steps have learning rate 0; Adam's state and all else that a step changes is reset afterwards. A training must
    therefore be timed before its first step and before a checkpoint is loaded.

    Args:
        learner: before its first step.
        loader: of the training; it reads the steps that come next and will read them again.
        budget_seconds: no step starts after that, except those that warm up and one more.
        at_most: number of steps.
    """
    seconds: list[float] = []
    warming = 1 if learner.graph is None else learner.graph.warming
    scaler = learner.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else {}
    started = time.perf_counter()
    for micro_batches, _ in step_batches(learner, loader, learner.progression.step + at_most):
        before = time.perf_counter()
        nats = train_step(learner, micro_batches, learning_rate=0.0)
        nats.item()  # wait for the device
        seconds.append(time.perf_counter() - before)
        spent = time.perf_counter() - started > budget_seconds
        enough = (spent and len(seconds) > warming) or len(seconds) == at_most
        # All processes stop at the same step, when the first of them has enough.
        if float(learner.accelerator.reduce(torch.tensor(float(enough), device=nats.device), "sum")) > 0:
            break
    if learner.graph is not None:
        learner.graph.forget()
    learner.optimizer.state.clear()
    learner.lane_states = []
    learner.nonfinite.zero_()
    learner.recent.clear()
    learner.progression.skipped_steps = learner.skips_in_a_row = 0
    if scaler is not None:
        scaler.load_state_dict(scale)
    return statistics.median_high(seconds[warming:] or seconds)


def fit_steps(learner: Learner, loader: StepLoader) -> int:
    """Return the number of steps that fit into `max_minutes`, from timed steps of the main process. Collective."""
    config, accelerator = learner.config, learner.accelerator
    assert config.max_minutes is not None
    budget = config.max_minutes * 60
    seconds = time_steps(learner, loader, budget_seconds=budget * TIMING_SHARE)
    # Every process measured another time. All of them take the main process's number.
    decided = torch.tensor(max(int(budget / seconds), 1), device=accelerator.device)
    if not accelerator.is_main_process:
        decided.zero_()
    steps = int(accelerator.reduce(decided, "sum"))
    minutes = "1 minute" if config.max_minutes == 1 else f"{config.max_minutes:g} minutes"
    log.info("%d steps of %.3f s fit into %s", steps, seconds, minutes)
    return steps


def describe_request(config: TrainConfig, config_file: str | None) -> str:
    """Return one line about the settings, before the vocabulary is known. A small text may have fewer pieces."""
    with torch.device("meta"):
        parameters = LSTMLanguageModel(config.model, config.tokenizer.vocab_size).num_parameters
    known = config.tokenizer.path is None and config.data.store is None
    size = f"up to {parameters:,} parameters, " if known else ""
    return f"{size}{config.batch_size} x {config.seq_len} tokens per step, config {config_file or 'from flags'}"


def describe_training(learner: Learner, store: TokenStore) -> str:
    """Return one line about the training that is about to start."""
    config, progress = learner.config, learner.progression
    return (
        f"{learner.unwrapped_model.num_parameters:,} parameters, "
        f"{store.record['splits']['train']['tokens']:,} training tokens of {store.bytes_per_token('train'):.2f} bytes, "
        f"{config.batch_size} x {config.seq_len} tokens per step, "
        f"steps {progress.step} to {progress.total_steps}, {steps_per_epoch(config, store)} per epoch"
        + _describe_sources(config, store, progress.total_steps)
    )


def _describe_sources(config: TrainConfig, store: TokenStore, steps: int) -> str:
    """Return the share of each of several sources, and how often its text is read; "" for one source."""
    if (mixture := mixture_of(config, store)) is None:
        return ""
    passes = mixture.passes(steps)
    sources = (f"{name} {share:.4g}, {passes[name]:.3g} passes" for name, share in mixture.shares.items())
    return f"; shares of the tokens: {'; '.join(sources)}"


def describe_cost(learner: Learner, loader: StepLoader, store: TokenStore) -> None:
    """Print the time and memory that the training would take, from two steps. Collective."""
    seconds = time_steps(learner, loader, budget_seconds=0.0)
    accelerator, steps = learner.accelerator, learner.progression.total_steps
    memory = peak_memory(accelerator.device) / 2**30
    if learner.config.max_minutes is not None:
        steps = min(steps, max(int(learner.config.max_minutes * 60 / seconds), 1))
    say(
        accelerator,
        f"dry run: {describe_training(learner, store)}\n"
        f"{steps:,} steps of {seconds:.3f} s: {steps * seconds / 3600:.2f} hours, "
        f"{memory:.2f} GiB of peak memory so far per process; only the token store was written",
    )
