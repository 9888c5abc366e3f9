"""The lock of a file, on a disk with flock and on one whose lock calls fail; races of real processes.

Run as a script, it is many processes that race for leases and report who has won.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forking import run_script
from textgen.errors import TextgenError
from textgen.files import write_atomic
from textgen.runs import directory as directory_module
from textgen.runs import lock as lock_module
from textgen.runs.checkpoint import Saver, checkpoint_path, remove_leftovers, write_checkpoint
from textgen.runs.directory import RunDirectory, read_status
from textgen.runs.lock import FileLock, Holder
from textgen.tracking.tracker import Tracker

RACERS, ROUNDS = 4, 24


def refuse_flock(number: int) -> Callable[..., None]:
    """Return a flock as of a disk that answers with an error."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let flock fail as over NFS without lockd, and make the limits short."""
    monkeypatch.setattr(lock_module.fcntl, "flock", refuse_flock(errno.ENOLCK))
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock_module, "SILENT_SECONDS", 0.3)


def leave_lease(path: Path, holder: Holder | None = None, **changes: str) -> str:
    """Leave the lease of a process that no longer beats; return its state."""
    name = (holder or Holder.this())._replace(**changes).name()
    directory = path.with_name(f"{path.name}.lease")
    directory.mkdir()
    (directory / name).touch()
    return name


# --- with flock ------------------------------------------------------------------------------------------------------


def test_disk_with_locks_gets_flock_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, other = FileLock(tmp_path / "file"), FileLock(tmp_path / "file")
    assert lock.acquire(seconds=0)
    monkeypatch.setattr(lock_module.Lease, "beat", None)  # a check that did anything would fail
    with lock.hold():
        lock.require()
        assert not lock.is_lease
        assert not other.try_acquire()
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert other.try_acquire()
    other.release()


def test_lease_of_a_machine_without_locks_excludes_one_with_locks(
    no_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, other = FileLock(tmp_path / "file"), FileLock(tmp_path / "file")
    assert lock.acquire(seconds=0)
    monkeypatch.setattr(lock_module.fcntl, "flock", lambda *_: None)
    assert not other.acquire(seconds=0)
    lock.release()
    assert other.acquire(seconds=0)
    assert not other.is_lease
    other.release()


def test_other_error_of_flock_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module.fcntl, "flock", refuse_flock(errno.EIO))
    with pytest.raises(TextgenError) as refused:
        FileLock(tmp_path / "file").acquire(seconds=0)
    assert str(refused.value) == f"`{tmp_path / 'file'}` cannot be locked: Input/output error"


# --- without ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EINVAL"])
def test_disk_without_locks_gets_a_lease_that_excludes_and_is_removed(
    name: str, no_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module.fcntl, "flock", refuse_flock(getattr(errno, name)))
    lock, other = FileLock(tmp_path / "file"), FileLock(tmp_path / "file")
    assert lock.acquire(seconds=0)
    with lock.hold():
        lock.require()
        assert lock.is_lease
        assert not other.try_acquire()
        assert not other.acquire(seconds=0)  # it has seen a beat
        lock.require()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert other.acquire(seconds=0)
    other.release()


def test_waiting_process_gets_a_lease_that_is_released(no_locks: None, tmp_path: Path) -> None:
    lock, other = FileLock(tmp_path / "file"), FileLock(tmp_path / "file")
    assert lock.acquire(seconds=0)
    got = threading.Thread(target=other.acquire, kwargs={"seconds": None})
    got.start()
    time.sleep(0.1)
    assert got.is_alive(), "the holder beats"
    lock.release()
    got.join(10)
    other.require()
    other.release()


def test_live_holder_is_named_by_host_process_and_time(
    no_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "LOCK_SECONDS", 0.1)
    run, other = (RunDirectory(tmp_path / "run", main=True) for _ in range(2))
    with run.hold():
        (state,) = os.listdir(run.path / ".lock.lease")
        holder = Holder.parse(state)
        with pytest.raises(TextgenError) as refused, other.hold():
            raise AssertionError
        started = read_status(run.path)["started"]
        assert (
            str(refused.value) == f"`{run.path}` is in use by process {os.getpid()} on {holder.host}, since {started}"
        )
    assert not run.path.exists(), "nothing was left in it"


