"""A profile of a few steps, `--profile`: each process writes what torch.profiler saw of it."""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
from pathlib import Path
from typing import Any, Self

import torch

from textgen.errors import TextgenError
from textgen.files import make_directory, write_atomic
from textgen.reporting.profile import PROFILE_DIR, TRACE_SUFFIX, format_profile, read_profile
from textgen.runs.directory import RunDirectory
from textgen.training.step import Learner

log = logging.getLogger("textgen")

MAX_TRACE_BYTES = 50 << 20
MAX_ALLOCATIONS = 100_000  # of a snapshot of a GPU's memory, the last ones


def check_profile(learner: Learner) -> None:
    """Raise TextgenError if `--profile` names no step of this training; log it if a resumed one has taken them."""
    steps, progress = learner.config.profiled_steps, learner.progression
    if steps and steps.start >= progress.total_steps:
        raise TextgenError(f"`profile` {learner.config.profile} names no step: there are {progress.total_steps}")
    if steps and steps.stop <= progress.step:
        log.info("no profile: the steps %s were taken before", learner.config.profile)


class Profile:
    """Records the steps that `--profile` names, in this process. On a GPU it records the memory too.

    Args:
        learner: of the training.
        run: the files are written into `profile/` of its directory.
    """

    def __init__(self, learner: Learner, run: RunDirectory) -> None:
        self._steps, self._progress = learner.config.profiled_steps, learner.progression
        self._accelerator, self._run = learner.accelerator, run
        self._profiler: torch.profiler.profile | None = None
        self._first = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin_or_end(self) -> None:
        """Begin or end the profile if it is time. The training calls this before its first step and after each one."""
        if self._profiler is None and self._progress.step in self._steps:
            self._begin()
        elif self._profiler is not None and self._progress.step >= self._steps.stop:
            self.end()

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._accelerator.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(context=None, max_entries=MAX_ALLOCATIONS)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._first = self._progress.step

    def end(self) -> None:
        """End the profile if it runs, and write it; log an error, since a profile must not end a training."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        self._steps = range(0)
        try:
            profiler.add_metadata_json("textgen", json.dumps({"first": self._first, "last": self._progress.step}))
            profiler.stop()
            if self._progress.step > self._first:  # else the training ended in its first step
                path = self._write(profiler)
                if self._accelerator.is_main_process and path is not None:
                    log.info("profile of this process in `%s`:\n%s", path, format_profile(read_profile(path)))
        except Exception as error:
            log.warning("no profile: %s", error)
        finally:
            if self._accelerator.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profiler: torch.profiler.profile) -> Path | None:
        """Write trace and memory; return the path of the trace, None if it is too large."""
        process = f"{self._accelerator.process_index}-of-{self._accelerator.num_processes}"
        path = self._run.path / PROFILE_DIR / f"process-{process}{TRACE_SUFFIX}"
        with tempfile.TemporaryDirectory() as directory:
            plain = Path(directory, "trace.json")
            profiler.export_chrome_trace(str(plain))
            packed = gzip.compress(plain.read_bytes(), 6)
        if len(packed) > MAX_TRACE_BYTES:
            log.warning("no profile: its %.0f MB are too many; profile fewer steps", len(packed) / 1e6)
            return None
        make_directory(path.parent)
        write_atomic(path, [packed], require=self._run.require_lock)
        if self._accelerator.device.type == "cuda":
            snapshot = torch.cuda.memory._snapshot()
            memory = gzip.compress(memory_json(snapshot).encode(), 6)
            write_atomic(path.with_name(f"memory-{process}.json.gz"), [memory], require=self._run.require_lock)
        return path


def memory_json(snapshot: dict[str, Any]) -> str:
    """Return a snapshot of torch's CUDA allocator as JSON. torch's own writer, `_dump_snapshot`, pickles."""
    return json.dumps({name: snapshot[name] for name in ("segments", "device_traces")}, default=str)
