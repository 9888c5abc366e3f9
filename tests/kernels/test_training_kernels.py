"""The compiled LSTM and cross-entropy against torch's operators, which stand in where there is no compiled code."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from benchmarks.train import Shape, textgen_steps
from textgen.hardware import processor_flags
from textgen.kernels import amx
from textgen.kernels import compile as native
from textgen.kernels import training as training_kernels
from textgen.model.lstm import LSTMLayer, State, cross_entropy_of_logits, summed_cross_entropy

# Both ways have the same tests. Where nothing is compiled, those of the compiled way alone are skipped.
WAYS = ["torch"] + ["compiled"] * (training_kernels.compiled_code() is not None)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute by compiled code, or by torch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(training_kernels, "compiled_code", lambda: None)
    return str(request.param)


@pytest.fixture
def compiled_lstm() -> None:
    """Skip a test of the compiled LSTM alone where there is none."""
    if training_kernels.compiled_lstm() is None:
        pytest.skip("no compiler, or this processor has no AVX512-BF16 or has AMX")


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def build(lanes: int, steps: int, inputs: int = 48, units: int = 128) -> tuple[LSTMLayer, Tensor, State]:
    torch.manual_seed(lanes)
    layer = LSTMLayer(inputs, units)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    state = torch.randn(1, lanes, units), torch.randn(1, lanes, units)
    return layer, torch.randn(lanes, steps, inputs, requires_grad=True), (state[0] / 2, state[1] / 2)


def run(layer: LSTMLayer, x: Tensor, state: State, *, low: bool) -> list[Tensor]:
    """Return output, state, and the gradients of input, state and weights."""
    state = state[0].clone().requires_grad_(), state[1].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y, (hidden, cell) = layer(x, state)
    loss = sum(
        (part.float() * torch.linspace(-1, 2, part.numel()).view(part.shape)).sum() for part in (y, hidden, cell)
    )
    assert isinstance(loss, Tensor)
    return [y, hidden, cell, *torch.autograd.grad(loss, [x, *state, layer.weight_ih, layer.weight_hh, layer.bias])]


def error(seen: Tensor, wanted: Tensor) -> float:
    return float((seen.detach().float() - wanted.detach()).norm() / wanted.detach().norm())


def test_the_code_is_compiled_where_processor_and_compiler_are_there() -> None:
    flags = processor_flags()
    try:
        native.compiled(Path(native.__file__).with_name("training.cpp"), native.CACHE.expanduser())
        compiles = True
    except (OSError, RuntimeError, subprocess.SubprocessError):  # no compiler, a torch without OpenMP, no cache
        compiles = False
    assert (training_kernels.compiled_code() is not None) == ("avx512f" in flags and compiles)
    of_lstm = "avx512_bf16" in flags and ("amx_bf16" not in flags or amx.is_wanted())
    assert (training_kernels.compiled_lstm() is not None) == (of_lstm and compiles)


F, BF16, AMX = {"avx2", "avx512f"}, {"avx2", "avx512f", "avx512_bf16"}, {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}


@pytest.mark.parametrize(
    ("flags", "asked", "loss", "lstm"),
    [
        (set(), False, False, False),
        ({"avx2"}, False, False, False),
        (F, False, True, False),
        (BF16, False, True, True),
        (AMX, False, True, False),
        (AMX, True, True, True),
    ],
)
def test_what_a_processor_takes_is_decided_by_its_flags(
    flags: set[str], asked: bool, loss: bool, lstm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = SimpleNamespace(textgen_lstm_forward=None)
    loaded, suits = training_kernels.compiled_code.__wrapped__, training_kernels.suits_lstm.__wrapped__
    monkeypatch.setattr(training_kernels, "processor_flags", lambda: flags)
    monkeypatch.setattr(training_kernels, "library", lambda source: code)
    monkeypatch.setattr(training_kernels, "compiled_code", loaded)
    monkeypatch.setattr(training_kernels, "suits_lstm", suits)
    monkeypatch.setattr(amx, "is_wanted", lambda: asked)
    assert (training_kernels.compiled_code() is code) == loss
    assert (training_kernels.compiled_lstm() is code) == lstm


# every number of rows that a tile may have, alone and after full ones
@pytest.mark.parametrize(("lanes", "steps"), [(1, 5), (2, 3), (3, 9), (5, 2), (7, 4), (8, 4), (13, 3), (20, 17)])
def test_layer_in_bfloat16_is_as_close_to_float32_as_torchs(way: str, lanes: int, steps: int) -> None:
    layer, x, state = build(lanes, steps)
    exact, seen = run(layer, x, state, low=False), run(layer, x, state, low=True)
    assert [t.dtype for t in seen[:3]] == [torch.bfloat16] * 3
    assert {t.dtype for t in seen[3:]} == {torch.float32}
    # measured 2026-11-23 on these shapes: torch at most 0.0068, compiled at most 0.0064
    assert max(error(a, b) for a, b in zip(seen, exact, strict=True)) < 0.01


def test_neither_threads_nor_other_lanes_change_a_bit_of_a_layer(compiled_lstm: None) -> None:
    layer, x, state = build(9, 6)
    with threads(1):
        alone = run(layer, x, state, low=True)
    with threads(2):
        both = run(layer, x, state, low=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        part, _ = layer(x[3:5], (state[0][:, 3:5], state[1][:, 3:5]))
    assert torch.equal(part, alone[0][3:5])


def test_a_layer_without_gradient_gives_the_same_bits(way: str) -> None:
    layer, x, state = build(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = layer(x, state)
        with torch.no_grad():
            seen, (hidden, _) = layer(x, state)
    assert torch.equal(seen, wanted)
    assert torch.equal(hidden[0], seen[:, -1])
    assert not seen.requires_grad


def test_shapes_that_do_not_fit_are_an_error(way: str) -> None:
    """Torch's own kernel reads beyond them."""
    layer, x, state = build(4, 3)
    short, wide = (state[0][:, :1], state[1][:, :1]), torch.cat([x, x], 2)
    for inputs, before in ((x, short), (wide, state)):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="do not fit the layer"):
            layer(inputs, before)


