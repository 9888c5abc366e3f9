"""Losses and gradients that are no numbers: the training ends, tells where, and nothing of it is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from tests.faults.jobs import Job, fault, newest, rows
from textgen.cli import train_main
from textgen.commands.parsing import parse_train_config
from textgen.data.store import prepare_store
from textgen.distributed import launch
from textgen.distributed.signals import StopSignals
from textgen.runs.directory import read_status
from textgen.training import loop as training
from textgen.training.loop import MAX_SKIPS_IN_A_ROW, describe_nonfinite
from textgen.training.setup import Training, build
from textgen.training.step import Learner, step_batches, train_step

Capture = pytest.CaptureFixture[str]

INITIAL_SCALE = 2.0**30
FLAGS = ["--max_steps", "12", "--evaluate_every", "5", "--log_every", "1", "--sample_tokens", "12"]


def test_learning_rate_that_overflows_ends_with_step_and_lanes_and_nothing_newer(
    tiny_flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    run_dir = tmp_path / "run"
    command = [*tiny_flags, *FLAGS, "--run_dir", str(run_dir)]
    train_main([*command, "--max_steps", "5"])
    good = load_file(newest(run_dir) / "model.safetensors")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train_main([*command, "--learning_rate", "1e38", "--resume_override"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the loss turned to nan or infinity in step 7, lanes 0-7 (`nonfinite.json`)")
    found = json.loads((run_dir / "nonfinite.json").read_text())
    assert found == {"step": 7, "epoch": 0, "window": 6, "quantity": "loss", "lanes": [[0, 7]]}
    assert read_status(run_dir)["state"] == "failed"
    assert newest(run_dir).name == "step-000005"
    kept = load_file(newest(run_dir) / "model.safetensors")
    assert all(torch.equal(kept[name], good[name]) and bool(kept[name].isfinite().all()) for name in good)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["nan loss", "nan embedding"])
def test_nan_on_one_process_stops_all_at_that_step_and_names_its_lanes(
    what: str, tiny_flags: list[str], tmp_path: Path
) -> None:
    """In the loss alone, where the gradient would have gone on, and in what the model computes."""
    place = "updating" if what == "nan loss" else "stepping"
    job = Job([*tiny_flags, *FLAGS], tmp_path / "run", fault(what, at=place, call=7, rank=1), processes=2)
    assert job.end() != 0
    assert job.left() == []
    found = json.loads((job.run_dir / "nonfinite.json").read_text())
    assert found == {"step": 7, "epoch": 0, "window": 6, "quantity": "loss", "lanes": [[4, 7]]}
    line, *more = job.errors()
    assert line.startswith("the loss turned to nan or infinity in step 7, lanes 4-7 ")
    assert more in ([], [f"process 1: {line}"]), "which speaks, too, where the launcher is slow to end it"
    assert (job.status["state"], job.status["reason"]) == ("failed", line)
    assert newest(job.run_dir).name == "step-000005"
    assert rows(job.run_dir)[-1]["step"] <= 6


@pytest.mark.slow
def test_overflow_on_two_processes_ends_both(tiny_flags: list[str], tmp_path: Path) -> None:
    job = Job([*tiny_flags, *FLAGS, "--learning_rate", "1e38"], tmp_path / "run", processes=2)
    assert job.end() != 0
    assert job.left() == []
    assert json.loads((job.run_dir / "nonfinite.json").read_text())["lanes"] == [[0, 3], [4, 7]]
    assert "turned to nan or infinity" in job.errors()[0]
    assert list((job.run_dir / "checkpoints").glob("*")) == []


# --- float16's scaler ------------------------------------------------------------------------------------------------


@pytest.fixture
def scaled(tiny_flags: list[str], tmp_path: Path) -> Training:
    """Return a training with a gradient scaler and float16 gradients, which Accelerate makes on a GPU only.

    The scale is one at which they overflow until it has been halved a few times.
    """
    config = parse_train_config([*tiny_flags, "--max_steps", "200", "--run_dir", str(tmp_path / "run")])
    accelerator = launch.start("no", batch_size=config.batch_size)
    made = build(config, accelerator, prepare_store(config.data, config.tokenizer), StopSignals())
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE, growth_interval=1_000_000)
    for parameter in made.learner.unwrapped_model.parameters():
        parameter.register_hook(lambda gradient: gradient.half().float())
    made.learner.optimizer = AcceleratedOptimizer(made.learner.optimizer.optimizer, scaler=accelerator.scaler)
    return made


def take_steps(made: Training, count: int) -> list[tuple[int, int, bool]]:
    """Take steps; return (skipped so far, skipped in a row, whether the weights changed) after each."""
    seen = []
    before = [p.clone() for p in made.learner.unwrapped_model.parameters()]
    for micro_batches, _ in step_batches(made.learner, made.loader, made.learner.progression.step + count):
        train_step(made.learner, micro_batches)
        made.learner.progression.step += 1
        now = [p.clone() for p in made.learner.unwrapped_model.parameters()]
        moved = any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))
        seen.append((made.learner.progression.skipped_steps, made.learner.skips_in_a_row, moved))
        before = now
    return seen


def test_step_whose_gradient_overflows_is_skipped_and_counted(scaled: Training) -> None:
    seen = take_steps(scaled, 25)
    skipped = seen[-1][0]
    assert 0 < skipped < 25
    assert seen == [(i + 1, i + 1, False) for i in range(skipped)] + [(skipped, 0, True)] * (25 - skipped)
    assert not scaled.learner.nonfinite, "an overflow of the scaled gradient is none of the loss"
    assert scaled.learner.accelerator.scaler.get_scale() == INITIAL_SCALE / 2**skipped


def test_scaler_that_overflows_for_long_ends_the_training(scaled: Training) -> None:
    scaled.learner.accelerator.scaler.set_backoff_factor(0.999)
    take_steps(scaled, MAX_SKIPS_IN_A_ROW)
    assert scaled.learner.skips_in_a_row == MAX_SKIPS_IN_A_ROW
    take_steps(scaled, 1)
    assert (
        describe_nonfinite(scaled.learner, scaled.loader.per_epoch)
        == "float16 overflowed in 31 steps in a row up to step 31"
    )


def test_loop_ends_a_training_that_skips_for_long(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Every step is told to have been skipped: the loop ends at the first one above the limit, and saves nothing."""
    original = training.train_step

    def train_step(made: Learner, micro_batches: Any) -> torch.Tensor:
        nats = original(made, micro_batches)
        made.skips_in_a_row += 1
        return nats

    monkeypatch.setattr(training, "train_step", train_step)
    with pytest.raises(SystemExit) as ended:
        train_main([*tiny_flags, "--max_steps", "100", "--run_dir", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: float16 overflowed in 31 steps in a row up to step 31\n"
    assert list((tmp_path / "run" / "checkpoints").glob("*")) == []
