"""The Slurm that the tests start: it leaves nothing behind, and where it is required it is not skipped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, Slurm

RUNNER = """
import time
from tests.slurm.conftest import Slurm
slurm = Slurm()
job = slurm.submit("--output=/dev/null", "--nodes=2", "--wrap=srun sleep 1000")
while len(slurm.left(job)) < 5:  # the script, two of srun, a sleep on each node
    time.sleep(0.1)
print("ready", flush=True)
time.sleep(1000)
"""


def descendants(pid: int) -> dict[int, str]:
    """Return pids and names of a process's children and theirs."""
    found = {}
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            with suppress(OSError):  # it has ended
                found |= {child: Path(f"/proc/{child}/comm").read_text().strip()} | descendants(child)
    return found


@pytest.mark.serial  # other tests mount file systems
def test_nothing_is_left_when_the_tests_are_killed(cluster: Slurm) -> None:
    """`cluster` is here for its reasons to skip."""
    mounts = Path("/proc/mounts").read_text()
    runner = subprocess.Popen([sys.executable, "-c", RUNNER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with runner:
        assert runner.stdout is not None
        said, started = runner.stdout.readline(), descendants(runner.pid)
        runner.kill()
    assert said == "ready\n"
    assert {"munged", "slurmctld", "slurmd", "sleep"} <= set(started.values())
    deadline = time.monotonic() + 10
    while alive := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, [started[pid] for pid in alive]
        time.sleep(0.05)
    assert Path("/proc/mounts").read_text() == mounts


@pytest.mark.parametrize(("required", "outcome"), [("0", "1 skipped"), ("1", "1 error")])
def test_missing_slurm_skips_tests_unless_it_is_required(required: str, outcome: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TEXTGEN_NO_SKIPS"}
    one = "tests/slurm/test_cluster.py::test_nothing_is_left_when_the_tests_are_killed"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", one, "-q", "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True,
        env=environment | {"REQUIRE_SLURM": required, "PATH": "/nonexistent"}, timeout=120,
    )  # fmt: skip
    assert outcome in done.stdout
    assert "no Slurm: Debian's packages slurmctld, slurmd, slurm-client, munge, iproute2 are missing" in done.stdout
