"""Facts that the rest of a GPU's first run depends on, each one tried alone: `python -m benchmarks.gpu_probes FILE`.

Every probe appends a line of JSON at once; one that fails gives its error, and what caused it. Those that may leave the
device in a bad state come last. Speeds are the best of five.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.nn import functional as F

from benchmarks.decode import graph_steps
from benchmarks.machine import describe
from textgen.config import ModelConfig
from textgen.decoding.choose import fused_or_cells
from textgen.decoding.decoders import CellDecoder
from textgen.errors import first_line
from textgen.kernels.capture import CudaCapture
from textgen.model.lstm import LSTMLanguageModel, LSTMLayer
from textgen.noise import exponential, hash_bits

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
SMALL = not CUDA
"""sizes of a dry run"""


def describe_machine() -> dict[str, Any]:
    """Return device, driver and versions."""
    found = describe() | {"cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None}  # type: ignore[no-untyped-call]
    for package in ("triton", "accelerate", "numpy", "sentencepiece", "pytest", "jsonargparse"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv"]
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.splitlines()
        found["driver"], found["nvidia_smi"] = lines[1].partition(",")[0], lines
    except (OSError, subprocess.TimeoutExpired, IndexError):
        found["driver"] = None
    return found


def causes(error: BaseException | None) -> list[str]:
    """Return an error and what it came after, the latest first."""
    found = []
    while error is not None:
        found.append(f"{type(error).__name__}: {first_line(error)}"[:300])
        error = error.__context__
    return found


def microseconds(call: Callable[[], object], times: int = 20) -> float:
    """Return the microseconds of a call, the best of five series."""
    wait: Callable[[], None] = torch.cuda.synchronize if CUDA else lambda: None
    for _ in range(3):
        call()
    best = float("inf")
    for _ in range(5):
        wait()
        started = time.perf_counter()
        for _ in range(times):
            call()
        wait()
        best = min(best, (time.perf_counter() - started) / times * 1e6)
    return round(best, 3)


def captured(work: Callable[[], object], capture: CudaCapture | None = None) -> Callable[[], object]:
    """Return a function that replays work from a graph; without a GPU the work itself."""
    if not CUDA:
        return work

    def without_result() -> None:
        work()

    return (capture or CudaCapture(DEVICE)).record(without_result)


# --- speeds ----------------------------------------------------------------------------------------------------------


def copy_terabytes_per_second() -> float:
    """Return the rate of a copy of 4 GB, read and written."""
    a = torch.randn(1 << (16 if SMALL else 30), device=DEVICE)
    b = torch.empty_like(a)
    return round(8 * a.numel() / microseconds(lambda: b.copy_(a), 3) / 1e6, 3)


def bf16_teraflops() -> float:
    """Return the rate of a large product."""
    size = 128 if SMALL else 8192
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    return round(2 * size**3 / microseconds(lambda: a @ b, 5) / 1e6, 3)


def graph_node_microseconds() -> float:
    """Return the cost of a small kernel of a graph."""
    x, number = torch.zeros(1024, device=DEVICE), 10 if SMALL else 1000

    def work() -> None:
        for _ in range(number):
            x.add_(1)

    work()
    return round(microseconds(captured(work), 5) / number, 3)


def product_microseconds() -> dict[str, float]:
    """Return the cost of a layer's product of a decoding step by rows; 12 weights do not fit a cache."""
    size, found = 64 if SMALL else 2048, {}
    weights = [torch.randn(2 * size, size, device=DEVICE).bfloat16() for _ in range(12)]
    for rows in (1, 8, 64):
        work = partial(products, torch.randn(rows, size, device=DEVICE).bfloat16(), weights)
        work()  # loads the kernels, which no capture can
        found[str(rows)] = round(microseconds(captured(work), 5) / len(weights), 3)
    return found


