"""Training speed beside what one would use instead: `python -m benchmarks.train` (all of it: `pip install '.[bench]'`).

Every way trains the same shape (embedding as large as the hidden layers and tied to the output, but for the shapes that
have a projection, which only the plain loop can follow) on the same tokens, as its authors run it and again under bf16
autocast. Rounds are interleaved, so that a busy machine slows all of them. `--profile` tells where textgen's step goes,
`--memory` what a step takes at its peak, `--kernels` what a sequential time step costs, in the dtypes and batches that
decide which of cuDNN's kernels runs.

On a CUDA device all of it is measured, one way after the other, and ends about `--minutes` later: what tells most comes
first, a process is ended when its time is over, and what there was no time for is named. With it FlashRNN's kernels,
where a CUDA compiler and `flashrnn` (PyPI) are installed, and textgen's steps from a CUDA graph and with layers side by
side. Beside the speeds stand the share of the device's own bf16 rate, and how many times its floor a step takes: its
sequential time steps, each as long as `--kernels` finds. That was not tried yet.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, pairwise
from threading import Timer
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.machine import load, save
from benchmarks.wavefront import WavefrontModel
from textgen.config import ModelConfig, TrainConfig
from textgen.hardware import keep_freed_memory
from textgen.kernels import fused
from textgen.kernels import training as training_kernels
from textgen.model.lstm import DropoutMasks, LSTMLanguageModel, LSTMLayer, State
from textgen.training import metrics as usage
from textgen.training.setup import build_learner
from textgen.training.step import train_step, zero_lanes

Steps = Callable[[int], float]
"""takes so many optimizer steps and returns the last loss, nats per token"""


@dataclass(frozen=True)
class Shape:
    """What is trained."""

    vocab_size: int
    embedding_dim: int
    hidden_size: int
    num_layers: int
    batch_size: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.seq_len

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products of a step, there and back; a product and a sum are two."""
        layers = sum(
            4 * self.hidden_size * ((self.embedding_dim if i == 0 else self.hidden_size) + self.hidden_size)
            for i in range(self.num_layers)
        )
        projection = self.embedding_dim * self.hidden_size if self.embedding_dim != self.hidden_size else 0
        return 6 * self.tokens * (layers + projection + self.vocab_size * self.embedding_dim)


CPU_SHAPES = {
    "1 x 512": Shape(4000, 512, 512, 1, 128, 128),
    "2 x 512": Shape(4000, 512, 512, 2, 128, 128),
    "3 x 1024": Shape(4000, 1024, 1024, 3, 64, 64),
    "3 x 1024, 128 x 128": Shape(4000, 1024, 1024, 3, 128, 128),
    "2 x 256 (the peers' own)": Shape(4000, 256, 256, 2, 64, 35),
    "1 x 512, embedding 256": Shape(4000, 256, 512, 1, 128, 128),
    "quick": Shape(4000, 256, 512, 1, 32, 32),  # that of the preset until 2026-11-30: its figures stay comparable
    "bare defaults": Shape(8192, 256, 512, 2, 128, 64),
}
CUDA_SHAPES = {
    "large": Shape(16384, 512, 1536, 4, 256, 96),
    "3 x 1024": Shape(8192, 1024, 1024, 3, 128, 256),
    "default": Shape(8192, 512, 1024, 3, 128, 64),
}

# Seconds that one way to train may take on CUDA, its start included; FlashRNN compiles its kernels in them.
WAY_SECONDS = 120

AUTOCAST_NOTE = (
    "On CUDA, autocast computes torch's `nn.LSTM` in float16 whatever is asked for: that is what `bf16` means at every "
    "way but textgen's and FlashRNN's."
)

# Pieces of a window where layers run side by side: enough that all four layers of the large shape have work for most
# of a window. A guess.
NUM_PIECES = 8


