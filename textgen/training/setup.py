"""Set-up of a training: model, optimizer, DDP, CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

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
from textgen.kernels.capture import CudaCapture, Replay
from textgen.model.lstm import LSTMLanguageModel, State
from textgen.training.cuda_graph import Capture, StepGraph
from textgen.training.optim import build_optimizer
from textgen.training.step import Progression, StepLoader, Training, steps_per_epoch


def build(config: TrainConfig, accelerator: Accelerator, store: TokenStore, stop: StopSignals) -> Training:
    """Build model, optimizer and the counting of steps."""
    set_seed(config.seed)
    text = {"tokenizer_sha256": store.tokenizer.sha256, "normalization": store.record["normalization"]}
    counts = store.unigram_counts
    unwrapped_model = LSTMLanguageModel(config.model, len(counts), unigram_counts=counts, text=text)
    optimizer = build_optimizer(unwrapped_model, config)
    assert_precision(unwrapped_model, accelerator)
    model, prepared = accelerator.prepare(unwrapped_model, optimizer)
    average = None
    if config.ema_decay is not None:
        average = LSTMLanguageModel(config.model, len(counts), text=text).to(accelerator.device).requires_grad_(False)
        average.load_state_dict(unwrapped_model.state_dict())
    if config.early_stopping_patience is not None and "validation" not in store.record["splits"]:
        raise TextgenError("`early_stopping_patience` needs a validation split, and the data has none")
    total = config.max_epochs * steps_per_epoch(config, store)
    device = accelerator.device
    if isinstance(model, DistributedDataParallel):
        if config.gradient_compression == "bf16":
            # torch's hook, which Accelerate would register too. Behind a lambda, since DDP knows it by its name and
            # then wants NCCL; gloo adds up bfloat16 as well.
            model.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
        settle_buckets(accelerator, unwrapped_model, model)
    return Training(
        config=config,
        accelerator=accelerator,
        store=store,
        loader=StepLoader(config, accelerator, store.split("train")),
        unwrapped_model=unwrapped_model,
        model=model,
        optimizer=prepared,
        average=average,
        progression=Progression(total_steps=min(total, config.max_steps or total)),
        stop=stop,
        nats=torch.zeros((), dtype=torch.float64, device=device),
        nonfinite=torch.zeros((), dtype=torch.bool, device=device),
        graph=StepGraph(capture_on(unwrapped_model.embedding.weight.device, prepared)) if config.cuda_graph else None,
    )


def refuse_graph(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise TextgenError where `cuda_graph` is asked for and there can be none."""
    if not config.cuda_graph:
        return
    if accelerator.device.type != "cuda":
        raise TextgenError(f"`cuda_graph` needs a GPU, and this training runs on the device {accelerator.device.type}")
    if accelerator.num_processes > 1:
        raise TextgenError(f"`cuda_graph` is for one process, and there are {accelerator.num_processes}: leave it out")
    if accelerator.mixed_precision == "fp16":
        raise TextgenError(
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


def settle_buckets(accelerator: Accelerator, unwrapped_model: LSTMLanguageModel, model: nn.Module) -> None:
    """Have DDP sum gradients in their final buckets from the first step on. Collective.

    DDP reduces all gradients as one in its first backward pass and in buckets in the order of arrival ever after. Where
    three processes or more add up, that decides in which order they do: a resumed run's first step would have other
    last bits than the same step of a run that went on.
    """
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=accelerator.device)
    nats, _ = model(tokens, unwrapped_model.zero_state(1), tokens)
    accelerator.backward(nats)
    unwrapped_model.zero_grad()


def assert_precision(model: LSTMLanguageModel, accelerator: Accelerator) -> None:
    """Raise TextgenError in the first forward pass if the LSTM does not compute in the dtype that was asked for."""
    wanted = LSTM_DTYPES[accelerator.mixed_precision]

    def check(_module: nn.Module, _inputs: object, output: tuple[Tensor, State]) -> None:
        handle.remove()
        if output[0].dtype != wanted:
            raise TextgenError(f"the LSTM computes in {output[0].dtype}, wanted {wanted}")

    handle = model.layers[0].register_forward_hook(check)
