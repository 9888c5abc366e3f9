"""The directory of a run: its lock, which one training holds at a time, and status.json, which shows its state."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from textgen.errors import TextgenError
from textgen.files import make_directory, write_atomic

SETTINGS_NAME = "config.yaml"
DATA_NAME = "data.json"
STATUS_NAME = "status.json"
# Files that begin a folder of another kind: settings, a token store, a published model, a search of `textgen tune`.
OTHER_KINDS = (SETTINGS_NAME, "store.json", "model.safetensors", "tune.json")
LOCK_NAME, LEASE_NAME = ".lock", ".lock.lease"

# A requeued job may start while the last moments of the job before hold the lock.
LOCK_SECONDS = 2.0

RunState = Literal["running", "finished", "preempted", "failed"]


class RunDirectory:
    """Lock and status of a run's directory.

    Args:
        path: the directory.
        main: whether this is the main process; on other processes only `end` does anything.
    """

    def __init__(self, path: str | Path, *, main: bool) -> None:
        self.path, self._main = Path(path), main
        from textgen.runs.lock import FileLock  # here, so that reports need no fcntl, which Windows lacks

        self._lock = FileLock(self.path / LOCK_NAME)
        self._started: object = None
        self.is_shared = True
        """whether all processes see this directory; only with `checkpoint_copy` they need not"""

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Make the directory if it is missing, and hold its lock, which does not outlive the process.

        A training that fails before its first step removes a directory that it made.

        Raises:
            TextgenError: another process holds the lock, or the path is that of a file or of another kind of folder.
        """
        if not self._main:
            yield
            return
        refuse_other_kinds(self.path)
        made = not self.path.exists()
        make_directory(self.path)
        if not self._lock.acquire(seconds=LOCK_SECONDS):
            raise TextgenError(f"`{self.path}` is in use by {self._lock.describe_holder() or self._holder()}")
        with self._lock.hold(), self._leave_nothing_new(made), self._keep_finished():
            # Of killed trainings; or of a stopped one, which can then no longer replace the status.
            for aside in self.path.glob(f".{STATUS_NAME}.*"):
                aside.unlink(missing_ok=True)
            holder: dict[str, Any] = {"started": _now(), "host": socket.gethostname(), "pid": os.getpid()}
            if "copy" in read_status(self.path):  # this training may have none
                holder["copy"] = None
            self._write({"state": "running", "step": None, "total_steps": None, "reason": None, **holder})
            yield

    @contextmanager
    def _leave_nothing_new(self, made: bool) -> Iterator[None]:
        """Remove the directory if this training made it and has left nothing in it."""
        try:
            yield
        finally:
            written = {entry.name for entry in self.path.iterdir()} - {LOCK_NAME, LEASE_NAME, STATUS_NAME}
            if made and not written and read_status(self.path).get("state") != "preempted" and not self.is_lost():
                shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def _keep_finished(self) -> Iterator[None]:
        """Write the status of a finished training again if this one fails before its first step."""
        before = read_status(self.path)
        try:
            yield
        finally:
            status = read_status(self.path)
            refused = status.get("state") == "failed" and status.get("step") is None
            if before.get("state") == "finished" and refused:
                with suppress(OSError, TextgenError):
                    self._write(before)

    def is_lost(self) -> bool:
        """Return whether another training has taken the directory over, so that this one must write nothing more."""
        return self._lock.is_lost()

    def require_lock(self) -> None:
        """Raise TextgenError if another training has taken the directory over."""
        self._lock.require()

    def _holder(self) -> str:
        """Return a description of the process that holds the lock, from its status."""
        status = read_status(self.path)
        if status.get("state") != "running":
            return "another process"
        return f"process {status.get('pid')} on {status.get('host')}, since {status.get('started')}"

    def read_started(self) -> object:
        """Return the start time of the training that holds the directory; `end` recognizes its training by it."""
        self._started = read_status(self.path).get("started")
        return self._started

    def write_status(self, state: RunState, *, step: int, total_steps: int, reason: str | None = None) -> None:
        """Write the state of the training. The state `running` never replaces the reason of an end: only its step."""
        if not self._main:
            return
        values: dict[str, Any] = {"step": step, "total_steps": total_steps}
        with self._alone():
            if state != "running" or read_status(self.path).get("state") == "running":
                values |= {"state": state, "reason": reason}
            self._write(values)  # a checkpoint may get to the disk after the end that a failure wrote

    def write_copy(self, copy: dict[str, Any]) -> None:
        """Write the state of the copy at an address: `address`, newest `step`, `problem` of the last checkpoint."""
        with self._alone():
            self._write({"copy": copy})

    def end(self, state: Literal["preempted", "failed"], reason: str) -> None:
        """Write the reason of the training's end, on any process, if the disk permits. The first reason is kept."""
        with suppress(OSError, TextgenError), self._alone():  # a TextgenError: the directory was taken over
            status = read_status(self.path)
            if status.get("state") != "running" or status.get("started") != self._started:
                return
            values = {"state": state, "reason": reason}
            try:
                self._write(values)
            except FileNotFoundError:  # the next holder of the directory has removed the new text
                return
            except OSError:  # perhaps a full disk, which may be the reason: overwrite the file in its block
                with (self.path / STATUS_NAME).open("r+", encoding="utf-8") as file:
                    file.write(self._status(values))
                    file.truncate()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock out the training's other processes between reading and writing, if the file system has locks."""
        import fcntl

        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, values: dict[str, Any]) -> None:
        """Write status.json atomically: its old values, updated with `values`."""
        write_atomic(self.path / STATUS_NAME, self._status(values), require=self.require_lock)

    def _status(self, values: dict[str, Any]) -> str:
        """Return the text of status.json: its old values, updated with `values` and the time."""
        return json.dumps(read_status(self.path) | values | {"time": _now()}, indent=2) + "\n"

    def require_space(self, checkpoint_bytes: int, *, count: int) -> None:
        """Check that the disk has space for the checkpoints of the run.

        Args:
            checkpoint_bytes: size of a checkpoint.
            count: largest number of checkpoints at a time, present ones included.

        Raises:
            TextgenError: the disk has too little space.
        """
        if not self._main:
            return
        files = [file for file in (self.path / "checkpoints").glob("step-*/*") if file.parent.suffix != ".invalid"]
        present = sum(file.stat().st_size for file in files)
        wanted, free = checkpoint_bytes * count - present, shutil.disk_usage(self.path).free
        if free < wanted:
            checkpoints = "1 checkpoint" if count == 1 else f"{count} checkpoints"
            raise TextgenError(
                f"`{self.path}` has {free / 1e6:,.1f} MB of free space, the run needs {wanted / 1e6:,.1f}: "
                f"{checkpoints} of {checkpoint_bytes / 1e6:,.1f} MB at a time, see `--keep_last`"
            )


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return the values of status.json; empty if the file is missing or damaged."""
    try:
        status = json.loads((run_dir / STATUS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def refuse_other_kinds(path: Path) -> None:
    """Check that a folder can be a run's, before a training holds it; it may be missing.

    Raises:
        TextgenError: the path is a file, or the folder is not a run's and holds a file of another kind of folder.
    """
    if path.is_file():
        raise TextgenError(f"`run_dir` must be a folder, not a file: `{path}`")
    if "state" in read_status(path) or any(path.glob("checkpoints/step-*")):
        return
    for name in OTHER_KINDS:
        if (path / name).exists() and not (name == SETTINGS_NAME and _holds_settings(path / name)):
            raise TextgenError(f"`{path}` holds `{name}` and is not a run: name another `--run_dir`")


def _holds_settings(path: Path) -> bool:
    """Return whether a file holds the settings of a training, as a run's own folder keeps them."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and "run_dir" in settings


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
