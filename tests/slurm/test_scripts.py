"""The scripts around the training job, and `textgen submit`, on a real Slurm."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.slurm.conftest import NOT_ENDED, ROOT, Slurm
from textgen.cli import main
from textgen.commands.submit import minutes
from textgen.runs.directory import read_status

SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
SUBMIT = [sys.executable, "-m", "textgen", "submit"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkout for a site of the partition `urgent`, whose container notes the commands that it runs."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("textgen", "tokenizer", "launch"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("site.sh", "__pycache__"))
    for name in ("train_distributed.py", "accelerate_config.yaml"):
        shutil.copy(ROOT / name, checkout)
    container = checkout / "container"
    container.write_text(f'#!/bin/sh\necho "$*" >> {checkout}/contained\nexec "$@"\n')
    container.chmod(0o755)
    (checkout / "launch" / "slurm" / "site.sh").write_text(
        f"export SBATCH_PARTITION=urgent\nTEXTGEN_CONTAINER=({container})\nexport TEXTGEN_PYTHON={sys.executable}\n"
    )
    return checkout


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    """Return what jobs want to know of these machines, whose GPUs are none."""
    return {"TEXTGEN_HOME": str(home), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_accepts(script: Path, slurm: Slurm) -> None:
    said = slurm.run(["sbatch", "--test-only", "--gpus-per-node=4", "--array=1-3", str(script)]).stderr
    assert "to start at" in said


@pytest.mark.parametrize("limit", ["90", "5:30", "4:00:00", "1-12", "1-0:30", "2-1:01:30"])
def test_limits_of_time_are_what_slurm_makes_of_them(limit: str, slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit("--hold", f"--time={limit}", "--output=/dev/null", "--wrap=true", cwd=tmp_path)
    days, _, rest = slurm.job(job)["TimeLimit"].rpartition("-")
    hours, mins, seconds = map(int, rest.split(":"))
    told = timedelta(days=int(days or 0), hours=hours, minutes=mins, seconds=seconds)
    assert minutes(limit) is not None
    assert -(-told // timedelta(minutes=1)) == -(-minutes(limit) // 1)  # Slurm counts whole minutes, upwards


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_folder_that_is_no_checkout_is_told_by(script: Path, slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit("--array=1", "--output=log", script, "flags.txt", cwd=tmp_path)
    slurm.wait(job, expect="FAILED")
    assert slurm.log(job).startswith(f"error: `{tmp_path}` has no train_distributed.py: ")


def test_task_beyond_the_end_of_its_sweep_fails_and_says_so(
    slurm: Slurm, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "flags.txt").write_text("--seed 1\n# two\n\n--seed 2\n")
    script = ROOT / "launch" / "slurm" / "sweep.sbatch"
    job = slurm.submit("--array=3", "--output=log", script, "flags.txt", cwd=tmp_path, env=environment)
    slurm.wait(job, expect="FAILED")
    assert slurm.log(job) == "error: `flags.txt` has no training 3: it has 2\n"
    assert not (tmp_path / "runs").exists()


def test_task_of_a_sweep_that_is_told_to_end_before_it_trains_is_requeued_alone(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "launch" / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "slurm" / "job.sh", tmp_path / "launch" / "slurm")
    (tmp_path / "launch" / "slurm" / "site.sh").write_text(
        f'export TEXTGEN_PYTHON={sys.executable}\n[ -n "$SLURM_RESTART_COUNT" ] || {{ echo begun; sleep 5; }}\n'
    )
    (tmp_path / "launch" / "slurm" / "train.sbatch").write_text('echo "trains $*"\n')
    (tmp_path / "train_distributed.py").touch()
    (tmp_path / "textgen").symlink_to(ROOT / "textgen")
    (tmp_path / "flags.txt").write_text("--seed 1\n--seed 2\n")
    script = ROOT / "launch" / "slurm" / "sweep.sbatch"
    job = slurm.submit("--array=1-2", "--output=log%a", script, "flags.txt", "--max_steps", "9", cwd=tmp_path)
    first, last = f"{job}_1", f"{job}_2"
    slurm.wait_for_log(last, "begun")
    slurm.cancel("--signal=USR1", "--batch", last)
    assert [slurm.wait(task)["Restarts"] for task in (first, last)] == ["0", "1"]
    assert slurm.log(last).endswith(f"trains --max_steps 9 --seed 2 --run_dir runs/sweep-{job}/2\n")


# --- a sweep ---------------------------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """What became of a sweep."""

    runs: Path
    restarts: list[str]


@pytest.fixture(scope="module")
def sweep(
    cluster: Slurm, environment: dict[str, str], tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sweep]:
    """Yield a sweep of three, which `textgen submit` submitted, and whose last was asked to save on its way."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "flags.txt").write_text(
        "# three\n--learning_rate 0.01\n\n--learning_rate 0.02 --sample_prompts 'a  b' '$HOME'\n--seed 7 # x\n"
    )
    flags = [*tiny_flags, "--max_steps", "4000", "--evaluate_every", "4000"]
    argv = [*SUBMIT, "--sweep", "flags.txt", "--gpus_per_node", "1", "--cpus_per_process", "1", "--", *flags]
    job = int(cluster.run(argv, cwd=folder, env=environment | {"PYTHONPATH": environment["TEXTGEN_HOME"]}).stdout)
    runs, tasks = folder / "runs" / f"sweep-{job}", [f"{job}_{number}" for number in (1, 2, 3)]
    cluster.wait_until(job, lambda: len(list(runs.glob("*/metrics.jsonl"))) == 3, "three runs")
    cluster.cancel("--signal=USR1", "--batch", tasks[2])
    yield Sweep(runs, [cluster.wait(task)["Restarts"] for task in tasks])
    cluster.cancel("--user=root")


