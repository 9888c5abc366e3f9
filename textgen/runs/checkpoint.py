"""Checkpoint directories: written whole or not at all, verified before use, pruned.

Which files a checkpoint holds is decided in `textgen/training/resume.py` (`save`); here they are only safetensors and
JSON. A checkpoint is written under a temporary name, file by file, each synced to disk. Its manifest comes last, with
size and sha256 of every file. Then the directory gets its final name. Pruning renames a directory before it deletes it.
So a directory with a checkpoint's name is complete at every instant, and the manifest shows any later damage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textgen.errors import CheckpointError, UnreadableError
from textgen.files import JSON_BYTES, fsync_path, make_directory, memory_bytes, parse_json
from textgen.runs.tensors import serialize
from textgen.tokenizer.tokenizer import MAX_MODEL_BYTES

log = logging.getLogger("textgen")

MANIFEST_NAME = "manifest.json"
TRAINER_NAME = "trainer.json"
FORMAT = "textgen.checkpoint.1"

_FILE_NAME = re.compile(r"[a-z_]{1,40}\.(safetensors|json|model)")
_DIRECTORY_NAME = re.compile(r"step-([0-9]{6,18})(\.old)?")
_DIGEST = re.compile(r"[0-9a-f]{64}")


# --- writing ---------------------------------------------------------------------------------------------------------


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def write_checkpoint(
    directory: Path,
    files: Mapping[str, Iterable[bytes | memoryview]],
    *,
    step: int,
    require: Callable[[], None] | None = None,
) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        directory: of the checkpoint, from `checkpoint_path`. A checkpoint in it is replaced.
        files: chunks of each file's content by name.
        step: optimizer steps taken.
        require: called just before the directory gets its name; if it raises, nothing is replaced.

    Raises:
        OSError: the checkpoint cannot be written; a checkpoint that was to be replaced is found as before.
    """

    def write(aside: Path) -> None:
        entries = {name: _write(aside / name, content) for name, content in files.items()}
        manifest = {"format": FORMAT, "step": step, "files": entries}
        _write(aside / MANIFEST_NAME, [json.dumps(manifest, indent=2).encode() + b"\n"])

    make_checkpoint(directory, write, require=require)


def make_checkpoint(
    directory: Path, write: Callable[[Path], None], *, require: Callable[[], None] | None = None
) -> None:
    """Make a checkpoint's directory whole or not at all.

    Args:
        directory: of the checkpoint. A checkpoint in it is replaced.
        write: writes all files into the directory that it is called with, and waits until they are on disk.
        require: as of `write_checkpoint`.
    """
    # A name of this call alone: a next holder of the run removes the directory, and a late rename then finds nothing.
    aside = directory.with_name(f".{directory.name}-{secrets.token_hex(4)}.tmp")
    replaced = directory.with_name(f"{directory.name}.old")
    try:
        make_directory(aside)
        write(aside)
        fsync_path(aside)
        if require is not None:
            require()
        if directory.exists():  # between the two renames, `checkpoints` finds the old one as `step-*.old`
            _remove(replaced)
            directory.rename(replaced)
        aside.rename(directory)
        fsync_path(directory.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):  # the error of a full disk names no file
            raise OSError(error.errno, error.strerror, str(directory)) from error
        raise
    _remove(replaced)


