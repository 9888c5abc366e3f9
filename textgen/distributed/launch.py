"""Join the launched processes, check that all of them came, and choose device and precision."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Literal

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from textgen.config import ModelConfig, Precision
from textgen.distributed.signals import Interrupted, StopSignals
from textgen.distributed.world import World, env_flag, promised_gpus, promised_world, read_launch
from textgen.errors import TextgenError, first_line
from textgen.hardware import has_bfloat16, has_float16, keep_freed_memory, prefers_float16, wants_mps

log = logging.getLogger("textgen")

TOGETHER_SECONDS = 0.2  # between two questions of `wait_together`
FAILED_SECONDS = 4.0  # a launcher ends all processes with the first one: let the one that failed print its reason

LSTM_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of an LSTM's computation for each mixed_precision of accelerate."""


def start(
    mixed_precision: Precision | None,
    *,
    batch_size: int | None = None,
    gradient_accumulation_steps: int = 1,
    model: ModelConfig | None = None,
    seq_len: int = 1,
    timeout: float | None = None,
    deterministic: bool = False,
    elastic: bool = False,
) -> Accelerator:
    """Join the other processes, then return the Accelerator for the chosen device and precision.

    Collective: every process calls it before any other collective.

    Args:
        mixed_precision: the flag's value; None leaves the choice to accelerate's config file, then to the hardware.
        batch_size: global batch of a training; processes times micro-batches must divide it.
        gradient_accumulation_steps: micro-batches of a global batch.
        model: shape of the model in a training; `auto` chooses a GPU's precision by shape and batch.
        seq_len: tokens per window of a training.
        timeout: seconds that a collective waits for the other processes; None for torch's: half an hour by gloo, ten
            minutes by NCCL.
        deterministic: use deterministic kernels of torch and CUDA.
        elastic: accept fewer processes than promised, under torchrun.

    Raises:
        TextgenError: the batch cannot be divided, the environment contradicts the settings, this device does not
            support the precision, or some of the promised processes did not come.
    """
    launch = read_launch(os.getppid())
    # The figures of an evaluation are the same on any number of machines, and an export needs one.
    world = promised_world(os.environ, launch, whole_job=batch_size is not None, elastic=elastic)
    if launch is not None and launch.use_cpu:  # accelerate passes this on to single processes only
        os.environ["ACCELERATE_USE_CPU"] = "true"
    _check_batch(world, batch_size, gradient_accumulation_steps)
    device = _choose_device(world)
    use_cpu = device == "cpu"
    rows = batch_size // (world.processes * gradient_accumulation_steps) if batch_size is not None else None
    persistent = device == "cuda" and has_persistent_kernel(model, rows=rows, seq_len=seq_len)
    environment = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if device == "mps":
        precision = _precision_of_mps(mixed_precision, environment)
    else:
        precision = resolve_precision(mixed_precision, environment, use_cpu=use_cpu, persistent=persistent)
    _configure_torch(precision, use_cuda=device == "cuda", deterministic=deterministic)
    accelerator = _build_accelerator(precision, processes=world.processes, use_cpu=use_cpu, timeout=timeout)
    _assert_promised(accelerator, world.processes, device, precision)
    return accelerator


