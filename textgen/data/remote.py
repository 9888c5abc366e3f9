"""A store in shards at an address: its shards come one after the other into a bounded cache on the local disk.

The cache is a folder of the store in `data.cache_dir`. The processes of a machine share it: one fetches a shard, under
a lock, while the others wait for the file. A shard is fetched while the ones before it are read, since their order is
known. A shard that is deleted to make room for others stays readable for processes that have mapped it.

Storage that fails is tried again for a shard that a training waits for, and once for the ones that follow. A process
that has tried for its whole patience leaves its error in a file: the others have waited as long for the lock, and do
not begin anew.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

from textgen.data.shards import Shard, Shards
from textgen.data.split import Split
from textgen.errors import TextgenError
from textgen.files import write_atomic
from textgen.runs.lock import FileLock
from textgen.storage.remote_folder import RemoteFolder, StorageError

AHEAD = 4  # shards that are fetched before they are read, if the cache has room
LOCK_NAME = "fetch.lock"
FAILED_NAME = "fetch.failed"  # the last error of a process that has stopped trying, after a random line
LOOK_SECONDS = 0.1  # between two looks at whether another process has fetched what is wanted


class RemoteShards(Shards):
    """The shards of a store at an address.

    Args:
        folder: the store.
        directory: the cache of this store on the local disk.
        records: of the shards in their order.
        dtype: of the tokens.
        has_labels: whether the documents have labels.
        cache_bytes: how many bytes of shards the cache may hold.

    Raises:
        TextgenError: the cache is too small for two shards.
    """

    def __init__(
        self,
        folder: RemoteFolder,
        directory: Path,
        records: Sequence[Shard],
        *,
        dtype: str,
        has_labels: bool,
        cache_bytes: int,
    ) -> None:
        super().__init__(directory, records, dtype=dtype, has_labels=has_labels)
        self._folder, self._cache_bytes = folder, cache_bytes
        needed = sum(sorted(record.size for record in records)[-2:])
        if cache_bytes < needed:
            raise TextgenError(
                f"`store_cache_gib` of {cache_bytes / 2**30:.3g} is too small for two shards of `{folder}`, "
                f"which have {needed / 2**30:.3g} GiB"
            )
        self._following: tuple[int, ...] = ()
        self._kept: frozenset[str] = frozenset()
        self._mutex = threading.Lock()
        self._is_fetching_ahead = False

    def path(self, index: int) -> Path:
        """Return the local file of a shard, fetched if it is not here yet; the following ones are fetched from then on.

        Raises:
            TextgenError: it cannot be fetched.
            OSError: the local disk is full.
        """
        sizes = accumulate(self.records[i].size for i in (index, *self._following))
        room = sum(size <= self._cache_bytes for size in sizes) - 1
        self._following = self._following[:room]
        self._kept = frozenset(self.records[i].name for i in (index, *self._following))
        path = self._fetch(index, patience=self._folder.patience)
        with self._mutex:
            if not self._is_fetching_ahead:
                self._is_fetching_ahead = True  # in a daemon: the end of a training does not wait for it
                threading.Thread(target=self._fetch_ahead, name="fetch-shards", daemon=True).start()
        return path

    def expect(self, indices: Sequence[int]) -> None:
        """Say which shards will be wanted next; they are fetched after the one that is wanted now."""
        self._following = tuple(indices[:AHEAD])

    def split(self, index: int) -> Split:
        """Map a shard into memory, fetched if it is not here.

        Raises:
            TextgenError, OSError: as `path`.
        """
        try:
            return super().split(index)
        except StorageError:
            raise
        except (TextgenError, FileNotFoundError):
            if (self.directory / self.records[index].name).exists():
                raise
            return super().split(index)  # another training had deleted it to make room, after `path`

    def _fetch_ahead(self) -> None:
        """Fetch the shards that follow; begin again if the training goes on to another one meanwhile."""
        while True:
            following = self._following
            with suppress(TextgenError, OSError):  # `path` meets the error again, if it lasts
                for index in following:
                    if self._following is following:
                        self._fetch(index, patience=0)
            with self._mutex:
                if self._following is following:
                    self._is_fetching_ahead = False
                    return

    def _fetch(self, index: int, *, patience: float) -> Path:
        record = self.records[index]
        path = self.directory / record.name
        started, failed = time.monotonic(), self._read_failure()

        def is_here() -> bool:
            return path.exists() and path.stat().st_size == record.size

        while not is_here():
            lock = FileLock(self.directory / LOCK_NAME)
            if lock.acquire(seconds=LOOK_SECONDS):
                with lock.hold():
                    if not is_here():
                        left = patience
                        if (failure := self._read_failure()) != failed:  # what was waited for has failed
                            left -= time.monotonic() - started
                            if left <= 0:
                                raise StorageError(failure.partition("\n")[2])
                        self._fetch_now(record, path, patience=left)
        with suppress(FileNotFoundError):
            os.utime(path)  # used last; see `_make_room`
        return path

    def _fetch_now(self, record: Shard, path: Path, *, patience: float) -> None:
        """Fetch a shard that is not here. The lock is held."""
        self._make_room(record.size)
        try:
            self._folder.fetch(record.name, path, size=record.size, sha256=record.sha256, patience=patience)
        except StorageError as error:
            if patience:
                with suppress(OSError):
                    write_atomic(self.directory / FAILED_NAME, f"{secrets.token_hex(8)}\n{error}")
            raise

    def _read_failure(self) -> str:
        try:
            return (self.directory / FAILED_NAME).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def _make_room(self, size: int) -> None:
        """Delete the shards that were not used for longest until so many bytes have room. The lock is held."""
        for left in self.directory.glob(".train-*"):  # of processes that were killed
            left.unlink(missing_ok=True)
        files = [(path.stat(), path) for path in self.directory.glob("train-*")]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if total + size <= self._cache_bytes:
                break
            if path.name not in self._kept:
                path.unlink(missing_ok=True)
                total -= stat.st_size
