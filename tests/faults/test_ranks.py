"""One process of several fails, or the launcher: all end, soon, not with success; `ranks.py` measures every case."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.ranks import LAUNCHER, SILENT, cases, measure, training_flags

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
        assert outcome.reason.startswith("another process has ended, or was waited for in vain: ")
