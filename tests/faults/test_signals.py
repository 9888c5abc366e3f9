"""Signals to real trainings, in every phase: one save where all stopped; the same command goes on as if nothing was.

Mostly a process signals itself, in the middle of a named function, so that the phase is certain.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.faults.jobs import Job, assert_as_if_nothing_had_happened, fault, finish, newest, rows
from textgen.runs.checkpoint import checkpoints

TERM, INT, USR1, USR2 = (int(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2))
STEPS = 12
SIGNALLED = "fault: signal"

slow = pytest.mark.slow

# 12 steps; evaluated, sampled and saved after 5, 10 and 12 of them.
FLAGS = [
    "--max_steps", str(STEPS), "--evaluate_every", "5", "--log_every", "1", "--model.dropout", "0.2",
    "--ema_decay", "0.9", "--sample_tokens", "12",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole_of_two(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run on two processes that nothing happened to."""
    return finish(flags, tmp_path_factory.mktemp("whole-of-two") / "run", processes=2).run_dir


def assert_preempted(job: Job, number: int, step: int) -> None:
    """Check what a training that was asked to stop leaves: its status, and one checkpoint where it stopped."""
    status = job.status
    assert status["state"] == "preempted", job.output
    assert (status["step"], status["total_steps"], status["reason"]) == (step, STEPS, signal.Signals(number).name)
    assert datetime.fromisoformat(status["time"]) >= datetime.fromisoformat(status["started"])
    assert newest(job.run_dir).name == f"step-{step:06d}"
    assert job.output.count(f"saved at step {step}") == 1
    assert 'training.py", line' not in job.output, "a launcher may have its own traceback"
    assert list((job.run_dir / "checkpoints").glob(".*")) == []


# --- one process -----------------------------------------------------------------------------------------------------

IN_PHASES = [
    pytest.param("stepping", 7, TERM, 7, id="stepping"),
    pytest.param("stepping", 7, INT, 7, id="stepping, SIGINT", marks=slow),
    pytest.param("stepping", 7, USR1, 7, id="stepping, SIGUSR1", marks=slow),
    pytest.param("stepping", 5, TERM, 5, id="the step before an evaluation", marks=slow),
    pytest.param("stepping", 12, TERM, 12, id="the last step", marks=slow),
    pytest.param("evaluating", 1, TERM, 5, id="evaluating", marks=slow),
    pytest.param("evaluating", 2, INT, 10, id="evaluating the second time", marks=slow),
    pytest.param("evaluating", 3, USR1, 12, id="the last evaluation", marks=slow),
    pytest.param("sampling", 20, TERM, 5, id="sampling", marks=slow),
    pytest.param("saving", 2, TERM, 6, id="saving in the background", marks=slow),
]


@pytest.mark.parametrize(("phase", "call", "number", "step"), IN_PHASES)
def test_signalled_training_saves_once_and_finishes_as_if_nothing_had_happened(
    phase: str, call: int, number: int, step: int, flags: list[str], whole: Path, tmp_path: Path
) -> None:
    faults = [fault(f"signal {number}", at=phase, call=call)]
    if phase == "saving":  # the training goes on beside it: its next step waits until the signal has come
        faults.append(fault("sleep 1", at="stepping", call=6))
    job = Job(flags, tmp_path / "run", *faults)
    assert job.end() == 128 + number, job.output
    assert_preempted(job, number, step)
    assert job.output.splitlines()[-1] == "interrupted"
    assert [row["step"] for row in rows(job.run_dir) if "valid/loss" in row] == [s for s in (5, 10) if s < step]
    finish(flags, job.run_dir)
    assert_as_if_nothing_had_happened(job.run_dir, whole)