def token_windows(shape: Shape, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (batch_size, seq_len), the same ones always: made up, some tokens far more often.

    Where a GPU trains the first 16 come again and again: drawing them takes longer than a step.
    """
    chance = 1 / torch.arange(10.0, 10.0 + shape.vocab_size)
    draw = torch.Generator().manual_seed(0)
    drawn: list[tuple[Tensor, Tensor]] = []
    for number in count():
        if len(drawn) < 16:
            rows = torch.multinomial(chance, shape.tokens + shape.batch_size, replacement=True, generator=draw)
            rows = rows.view(shape.batch_size, shape.seq_len + 1).to(device)
            window = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            if torch.cuda.is_available():
                drawn.append(window)
        else:
            window = drawn[number % 16]
        yield window


class _Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return token_windows(self.shape, torch.device("cpu"))


# --- the ways to train -----------------------------------------------------------------------------------------------


class OneCallModel(LSTMLanguageModel):
    """Runs all layers by one call of torch's LSTM, so that cuDNN may run layers side by side.

    For layers without masks, norms and residual sums between them. ATen packs the weights at every call.
    """

    def run_layers(self, x: Tensor, states: list[State], masks: DropoutMasks | None) -> tuple[Tensor, list[State]]:
        """Run the layers; shapes as in the model's own method."""
        assert masks is None
        assert not self.norms
        assert not self.config.residual
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        weights = []
        for layer in cast(list[LSTMLayer], list(self.layers)):
            parts = layer.weight_ih, layer.weight_hh, layer.bias, torch.zeros_like(layer.bias)
            weights += [part.to(dtype) for part in parts]
        state = [torch.cat(part).to(dtype) for part in zip(*states, strict=True)]  # (num_layers, batch, hidden_size)
        with torch.autocast(device, enabled=False):
            y, *state = torch.lstm(
                x.to(dtype), state, weights, has_biases=True, num_layers=len(states), dropout=0.0,
                train=self.training, bidirectional=False, batch_first=True,
            )  # fmt: skip
        return y, [(state[0][i : i + 1], state[1][i : i + 1]) for i in range(len(states))]


def textgen_steps(
    shape: Shape, precision: str, *, cuda_graph: bool = False, num_pieces: int = 1, one_call: bool = False
) -> Steps:
    """Train by textgen's own step."""
    keep_freed_memory()  # as `launch.start` does, and does not let cuDNN round float32
    torch.backends.cudnn.allow_tf32 = precision != "no"
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision=precision)
    model = ModelConfig(
        embedding_dim=shape.embedding_dim, hidden_size=shape.hidden_size, num_layers=shape.num_layers,
        projection=shape.embedding_dim != shape.hidden_size,
    )  # fmt: skip
    config = TrainConfig(batch_size=shape.batch_size, seq_len=shape.seq_len, model=model, cuda_graph=cuda_graph)
    unwrapped_model = (OneCallModel if one_call else LSTMLanguageModel)(model, shape.vocab_size)
    if num_pieces > 1:
        unwrapped_model = WavefrontModel(model, shape.vocab_size, num_pieces=num_pieces)
    learner = build_learner(config, accelerator, unwrapped_model, total_steps=1)
    learner.lane_states = zero_lanes(learner)
    device = accelerator.device
    windows = token_windows(shape, device)
    lanes = torch.arange(shape.batch_size, device=device)

    def steps(number: int) -> float:
        for _ in range(number):
            tokens, targets = next(windows)
            nats = train_step(learner, [{"tokens": tokens, "targets": targets, "lanes": lanes}])
        if learner.graph is not None and learner.graph.is_refused:  # its warning is not shown here
            raise RuntimeError("the step could not be captured in a CUDA graph")  # plain steps must not pass for it
        return nats.item() / shape.tokens

    steps.model = unwrapped_model  # type: ignore[attr-defined]
    return steps


def without_kernels_steps(shape: Shape, precision: str) -> Steps:
    """Train by textgen's own step as it is without a compiler and without Triton."""
    steps = textgen_steps(shape, precision)

    def run(number: int) -> float:
        before = training_kernels.compiled_code, fused.kernels
        training_kernels.compiled_code = fused.kernels = cast(Any, lambda *_: None)
        try:
            return steps(number)
        finally:
            training_kernels.compiled_code, fused.kernels = before

    return run


class PlainModel(nn.Module):
    """The textbook model, tied, with a projection where the sizes differ."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.embedding_dim)
        self.lstm: nn.Module = nn.LSTM(shape.embedding_dim, shape.hidden_size, shape.num_layers, batch_first=True)
        self.projection: nn.Module = nn.Identity()
        if shape.hidden_size != shape.embedding_dim:
            self.projection = nn.Linear(shape.hidden_size, shape.embedding_dim)
        self.output = nn.Linear(shape.embedding_dim, shape.vocab_size)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return logits (batch, time, vocab_size) and the new state."""
        x, state = self.lstm(self.embedding(tokens), state)
        return self.output(self.projection(x)), state


