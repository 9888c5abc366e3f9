"""metrics.jsonl is whole whatever happens to the trackers that follow it (law 7)."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.forking import run_script
from textgen.cli import train_main
from textgen.packages import HOME
from textgen.runs.checkpoint import checkpoints
from textgen.runs.metrics_file import MetricsRow, read_metrics
from textgen.runs.samples import SampledText
from textgen.tracking import accelerate_trackers
from textgen.tracking import tracker as tracking
from textgen.tracking.accelerate_trackers import AccelerateTracker, wait_for_a_later_name
from textgen.tracking.tracker import RunEnd, Tracker, TrackerThread
from textgen.tracking.wandb import has_wandb_key


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
    said = [record.message for record in caplog.records if "W&B is off from here on" in record.message]
    assert len(said) == 1
    assert "wandb-core is dead" in said[0]
    assert "wandb-core" not in [child.name() for child in psutil.Process().children()]  # not as a zombie either


@pytest.mark.usefixtures("no_key")
def test_a_key_is_found_in_environment_and_netrc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not has_wandb_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_wandb_key()
    (tmp_path / ".netrc").write_bytes("\ufeffmachine api.wandb.ai login user password secret\n".encode("utf-16-le"))
    assert not has_wandb_key()
    assert "`~/.netrc` cannot be read: 'utf-8' codec can't decode byte 0xff" in caplog.text
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_wandb_key()


class Slow:
    """A tracker that does nothing, slowly."""

    finish_seconds = 0.1

    def __init__(self, seconds: float, *, catches_up: bool = True) -> None:
        self._seconds, self.catches_up = seconds, catches_up
        self.rows: list[int] = []
        self.abandoned = False

    def open(self, rows: Sequence[MetricsRow]) -> None:
        self.rows += range(len(rows))

    def log(self, number: int, row: MetricsRow, samples: Sequence[SampledText]) -> None:
        time.sleep(self._seconds)
        self.rows.append(number)

    def checkpoint(self, path: Path, *, best: bool, metadata: Mapping[str, Any]) -> None:
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
    assert time.monotonic() - started < 30  # a row takes it 60 s
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 10))
    assert [record.message for record in caplog.records if record.name == "textgen"] == [
        "dashboard is off from here on, `metrics.jsonl` continues: it is 3 rows behind"
    ]
    assert backend.abandoned


@pytest.mark.parametrize("catches_up", [True, False])
def test_rows_of_a_tracker_given_up_at_the_end_are_promised_only_by_one_that_catches_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, catches_up: bool
) -> None:
    tracker = Tracker(
        tmp_path, {"dashboard": Slow(60, catches_up=catches_up)}, main=True, first_step=0, evaluated_step=0
    )
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish(RunEnd("finished", 0, ""))
    (line,) = [record.message for record in caplog.records if record.name == "textgen"]
    promise = "; start this run again to record its missing rows"
    assert line == "dashboard is off from here on, `metrics.jsonl` continues: it has not ended within 0 s" + (
        promise if catches_up else ""
    )


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
    thread = TrackerThread("dashboard", Slow(seconds=0), [])
    thread.put(lambda backend: backend.checkpoint(tmp_path, best=True, metadata={}))
    thread.close()
    said = [record.message for record in caplog.records if record.name == "textgen"]
    assert [line.rpartition(": ")[2] for line in said] == ["ConnectionError"]


def figures_of_tensorboard(run_dir: Path) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """Return what TensorBoard shows, read in a process of its own: figures by name with steps, and names of texts."""
    read = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]); events.Reload()
values = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
texts = [name for name in events.Tags()["tensors"]]
print(json.dumps([values, texts]))
"""
    result = subprocess.run(
        [sys.executable, "-c", read, str(run_dir / "tensorboard")], capture_output=True, text=True, check=True
    )
    values, texts = json.loads(result.stdout)
    return values, texts


def assert_each_figure_once(run_dir: Path) -> None:
    values, texts = figures_of_tensorboard(run_dir)
    rows = read_metrics(run_dir)
    for name in ("train/loss", "valid/loss", "train/gradient_norm", "tokens"):
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        assert [step for step, _ in values[name]] == [step for step, _ in wanted]
        assert [value for _, value in values[name]] == pytest.approx([value for _, value in wanted])
    assert texts == ["samples/text_summary"]