def _write(path: Path, content: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file, wait until it is on disk, and return its entry in the manifest."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in content:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _remove(directory: Path) -> None:
    """Delete a checkpoint if it exists. It is renamed first, since files are deleted one by one.

    A file that cannot be deleted, such as one that is being read over NFS, is left to the next `remove_leftovers`.
    """
    if directory.exists():
        nameless = directory.with_name(f".{directory.name}.{time.time_ns()}.removed.tmp")
        shutil.rmtree(directory.rename(nameless), ignore_errors=True)


def prune(run_dir: Path, *, keep_last: int, best_step: int | None, in_use: Collection[int] = ()) -> None:
    """Delete checkpoints and leftovers of killed processes.

    The newest `keep_last` checkpoints stay, that of `best_step`, and those of steps that are `in_use`.
    """
    seen: set[int] = set()
    for step, path in checkpoints(run_dir):
        replaced = step in seen
        seen.add(step)
        if replaced or (len(seen) > keep_last and step != best_step and step not in in_use):
            _remove(path)
    remove_leftovers(run_dir)


def set_aside(directory: Path) -> None:
    """Rename a checkpoint that is not valid to `*.invalid`."""
    invalid = directory.with_name(f"{directory.name}.invalid")
    shutil.rmtree(invalid, ignore_errors=True)  # of an earlier damage to the same step
    directory.rename(invalid)


def remove_leftovers(run_dir: Path) -> None:
    """Delete checkpoints that killed processes left half written or half deleted. The run directory must be held.

    If a process was killed while it replaced a checkpoint, the old checkpoint gets its name back.
    """
    for path in (run_dir / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for step, path in checkpoints(run_dir):
        if path != checkpoint_path(run_dir, step) and not checkpoint_path(run_dir, step).exists():
            path.rename(checkpoint_path(run_dir, step))


class Saver:
    """Write a run's checkpoints in a background thread, one at a time, from a copy in memory.

    The buffers of the copy are made once, so the training pauses only for the copying. Only one process has a saver.

    Args:
        run_dir: the run's directory, which must be held.
        keep_last: number of newest checkpoints to keep, beside the best.
        device: device of the tensors.
        before: called in the thread before each checkpoint is written.
        after: called in the thread with the step of each checkpoint that is on disk.
        require: called in the thread before anything is replaced or pruned; raises if the run is no longer held.
        in_use: called in the thread; returns steps whose checkpoints must not be pruned.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_last: int,
        device: torch.device | str = "cpu",
        before: Callable[[], None] | None = None,
        after: Callable[[int], None] | None = None,
        require: Callable[[], None] | None = None,
        in_use: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._in_use = in_use
        self._run_dir, self._keep_last, self._cuda = run_dir, keep_last, torch.device(device).type == "cuda"
        self._before, self._after, self._require = before, after, require
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether a save has failed; `wait` raises its error."""
        return self._error is not None

    def reserve(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
        """Make float32 buffers before the first save; the first write to a page costs ten times a later one."""

        def make() -> None:
            for file, group in shapes.items():
                for name, shape in group.items():
                    self._buffers[file, name] = self._buffer(shape, torch.float32).zero_()

        self._run(make)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        files: Mapping[str, bytes],
        *,
        best_step: int | None,
        since: float,
    ) -> float:
        """Wait for the previous save, copy the tensors, and start writing.

        Args:
            step: optimizer steps taken.
            tensors: tensors by name, by file name without its ending; on any device.
            files: contents of the other files by name.
            best_step: step of a checkpoint that must not be pruned.
            since: `time.perf_counter()` at the moment the training paused.

        Returns:
            Seconds since then: the pause of the training.

        Raises:
            Exception: the previous save failed, mostly with an OSError.
        """
        self.wait()
        # Copies from a GPU to pinned buffers run asynchronously; one synchronization ends all of them.
        copies: dict[str, dict[str, Tensor]] = {file: {} for file in tensors}
        for file, group in tensors.items():
            for name, value in group.items():
                buffer = self._buffers.get((file, name))
                if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                    buffer = self._buffers[file, name] = self._buffer(value.shape, value.dtype)
                copies[file][name] = buffer.copy_(value.detach(), non_blocking=True)
        if self._cuda:
            torch.cuda.synchronize()
        content: dict[str, Iterable[bytes | memoryview]] = {name: [data] for name, data in files.items()}
        content |= {f"{file}.safetensors": serialize(group) for file, group in copies.items()}
        pause = time.perf_counter() - since

        def write() -> None:
            started = time.perf_counter()
            if self._before is not None:
                self._before()
            write_checkpoint(checkpoint_path(self._run_dir, step), content, step=step, require=self._require)
            if self._after is not None:
                self._after(step)
            if self._require is not None:
                self._require()
            prune(self._run_dir, keep_last=self._keep_last, best_step=best_step, in_use=self._in_use())
            seconds = time.perf_counter() - started
            log.info("step %d: checkpoint written in %.2f s, training paused %.0f ms", step, seconds, pause * 1000)

        self._run(write)
        return pause

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            Exception: the save failed, mostly with an OSError.
        """
        self.settle()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Wait until nothing is being written; raise nothing if the save failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, action: Callable[[], None]) -> None:
        """Run an action in the thread and keep its error for `wait`."""

        def run() -> None:
            try:
                action()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized buffer, pinned for a training on a GPU."""
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self._cuda)


# --- finding and checking --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json of a checkpoint: its step, and size in bytes and sha256 of each file."""

    step: int
    files: dict[str, tuple[int, str]]


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of all directories with a checkpoint's name, newest first, without verifying them."""
    found = []
    for path in (run_dir / "checkpoints").glob("step-*"):
        if match := _DIRECTORY_NAME.fullmatch(path.name):
            found.append((int(match[1]), match[2] is None, path))  # `.old` after the new one of its step
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def newest_valid(run_dir: Path) -> tuple[Path | None, list[CheckpointError]]:
    """Return a run's newest checkpoint that passes `verify`, None if none does, and the errors of newer ones.

    Raises:
        UnreadableError: a checkpoint cannot be read here and may be valid.
    """
    problems: list[CheckpointError] = []
    for _, path in checkpoints(run_dir):
        try:
            verify(path)
        except UnreadableError:
            raise
        except CheckpointError as error:
            problems.append(error)
        else:
            return path, problems
    return None, problems


def verify(directory: Path, names: Sequence[str] | None = None) -> Manifest:
    """Check a checkpoint's files against its manifest, and the manifest against its directory.

    Args:
        directory: of the checkpoint.
        names: files to check; None for all.

    Raises:
        CheckpointError: a file or the manifest is missing or damaged; the message is one line.
    """
    manifest = _read_manifest(directory)
    if (match := _DIRECTORY_NAME.fullmatch(directory.name)) and int(match[1]) != manifest.step:
        raise CheckpointError(f"`{directory}` holds step {manifest.step}")
    for name in manifest.files if names is None else names:
        if name not in manifest.files:
            raise _not_listed(directory, name)
        wanted_bytes, wanted = manifest.files[name]
        path = directory / name
        try:
            if not path.is_file():
                raise CheckpointError(f"`{path}` is missing")
            if (size := path.stat().st_size) != wanted_bytes:
                raise CheckpointError(f"`{path}` has {size} bytes, wanted {wanted_bytes}")
            if size > (limit := memory_bytes() if name.endswith(".safetensors") else MAX_MODEL_BYTES):
                raise UnreadableError(f"`{path}` has {size} bytes, at most {limit} can be read here")
            with path.open("rb") as file:
                seen = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UnreadableError(f"`{path}` cannot be read: {error.strerror or error}") from error
        if seen != wanted:
            raise CheckpointError(f"`{path}` is damaged: sha256 {seen[:12]}..., wanted {wanted[:12]}...")
    return manifest


def _read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json; raise CheckpointError if it is missing or damaged."""
    path = directory / MANIFEST_NAME
    return parse_manifest(read_json(path), str(path))


def parse_manifest(values: Mapping[str, Any], path: str) -> Manifest:
    """Return the manifest that JSON holds; raise CheckpointError, which names `path`, if it is none."""
    try:
        if values["format"] != FORMAT:
            raise CheckpointError(f"`{path}` is of format {values['format']!r:.40}, wanted {FORMAT}")
        step, entries = values["step"], values["files"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        sound = all(
            _FILE_NAME.fullmatch(name) and type(size) is int and 0 <= size < 1 << 60 and _DIGEST.fullmatch(digest)
            for name, (size, digest) in files.items()
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"`{path}` is not a manifest: {type(error).__name__} {str(error)[:80]}") from error
    if not sound or type(step) is not int or not 0 <= step < 10**18:
        raise CheckpointError(
            f"`{path}` is not a manifest: its step, or the name, size or sha256 of a file, is not valid"
        )
    return Manifest(step=step, files=files)


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a checkpoint's JSON files.

    Raises:
        CheckpointError: the file is missing, or is not a JSON object.
        UnreadableError: the file cannot be read here.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                return parse_json(file.read(JSON_BYTES + 1))
    except OSError as error:
        raise UnreadableError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"`{path}` is damaged: {error}") from error
    raise CheckpointError(f"`{path.parent}` has no `{path.name}`: not a whole training checkpoint")


def find_checkpoint(name: str | Path, *, best: bool = False, files: Sequence[str] | None = ()) -> Path | None:
    """Return the directory of a checkpoint: `name`, or a run's newest valid or best one; None if `name` is neither.

    Each file is read and hashed once: every byte of a run's newest checkpoint, `trainer.json` and `files` of others.

    Args:
        name: directory of a checkpoint or of a run.
        best: choose a run's checkpoint with the best validation instead of the newest one.
        files: files to verify beside `trainer.json`; None for all files.

    Raises:
        CheckpointError: the run has checkpoints and none is valid, the best one is not valid, or a verified file is
            damaged.
    """
    path = Path(name)
    if not checkpoints(path):
        return path if _verify_some(path, files) else None
    newest, problems = newest_valid(path)
    if newest is None:
        raise CheckpointError(f"`{name}` has no valid checkpoint: {'; '.join(map(str, problems))}")
    for problem in problems:
        log.warning("INVALID CHECKPOINT skipped: %s", problem)
    if not best:
        _require_listed(newest, files)
        return newest
    progression = read_json(newest / TRAINER_NAME).get("progression")
    step = progression.get("best_step") if isinstance(progression, dict) else None
    if type(step) is not int or not 0 <= step < 10**18:
        raise CheckpointError(f"`{name}` has no best checkpoint: nothing was validated")
    found = [directory for number, directory in checkpoints(path) if number == step]  # may be a `.old`
    directory = next(iter(found), checkpoint_path(path, step))
    if directory == newest:
        _require_listed(newest, files)
    elif not _verify_some(directory, files):
        raise CheckpointError(f"`{directory}` has no `{MANIFEST_NAME}`: not a whole training checkpoint")
    return directory


def _verify_some(directory: Path, files: Sequence[str] | None) -> bool:
    """Verify `trainer.json` and the caller's files; return False if the directory is not a checkpoint."""
    trainer = _trainer_file(directory)
    if not trainer and not (directory / MANIFEST_NAME).exists():
        return False
    verify(directory, None if files is None else [*trainer, *files])
    return True


def _require_listed(directory: Path, files: Sequence[str] | None) -> None:
    """Raise CheckpointError unless the manifest, all of whose files are verified, lists the caller's files too."""
    listed = _read_manifest(directory).files
    for name in [*_trainer_file(directory), *(files or ())]:
        if name not in listed:
            raise _not_listed(directory, name)


def _trainer_file(directory: Path) -> list[str]:
    """Return the name of `trainer.json` if the directory has one; evaluation reads it, so it is verified."""
    return [TRAINER_NAME] if (directory / TRAINER_NAME).exists() else []


def _not_listed(directory: Path, name: str) -> CheckpointError:
    """Return the error of a file that the manifest does not list."""
    return CheckpointError(f"`{directory}` has no `{name}` in its `{MANIFEST_NAME}`")