class FlashLSTM(nn.Module):
    """LSTM layers over FlashRNN's kernel, called as a batch-first nn.LSTM is.

    Shapes are those of its README: gates (batch, time, 4, heads, units), here with one head.

    Args:
        kernel: FlashRNN's function, or one that is called alike.
        shape: of the model.
    """

    def __init__(self, kernel: Callable[..., tuple[Tensor, Tensor]], shape: Shape) -> None:
        super().__init__()
        self.kernel, size = kernel, shape.hidden_size
        sizes = [shape.embedding_dim] + [size] * shape.num_layers
        self.inputs = nn.ModuleList(nn.Linear(a, 4 * b, bias=False) for a, b in pairwise(sizes))
        self.recurrent = nn.ParameterList(torch.randn(4, 1, size, size) * size**-0.5 for _ in sizes[1:])
        self.biases = nn.ParameterList(torch.zeros(4, 1, size) for _ in sizes[1:])

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (batch, time, hidden_size) and each layer's state, (2, batch, 1, 1, hidden_size)."""
        ends = []
        for i, layer in enumerate(self.inputs):
            gates = layer(x).unflatten(2, (4, 1, -1))  # (batch, time, 4, 1, hidden_size)
            weight, bias = self.recurrent[i].to(gates.dtype), self.biases[i].to(gates.dtype)
            before = None if state is None else state[i].to(gates.dtype)
            states, end = self.kernel(gates, weight, bias, states=before, function="lstm")
            x = states[0].flatten(2)
            ends.append(end)
        return x, tuple(ends)


def flashrnn_steps(shape: Shape, precision: str, *, backend: str) -> Steps:
    """Train by the plain loop, over FlashRNN's kernels in place of nn.LSTM; it compiles them first."""
    from flashrnn import flashrnn

    def model(shape: Shape) -> PlainModel:
        plain = PlainModel(shape)
        plain.lstm = FlashLSTM(partial(flashrnn, backend=backend, dtype="bfloat16"), shape)
        return plain

    return plain_steps(shape, precision, model)


def plain_steps(shape: Shape, precision: str, model_of: Callable[[Shape], PlainModel] = PlainModel) -> Steps:
    """Train by the loop that Accelerate's guides show, over nn.LSTM."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision=precision)
    bare = model_of(shape)
    optimizer = torch.optim.Adam(bare.parameters(), lr=1e-3)
    loader: Any = DataLoader(_Stream(shape), batch_size=None)
    model, optimizer, loader = accelerator.prepare(bare, optimizer, loader)
    windows, state = iter(loader), None

    def steps(number: int) -> float:
        nonlocal state
        for _ in range(number):
            tokens, targets = next(windows)
            logits, state = model(tokens, state)
            state = tuple(part.detach() for part in state)
            loss = F.cross_entropy(logits.view(-1, shape.vocab_size), targets.view(-1))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.item())

    steps.model = bare  # type: ignore[attr-defined]
    return steps


class _WordLanguageModel(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.encoder = nn.Embedding(shape.vocab_size, shape.embedding_dim)
        self.lstm = nn.LSTM(
            shape.embedding_dim, shape.hidden_size, shape.num_layers, dropout=0.2 * (shape.num_layers > 1)
        )
        self.decoder = nn.Linear(shape.hidden_size, shape.vocab_size)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        x, state = self.lstm(self.dropout(self.encoder(tokens)), state)
        return F.log_softmax(self.decoder(self.dropout(x)).flatten(0, 1), dim=1), state


def word_language_model_steps(shape: Shape, precision: str) -> Steps:
    """Train as PyTorch's word_language_model is described: SGD at 20, clipping at 0.25, dropout 0.2, time first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, windows = _WordLanguageModel(shape).to(device), token_windows(shape, device)
    state = None

    def steps(number: int) -> float:
        nonlocal state
        for _ in range(number):
            tokens, targets = (part.T.contiguous() for part in next(windows))
            model.zero_grad()
            with _autocast(device, precision):
                scores, state = model(tokens, state)
                loss = F.nll_loss(scores, targets.flatten())
            state = tuple(part.detach() for part in state)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(parameter.grad, alpha=-20)  # type: ignore[arg-type]
        return loss.item()

    return steps


