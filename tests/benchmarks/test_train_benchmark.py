"""What `python -m benchmarks.train` does on a GPU, as far as it needs none."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from benchmarks import machine, train
from benchmarks.train import CUDA_SHAPES, WAYS, FlashLSTM, Shape, plain_steps, put_beside, step_floor, worker
from textgen.training import setup
from textgen.training.cuda_graph import WARM_UP

SMALL = Shape(vocab_size=60, embedding_dim=8, hidden_size=16, num_layers=2, batch_size=4, seq_len=6)
MICROSECONDS = {"1024 units, bfloat16, batch 128": {"stack": 10.0, "call": 9.0}}


def test_the_first_shape_is_that_of_the_large_preset() -> None:
    from textgen.commands.parsing import parse_train_config

    config = parse_train_config(["--config", "large"])
    model = config.model
    assert next(iter(CUDA_SHAPES.items())) == (
        "large",
        Shape(
            config.tokenizer.vocab_size, model.embedding_dim, model.hidden_size, model.num_layers, config.batch_size,
            config.seq_len,
        ),
    )  # fmt: skip


def test_floor_of_a_step_is_its_time_steps_one_after_the_other() -> None:
    shape = CUDA_SHAPES["3 x 1024"]
    assert step_floor(shape, MICROSECONDS, "bf16") == pytest.approx(256 * 3 * 10e-6)
    assert step_floor(shape, MICROSECONDS, "fp16") is None
    assert step_floor(CUDA_SHAPES["large"], MICROSECONDS, "bf16") is None


def test_speeds_stand_beside_the_devices_rate_the_floor_and_the_plain_loop() -> None:
    shape = CUDA_SHAPES["3 x 1024"]
    seconds = 0.02
    speed = {
        "textgen, bf16": {"tokens_per_second": shape.tokens / seconds},
        "textgen, fp16": {"tokens_per_second": 2 * shape.tokens / seconds},
        "accelerate loop, bf16": {"tokens_per_second": 0.5 * shape.tokens / seconds},
    }
    figures = put_beside(speed, shape, 4 * shape.flops / seconds, MICROSECONDS)
    assert figures["textgen, bf16"] == {
        "tokens_per_second": shape.tokens / seconds, "share_of_bf16_rate": 0.25, "times_the_floor": 2.6,
        "times_the_plain_loop": 2.0,
    }  # fmt: skip
    assert figures["textgen, fp16"]["share_of_bf16_rate"] == 0.5
    assert "times_the_floor" not in figures["textgen, fp16"]
    assert figures["accelerate loop, bf16"]["times_the_plain_loop"] == 1
    assert "times_the_plain_loop" not in put_beside({"x, no": {"tokens_per_second": 1.0}}, shape, 1.0, {})["x, no"]


def test_what_tells_most_is_measured_first_and_nothing_twice() -> None:
    first, rest = train.in_order(CUDA_SHAPES)
    assert {precision for _, _, precision in first} == {"bf16", "fp16"}
    assert {way for _, way, _ in first} == {way for way in WAYS if way.startswith(("textgen", "accelerate"))}
    assert {case[0] for case in first} == set(CUDA_SHAPES)
    flash = [way.startswith("FlashRNN") for _, way, _ in rest]
    assert flash == sorted(flash, reverse=True)
    assert sum(flash) == 2 * len(CUDA_SHAPES)
    assert len({*first, *rest}) == len(first) + len(rest)


def test_ways_that_are_chosen_are_measured_alone() -> None:
    first, rest = train.in_order({"small": SMALL}, ["textgen", "FlashRNN, fused"])
    assert {way for _, way, _ in (*first, *rest)} == {"textgen", "FlashRNN, fused"}


def test_ways_of_a_gpu_are_left_out_without_one() -> None:
    ways = {way for way, _ in train.variants(SMALL, cuda=False)}
    assert ways == {"textgen", "textgen, not compiled", "accelerate loop"}


def test_what_is_measured_on_a_gpu_is_saved_and_what_is_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each figure as it comes; losses and the parts of a step after what tells most, before the rest."""
    done: list[str] = []

    def measure(title: str, shape: Shape, way: str, precision: str, **options: Any) -> dict[str, float] | None:
        assert options["until"] <= time.monotonic() + 60
        done.append(f"{way}, {precision}")
        return None if way.startswith("FlashRNN") else {"tokens_per_second": 1000.0}

    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(train, "measure_alone", measure)
    monkeypatch.setattr(train, "gemm_rate", lambda *_: 1e12)
    monkeypatch.setattr(train, "time_step_microseconds", lambda *_: MICROSECONDS)
    monkeypatch.setattr(train, "examine", lambda *_, until: done.append("examine"))
    monkeypatch.setattr(train, "save", lambda name, figures: saved.append(figures))
    figures: dict[str, Any] = {"small": {"left_out": ["of another day"]}}
    train.measure_on_cuda({"small": SMALL}, figures, "train_cuda", minutes=1, rounds=1, steps=None)
    left_out = ["FlashRNN, fused, bf16", "FlashRNN, alternating, bf16"]
    assert figures["small"]["left_out"] == left_out
    assert figures["small"]["speed"]["textgen, graph, bf16"]["times_the_plain_loop"] == 1
    assert set(done) == {*figures["small"]["speed"], *left_out, "examine"}
    assert done.index("textgen, fp16") < done.index("examine") < done.index(left_out[0]) < done.index("textgen, no")
    assert "`nn.LSTM` in float16" in figures["note"]
    assert len(saved) == len(done)
    assert saved[-1] is figures


