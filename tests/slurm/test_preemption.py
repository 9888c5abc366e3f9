"""train.sbatch, interrupted in every way that Slurm has: the job ends as if nothing had happened.

Two nodes with a process each. A step waits a twentieth of a second, so that there is time to interrupt.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.jobs import assert_as_if_nothing_had_happened, newest
from tests.slurm.conftest import ROOT, Slurm
from textgen.runs.directory import read_status
from textgen.runs.metrics_file import read_metrics

pytestmark = pytest.mark.slow

STEPS = 200
PAUSES = {"train_step": 0.05}  # in seconds, by functions of textgen.training.loop
TRAIN = "launch/slurm/train.sbatch"
TRAINING = """
import json, os, time
from textgen import cli
from textgen.training import loop as training

def slow_down(name, seconds):
    function = getattr(training, name)
    setattr(training, name, lambda *args: (time.sleep(seconds), function(*args))[1])

for name, seconds in json.loads(os.environ["PAUSES"]).items():
    slow_down(name, seconds)
cli.train_main()
"""

Submit = Callable[..., int]


@pytest.fixture(scope="module")
def flags(tiny_flags: list[str]) -> list[str]:
    more = [
        "--max_steps", str(STEPS), "--log_every", "5", "--evaluate_every", "100", "--save_every", "20",
        "--evaluate_documents", "4", "--sample_tokens", "4", "--model.dropout", "0.2", "--ema_decay", "0.9",
    ]  # fmt: skip
    return [*tiny_flags, *more]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkout whose training takes its time."""
    home = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "textgen", "tokenizer", ".venv"):
        if (ROOT / name).exists():
            (home / name).symlink_to(ROOT / name)
    (home / "train_distributed.py").write_text(TRAINING)
    return home


@pytest.fixture(scope="module")
def submit(cluster: Slurm, checkout: Path, flags: list[str]) -> Submit:
    """Return a function that submits a training and returns the job."""

    def call(run_dir: Path, *asked: str, pauses: dict[str, float] = PAUSES, more: tuple[str, ...] = ()) -> int:
        environment = {
            "ACCELERATE_USE_CPU": "true", "TEXTGEN_HOME": str(checkout), "PAUSES": json.dumps(pauses),
        }  # fmt: skip
        output = f"--output={run_dir.parent}/%j.log"
        asked = (output, "--nodes=2", "--gpus-per-node=1", *asked)
        return cluster.submit(*asked, TRAIN, *flags, *more, "--run_dir", run_dir, env=environment)

    return call


