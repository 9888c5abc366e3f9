"""Trainings on a disk without locks: stopped, lost, taken over. One history is left, as if nothing had happened."""

from __future__ import annotations

import errno
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.jobs import Fault, Job, assert_as_if_nothing_had_happened, fault

STOP = f"signal {int(signal.SIGSTOP)}"
slow = pytest.mark.slow
FLAGS = ["--max_steps", "12", "--evaluate_every", "5", "--log_every", "1", "--sample_tokens", "12"]


class Jobs:
    """Starts trainings on a disk without locks, and ends those that are left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, flags: list[str], run_dir: Path) -> None:
        self._monkeypatch, self._flags, self._run_dir = monkeypatch, flags, run_dir
        self.started: list[Job] = []

    def start(
        self, *faults: Fault, more: list[str] | None = None, host: str | None = None, number: int = errno.ENOLCK,
        silent: float = 1.0, processes: int = 1,
    ) -> Job:  # fmt: skip
        """Start a training on a machine whose flock answers with an error."""
        values = {"errno": number, "beat": 0.1, "silent": silent, "host": host}
        self._monkeypatch.setenv("TEXTGEN_NO_LOCKS", json.dumps(values))
        self.started.append(Job([*self._flags, *(more or [])], self._run_dir, *faults, processes=processes))
        return self.started[-1]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, flags: list[str], tmp_path: Path) -> Iterator[Jobs]:
    started = Jobs(monkeypatch, flags, tmp_path / "run")
    yield started
    for job in started.started:
        job.kill()


def assert_ends_with_a_line(old: Job, new: Job) -> None:
    """Check that a training that was taken over says by whom, and that the run is the other's alone."""
    assert old.end() == 2, old.output
    (line,) = old.errors()
    assert f"`{new.run_dir / '.lock'}` was " in line
    assert line.endswith("this process ends and writes nothing more")
    assert "Traceback" not in old.output
    assert new.end() == 0, new.output
    assert (new.status["state"], new.status["pid"], new.status["step"]) == ("finished", new.process.pid, 12)
    hidden = {path.name for path in new.run_dir.glob(".*")} | {path.name for path in new.run_dir.glob("*/.*")}
    assert hidden == {".lock"}


@pytest.mark.parametrize(
    ("place", "call", "number"),
    [
        pytest.param("saving", 9, errno.ENOLCK, id="in the second save"),
        pytest.param("stepping", 8, errno.ENOSYS, id="stepping", marks=slow),
        pytest.param("sampling", 20, errno.EOPNOTSUPP, id="sampling", marks=slow),
        pytest.param("resuming", 1, errno.EINVAL, id="before the first step", marks=slow),
    ],
)
def test_stopped_training_is_taken_over_and_goes_on_to_its_last_line(
    place: str, call: int, number: int, jobs: Jobs, whole: Path
) -> None:
    """The stopped training continues while the new holder sleeps between two steps."""
    if place == "resuming":
        assert jobs.start(fault("signal 9", at="stepping", call=8)).end() == -9
    old = jobs.start(fault(STOP, at=place, call=call), number=number)
    old.wait_for("fault: signal")
    new = jobs.start(fault("sleep 0.5", at="stepping", call=2), number=number)
    new.wait_for("fault: sleep")
    assert f"is taken over from process {old.process.pid} on {socket.gethostname()}, since" in new.output
    old.process.send_signal(signal.SIGCONT)
    assert_ends_with_a_line(old, new)
    assert_as_if_nothing_had_happened(new.run_dir, whole)


@slow
@pytest.mark.parametrize(("place", "call"), [("stepping", 8), ("sampling", 20)])
def test_stopped_training_finds_the_other_one_finished(place: str, call: int, jobs: Jobs, whole: Path) -> None:
    old = jobs.start(fault(STOP, at=place, call=call))
    old.wait_for("fault: signal")
    new = jobs.start()
    assert new.end() == 0, new.output
    before = {path: path.stat() for path in new.run_dir.rglob("*") if path.is_file()}
    old.process.send_signal(signal.SIGCONT)
    assert_ends_with_a_line(old, new)
    after = {path: path.stat() for path in new.run_dir.rglob("*") if path.is_file()}
    assert {path: stat.st_mtime_ns for path, stat in before.items()} == {p: s.st_mtime_ns for p, s in after.items()}
    assert_as_if_nothing_had_happened(new.run_dir, whole)


@slow
@pytest.mark.parametrize("place", ["encoding", "stepping"])
def test_training_that_was_stopped_in_its_preparation_leaves_everything_to_the_other(
    place: str, jobs: Jobs, tmp_path: Path
) -> None:
    """Neither the store nor a run's directory that is new and still empty; `place` is that of the other training."""
    more = ["--data.cache_dir", str(tmp_path / "cache")]
    old = jobs.start(fault(STOP, at="encoding"), more=more)
    old.wait_for("fault: signal")
    new = jobs.start(fault("sleep 1", at=place), more=more)
    new.wait_for("fault: sleep")
    old.process.send_signal(signal.SIGCONT)
    assert old.end() == 2, old.output
    assert old.errors()[0].startswith(f"`{tmp_path / 'cache' / 'prepare.lock'}` was ")
    assert new.end() == 0, new.output
    assert (new.status["state"], new.status["pid"]) == ("finished", new.process.pid)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".lock"}


@slow
def test_live_training_is_named_to_a_second_one_and_not_disturbed(jobs: Jobs, whole: Path) -> None:
    first = jobs.start(fault("sleep 3", at="stepping", call=8), host="node07", silent=60)
    first.wait_for("fault: sleep")
    second = jobs.start(silent=60)
    assert second.end() == 2, second.output
    (line,) = second.errors()
    held = f"process {first.process.pid} on node07, since {first.status['started']}"
    assert line == f"`{first.run_dir}` is in use by {held}"
    assert first.end() == 0, first.output
    assert_as_if_nothing_had_happened(first.run_dir, whole)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
def test_training_of_a_lost_machine_goes_on_elsewhere(
    processes: int, jobs: Jobs, flags: list[str], whole: Path
) -> None:
    """Its lease is there, its pids are unknown here; the others of its processes end without it."""
    lost = jobs.start(fault("signal 9", at="stepping", call=8, rank=0), host="node07", processes=processes)
    assert lost.end() != 0
    assert len(list((lost.run_dir / ".lock.lease").iterdir())) == 1
    new = jobs.start(host="node08", processes=processes)
    assert new.end() == 0, new.output
    assert "on node07, since" in new.output
    assert "which has given no sign of life for 1 s" in new.output
    if processes == 1:
        assert_as_if_nothing_had_happened(new.run_dir, whole)
    assert new.status["state"] == "finished"
    assert not (new.run_dir / ".lock.lease").exists()


@slow
def test_training_that_was_killed_on_this_machine_goes_on_at_once(jobs: Jobs, whole: Path) -> None:
    assert jobs.start(fault("signal 9", at="stepping", call=8), silent=1e6).end() == -9
    new = jobs.start(silent=1e6)
    assert new.end() == 0, new.output
    assert "which has ended" in new.output
    assert_as_if_nothing_had_happened(new.run_dir, whole)
