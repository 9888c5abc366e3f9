"""One process of several fails, or the launcher: all end, soon, not with success; `ranks.py` measures every case."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.jobs import Job, fault
from tests.faults.ranks import LAUNCHER, LIMIT, SILENT, cases, measure, training_flags

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return training_flags(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("what", "rank", "processes"), cases((2,)))
def test_failure_of_one_process_ends_all(
    what: str, rank: int, processes: int, flags: list[str], tmp_path: Path
) -> None:
    outcome = measure(what, rank, processes, flags, tmp_path / "run")
    assert outcome.seconds <= outcome.limit, outcome.output
    assert outcome.exit_code != 0
    assert outcome.left == 0
    if what == "launcher: SIGKILL":
        assert outcome.state == "running", "nobody was left to say why"
    elif what in LAUNCHER:
        assert (outcome.state, outcome.reason) == ("preempted", "SIGTERM")
    else:
        assert outcome.state == "failed"
    if what == "raises":
        assert outcome.reason == "RuntimeError: made to fail"
    if what in SILENT or what == "SIGKILL":
        assert outcome.reason.startswith("another process has ended, or did not answer: ")


@pytest.mark.parametrize("place", ["starting", "stepping"])
def test_killed_process_takes_those_along_that_cannot_hear(place: str, flags: list[str], tmp_path: Path) -> None:
    """The other one joins a process group that will not be whole, or is inside one long kernel."""
    faults = [fault("signal 9", at=place, rank=1), fault("compute", at="stepping", rank=0)]
    job = Job(flags, tmp_path / "run", *faults, processes=2)
    try:
        job.wait_for("fault: signal 9")
        started = time.monotonic()
        assert job.end(timeout=60) != 0
        assert time.monotonic() - started <= LIMIT, job.output
        assert job.left() == []
    finally:
        job.kill()
