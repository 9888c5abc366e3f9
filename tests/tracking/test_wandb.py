"""A run as W&B has it: whole, each row once through kills, told how it ended, and without a secret; all offline."""

from __future__ import annotations

import bisect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.jobs import Job, fault
from tests.forking import server
from textgen.runs.checkpoint import checkpoints
from textgen.runs.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
SECRET = "plantedsecret"
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3"}

LEARNED = ("step", "tokens", "epoch", "train/loss", "train/learning_rate", "train/gradient_norm")

Records = dict[str, list[dict[str, Any]]]


def inspect(run_dir: Path) -> Records:
    """Return the records of all parts of a run by their kind."""
    return inspect_folder(run_dir / "wandb")


def inspect_folder(folder: Path, run_id: str = "*") -> Records:
    """Return the records of all parts of W&B runs by their kind, as `wandb leet inspect` shows them."""
    found: Records = {}
    for path in sorted(folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for record in map(json.loads, listing.splitlines()):
            found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def history(records: Records) -> list[dict[str, Any]]:
    """Return W&B's rows in the order of its own counter."""
    return sorted((row["item"] for row in records.get("history", ())), key=lambda row: row["_step"])


def assert_each_row_once(run_dir: Path, records: Records, *, again: range = range(0)) -> None:
    """W&B holds the rows of metrics.jsonl, in order, each one once; of rows that were made again it has the first ones.

    They learned the same, but took other times.
    """
    rows, recorded = read_metrics(run_dir), history(records)
    assert [row["_step"] for row in recorded] == list(range(len(rows)))
    for number, (row, seen) in enumerate(zip(rows, recorded, strict=True)):
        seen = {name: value for name, value in seen.items() if not name.startswith(("_", "samples"))}
        if number in again:
            row, seen = ({name: values[name] for name in LEARNED if name in values} for values in (row, seen))
        assert seen == pytest.approx(row)


@pytest.fixture(autouse=True)
def no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings start a wandb-core of their own, not that of a training in this process before."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)


@pytest.fixture(scope="module")
def flags(tiny_flags: list[str]) -> list[str]:
    return [
        *tiny_flags, "--tracking.mode", "auto", "--max_steps", "6", "--evaluate_every", "2", "--log_every", "1",
        "--sample_tokens", "8", "--keep_last", "3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def no_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No W&B key is to be found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "none"))
        yield


@pytest.fixture(scope="module")
def recorded(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Records, str]:
    """Return a run with secrets all around it, its records, and what it said; its server has gone."""
    home = tmp_path_factory.mktemp("recorded")
    repository = home / "repository"
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    remote = f"https://user:{SECRET}@example.org/a.git"
    subprocess.run(["git", "-C", str(repository), "remote", "add", "origin", remote], check=True)
    environment = os.environ | SLURM | {
        "WANDB_API_KEY": f"{SECRET}{'0' * 27}", "WANDB_BASE_URL": f"http://user:{SECRET}@127.0.0.1:9",
        "HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET, "PYTHONPATH": str(ROOT),
        "ALL_PROXY": f"http://user:{SECRET}@127.0.0.1:9", "no_proxy": "*",
    }  # fmt: skip
    command = [str(ROOT / "train_distributed.py"), *flags, "--run_dir", str(home / "run")]
    said = home / "said"
    process = server().start(command, output=said, error=said, env=environment, cwd=repository)
    assert process.wait() == 0, said.read_text()
    return home / "run", inspect(home / "run"), said.read_text()


def test_wandb_has_every_row_of_metrics_jsonl_once(recorded: tuple[Path, Records, str]) -> None:
    run_dir, records, _ = recorded
    assert_each_row_once(run_dir, records)


def test_every_promised_metric_is_recorded(recorded: tuple[Path, Records, str]) -> None:
    _, records, _ = recorded
    assert {name.partition(".")[0] for row in history(records) for name in row if not name.startswith("_")} == {
        "step", "tokens", "epoch", "train/loss", "train/bits_per_byte", "train/perplexity", "train/learning_rate",
        "train/gradient_norm", "train/tokens_per_second", "train/tokens_per_second_per_process",
        "train/flops_per_second", "train/data_share", "train/evaluate_share", "train/save_share",
        "checkpoint/pause_seconds", "memory/peak_gib", "machine/0/cpu_share", "machine/0/memory_share", "valid/loss",
        "valid/bits_per_byte", "valid/perplexity", "evaluate/pause_seconds", "samples",
    }  # fmt: skip
    assert records["stats"], "wandb's own figures of the machine"


def test_figures_stand_over_steps_and_bits_per_byte_over_tokens(recorded: tuple[Path, Records, str]) -> None:
    _, records, _ = recorded
    axes = {m.get("name") or m.get("glob_name"): m.get("step_metric") for m in records["metric"]}
    assert axes == {
        "step": None, "tokens": None, "*": "step", "train/bits_per_byte": "tokens", "valid/bits_per_byte": "tokens"
    }  # fmt: skip
    assert all({"step", "tokens"} <= row.keys() for row in history(records))


def test_config_tells_settings_commit_versions_and_the_job(recorded: tuple[Path, Records, str]) -> None:
    run_dir, records, _ = recorded
    (run,) = records["run"]
    config = run["config"]["update"]
    assert (config["batch_size"], config["model"]["hidden_size"], config["seed"]) == (8, 32, 42)
    assert config["parameters"] > 0
    assert {"commit", "python", "torch", "accelerate", "wandb"} <= config["environment"].keys()
    assert config["launch"] == {"launcher": "python", "processes": 1, "mixed_precision": "no", **SLURM}
    assert (run["project"], run["display_name"], run["run_group"]) == ("textgen", run_dir.name, "array-4700")
    assert run["job_type"] == "sweep"


def test_a_table_of_the_same_prompts_at_every_evaluation(recorded: tuple[Path, Records, str]) -> None:
    run_dir, records, _ = recorded
    tables = [row for row in history(records) if "samples.path" in row]
    assert [row["step"] for row in tables] == [2, 4, 6]
    for row in tables:
        (path,) = run_dir.glob(f"wandb/*run-*/files/{row['samples.path']}")
        table = json.loads(path.read_text())
        assert table["columns"] == ["step", "temperature", "prompt", "text"]
        assert len(table["data"]) == 9
        assert {line[0] for line in table["data"]} == {row["step"]}
        assert {line[1] for line in table["data"]} == {0.8, 1.0, 1.2}
        assert len({line[2] for line in table["data"]}) == 3
        assert f"**{table['data'][0][2]}**{table['data'][0][3]}" in (run_dir / "samples.md").read_text()


def test_checkpoints_are_artifacts_by_reference_newest_and_best(recorded: tuple[Path, Records, str]) -> None:
    run_dir, records, _ = recorded
    models = [artifact for artifact in records["artifact"] if artifact["type"] == "model"]
    best = min((r["valid/loss"], r["step"]) for r in read_metrics(run_dir) if "valid/loss" in r)[1]
    assert [json.loads(model["metadata"])["step"] for model in models] == [2, 4, 6]
    assert all("latest" in model["aliases"] for model in models)
    assert [json.loads(m["metadata"])["step"] for m in models if "best" in m["aliases"]][-1] == best
    (_, newest), *_ = checkpoints(run_dir)
    refs = {entry["ref"] for entry in models[-1]["manifest"]["contents"]}
    assert refs == {file.resolve().as_uri() for file in newest.iterdir()}
    copied = [path for path in run_dir.glob("wandb/artifacts/**/*") if path.is_file() and b"F32" in path.read_bytes()]
    assert copied == []


def test_the_end_is_told_with_its_exit_code_and_an_alert(recorded: tuple[Path, Records, str]) -> None:
    _, records, _ = recorded
    assert [end.get("exit_code", 0) for end in records["exit"]] == [0]
    (alert,) = records["alert"]
    assert (alert["title"], alert["level"]) == ("run finished", "INFO")
    assert alert["text"].startswith("step 6 of 6, best validation loss ")


def test_no_secret_is_stored_or_said(recorded: tuple[Path, Records, str]) -> None:
    """Of the environment, the address of a git remote, and a flag that there is not."""
    run_dir, _, said = recorded
    assert SECRET not in said
    holders = [p for p in run_dir.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert holders == []


@pytest.mark.parametrize("where", ["flag", "file"])
def test_a_secret_where_settings_are_told_is_refused_and_not_repeated(
    flags: list[str], tmp_path: Path, where: str
) -> None:
    more = ["--tracking.api_key", SECRET]
    if where == "file":
        (tmp_path / "a.yaml").write_text(f"tracking:\n  api_key: {SECRET}\n")
        more = ["--config", str(tmp_path / "a.yaml")]
    for refused in (more, ["--data.dataset", f"https://user:{SECRET}@example.org/reviews"]):
        command = [
            sys.executable,
            str(ROOT / "train_distributed.py"),
            *flags,
            "--run_dir",
            str(tmp_path / "run"),
            *refused,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2
        assert SECRET not in result.stdout + result.stderr
        assert not (tmp_path / "run").exists()


def test_a_server_that_has_gone_is_said_once_and_costs_no_time(recorded: tuple[Path, Records, str]) -> None:
    _, _, said = recorded
    assert said.count("W&B records offline: 127.0.0.1 does not answer") == 1


def test_one_line_says_how_to_look_and_how_to_upload(recorded: tuple[Path, Records, str]) -> None:
    run_dir, _, said = recorded
    (line,) = [line for line in said.splitlines() if "wandb leet" in line]
    look, upload = line.split("`")[1::2]
    assert look == f"wandb leet {run_dir / 'wandb'}"
    (part,) = run_dir.glob(upload.removeprefix(f"wandb sync {run_dir}/"))
    result = subprocess.run(
        [sys.executable, "-m", *upload.split()[:2], "--dry-run", str(part)], capture_output=True, text=True
    )
    assert part.name in result.stdout + result.stderr


# --- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize("kept", [2, 7])
def test_killed_and_gone_on_each_step_is_there_once(kept: int, flags: list[str], tmp_path: Path) -> None:
    """Rows that the kill took from W&B are given to it again; rows that it had, and are made again, are not."""
    run_dir = tmp_path / "run"
    flags = [*flags, "--max_steps", "9", "--evaluate_every", "3"]
    # W&B writes the rows of steps 1 to 7 while it sleeps; the checkpoint is of step 6
    first = Job(flags, run_dir, fault("sleep 6", at="stepping", call=8), fault("signal 9", at="stepping", call=9))
    assert first.end() == -signal.SIGKILL
    first.kill()  # and wandb's own processes, which would write on
    (file,) = run_dir.glob("wandb/*run-*-*/run-*.wandb")
    whole = file.read_bytes()

    def rows_of(size: int) -> int:
        file.write_bytes(whole[:size])
        return len(history(inspect(run_dir)))

    size = bisect.bisect_right(range(len(whole)), kept, key=rows_of) - 1  # as if it had had less time to write
    assert rows_of(size) == kept
    second = Job(flags, run_dir)
    assert second.end() == 0, second.output
    records = inspect(run_dir)
    assert_each_row_once(run_dir, records, again=range(6, kept))
    assert len({run["run_id"] for run in records["run"]}) == 1
    assert [end.get("exit_code", 0) for end in records["exit"]] == [0]


@pytest.mark.slow
@pytest.mark.usefixtures("no_key")
def test_preempted_it_says_so_and_goes_on_as_the_same_run(flags: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert Job(flags, run_dir, fault("signal 15", at="stepping", call=4)).end() == 128 + signal.SIGTERM
    records = inspect(run_dir)
    assert [end["exit_code"] for end in records["exit"]] == [128 + signal.SIGTERM]
    assert [(a["title"], a["level"]) for a in records["alert"]] == [("run preempted", "WARN")]
    assert "preempting" in records
    assert Job(flags, run_dir).end() == 0
    records = inspect(run_dir)
    assert_each_row_once(run_dir, records)
    assert len({run["run_id"] for run in records["run"]}) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("no_key")
def test_a_base_is_an_artifact_that_the_run_uses(flags: list[str], tiny_run: Path, tmp_path: Path) -> None:
    """Recorded once, although the training is preempted and resumed."""
    run_dir, flags = tmp_path / "run", [*flags, "--init_from", str(tiny_run)]
    assert Job(flags, run_dir, fault("signal 15", at="stepping", call=2)).end() == 128 + signal.SIGTERM
    assert Job(flags, run_dir).end() == 0
    records = inspect(run_dir)
    (used,) = (artifact for artifact in records["artifact"] if artifact.get("use_after_commit"))
    base = json.loads(used["metadata"])
    assert (used["type"], used["name"]) == ("model", f"base-{base['sha256'][:12]}")
    assert {entry["ref"] for entry in used["manifest"]["contents"]} == {
        file.resolve().as_uri() for file in checkpoints(tiny_run)[0][1].iterdir()
    }
    assert_each_row_once(run_dir, records)


@pytest.mark.slow
@pytest.mark.usefixtures("no_key")
def test_a_loss_that_is_no_number_is_an_alert(flags: list[str], tmp_path: Path) -> None:
    assert Job(flags, tmp_path / "run", fault("nan loss", at="updating", call=3)).end() == 2
    records = inspect(tmp_path / "run")
    assert [end["exit_code"] for end in records["exit"]] == [2]
    (alert,) = records["alert"]
    assert (alert["title"], alert["level"]) == ("run failed", "ERROR")
    assert "the loss turned to nan or infinity in step 3" in alert["text"]


# --- when W&B fails --------------------------------------------------------------------------------------------------


def assert_goes_on(job: Job, reason: str) -> None:
    """The training ends well, with all rows, and has said once why W&B did not."""
    assert job.end() == 0, job.output
    steps = [row["step"] for row in read_metrics(job.run_dir) if "train/loss" in row]
    assert steps == list(range(1, steps[-1] + 1))
    assert job.output.count("W&B is off from here on") == 1, job.output
    assert reason in job.output
    assert "Traceback" not in job.output
    deadline = time.monotonic() + 30
    while job.left() and time.monotonic() < deadline:  # wandb's monitor looks for its parent now and then
        time.sleep(0.2)
    assert [psutil.Process(pid).cmdline() for pid in job.left()] == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "reason"), [(9, "Connection"), (19, "it has not ended within 10 s")])
@pytest.mark.usefixtures("no_key")
def test_wandbs_process_killed_or_stopped_ends_nothing(
    flags: list[str], tmp_path: Path, number: int, reason: str
) -> None:
    job = Job(
        [*flags, "--max_steps", "9"], tmp_path / "run", fault("sleep 4", at="stepping", call=3),
        fault(f"run kill -{number} $(pgrep -P $PPID wandb-core)", at="stepping", call=4),
    )  # fmt: skip
    assert_goes_on(job, reason)


@pytest.mark.slow
@pytest.mark.usefixtures("no_key")
def test_a_full_disk_of_wandb_ends_nothing(flags: list[str], tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").symlink_to(small_disk("256k"))
    job = Job([*flags, "--max_steps", "60"], tmp_path / "run", fault("sleep 4", at="stepping", call=3))
    assert_goes_on(job, "No space left on device")


@pytest.mark.slow
def test_a_server_that_never_answers_costs_seconds(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections, and that is all; wandb itself would wait for 101 s. A busy machine slows both runs."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        seconds = []
        for mode in ("disabled", "auto"):
            started = time.monotonic()
            job = Job([*flags, "--tracking.mode", mode], tmp_path / mode)
            assert job.end() == 0, job.output
            seconds.append(time.monotonic() - started)
    assert job.output.count("does not answer: timed out") == 1, job.output
    assert seconds[1] < 3.5 + 3 * seconds[0], seconds
    assert_each_row_once(job.run_dir, inspect(job.run_dir))
