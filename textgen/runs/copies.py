"""Copies of a run's checkpoints at an address, such as a bucket of object storage: made, found, fetched, pruned.

A copy has the layout of a run's directory, but the folder of a checkpoint is named by its step and by the hash of its
manifest: `checkpoints/step-000500-1a2b3c4d5e6f`. Object storage cannot rename a folder. So no file of a whole copy is
ever replaced by another one, and the manifest is sent last: a copy that has a manifest is whole. Whoever deletes a copy
deletes the manifest first.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from textgen.errors import CheckpointError, TextgenError, UnreadableError, first_line
from textgen.files import JSON_BYTES, fsync_path, make_directory, parse_json
from textgen.runs.checkpoint import (
    MANIFEST_NAME,
    Manifest,
    checkpoint_path,
    make_checkpoint,
    parse_manifest,
    set_aside,
)
from textgen.runs.directory import DATA_NAME, SETTINGS_NAME
from textgen.runs.environment import ENVIRONMENT_NAME
from textgen.runs.metrics_file import METRICS_NAME, is_number, read_metrics
from textgen.runs.samples import SAMPLES_NAME
from textgen.storage.remote_folder import DamagedFileError, MissingFileError, RemoteFolder, StorageError

log = logging.getLogger("textgen")

# What a run leaves beside its checkpoints goes with each of them. A training that continues on an empty disk writes the
# first three again.
RUN_FILES = (SETTINGS_NAME, DATA_NAME, ENVIRONMENT_NAME, METRICS_NAME, SAMPLES_NAME)
KEPT_FILES = (METRICS_NAME, SAMPLES_NAME)
MAX_RUN_FILE_BYTES = 1 << 28

# The end of a training that a signal stopped waits so long for a storage that fails; launchers allow one or two
# minutes before they kill. A transfer that goes on is not cut off.
STOP_SECONDS = 20.0

T = TypeVar("T")

_FOLDER = re.compile(r"(checkpoints/step-([0-9]{6,18})-([0-9a-f]{12}))/([\w-][\w.-]*)")


class Copy(NamedTuple):
    """A whole copy of a checkpoint."""

    step: int
    folder: str
    """its name below the address"""


# --- finding and fetching --------------------------------------------------------------------------------------------


def find_copies(remote: RemoteFolder) -> list[Copy]:
    """Return all copies that are whole, newest first.

    Raises:
        StorageError: the address cannot be listed.
    """
    return [Copy(step, folder) for step, folder, files in _list_folders(remote) if MANIFEST_NAME in files]


def _list_folders(remote: RemoteFolder) -> list[tuple[int, str, list[str]]]:
    """Return step, name and files of all folders of copies, whole or not, newest first."""
    folders: dict[tuple[int, str], list[str]] = {}
    for name in remote.names("checkpoints"):
        if match := _FOLDER.fullmatch(name):
            folders.setdefault((int(match[2]), match[1]), []).append(match[4])
    return [(*key, files) for key, files in sorted(folders.items(), reverse=True)]


def fetch_newest(
    remote: RemoteFolder, copies: Collection[Copy], run_dir: Path, *, after: int
) -> tuple[int | None, set[str]]:
    """Fetch the newest copy that can be used into the run's directory.

    Args:
        remote: the address of the copies.
        copies: the whole ones, newest first.
        run_dir: the run's directory, which must be held.
        after: only a newer step is fetched.

    Returns:
        The step, None if none was fetched; and the folders of copies that are damaged, each of which was named in a
        line of the log.

    Raises:
        UnreadableError: a copy cannot be read at the moment, and may be whole.
        OSError: the local disk cannot be written.
    """
    damaged = set()
    for copy in copies:
        if copy.step <= after:
            break
        try:
            fetch_copy(remote, copy, run_dir)
        except UnreadableError:
            raise
        except CheckpointError as error:
            log.warning("INVALID COPY skipped: %s", error)
            damaged.add(copy.folder)
        else:
            return copy.step, damaged
    return None, damaged


def fetch_copy(remote: RemoteFolder, copy: Copy, run_dir: Path) -> None:
    """Fetch a copy into the run's directory, whole or not at all; a damaged checkpoint of its step is set aside.

    No byte is written before the manifest has been checked, and only files that it lists are fetched.

    Raises:
        CheckpointError: the copy is damaged.
        UnreadableError: it cannot be read at the moment, or does not fit on the disk.
        OSError: the local disk cannot be written.
    """
    started = time.perf_counter()
    manifest, content = read_manifest(remote, copy)
    size, directory = sum(size for size, _ in manifest.files.values()), checkpoint_path(run_dir, copy.step)
    make_directory(run_dir)
    if size > (free := shutil.disk_usage(run_dir).free):
        raise UnreadableError(f"`{remote}/{copy.folder}` has {size / 1e6:,.1f} MB, the disk {free / 1e6:,.1f} MB free")

    def fetch(aside: Path) -> None:
        for name, (bytes_, digest) in manifest.files.items():
            path = aside / name
            _fetched(remote, copy, partial(remote.fetch, f"{copy.folder}/{name}", path, size=bytes_, sha256=digest))
            fsync_path(path)
        (aside / MANIFEST_NAME).write_bytes(content)
        fsync_path(aside / MANIFEST_NAME)

    make_checkpoint(directory, fetch, require=lambda: set_aside(directory) if directory.exists() else None)
    seconds = time.perf_counter() - started
    log.info("step %d: checkpoint fetched from `%s` in %.2f s", copy.step, remote, seconds)


def read_manifest(remote: RemoteFolder, copy: Copy) -> tuple[Manifest, bytes]:
    """Return the manifest of a copy, and its bytes.

    Raises:
        CheckpointError: it is damaged.
        UnreadableError: it cannot be read at the moment.
    """
    where, content = f"{remote}/{copy.folder}/{MANIFEST_NAME}", read_small(remote, copy, MANIFEST_NAME)
    if folder_of(copy.step, digest_of(content)) != copy.folder:
        raise CheckpointError(f"`{where}` is damaged: its sha256 is not that of its folder's name")
    try:
        manifest = parse_manifest(parse_json(content), where)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"`{where}` is damaged: {error}") from error
    if manifest.step != copy.step:
        raise CheckpointError(f"`{where}` is of step {manifest.step}")
    return manifest, content


def read_small(remote: RemoteFolder, copy: Copy, name: str) -> bytes:
    """Return the bytes of a JSON file of a copy.

    Raises:
        CheckpointError: it is missing or too long.
        UnreadableError: it cannot be read at the moment.
    """
    return _fetched(remote, copy, lambda: remote.read(f"{copy.folder}/{name}", limit=JSON_BYTES))


def _fetched(remote: RemoteFolder, copy: Copy, action: Callable[[], T]) -> T:
    """Return what an action on a copy returns, with the errors of storage as errors of checkpoints."""
    try:
        return action()
    except (MissingFileError, DamagedFileError) as error:
        raise CheckpointError(f"`{remote}/{copy.folder}` is damaged: {error}") from error
    except StorageError as error:
        raise UnreadableError(str(error)) from error


def digest_of(manifest: bytes) -> int:
    """Return what the folder of a copy has of its manifest: the first 48 bits of the sha256."""
    return int.from_bytes(hashlib.sha256(manifest).digest()[:6], "big")


def folder_of(step: int, digest: int) -> str:
    """Return the folder of the copy of a checkpoint."""
    return f"checkpoints/step-{step:06d}-{digest:012x}"


def fetch_run_files(remote: RemoteFolder, run_dir: Path) -> None:
    """Fetch the metrics and samples of the run if they are missing here; log it if that fails."""
    for name in KEPT_FILES:
        path = run_dir / name
        if path.exists():
            continue
        try:
            path.write_bytes(remote.read(name, limit=MAX_RUN_FILE_BYTES))
            if name == METRICS_NAME and not all(is_number(row.get("step")) for row in read_metrics(run_dir)):
                path.unlink()
                log.warning("`%s/%s` is not of a run: the metrics start at this step", remote, name)
        except MissingFileError:
            pass
        except StorageError as error:
            log.warning("%s; `%s` starts at this step", error, path)


# --- copying ---------------------------------------------------------------------------------------------------------


class Copier:
    """Copy a run's checkpoints to an address in a background thread, one at a time. Only one process has a copier.

    Of several checkpoints that wait, the newest is copied. Then the best one follows, unless it has a copy. The storage
    may fail: that is logged once for each checkpoint, and the training continues.

    Args:
        run_dir: the run's directory, which must be held.
        remote: the address.
        keep_last: number of newest copies to keep, beside the best.
        tell: called in the thread with the state of the copy, for status.json.
        require: called before anything is sent; raises if the run is no longer held.
    """

    def __init__(
        self,
        run_dir: Path,
        remote: RemoteFolder,
        *,
        keep_last: int,
        tell: Callable[[dict[str, Any]], None],
        require: Callable[[], None],
    ) -> None:
        self.remote = remote
        self.damaged: set[str] = set()
        """folders of copies that are not valid although they have a manifest"""
        self.copied = -1
        """newest step that has been copied; -1 if there is none"""
        self._run_dir, self._keep_last, self._tell, self.require = run_dir, keep_last, tell, require
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._offered: tuple[int, int | None] | None = None
        self._waiting: tuple[int, int | None] | None = None
        self._current: int | None = None
        self._behind = False

    @property
    def copying(self) -> set[int]:
        """Return the step that is being copied, whose checkpoint must not be deleted."""
        return set() if self._current is None else {self._current}

    def offer(self, step: int, *, best_step: int | None) -> None:
        """Copy a checkpoint that is on disk as soon as no other one is being copied."""
        with self._lock:
            self._offered = self._waiting = step, best_step
            self._behind = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="copies", daemon=True)
                self._thread.start()

    def finish(self, *, stopped: bool) -> None:
        """Wait until the last checkpoint is copied, or storage has failed; log how that ended.

        Args:
            stopped: whether a signal or an error ends the training, so that there may be little time.
        """
        if self._offered is None:
            return
        if stopped:
            self.remote.patience = min(self.remote.patience, STOP_SECONDS)
        step, best_step = self._offered
        self._settle()
        if self._behind and not stopped:  # the storage may be back
            self.offer(step, best_step=best_step)
            self._settle()
        if self._behind:
            log.warning("THE COPY IS BEHIND: `%s` lacks step %d; the same command copies it", self.remote, step)
        else:
            log.info("the last step, %d, is copied to `%s`", step, self.remote)

    def _settle(self) -> None:
        """Wait until nothing is being copied."""
        if (thread := self._thread) is not None:
            if self._waiting is not None or self._current is not None:
                log.info("waiting for the copy at `%s`", self.remote)
            thread.join()

    def _work(self) -> None:
        """Copy what waits until nothing waits."""
        while (taken := self._take()) is not None:
            step, best_step = taken
            copied = self._try(step, best_step)
            with self._lock:
                if self._waiting is None:
                    self._behind = not copied
            if copied and best_step not in (None, step) and self._turn_to(best_step):
                self._try(best_step, best_step)

    def _take(self) -> tuple[int, int | None] | None:
        """Return the checkpoint that waits, and the best step; None if nothing waits, and the thread must end."""
        with self._lock:
            taken, self._waiting = self._waiting, None
            self._current = None if taken is None else taken[0]
            if taken is None:
                self._thread = None
            return taken

    def _turn_to(self, step: int) -> bool:
        """Return whether nothing waits, so that the checkpoint of a step is copied now."""
        with self._lock:
            if self._waiting is None:
                self._current = step
            return self._waiting is None

    def _try(self, step: int, best_step: int | None) -> bool:
        """Copy a checkpoint; return whether it has a copy. A failure is logged."""
        started, problem = time.perf_counter(), None
        try:
            sent = self._copy(step, best_step)
        except FileNotFoundError:  # deleted or replaced; then the newer one waits
            return False
        except Exception as error:  # nothing that happens to a copy may end a training
            problem = str(error) if isinstance(error, TextgenError) else first_line(error)
            log.warning("step %d: the checkpoint is not copied: %s; the training continues", step, problem)
        else:
            self.copied = max(step, self.copied)
            if sent:
                seconds = time.perf_counter() - started
                log.info("step %d: checkpoint copied to `%s` in %.2f s", step, self.remote, seconds)
        with suppress(OSError, TextgenError):
            at = None if self.copied < 0 else self.copied
            self._tell({"address": str(self.remote), "step": at, "problem": problem})
        return problem is None

    def _copy(self, step: int, best_step: int | None) -> bool:
        """Copy a checkpoint unless it has a copy, then prune; return whether it had none.

        Raises:
            FileNotFoundError: the checkpoint is not there any more, or was replaced.
            StorageError: the copy could not be made.
        """
        directory = checkpoint_path(self._run_dir, step)
        content = (directory / MANIFEST_NAME).read_bytes()
        folder = folder_of(step, digest_of(content))
        if folder not in self.damaged and any(copy.folder == folder for copy in find_copies(self.remote)):
            return False
        self.send_run_files()
        if folder in self.damaged:  # until all of its files are there
            self.require()
            self.remote.delete(f"{folder}/{MANIFEST_NAME}")
        for name in parse_manifest(parse_json(content), str(directory)).files:
            self.require()
            self.remote.send(directory / name, f"{folder}/{name}")
        if (directory / MANIFEST_NAME).read_bytes() != content:
            raise FileNotFoundError(directory)
        self.require()
        self._send_bytes(content, f"{folder}/{MANIFEST_NAME}")
        self.damaged.discard(folder)
        try:
            self._prune(Copy(step, folder), best_step)
        except StorageError as error:
            log.warning("old copies are not deleted: %s", error)
        return True

    def send_run_files(self) -> None:
        """Send what the run has beside its checkpoints.

        Raises:
            StorageError: the address cannot be written.
        """
        for name in RUN_FILES:
            if (path := self._run_dir / name).exists():
                self.require()
                self._send_bytes(path.read_bytes(), name)  # rows may be added to the file meanwhile

    def _send_bytes(self, content: bytes, name: str) -> None:
        with tempfile.NamedTemporaryFile(prefix="textgen-") as file:
            file.write(content)
            file.flush()
            self.remote.send(Path(file.name), name)

    def _prune(self, newest: Copy, best_step: int | None) -> None:
        """Delete copies except the one just made, the newest `keep_last` and the best; and what is not whole."""
        folders = _list_folders(self.remote)
        steps = [step for step, folder, files in folders if MANIFEST_NAME in files and folder not in self.damaged]
        kept = {*sorted(set(steps), reverse=True)[: self._keep_last], best_step} - {newest.step}
        for step, folder, files in folders:
            whole = MANIFEST_NAME in files and folder not in self.damaged
            if folder == newest.folder or (whole and step in kept):
                continue
            for name in sorted(files, key=lambda name: name != MANIFEST_NAME):
                self.require()
                self.remote.delete(f"{folder}/{name}")
            if self.remote.protocol == "file":  # object storage has no folders
                with suppress(OSError):
                    Path(self.remote.address.removeprefix("file://"), folder).rmdir()
