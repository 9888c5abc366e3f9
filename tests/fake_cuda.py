"""Runs what CUDA graphs capture on tensors of a GPU that is not there, and prints the operators that would spoil it.

    python -m tests.fake_cuda

torch's fake tensors have shapes and a device, and no values: reading one fails. Every operator is looked at with the
devices of what it reads and returns. Found are those that wait for the device, those that mix a GPU's tensors with a
CPU's, and those that compute on the CPU what a graph would keep as it was. Gradients are put in by hand: the backward
pass needs a real device. torch is changed for the whole process, so tests start this as a script.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from textgen.config import ModelConfig, SamplingConfig, TrainConfig
from textgen.decoding.cuda_graphs import Buffers, steps_in_place
from textgen.decoding.decoders import CellDecoder, Decoder
from textgen.decoding.fused import FusedDecoder
from textgen.decoding.sampling import join_sampling_states, new_sampling_state
from textgen.kernels import fused
from textgen.kernels import training as training_kernels
from textgen.model.lstm import LSTMLanguageModel
from textgen.noise import item_bits
from textgen.training.cuda_graph import WARM_UP, StepGraph
from textgen.training.optim import build_optimizer
from textgen.training.step import Learner, Progression, train_step, zero_lanes

CUDA = torch.device("cuda", 0)
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "is_nonzero",
    "equal",
    "bincount",
}

# Answers for the device: a torch without CUDA has nothing that does, and that of a torch with CUDA asks the driver.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
struct Guard final : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
}
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
"""


def pretend() -> None:
    """Have torch think that there is a GPU."""
    from torch.utils import cpp_extension

    folder = Path(tempfile.mkdtemp())
    (folder / "guard.cpp").write_text(GUARD)
    argv = [
        "g++",
        "-shared",
        "-fPIC",
        "-std=c++20",
        str(folder / "guard.cpp"),
        "-o",
        str(folder / "guard.so"),
        "-lc10",
    ]
    argv += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    argv += [f"-I{path}" for path in cpp_extension.include_paths()]
    subprocess.run([*argv, *(f"-L{path}" for path in cpp_extension.library_paths())], check=True)
    ctypes.CDLL(str(folder / "guard.so"))
    for name, answer in {
        "is_available": True, "is_initialized": False, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "is_current_stream_capturing": False, "get_device_capability": (9, 0),
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
    fake_tensor.init_gpu_context = lambda _: None  # it would ask the device
    original = torch.tensor

    def tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        """Return a tensor whose values come from the host, which fake tensors have none of."""
        made = original(data, dtype=dtype)
        if device is None or torch.device(device).type == "cpu":
            return made
        return torch.empty(made.shape, dtype=made.dtype, device=device)

    torch.tensor = tensor  # type: ignore[assignment]


class Operators(TorchDispatchMode):
    """Notes what would spoil a capture, and how many operators there were."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.wrong = 0, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [value for value in tree_flatten((args, kwargs, out))[0] if isinstance(value, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        self.count += 1
        if function.overloadpacket.__name__ in WAITING or "cpu" in devices:
            self.wrong.append(f"{function} of {', '.join(f'{t.device.type} {tuple(t.shape)}' for t in tensors)}")
        return out


def on_cuda(model: LSTMLanguageModel, *, requires_grad: bool = False) -> LSTMLanguageModel:
    """Return a model with fake parameters on the GPU; those that are tied stay so."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                made.setdefault(id(value), nn.Parameter(fake, requires_grad=requires_grad))
                module._parameters[name] = made[id(value)]
    return model


# --- decoding --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "plain": SamplingConfig(),
    "greedy": SamplingConfig(temperature=0.0),
    "top-k and top-p": SamplingConfig(temperature=0.7, top_k=20, top_p=0.9),
    "min-p, typical, repetition, log-probabilities": SamplingConfig(
        min_p=0.02, typical_p=0.95, repetition_penalty=1.3, logprobs=2
    ),
    "penalties, n-grams, banned": SamplingConfig(
        presence_penalty=0.5, frequency_penalty=0.2, no_repeat_ngram=2, banned_tokens=(40, 50)
    ),
    "forced end": SamplingConfig(min_new_tokens=9, no_repeat_ngram=1, logprobs=0),
}
SHAPES = {
    "plain": ModelConfig(embedding_dim=16, hidden_size=32, num_layers=3),
    "norms": ModelConfig(embedding_dim=16, hidden_size=32, num_layers=3, layer_norm=True, residual=True),
}


def check_launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """Stand in for `triton_decoding._launch`: all tensors are of the device, and nothing is computed."""
    assert {value.device for value in arguments if isinstance(value, Tensor)} == {CUDA}
    LAUNCHES.append(kernel.__name__)