def products(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the product with each weight."""
    return [F.linear(x, weight) for weight in weights]


def lstm_microseconds_per_time_step() -> dict[str, list[float]]:
    """Return the forward and backward cost of a time step of a layer, by size, rows and dtype."""
    found = {}
    shapes = ((16, 4),) if SMALL else ((1024, 128), (1024, 64), (1536, 256))
    for size, rows in shapes:
        for dtype in (torch.bfloat16, torch.float16) if CUDA else (torch.bfloat16,):
            forward = partial(run_layer, new_layer(size), torch.randn(rows, 64, size, device=DEVICE), dtype)
            there = microseconds(forward, 4)
            both = microseconds(partial(there_and_back, forward), 4)
            found[f"{size} x {rows}, {dtype}"] = [round(there / 64, 2), round((both - there) / 64, 2)]
    return found


def run_layer(layer: LSTMLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a layer's outputs over a window, from zeros, in a dtype."""
    zeros = torch.zeros(1, len(x), x.shape[2], device=DEVICE)
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        outputs: Tensor = layer(x, (zeros, zeros))[0]
    return outputs


def there_and_back(forward: Callable[[], Tensor]) -> None:
    """Take a gradient; it is added up."""
    forward().float().sum().backward()  # type: ignore[no-untyped-call]


def decoding_step_microseconds() -> dict[str, float]:
    """Return the cost of a step in a graph of 32, at 3 x 1024 in bfloat16, by rows."""
    torch.manual_seed(0)
    shape = ModelConfig(embedding_dim=512, hidden_size=1024, num_layers=3)
    decoder = CellDecoder(LSTMLanguageModel(shape, 8192).to(DEVICE).eval(), "bfloat16")
    with torch.inference_mode():
        return {
            str(rows): round(microseconds(partial(graph_steps(decoder, rows), 32), 5) / 32, 3) for rows in (1, 8, 64)
        }


def new_layer(size: int) -> LSTMLayer:
    """Return a layer with weights on the device."""
    layer = LSTMLayer(size, size).to(DEVICE)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=size**-0.5)
    return layer


# --- what works ------------------------------------------------------------------------------------------------------


def noise_is_that_of_a_cpu() -> list[Any]:
    """Return whether keys are equal, and by how much their noise differs."""
    keys, there = hash_bits(7, torch.arange(4096)), hash_bits(7, torch.arange(4096, device=DEVICE))
    apart = (exponential(keys[:64], 8192) - exponential(there[:64], 8192).cpu()).abs().max()
    return [torch.equal(keys, there.cpu()), float(apart)]


@torch.inference_mode()
def rows_beside_a_row_change_its_logits() -> dict[str, Any]:
    """Return by number of rows how far a row's logits are from those of the row alone, after three steps.

    By the fused kernels: tiles of up to 16, up to 64 and more rows are compiled to other instructions.
    """
    torch.manual_seed(0)
    size, vocab_size = (32, 300) if SMALL else (1024, 8192)
    model = LSTMLanguageModel(ModelConfig(embedding_dim=size, hidden_size=size, num_layers=3), vocab_size).to(DEVICE)
    decoder, logits = fused_or_cells(model.eval(), ""), dict[int, Tensor]()
    for rows in (1, 2, 16, 17, 64, 65, 512):
        tokens = torch.arange(5, 5 + rows, device=DEVICE).remainder(vocab_size)
        state = [torch.zeros(rows, size, device=DEVICE) for _ in range(6)]
        for _ in range(3):
            logits[rows], state = decoder.step(tokens, state)
    return {str(rows): float((values[0] - logits[1][0]).abs().max()) for rows, values in logits.items()} | {
        "decoder": decoder.description
    }


def packed_weights_give_no_warning() -> dict[str, list[str]]:
    """Return the warnings of a layer's call by dtype: cuDNN may copy weights that are not one block."""
    layer, x, found = new_layer(256), torch.randn(8, 16, 256, device=DEVICE), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            there_and_back(partial(run_layer, layer, x, dtype))
        found[str(dtype)] = [str(warning.message)[:200] for warning in seen]
    return found


