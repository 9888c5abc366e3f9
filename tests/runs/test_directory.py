"""The directory of a run: its lock, its status, its space."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from textgen.commands.parsing import parse_train_config
from textgen.errors import TextgenError
from textgen.runs import checkpoint
from textgen.runs import directory as run_directory
from textgen.runs.directory import RunDirectory, read_status
from textgen.training import loop as training


def test_directory_without_a_training_is_not_left_behind(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "run", main=True)
    with run.hold():
        assert read_status(run.path)["state"] == "running"
    assert not run.path.exists()


@pytest.mark.parametrize("made_before", [True, False])
def test_directory_with_anything_of_a_training_stays(made_before: bool, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", main=True)
    if made_before:
        run.path.mkdir()
    with run.hold():
        if not made_before:
            (run.path / "config.yaml").touch()
    assert run.path.exists()


def test_other_processes_make_and_hold_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", main=False)
    with run.hold():
        run.write_status("running", step=1, total_steps=2)
        run.require_space(1 << 60, count=9)
        assert not run.path.exists()


def test_second_holder_is_refused_with_the_first_one_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "LOCK_SECONDS", 0.1)
    run, other = (RunDirectory(tmp_path / "run", main=True) for _ in range(2))
    with run.hold():
        before = (run.path / "status.json").read_bytes()
        status = json.loads(before)
        with pytest.raises(TextgenError) as refused, other.hold():
            raise AssertionError
        assert str(refused.value) == (
            f"`{run.path}` is in use by process {status['pid']} on {status['host']}, since {status['started']}"
        )
        assert (run.path / "status.json").read_bytes() == before
    run.path.mkdir()
    with other.hold():
        pass


def test_first_reason_of_the_end_stays(tmp_path: Path) -> None:
    """Whichever process had it; a checkpoint under way in the main process adds its step alone."""
    main, last = RunDirectory(tmp_path / "run", main=True), RunDirectory(tmp_path / "run", main=False)
    with main.hold():
        assert main.read_started() == last.read_started() is not None
        last.end("failed", "the last process")
        main.write_status("running", step=5, total_steps=9)
        main.end("failed", "the first process")
        status = read_status(main.path)
        assert (status["state"], status["reason"], status["step"]) == ("failed", "the last process", 5)


def test_next_training_starts_with_a_new_status(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run", main=True)
    with run.hold():
        run.write_status("running", step=5, total_steps=9)
        run.end("preempted", "SIGTERM")
    with run.hold():
        status = read_status(run.path)
        assert (status["state"], status["reason"], status["step"], status["total_steps"]) == (
            "running",
            None,
            None,
            None,
        )


@pytest.mark.parametrize(("step", "state"), [(None, "finished"), (5, "failed")])
def test_a_finished_training_stays_finished_if_the_next_one_fails_before_its_first_step(
    step: int | None, state: str, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run", main=True)
    with run.hold():
        (run.path / "config.yaml").touch()
        run.write_status("finished", step=4, total_steps=4)
    run = RunDirectory(tmp_path / "run", main=True)
    with run.hold():
        run.read_started()
        if step is not None:
            run.write_status("running", step=step, total_steps=8)
        run.end("failed", "other settings")
        assert read_status(run.path)["state"] == "failed"
    status = read_status(run.path)
    assert (status["state"], status["step"]) == (state, step or 4)


def test_a_run_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with (
        pytest.raises(TextgenError, match="`run_dir` must be a folder, not a file"),
        RunDirectory(tmp_path / "run", main=True).hold(),
    ):
        raise AssertionError


@pytest.mark.parametrize("name", ["config.yaml", "store.json", "model.safetensors", "tune.json"])
def test_a_folder_of_another_kind_is_refused_and_not_changed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious")
    run = RunDirectory(tmp_path, main=True)
    with pytest.raises(TextgenError, match=f"holds `{name}` and is not a run: name another `--run_dir`"), run.hold():
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("other", ["checkpoints/epoch=0-step=100.ckpt", "status.json"])
def test_names_that_other_programs_use_too_make_no_run(other: str, tmp_path: Path) -> None:
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text('{"status": "ok"}')
    (tmp_path / "config.yaml").write_text("trainer:\n  max_epochs: 3\n")
    with pytest.raises(TextgenError, match=r"holds `config.yaml` and is not a run"):
        RunDirectory(tmp_path, main=True).hold().__enter__()


@pytest.mark.parametrize(("settings", "checkpoint"), [("run_dir: runs/a\n", ""), ("{", "checkpoints/step-000004")])
def test_a_run_that_lost_its_status_is_a_run(settings: str, checkpoint: str, tmp_path: Path) -> None:
    """A folder with config.yaml alone trains again by the command that the run's report shows."""
    (tmp_path / "config.yaml").write_text(settings)
    (tmp_path / checkpoint).mkdir(parents=True, exist_ok=True)
    with RunDirectory(tmp_path, main=True).hold():
        assert (tmp_path / "config.yaml").read_text() == settings


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0"])
def test_damaged_status_is_none_and_hinders_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) == {}
    with RunDirectory(tmp_path, main=True).hold():
        assert read_status(tmp_path)["state"] == "running"


def test_space_is_that_of_all_checkpoints_less_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk with 25 MB left, 5 MB of a checkpoint lie already: 3 of 10 MB fit, 4 do not."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=25_000_000))
    run = RunDirectory(tmp_path, main=True)
    with pytest.raises(TextgenError, match=r"has 25.0 MB of free space, the run needs 30.0: 3 checkpoints of 10.0"):
        run.require_space(10_000_000, count=3)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000001" / "model.safetensors").write_bytes(bytes(5_000_000))
    run.require_space(10_000_000, count=3)
    with pytest.raises(TextgenError, match=r"has 25.0 MB of free space, the run needs 35.0: 4 checkpoints"):
        run.require_space(10_000_000, count=4)


def test_training_that_fails_lets_go_of_its_directory_once_its_last_checkpoint_is_written(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next training would meet a writer that is not its own."""
    write, take, hold = checkpoint._write, training.train_step, RunDirectory.hold
    found: list[Any] = []

    def slow_write(*args: Any) -> Any:
        time.sleep(0.1)
        return write(*args)

    def fail_at_the_fourth(made: Any, micro_batches: Any) -> Any:
        if made.progression.step == 3:
            raise RuntimeError("made to fail")
        return take(made, micro_batches)

    @contextmanager
    def watched(run: RunDirectory) -> Iterator[None]:
        with hold(run):
            try:
                yield
            finally:
                found.extend(path.name for path in (run.path / "checkpoints").iterdir())

    monkeypatch.setattr(checkpoint, "_write", slow_write)
    monkeypatch.setattr(training, "train_step", fail_at_the_fourth)
    monkeypatch.setattr(RunDirectory, "hold", watched)
    flags = [*tiny_flags, "--run_dir", str(tmp_path / "run"), "--save_every", "3"]
    with pytest.raises(RuntimeError, match="made to fail"):
        training.train(parse_train_config(flags))
    assert found == ["step-000003"]
    assert read_status(tmp_path / "run")["reason"] == "RuntimeError: made to fail"
