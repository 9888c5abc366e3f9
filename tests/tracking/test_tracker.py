"""metrics.jsonl is whole whatever happens to the trackers that follow it (law 7)."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from textgen.cli import train_main
from textgen.runs.metrics import read_metrics
from textgen.tracking import tracker as tracking
from textgen.tracking.tracker import Follower, RunEnd, Tracker
from textgen.tracking.wandb import has_wandb_key

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No W&B key is to be found."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


@pytest.mark.parametrize("broken", ["init", "log"])
@pytest.mark.usefixtures("no_key")
def test_a_failing_tracker_does_not_end_the_training(
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    import wandb

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("wandb-core is dead")

    monkeypatch.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
    run_dir = tmp_path / "run"
    train_main([*tiny_flags, "--run_dir", str(run_dir), "--log_every", "1", "--tracking.mode", "offline"])
    assert [row["step"] for row in read_metrics(run_dir) if "train/loss" in row] == [1, 2, 3, 4]
    said = [record.message for record in caplog.records if "W&B is off" in record.message]
    assert len(said) == 1
    assert "wandb-core is dead" in said[0]
    assert "wandb-core" not in [child.name() for child in psutil.Process().children()]  # not as a zombie either


@pytest.mark.usefixtures("no_key")
def test_a_key_is_found_in_environment_and_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_wandb_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_wandb_key()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_wandb_key()


class Slow:
    """A tracker that does nothing, slowly."""

    patience = 0.1

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.rows: list[int] = []
        self.abandoned = False

    def open(self, rows: Sequence[tracking.Row]) -> None:
        self.rows += range(len(rows))

    def log(self, number: int, row: tracking.Row, samples: Sequence[tracking.SampledText]) -> None:
        time.sleep(self._seconds)
        self.rows.append(number)

    def checkpoint(self, path: Path, *, best: bool, about: tracking.Row) -> None:
        raise ConnectionError

    def finish(self, end: RunEnd) -> None:
        self.rows.append(-end.exit_code)

    def abandon(self) -> None:
        self.abandoned = True


def test_a_tracker_that_hangs_costs_the_training_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "MAX_WAITING", 3)
    backend = Slow(seconds=60)
    tracker = Tracker(tmp_path, {"dashboard": backend}, main=True, first_step=0, evaluated_step=0)
    started = time.monotonic()
    for step in range(1, 10):
        tracker.log(step, {"train/loss": 1.0})
    tracker.finish(RunEnd("finished", 0, ""))
    assert time.monotonic() - started < 5
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 10))
    assert [record.message for record in caplog.records if record.name == "textgen"] == [
        "dashboard is off from here on, `metrics.jsonl` goes on: it is 3 rows behind"
    ]
    assert backend.abandoned


def test_rows_of_later_steps_are_made_again_and_counted_on(tmp_path: Path) -> None:
    """What a tracker is given are the numbers of lines in metrics.jsonl, through a resume too."""
    tracker = Tracker(tmp_path, {}, main=True, first_step=0, evaluated_step=0)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 1.0})
        tracker.log(step, {"valid/loss": 1.0})
    backend = Slow(seconds=0)
    tracker = Tracker(tmp_path, {"dashboard": backend}, main=True, first_step=2, evaluated_step=1)
    assert [(row["step"], *row) for row in read_metrics(tmp_path)] == [
        (1, "step", "train/loss"), (1, "step", "valid/loss"), (2, "step", "train/loss")
    ]  # fmt: skip
    tracker.log(2, {"valid/loss": 1.0})
    tracker.finish(RunEnd("failed", 2, ""))
    assert backend.rows == [0, 1, 2, 3, -2]


def test_what_a_tracker_raises_is_said_with_its_kind_where_it_has_no_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    follower = Follower("dashboard", Slow(seconds=0), [])
    follower.put(lambda backend: backend.checkpoint(tmp_path, best=True, about={}))
    follower.end()
    said = [record.message for record in caplog.records if record.name == "textgen"]
    assert [line.rpartition(": ")[2] for line in said] == ["ConnectionError"]


def test_tensorboard_has_every_step_once_through_a_resume(tiny_flags: list[str], tmp_path: Path) -> None:
    """Accelerate's tracker; read as TensorBoard reads it, in a process of its own: it warns of numpy."""
    flags = [
        *tiny_flags, "--run_dir", str(tmp_path / "run"), "--tracking.mode", "auto", "--log_every", "1",
        "--evaluate_every", "2", "--tracking.backends", "tensorboard",
    ]  # fmt: skip
    train_main([*flags, "--max_steps", "3"])
    train_main([*flags, "--max_steps", "5"])
    read = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]); events.Reload()
values = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
texts = [name for name in events.Tags()["tensors"]]
print(json.dumps([values, texts]))
"""
    result = subprocess.run(
        [sys.executable, "-c", read, str(tmp_path / "run" / "tensorboard")], capture_output=True, text=True, check=True
    )
    values, texts = json.loads(result.stdout)
    rows = read_metrics(tmp_path / "run")
    for name in ("train/loss", "valid/loss", "train/gradient_norm"):
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        assert [step for step, _ in values[name]] == [step for step, _ in wanted]
        assert [value for _, value in values[name]] == pytest.approx([value for _, value in wanted])
    assert texts == ["samples/text_summary"]


def test_trackio_has_every_step_once_through_a_resume(tiny_flags: list[str], tmp_path: Path) -> None:
    """Accelerate's tracker; in processes of their own, as trackio keeps a folder for each."""
    flags = [
        *tiny_flags, "--run_dir", str(tmp_path / "run"), "--tracking.mode", "auto", "--log_every", "1",
        "--tracking.backends", "trackio",
    ]  # fmt: skip
    for steps in ("3", "5"):
        subprocess.run(
            [sys.executable, "train_distributed.py", *flags, "--max_steps", steps],
            check=True, cwd=ROOT, env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        )  # fmt: skip
    (database,) = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(database)) as connection:
        kept = connection.execute("select step, metrics from metrics order by id").fetchall()
    losses = [(step, json.loads(row)["train/loss"]) for step, row in kept if "train/loss" in json.loads(row)]
    assert losses == [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5]


def test_a_tracker_that_is_not_installed_is_one_line(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    flags = [*tiny_flags, "--run_dir", str(tmp_path / "run"), "--tracking.mode", "auto"]
    with pytest.raises(SystemExit) as refused:
        train_main([*flags, "--tracking.backends", "wandb", "trackio"])
    assert refused.value.code == 2
    assert capsys.readouterr().err.endswith(
        "error: `tracking.backends` names trackio, which is not installed: `pip install trackio`\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 10}\n{"step": 2, "tok')
    assert read_metrics(tmp_path) == [{"step": 1, "tokens": 10}]