def fastai_steps(shape: Shape, precision: str) -> Steps:
    """Train by fastai's learner of an AWD-LSTM, with its own dropouts and penalties, without its validation."""
    from fastai.callback.core import CancelValidException
    from fastai.text import all as fastai

    class NoValidation(fastai.Callback):  # type: ignore[misc]
        def before_validate(self) -> None:
            raise CancelValidException

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = {
        **fastai.awd_lstm_lm_config, "emb_sz": shape.embedding_dim, "n_hid": shape.hidden_size,
        "n_layers": shape.num_layers,
    }  # fmt: skip
    model = fastai.get_language_model(fastai.AWD_LSTM, shape.vocab_size, config)
    windows = token_windows(shape, torch.device("cpu"))
    learners: dict[int, Any] = {}

    def steps(number: int) -> float:
        if number not in learners:
            parts = [next(windows)[0] for _ in range(number)]
            text = torch.cat(parts, dim=1).flatten()  # lane by lane, as its loader will cut it
            text = torch.cat([text, text[:1]])
            loader = fastai.LMDataLoader([(text,)], lens=[len(text)], bs=shape.batch_size, seq_len=shape.seq_len)
            learners[number] = fastai.LMLearner(
                fastai.DataLoaders(loader, loader, device=device), model, loss_func=fastai.CrossEntropyLossFlat(),
                cbs=[fastai.ModelResetter(), fastai.RNNRegularizer(alpha=2.0, beta=1.0), NoValidation()],
            )  # fmt: skip
        learner = learners[number]
        with learner.no_bar(), learner.no_logging(), _autocast(device, precision):
            learner.fit(1, lr=1e-3)
        return float(learner.recorder.losses[-1])

    return steps


