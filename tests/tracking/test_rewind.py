"""A training that goes back and on with other settings leaves each tracker with one history."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.forking import run_script
from tests.tracking.test_tracker import figures_of_tensorboard, rows_of_trackio
from tests.tracking.test_wandb import assert_each_row_once, inspect_folder
from tests.tracking.wandb_server import wandb_server
from textgen.cli import train_main
from textgen.runs.checkpoint import checkpoint_path, checkpoints
from textgen.runs.metrics_file import METRICS_NAME, read_metrics
from textgen.tracking import accelerate_trackers, wandb
from textgen.tracking.recorded import RecordedRows

LOSSES = ("train/loss", "valid/loss")
OTHER_RATE = ("--learning_rate", "0.01", "--resume_override")

# The end of a training waits as long as a busy machine takes. The server of the tests keeps no artifacts; a table of
# samples is one.
SCRIPT = """
from textgen.cli import train_main
from textgen.tracking import accelerate_trackers, wandb
accelerate_trackers.FINISH_SECONDS = wandb.FINISH_SECONDS = wandb.SERVER_SECONDS = 120
record = wandb.WandbRun._record
wandb.WandbRun._record = lambda self, number, row, samples: record(self, number, row, ())
wandb.WandbRun.checkpoint = lambda *_, **__: None
train_main()
"""


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No W&B key is to be found, and a busy machine is no failure."""
    monkeypatch.setattr(accelerate_trackers, "FINISH_SECONDS", 120)
    monkeypatch.setattr(wandb, "FINISH_SECONDS", 120)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def flags(tiny_flags: list[str], tmp_path: Path) -> list[str]:
    return [
        *tiny_flags, "--run_dir", str(tmp_path / "run"), "--tracking.mode", "auto", "--log_every", "1",
        "--evaluate_every", "2", "--max_steps", "6", "--sample_tokens", "2", "--keep_last", "9",
    ]  # fmt: skip


def go_back(run_dir: Path, step: int) -> None:
    """Remove the checkpoints after a step, as the message of `--resume` says."""
    for newest, path in checkpoints(run_dir):
        if newest > step:
            shutil.rmtree(path)


def assert_one_history(run_dir: Path, run_id: str) -> None:
    """W&B's run has the rows of metrics.jsonl, each once."""
    records = inspect_folder(run_dir / "wandb", run_id)
    assert_each_row_once(run_dir, records)


def current_run(run_dir: Path) -> str:
    run_id = RecordedRows(run_dir, "wandb").run_id
    assert run_id is not None
    return run_id


def lines_of(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.message for record in caplog.records if text in record.message]