def wait_for_divisor(batch_size: int, gradient_accumulation_steps: int, *, seconds: float) -> None:
    """Under torchrun, wait while the number of processes does not divide the batch.

    torchrun ends the processes and starts them again when a machine comes, which is none of its `--max_restarts`; an
    error would use one up. Returns at once if the batch can be divided, and after `seconds` if no machine came.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" not in os.environ or not batch_size % (processes * gradient_accumulation_steps):
        return
    rows = batch_size // gradient_accumulation_steps
    sizes = ", ".join(str(size) for size in range(1, rows + 1) if rows % size == 0)
    log.warning(
        "batch_size %d cannot be divided among %d processes, but among %s: waiting %.0f s for a machine to come or go",
        batch_size,
        processes,
        sizes,
        seconds,
    )
    time.sleep(seconds)


def _check_batch(world: World, batch_size: int | None, gradient_accumulation_steps: int) -> None:
    """Check batch and micro-batches against the number of processes and accelerate's environment.

    Removes accelerate's gradient accumulation from the environment: textgen counts micro-batches itself.

    Raises:
        TextgenError: the batch cannot be divided, or accelerate's environment sets other micro-batches than the flag.
    """
    if batch_size is not None and batch_size % (world.processes * gradient_accumulation_steps):
        raise TextgenError(
            f"batch_size {batch_size} is not divisible by {world.processes} processes x "
            f"{gradient_accumulation_steps} gradient_accumulation_steps"
        )
    configured = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if configured not in ("1", str(gradient_accumulation_steps)):
        raise TextgenError(
            f"accelerate's environment sets gradient_accumulation_steps {configured}, "
            f"`--gradient_accumulation_steps` is {gradient_accumulation_steps}: set only the flag"
        )
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)


def _choose_device(world: World) -> Literal["cpu", "cuda", "mps"]:
    """Return the device on which the processes compute.

    Raises:
        TextgenError: GPUs are promised but torch finds none, this machine has fewer GPUs than processes, or several
            processes want Apple's GPU.
    """
    if wants_mps():
        if world.processes > 1:
            raise TextgenError(f"`TEXTGEN_DEVICE` mps is for one process, and there are {world.processes}")
        return "mps"
    use_cpu = not torch.cuda.is_available() or env_flag(os.environ, "ACCELERATE_USE_CPU")
    if use_cpu and (gpus := promised_gpus(os.environ)) is not None:
        raise TextgenError(
            f"GPUs are promised ({gpus}), but torch {torch.__version__} finds none: repair its CUDA build, the driver "
            "or the container (`textgen doctor`), or set ACCELERATE_USE_CPU=true"
        )
    if use_cpu and world.processes > 1:
        # Without this variable accelerate looks for a GPU backend and leaves every process alone in a world of one.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # All processes of torchrun see all GPUs of the machine. Each task of srun may see one GPU only, as GPU 0.
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    needed = world.local_processes if torchrun else int(os.environ.get("LOCAL_RANK", "0")) + 1
    if not use_cpu and needed > torch.cuda.device_count():
        raise TextgenError(
            f"{world.local_processes} processes on this machine, but {torch.cuda.device_count()} GPUs: launch one "
            "process per GPU, or set ACCELERATE_USE_CPU=true"
        )
    return "cpu" if use_cpu else "cuda"


def _precision_of_mps(flag: Precision | None, environment: str | None) -> str:
    """Return the precision on Apple's GPU, where textgen computes in float32 alone.

    Raises:
        TextgenError: another precision is asked for.
    """
    precision = environment if flag in (None, "auto") else flag
    if precision not in (None, "no"):
        raise TextgenError(f"mixed_precision {precision} is not for `TEXTGEN_DEVICE` mps: leave it out")
    return "no"


def _configure_torch(precision: str, *, use_cuda: bool, deterministic: bool) -> None:
    """Set torch's process-wide switches for a device and a precision."""
    if not use_cuda:
        keep_freed_memory()
        return
    if precision == "no":
        torch.backends.cudnn.allow_tf32 = False  # by default cuDNN's LSTM rounds to TF32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def _build_accelerator(precision: str, *, processes: int, use_cpu: bool, timeout: float | None) -> Accelerator:
    """Return the Accelerator, which joins the process group. Collective.

    Raises:
        TextgenError: the processes did not meet.
    """
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if timeout is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)))
    try:
        if processes > 1:
            _join_again(use_cpu=use_cpu, timeout=timeout)
        return Accelerator(
            cpu=use_cpu,
            mixed_precision=precision,
            gradient_accumulation_steps=1,  # textgen sums micro-batches itself: accelerate would average uneven sums
            dataloader_config=DataLoaderConfiguration(
                split_batches=True,
                even_batches=False,
                dispatch_batches=False,
                use_seedable_sampler=False,
                non_blocking=True,
            ),
            kwargs_handlers=handlers,
        )
    except (torch.distributed.DistError, ValueError) as error:  # a missing process, or a missing MASTER_ADDR
        if processes == 1:
            raise
        raise TextgenError(
            f"the launcher promised {processes} processes, but they did not connect: {first_line(error)}"
        ) from error


