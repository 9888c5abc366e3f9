"""The LSTM by AMX against torch's: its instructions are emulated (emulated_tiles.h). And when it is taken."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.train import Shape, textgen_steps
from tests.kernels.test_training_kernels import build, error, run, threads
from textgen.cli import train_main
from textgen.errors import TextgenError
from textgen.hardware import processor_flags
from textgen.kernels import amx
from textgen.kernels import compile as native
from textgen.kernels import training as training_kernels
from textgen.training import loop

HEADER = Path(__file__).with_name("emulated_tiles.h")
SOURCE = Path(training_kernels.__file__).with_name("training.cpp")
SHAPE = amx.LayerShape(lanes=3, steps=4, input_size=64, hidden_size=64, threads=1)


@pytest.fixture(scope="module")
def compilable() -> None:
    """Skip a test of compiled code where there is none."""
    if "avx512_bf16" not in processor_flags():  # what is around the tile instructions needs it
        pytest.skip("this processor has no AVX512-BF16")
    if not any(map(shutil.which, native.COMPILERS)):
        pytest.skip("there is no C++ compiler")


@pytest.fixture(scope="module")
def library(compilable: None, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FLAGS", (*native.FLAGS, "-include", str(HEADER)))
        return ctypes.CDLL(str(native.compiled(SOURCE, tmp_path_factory.mktemp("cache"))))


@pytest.fixture
def tiles(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train by AMX, emulated."""
    monkeypatch.setattr(training_kernels, "compiled_code", lambda: library)
    monkeypatch.setattr(training_kernels, "suits_lstm", lambda: True)
    monkeypatch.setattr(training_kernels, "has_amx", lambda: True)
    monkeypatch.setattr(amx, "is_faster", lambda shape, library: True)


# one lane, and every way in which 16 lanes of a tile, and two tiles, are filled or overlap
@pytest.mark.parametrize(
    ("lanes", "steps", "inputs"),
    [(1, 5, 32), (2, 2, 96), (15, 3, 64), (16, 3, 32), (17, 4, 64), (31, 2, 64), (32, 3, 64), (33, 3, 64), (50, 2, 32)],
)
def test_layer_by_amx_is_as_close_to_float32_as_torchs(tiles: None, lanes: int, steps: int, inputs: int) -> None:
    layer, x, state = build(lanes, steps, inputs)
    exact, seen = run(layer, x, state, low=False), run(layer, x, state, low=True)
    assert seen[0].grad_fn.by_amx  # type: ignore[union-attr]
    # measured 2026-11-29 on these shapes: at most 0.0063; torch 0.0066
    assert max(error(a, b) for a, b in zip(seen, exact, strict=True)) < 0.01


def test_masked_weights_by_amx_are_as_close_to_float32(tiles: None) -> None:
    layer, x, state = build(18, 4, 64)
    mask = (torch.rand_like(layer.weight_hh) > 0.5).float()
    grads = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y, _ = layer(x, state, mask)
        grads.append([y, *torch.autograd.grad(y.float().sin().sum(), [x, layer.weight_hh, layer.weight_ih])])
    assert y.grad_fn.by_amx
    assert not grads[1][2][mask == 0].any()
    assert max(error(a, b) for a, b in zip(*reversed(grads), strict=True)) < 0.01