LAUNCHES: list[str] = []


def decoders() -> dict[str, Callable[[LSTMLanguageModel], Decoder]]:
    """Return what makes each decoder of a GPU; the one of Triton's kernels only where Triton is."""
    made: dict[str, Callable[[LSTMLanguageModel], Decoder]] = {
        "float32": lambda model: CellDecoder(model, "float32"),
        "bfloat16": lambda model: CellDecoder(model, "bfloat16"),
        "fused, by operators": lambda model: FusedDecoder(model, None),
    }
    if find_spec("triton") is not None:
        from textgen.kernels import triton_decoding

        triton_decoding._launch = check_launch
        made["fused"] = lambda model: FusedDecoder(model, triton_decoding)
        made["fused, 8 bits"] = lambda model: FusedDecoder(model, triton_decoding, int8=True)
    return made


def decoding() -> Iterator[tuple[str, Operators]]:
    """Yield the operators of a captured step for each decoder, shape and set of sampling settings."""
    rows, vocab_size = 4, 300
    for (kind, make), shape, name in itertools.product(decoders().items(), SHAPES, SETTINGS):
        decoder = make(on_cuda(LSTMLanguageModel(SHAPES[shape], vocab_size)).eval())
        states = [
            new_sampling_state(SETTINGS[name], [1, 2, 3], i, vocab_size=vocab_size, device=CUDA) for i in range(rows)
        ]
        sampling = join_sampling_states(states, vocab_size)
        tokens = torch.empty(rows, dtype=torch.int64, device=CUDA)
        logprobs: tuple[Tensor, ...] = ()
        if (number := sampling.logprobs) is not None:
            of_likeliest = torch.empty(32, rows, number, device=CUDA)
            logprobs = torch.empty(32, rows, device=CUDA), of_likeliest, of_likeliest.long()
        state = [torch.empty(rows, 32, device=CUDA) for _ in range(2 * SHAPES[shape].num_layers)]
        drawn = torch.empty(32, rows, dtype=torch.int64, device=CUDA)
        buffers = Buffers(decoder, 0, 2, tokens, state, sampling, tokens.bool(), drawn, logprobs)
        item_bits.cache_clear()
        steps_in_place(buffers, 1)  # as before a capture: tables are made
        LAUNCHES.clear()
        with Operators() as operators:
            steps_in_place(buffers, 2)
        if isinstance(decoder, FusedDecoder):
            assert LAUNCHES.count("_layer") == 2 * 3 * (kind != "fused, by operators"), decoder.refusals
        yield f"{kind}, {shape}, {name}", operators


def reading() -> Iterator[tuple[str, Operators]]:
    """Yield the operators of a captured piece of prompts for each decoder that reads them."""
    for (kind, make), shape in itertools.product(decoders().items(), SHAPES):
        decoder = make(on_cuda(LSTMLanguageModel(SHAPES[shape], 300)).eval())
        if decoder.pieces is not None:
            with Operators() as operators:
                decoder.pieces._read_piece()
            yield f"{kind}, {shape}", operators


# --- training --------------------------------------------------------------------------------------------------------


class FakeAccelerator:
    """The part of Accelerate that a step of one process calls, without its backward pass."""

    device, num_processes, scaler, is_main_process = CUDA, 1, None, True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def no_sync(self, _: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, _: Tensor) -> None:
        for parameter in self.model.parameters():
            gradient = torch.zeros_like(parameter.detach())
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def unscale_gradients(self) -> None:
        pass

    def clip_grad_norm_(self, parameters: Any, most: float) -> Tensor:
        return nn.utils.clip_grad_norm_(list(parameters), most)


class FakeOptimizer:
    """The part of Accelerate's optimizer that a step calls."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.step = optimizer, optimizer.step
        self.zero_grad = partial(optimizer.zero_grad, set_to_none=True)

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups


def fake_lstm(x: Tensor, state: Any, weights: Any, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the shapes of torch.lstm's, which depend on all that it reads."""
    weight_ih, weight_hh, bias = weights[:3]
    size = weight_hh.shape[1]
    y = (x @ weight_ih.T)[..., :size] + (state[0][0] @ weight_hh.T)[:, None, :size] + bias[:size]
    return y, y[:, -1][None], state[1] + y[:, -1][None]


def fused_adam(*args: Any, original: Callable[..., None], lr: Any, found_inf: Any = None, **kwargs: Any) -> None:
    """Check what fake tensors cannot: Adam's learning rate and flag are on the device, in its dtype."""
    if isinstance(lr, Tensor):
        assert (lr.device, lr.dtype, found_inf.device) == (CUDA, torch.float32, CUDA)
    else:
        original(*args, lr=lr, found_inf=found_inf, **kwargs)


