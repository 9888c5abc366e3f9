"""A real Slurm of two nodes, each with 4 GPUs that are none and 16 processors that are fewer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

import pytest

ROOT = Path(__file__).parents[2]
MINISLURM = Path(__file__).with_name("minislurm.sh")
NODES, GPUS, CPUS = 2, 4, 16
MARK = "TEXTGEN_TEST_CLUSTER"
DEBIAN = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge", "ip": "iproute2"}
NOT_ENDED = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "SUSPENDED", "REQUEUED"}


class Slurm:
    """The cluster of `minislurm.sh`, driven from outside. Its nodes see the host's files."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            ["bash", str(MINISLURM), str(NODES), str(GPUS), str(CPUS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._expect("READY")
        outer = self._process.pid
        self._inner = Path(f"/proc/{outer}/task/{outer}/children").read_text().strip()
        self.files = Path(f"/proc/{self._inner}/root/run/slurm")
        """its logs, state and configuration"""

    def _expect(self, word: str) -> None:
        said = cast(IO[str], self._process.stdout).readline().strip()
        assert said == word, f"minislurm.sh said: {said}"

    def stop(self) -> None:
        """End it, and all that runs in it."""
        cast(IO[str], self._process.stdin).close()
        self._process.wait(30)
        cast(IO[str], self._process.stdout).close()

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the machine of the controller.

        Args:
            argv: the command.
            cwd: where.
            env: on top of the environment of the tests.
            check: whether it must succeed.
            timeout: in seconds.
        """
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        own |= {"SLURM_CONF": "/run/slurm/etc/slurm.conf", MARK: self._mark, **(env or {})}
        enter = ["nsenter", "-t", self._inner, "-m", "-u", "-n", "-p", f"--wd={cwd}", "--", *argv]
        done = subprocess.run(enter, env=own, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{argv}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def submit(self, *args: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> int:
        """Run sbatch and return the job's id; the script must set or `args` hold `--output`."""
        return int(self.run(["sbatch", "--parsable", *map(str, args)], cwd=cwd, env=env).stdout.partition(";")[0])

    def job(self, job: int | str) -> dict[str, str]:
        """Return what `scontrol show job` knows of a job, or of the last task of an array."""
        shown = self.run(["scontrol", "--oneliner", "show", "job", str(job)]).stdout
        return dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", shown.splitlines()[0]))

    def log(self, job: int | str) -> str:
        """Return what a job has said so far."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_until(self, job: int, reached: Callable[[], object], what: str, *, timeout: float = 180) -> None:
        """Wait until something holds of a job.

        Args:
            job: its id.
            reached: asked again and again.
            what: that, in words.
            timeout: in seconds.
        """
        deadline = time.monotonic() + timeout
        while not reached():
            assert time.monotonic() < deadline, f"in {timeout} s job {job} has not {what}\n{self.describe(job)}"
            time.sleep(0.5)

    def wait_for_log(self, job: int, text: str, *, count: int = 1, timeout: float = 180) -> None:
        """Wait until a job has said a text so many times."""

        def reached() -> bool:
            said = self.log(job).count(text) >= count
            assert said or self.job(job)["JobState"] in NOT_ENDED, f"ended without `{text}`\n{self.describe(job)}"
            return said

        self.wait_until(job, reached, f"said `{text}` {count} times", timeout=timeout)

    def wait(self, job: int, *, expect: str = "COMPLETED", timeout: float = 240) -> dict[str, str]:
        """Wait for a job's end and return what Slurm knows of it."""
        self.wait_until(job, lambda: self.job(job)["JobState"] not in NOT_ENDED, "ended", timeout=timeout)
        shown = self.job(job)
        assert shown["JobState"] == expect, f"job {job} ended as {shown['JobState']}\n{self.describe(job)}"
        return shown

    def describe(self, job: int) -> str:
        """Return all there is to know of a job that went wrong."""
        controller = (self.files / "log" / "slurmctld.log").read_text().splitlines()[-40:]
        return "\n".join([str(self.job(job)), "--- job", self.log(job), "--- slurmctld", *controller])

    def cancel(self, *args: str) -> None:
        """Run scancel."""
        self.run(["scancel", *args])

    def power_off(self, node: int) -> None:
        """Cut a node's power and network; nothing that ran there says a last word."""
        self._say(f"off {node}")

    def crash(self, node: int) -> None:
        """End all processes of a node; its peers' connections are closed."""
        self._say(f"crash {node}")

    def power_on(self, node: int) -> None:
        """Let a node come back."""
        self._say(f"on {node}")

    def _say(self, command: str) -> None:
        file = cast(IO[str], self._process.stdin)
        file.write(command + "\n")
        file.flush()
        self._expect("OK")

    def left(self, job: int) -> dict[int, str]:
        """Return pids and command lines of a job's processes that live, on any node."""
        wanted = {f"{MARK}={self._mark}".encode(), f"SLURM_JOB_ID={job}".encode()}
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                    found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it has ended
                continue
        return found

    def trainers(self, job: int) -> dict[int, int]:
        """Return the pids of a job's trainers by rank."""
        found = {}
        for pid in self.left(job):
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            ranks = [int(entry[5:]) for entry in environment if entry.startswith("RANK=")]
            found |= dict.fromkeys(ranks, pid)
        return found


def _what_is_missing() -> str | None:
    """Return why no Slurm can be had here, if that is so."""
    if missing := [package for program, package in DEBIAN.items() if shutil.which(program) is None]:
        return f"Debian's packages {', '.join(missing)} are missing"
    trial = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "true"]
    done = subprocess.run(trial, capture_output=True, text=True)
    return f"namespaces take root and CAP_SYS_ADMIN: {done.stderr.strip()}" if done.returncode else None


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    """Yield a Slurm; skip where none can be had, fail there under REQUIRE_SLURM=1."""
    if missing := _what_is_missing():
        (pytest.fail if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip)(f"no Slurm: {missing}")
    slurm = Slurm()
    yield slurm
    slurm.stop()


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    """Yield the Slurm of all tests, and cancel what a test has left in it."""
    yield cluster
    cluster.cancel("--user=root")
