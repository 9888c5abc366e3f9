"""A folder at an address, by fsspec: its files are fetched, sent, listed and deleted.

Storage fails: every operation is tried again, after growing waits, until the patience ends. A file that is fetched
is whole and has the right hash, or is not there.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import secrets
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from textgen.errors import TextgenError, one_line
from textgen.packages import require_packages
from textgen.storage.address import check_address, protocol_of, show

log = logging.getLogger("textgen")

PATIENCE_SECONDS = 300.0
"""for how long an operation is tried again"""
FIRST_WAIT_SECONDS, LAST_WAIT_SECONDS = 0.5, 30.0
CONNECT_SECONDS, SILENT_SECONDS = 10.0, 30.0
DAMAGED_TRIES = 4  # storage may give the right bytes next time
MIN_BYTES_PER_SECOND = 50_000  # a transfer that is slower has failed
PACKAGES = {"gs": "gcsfs", "az": "adlfs"}  # each brings its provider's libraries, so they are in no extra
DENIED = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError")
LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)

T = TypeVar("T")


class StorageError(TextgenError):
    """A file that cannot be fetched from storage, or sent to it."""


class MissingFileError(StorageError):
    """A file that storage does not have."""


class DamagedFileError(StorageError):
    """Storage has, or gives, other bytes than it should."""


class RemoteFolder:
    """A folder at an address. Threads may share it; processes that are forked may not.

    Args:
        address: of the folder.
        patience: seconds for which a failing operation is tried again; None for `PATIENCE_SECONDS`.

    Raises:
        TextgenError: the address cannot be used, or its package is missing.
    """

    def __init__(self, address: str, *, patience: float | None = None) -> None:
        self.address = check_address(address)
        self.protocol = protocol_of(self.address)
        self.patience = PATIENCE_SECONDS if patience is None else patience
        if self.protocol in ("s3", "https"):  # s3fs brings aiohttp, by which fsspec reads https
            require_packages("storage at an address", "s3fs", extra="remote")
        elif (package := PACKAGES.get(self.protocol)) and find_spec(package) is None:
            raise TextgenError(f"`{self.protocol}://` needs `{package}`: run `pip install {package}`")

    def __str__(self) -> str:
        """Return the address for messages."""
        return show(self.address)

    def fetch(
        self,
        name: str,
        path: Path,
        *,
        size: int | None = None,
        sha256: str | None = None,
        patience: float | None = None,
    ) -> None:
        """Fetch a file to a local path, which has the whole file afterwards, or what it had before.

        Args:
            name: of the file in the folder; it may have slashes.
            path: of the file here; its folder exists.
            size: bytes that the file must have, if known.
            sha256: hash that it must have, if known.
            patience: seconds for which it is tried again, 0 for one attempt; None for that of the folder.

        Raises:
            MissingFileError: storage does not have the file.
            DamagedFileError: it has another file.
            StorageError: it cannot be fetched.
            OSError: the local disk is full or cannot be written.
        """
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")

        def attempt() -> None:
            self._download(name, aside, size, DamagedFileError(f"more than {size} bytes"))
            if size is not None and (seen := aside.stat().st_size) != size:
                raise DamagedFileError(f"{seen} bytes, wanted {size}")
            if sha256 is not None and (digest := hash_file(aside)) != sha256:
                raise DamagedFileError(f"sha256 {digest[:8]}, wanted {sha256[:8]}")

        try:
            aside.touch()  # an error of this disk is none of storage
            self._try("fetched", name, attempt, patience=patience)
            with aside.open("rb") as file:
                os.fsync(file.fileno())  # after a power cut the file could have its size and other bytes
            aside.replace(path)
        except OSError as error:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    def read(self, name: str, *, limit: int) -> bytes:
        """Return the bytes of a small file.

        Raises:
            MissingFileError, DamagedFileError, StorageError, OSError: as `fetch`; damaged if it is longer than `limit`.
        """
        with tempfile.TemporaryDirectory(prefix="textgen-") as folder:
            path = Path(folder, "file")
            longer = StorageError(f"`{self._shown(name)}` is longer than {limit} bytes")
            try:
                self._try("fetched", name, lambda: self._download(name, path, limit, longer))
            except StorageError as error:
                if error is longer:
                    raise DamagedFileError(str(longer)) from None
                raise
            return path.read_bytes()

    def send(self, path: Path, name: str) -> None:
        """Send a local file. Storage has the whole file afterwards, or what it had before under this name.

        Raises:
            StorageError: storage cannot be written.
            OSError: the local file cannot be read.
        """
        if self.protocol == "https":
            raise StorageError(f"`{self}` cannot be written: `https` is for reading")
        with path.open("rb") as file:  # an error of this disk is none of storage
            size = os.fstat(file.fileno()).st_size
        target = self._path(name)

        def attempt() -> None:
            if self.protocol == "file":  # a copy would not be whole at once
                aside = f"{target}.{secrets.token_hex(4)}.part"
                self._files.put_file(str(path), aside)
                os.replace(aside, target)
                return
            self._files.put_file(str(path), target, **self._within(size))
            self._files.invalidate_cache()
            if (seen := self._files.info(target, **self._within(0))["size"]) != size:
                raise DamagedFileError(f"{seen} bytes arrived, wanted {size}")

        self._try("sent", name, attempt)

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all files below a folder in this one, relative to this one, sorted; [] if it is missing.

        Raises:
            StorageError: the folder cannot be listed.
        """
        start = self._path(folder) if folder else self._root

        def attempt() -> list[str]:
            self._files.invalidate_cache()
            return list(self._files.find(start, **self._within(0)))

        prefix = self._files._strip_protocol(self._root).rstrip("/") + "/"
        try:
            found = self._try("listed", folder, attempt)
        except MissingFileError:
            return []
        return sorted(str(path)[len(prefix) :] for path in found if str(path).startswith(prefix))

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens if it is missing.

        Raises:
            StorageError: it cannot be deleted.
        """
        with suppress(MissingFileError):
            self._try("deleted", name, lambda: self._files.rm_file(self._path(name), **self._within(0)))

    @cached_property
    def _files(self) -> Any:
        """The file system of fsspec. It retries nothing itself and caches nothing."""
        import fsspec

        options: dict[str, Any] = {"use_listings_cache": False}
        if self.protocol == "s3":
            timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS}
            options["config_kwargs"] = timeouts | {"retries": {"max_attempts": 0}}
        elif self.protocol == "https":
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}  # .netrc, and proxies
        elif self.protocol == "file":
            options["auto_mkdir"] = True
        try:
            files = fsspec.filesystem(self.protocol, **options)
        except Exception as error:  # of each library: a missing account, a key that is none
            raise StorageError(f"`{self}` cannot be opened: {show(one_line(error))}") from error
        if self.protocol == "s3":
            files.retries = 1
        return files

    @property
    def _root(self) -> str:
        return self.address.removeprefix("file://")

    def _path(self, name: str) -> str:
        """Return what fsspec calls a file.

        Raises:
            StorageError: the name leads out of the folder.
        """
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable():
            raise StorageError(f"{name[:100]!r} is not the name of a file in `{self}`")
        return f"{self._root}/{name}"

    def _shown(self, name: str) -> str:
        return f"{self}/{name}" if name else str(self)

    def _within(self, size: int) -> dict[str, float]:
        """Return the keyword that ends an operation of so many bytes in time; not all file systems have one."""
        return {"timeout": 2 * SILENT_SECONDS + size / MIN_BYTES_PER_SECOND} if self._files.async_impl else {}

    def _download(self, name: str, path: Path, limit: int | None, longer: StorageError) -> None:
        """Write a file to a path; raise `longer` at a byte above the limit."""
        from fsspec.callbacks import Callback

        class Limit(Callback):  # type: ignore[misc]
            def relative_update(self, inc: int = 1) -> None:
                super().relative_update(inc)
                if limit is not None and self.value > limit:
                    raise longer

        # A file of unknown size may take as long as one of a gigabyte.
        timeout = self._within(1 << 30 if limit is None else limit)
        self._files.get_file(self._path(name), str(path), callback=Limit(), **timeout)

    def _try(self, done: str, name: str, attempt: Callable[[], T], *, patience: float | None = None) -> T:
        """Return what `attempt` returns, calling it again while storage fails and the patience lasts."""
        patience = self.patience if patience is None else patience
        started, wait, warned, damaged = time.monotonic(), FIRST_WAIT_SECONDS, False, 0
        where = f"`{self._shown(name)}`"
        while True:
            try:
                return attempt()
            except TextgenError as error:
                if not isinstance(error, DamagedFileError):
                    raise
                reason, damaged = str(error), damaged + 1
            except FileNotFoundError as error:
                raise MissingFileError(f"{where} does not exist") from error
            except Exception as error:  # each library has its own
                denied = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)
                reason = show(one_line(error))
                if denied or type(error).__name__ in DENIED:
                    raise StorageError(f"{where} cannot be {done}, access is denied: {reason}") from error
                if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
                    raise
                if type(error).__name__ == "FlexibleChecksumError":  # botocore compares a checksum of S3
                    damaged += 1
                if type(error).__name__ == "FSTimeoutError":
                    reason = f"no answer, or slower than {MIN_BYTES_PER_SECOND // 1000} KB a second"
            spent = time.monotonic() - started
            if damaged == DAMAGED_TRIES:
                raise DamagedFileError(f"{where} cannot be {done}, tried {damaged} times: {reason}")
            if spent + wait > patience:
                raise StorageError(f"{where} cannot be {done}, tried for {spent:.0f} s: {reason}")
            if not warned:
                log.warning("%s cannot be %s: %s; trying again for %.0f s", where, done, reason, patience - spent)
                warned = True
            time.sleep(
                wait * random.SystemRandom().uniform(0.7, 1)
            )  # processes that fail together do not return together
            wait = min(2 * wait, LAST_WAIT_SECONDS)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