@pytest.fixture(scope="module")
def whole(cluster: Slurm, submit: Submit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    cluster.wait(submit(run_dir, pauses={}))
    return run_dir


def begin_steps(slurm: Slurm, job: int, run_dir: Path, *, start: int) -> None:
    """Wait until a job has taken some steps since its latest start."""
    slurm.wait_for_log(job, " per epoch\n", count=start + 1)
    first = int(re.findall(r"steps (\d+) to \d+", slurm.log(job))[-1])

    def has_stepped() -> bool:
        rows = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        return max((row["step"] for row in rows), default=0) >= first + 25

    slurm.wait_until(job, has_stepped, f"taken steps after step {first}")


def interrupt_twice(slurm: Slurm, job: int, run_dir: Path, interrupt: Callable[[], None]) -> None:
    """Interrupt a job whenever it has taken some steps, twice, and wait until it has finished."""
    for start in range(2):
        begin_steps(slurm, job, run_dir, start=start)
        interrupt()
        slurm.wait_for_log(job, f"job {job}, restart {start + 1}: 2 x 1 processes")
    assert int(slurm.wait(job)["Restarts"]) >= 2


def preempt(slurm: Slurm, home: Path) -> None:
    """Submit a job that takes all nodes from the others for a second."""
    slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", f"--output={home}/urgent", "--wrap=sleep 1")


def assert_whole(slurm: Slurm, job: int, run_dir: Path, whole: Path) -> None:
    """Check that a job has left what an uninterrupted one leaves, and no process."""
    assert read_status(run_dir)["state"] == "finished"
    assert_as_if_nothing_had_happened(run_dir, whole)
    assert slurm.left(job) == {}


def test_usr1_before_the_limit_saves_and_requeues(slurm: Slurm, submit: Submit, whole: Path, tmp_path: Path) -> None:
    """The signal is sent by hand here, at once; and each part goes on with the same W&B run."""
    run_dir = tmp_path / "run"
    job = submit(run_dir, more=("--tracking.mode", "offline", "--keep_last", "1000"))
    interrupt_twice(slurm, job, run_dir, lambda: slurm.cancel("--signal=USR1", "--batch", str(job)))
    assert slurm.log(job).count("saved, back into the queue\n") == 2
    assert slurm.log(job).count("SIGUSR1: saved at step") == 2
    assert_whole(slurm, job, run_dir, whole)
    trainers = [json.loads(path.read_text()) for path in run_dir.glob("checkpoints/step-*/trainer.json")]
    assert len(trainers) == STEPS / 20 + 2
    assert len({trainer["wandb_id"] for trainer in trainers}) == 1
    assert sorted(path.suffix for path in run_dir.glob("wandb/offline-run-*/*.wandb")) == [".wandb"] * 3
    assert {path.stem for path in run_dir.glob("wandb/*/*.wandb")} == {f"run-{trainers[0]['wandb_id']}"}


def test_time_limit_saves_and_requeues(slurm: Slurm, submit: Submit, whole: Path, tmp_path: Path) -> None:
    """Slurm looks at the clock every 30 s: the signal comes 1 to 31 s before the end of the minute."""
    run_dir = tmp_path / "run"
    job = submit(run_dir, "--time=1", "--signal=B:USR1@1", pauses={"train_step": 100 / STEPS})
    restarts = int(slurm.wait(job, timeout=480)["Restarts"])
    assert restarts >= 2
    assert slurm.log(job).count("saved, back into the queue\n") == restarts
    assert_whole(slurm, job, run_dir, whole)


def test_requeued_job_goes_on(slurm: Slurm, submit: Submit, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(run_dir)
    interrupt_twice(slurm, job, run_dir, lambda: slurm.run(["scontrol", "requeue", str(job)]) and None)
    assert_whole(slurm, job, run_dir, whole)


def test_preempted_job_saves_in_its_grace_time_and_goes_on(
    slurm: Slurm, submit: Submit, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(run_dir)
    interrupt_twice(slurm, job, run_dir, lambda: preempt(slurm, tmp_path))
    assert slurm.log(job).count("SIGTERM: saved at step") == 2
    assert slurm.log(job).count("saved, back into the queue\n") == 2
    assert_whole(slurm, job, run_dir, whole)


def test_job_interrupted_while_it_starts_goes_on(slurm: Slurm, submit: Submit, whole: Path, tmp_path: Path) -> None:
    """Before anything in it handles signals: USR1 is repeated until something does, and SIGTERM just ends it."""
    run_dir = tmp_path / "run"
    job = submit(run_dir, pauses={})
    slurm.wait_for_log(job, f"job {job}, restart 0: 2 x 1 processes")
    slurm.cancel("--signal=USR1", "--batch", str(job))
    slurm.wait_for_log(job, f"job {job}, restart 1: 2 x 1 processes")
    preempt(slurm, tmp_path)
    slurm.wait_for_log(job, f"job {job}, restart 2: 2 x 1 processes")
    slurm.wait(job)
    assert_whole(slurm, job, run_dir, whole)


def test_job_goes_on_when_a_lost_node_is_back(slurm: Slurm, submit: Submit, whole: Path, tmp_path: Path) -> None:
    """Of a power cut the other node hears nothing; of a crash it hears by closed connections, before Slurm does."""
    run_dir = tmp_path / "run"
    job = submit(run_dir)
    losses = iter((slurm.power_off, slurm.crash))

    def lose_a_node() -> None:
        next(losses)(2)
        try:
            slurm.wait_until(job, lambda: slurm.job(job)["JobState"] == "PENDING", "gone back into the queue")
        finally:
            slurm.power_on(2)

    interrupt_twice(slurm, job, run_dir, lose_a_node)
    assert_whole(slurm, job, run_dir, whole)


def test_job_that_starts_on_a_dead_node_waits_for_it(slurm: Slurm, submit: Submit, whole: Path, tmp_path: Path) -> None:
    """Slurm has not noticed yet and hands it out, and srun fails."""
    run_dir = tmp_path / "run"
    slurm.crash(2)
    try:
        job = submit(run_dir, pauses={})
        slurm.wait_for_log(job, "a node does not answer, back into the queue\n")
    finally:
        slurm.power_on(2)
    slurm.wait(job)
    assert_whole(slurm, job, run_dir, whole)


def test_cancelled_job_saves_and_stays_away(slurm: Slurm, submit: Submit, whole: Path, tmp_path: Path) -> None:
    """To requeue itself within the time that a cancelled job is left would undo the scancel."""
    run_dir = tmp_path / "run"
    job = submit(run_dir)
    begin_steps(slurm, job, run_dir, start=0)
    slurm.cancel(str(job))
    slurm.wait(job, expect="CANCELLED")
    assert read_status(run_dir)["state"] == "preempted"
    assert newest(run_dir).name == f"step-{read_status(run_dir)['step']:06d}"
    assert slurm.left(job) == {}
    job = submit(run_dir)
    slurm.wait(job)
    assert "resuming at step" in slurm.log(job)
    assert_whole(slurm, job, run_dir, whole)


def test_job_whose_process_dies_fails_and_is_not_requeued(slurm: Slurm, submit: Submit, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(run_dir)
    begin_steps(slurm, job, run_dir, start=0)
    os.kill(slurm.trainers(job)[1], signal.SIGKILL)
    shown = slurm.wait(job, expect="FAILED", timeout=60)
    assert shown["Restarts"] == "0"
    assert read_status(run_dir)["state"] == "failed"
    assert slurm.left(job) == {}


def test_wrong_flag_fails_the_job(slurm: Slurm, submit: Submit, tmp_path: Path) -> None:
    job = submit(tmp_path / "run", more=("--learning_rat", "1"))
    assert slurm.wait(job, expect="FAILED")["Restarts"] == "0"
    assert "error: unknown setting `learning_rat`; the nearest is `learning_rate`" in slurm.log(job)


def test_time_limit_that_leaves_no_time_for_a_step_ends_the_job(slurm: Slurm, submit: Submit, tmp_path: Path) -> None:
    """Else it would be requeued for ever."""
    job = submit(tmp_path / "run", "--time=3", pauses={"build_training": 1e6})
    for start in range(2):
        slurm.wait_for_log(job, "2 processes on 2 machines", count=start + 1)
        slurm.cancel("--signal=USR1", "--batch", str(job))
        if start == 0:
            slurm.wait_for_log(job, f"job {job}, restart 1")
    slurm.wait(job, expect="FAILED")
    assert f"error: job {job}, restart 1: saved, and no step was taken" in slurm.log(job)
