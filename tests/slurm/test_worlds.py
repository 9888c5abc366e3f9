"""train.sbatch on a real Slurm: the world that was asked for, with the losses of one process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.losses import train_losses
from tests.slurm.conftest import ROOT, Slurm
from textgen.runs.metrics_file import read_metrics

TRAIN = "launch/slurm/train.sbatch"
STEPS = 20
CPU = {"ACCELERATE_USE_CPU": "true"}

slow = pytest.mark.slow

# sbatch's flags, the environment, processes and machines that they mean
WORLDS = [
    pytest.param(["--nodes=2", "--gpus-per-node=2"], CPU, 4, 2, id="2 nodes x 2 GPUs"),
    pytest.param(["--nodes=2", "--gpus-per-node=1"], CPU, 2, 2, id="2 nodes x 1 GPU", marks=slow),
    pytest.param(["--nodes=1", "--gres=gpu:4", "--cpus-per-task=4"], CPU, 4, 1, id="1 node x 4 GPUs", marks=slow),
    pytest.param(["--nodes=2"], {"TEXTGEN_PROCESSES_PER_NODE": "2"}, 4, 2, id="2 nodes x 2 processes", marks=slow),
    pytest.param(["--nodes=1"], {}, 1, 1, id="1 process", marks=slow),
]


@pytest.fixture(scope="module")
def flags(tiny_flags: list[str]) -> list[str]:
    more = ["--max_steps", str(STEPS), "--log_every", "1", "--sample_tokens", "4", "--evaluate_documents", "4"]
    return [*tiny_flags, *more]


@pytest.fixture(scope="module")
def alone(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of one process without Slurm."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "train_distributed.py", *flags, "--run_dir", str(run_dir)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return train_losses(read_metrics(run_dir))


def assert_same_losses(run_dir: Path, alone: list[float]) -> None:
    ours = train_losses(read_metrics(run_dir))
    assert len(ours) == len(alone) == STEPS
    assert max(abs(a / b - 1) for a, b in zip(ours, alone, strict=True)) <= 1e-5


def worlds(log: str) -> list[tuple[int, int]]:
    """Return processes and machines of every training that has said what it is."""
    return [(int(n), int(m)) for n, m in re.findall(r"^(\d+) process(?:es)? on (\d+) machines?", log, re.MULTILINE)]


@pytest.mark.parametrize(("asked", "environment", "processes", "machines"), WORLDS)
def test_job_trains_the_world_it_asks_for_with_the_losses_of_one_process(
    asked: list[str], environment: dict[str, str], processes: int, machines: int,
    slurm: Slurm, flags: list[str], alone: list[float], tmp_path: Path,
) -> None:  # fmt: skip
    run_dir = tmp_path / "run"
    output = f"--output={tmp_path}/%j.log"
    job = slurm.submit(output, *asked, TRAIN, *flags, "--run_dir", run_dir, env=environment)
    slurm.wait(job)
    log = slurm.log(job)
    assert worlds(log) == [(processes, machines)], log
    assert f"job {job}, restart 0: {machines} x {processes // machines} processes on node" in log
    assert f"run directory {run_dir}\n" in log
    assert_same_losses(run_dir, alone)
    assert slurm.left(job) == {}


@slow
@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(["--gpus=4"], id="3 GPUs and 1"),
        pytest.param(["--gres=gpu:2", "--exclusive"], id="2 GPUs of 4"),
    ],
)
def test_job_whose_nodes_do_not_give_the_same_gpus_is_refused(
    asked: list[str], slurm: Slurm, flags: list[str], tmp_path: Path
) -> None:
    """Slurm deals `--gpus=4` as it likes, and shows an exclusive job GPUs that it does not give to its steps."""
    output = f"--output={tmp_path}/%j.log"
    job = slurm.submit(output, "--nodes=2", *asked, TRAIN, *flags, "--run_dir", tmp_path / "run", env=CPU)
    assert slurm.wait(job, expect="FAILED")["Restarts"] == "0"
    assert re.search(r"error: node\d gives \d GPUs and not \d, as the job has", slurm.log(job))
    assert not (tmp_path / "run").exists()


def test_tasks_of_srun_join_by_themselves(slurm: Slurm, flags: list[str], alone: list[float], tmp_path: Path) -> None:
    """Without `accelerate launch`: the trainer takes its place from Slurm's variables."""
    run_dir = tmp_path / "run"
    python = [sys.executable, "train_distributed.py", *flags, "--run_dir", str(run_dir)]
    done = slurm.run(["srun", "--nodes=2", "--ntasks=4", *python], env={"OMP_NUM_THREADS": "1"})
    assert worlds(done.stderr) == [(4, 2)], done.stderr
    assert_same_losses(run_dir, alone)


@slow
@pytest.mark.parametrize(
    ("asked", "launcher", "told"),
    [
        pytest.param(
            ["--ntasks=2"], ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"],
            "`accelerate launch` was asked for 1 processes", id="2 times 1 process",
        ),
        pytest.param(["--gpus-per-node=1"], [], "GPUs are promised (SLURM_STEP_GPUS=0)", id="unseen GPU"),
    ],
)  # fmt: skip
def test_step_that_is_not_the_world_it_promises_is_refused(
    asked: list[str], launcher: list[str], told: str, slurm: Slurm, flags: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    python = [sys.executable, *launcher, "train_distributed.py", *flags, "--run_dir", str(run_dir)]
    done = slurm.run(["srun", *asked, *python], check=False)
    assert done.returncode != 0
    assert f"error: {told}" in done.stderr
    assert not run_dir.exists()


ONE_TASK_OF_TWO_MACHINES = ["salloc", "--nodes=2", "srun", "--ntasks=1"]  # as in a shell of `srun --pty`


def test_part_of_a_job_is_refused(slurm: Slurm, flags: list[str], tmp_path: Path) -> None:
    python = [sys.executable, "train_distributed.py", *flags, "--run_dir", str(tmp_path / "run")]
    done = slurm.run([*ONE_TASK_OF_TWO_MACHINES, *python], check=False)
    assert done.returncode == 2
    assert (
        "error: the Slurm job has 2 machines, this training 1: start it on all of them, by `srun --overlap --nodes=2 "
        "--ntasks=N` with N processes in all, or as `launch/slurm/train.sbatch` does; `TEXTGEN_PART_OF_JOB=1` allows a "
        "part of the job\n"
    ) in done.stderr
    assert not (tmp_path / "run").exists()


@slow
@pytest.mark.parametrize(
    ("more", "variables", "world"),
    [(["srun", "--overlap", "--nodes=2", "--ntasks=2"], {}, (2, 2)), ([], {"TEXTGEN_PART_OF_JOB": "1"}, (1, 1))],
    ids=["all of it", "on purpose"],
)
def test_what_the_refusal_names_trains(
    more: list[str], variables: dict[str, str], world: tuple[int, int], slurm: Slurm, flags: list[str], tmp_path: Path
) -> None:
    python = [sys.executable, "train_distributed.py", *flags, "--run_dir", str(tmp_path / "run")]
    done = slurm.run([*ONE_TASK_OF_TWO_MACHINES, *more, *python], env={"OMP_NUM_THREADS": "1"} | variables)
    assert worlds(done.stderr) == [world], done.stderr