def keras_steps(shape: Shape, precision: str) -> Steps:
    """Train by Keras's `fit` on its torch backend, from no state at each window: keeping one fails there (3.15)."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    import numpy as np

    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bf16" else "float32")
    tokens = keras.Input(batch_shape=(shape.batch_size, shape.seq_len), dtype="int32")
    embedding = keras.layers.Embedding(shape.vocab_size, shape.embedding_dim)
    x = embedding(tokens)
    for _ in range(shape.num_layers):
        x = keras.layers.LSTM(shape.hidden_size, return_sequences=True)(x)

    class TiedOutput(keras.layers.Layer):  # type: ignore[misc]
        def build(self, _: Any) -> None:
            self.bias = self.add_weight(shape=(shape.vocab_size,), initializer="zeros")

        def call(self, x: Any) -> Any:
            weight = keras.ops.cast(embedding.embeddings, x.dtype)
            return keras.ops.cast(keras.ops.matmul(x, keras.ops.transpose(weight)), "float32") + self.bias

    model = keras.Model(tokens, TiedOutput()(x))
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    windows = token_windows(shape, torch.device("cpu"))

    def steps(number: int) -> float:
        pairs = [next(windows) for _ in range(number)]
        tokens, targets = (np.concatenate([part.numpy() for part in parts]) for parts in zip(*pairs, strict=True))
        return float(model.fit(tokens, targets, shape.batch_size, shuffle=False, verbose=0).history["loss"][-1])

    return steps


WAYS: dict[str, Callable[[Shape, str], Steps]] = {
    "textgen": textgen_steps,
    "textgen, not compiled": without_kernels_steps,
    "accelerate loop": plain_steps,
    "word_language_model": word_language_model_steps,
    "fastai AWD-LSTM": fastai_steps,
    "keras on torch": keras_steps,
}
ON_CUDA_ONLY: dict[str, Callable[[Shape, str], Steps]] = {
    "textgen, graph": partial(textgen_steps, cuda_graph=True),
    "textgen, one LSTM call": partial(textgen_steps, one_call=True),
    "textgen, side by side": partial(textgen_steps, num_pieces=NUM_PIECES),
    "textgen, graph, side by side": partial(textgen_steps, cuda_graph=True, num_pieces=NUM_PIECES),
    "FlashRNN, fused": partial(flashrnn_steps, backend="cuda_fused"),
    "FlashRNN, alternating": partial(flashrnn_steps, backend="cuda"),
}
WAYS |= ON_CUDA_ONLY


def _autocast(device: torch.device, precision: str) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def variants(shape: Shape, *, cuda: bool, ways: Collection[str] = tuple(WAYS)) -> Iterator[tuple[str, str]]:
    """Yield what is measured at a shape: way and precision."""
    for way in ways:
        flexible = way.startswith(("textgen", "accelerate"))
        if way in ON_CUDA_ONLY:
            yield from [(way, "bf16")] * cuda
        elif cuda and way == "textgen, not compiled":
            yield way, "bf16"
        else:
            if flexible or shape.embedding_dim == shape.hidden_size:
                yield from ((way, precision) for precision in ("no", "bf16"))
            if flexible and cuda:
                yield way, "fp16"


def built(way: str, shape: Shape, precision: str) -> Steps | None:
    """Return a way to train, or None with a line where it is not installed."""
    torch.manual_seed(0)
    try:
        return WAYS[way](shape, precision)
    except ModuleNotFoundError as error:
        print(f"{way} is left out: {error}", file=sys.stderr)
        return None


# --- what is measured ------------------------------------------------------------------------------------------------


Case = tuple[str, str, str]
"""title of a shape, way to train, precision"""

Worker = Callable[[int], dict[str, float] | None]
"""takes so many steps in a process of its own; returns seconds and bytes, or None where the way is not installed"""


@contextmanager
def worker(title: str, way: str, precision: str, *, until: float | None = None) -> Iterator[Worker]:
    """Start a process for a way to train: what one sets for all of its process, others do not get.

    Args:
        title: of the shape.
        way: to train.
        precision: of it.
        until: when it is ended, with the compilers it started, on `time.monotonic`'s clock; None: never.
    """
    argv = [sys.executable, "-m", "benchmarks.train", "--work", way, precision, "--shapes", title]
    with (
        subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=until is not None
        ) as process,
        _ended(process, until),
    ):
        asking, told = process.stdin, process.stdout
        assert asking is not None
        assert told is not None

        def steps(number: int) -> dict[str, float] | None:
            if process.poll() is None:
                with suppress(BrokenPipeError):
                    print(number, file=asking, flush=True)
            return next((json.loads(line) for line in told if line.startswith('{"seconds"')), None)

        yield steps
        with suppress(BrokenPipeError):
            asking.close()


@contextmanager
def _ended(process: subprocess.Popen[str], until: float | None) -> Iterator[None]:
    """Kill a process and those of its session at a time, unless it is left before."""
    if until is None:
        yield
        return

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = Timer(max(until - time.monotonic(), 0), kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def work(way: str, shape: Shape, precision: str) -> None:
    """Take as many steps as each line of standard input says, and print their seconds and what they added to memory."""
    cuda = torch.cuda.is_available()

    def now() -> int:
        if cuda:
            return torch.cuda.memory_allocated()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    if (run := built(way, shape, precision)) is None:
        return
    before = now()
    for line in sys.stdin:
        started = time.perf_counter()
        run(int(line))
        seconds, top = time.perf_counter() - started, usage.peak_memory(torch.device("cuda" if cuda else "cpu"))
        print(json.dumps({"seconds": seconds, "step": top - before, "process": top}), flush=True)


def measure(
    title: str, shape: Shape, *, rounds: int, steps: int, ways: Collection[str] = tuple(WAYS)
) -> dict[str, Any]:
    """Return tokens per second of all ways, medians of interleaved rounds of `steps` steps."""
    with ExitStack() as stack:
        made = {
            variant: stack.enter_context(worker(title, *variant)) for variant in variants(shape, cuda=False, ways=ways)
        }
        running = {variant: run for variant, run in made.items() if run(steps) is not None}  # which warms up
        rates: dict[tuple[str, str], list[float]] = {variant: [] for variant in running}
        for _ in range(rounds):
            for variant, run in running.items():
                told = run(steps)
                assert told is not None, variant
                rates[variant].append(steps * shape.tokens / told["seconds"])
    figures = {f"{way}, {precision}": summary(seen) for (way, precision), seen in rates.items()}
    ours = max(figures[f"textgen, {precision}"]["tokens_per_second"] for way, precision in rates if way == "textgen")
    for name, values in figures.items():
        values["textgen_is_faster_by"] = round(ours / values["tokens_per_second"], 2)
        spread = f"({values['lowest']:,} to {values['highest']:,})"
        print(f"  {name:28} {values['tokens_per_second']:10,} tokens/s {spread:24} x {values['textgen_is_faster_by']}")
    return figures


def summary(rates: list[float]) -> dict[str, float]:
    """Return median, lowest and highest of tokens per second."""
    return {
        "tokens_per_second": round(statistics.median(rates)), "lowest": round(min(rates)), "highest": round(max(rates))
    }  # fmt: skip


def measure_alone(
    title: str, shape: Shape, way: str, precision: str, *, rounds: int, steps: int, until: float
) -> dict[str, float] | None:
    """Return tokens per second of a way that has the GPU for itself, and the bytes it takes there.

    None, with a line that says so, where it cannot be built or fails, or its time is over before it was measured.
    """
    until = min(until, time.monotonic() + WAY_SECONDS)
    rates: list[float] = []
    with worker(title, way, precision, until=until) as run:
        first = told = run(steps)  # which warms up
        while told is not None and len(rates) < rounds:
            told = run(steps)
            if told is not None:
                rates.append(steps * shape.tokens / told["seconds"])
    if first is None or not rates:
        print(f"  {way}, {precision} is left out at {title}: not built, failed, or out of time", flush=True)
        return None
    figures = summary(rates) | {"bytes": first["step"]}
    print(f"  {title}: {way}, {precision}: {figures['tokens_per_second']:,} tokens/s", flush=True)
    return figures


def in_order(shapes: Mapping[str, Shape], ways: Collection[str] = tuple(WAYS)) -> tuple[list[Case], list[Case]]:
    """Return what is measured on CUDA: what tells most, and the rest; FlashRNN, which compiles, before what is slow."""
    cases = [(title, *variant) for title, shape in shapes.items() for variant in variants(shape, cuda=True, ways=ways)]
    first = [case for case in cases if case[1].startswith(("textgen", "accelerate")) and case[2] != "no"]
    rest = [case for case in cases if case not in first]
    return first, sorted(rest, key=lambda case: not case[1].startswith("FlashRNN"))


def step_floor(shape: Shape, microseconds: Mapping[str, Mapping[str, float]], precision: str) -> float | None:
    """Return the seconds of a step's sequential time steps, there and back, if it did nothing else.

    Layers one after the other, each as long as a layer of this size and batch takes for a time step; the first one,
    whose input may be smaller, is counted like the others. Layers side by side may pass it.

    Args:
        shape: what is trained.
        microseconds: what `time_step_microseconds` returned; None comes back where it has no such layer.
        precision: Accelerate's name of it.
    """
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(precision)
    found = microseconds.get(f"{shape.hidden_size} units, {dtype}, batch {shape.batch_size}")
    return found["stack"] * 1e-6 * shape.seq_len * shape.num_layers if found else None


def put_beside(
    speed: Mapping[str, Mapping[str, float]],
    shape: Shape,
    possible: float,
    microseconds: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    """Return the speeds of a shape with what they are beside the device's rate, a step's floor, and the plain loop.

    Args:
        speed: of each "way, precision".
        shape: what is trained.
        possible: operations per second of a large bf16 product.
        microseconds: of sequential time steps.
    """
    plain = speed.get("accelerate loop, bf16")
    figures = {}
    for name, values in speed.items():
        seconds = shape.tokens / values["tokens_per_second"]
        floor = step_floor(shape, microseconds, name.rpartition(", ")[2])
        figures[name] = dict(values) | {
            "share_of_bf16_rate": round(shape.flops / seconds / possible, 3),
            **({"times_the_floor": round(seconds / floor, 2)} if floor else {}),
            **(
                {"times_the_plain_loop": round(values["tokens_per_second"] / plain["tokens_per_second"], 2)}
                if plain
                else {}
            ),
        }
    return figures


def measure_on_cuda(
    shapes: Mapping[str, Shape],
    figures: dict[str, Any],
    file: str,
    *,
    minutes: float,
    rounds: int,
    steps: int | None,
    ways: Collection[str] = tuple(WAYS),
) -> None:
    """Measure everything in about so many minutes, and save it as it comes."""
    until = time.monotonic() + 60 * minutes
    figures["note"] = AUTOCAST_NOTE
    figures["bf16_flops"] = gemm_rate(torch.bfloat16, torch.device("cuda"))
    figures["microseconds per time step"] = time_step_microseconds(torch.device("cuda"))
    torch.cuda.empty_cache()  # for the processes to come
    figures |= {title: {"shape": asdict(shape), "speed": {}, "left_out": []} for title, shape in shapes.items()}
    first, rest = in_order(shapes, ways)
    for cases in (first, rest):
        for title, way, precision in cases:
            shape, entry = shapes[title], figures[title]
            number = steps or max((1 << 18) // shape.tokens, 1)
            told = measure_alone(title, shape, way, precision, rounds=rounds, steps=number, until=until)
            if told is None:
                entry["left_out"].append(f"{way}, {precision}")
            else:
                entry["speed"][f"{way}, {precision}"] = told
            save(file, figures)
        if cases is first:
            examine(shapes, figures, file, until=until)
    for title, shape in shapes.items():
        entry = figures[title]
        entry["speed"] = put_beside(entry["speed"], shape, figures["bf16_flops"], figures["microseconds per time step"])
        print(f"{title} ({AUTOCAST_NOTE})")
        for name, values in entry["speed"].items():
            print(f"  {name:34}" + "".join(f"  {what} {value:,}" for what, value in values.items()))
    save(file, figures)


def examine(shapes: Mapping[str, Shape], figures: dict[str, Any], file: str, *, until: float) -> None:
    """Measure losses and the parts of a step, in this process, as long as there is time."""
    for title, shape in shapes.items():
        for name, call in (("losses", lambda s: equal_losses(s, 50)), ("profile", profile_step)):
            if time.monotonic() > until:
                print(f"  {name} of {title} are left out: out of time")
                continue
            figures[title][name] = call(shape)
            save(file, figures)
            gc.collect()
            torch.cuda.empty_cache()  # for the processes to come


def equal_losses(shape: Shape, number: int) -> dict[str, float]:
    """Return the loss after `number` steps from equal weights on equal tokens, of textgen and the plain loop.

    The plain model's second bias, which would double its steps, is held at zero.
    """
    losses = {}
    for precision in ("no", "bf16", "fp16") if torch.cuda.is_available() else ("no", "bf16"):
        ours, plain = textgen_steps(shape, precision), plain_steps(shape, precision)
        torch.manual_seed(1)
        model, other = ours.model, plain.model  # type: ignore[attr-defined]
        model.initialize()
        with torch.no_grad():
            other.embedding.weight.copy_(model.embedding.weight)
            other.output.bias.copy_(model.output.bias)
            for i, layer in enumerate(model.layers):
                for name, value in (
                    ("weight_ih", layer.weight_ih),
                    ("weight_hh", layer.weight_hh),
                    ("bias_ih", layer.bias),
                ):
                    getattr(other.lstm, f"{name}_l{i}").copy_(value)
                getattr(other.lstm, f"bias_hh_l{i}").zero_().requires_grad_(False)
            if isinstance(model.projection, nn.Linear):
                other.projection.load_state_dict(model.projection.state_dict())
        losses[f"textgen, {precision}"], losses[f"accelerate loop, {precision}"] = ours(number), plain(number)
    print(f"  loss after {number} steps: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    return losses


def peak_memory(title: str, shape: Shape) -> dict[str, Any]:
    """Return the bytes that two steps add to a fresh process's memory (on CUDA: allocate at their peak)."""
    figures = {}
    for way, precision in variants(shape, cuda=torch.cuda.is_available()):
        if not way.startswith(("textgen", "accelerate")):
            continue
        with worker(title, way, precision) as run:
            told = run(2)
        assert told is not None
        figures[f"{way}, {precision}"] = {part: told[part] for part in ("step", "process")}
        print(f"  {way}, {precision}: {told['step'] / 1e6:,.0f} MB", flush=True)
    return figures