@pytest.mark.parametrize("phase", ["encoding", pytest.param("tokenizing", marks=slow)])
def test_signal_before_the_first_step_leaves_only_its_status(phase: str, flags: list[str], tmp_path: Path) -> None:
    more = ["--data.cache_dir", str(tmp_path / "cache")]
    job = Job([*flags, *more], tmp_path / "run", fault(f"signal {TERM}", at=phase))
    assert job.end() == 128 + TERM, job.output
    assert {path.name for path in job.run_dir.iterdir()} <= {".lock", "status.json"}
    assert (job.status["state"], job.status["reason"]) == ("preempted", "SIGTERM before the first step")
    assert {path.name for path in (tmp_path / "cache").rglob("*")} == {"prepare.lock"}
    assert job.output.splitlines()[-1] == "interrupted"


@slow
def test_signal_while_a_checkpoint_is_loaded_saves_nothing(flags: list[str], whole: Path, tmp_path: Path) -> None:
    job = Job(flags, tmp_path / "run", fault(f"signal {TERM}", at="stepping", call=7))
    job.end()
    before = {path: path.stat().st_mtime_ns for path in (job.run_dir / "checkpoints").rglob("*")}
    job = Job(flags, job.run_dir, fault(f"signal {TERM}", at="resuming"))
    assert job.end() == 128 + TERM, job.output
    assert job.status["state"] == "preempted"
    assert job.status["reason"] == "SIGTERM before the first step"
    assert before == {path: path.stat().st_mtime_ns for path in (job.run_dir / "checkpoints").rglob("*")}
    finish(flags, job.run_dir)
    assert_as_if_nothing_had_happened(job.run_dir, whole)


@slow
def test_signal_while_a_large_text_is_read_ends_at_once(reviews_file: Path, flags: list[str], tmp_path: Path) -> None:
    """No wrapped function here: 20 MB of text, and a signal from outside."""
    lines = reviews_file.read_text().splitlines()
    large = tmp_path / "large.jsonl"
    with large.open("w") as file:
        for copy in range(300):
            file.writelines(line.replace("(No. ", f"(No. {copy} of ") + "\n" for line in lines)
    more = ["--data.cache_dir", str(tmp_path / "cache"), "--data.files", str(large)]
    job = Job([*flags, *more], tmp_path / "run")
    job.wait_for("source: 1 files")
    time.sleep(0.5)
    job.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert job.end() == 128 + TERM, job.output
    assert time.monotonic() - started < 10
    assert job.status["state"] == "preempted"


@slow
def test_the_stop_signal_is_chosen_by_a_flag(flags: list[str], whole: Path, tmp_path: Path) -> None:
    flags = [*flags, "--stop_signal", "SIGUSR2"]
    job = Job(flags, tmp_path / "run", fault(f"signal {USR2}", at="stepping", call=7))
    assert job.end() == 128 + USR2, job.output
    assert_preempted(job, USR2, 7)
    job = Job(flags, job.run_dir, fault(f"signal {USR1}", at="stepping", call=2))
    assert job.end() == -USR1, "which is no longer one of them, and ends a process by default"
    finish(flags, job.run_dir)
    assert_as_if_nothing_had_happened(job.run_dir, whole)


@slow
def test_without_a_stop_signal_there_are_two_left(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, "--stop_signal", "null"]
    job = Job(flags, tmp_path / "run", fault(f"signal {USR1}", at="stepping", call=7))
    assert job.end() == -USR1, job.output
    job = Job(flags, tmp_path / "run", fault(f"signal {INT}", at="stepping", call=2))
    assert job.end() == 128 + INT, job.output
    assert_preempted(job, INT, 7)


def test_second_interrupt_ends_a_training_that_is_in_one_long_call(flags: list[str], tmp_path: Path) -> None:
    """The first one and one within the same second, as a terminal and a launcher send it, are one."""
    job = Job(flags, tmp_path / "run", fault("compute", at="stepping", call=7))
    job.wait_for("fault: compute")
    job.process.send_signal(signal.SIGINT)
    time.sleep(0.4)
    job.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert job.process.poll() is None, "twice within a second counts once"
    job.process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert job.end() == 128 + INT, job.output
    assert time.monotonic() - started < 2
    assert job.status["state"] == "running", "as after a SIGKILL"
    assert newest(job.run_dir).name == "step-000005"