EVERYTHING: dict[str, Any] = {"dropout": 0.2, "weight_drop": 0.3, "layer_norm": True, "residual": True}
TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "everything": (EVERYTHING, {"max_grad_norm": 0.5, "ema_decay": 0.9, "gradient_accumulation_steps": 2}),
}


class NoLaunch:
    """Stands for a Triton kernel: takes its arguments, which are all of the device, and computes nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **_: Any) -> None:
            assert {value.device for value in args if isinstance(value, Tensor)} == {CUDA}

        return launch


def triton_kernels() -> ModuleType | None:
    """Return Triton's kernels for a training step, none of which is launched; None without Triton."""
    if find_spec("triton") is None:
        return None
    from textgen.kernels import triton_training

    torch.cuda.device_of = lambda _: nullcontext()  # type: ignore[assignment, misc]
    for name in ("_drop", "_weight_mask", "_cross_entropy"):
        setattr(triton_training, name, NoLaunch())
    return triton_training


def training() -> Iterator[tuple[str, Operators]]:
    """Yield the operators of a captured step for each training, and for one with Triton's kernels, if they are here."""
    training_kernels.compiled_code = fused.kernels = lambda *_: None  # type: ignore[assignment]
    torch.lstm = fake_lstm
    torch._fused_adam_ = partial(fused_adam, original=torch._fused_adam_)
    for name, dtype in itertools.product(TRAININGS, (None, torch.bfloat16)):
        yield f"{name}, {dtype}", captured_step(name, dtype)
    if (triton := triton_kernels()) is not None:
        fused.kernels = lambda _: triton  # type: ignore[assignment]
        yield "everything, Triton", captured_step("everything", torch.bfloat16)


def captured_step(name: str, dtype: torch.dtype | None) -> Operators:
    """Return the operators of a captured step of a training."""
    rows, vocab_size = 8, 300
    shape, more = TRAININGS[name]
    micro = more.get("gradient_accumulation_steps", 1)
    model_config = ModelConfig(embedding_dim=16, hidden_size=32, num_layers=3, **shape)
    config = TrainConfig(batch_size=rows * micro, seq_len=16, model=model_config, **more)
    model = on_cuda(LSTMLanguageModel(model_config, vocab_size), requires_grad=True)
    average = on_cuda(LSTMLanguageModel(model_config, vocab_size)) if config.ema_decay is not None else None
    optimizer: Any = FakeOptimizer(build_optimizer(model, config))
    found: list[Operators] = []

    def capture(work: Callable[[], None]) -> Any:
        for group in optimizer.param_groups:
            group["capturable"] = True
        torch.cuda.is_current_stream_capturing = lambda: True
        with Operators() as operators:
            work()
        torch.cuda.is_current_stream_capturing = lambda: False
        for group in optimizer.param_groups:
            group["capturable"] = False
        found.append(operators)
        return lambda: None

    learner = Learner(
        config=config,
        accelerator=FakeAccelerator(model),  # type: ignore[arg-type]
        unwrapped_model=model,
        model=Prepared(model, dtype),
        optimizer=optimizer,
        average=average,
        progression=Progression(total_steps=100),
        nonfinite=torch.empty((), dtype=torch.bool, device=CUDA),
        graph=StepGraph(capture),
    )
    learner.lane_states = zero_lanes(learner)
    for step in range(WARM_UP + 1):
        learner.progression = dataclasses.replace(learner.progression, step=step)
        ids = torch.empty(rows, 16, dtype=torch.int64, device=CUDA)
        batches = [{"tokens": ids, "targets": ids, "lanes": ids[:, 0], "windows": ids[:, 1]}] * micro
        train_step(learner, batches)
    (operators,) = found
    return operators


class Prepared(nn.Module):
    """A model under autocast, as Accelerate prepares it."""

    def __init__(self, model: LSTMLanguageModel, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model does, in float32."""
        with torch.autocast("cuda", self.dtype, enabled=self.dtype is not None):
            out = self.model(*args, **kwargs)
        return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, out)


def planted() -> Iterator[tuple[str, Operators]]:
    """Yield the operators of work that no graph may hold."""
    x = torch.empty(3, device=CUDA)
    for name, work in {"number of the CPU": lambda: x + torch.ones(()), "copy to the CPU": lambda: x.to("cpu")}.items():
        with Operators() as operators:
            work()
        yield name, operators


def main() -> None:
    """Print a line of JSON for each case: what it is of, its name, the number of operators, and what is wrong."""
    pretend()
    for walk in (decoding, reading, training, planted):
        with torch.inference_mode(walk in (decoding, reading)), FakeTensorMode(allow_non_fake_inputs=False):
            for name, operators in walk():
                case = {"of": walk.__name__, "name": name, "operators": operators.count, "wrong": operators.wrong}
                print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