def sum_of_one_process_by_nccl() -> float:
    """Return a sum by NCCL of a process alone: whether it starts at all."""
    store = HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    x = torch.ones(8, device=DEVICE)
    torch.distributed.all_reduce(x)
    torch.distributed.destroy_process_group()
    return float(x.sum())


def capture_of_an_lstm_and_its_gradient() -> dict[str, Any]:
    """Return by dtype whether cuDNN's LSTM can be in a graph, there and back."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        work = partial(
            there_and_back, partial(run_layer, new_layer(256), torch.randn(16, 32, 256, device=DEVICE), dtype)
        )
        for _ in range(3):
            work()
        found[str(dtype)] = attempt(partial(capture_and_replay, work))
    return found


def training_is_captured_beside_decoding() -> list[Any]:
    """Return how captures go whose graphs were begun in inference mode, and then outside of it."""
    x, kept = torch.zeros(8, device=DEVICE), []
    with torch.inference_mode():
        found = [attempt(lambda: kept.append(captured(lambda: x.add(1))))]
    return [*found, attempt(lambda: kept.append(captured(lambda: x.add_(1)))), attempt(lambda: kept[0]())]


def pool_serves_after_its_only_graph_was_dropped() -> list[Any]:
    """Return how two captures go, the first of which is dropped at once."""
    capture, x = CudaCapture(DEVICE), torch.zeros(8, device=DEVICE)
    return [attempt(lambda: captured(lambda: x.add_(1), capture)) for _ in range(2)]


def failed_capture_harms_nothing() -> list[Any]:
    """Return how captures go after one that failed, and whether torch's generator draws then."""
    capture, x = CudaCapture(DEVICE), torch.zeros(8, device=DEVICE)
    found = [attempt(lambda: captured(lambda: x.sum().item(), capture))]
    found += [attempt(partial(capture_and_replay, lambda: x.add_(1), capture)) for _ in range(2)]
    return [*found, attempt(lambda: torch.rand(8, device=DEVICE))]


def capture_and_replay(work: Callable[[], object], capture: CudaCapture | None = None) -> None:
    """Capture work and run it once."""
    captured(work, capture)()


def attempt(call: Callable[[], object]) -> Any:
    """Return `works`, or the error with what caused it."""
    try:
        call()
        if CUDA:
            torch.cuda.synchronize()
    except RuntimeError as error:
        return causes(error)
    return "works"


ANYWHERE: list[Callable[[], Any]] = [
    copy_terabytes_per_second, bf16_teraflops, graph_node_microseconds, product_microseconds,
    lstm_microseconds_per_time_step, noise_is_that_of_a_cpu, rows_beside_a_row_change_its_logits,
]  # fmt: skip
ON_A_GPU: list[Callable[[], Any]] = [
    decoding_step_microseconds, packed_weights_give_no_warning, sum_of_one_process_by_nccl,
    capture_of_an_lstm_and_its_gradient, training_is_captured_beside_decoding,
    pool_serves_after_its_only_graph_was_dropped, failed_capture_harms_nothing,
]  # fmt: skip


def main() -> None:
    """Try every probe, or describe the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="file for the lines; with --machine, the folder of machine.json")
    parser.add_argument("--machine", action="store_true", help="describe the machine, and nothing else")
    parser.add_argument("--dry", action="store_true", help="without a GPU: those that a CPU can answer, tiny")
    args = parser.parse_args()
    if args.machine:
        (args.path / "machine.json").write_text(json.dumps(describe_machine(), indent=2) + "\n")
        return
    args.path.unlink(missing_ok=True)
    num_failed = 0
    for probe in ANYWHERE + ([] if args.dry else ON_A_GPU):
        started = time.perf_counter()
        try:
            found = probe()
        except Exception as error:  # every probe is tried
            found, num_failed = {"error": causes(error)}, num_failed + 1
        line = json.dumps({"probe": probe.__name__, "seconds": round(time.perf_counter() - started, 2), "found": found})
        print(line, flush=True)
        with args.path.open("a") as file:
            file.write(line + "\n")
    raise SystemExit(min(num_failed, 1))


if __name__ == "__main__":
    main()