@slow
@pytest.mark.parametrize("phase", ["evaluating", "sampling"])
def test_second_interrupt_ends_an_evaluation(phase: str, flags: list[str], tmp_path: Path) -> None:
    job = Job(flags, tmp_path / "run", fault("compute", at=phase, call=1))
    job.wait_for("fault: compute")
    job.process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert job.end() == 128 + INT, job.output
    assert time.monotonic() - started < 2
    assert checkpoints(job.run_dir) == []


@slow
def test_long_sampling_ends_with_the_token_at_which_the_signal_came(flags: list[str], tmp_path: Path) -> None:
    job = Job([*flags, "--sample_tokens", "1000000"], tmp_path / "run", fault(f"signal {TERM}", at="sampling", call=20))
    job.wait_for(SIGNALLED)
    started = time.monotonic()
    assert job.end() == 128 + TERM, job.output
    assert time.monotonic() - started < 5
    assert_preempted(job, TERM, 5)


# --- under a launcher ------------------------------------------------------------------------------------------------


@slow
def test_launcher_of_one_process_that_is_ended_has_its_process_save(
    flags: list[str], whole: Path, tmp_path: Path
) -> None:
    """It passes no signal on, and dies; the kernel then tells the process."""
    faults = [fault(f"signal launcher {TERM}", at="stepping", call=7), fault("sleep 1", at="stepping", call=8)]
    job = Job(flags, tmp_path / "run", *faults, launcher=True)
    assert job.end() == -TERM, job.output
    deadline = time.monotonic() + 20
    while job.left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.left() == []
    step = job.status["step"]
    assert step in (7, 8), "the signal goes through the kernel: the next step may have begun"
    assert_preempted(job, TERM, step)
    finish(flags, job.run_dir)
    assert_as_if_nothing_had_happened(job.run_dir, whole)


# what each of two processes does, where all must stop
OF_TWO = [
    pytest.param("launcher 15", "stepping", 7, TERM, id="launcher, stepping"),
    pytest.param("launcher 2", "stepping", 7, INT, id="launcher, SIGINT"),
    pytest.param("launcher 15", "scoring", 1, TERM, id="launcher, evaluating"),
    pytest.param("15", "stepping", 7, TERM, id="the last process, stepping"),
    pytest.param("10", "scoring", 1, USR1, id="the last process, evaluating"),
]


@slow
@pytest.mark.parametrize(("action", "phase", "call", "number"), OF_TWO)
def test_two_processes_stop_at_the_same_step_and_finish_as_if_nothing_had_happened(
    action: str, phase: str, call: int, number: int, flags: list[str], whole_of_two: Path, tmp_path: Path
) -> None:
    """A launcher takes a while to pass a signal on: the other process waits in the same call, and so do both."""
    sent = fault(f"signal {action}", at=phase, call=call, rank=1)
    waiting = fault("sleep 2", at=phase, call=call, rank=0)
    job = Job(flags, tmp_path / "run", sent, waiting, processes=2)
    assert job.end() != 0, job.output
    assert job.left() == []
    assert_preempted(job, number, 7 if phase == "stepping" else 5)
    finish(flags, job.run_dir, processes=2)
    assert_as_if_nothing_had_happened(job.run_dir, whole_of_two)


@slow
def test_signal_that_a_launcher_does_not_pass_on_ends_all_without_a_save(
    flags: list[str], whole_of_two: Path, tmp_path: Path
) -> None:
    """Accelerate's passes SIGTERM, SIGINT, SIGHUP and SIGQUIT on, dies of others, and its processes die with it."""
    faults = [fault(f"signal launcher {USR1}", at="stepping", call=7, rank=0), fault("sleep", at="stepping", call=8)]
    job = Job(flags, tmp_path / "run", *faults, processes=2)
    assert job.end() == -USR1, job.output
    time.sleep(1)
    assert job.left() == []
    assert (job.status["state"], newest(job.run_dir).name) == ("running", "step-000005")
    finish(flags, job.run_dir, processes=2)
    assert_as_if_nothing_had_happened(job.run_dir, whole_of_two)