def _join_again(*, use_cpu: bool, timeout: float | None) -> None:
    """Join the processes that one torchrun has started again after a failure, under names of this start. Collective.

    torchrun's default rendezvous keeps its store, in which the processes would find the addresses of those that have
    ended (torch 2.13, 2026-11-29). Several torchruns count their restarts separately; with `--rdzv_backend c10d` they
    have a new store for each start.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return
    patience = default_pg_timeout if timeout is None else timedelta(seconds=timeout)
    store, rank, size = next(rendezvous("env://", timeout=patience))
    store = PrefixStore(f"restart-{restart}", store)
    backend = "gloo" if use_cpu else "nccl"
    torch.distributed.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)


def _assert_promised(accelerator: Accelerator, processes: int, device: str, precision: str) -> None:
    """Check that you got the processes and devices you asked for. Collective.

    Raises:
        TextgenError: the number of processes, the precision, the device or the backend differs from what was asked
            for, or two processes share a GPU.
    """
    if accelerator.num_processes != processes:
        raise TextgenError(
            f"the launcher promised {processes} processes, accelerate joined {accelerator.num_processes}"
        )
    if accelerator.mixed_precision != precision:
        raise TextgenError(f"asked for mixed_precision {precision}, accelerate chose {accelerator.mixed_precision}")
    if accelerator.device.type != device:
        raise TextgenError(f"asked for device {device}, accelerate chose {accelerator.device.type}")
    if processes == 1:
        return
    expected = {"cpu": "gloo", "cuda": "nccl"}[device]
    if (backend := torch.distributed.get_backend()) != expected:
        raise TextgenError(f"{processes} processes on {device} need backend {expected}, accelerate chose {backend}")
    if device == "cuda":
        uuid = torch.cuda.get_device_properties(accelerator.device).uuid
        try:
            gpus = count_different(accelerator, uuid)
        except torch.distributed.DistError as error:  # NCCL itself refuses two processes on one GPU
            raise TextgenError(f"{processes} processes cannot communicate: {first_line(error)}") from error
        if gpus < processes:
            raise TextgenError(f"{processes} processes share {gpus} GPUs: start one process per GPU")


def count_different(accelerator: Accelerator, value: object) -> int:
    """Return how many different values the processes hold, compared as texts. Collective."""
    digest = int.from_bytes(hashlib.sha256(str(value).encode(errors="surrogateescape")).digest()[:7], "big")
    return len(accelerator.gather(torch.tensor([digest], device=accelerator.device)).unique())


def assert_same(accelerator: Accelerator, value: object, what: str) -> None:
    """Raise TextgenError unless all processes hold the same value, compared as text. Collective."""
    if count_different(accelerator, value) > 1:
        raise TextgenError(f"{what} is not the same on all {accelerator.num_processes} processes")


def from_main(accelerator: Accelerator, value: int) -> int:
    """Return the integer that the main process holds. Collective."""
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device))[0])


def wait_together(accelerator: Accelerator, action: Callable[[], object] | None) -> None:
    """Run an action on some processes while the others wait, however long it takes. Collective.

    A collective ends after `distributed_timeout`. So the processes ask each other again and again whether all are done.
    The action runs in a thread, and a signal interrupts the waiting.

    Args:
        accelerator: of this process.
        action: of this process; None to wait only.

    Raises:
        Exception: the action of this process failed.
        TextgenError: that of another process failed.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if action is not None:
                action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="together", daemon=True)
    thread.start()
    while True:
        thread.join(TOGETHER_SECONDS)
        # In this order: an action that fails between the two is seen as busy and failed, not as done. And only what the
        # others have been told is raised: it may fail while they are told that it is busy, and ask again.
        alive = thread.is_alive()
        mine = bool(errors)
        state = torch.tensor([float(alive), float(mine)], device=accelerator.device)
        busy, failed = accelerator.reduce(state, "sum").tolist()
        if mine:
            raise errors[0]
        if failed:
            time.sleep(FAILED_SECONDS)
            raise TextgenError("another process failed, and says why")
        if not busy:
            return


def raise_if_stopped(accelerator: Accelerator, stop: StopSignals) -> None:
    """Raise Interrupted on all processes if a signal has asked any of them to stop. Collective."""
    number = torch.tensor([stop.number or 0], device=accelerator.device)
    if (first := int(accelerator.gather(number).max())) > 0:
        raise Interrupted(first)