def test_process_that_has_ended_on_this_machine_is_taken_over_at_once(
    no_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock_module, "SILENT_SECONDS", 1e6)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    zombie = subprocess.Popen([sys.executable, "-c", ""])  # ended, not yet reaped
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    for number, changes in enumerate((
        {"pid": str(gone.pid)},
        {"pid": str(zombie.pid)},
        {"start": "1"},  # this process has the pid of one that has ended
    )):  # fmt: skip
        path = tmp_path / str(number)
        left = Holder.parse(leave_lease(path, **changes))
        lock = FileLock(path)
        assert lock.try_acquire()
        lock.require()
        assert f"is taken over from process {left.pid} on {left.host}, since" in caplog.messages[-1]
        assert caplog.messages[-1].endswith("which has ended")
        lock.release()
    zombie.wait()
    path = tmp_path / "alive"
    leave_lease(path)
    assert not FileLock(path).try_acquire(), "this process, whose lease it is, has not ended"


def test_other_machine_is_taken_over_when_it_was_silent_for_the_limit(
    no_locks: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its pid says nothing here, whether this machine has that pid or not."""
    for number, pid in enumerate((str(os.getpid()), "999999999")):
        path = tmp_path / str(number)
        leave_lease(path, host="node07", pid=pid, kernel="another")
        lock, started = FileLock(path), time.monotonic()
        assert not lock.try_acquire()
        assert lock.acquire(seconds=0)
        assert time.monotonic() - started >= lock_module.SILENT_SECONDS
        assert "from process" in caplog.messages[-1]
        assert "on node07, since" in caplog.messages[-1]
        assert caplog.messages[-1].endswith("which has given no sign of life for 0.3 s")
        lock.release()


@pytest.mark.parametrize("name", ["notes.txt", ",,,,,,", "a,b,c,d,e,f,g"])
def test_file_that_is_no_state_is_an_unknown_holder_that_is_silent(name: str, no_locks: None, tmp_path: Path) -> None:
    (tmp_path / "file.lease").mkdir()
    (tmp_path / "file.lease" / name).touch()
    lock = FileLock(tmp_path / "file")
    assert not lock.try_acquire()
    assert lock.acquire(seconds=0)
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_leftovers_of_killed_takers_do_not_hinder_and_are_removed(no_locks: None, tmp_path: Path) -> None:
    (tmp_path / "file.lease").mkdir()  # killed in a release
    (tmp_path / "file.lease.0a1b2c3d").mkdir()  # killed before the lease was made
    lock = FileLock(tmp_path / "file")
    assert lock.acquire(seconds=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.lease"]
    lock.release()


# --- lost ------------------------------------------------------------------------------------------------------------


def test_holder_that_was_taken_over_learns_it_and_leaves_the_lease_alone(no_locks: None, tmp_path: Path) -> None:
    old, new = FileLock(tmp_path / "file"), FileLock(tmp_path / "file")
    assert old.try_acquire()
    old._lease._released.set()  # its thread is stopped, as the whole process would be
    (state,) = os.listdir(tmp_path / "file.lease")
    assert not new.try_acquire(silent=f"{state}9"), "not the state that is there"
    while not new.try_acquire(silent=os.listdir(tmp_path / "file.lease")[0]):
        pass
    with pytest.raises(TextgenError) as lost:
        old.require()
    assert str(lost.value).startswith(f"`{tmp_path / 'file'}` was taken over by process {os.getpid()} on ")
    assert old.is_lost()
    old.release()
    new.require()
    new.release()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_training_that_was_taken_over_writes_no_status_and_no_checkpoint_and_prunes_none(
    no_locks: None, tmp_path: Path
) -> None:
    run, other = RunDirectory(tmp_path, main=True), FileLock(tmp_path / ".lock")
    for step in (1, 2):
        write_checkpoint(checkpoint_path(tmp_path, step), {"trainer.json": [b"{}"]}, step=step)
    with run.hold():
        run.read_started()
        while not other.try_acquire(silent=os.listdir(tmp_path / ".lock.lease")[0]):
            pass
        status = (tmp_path / "status.json").read_bytes()
        with pytest.raises(TextgenError, match="was taken over by process"):
            run.write_status("running", step=1, total_steps=2)
        run.end("failed", "late")
        assert (tmp_path / "status.json").read_bytes() == status
        saver = Saver(tmp_path, keep_last=1, require=run.require_lock)
        saver.save(3, {}, {"trainer.json": b"{}"}, best_step=None, since=0.0)
        with pytest.raises(TextgenError, match="was taken over by process"):
            saver.wait()
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    other.require()
    other.release()


def test_lost_lease_is_the_line_of_an_error_that_follows_from_it(no_locks: None, tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "file")
    assert lock.try_acquire()

    def work() -> None:
        with lock.hold():
            os.remove(next((tmp_path / "file.lease").iterdir()))
            raise FileNotFoundError("a file that the next holder has removed")

    lock._lease._released.set()
    with pytest.raises(TextgenError, match="was removed while this process gave no sign of life"):
        work()


def test_taker_whose_view_is_old_loses(no_locks: None, tmp_path: Path) -> None:
    """It saw a silent holder; since then another has taken over, or has released and a third has the lease."""
    path = tmp_path / "file"
    silent = leave_lease(path, kernel="another")
    first, second, third = (FileLock(path) for _ in range(3))
    assert first.try_acquire(silent)
    assert not second.try_acquire(silent)
    first.release()
    assert third.try_acquire()
    assert not second.try_acquire(silent)
    third.require()
    third.release()


def test_beat_whose_answer_was_lost_still_counts(
    no_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS: the rename was done, its repetition finds nothing."""
    lock, rename = FileLock(tmp_path / "file"), os.rename
    assert lock.try_acquire()
    lock._lease._released.set()

    def rename_twice(source: Path, target: Path) -> None:
        rename(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_twice)
    lock.require()
    lock.require()
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_late_row_misses_the_metrics_of_the_next_holder(tmp_path: Path) -> None:
    """A process is stopped after its check, and the next holder begins before it goes on."""

    def take_over() -> None:
        Tracker(tmp_path, {}, main=True, first_step=1, evaluated_step=1).log(2, {"train/loss": 2.0})

    tracker = Tracker(tmp_path, {}, main=True, first_step=0, evaluated_step=0)
    tracker.log(1, {"train/loss": 1.0})
    tracker._require = take_over
    tracker.log(9, {"train/loss": 9.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def test_late_status_and_checkpoint_miss_those_of_the_next_holder(no_locks: None, tmp_path: Path) -> None:
    run, following = (RunDirectory(tmp_path, main=True) for _ in range(2))
    directory = tmp_path / "checkpoints" / "step-000005"

    def remove_asides() -> None:
        with following.hold():
            remove_leftovers(tmp_path)

    with pytest.raises(OSError, match="No such file"):
        write_atomic(tmp_path / "status.json", '{"state": "failed"}', require=remove_asides)
    assert read_status(tmp_path)["state"] == "running"
    run.read_started()
    run.require_lock = remove_asides  # type: ignore[method-assign]
    run.end("failed", "late")
    assert read_status(tmp_path)["state"] == "running"
    with pytest.raises(OSError, match="No such file"):
        write_checkpoint(directory, {"trainer.json": [b"{}"]}, step=5, require=remove_asides)
    assert list(directory.parent.iterdir()) == []


# --- races -----------------------------------------------------------------------------------------------------------


def race(place: Path, number: int, barrier: Any, won: Any) -> None:
    """Be one of the racing processes."""
    lock_module.fcntl.flock = refuse_flock(errno.ENOLCK)
    lock_module.BEAT_SECONDS = 0.001  # beats come between everything
    read, draw = lock_module.Lease.read, random.Random(number)

    def read_slowly(lease: lock_module.Lease) -> str | None:
        """Let what was read be old when it is acted on."""
        state = read(lease)
        time.sleep(draw.random() * 0.002)
        return state

    lock_module.Lease.read = read_slowly  # type: ignore[method-assign]
    for at in range(ROUNDS):
        path = place / str(at)
        lock = FileLock(path)
        state = lock._lease.read()
        barrier.wait()
        if lock.try_acquire(silent=state):
            for _ in range(5):
                lock.require()
            won[at * RACERS + number] = 1
        barrier.wait()
        assert not won[at * RACERS + number] or lock._lease.beat()
        barrier.wait()
        lock.release()


def run_races(place: Path) -> None:
    """Race for leases that are free, silent, or of processes that have ended; print the winners of each round."""
    for at in range(ROUNDS):
        if at % 3:
            leave_lease(place / str(at), **({"kernel": "another"} if at % 3 == 1 else {"start": "1"}))
    context = multiprocessing.get_context("fork")
    barrier, won = context.Barrier(RACERS, timeout=20), context.Array("i", ROUNDS * RACERS)
    racers = [context.Process(target=race, args=(place, number, barrier, won)) for number in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * RACERS
    print(json.dumps([sum(won[at * RACERS : (at + 1) * RACERS]) for at in range(ROUNDS)]))


def test_each_of_many_races_of_processes_has_one_winner(tmp_path: Path) -> None:
    done = run_script(__file__, str(tmp_path))
    assert json.loads(done.stdout) == [1] * ROUNDS
    assert {path.suffix for path in tmp_path.iterdir()} == {""}, "each winner has released its lease"


if __name__ == "__main__":
    run_races(Path(sys.argv[1]))
