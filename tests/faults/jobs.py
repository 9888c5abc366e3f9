"""Trainings as processes of their own: started, watched, and compared with one that nothing happened to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.forking import Forked, server
from textgen.runs.checkpoint import newest_valid
from textgen.runs.directory import read_status
from textgen.runs.metrics_file import is_machine_metric, read_metrics

ROOT = Path(__file__).parents[2]
FAULTY = ROOT / "tests" / "faults" / "faulty_training.py"
MARK = "TEXTGEN_JOB"

Fault = dict[str, Any]


def fault(do: str, *, at: str, call: int = 1, rank: int | None = None) -> Fault:
    """Describe what goes wrong and where, as `faulty_training.py` reads it."""
    return {"do": do, "at": at, "call": call, "rank": rank}


class Job:
    """A training that runs.

    Args:
        flags: of the training.
        run_dir: its `--run_dir`.
        faults: what is to go wrong.
        processes: more than one start under `accelerate launch`.
        launcher: whether one process does, too.
    """

    def __init__(
        self,
        flags: Sequence[str],
        run_dir: Path,
        *faults: Fault,
        processes: int = 1,
        launcher: bool = False,
    ) -> None:
        self.run_dir, self.mark = run_dir, uuid.uuid4().hex
        script = [str(FAULTY), *flags, "--run_dir", str(run_dir)]
        own = {
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", MARK: self.mark,
            "TEXTGEN_FAULTS": json.dumps(faults),
        }  # fmt: skip
        self._out = os.memfd_create("output")  # not beside the run, whose disk may be full
        self.process: subprocess.Popen[bytes] | Forked
        if processes > 1 or launcher:
            gang = ["--multi_gpu"] if processes > 1 else ["--cpu"]
            options = [*gang, "--num_processes", str(processes), "--main_process_port", "0"]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "accelerate.commands.launch", *options, *script], cwd=ROOT, env=os.environ | own,
                stdin=subprocess.DEVNULL, stdout=self._out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        else:
            output = Path(f"/proc/{os.getpid()}/fd/{self._out}")
            self.process = server().start(script, output=output, error=output, env=os.environ | own)
        self.started = time.monotonic()

    @property
    def output(self) -> str:
        """What it has said so far, on standard output and error."""
        return os.pread(self._out, os.fstat(self._out).st_size, 0).decode(errors="replace")

    def wait_for(self, text: str, *, timeout: float = 120) -> None:
        """Wait until it has said a text."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            assert self.process.poll() is None, f"ended before it said `{text}`:\n{self.output}"
            assert time.monotonic() < deadline, f"has not said `{text}`:\n{self.output}"
            time.sleep(0.02)

    def end(self, *, timeout: float = 120) -> int:
        """Wait for its end and return the exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"has not ended in {timeout} s:\n{self.output}") from None

    def left(self) -> list[int]:
        """Return the pids of its processes, the launcher and all that was started by them."""
        wanted = f"{MARK}={self.mark}".encode()
        found = [self.process.pid] if self.process.poll() is None else []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                pid = int(environment.parent.name)
                if pid not in found and wanted in environment.read_bytes().split(b"\0"):
                    found.append(pid)
            except OSError:  # it has ended
                continue
        return found

    def kill(self) -> None:
        """End all its processes."""
        for pid in self.left():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self.process.wait()

    def errors(self) -> list[str]:
        """Return its error lines, without `error: `."""
        return [line.removeprefix("error: ") for line in self.output.splitlines() if line.startswith("error: ")]

    @property
    def status(self) -> dict[str, Any]:
        """What status.json says."""
        return read_status(self.run_dir)


def finish(flags: Sequence[str], run_dir: Path, *, processes: int = 1) -> Job:
    """Run a training to its end."""
    job = Job(flags, run_dir, processes=processes)
    assert job.end() == 0, job.output
    assert job.status["state"] == "finished"
    return job


def newest(run_dir: Path) -> Path:
    """Return the newest checkpoint, which must be valid."""
    path, problems = newest_valid(run_dir)
    assert path is not None
    assert problems == []
    return path


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what the clock says."""
    return [
        {name: value for name, value in row.items() if not is_machine_metric(name)} for row in read_metrics(run_dir)
    ]


def assert_as_if_nothing_had_happened(run_dir: Path, whole: Path) -> None:
    """Compare a training that was interrupted with one that was not: metrics, samples, and every bit of the state."""
    assert rows(run_dir) == rows(whole)
    assert (run_dir / "samples.md").read_text() == (whole / "samples.md").read_text()
    one, other = newest(run_dir), newest(whole)
    assert one.name == other.name
    files = {path.name for path in one.iterdir()}
    assert files == {path.name for path in other.iterdir()}
    for name in files:
        if name.endswith(".safetensors"):
            ours, theirs = load_file(one / name), load_file(other / name)
            assert ours.keys() == theirs.keys()
            assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    ours, theirs = (json.loads((path / "trainer.json").read_text())["progression"] for path in (one, other))
    assert ours == theirs
