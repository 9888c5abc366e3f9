"""Steps from fixed addresses against steps as they come, bit for bit. No graph here, but everything around one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.test_training import assert_same_bits, flags_for, newest, refusal, steps_and_losses
from textgen.cli import train_main
from textgen.config import TrainConfig
from textgen.errors import TextgenError
from textgen.kernels import training as training_kernels
from textgen.kernels.capture import Replay
from textgen.noise import hash_bits, uniform
from textgen.training import loop as training
from textgen.training.cuda_graph import WARM_UP, StepGraph
from textgen.training.setup import Training, refuse_graph
from textgen.training.step import Learner

pytestmark = pytest.mark.usefixtures("settings_of_a_new_process")

EVERYTHING = [
    "--model.dropout", "0.2", "--model.weight_drop", "0.3", "--model.layer_norm", "--model.residual",
    "--max_grad_norm", "0.5", "--ema_decay", "0.9", "--weight_decay", "0.01", "--lr_schedule", "cosine",
    "--warmup_steps", "5", "--seq_len", "64", "--batch_size", "16", "--evaluate_every", "7", "--max_steps", "40",
]  # fmt: skip


class Captures:
    """Stands where steps are captured: makes the plain function of a capture, and keeps count."""

    def __init__(self) -> None:
        self.made = self.replays = 0
        self.run: Callable[[Callable[[], None]], None] = lambda work: work()

    def __call__(self, work: Callable[[], None]) -> Replay:
        self.made += 1

        def replay() -> None:
            self.replays += 1
            self.run(work)

        return replay


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Have trainings take their steps from graphs, as `cuda_graph` does on a GPU."""
    made = Captures()
    original = training.build

    def build(*args: Any) -> Training:
        built = original(*args)
        built.learner.graph = StepGraph(made)
        return built

    monkeypatch.setattr(training, "build", build)
    return made