@slow
def test_launcher_can_be_told_to_pass_another_signal_on(
    flags: list[str], whole_of_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As launch/README.md says, for Slurm's `--signal=USR1`."""
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "120")
    faults = [fault(f"signal launcher {USR1}", at="stepping", call=7, rank=0), fault("sleep 1", at="stepping", call=8)]
    job = Job(flags, tmp_path / "run", *faults, processes=2)
    assert job.end() != 0
    step = job.status["step"]
    assert step in (7, 8)
    assert_preempted(job, USR1, step)
    finish(flags, job.run_dir, processes=2)
    assert_as_if_nothing_had_happened(job.run_dir, whole_of_two)


@slow
@pytest.mark.parametrize(("action", "rank"), [("launcher 15", 0), ("15", 1)], ids=["launcher", "the last process"])
def test_signal_to_two_processes_that_prepare_their_text_leaves_only_a_status(
    action: str, rank: int, flags: list[str], tmp_path: Path
) -> None:
    more = ["--data.cache_dir", str(tmp_path / "cache")]
    faults = [fault(f"signal {action}", at="tokenizing"), fault("sleep 2", at="encoding")]
    job = Job([*flags, *more], tmp_path / "run", *faults, processes=2)
    assert job.end() != 0
    assert job.left() == []
    assert {path.name for path in job.run_dir.iterdir()} <= {".lock", "status.json"}
    assert not list((tmp_path / "cache").glob("*.tmp"))


# --- the directory of a run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Job, Job, Job]]:
    """Yield a job that sleeps at its seventh step, and two that wanted its directory: on one process, and on two."""
    run_dir = tmp_path_factory.mktemp("held") / "run"
    first = Job(flags, run_dir, fault("sleep 25", at="stepping", call=7))
    first.wait_for("fault: sleep")
    status = first.status
    refused = Job(flags, run_dir), Job(flags, run_dir, processes=2)
    for job in refused:
        job.end()
    assert first.process.poll() is None, "it must still hold the directory"
    assert first.status == status
    yield first, *refused
    first.kill()


@slow
def test_second_job_on_a_run_directory_is_refused_with_the_holder(held: tuple[Job, Job, Job]) -> None:
    first, alone, two = held
    assert alone.process.returncode == 2
    assert two.process.returncode != 0
    for job in (alone, two):
        (line,) = job.errors()
        assert line.startswith(f"`{job.run_dir}` is in use by process {first.process.pid} on {os.uname().nodename}, ")


@slow
def test_job_whose_directory_another_one_wanted_is_unharmed(held: tuple[Job, Job, Job], whole: Path) -> None:
    first = held[0]
    assert first.end() == 0
    assert first.status["state"] == "finished"
    assert_as_if_nothing_had_happened(first.run_dir, whole)


@slow
def test_killed_job_stays_running_and_the_next_one_starts_at_once(
    flags: list[str], whole: Path, tmp_path: Path
) -> None:
    job = Job(flags, tmp_path / "run", fault("signal 9", at="stepping", call=7))
    assert job.end() == -9
    assert job.status["state"] == "running"
    finish(flags, job.run_dir)
    assert_as_if_nothing_had_happened(job.run_dir, whole)


@slow
@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 1)])
def test_crash_of_any_process_is_told_in_the_status(
    processes: int, rank: int, flags: list[str], tmp_path: Path
) -> None:
    crash = fault("raise", at="stepping", call=7, rank=rank)
    slow_disk = fault("sleep 2", at="saving")  # the crash comes while the checkpoint of step 5 is being written
    job = Job(flags, tmp_path / "run", crash, slow_disk, processes=processes)
    assert job.end() == 1
    assert job.status["state"] == "failed"
    assert job.status["reason"] == "RuntimeError: made to fail"
    assert job.status["step"] == 5, "that of the last checkpoint"
