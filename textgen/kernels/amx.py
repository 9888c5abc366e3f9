"""Whether an LSTM layer is trained by Intel's AMX: only if a user asks for it, and then where it is measured as faster.

`TEXTGEN_AMX=1` asks. The code has not run on a processor with AMX yet: its tests emulate the instructions. So a child
process compares it with torch's LSTM once for each machine and shape, where a wrong result or an illegal instruction
costs nothing. What it found is kept beside the compiled code, for all processes and later runs. Only layers in training
take it: in scores and texts they come from torch's operators on these processors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from textgen.errors import TextgenError
from textgen.files import write_atomic
from textgen.hardware import processor_flags

log = logging.getLogger("textgen")

# Of Linux's arch_prctl on x86-64 (asm/prctl.h): a process has to ask before its threads may use the 8 KiB of tiles.
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
_FOUND_NAME = "measured.json"
MAX_ERROR = 0.01
"""of outputs and gradients beside float32's, relative; torch's bfloat16 LSTM has up to 0.007"""


class LayerShape(NamedTuple):
    """What a measurement is for."""

    lanes: int
    steps: int
    input_size: int
    hidden_size: int
    threads: int


@functools.cache
def is_wanted() -> bool:
    """Return whether the user asks for AMX by `TEXTGEN_AMX=1`.

    Raises:
        TextgenError: the variable has another value, or this machine has no AMX.
    """
    if (value := os.environ.get("TEXTGEN_AMX", "")) not in ("", "1"):
        raise TextgenError(f"`TEXTGEN_AMX` must be 1 or not set: {value}")
    if value and not ("amx_bf16" in processor_flags() and is_permitted()):
        raise TextgenError("`TEXTGEN_AMX` is 1, and this processor has no AMX for bfloat16, or the system refuses it")
    return bool(value)


def is_permitted() -> bool:
    """Ask Linux to let this process use tile registers; return whether it does."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):  # elsewhere the number is another call's
        return False
    number = ctypes.c_long
    arguments = map(number, (_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA))
    return int(ctypes.CDLL(None).syscall(*arguments)) == 0


@functools.cache
def is_faster(shape: LayerShape, library: Path) -> bool:
    """Return whether AMX trains a layer of this shape faster than torch does, and right.

    That is measured once, and all processes of a machine get the same answer. Where the measurement fails or cannot be
    kept, it is no for this run.

    Args:
        shape: of the layer and its window.
        library: the compiled code. Its name depends on source, compiler and processor.
    """
    key = hashlib.sha256(repr((library.name, torch.__version__, shape)).encode()).hexdigest()[:16]
    folder = library.with_name(f"amx-{key}")
    try:
        if not folder.exists():
            _keep(measure_in_child(shape), folder)
        found: dict[str, Any] = json.loads((folder / _FOUND_NAME).read_bytes())
        log.info("AMX for %s: %s", shape, found)
        return bool(found["faster"])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as error:
        log.warning("torch computes %s, as AMX is not measured: %s: %s", shape, type(error).__name__, error)
        return False


def _keep(found: dict[str, Any], folder: Path) -> None:
    """Write a measurement into a new folder, unless another process was first: its measurement counts."""
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as aside:
        made = Path(aside) / folder.name
        made.mkdir()
        write_atomic(made / _FOUND_NAME, json.dumps(found, indent=2) + "\n")
        try:
            made.rename(folder)  # all at once, on any file system
        except OSError:
            if not folder.exists():
                raise


def measure_in_child(shape: LayerShape, command: tuple[str, ...] = ("-m", "textgen.kernels.amx")) -> dict[str, Any]:
    """Return what `measure` returns in a process of its own. If its instructions end that process, AMX is not faster.

    Raises:
        OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError: the process failed in another way, for
            want of memory or time; another time it may not.
    """
    argv = [sys.executable, *command, *map(str, shape)]
    try:
        ended = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=300, check=True)
    except subprocess.CalledProcessError as error:
        if error.returncode not in (-signal.SIGILL, -signal.SIGSEGV):
            raise
        return {**shape._asdict(), "faster": False, "failed": str(error)}
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return {**shape._asdict(), "faster": bool(found["faster"]), **found}


def measure(shape: LayerShape, turns: int = 7) -> dict[str, Any]:
    """Compare forward and backward pass of a layer by AMX with torch's.

    Returns:
        `error`: of the AMX code beside float32, the largest of outputs and gradients, relative. `amx_ms` and
        `torch_ms`: the best of the turns; absent if the error is too large. `faster`: whether to take AMX.
    """
    from textgen.kernels import training

    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    size = shape.hidden_size
    weights = [torch.randn(4 * size, n) * n**-0.5 for n in (shape.input_size, size)] + [torch.randn(4 * size) * 0.1]
    inputs = [torch.randn(shape.lanes, shape.steps, shape.input_size), *torch.randn(2, 1, shape.lanes, size).unbind()]
    grad = torch.randn(shape.lanes, shape.steps, size)

    def by_torch(dtype: torch.dtype, x: Tensor, hidden: Tensor, cell: Tensor, *weights: Tensor) -> Tensor:
        low = [w.to(dtype) for w in (*weights, torch.zeros_like(weights[2]))]
        state = [hidden.to(dtype), cell.to(dtype)]
        return torch.lstm(x.to(dtype), state, low, True, 1, 0.0, True, False, True)[0]

    def by_amx(*tensors: Tensor) -> Tensor:
        return training.LSTMFunction.apply(*tensors, True, True)[0]  # type: ignore[no-any-return, no-untyped-call]

    def run(layer: Callable[..., Tensor]) -> tuple[float, list[Tensor]]:
        tensors = [tensor.clone().requires_grad_() for tensor in (*inputs, *weights)]
        started = time.perf_counter()
        y = layer(*tensors)
        gradients = torch.autograd.grad(y, tensors, grad.to(y.dtype))
        return time.perf_counter() - started, [y.detach(), *gradients]

    exact = run(functools.partial(by_torch, torch.float32))[1]
    pairs = zip(run(by_amx)[1], exact, strict=True)
    error = max(float((seen.float() - right).norm() / right.norm()) for seen, right in pairs)
    if not error < MAX_ERROR:  # also if it is no number
        return {"faster": False, "error": error}
    ways = by_amx, functools.partial(by_torch, torch.bfloat16)
    seconds = [[run(way)[0] for way in ways] for _ in range(turns)]
    amx, torchs = map(min, zip(*seconds, strict=True))
    return {"faster": amx < torchs, "error": error, "amx_ms": amx * 1e3, "torch_ms": torchs * 1e3}


if __name__ == "__main__":
    print(json.dumps(measure(LayerShape(*map(int, sys.argv[1:])))))