def test_a_compiler_that_does_not_know_the_processor_leaves_the_work_to_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-avx512f"))
    monkeypatch.setattr(native, "CACHE", tmp_path / "cache")
    with caplog.at_level("INFO", logger="textgen"):
        assert native.library.__wrapped__("training.cpp") is None
    assert "knows no registers of 512 bits" in caplog.text


@pytest.fixture(scope="module")
def without_bf16(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile for processors with AVX512 and without AVX512-BF16, as many of Intel's are."""
    if training_kernels.compiled_code() is None:
        pytest.skip("no compiler, or this processor has no AVX512")
    source = Path(training_kernels.__file__).with_name("training.cpp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FLAGS", [flag.replace("=native", "=skylake-avx512") for flag in native.FLAGS])
        return ctypes.CDLL(str(native.compiled(source, tmp_path_factory.mktemp("cache"))))


def test_a_compiler_that_knows_no_avx512_bf16_leaves_the_lstm_to_torch(
    without_bf16: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_kernels, "compiled_code", lambda: without_bf16)
    monkeypatch.setattr(training_kernels, "suits_lstm", lambda: True)
    layer, x, state = build(2, 4)
    assert training_kernels.lstm(x, state, layer.weight_ih, layer.weight_hh, layer.bias) is None
    assert training_kernels.cross_entropy(torch.zeros(2, 8), torch.zeros(8), torch.tensor([1, 2]), None) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_has_the_same_bits_on_processors_without_avx512_bf16(
    without_bf16: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows, size = 300, 500
    logits, bias, targets = torch.randn(rows, size), torch.randn(size), torch.randint(0, size, (rows,))
    logits *= torch.logspace(-3, 3, rows)[:, None]  # to gradients of 0 and 1, and to subnormal ones
    logits[-1] = 1.0  # equal
    for row, value in enumerate((float("nan"), -float("nan"), float("inf"), float("-inf"))):
        logits[row, 3], logits[row + 4, size - 1], logits[row + 8] = value, value, value
    targets[20::7] = -1
    last_nan = torch.full((size,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounding up would overflow
    found: list[list[Tensor]] = []
    for code in (training_kernels.compiled_code(), without_bf16):
        monkeypatch.setattr(training_kernels, "compiled_code", lambda code=code: code)
        found.append([])
        for some_bias in (bias, last_nan):
            grad_logits, grad_bias = logits.to(dtype, copy=True), torch.zeros(size)
            nats = training_kernels.cross_entropy(grad_logits, some_bias, targets, grad_bias)
            assert nats is not None
            found[-1] += [t.view(torch.uint8) for t in (nats, grad_logits, grad_bias)]  # nan is not equal to itself
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_second_backward_pass_is_refused_and_not_wrong(compiled_lstm: None) -> None:
    layer, x, state = build(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x, state)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        y.sum().backward()


@pytest.mark.parametrize(("inputs", "units", "steps"), [(48, 96, 4), (40, 128, 4), (48, 128, 1)])
def test_sizes_that_do_not_fill_registers_and_single_steps_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, inputs: int, units: int, steps: int
) -> None:
    layer, x, state = build(2, steps, inputs, units)
    assert training_kernels.lstm(x, state, layer.weight_ih, layer.weight_hh, layer.bias) is None
    assert error(run(layer, x, state, low=True)[0], run(layer, x, state, low=False)[0]) < 0.01


# 500 logits leave 4 behind the last whole register
@pytest.mark.parametrize("size", [500, 512, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nats_and_gradients_are_those_of_torchs_cross_entropy(way: str, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    logits, bias = (torch.randn(33, size) * 5).to(dtype), torch.randn(size)
    targets = torch.randint(0, size, (33,))
    targets[[0, 7, 32]] = -1
    targets[1] = size - 1
    exact = (logits.float() + bias).requires_grad_()
    wanted = nn.functional.cross_entropy(exact, targets, ignore_index=-1, reduction="sum")
    wanted.backward()
    grad_bias = torch.ones(size)
    nats, grad_logits = cross_entropy_of_logits(logits.clone(), bias, targets, grad_bias)
    assert exact.grad is not None
    assert nats.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert grad_logits.dtype == dtype
    torch.testing.assert_close(
        grad_logits.float(), exact.grad, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-7
    )
    torch.testing.assert_close(grad_bias, 1 + exact.grad.sum(0), rtol=1e-5, atol=1e-5)
    assert cross_entropy_of_logits(logits.clone(), bias, targets, None)[0].item() == nats.item()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_makes_the_loss_none(way: str, value: float) -> None:
    for place in (0, 3, 19):  # in the first register, and in what is left over
        x, weight = torch.ones(2, 1), torch.zeros(20, 1)
        weight[place] = value
        assert not summed_cross_entropy(x, weight, torch.zeros(20), torch.tensor([1, 5])).isfinite()


def test_an_lstm_tells_on_what_is_no_number(way: str) -> None:
    layer, x, state = build(3, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x[1, 2, 0] = float("nan")
        y, _ = layer(x, state)
    assert y[1, 2:].isnan().all()
    assert y[1, :2].isfinite().all()
    assert y[[0, 2]].isfinite().all()


def test_a_target_beyond_the_vocabulary_is_refused(way: str) -> None:
    with pytest.raises((IndexError, RuntimeError), match=r"vocabulary's size 20|out of bounds"):
        summed_cross_entropy(torch.ones(2, 3), torch.zeros(20, 3), torch.zeros(20), torch.tensor([1, 20]))


def test_the_same_steps_again_give_the_same_bits(way: str) -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        steps = textgen_steps(Shape(300, 64, 64, 2, 8, 12), "bf16")
        steps(5)
        weights.append([p.detach().clone() for p in steps.model.parameters()])  # type: ignore[attr-defined]
    AcceleratorState._reset_state(True)  # it would keep the precision for the next test
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