def test_wandb_gets_a_new_run_for_another_history_and_keeps_it(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    train_main(flags)
    old, abandoned = current_run(run_dir), (run_dir / METRICS_NAME).read_text()
    assert_one_history(run_dir, old)

    go_back(run_dir, 2)
    train_main([*flags, "--resume", str(checkpoint_path(run_dir, 2)), *OTHER_RATE])
    new = current_run(run_dir)
    assert lines_of(caplog, "new run") == [
        f"W&B: run {old} has other rows than `metrics.jsonl` from row 4 on, and keeps them; new run: {new}"
    ]
    assert_one_history(run_dir, new)
    (replaced,) = [run["config"]["update"].get("replaces") for run in inspect_folder(run_dir / "wandb", new)["run"]]
    assert replaced == old
    (run_dir / METRICS_NAME).write_text(abandoned)
    assert_one_history(run_dir, old)


@pytest.mark.slow
def test_wandb_learns_of_a_history_that_it_did_not_follow_and_of_a_shorter_one(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    train_main(flags)
    first = current_run(run_dir)
    go_back(run_dir, 2)
    train_main([*flags, *OTHER_RATE, "--tracking.mode", "disabled"])
    train_main([*flags, *OTHER_RATE, "--max_steps", "8"])
    second = current_run(run_dir)
    assert second != first
    assert_one_history(run_dir, second)

    # the checkpoint of step 2 names the first run, but the second goes on; its rows are made again, the same ones
    go_back(run_dir, 2)
    train_main([*flags, *OTHER_RATE, "--max_steps", "8"])
    assert current_run(run_dir) == second
    assert len(lines_of(caplog, "new run")) == 1
    records = inspect_folder(run_dir / "wandb", second)
    assert_each_row_once(run_dir, records, again=range(3, len(read_metrics(run_dir))))

    go_back(run_dir, 2)
    train_main([*flags, *OTHER_RATE, "--max_steps", "4"])
    third = current_run(run_dir)
    assert_one_history(run_dir, third)
    assert len(lines_of(caplog, "new run")) == 2


@pytest.mark.slow
def test_wandb_online_gets_a_new_run_too(flags: list[str], tmp_path: Path) -> None:
    """Also for a run of the server that another training has begun."""
    run_dir, script = tmp_path / "run", tmp_path / "train.py"
    script.write_text(SCRIPT)
    with wandb_server() as server:
        server.runs = {"taken": [{"step": step, "train/loss": 1.0, "_step": step} for step in range(3)]}
        environment = {**os.environ, **server.environment(tmp_path), "WANDB_RUN_ID": "taken", "WANDB_RESUME": "allow"}

        def train(*more: str) -> str:
            return run_script(str(script), *flags, *more, env=environment).stderr

        log = train()
        old = current_run(run_dir)
        assert (
            f"W&B: run taken has other rows than `metrics.jsonl` from row 1 on, and keeps them; new run: {old}" in log
        )
        before = read_metrics(run_dir)

        go_back(run_dir, 4)
        assert "new run" not in train()  # as after a kill
        assert current_run(run_dir) == old

        go_back(run_dir, 2)
        log = train(*OTHER_RATE)
        new = current_run(run_dir)
        assert (
            f"W&B: run {old} has other rows than `metrics.jsonl` from row 4 on, and keeps them; new run: {new}" in log
        )
        assert len(server.runs["taken"]) == 3
        last = read_metrics(run_dir)
        shutil.copytree(run_dir, tmp_path / "copy")
        train(*OTHER_RATE, "--max_steps", "8")
        assert current_run(run_dir) == new
        log = train(*OTHER_RATE, "--max_steps", "8", "--run_dir", str(tmp_path / "copy"))
        copied = current_run(tmp_path / "copy")
        line = f"W&B: run {new} has other rows than `metrics.jsonl` from row {len(last) + 1} on, and keeps them"
        assert f"{line}; new run: {copied}" in log

        histories = ((old, before), (new, read_metrics(run_dir)), (copied, read_metrics(tmp_path / "copy")))
        for run_id, rows in histories:
            sent = server.runs[run_id]
            assert [row["_step"] for row in sent] == list(range(len(rows)))
            for name in ("step", "train/loss", "valid/loss"):
                assert [row.get(name) for row in sent] == pytest.approx([row.get(name) for row in rows])


def test_tensorboard_shows_one_history(flags: list[str], tmp_path: Path) -> None:
    """Also if TensorBoard did not follow the part that made other rows."""
    run_dir, flags = tmp_path / "run", [*flags, "--tracking.backends", "tensorboard"]
    train_main(flags)
    for more, mode in ((OTHER_RATE, "auto"), ((), "disabled")):
        go_back(run_dir, 2)
        train_main([*flags, *more, "--resume_override", "--tracking.mode", mode])
        train_main([*flags, *more, "--resume_override", "--max_steps", "8"])
        values, _ = figures_of_tensorboard(run_dir)
        rows = read_metrics(run_dir)
        for name in ("train/loss", "valid/loss", "train/learning_rate"):
            wanted = [(row["step"], pytest.approx(row[name])) for row in rows if name in row]
            assert [tuple(value) for value in values[name]] == wanted


def test_trackio_gets_a_new_run_for_another_history(flags: list[str], tmp_path: Path) -> None:
    run_dir, folder, script = tmp_path / "run", tmp_path / "trackio", tmp_path / "train.py"
    script.write_text(SCRIPT)

    def train(*more: str) -> str:
        command = (str(script), *flags, "--tracking.backends", "trackio", *more)
        return run_script(*command, env=os.environ | {"TRACKIO_DIR": str(folder)}).stderr

    train()
    before = read_metrics(run_dir)
    go_back(run_dir, 2)
    assert "a new run begins" not in train()  # as after a kill
    go_back(run_dir, 2)
    line = "trackio: the run has other rows than `metrics.jsonl` from row 4 on, and keeps them; a new run begins"
    assert line in train(*OTHER_RATE)
    wanted = [(row["step"], {name: row.get(name) for name in LOSSES}) for row in [*before, *read_metrics(run_dir)]]
    assert [(step, {name: row.get(name) for name in LOSSES}) for step, row in rows_of_trackio(folder)] == wanted


def test_a_list_that_a_kill_cut_off_goes_on(tmp_path: Path) -> None:
    recorded, row = RecordedRows(tmp_path, "wandb"), {"step": 1, "tokens": 8, "train/loss": 2.0}
    recorded.begin("one", "folder", empty=True)
    recorded.add(0, row)
    path = tmp_path / "trackers" / "wandb.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    recorded = RecordedRows(tmp_path, "wandb")
    assert (recorded.run_id, recorded.folders, recorded.differs(0, {"step": 2})) == ("one", ["folder"], False)
    recorded.add(0, row)
    recorded = RecordedRows(tmp_path, "wandb")
    assert not recorded.differs(0, row | {"train/loss": 2.0000001, "train/tokens_per_second": 3})
    for other in ({"step": 2}, {"train/loss": 2.001}, {"valid/loss": 2.0}, {"tokens": 16}):
        assert recorded.differs(0, row | other)
    assert not recorded.differs(1, row)
