"""Building a training: model, optimizer, DDP, CUDA graph."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from textgen.config import TrainConfig
from textgen.data.store import TokenStore
from textgen.distributed.launch import LSTM_DTYPES
from textgen.distributed.signals import StopSignals
from textgen.errors import TextgenError
from textgen.hardware import sum_dtype
from textgen.kernels import amx
from textgen.kernels.capture import CudaCapture, Replay
from textgen.model.lstm import LSTMLanguageModel, State
from textgen.runs.checkpoint import Saver
from textgen.runs.copies import Copier
from textgen.training.cuda_graph import Capture, StepGraph
from textgen.training.optim import build_optimizer
from textgen.training.step import Learner, Progression, StepLoader, steps_per_epoch


@dataclass(kw_only=True)
class Training:
    """A learner with its data, and the parts of a run that no step needs."""

    learner: Learner
    store: TokenStore
    loader: StepLoader
    stop: StopSignals
    nats: Tensor
    """scalar of `sum_dtype`: of this process, since the last row of metrics. Sums of float32 values are exact in
    float64, so a row does not depend on the order of summation or on a resume"""
    saver: Saver | None = None
    """of the main process"""
    copier: Copier | None = None
    """of the main process, with `checkpoint_copy`"""
    wandb_id: str | None = None
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    """of the run, in each of its checkpoints: by it the copies of another run are recognized. Drawn for a new run; only
    that of the main process is written"""
    origin: str | None = None
    """checkpoint of another run that this one started from"""
    base: dict[str, Any] | None = None
    """the model whose weights this training started from: its name, folder, step, sha256, license and data"""
    on_row: Callable[[dict[str, float]], None] | None = None
    """called with each row of metrics on the main process"""
    is_trial: bool = False
    """whether this is one of many trainings of a search: the last evaluation scores `evaluate_documents`, not all
    documents, and there is no report"""


def build(config: TrainConfig, accelerator: Accelerator, store: TokenStore, stop: StopSignals) -> Training:
    """Build model, optimizer and loader. Collective.

    Raises:
        TextgenError: the training text is too short for one step, or lacks a split that a setting needs.
    """
    if config.early_stopping_patience is not None and "validation" not in store.record["splits"]:
        raise TextgenError("`early_stopping_patience` needs a validation split, and the data has none")
    total = config.max_epochs * steps_per_epoch(config, store)
    set_seed(config.seed)
    text = {"tokenizer_sha256": store.tokenizer.sha256, "normalization": store.record["normalization"]}
    counts = store.unigram_counts
    model = LSTMLanguageModel(config.model, len(counts), unigram_counts=counts, text=text, labels=store.labels)
    if store.labels:
        model.remember_labels(store.tokenizer.eos_id)
    return Training(
        learner=build_learner(config, accelerator, model, total_steps=min(total, config.max_steps or total)),
        store=store,
        loader=StepLoader(config, accelerator, store),
        stop=stop,
        nats=torch.zeros((), dtype=sum_dtype(accelerator.device), device=accelerator.device),
    )


def build_learner(
    config: TrainConfig, accelerator: Accelerator, model: LSTMLanguageModel, *, total_steps: int
) -> Learner:
    """Prepare a model for training: optimizer, precision, exchange of gradients, averaged weights, graph. Collective.

    Args:
        config: the settings of the training.
        accelerator: of this process.
        model: with its initial weights, on any device.
        total_steps: the learning rate may decay until then.

    Raises:
        TextgenError: `TEXTGEN_AMX` asks for what this machine lacks.
    """
    amx.is_wanted()
    optimizer = build_optimizer(model, config)
    assert_precision(model, accelerator)
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    average = None
    if config.ema_decay is not None:
        average = LSTMLanguageModel(config.model, model.vocab_size, text=model.text, labels=model.labels)
        average.to(accelerator.device).requires_grad_(False)
        average.load_state_dict(model.state_dict())
    if isinstance(prepared_model, DistributedDataParallel):
        if config.gradient_compression == "bf16":
            # The hook of torch that Accelerate would register. DDP recognises it by its name and then requires NCCL;
            # gloo can add bfloat16 too, so a lambda hides the name.
            prepared_model.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
        # Each row of metrics has a measured step: see `metrics.exchange_seconds`.
        prepared_model._set_ddp_runtime_logging_sample_rate(config.log_every)  # type: ignore[no-untyped-call]
        settle_buckets(accelerator, model, prepared_model)
    return Learner(
        config=config,
        accelerator=accelerator,
        unwrapped_model=model,
        model=prepared_model,
        optimizer=prepared_optimizer,
        average=average,
        progression=Progression(total_steps=total_steps),
        nonfinite=torch.zeros((), dtype=torch.bool, device=accelerator.device),
        graph=StepGraph(capture_on(model.embedding.weight.device, prepared_optimizer)) if config.cuda_graph else None,
    )


def refuse_graph(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise TextgenError if `cuda_graph` is set and this training cannot use a CUDA graph."""
    if not config.cuda_graph:
        return
    if accelerator.device.type != "cuda":
        raise TextgenError(f"`cuda_graph` needs a GPU, and this training runs on the device {accelerator.device.type}")
    if accelerator.num_processes > 1:
        raise TextgenError(f"`cuda_graph` is for one process, and there are {accelerator.num_processes}: leave it out")
    if accelerator.mixed_precision == "fp16":
        raise TextgenError(
            "`cuda_graph` does not work with mixed_precision fp16, whose scaler asks the device at every step: "
            "leave it out, or use `--mixed_precision bf16`"
        )