# parts of a step by the names that torch's profiler gives them
PARTS = {
    "LSTM, forward": ("LSTMFunction", "aten::lstm"),
    "LSTM, backward": ("LSTMFunctionBackward", "MkldnnRnnLayerBackward0", "CudnnRnnBackward0"),
    "output layer, softmax and loss": ("_SummedCrossEntropy", "_SummedCrossEntropyBackward"),
    "optimizer": ("Optimizer.step#Adam.step",),
    "embedding, backward": ("EmbeddingBackward0",),
}


def profile_step(shape: Shape) -> dict[str, Any]:
    """Return the share of each part in textgen's bf16 step, and the rate of its matrix products beside the possible."""
    steps = textgen_steps(shape, "bf16")
    steps(2)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        steps(1)
        seconds.append(time.perf_counter() - started)
    with torch.profiler.profile() as profiler:
        steps(3)
    events = {event.key: event for event in profiler.key_averages()}
    field = "device_time_total" if torch.cuda.is_available() else "cpu_time_total"
    step = statistics.median(seconds)
    shares = {
        part: sum(getattr(events[name], field) for name in names if name in events) / 3e6 / step
        for part, names in PARTS.items()
    }
    shares["everything else"] = 1 - sum(shares.values())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    possible = gemm_rate(torch.bfloat16, device)
    reached = shape.flops / step
    print(f"  step {step * 1e3:.1f} ms: " + ", ".join(f"{part} {share:.1%}" for part, share in shares.items()))
    print(f"  {reached / 1e9:,.0f} GFLOP/s, {reached / possible:.0%} of the {possible / 1e9:,.0f} of a large product")
    return {
        "step_ms": step * 1e3, "shares": shares, "gflops": reached / 1e9, "gemm_gflops": possible / 1e9,
        "share_of_gemm": reached / possible,
    }  # fmt: skip