@pytest.fixture
def plainly(tiny_flags: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that trains without graphs; to be asked for before `captures`."""
    build = training.build

    def train(*flags: str, name: str = "plain") -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "build", build)
            train_main(flags_for(tiny_flags, tmp_path / name, *flags))
        return tmp_path / name

    return train


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--gradient_accumulation_steps", "2"],
        ["--model.dropout", "0", "--model.weight_drop", "0", "--max_grad_norm", "null", "--ema_decay", "null"],
    ],
    ids=["everything", "accumulation", "nothing"],
)
def test_a_training_from_graphs_is_the_one_without(
    plainly: Callable[..., Path],
    captures: Captures,
    tiny_flags: list[str],
    tmp_path: Path,
    precision: str,
    more: list[str],
) -> None:
    """Weights, averages, Adam's state, lane states and metrics, across an epoch's end and evaluations."""
    flags = [*EVERYTHING, *more, "--mixed_precision", precision]
    plain = plainly(*flags)
    train_main(flags_for(tiny_flags, tmp_path / "graphs", *flags))
    assert (captures.made, captures.replays) == (1, 40 - WARM_UP)
    assert steps_and_losses(tmp_path / "graphs") == steps_and_losses(plain)
    assert_same_bits(tmp_path / "graphs", plain)
    told = json.loads((newest(plain) / "trainer.json").read_text())["progression"]
    assert told["epoch_tokens"] != 40 * 64 * 16, "the run should cross an epoch's end"
    assert json.loads((newest(tmp_path / "graphs") / "trainer.json").read_text())["progression"] == told


def test_resume_with_graphs_equals_the_uninterrupted_run_without(
    plainly: Callable[..., Path], captures: Captures, tiny_flags: list[str], tmp_path: Path
) -> None:
    """Stopped before there is a graph, right after, and later; once it goes on without any."""
    plain = plainly(*EVERYTHING, "--lr_schedule", "constant")
    parts = flags_for(tiny_flags, tmp_path / "parts", *EVERYTHING, "--lr_schedule", "constant")
    for stop in ("2", "6", "22"):
        train_main([*parts, "--max_steps", stop])
    plainly(*EVERYTHING, "--lr_schedule", "constant", "--max_steps", "27", name="parts")
    train_main([*parts, "--max_steps", "40"])
    assert captures.made == 3
    assert steps_and_losses(tmp_path / "parts") == steps_and_losses(plain)
    assert_same_bits(tmp_path / "parts", plain)


def test_timed_steps_from_a_graph_leave_no_trace(
    plainly: Callable[..., Path], captures: Captures, tiny_flags: list[str], tmp_path: Path
) -> None:
    """The graph that is timed is another one than the training's, which has its Adam state elsewhere."""
    timed = tmp_path / "timed"
    train_main(flags_for(tiny_flags, timed, *EVERYTHING, "--lr_schedule", "constant", "--max_minutes", "0.02"))
    rows = steps_and_losses(timed)
    assert captures.made == 2
    assert captures.replays > len(rows) - WARM_UP
    plain = plainly(*EVERYTHING, "--lr_schedule", "constant", "--max_steps", str(len(rows)))
    assert rows == steps_and_losses(plain)
    assert_same_bits(timed, plain)


def test_step_that_cannot_be_captured_is_taken_without(
    plainly: Callable[..., Path],
    captures: Captures,
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With one warning, and no second try."""
    tried = []

    def refuse(work: Callable[[], None]) -> Replay:
        tried.append(work)
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    plain = plainly(*EVERYTHING)
    monkeypatch.setattr(Captures, "__call__", lambda _, work: refuse(work))
    with caplog.at_level(logging.WARNING, "textgen"):
        train_main(flags_for(tiny_flags, tmp_path / "run", *EVERYTHING))
    assert len(tried) == 1
    assert StepGraph(lambda work: work).is_refused is False
    assert [message for message in caplog.messages if "captured" in message] == [
        "the step cannot be captured in a CUDA graph, so each step runs without one: "
        "operation not permitted when stream is capturing"
    ]
    assert_same_bits(tmp_path / "run", plain)


def test_loss_that_is_not_finite_is_told_as_without_a_graph(
    plainly: Callable[..., Path],
    captures: Captures,
    tiny_flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The step, the lanes, and what it was; the weights are still those before it."""
    flags = ["--learning_rate", "1e38", "--max_steps", "12", "--warmup_steps", "1000000", "--log_every", "50"]
    flags += ["--evaluate_every", "1000", "--gradient_accumulation_steps", "2"]
    with pytest.raises(SystemExit):
        plainly(*flags)
    plain_error = capsys.readouterr().err
    error = refusal(flags_for(tiny_flags, tmp_path / "graphs", *flags), capsys)
    assert error in plain_error
    assert "turned to nan or infinity in step" in error
    first, other = (json.loads((tmp_path / name / "nonfinite.json").read_text()) for name in ("plain", "graphs"))
    assert first == other


def test_what_a_step_told_is_not_overwritten_by_the_next(
    captures: Captures, tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `recent`, the last two steps, both are kept: the host reads them late."""
    seen: list[list[tuple[int, float, float]]] = []
    original = training.train_step

    def step(made: Learner, *args: Any, **options: Any) -> torch.Tensor:
        nats = original(made, *args, **options)
        seen.append([(t.step, float(t.parts[0][1]), float(t.norm if t.norm is not None else -1)) for t in made.recent])
        assert float(nats) == sum(float(part) for _, part in made.recent[-1].parts)
        return nats

    monkeypatch.setattr(training, "train_step", step)
    train_main(flags_for(tiny_flags, tmp_path / "run", "--max_steps", "12"))
    assert len(seen) == 12
    for before, after in pairwise(seen):
        assert after[0] == before[-1]
    assert [taken[-1][0] for taken in seen] == list(range(12))


# --- what a graph can hold -------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Notes the names of all operators of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


# They wait for a GPU, or copy from memory of the host that will be another one at the next replay.
NOT_IN_A_GRAPH = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero"}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_captured_step_asks_nothing_of_the_device(
    captures: Captures, tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """By torch's operators alone, as on a GPU; compiled kernels of a CPU may look at their targets."""
    monkeypatch.setattr(training_kernels, "compiled_code", lambda: None)
    operators = Operators()

    def run(work: Callable[[], None]) -> None:
        with operators:
            work()

    captures.run = run
    train_main(flags_for(tiny_flags, tmp_path / "run", *EVERYTHING, "--mixed_precision", precision, "--max_steps", "5"))
    assert {"_fused_adam_", "embedding", "_foreach_lerp_", "stack"} <= operators.seen, sorted(operators.seen)
    assert operators.seen & NOT_IN_A_GRAPH == set()


def test_noise_at_a_step_in_a_tensor_is_that_at_the_number() -> None:
    lanes = torch.arange(7)
    for step in (0, 1, 123456789, (1 << 40) + 3):
        for site in (0, 3, -2):
            assert torch.equal(hash_bits(42, torch.tensor(step), site, lanes), hash_bits(42, step, site, lanes))
            assert torch.equal(uniform(42, torch.tensor(step), site, lanes), uniform(42, step, site, lanes))


# --- where there can be none -----------------------------------------------------------------------------------------


def test_a_graph_is_refused_on_a_cpu(tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(flags_for(tiny_flags, tmp_path / "run", "--cuda_graph"), capsys)
    assert error == "error: `cuda_graph` needs a GPU, and this training runs on the device cpu"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("processes", "precision", "message"),
    [
        (2, "bf16", "`cuda_graph` is for one process, and there are 2: leave it out"),
        (1, "fp16", "`cuda_graph` does not work with mixed_precision fp16, .*`--mixed_precision bf16`"),
        (1, "bf16", None),
        (1, "no", None),
    ],
)
def test_a_graph_is_refused_with_what_it_cannot_hold(processes: int, precision: str, message: str | None) -> None:
    world: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=processes, mixed_precision=precision)
    refuse_graph(TrainConfig(), world)
    if message is None:
        refuse_graph(TrainConfig(cuda_graph=True), world)
    else:
        with pytest.raises(TextgenError, match=message):
            refuse_graph(TrainConfig(cuda_graph=True), world)