def test_layers_in_one_call_train_like_layers_one_by_one() -> None:
    losses = []
    for way in ("textgen", "textgen, one LSTM call"):
        torch.manual_seed(0)
        losses.append([WAYS[way](SMALL, "no")(steps) for steps in (1, 5)])
    AcceleratorState._reset_state(True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][0] != losses[0][1]


def test_steps_that_are_not_compiled_ask_for_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = train.without_kernels_steps(SMALL, "no")
    monkeypatch.setattr(train.fused, "kernels", None)  # cannot be called
    monkeypatch.setattr(train.training_kernels, "compiled_code", None)
    steps(1)
    AcceleratorState._reset_state(True)
    assert train.fused.kernels is None


def test_a_process_is_ended_when_its_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    with worker("quick", "textgen", "no", until=started) as run:
        assert run(1) is None
    told = train.measure_alone("quick", SMALL, "textgen", "no", rounds=1, steps=1, until=started)
    assert told is None
    assert "textgen, no is left out at quick" in capsys.readouterr().out
    assert time.monotonic() - started < 60


def flash_kernel(
    gates: Tensor, weight: Tensor, bias: Tensor, *, states: Tensor | None, function: str
) -> tuple[Tensor, Tensor]:
    """Compute what FlashRNN's README says of its function, with the shapes it says: one head, no kernel."""
    assert function == "lstm"
    batch, steps, four, heads, size = gates.shape
    assert (four, heads, weight.shape, bias.shape) == (4, 1, (4, 1, size, size), (4, 1, size))
    if states is None:
        states = gates.new_zeros(2, batch, 1, 1, size)
    assert states.shape == (2, batch, 1, 1, size)
    hidden, cell = (part[:, 0, 0] for part in states)
    made = []
    for t in range(steps):
        i, f, z, o = (gates[:, t, g, 0] + hidden @ weight[g, 0] + bias[g, 0] for g in range(4))
        cell = f.sigmoid() * cell + i.sigmoid() * z.tanh()
        hidden = o.sigmoid() * cell.tanh()
        made.append(torch.stack([hidden, cell])[:, :, None])
    states = torch.stack(made, 2)  # (2, batch, time, 1, units)
    return states, states[:, :, -1:]


def test_layers_over_flashrnns_kernel_are_those_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = FlashLSTM(flash_kernel, SMALL), nn.LSTM(8, 16, 2, batch_first=True)
    with torch.no_grad():
        for i in range(2):
            getattr(theirs, f"weight_ih_l{i}").copy_(ours.inputs[i].weight)
            getattr(theirs, f"weight_hh_l{i}").copy_(ours.recurrent[i][:, 0].transpose(1, 2).flatten(0, 1))
            getattr(theirs, f"bias_ih_l{i}").zero_()
            getattr(theirs, f"bias_hh_l{i}").zero_()
    x = torch.randn(4, 12, 8)
    first, state = ours(x[:, :6], None)
    second, _ = ours(x[:, 6:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), theirs(x)[0])


def test_a_way_over_flashrnns_kernel_trains() -> None:
    def model(shape: Shape) -> Any:
        plain = train.PlainModel(shape)
        plain.lstm = FlashLSTM(flash_kernel, shape)
        return plain

    steps = plain_steps(SMALL, "no", model)
    try:
        before = steps(1)
        assert steps(200) < before - 0.1
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("refused", [True, False])
def test_steps_without_their_graph_are_not_measured_as_steps_with_one(
    monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """The first steps are taken before there is a graph; the step that should make it raises."""

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        if refused:
            raise RuntimeError("the work waits")
        return work

    monkeypatch.setattr(setup, "capture_on", lambda *_: capture)
    steps = train.textgen_steps(SMALL, "no", cuda_graph=True)
    steps(WARM_UP)
    if refused:
        with pytest.raises(RuntimeError, match="the step could not be captured in a CUDA graph"):
            steps(1)
    else:
        steps(1)


def test_machine_without_git_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.describe()["commit"] == ""