def capture_on(device: torch.device, optimizer: AcceleratedOptimizer) -> Capture:
    """Return a function that captures a step in a CUDA graph on a device."""
    captures: list[CudaCapture] = []  # kept alive: torch may still use a capture that failed

    def capture(work: Callable[[], None]) -> Replay:
        # Every capture has its own memory pool. torch does not reuse the pool of a dropped graph while a part of it,
        # for example cuBLAS's workspace, is still in use.
        captures.append(CudaCapture(device))
        torch.cuda.empty_cache()  # the graph's pool takes as much memory as the steps before it
        for group in optimizer.param_groups:
            group["capturable"] = True  # torch's Adam requires it in a capture, and warns about it outside of one
        try:
            return captures[-1].record(work)
        except RuntimeError:
            optimizer.zero_grad()  # gradients of a step that was not taken
            raise
        finally:
            for group in optimizer.param_groups:
                group["capturable"] = False

    return capture


def settle_buckets(accelerator: Accelerator, unwrapped_model: LSTMLanguageModel, model: nn.Module) -> None:
    """Run one backward pass, so that DDP has its final buckets from the first step on. Collective.

    DDP reduces all gradients as one bucket in its first backward pass. After that it has several buckets, in the order
    in which gradients arrived. With three or more processes the buckets decide the order of the additions. Without this
    pass, the first step of a resumed run would differ in the last bits from the same step of an uninterrupted run.
    """
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=accelerator.device)
    nats, _ = model(tokens, unwrapped_model.zero_state(1), tokens)
    accelerator.backward(nats)
    unwrapped_model.zero_grad()


def assert_precision(model: LSTMLanguageModel, accelerator: Accelerator) -> None:
    """Make the first forward pass raise TextgenError if the LSTM computes in another dtype than `mixed_precision`'s."""
    wanted = LSTM_DTYPES[accelerator.mixed_precision]

    def check(_module: nn.Module, _inputs: object, output: tuple[Tensor, State]) -> None:
        handle.remove()
        if output[0].dtype != wanted:
            raise TextgenError(f"the LSTM computes in {output[0].dtype}, wanted {wanted}")

    handle = model.layers[0].register_forward_hook(check)
