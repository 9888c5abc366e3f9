"""What the launcher promised against what was got: processes, device, precision."""

from __future__ import annotations

import hashlib
import os
import socket
from datetime import timedelta

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler
from torch import Tensor

from textgen.config import ModelConfig, Precision
from textgen.distributed.signals import Interrupted, StopSignals
from textgen.distributed.world import env_flag, promised_gpus, promised_world, read_launch
from textgen.errors import TextgenError
from textgen.hardware import has_bfloat16, has_float16, keep_freed_memory, prefers_float16

LSTM_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What an LSTM computes in, by accelerate's mixed_precision."""


def start(
    mixed_precision: Precision | None,
    *,
    batch_size: int | None = None,
    gradient_accumulation_steps: int = 1,
    model: ModelConfig | None = None,
    seq_len: int = 1,
    timeout: float | None = None,
    deterministic: bool = False,
) -> Accelerator:
    """Join the other processes and choose device and precision. Collective: every process calls it, first of all.

    Args:
        mixed_precision: what the flag says; None leaves it to accelerate's config file, then to the hardware.
        batch_size: global batch that processes and micro-batches must divide, in training.
        gradient_accumulation_steps: micro-batches in it.
        model: its shape, in training; with the batch it decides what `auto` takes on a GPU.
        seq_len: tokens per window, in training.
        timeout: seconds that a collective waits for the other processes; None for torch's half hour.
        deterministic: have torch and CUDA take deterministic kernels.

    Raises:
        TextgenError: the batch cannot be divided, the environment contradicts the settings, the precision is not to be
            had on this device, or not all promised processes came.
    """
    launch = read_launch(os.getppid())
    world = promised_world(os.environ, launch)
    if launch is not None and launch.use_cpu:  # which accelerate tells single processes only
        os.environ["ACCELERATE_USE_CPU"] = "true"
    promised = world.processes
    if batch_size is not None and batch_size % (promised * gradient_accumulation_steps):
        raise TextgenError(
            f"batch_size {batch_size} is not divisible by {promised} processes x "
            f"{gradient_accumulation_steps} gradient_accumulation_steps"
        )
    said = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if said not in ("1", str(gradient_accumulation_steps)):
        raise TextgenError(
            f"accelerate's environment says gradient_accumulation_steps {said}, "
            f"`--gradient_accumulation_steps` {gradient_accumulation_steps}: set it by the flag alone"
        )
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    use_cpu = not torch.cuda.is_available() or env_flag(os.environ, "ACCELERATE_USE_CPU")
    if use_cpu and (gpus := promised_gpus(os.environ)) is not None:
        raise TextgenError(
            f"GPUs are promised ({gpus}) and torch {torch.__version__} sees none: mend its CUDA build, the driver or "
            "the container (`textgen doctor`), or set ACCELERATE_USE_CPU=true"
        )
    if use_cpu and promised > 1:
        # Without it accelerate would look for a GPU backend and leave every process alone in a world of one.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # torchrun's processes see the same GPUs; tasks of srun may see one each, all of them as the first
    wanted = (
        world.local_processes if "TORCHELASTIC_RUN_ID" in os.environ else int(os.environ.get("LOCAL_RANK", "0")) + 1
    )
    if not use_cpu and wanted > torch.cuda.device_count():
        raise TextgenError(
            f"{world.local_processes} processes on this machine, but {torch.cuda.device_count()} GPUs: launch that "
            "many, or set ACCELERATE_USE_CPU=true"
        )
    rows = batch_size // (promised * gradient_accumulation_steps) if batch_size is not None else None
    persistent = not use_cpu and has_persistent_kernel(model, rows=rows, seq_len=seq_len)
    told = os.environ.get("ACCELERATE_MIXED_PRECISION")
    precision = resolve_precision(mixed_precision, told, use_cpu=use_cpu, persistent=persistent)
    if use_cpu:
        keep_freed_memory()
    if precision == "no" and not use_cpu:
        torch.backends.cudnn.allow_tf32 = False  # by default cuDNN's LSTM rounds to TF32
    if deterministic and not use_cpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    options: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if timeout is not None:
        options.append(InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)))
    try:
        accelerator = Accelerator(
            cpu=use_cpu,
            mixed_precision=precision,
            gradient_accumulation_steps=1,  # micro-batches are ours: accelerate would average uneven sums
            dataloader_config=DataLoaderConfiguration(
                split_batches=True,
                even_batches=False,
                dispatch_batches=False,
                use_seedable_sampler=False,
                non_blocking=True,
            ),
            kwargs_handlers=options,
        )
    except (torch.distributed.DistError, ValueError) as error:  # peers that do not come, an address that nobody told
        if promised == 1:
            raise
        reason = str(error).partition("\n")[0]
        raise TextgenError(f"the launcher promised {promised} processes, and they did not meet: {reason}") from error
    _assert_promised(accelerator, promised, "cpu" if use_cpu else "cuda", precision)
    return accelerator


