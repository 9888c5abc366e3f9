"""A lock on a file, also on disks whose lock calls fail.

The lock is flock wherever the disk has it: the kernel releases it when its holder dies. NFS without lockd answers flock
with ENOLCK, Lustre without the mount option `flock` with ENOSYS. There the lock is a *lease*: a directory beside the
file with one empty file in it, whose name says who holds the lease and how often the holder has renamed it.

Why two processes cannot hold one lease:

- A lease is made whole. A new directory with its file is renamed to the lease's name, and the file system refuses that
  while a directory with a file is there. So the directory holds one file, or the lease is free.
- Everything after that is a rename of the name last seen, or its removal: the holder's beat, a take-over, the release.
  Each name contains a random token and a count, so no name comes back. Of several renames of one name the file system
  carries out one; the others find nothing. So one of several takers wins, and a taker whose view is old loses.
- The holder's check is a beat too. If it succeeds, nobody had taken the lease over at that moment. After a take-over
  every beat of the old holder fails, however long it was stopped.
- No step trusts a cache or a clock. A rename happens on the file server. A holder is silent if its file keeps its name
  while a taker watches for `SILENT_SECONDS` of the taker's monotonic clock. Clocks of two machines are never compared.

A process may be stopped between its check and the write after it. Callers therefore write so that a late write misses:
into a temporary name that the next holder removes, or into a file that the next holder has replaced.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import glob
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from textgen.errors import TextgenError

log = logging.getLogger("textgen")

# Errors of flock on a disk without locks, and errors of a lock that another process holds (some disks answer EACCES).
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
IN_USE = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}

# A beat costs the file server one rename. Six may be missed: a busy server or a machine that swaps delays some, and a
# scheduler needs minutes to requeue the job of a dead machine, so that nobody waits for the last of the 60 s.
BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0
POLL_SECONDS = 0.05  # between two attempts to get a lock from the kernel; 20 times in a beat for a lease


class FileLock:
    """A lock on a file, which is created if it is missing and left in place.

    Args:
        path: the file. A lease is the directory `NAME.lease` beside it, and is removed at the release.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._lease = Lease(path.with_name(f"{path.name}.lease"))

    @property
    def is_lease(self) -> bool:
        """Whether the lock is a lease, since the disk has no locks."""
        return self._lease.held

    def describe_holder(self) -> str | None:
        """Return a description of the process that holds the lease; None if there is no lease."""
        state = self._lease.read()
        return None if state is None else str(Holder.parse(state))

    def acquire(self, *, seconds: float | None) -> bool:
        """Wait for the lock.

        The lease of a process that has ended on this machine is taken over at once; the lease of a silent process is
        taken over after `SILENT_SECONDS`.

        Args:
            seconds: to wait for a process that shows signs of life; None to wait until it releases the lock.

        Returns:
            Whether this process holds the lock.

        Raises:
            OSError: the file cannot be opened.
            TextgenError: the disk has neither locks nor renames that exclude each other.
        """
        started = since = time.monotonic()
        seen, alive, silent = None, False, None
        while not self.try_acquire(silent):
            now, state = time.monotonic(), self._lease.read()
            if state != seen:
                alive = None not in (state, seen) and Holder.parse(state).token == Holder.parse(seen).token
                if state is not None and seen is None:
                    log.info("`%s` is held by %s: waiting for a sign of life", self._path, self.describe_holder())
                seen, since = state, now
            waited = silent is not None or alive or state is None
            if seconds is not None and waited and now - started >= seconds:
                return False
            silent = seen if now - since >= SILENT_SECONDS else None
            time.sleep(POLL_SECONDS if state is None else BEAT_SECONDS / 20)
        return True

    def try_acquire(self, silent: str | None = None) -> bool:
        """Make one attempt, and return whether this process holds the lock.

        Args:
            silent: the state of a lease that may be taken over; None to take over only from an ended process.
        """
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        acquired = False
        try:
            flocked = self._try_flock()
            if flocked and not self._lease.exists():
                acquired = True
            elif flocked is not False:
                # A lease beside flock is that of a machine whose mount of this disk has no locks: both are needed.
                acquired = self._lease.try_acquire(silent)
        except OSError as error:
            raise TextgenError(f"`{self._path}` cannot be locked: {error.strerror}") from error
        finally:
            if not acquired:
                self._close()
        return acquired

    def _try_flock(self) -> bool | None:
        """Return whether flock has locked the open file; None if the disk has no locks."""
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return None
            if error.errno in IN_USE:
                return False
            raise
        return os.fstat(self._descriptor).st_nlink > 0  # 0: deleted since it was opened, with a run's directory

    def is_lost(self) -> bool:
        """Return whether another process has taken the lease over; flock is never lost, and nothing is done then."""
        return self._lease.held and not self._lease.beat()

    def require(self) -> None:
        """Raise TextgenError if `is_lost`."""
        if self.is_lost():
            holder = self.describe_holder()
            raise TextgenError(
                f"`{self._path}` was {f'taken over by {holder}' if holder else 'removed'} "
                f"while this process gave no sign of life: this process ends and writes nothing more"
            )

    def release(self) -> None:
        """Let other processes have the lock; nothing happens if this process does not hold it."""
        self._lease.release()
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Release the acquired lock at the end. An OSError that comes of a lost lease becomes the line about that."""
        try:
            yield
        except OSError:
            self.require()
            raise
        finally:
            self.release()


class Lease:
    """A lock made of renames, for disks without locks; the module's docstring says why it excludes.

    Args:
        directory: of the lease.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._name = ""
        self.held = False
        self._mutex = threading.Lock()  # the beats of the thread and of the checks
        self._released = threading.Event()

    def exists(self) -> bool:
        """Return whether the directory of a lease is there, perhaps with no holder."""
        return self._directory.exists()

    def read(self) -> str | None:
        """Return the name of the file in the directory, which is the state of the lease; None if the lease is free."""
        try:
            return next(iter(os.listdir(self._directory)), None)
        except FileNotFoundError:
            return None

    def try_acquire(self, silent: str | None) -> bool:
        """Make one attempt, as `FileLock.try_acquire`; beat from then on."""
        state = self.read()
        ended = state is not None and Holder.parse(state).has_ended()
        self._name = Holder.this().name()
        if state is None:
            self._create()
        elif ended or state == silent:
            self._rename(state, self._name)
        else:
            return False
        if not self.beat():
            return False
        self.held = True
        self._released = threading.Event()
        threading.Thread(target=self._beat_on, args=(self._released,), name="lease", daemon=True).start()
        # Of processes killed in `_create`. If one is not, its lease is made empty, so free, and its first beat fails.
        for left in self._directory.parent.glob(f"{glob.escape(self._directory.name)}.*"):
            shutil.rmtree(left, ignore_errors=True)
        if state is not None:
            why = "which has ended" if ended else f"which has given no sign of life for {SILENT_SECONDS:g} s"
            log.warning("`%s` is taken over from %s, %s", self._directory, Holder.parse(state), why)
        return True

    def _create(self) -> None:
        """Make the lease, unless another process does."""
        aside = self._directory.with_name(f"{self._directory.name}.{secrets.token_hex(4)}")
        try:
            aside.mkdir()
            (aside / self._name).touch()
            with suppress(OSError):
                self._directory.rmdir()  # an empty one: its holder was killed during the release
            aside.rename(self._directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def beat(self) -> bool:
        """Rename the file of the lease; return False if it is another process's or is gone."""
        with self._mutex:
            holder, _, count = self._name.rpartition(",")
            following = f"{holder},{int(count) + 1}"
            if self._rename(self._name, following):
                self._name = following
                return True
            # Over NFS the answer to a rename may be lost, and its repetition finds nothing. A signal's exception may
            # come between a rename and the line after it.
            state = self.read()
            if state is not None and Holder.parse(state).token == Holder.parse(self._name).token:
                self._name = state
                return True
            return False

    def _rename(self, name: str, to: str) -> bool:
        """Rename the file in the directory; return False if it has another name by now."""
        try:
            os.rename(self._directory / name, self._directory / to)
        except FileNotFoundError:
            return False
        return True

    def _beat_on(self, released: threading.Event) -> None:
        """Beat until the lease is released or lost; an error of the disk may pass."""
        alive = True
        while alive and not released.wait(BEAT_SECONDS):
            with suppress(OSError):
                alive = self.beat()

    def release(self) -> None:
        """Remove the lease if this process holds it."""
        with self._mutex:
            self._released.set()
            if not self.held:
                return
            self.held = False
            with suppress(OSError):
                state = self.read()
                if Holder.parse(state).token == Holder.parse(self._name).token:
                    (self._directory / str(state)).unlink()
                    self._directory.rmdir()


class Holder(NamedTuple):
    """The holder of a lease, as the name of its file has it."""

    host: str
    pid: str
    kernel: str
    """hash of what pids are unique in; empty if that is unknown"""
    start: str
    """start time of the process, in the kernel's ticks"""
    since: str
    token: str

    @classmethod
    def this(cls) -> Holder:
        """Return this process, with a new token."""
        host, pid = re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII)[:64], os.getpid()
        since = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")  # some disks allow no colon in a name
        return cls(host, str(pid), _kernel(), _read_start(pid) or "", since, secrets.token_hex(8))

    @classmethod
    def parse(cls, name: str | None) -> Holder:
        """Return the holder of a state; of a name that is no state's, an unknown one."""
        fields = (name or "").split(",")
        return cls(*fields[:-1]) if len(fields) == 7 else cls("", "", "", "", "", name or "")

    def name(self) -> str:
        """Return the first state of the lease."""
        return ",".join([*self, "0"])

    def __str__(self) -> str:
        """Return a description for messages."""
        if not self.pid:
            return "an unknown process"
        with suppress(ValueError):
            since = datetime.strptime(self.since, "%Y%m%dT%H%M%S%z").isoformat()
            return f"process {self.pid} on {self.host}, since {since}"
        return f"process {self.pid} on {self.host}"

    def has_ended(self) -> bool:
        """Return whether the process is known to have ended, which only its own machine knows."""
        if not self.kernel or not self.start or self.kernel != _kernel() or not self.pid.isdecimal():
            return False
        try:
            os.kill(int(self.pid), 0)
        except ProcessLookupError:
            return True
        except OSError:  # a process of another user
            return False
        return (start := _read_start(int(self.pid))) is not None and start != self.start


@functools.cache
def _kernel() -> str:
    """Return a hash of what pids are unique in: host, start of its kernel, pid namespace; empty if unknown."""
    try:
        boot, space = (
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"),
            os.readlink("/proc/self/ns/pid"),
        )
    except OSError:
        return ""
    return hashlib.sha256(f"{socket.gethostname()} {boot} {space}".encode()).hexdigest()[:12]


def _read_start(pid: int) -> str | None:
    """Return the start time of a process, "ended" if it waits to be reaped; None if it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]