@pytest.mark.slow
def test_sweep_leaves_a_finished_run_for_each_line(sweep: Sweep) -> None:
    assert sorted(path.name for path in sweep.runs.iterdir()) == ["1", "2", "3"]
    settings = [yaml.safe_load((sweep.runs / number / "config.yaml").read_text()) for number in "123"]
    assert [read_status(sweep.runs / number)["state"] for number in "123"] == ["finished"] * 3
    assert [each["learning_rate"] for each in settings] == [0.01, 0.02, 0.001]
    assert [each["seed"] for each in settings] == [42, 42, 7]
    assert settings[1]["sample_prompts"] == ["a  b", "$HOME"]


@pytest.mark.slow
def test_requeue_of_the_last_of_a_sweep_leaves_the_others_alone(sweep: Sweep) -> None:
    """Its number is that of the whole array, which to requeue would kill them all."""
    assert sweep.restarts == ["0", "0", "1"]


@pytest.mark.slow
def test_sweep_makes_one_table(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", *(str(path) for path in sorted(sweep.runs.iterdir())), "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    settings = sorted((row["settings"]["learning_rate"], row["settings"]["seed"]) for row in rows)
    assert settings == [(0.001, 7), (0.01, 42), (0.02, 42)]
    assert all(row["state"] == "finished" and row["bits_per_byte"] for row in rows)


# --- one job ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_submitted_training_is_the_one_that_was_asked_for(
    slurm: Slurm, home: Path, environment: dict[str, str], tiny_flags: list[str], tmp_path: Path
) -> None:
    argv = [*SUBMIT, "--gpus_per_node", "2", "--time", "10", "--name", "tiny", "--sbatch=--comment=hello"]
    own = environment | {"PYTHONPATH": str(home)}
    done = slurm.run([*argv, "--", *tiny_flags], cwd=tmp_path, env=own)
    job = int(done.stdout)
    shown = slurm.wait(job)
    assert (shown["TimeLimit"], shown["Comment"], shown["Partition"]) == ("00:10:00", "hello", "urgent")
    assert "2 processes on 1 machine by gloo" in slurm.log(job)
    assert Path(shown["StdOut"]) == tmp_path / "runs" / "slurm" / f"tiny-{job}.out"
    assert f"run      runs/tiny-{job}\n" in done.stderr
    assert read_status(tmp_path / "runs" / f"tiny-{job}")["state"] == "finished"


@pytest.mark.slow
def test_advice_on_stopping_and_going_on_is_right(
    slurm: Slurm, home: Path, environment: dict[str, str], tiny_flags: list[str], tmp_path: Path
) -> None:
    own, saved = environment | {"PYTHONPATH": str(home)}, [0]
    endless = ["--max_steps", "1000000", "--max_epochs", "10000", "--evaluate_every", "1000000"]
    command = [*SUBMIT, "--gpus_per_node", "0", "--", *tiny_flags, *endless]
    for way in (0, 1):
        done = slurm.run(command, cwd=tmp_path, env=own)
        job = int(done.stdout)
        advice = [line[9:].partition("    #")[0] for line in done.stderr.splitlines()[-6:]]
        run, stops, again = tmp_path / advice[0], advice[2:4], advice[5]
        slurm.wait_for_log(job, f"steps {saved[-1]} to")
        slurm.wait_until(job, lambda run=run: read_status(run)["state"] == "running", "begun")
        slurm.run(["bash", "-c", stops[way]])
        slurm.wait_until(job, lambda job=job: slurm.job(job)["JobState"] not in NOT_ENDED, "ended")
        status = read_status(run)
        assert (slurm.job(job)["Restarts"], status["state"]) == ("0", "preempted")
        saved.append(status["step"])
        command = [*SUBMIT, *shlex.split(again)[2:]]
    assert 0 < saved[1] < saved[2]


@pytest.mark.slow
def test_job_evaluates_on_all_gpus_and_prints_bits_per_byte(
    slurm: Slurm, home: Path, environment: dict[str, str], tiny_run: Path, tmp_path: Path
) -> None:
    script = ROOT / "launch" / "slurm" / "evaluate.sbatch"
    flags = [tiny_run, "--data", "validation", "--json"]
    job = slurm.submit("--gpus-per-node=2", "--output=log", script, *flags, cwd=tmp_path, env=environment)
    slurm.wait(job)
    figures = json.loads(slurm.log(job).splitlines()[-1])
    argv = [sys.executable, "-m", "textgen", "evaluate", *map(str, flags)]
    alone = json.loads(subprocess.run(argv, cwd=ROOT, capture_output=True, check=True).stdout)
    assert figures["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-6)
    assert any("--num_processes 2" in line and "textgen evaluate" in line for line in contained(home))


@pytest.mark.slow
def test_job_samples_as_the_command_does(
    slurm: Slurm, home: Path, environment: dict[str, str], tiny_run: Path, tmp_path: Path
) -> None:
    script = ROOT / "launch" / "slurm" / "sample.sbatch"
    flags = [tiny_run, "--prompt", "I  watched", "--max_new_tokens", "20", "--seed", "3"]
    job = slurm.submit("--output=log", "--error=errors", script, *flags, cwd=tmp_path, env=environment)
    slurm.wait(job)
    argv = [sys.executable, "-m", "textgen", "sample", *map(str, flags)]
    alone = subprocess.run(argv, cwd=ROOT, env=os.environ | environment, capture_output=True, check=True)
    assert (tmp_path / "log").read_bytes() == alone.stdout
    assert alone.stdout.startswith(b"I  watched")
    assert any("textgen sample" in line for line in contained(home))


def contained(home: Path) -> list[str]:
    """Return the commands that ran in the site's container."""
    return (home / "contained").read_text().splitlines()