class Agreement:
    """Flags that one process sets and all processes learn of, by a small all-reduce at each step.

    On a CPU the answer is immediate. On CUDA the host does not wait for the device: `ask` returns the answer to the
    call before, unless `now` is set.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._last: tuple[Tensor, torch.cuda.Event] | None = None

    def ask(self, *flags: bool | Tensor, now: bool = False) -> tuple[bool, ...]:
        """Return for each flag whether any process has set it. Collective, with as many flags on every process.

        Args:
            flags: plain bools, or bool scalars on the device. Once a process has set a flag it must keep it set.
            now: wait for this call's answer.
        """
        device = self._accelerator.device
        counts = torch.zeros(len(flags), device=device)
        for i, flag in enumerate(flags):
            counts[i].fill_(flag) if isinstance(flag, bool) else counts[i].copy_(flag)
        if self._accelerator.num_processes > 1:
            counts = self._accelerator.reduce(counts, "sum")
        if device.type != "cuda":
            return tuple(bool(count) for count in counts.tolist())
        # The copy does not block the host; the event tells when the answer has arrived.
        answer, event = counts.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        before, self._last = self._last, (answer, event)
        answer, event = self._last if now or before is None else before
        if not now and before is None:
            return (False,) * len(flags)
        event.synchronize()
        return tuple(bool(count) for count in answer.tolist())


def has_persistent_kernel(model: ModelConfig | None, *, rows: int | None, seq_len: int) -> bool:
    """Return whether cuDNN has a persistent kernel for this model in float16 but not in bfloat16 on this GPU.

    Args:
        model: its shape; None without a training.
        rows: rows of this process in a micro-batch; None without a training.
        seq_len: tokens per window.
    """
    if model is None or rows is None or torch.version.cuda is None or not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return False
    gpu = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
    return prefers_float16(
        {model.embedding_dim, *[model.hidden_size] * (model.num_layers - 1)},
        model.hidden_size,
        rows=rows,
        seq_len=seq_len,
        capability=(gpu.major, gpu.minor),
        multiprocessors=gpu.multi_processor_count,
    )


def resolve_precision(
    flag: Precision | None, environment: str | None, *, use_cpu: bool, persistent: bool = False
) -> str:
    """Return the precision: the flag's, else accelerate's (its yaml or launch flag), else bf16 if hardware has it.

    `auto` follows a fixed rule and measures nothing, so all processes and all starts of a run choose the same. On a
    GPU it chooses fp16 if `persistent`, else bf16 if hardware has it, else fp16 if hardware has that.

    Args:
        flag: from the command line or a file of settings.
        environment: accelerate's ACCELERATE_MIXED_PRECISION; None if unset.
        use_cpu: whether the processes compute on CPUs.
        persistent: the answer of `has_persistent_kernel`.

    Raises:
        TextgenError: float16 on a CPU, or a precision that textgen does not know.
    """
    if flag == "auto" and not use_cpu:
        if not persistent and has_bfloat16(use_cpu=False):
            return "bf16"
        return "fp16" if persistent or has_float16() else "no"
    precision = environment if flag == "auto" else flag or environment
    if precision is None:
        return "bf16" if has_bfloat16(use_cpu=use_cpu) else "no"
    if precision not in ("no", "bf16", "fp16"):
        raise TextgenError(f"mixed_precision {precision} is not one of `no`, `bf16`, `fp16`")
    if precision == "fp16" and use_cpu:
        raise TextgenError("mixed_precision fp16 is not supported on CPU: use `--mixed_precision bf16` or `no`")
    return precision


def describe(accelerator: Accelerator) -> str:
    """Return one line about the processes: number, machines, backend, device, dtype of the LSTM. Collective."""
    device, count = accelerator.device, accelerator.num_processes
    machines = count_different(accelerator, socket.gethostname())
    backend = f" by {torch.distributed.get_backend()}" if count > 1 else ""
    if device.type == "cuda":
        unused = torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        idle = f", {unused} more idle" if unused > 0 else ""
        name = f"{torch.cuda.get_device_name(device)}{idle}"
    else:
        name = _counted(torch.get_num_threads(), "thread")
    slow = accelerator.mixed_precision == "bf16" and not has_bfloat16(use_cpu=device.type == "cpu")
    note = " (slow on this hardware: `--mixed_precision no`)" if slow else ""
    return (
        f"{_counted(count, 'process')} on {_counted(machines, 'machine')}{backend}, {device.type} ({name}), "
        f"LSTM in {LSTM_DTYPES[accelerator.mixed_precision]}{note}".replace("torch.", "")
    )


def _counted(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"
