"""Metrics of a training: rows of metrics.jsonl, speed, memory, operations, processors."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from dataclasses import dataclass, field

import psutil
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from textgen.console import say
from textgen.evaluation import perplexity
from textgen.hardware import peak_flops
from textgen.tracking.tracker import Tracker
from textgen.training.optim import learning_rate_at
from textgen.training.setup import Training
from textgen.training.step import Learner


@dataclass
class Meter:
    """Steps and time since the last row of metrics, or since the start of this process."""

    steps: int = 0
    waited: float = 0.0
    """seconds for data"""
    evaluated: float = 0.0
    """seconds for scores, samples and pictures"""
    paused: float = 0.0
    """seconds for checkpoints"""
    agreed: float = 0.0
    """on CPUs: seconds in which the processes agreed whether to stop, which waits for the slowest of them"""
    started: float = field(default_factory=time.perf_counter)


def log_metrics(training: Training, tracker: Tracker, meter: Meter) -> dict[str, float]:
    """Write a row of metrics of the steps since the last one, and return it. Collective.

    Also adds the row's nats and tokens to those of the epoch, and sets the sums since the last row to zero.
    """
    learner = training.learner
    config, progress = learner.config, learner.progression
    step_tokens = config.batch_size * config.seq_len
    total = float(learner.accelerator.reduce(training.nats, "sum"))
    tokens, norm = progress.unlogged_steps * step_tokens, learner.recent[-1].norm
    progress.epoch_nats, progress.epoch_tokens = progress.epoch_nats + total, progress.epoch_tokens + tokens
    training.nats.zero_()
    progress.unlogged_steps = 0
    loss, bits, mixture = total / tokens, bits_per_nat(training), training.loader.mixture
    values: dict[str, float] = {
        "tokens": progress.step * step_tokens,
        "epoch": progress.step / training.loader.per_epoch,
        **({f"passes/{name}": n for name, n in mixture.passes(progress.step).items()} if mixture else {}),
        "train/loss": loss,
        "train/perplexity": perplexity(loss),
        **({"train/bits_per_byte": loss * bits} if bits else {}),
        "train/learning_rate": learning_rate_at(progress.step - 1, progress.total_steps, config),
        "train/gradient_norm": float(norm) if norm is not None else math.nan,
        **({"train/skipped_steps": progress.skipped_steps} if progress.skipped_steps else {}),
        **measure_speed(learner, meter),
        **measure_machines(learner.accelerator),
    }
    values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no nan or infinity
    tracker.log(progress.step, values)
    return values


def measure_speed(learner: Learner, meter: Meter) -> dict[str, float]:
    """Return tokens and operations per second of the steps, and the shares of the time that went elsewhere.

    Evaluations and checkpoints do not count as time of the steps; waiting for data does.
    """
    config, accelerator = learner.config, learner.accelerator
    seconds = time.perf_counter() - meter.started
    tokens_per_second = meter.steps * config.batch_size * config.seq_len / (seconds - meter.evaluated - meter.paused)
    flops = tokens_per_second * flops_per_token(learner.unwrapped_model)
    peak = peak_flops(accelerator.device, half=accelerator.mixed_precision != "no")
    exchanged = meter.agreed + meter.steps * exchange_seconds(learner.model)
    return {
        "train/tokens_per_second": tokens_per_second,
        "train/tokens_per_second_per_process": tokens_per_second / accelerator.num_processes,
        "train/flops_per_second": flops,
        **({"train/flops_share": flops / peak / accelerator.num_processes} if peak else {}),
        "train/data_share": meter.waited / seconds,
        "train/evaluate_share": meter.evaluated / seconds,
        "train/save_share": meter.paused / seconds,
        **({"train/exchange_share": min(exchanged / seconds, 1.0)} if accelerator.num_processes > 1 else {}),
        **({"checkpoint/pause_seconds": meter.paused} if meter.paused else {}),
    }


def exchange_seconds(model: nn.Module) -> float:
    """Return the seconds for which the last step that DDP measured waited for gradients, after its backward pass.

    `build_learner` sets how often DDP measures, which takes a third of a millisecond. 0 without DDP.
    """
    figures = model._get_ddp_logging_data() if isinstance(model, DistributedDataParallel) else {}  # type: ignore[no-untyped-call]
    exchange, overlap = (
        float(figures.get(name, 0)) for name in ("backward_comm_time", "backward_compute_comm_overlap_time")
    )
    return max(exchange - overlap, 0.0) / 1e9


def bits_per_nat(training: Training) -> float | None:
    """Return the factor from nats per token to bits per byte of training; None if the tokenizer loses text."""
    store, mixture = training.store, training.loader.mixture
    if not store.tokenizer.is_lossless:
        return None
    bytes_per_token = store.bytes_per_token("train")
    if mixture is not None:  # of tokens in the shares of the weights
        sizes = {name: splits["train"] for name, splits in store.sources.items()}
        bytes_per_token = sum(
            share * sizes[name]["bytes"] / sizes[name]["tokens"] for name, share in mixture.shares.items()
        )
    return 1 / math.log(2) / bytes_per_token


def say_epoch(training: Training) -> None:
    """Print the average loss of an epoch; of the last one, its steps so far."""
    progress, per_epoch = training.learner.progression, training.loader.per_epoch
    bits = bits_per_nat(training)
    average = progress.epoch_nats / progress.epoch_tokens
    say(
        training.learner.accelerator,
        f"Epoch [{math.ceil(progress.step / per_epoch)}/{math.ceil(progress.total_steps / per_epoch)}], "
        f"Avg Loss: {average:.4f}" + (f" ({average * bits:.4f} bits per byte)" if bits else ""),
    )


def flops_per_token(model: nn.Module) -> int:
    """Return the floating-point operations of matrix products for a token of training.

    A product with a matrix of n weights takes 2n operations per token in the forward pass, and 2n for each of the two
    gradients: 6n. The matrices are those of the LSTM layers, 4 x hidden_size x (input_size + hidden_size) each, of the
    projection and of the output layer, tied or not; an embedding is a look-up. Element-wise work (gates, softmax,
    dropout, the optimizer) is not counted, as in figures of other models (Kaplan et al. 2020, section 2.1; Chowdhery et
    al. 2022, appendix B).
    """
    matrices = [
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 2 and not isinstance(module, nn.Embedding)
    ]
    return 6 * sum(parameter.numel() for parameter in matrices)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: on a GPU the memory that torch allocated, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # On Linux getrusage's figure is at least the memory of the parent process when it started this one.
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def measure_machines(accelerator: Accelerator) -> dict[str, float]:
    """Return the memory of the largest process, and the load of each machine. Collective.

    Returns:
        `memory/peak_gib`, and for each machine N `machine/N/cpu_share` since the last call and
        `machine/N/memory_share`, both from 0 to 1.
    """
    machine = float(os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or 0)
    busy, full = psutil.cpu_percent() / 100, psutil.virtual_memory().percent / 100
    own = torch.tensor([[machine, peak_memory(accelerator.device) / 2**30, busy, full]], device=accelerator.device)
    values: dict[str, float] = {}
    for number, gib, cpu, memory in accelerator.gather(own).tolist():  # the last process of a machine overwrites
        values["memory/peak_gib"] = max(gib, values.get("memory/peak_gib", 0.0))
        values[f"machine/{number:.0f}/cpu_share"] = cpu
        values[f"machine/{number:.0f}/memory_share"] = memory
    return values