def gemm_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """Return the floating-point operations per second of large square matrix products: the best of ten."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(_seconds(lambda: a @ b, device) for _ in range(12))
    return 2 * size**3 / best


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def time_step_microseconds(
    device: torch.device,
    *,
    sizes: tuple[int, ...] = (1024, 1536),
    batches: tuple[int, ...] = (16, 64, 128, 136, 256, 512),
    steps: int = 256,
    layers: int = 3,
) -> dict[str, dict[str, float]]:
    """Return microseconds per sequential time step and layer, forward and backward together, by dtype and batch.

    `stack` is one call per layer, as textgen makes them, `call` one call of torch's LSTM for all. cuDNN's persistent
    kernel, for float16, one layer a call, at most 1,024 units and batches of at most 128 that 8 divides, shows as a
    jump where one of these ends.
    """
    figures: dict[str, dict[str, float]] = {}
    dtypes = (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.bfloat16,)
    for size, dtype, batch in ((s, d, b) for s in sizes for d in dtypes for b in batches):
        stack = nn.ModuleList(LSTMLayer(size, size) for _ in range(layers)).to(device)
        for parameter in stack.parameters():
            nn.init.normal_(parameter, std=size**-0.5)
        whole = nn.LSTM(size, size, layers, batch_first=True).to(device, dtype)
        x = torch.randn(batch, steps, size, device=device, dtype=dtype)
        zeros = torch.zeros(1, batch, size, device=device)

        def of_stack(
            x: Tensor = x, stack: nn.ModuleList = stack, dtype: torch.dtype = dtype, zeros: Tensor = zeros
        ) -> None:
            with torch.autocast(device.type, dtype):
                for layer in stack:
                    x, _ = layer(x, (zeros, zeros))
            x.sum().backward()  # type: ignore[no-untyped-call]

        def of_call(x: Tensor = x, whole: nn.LSTM = whole) -> None:
            whole(x)[0].sum().backward()

        seen = {}
        for name, call in (("stack", of_stack), ("call", of_call)):
            best = min(_seconds(call, device) for _ in range(5))
            seen[name] = best / steps / layers * 1e6
        figures[f"{size} units, {str(dtype).removeprefix('torch.')}, batch {batch}"] = seen
        print(
            f"  {size} units, {dtype}, batch {batch}: {seen['stack']:.1f} us stacked, {seen['call']:.1f} us in one call"
        )
    return figures


def main() -> None:
    """Measure what the flags say and put it beside what the result file holds of other shapes."""
    cuda = torch.cuda.is_available()
    shapes = CUDA_SHAPES if cuda else CPU_SHAPES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(shapes), default=list(shapes))
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; one more warms up (default: 5)")
    parser.add_argument("--steps", type=int, help="steps of a round (default: a second or more)")
    parser.add_argument("--profile", action="store_true", help="where textgen's step goes, and nothing else")
    parser.add_argument("--memory", action="store_true", help="what a step takes at its peak, and nothing else")
    parser.add_argument("--kernels", action="store_true", help="cost of a sequential time step, and nothing else")
    parser.add_argument("--name", help="of the result file (default: train, on CUDA train_cuda)")
    parser.add_argument("--minutes", type=float, default=8, help="on CUDA, for all of it (default: 8)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="to train (default: all)")
    parser.add_argument("--work", nargs=2, metavar=("WAY", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not cuda and "textgen" not in args.ways:
        parser.error("`ways` must have `textgen`, beside which the others are put")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    chosen = {name: shapes[name] for name in args.shapes}
    if args.work:
        work(args.work[0], next(iter(chosen.values())), args.work[1])
        return
    everything = not (args.profile or args.memory or args.kernels)
    name = args.name or ("train_cuda" if cuda else "train")
    figures = load(name)
    if everything and cuda:
        measure_on_cuda(
            chosen, figures, name, minutes=args.minutes, rounds=args.rounds, steps=args.steps, ways=args.ways
        )
        return
    for title, shape in chosen.items():
        print(f"{title}: {shape.batch_size} x {shape.seq_len} tokens, {shape.vocab_size} pieces", flush=True)
        entry = figures.setdefault(title, {"shape": asdict(shape)})
        if everything:
            steps = args.steps or max((1 << 14) // shape.tokens, 1)
            entry["speed"] = measure(title, shape, rounds=args.rounds, steps=steps, ways=args.ways)
            save(name, figures)
            entry["losses"] = equal_losses(shape, 10 if shape.tokens <= 1 << 12 else 3)
        if args.profile:
            entry["profile"] = profile_step(shape)
        if args.memory:
            entry["memory"] = peak_memory(title, shape)
        save(name, figures)  # at once: the next part may take long
    if args.kernels:
        device = torch.device("cuda" if cuda else "cpu")
        sizes: dict[str, Any] = {} if cuda else {"sizes": (512, 1024), "batches": (32, 128), "steps": 32}
        figures["microseconds per time step"] = time_step_microseconds(device, **sizes)
    save(name, figures)


if __name__ == "__main__":
    main()