def _assert_promised(accelerator: Accelerator, processes: int, device: str, precision: str) -> None:
    """Raise TextgenError unless the world is the promised one: processes, backend, devices, precision. Collective."""
    if accelerator.num_processes != processes:
        raise TextgenError(
            f"the launcher promised {processes} processes, accelerate joined {accelerator.num_processes}"
        )
    if accelerator.mixed_precision != precision:
        raise TextgenError(f"asked for mixed_precision {precision}, accelerate gives {accelerator.mixed_precision}")
    if accelerator.device.type != device:
        raise TextgenError(f"asked for the device {device}, accelerate gives {accelerator.device.type}")
    if processes == 1:
        return
    wanted = {"cpu": "gloo", "cuda": "nccl"}[device]
    if (backend := torch.distributed.get_backend()) != wanted:
        raise TextgenError(f"{processes} processes on {device} talk by {wanted}, accelerate chose {backend}")
    if device == "cuda":
        uuid = torch.cuda.get_device_properties(accelerator.device).uuid
        try:
            gpus = count_different(accelerator, uuid)
        except torch.distributed.DistError as error:  # NCCL itself refuses two processes on one GPU
            raise TextgenError(f"{processes} processes cannot talk: {str(error).strip()}".partition("\n")[0]) from error
        if gpus < processes:
            raise TextgenError(f"{processes} processes share {gpus} GPUs: start one process per GPU")


def count_different(accelerator: Accelerator, value: object) -> int:
    """Return how many different values, as texts, the processes have. Collective."""
    digest = int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:7], "big")
    return len(accelerator.gather(torch.tensor([digest], device=accelerator.device)).unique())


def assert_same(accelerator: Accelerator, value: object, what: str) -> None:
    """Raise TextgenError unless a value, as text, is the same on all processes. Collective."""
    if count_different(accelerator, value) > 1:
        raise TextgenError(f"{what} is not the same on all {accelerator.num_processes} processes")


def raise_if_stopped(accelerator: Accelerator, stop: StopSignals) -> None:
    """Raise Interrupted on all processes where a signal has asked one of them to stop. Collective."""
    number = torch.tensor([stop.number or 0], device=accelerator.device)
    if (first := int(accelerator.gather(number).max())) > 0:
        raise Interrupted(first)


class Agreement:
    """Flags that are known to all processes once one has set them: a small all-reduce at each step.

    On a CPU the answer is there at once. On CUDA nothing waits for the device: the answer is that of the call before,
    unless it is asked for now.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._last: tuple[Tensor, torch.cuda.Event] | None = None

    def ask(self, *flags: bool | Tensor, now: bool = False) -> tuple[bool, ...]:
        """Tell for each flag whether any process has set it. Collective, the same number of flags everywhere.

        Args:
            flags: plain, or bool scalars on the device; once set they stay so.
            now: wait for this call's answer.
        """
        device = self._accelerator.device
        ours = torch.zeros(len(flags), device=device)
        for place, flag in enumerate(flags):
            ours[place].fill_(flag) if isinstance(flag, bool) else ours[place].copy_(flag)
        everyone = self._accelerator.reduce(ours, "sum") if self._accelerator.num_processes > 1 else ours
        if device.type != "cuda":
            return tuple(bool(count) for count in everyone.tolist())
        answer, event = everyone.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        before, self._last = self._last, (answer, event)
        answer, event = self._last if now or before is None else before
        if not now and before is None:
            return (False,) * len(flags)
        event.synchronize()
        return tuple(bool(count) for count in answer.tolist())


def has_persistent_kernel(model: ModelConfig | None, *, rows: int | None, seq_len: int) -> bool:
    """Tell whether cuDNN has a persistent kernel for a model on this process's GPU in float16 and none in bfloat16.

    Args:
        model: its shape; None where nothing is trained.
        rows: of a micro-batch of this process; None where nothing is trained.
        seq_len: tokens per window.
    """
    if model is None or rows is None or torch.version.cuda is None or not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return False
    gpu = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
    return prefers_float16(
        {model.embedding_dim, *[model.hidden_size] * (model.num_layers - 1)}, model.hidden_size, rows=rows,
        seq_len=seq_len, capability=(gpu.major, gpu.minor), multiprocessors=gpu.multi_processor_count,
    )  # fmt: skip


def resolve_precision(
    flag: Precision | None, environment: str | None, *, use_cpu: bool, persistent: bool = False
) -> str:
    """Return the precision: the flag's, else accelerate's (its yaml or launch flag), else bf16 where hardware has it.

    `auto` is a rule, and nothing is timed, so that all processes and all starts of a run take the same: on a GPU fp16
    where `persistent`, else bf16 where hardware has it, else fp16 where it has that.

    Args:
        flag: of the command line or a file of settings.
        environment: what accelerate says.
        use_cpu: whether this is not about a GPU.
        persistent: what `has_persistent_kernel` says.

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
        raise TextgenError("mixed_precision fp16 is not to be had on a CPU: use `--mixed_precision bf16` or `no`")
    return precision


def describe(accelerator: Accelerator) -> str:
    """Return what the world is: processes, machines, backend, device, what the LSTM computes in. Collective."""
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