@pytest.fixture
def tensorboard_flags(tiny_flags: list[str], tmp_path: Path) -> list[str]:
    return [
        *tiny_flags, "--run_dir", str(tmp_path / "run"), "--tracking.mode", "auto", "--log_every", "1",
        "--evaluate_every", "2", "--tracking.backends", "tensorboard",
    ]  # fmt: skip


def test_tensorboard_has_every_step_once_through_a_resume(tensorboard_flags: list[str], tmp_path: Path) -> None:
    train_main([*tensorboard_flags, "--max_steps", "3"])
    train_main([*tensorboard_flags, "--max_steps", "5"])
    assert_each_figure_once(tmp_path / "run")


def test_a_later_part_of_a_training_has_a_later_event_file(tmp_path: Path) -> None:
    """By name: TensorBoard would read file 10 of a second before file 9, and hide the figures of file 10."""
    second = int(time.time())
    (tmp_path / f"events.out.tfevents.{second}.host.1.9").touch()
    wait_for_a_later_name(tmp_path)
    assert int(time.time()) > second


def test_tensorboard_is_given_the_rows_that_a_slow_end_lost(
    tensorboard_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start has written two rows and a part of the third when it is given up."""
    log, finish, reached, go_on = AccelerateTracker.log, Tracker.finish, threading.Event(), threading.Event()

    def hang(self: AccelerateTracker, number: int, row: MetricsRow, samples: Any) -> None:
        if number < 2:
            log(self, number, row, samples)
            return
        self._tracker.log({"tokens": row["tokens"]}, step=row["step"])
        reached.set()
        go_on.wait()

    def finish_later(self: Tracker, end: RunEnd) -> None:
        assert reached.wait(60)
        finish(self, end)

    with monkeypatch.context() as patch:
        patch.setattr(accelerate_trackers, "FINISH_SECONDS", 0.1)
        patch.setattr(AccelerateTracker, "log", hang)
        patch.setattr(Tracker, "finish", finish_later)
        train_main([*tensorboard_flags, "--max_steps", "4"])
    go_on.set()
    assert [step for step, _ in figures_of_tensorboard(tmp_path / "run")[0]["tokens"]] == [1, 2, 2]
    train_main([*tensorboard_flags, "--max_steps", "5"])
    assert_each_figure_once(tmp_path / "run")


@pytest.fixture
def train_with_trackio(tiny_flags: list[str], tmp_path: Path) -> Callable[..., str]:
    """Return a function that trains in a forked process and returns its log; trackio reads TRACKIO_DIR once."""
    flags = [
        *tiny_flags, "--run_dir", str(tmp_path / "run"), "--tracking.mode", "auto", "--log_every", "1",
        "--evaluate_every", "2", "--tracking.backends", "trackio",
    ]  # fmt: skip

    def train(*more: str, program: Sequence[str] = ("train_distributed.py",), **environment: str) -> str:
        own = {"TRACKIO_DIR": str(tmp_path / "trackio"), **environment}
        return run_script(*program, *flags, *more, env=os.environ | own).stderr

    return train


def rows_of_trackio(folder: Path) -> list[tuple[int, dict[str, float]]]:
    (database,) = folder.glob("*.db")
    with closing(sqlite3.connect(database)) as connection:
        kept = connection.execute("select step, metrics from metrics order by id").fetchall()
    return [(step, json.loads(row)) for step, row in kept]


def assert_each_row_once(tmp_path: Path) -> None:
    wanted = read_metrics(tmp_path / "run")
    assert rows_of_trackio(tmp_path / "trackio") == [
        (row["step"], {name: value for name, value in row.items() if name != "step"}) for row in wanted
    ]
    assert [row["step"] for row in wanted if "train/loss" in row] == [1, 2, 3, 4, 5]


def test_trackio_has_every_step_once_through_a_resume(train_with_trackio: Callable[..., str], tmp_path: Path) -> None:
    """Steps after the checkpoint that the second start goes on from are made again; trackio has them."""
    train_with_trackio("--max_steps", "4")
    shutil.rmtree(checkpoints(tmp_path / "run")[0][1])
    train_with_trackio("--max_steps", "5")
    rows = rows_of_trackio(tmp_path / "trackio")
    wanted = read_metrics(tmp_path / "run")
    for name in ("train/loss", "valid/loss"):
        losses = [(step, row[name]) for step, row in rows if name in row]
        assert losses == [(row["step"], row[name]) for row in wanted if name in row]
    assert len(rows) == len(wanted)


SLOW_TRACKIO = """
import sys, threading, time
import trackio
from trackio.sqlite_storage import SQLiteStorage
from textgen.tracking import accelerate_trackers
from textgen.cli import train_main
from textgen.tracking.tracker import Tracker
where = sys.argv.pop(1)
accelerate_trackers.FINISH_SECONDS = 0.5
write, finish = SQLiteStorage.bulk_log, Tracker.finish
reached, go_on, written = threading.Event(), threading.Event(), threading.Event()
def hang(*_, **__):
    reached.set()
    go_on.wait()
def write_two(*, metrics_list, steps, log_ids, **more):
    write(metrics_list=metrics_list[:2], steps=steps[:2], log_ids=log_ids[:2], **more)
    hang()
def write_late(**arguments):  # what comes first, and the rest at once
    SQLiteStorage.bulk_log = staticmethod(write)
    hang()
    write(**arguments)
    written.set()
def finish_later(self, end):  # once trackio hangs
    assert reached.wait(60)
    finish(self, end)
if where == "opening":
    trackio.init = hang
else:
    SQLiteStorage.bulk_log = staticmethod(write_two if where == "writing" else write_late)
Tracker.finish = finish_later
train_main([*sys.argv[1:], "--max_steps", "4"])
if where == "the same process":
    accelerate_trackers.FINISH_SECONDS = 60
    begin = accelerate_trackers.AccelerateTracker.open
    def begin_early(self, rows):  # before the first start's rows are written
        threading.Timer(3, go_on.set).start()
        begin(self, rows)
    accelerate_trackers.AccelerateTracker.open = begin_early
    train_main([*sys.argv[1:], "--max_steps", "5"])
    assert written.wait(60)
"""


@pytest.mark.parametrize("where", ["opening", "writing", "the same process"])
def test_trackio_is_given_the_rows_that_a_slow_end_lost(
    train_with_trackio: Callable[..., str], tmp_path: Path, where: str
) -> None:
    """A start in the same process waits for what trackio still writes, and does not give it again."""
    script = tmp_path / "slow_trackio.py"
    script.write_text(SLOW_TRACKIO)
    logged = train_with_trackio(program=(str(script), where))
    assert (
        "trackio is off from here on, `metrics.jsonl` continues: it has not ended within 0 s; start this run again"
        in logged
    )
    if where != "the same process":
        recorded = rows_of_trackio(tmp_path / "trackio") if where == "writing" else []
        assert len(recorded) == (2 if where == "writing" else 0)
        train_with_trackio("--max_steps", "5")
    assert_each_row_once(tmp_path)


def test_trackio_that_cannot_be_asked_is_given_no_old_rows(
    train_with_trackio: Callable[..., str], tmp_path: Path
) -> None:
    """It writes to its inbox of files, as on a network's file system: what is there is not in the database yet."""
    line = "trackio cannot list its rows here: rows that it lost are only in `metrics.jsonl`"
    assert line not in train_with_trackio("--max_steps", "3", TRACKIO_STORAGE_MODE="jsonl")
    assert line in train_with_trackio("--max_steps", "5", TRACKIO_STORAGE_MODE="jsonl")
    entries = [
        json.loads(text) for path in (tmp_path / "trackio").rglob("*.jsonl") for text in path.read_text().splitlines()
    ]
    steps = sorted(entry["step"] for entry in entries if "train/loss" in entry.get("metrics", {}))
    assert steps == [1, 2, 3, 4, 5]


def test_a_tracker_that_is_not_installed_is_one_line(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    flags = [*tiny_flags, "--run_dir", str(tmp_path / "run"), "--tracking.mode", "auto"]
    with pytest.raises(SystemExit) as refused:
        train_main([*flags, "--tracking.backends", "wandb", "trackio"])
    assert refused.value.code == 2
    assert capsys.readouterr().err.endswith(
        f"error: `tracking.backends` trackio needs `trackio`: run `pip install -e '.[trackio]'` in `{HOME}`\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 10}\n{"step": 2, "tok')
    assert read_metrics(tmp_path) == [{"step": 1, "tokens": 10}]