def test_neither_threads_nor_other_lanes_change_a_bit_of_a_layer_by_amx(tiles: None) -> None:
    layer, x, state = build(37, 6, 64)
    with threads(1):
        alone = run(layer, x, state, low=True)
    with threads(2):
        both = run(layer, x, state, low=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
    for some in (slice(3, 5), slice(10, 30)):
        with torch.autocast("cpu", torch.bfloat16):
            part, _ = layer(x[some], (state[0][:, some], state[1][:, some]))
        assert torch.equal(part, alone[0][some])


def test_steps_by_amx_again_give_the_same_bits_and_the_losses_of_torchs_operators(
    tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, losses = [], []
    for way in ("amx", "amx", "torch"):
        if way == "torch":
            monkeypatch.setattr(training_kernels, "compiled_code", lambda: None)
        torch.manual_seed(3)
        steps = textgen_steps(Shape(300, 64, 64, 2, 20, 12), "bf16")
        losses.append(steps(5))
        weights.append([p.detach().clone() for p in steps.model.parameters()])  # type: ignore[attr-defined]
    AcceleratorState._reset_state(True)  # it would keep the precision for the next test
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert losses[0] != losses[2]
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)  # measured 2026-11-29 after one step: 3e-6


def test_what_amx_is_not_for_is_left_to_torch(tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(inputs: int, steps: int = 4) -> bool:
        layer, x, state = build(2, steps, inputs)
        return training_kernels.lstm(x, state, layer.weight_ih, layer.weight_hh, layer.bias) is None

    assert [left(64), left(48), left(64, steps=1)] == [False, True, True]
    with torch.no_grad():  # scores and texts do not depend on what a machine has measured
        assert left(64)
    monkeypatch.setattr(amx, "is_faster", lambda shape, library: False)
    assert left(64)


def test_the_code_compiles_to_amx_instructions(
    compilable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mamx-tile", "-mamx-bf16"))
    try:
        code = native.compiled(SOURCE, tmp_path / "cache")
    except subprocess.CalledProcessError as error:
        refusal: bytes = error.stderr
    else:
        assert re.search(rb"\xc4\xe2.\x5c", code.read_bytes(), re.DOTALL)  # TDPBF16PS
        ctypes.CDLL(str(code))
        return
    assert re.search(rb"(option|argument).*-mamx", refusal), "compilers before GCC 11 and clang 11 do not know AMX"


# --- the choice ------------------------------------------------------------------------------------------------------


def test_a_measurement_checks_the_result_and_times_both_ways(tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with threads(1):
        found = amx.measure(SHAPE, turns=2)
        assert found["error"] < amx.MAX_ERROR
        assert found["faster"] == (found["amx_ms"] < found["torch_ms"])
        monkeypatch.setattr(amx, "MAX_ERROR", found["error"])
        assert amx.measure(SHAPE) == {"faster": False, "error": found["error"]}


CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"  # as for an instruction that the processor lacks


def test_a_child_that_crashes_leaves_the_work_to_torch() -> None:
    told = amx.measure_in_child(SHAPE, ("-c", "import sys; print(sys.argv); print('{\"faster\": true}')"))
    assert told == {**SHAPE._asdict(), "faster": True}
    told = amx.measure_in_child(SHAPE, ("-c", CRASH))
    assert told["faster"] is False
    assert "SIGILL" in told["failed"]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print('hello')", "JSONDecodeError"),
        ("", "IndexError"),
        ("import no_such_module", "CalledProcessError"),
        ("import os; os.kill(os.getpid(), 9)", "CalledProcessError"),  # as for want of memory
    ],
)
def test_a_child_that_fails_in_another_way_is_asked_again(
    program: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measure = amx.measure_in_child
    monkeypatch.setattr(amx, "measure_in_child", lambda shape: measure(shape, ("-c", program)))
    monkeypatch.setattr(amx, "is_faster", functools.cache(amx.is_faster.__wrapped__))
    assert not amx.is_faster(SHAPE, tmp_path / "training-1.so")
    assert f"AMX is not measured: {reason}: " in caplog.text
    assert list(tmp_path.iterdir()) == []
    program = "print('{\"faster\": true}')"
    assert not amx.is_faster(SHAPE, tmp_path / "training-1.so"), "it changed in the midst of a run"
    amx.is_faster.cache_clear()  # as in the next process
    assert amx.is_faster(SHAPE, tmp_path / "training-1.so")


@pytest.mark.parametrize("call", ["mkdir", "rename"])
def test_a_cache_that_cannot_be_written_leaves_the_work_to_torch(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(amx, "measure_in_child", lambda shape: {"faster": True})
    monkeypatch.setattr(amx, "is_faster", amx.is_faster.__wrapped__)
    with monkeypatch.context() as patch:
        patch.setattr(Path, call, refuse)
        assert not amx.is_faster(SHAPE, tmp_path / "training-1.so")
    assert "Read-only file system" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert amx.is_faster(SHAPE, tmp_path / "training-1.so")


def test_a_measurement_is_made_once_and_the_first_of_two_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, made = tmp_path / "training-1.so", 0

    def measure(shape: amx.LayerShape) -> dict[str, bool]:
        nonlocal made
        made += 1
        if made == 2:  # while this process measures, another one has finished
            assert json.loads(next(tmp_path.glob("amx-*/measured.json")).read_text()) == {"faster": True}
        return {"faster": made == 1}

    monkeypatch.setattr(amx, "measure_in_child", measure)
    assert amx.is_faster(SHAPE, library)
    amx.is_faster.cache_clear()  # as in the next process
    assert amx.is_faster(SHAPE, library)
    assert made == 1
    kept = next(tmp_path.iterdir())
    answers = iter([False, True])  # the other was not ready at first
    monkeypatch.setattr(Path, "exists", lambda path: path != kept or next(answers))
    amx.is_faster.cache_clear()
    assert amx.is_faster(SHAPE, library)
    assert made == 2
    assert list(tmp_path.iterdir()) == [kept]
    monkeypatch.undo()
    amx.is_faster.cache_clear()


def test_amx_is_taken_only_if_asked_for_and_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = amx.is_wanted.__wrapped__
    monkeypatch.delenv("TEXTGEN_AMX", raising=False)
    monkeypatch.setattr(amx, "processor_flags", lambda: {"avx512_bf16", "amx_bf16"})
    monkeypatch.setattr(amx, "is_permitted", lambda: True)
    assert not wanted()
    monkeypatch.setenv("TEXTGEN_AMX", "1")
    assert wanted()
    for name, value in (("is_permitted", False), ("processor_flags", set())):
        monkeypatch.setattr(amx, name, lambda value=value: value)
        with pytest.raises(TextgenError, match=r"^`TEXTGEN_AMX` is 1, and this processor has no AMX"):
            wanted()
    monkeypatch.setenv("TEXTGEN_AMX", "yes")
    with pytest.raises(TextgenError, match=r"^`TEXTGEN_AMX` must be 1 or not set: yes$"):
        wanted()


def test_a_training_that_asks_for_amx_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "processor_flags", lambda: {"avx2"})
    monkeypatch.setenv("TEXTGEN_AMX", "1")
    amx.is_wanted.cache_clear()
    with pytest.raises(TextgenError, match="no AMX"):
        textgen_steps(Shape(300, 64, 64, 1, 2, 4), "no")
    AcceleratorState._reset_state(True)
    amx.is_wanted.cache_clear()


def test_such_a_training_ends_before_the_text_is_encoded(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(amx, "processor_flags", lambda: {"avx2"})
    monkeypatch.setattr(loop, "prepare_store", None)
    monkeypatch.setenv("TEXTGEN_AMX", "1")
    amx.is_wanted.cache_clear()
    with pytest.raises(SystemExit) as ended:
        train_main([*tiny_flags, "--run_dir", str(tmp_path / "run")])
    amx.is_wanted.cache_clear()
    assert ended.value.code == 2
    assert "error: `TEXTGEN_AMX` is 1, and this processor has no AMX" in capsys.readouterr().err


def test_linux_is_asked_for_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert amx.is_permitted() in ({False, True} if "amx_tile" in processor_flags() else {False})
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")  # where the number is that of getgroups
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(syscall=lambda *_: 0))
    assert not amx.is_permitted()
