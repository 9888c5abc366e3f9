"""Signals that stop a process, and processes that end together: launcher, training, siblings. No torch here.

A signal handler saves nothing: it only notes the signal. The training loop asks for it at every step, agrees with the
other processes and saves (`textgen/training/loop.py`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

# Under a launcher one Ctrl-C reaches the processes twice: from the terminal and from the launcher.
SAME_KEYPRESS_SECONDS = 1.0

# A process with nothing to save gets this long to stop: it may be in a long call, or wait for a lost process.
HANGING_SECONDS = 5.0

_PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """A signal asked the training to stop; the current work is abandoned."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved = False
        """whether the training was saved"""

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells count."""
        return 128 + self.number


class StopSignals:
    """Handles SIGTERM, SIGINT and one more signal during a training.

    Before `defer` is called there is nothing to save: text is encoded, a tokenizer is trained, files are loaded. A
    signal then raises Interrupted in the main thread. After `defer` a signal is only noted in `number`. A second SIGINT
    ends the process at once. Python runs no handler during one long call of the main thread, so a thread watches the
    signals too. Outside the main thread Python allows no handlers, and this class does nothing.

    Args:
        more: name of a further signal, for example `SIGUSR1`; None for none.
        owns_process: whether the process may be ended. If not, as in a notebook, no thread watches, and a second SIGINT
            raises KeyboardInterrupt.
    """

    def __init__(self, more: str | None = None, *, owns_process: bool = True) -> None:
        names = ["SIGTERM", "SIGINT", *([more] if more else [])]
        self._numbers = [getattr(signal, name) for name in names]
        self._before: dict[int, Any] = {}
        self._owns_process, self._noted_at = owns_process, 0.0
        self.deferred = False
        """whether a signal is only noted"""
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1
        self._timer: threading.Timer | None = None
        self.number: int | None = None
        """first signal that arrived; None before"""

    def defer(self) -> None:
        """From now on note a signal instead of raising Interrupted."""
        self.deferred = True

    def __enter__(self) -> Self:
        try:
            self._before = {number: signal.signal(number, self._note) for number in self._numbers}
        except ValueError:  # not the main thread
            return self
        if not self._owns_process:
            return self
        # Python writes the number of each signal into this pipe, even during a long call of the main thread.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=self._pipe[:1], name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():  # None: a handler that was not installed from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._pipe[1])  # the thread reads the end of the pipe and returns
            self._thread.join()
        if self._timer is not None:
            self._timer.cancel()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._noted_at = number, now
            if not self.deferred:
                raise Interrupted(number)
        elif not self._owns_process and number == signal.SIGINT and now - self._noted_at > SAME_KEYPRESS_SECONDS:
            raise KeyboardInterrupt

    def _watch(self, reader: int) -> None:
        """End this process if its main thread does not react to a signal.

        Ends it at once at a second SIGINT. Ends it HANGING_SECONDS after the first signal if there is nothing to save
        yet, or if a sibling is missing: torchrun then ends the remaining processes, which may wait for the missing one.

        Args:
            reader: end of the pipe into which Python writes the number of each signal, one byte each.
        """
        first = None
        while numbers := os.read(reader, 1):
            if numbers[0] not in self._numbers:
                continue
            now = time.monotonic()
            if first is None:
                first = now
                if not self.deferred or is_sibling_missing():
                    self._timer = threading.Timer(HANGING_SECONDS, os._exit, [128 + numbers[0]])
                    self._timer.daemon = True
                    self._timer.start()
            elif numbers[0] == signal.SIGINT and now - first > SAME_KEYPRESS_SECONDS:
                os._exit(128 + signal.SIGINT)
        os.close(reader)


# --- launchers -------------------------------------------------------------------------------------------------------


def end_with_launcher() -> None:
    """Let the kernel signal this process when its launcher dies, so that no orphan continues to write. Linux only.

    torchrun, which `accelerate launch` of several processes uses, forwards signals and waits for its processes. If it
    dies without waiting, the kernel kills them. `accelerate launch` of one process forwards nothing and dies of a
    SIGTERM: the kernel then sends its process a SIGTERM too, and the process saves. Without a launcher (a shell, nohup,
    srun) this function does nothing.
    """
    parent = os.getppid()
    if sys.platform != "linux" or (launcher := _launcher_signal(parent)) is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, launcher)
    # The launcher may have died before prctl, or even before getppid: the parent is init then.
    if os.getppid() != parent or (parent == 1 and not _starts_python(parent)):
        os.kill(os.getpid(), launcher)


def _launcher_signal(parent: int) -> int | None:
    """Return the signal that a process should get when its parent dies; None if the parent is no launcher."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return signal.SIGKILL
    launchers = (word == "accelerate" or word.startswith("accelerate.commands") for word in _command(parent))
    return signal.SIGTERM if any(launchers) else None


def _starts_python(pid: int) -> bool:
    """Return whether a process may be a launcher. In a container a launcher can have pid 1."""
    return any(word.startswith(("python", "torchrun", "accelerate")) for word in _command(pid))


def siblings() -> list[int]:
    """Return the pids of the other living processes that the same torchrun started on this machine.

    Linux only; empty without torchrun.
    """
    run_id, pids = os.environ.get("TORCHELASTIC_RUN_ID"), []
    for entry in Path("/proc").glob("[0-9]*") if run_id is not None else ():
        pid = int(entry.name)
        state, parent, *_ = [*_read_proc(pid, "stat").rpartition(")")[2].split(), "", ""]
        if pid == os.getpid() or parent != str(os.getppid()) or state == "Z":
            continue
        environment = _read_proc(pid, "environ").split("\0")
        if f"TORCHELASTIC_RUN_ID={run_id}" in environment and any(e.startswith("LOCAL_RANK=") for e in environment):
            pids.append(pid)
    return pids


def is_sibling_missing() -> bool:
    """Return whether a process that torchrun started on this machine has ended; False without torchrun."""
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "TORCHELASTIC_RUN_ID" in os.environ and len(siblings()) + 1 < started


def end_siblings() -> None:
    """Kill the siblings, when this process fails.

    The launcher sends SIGTERM first and waits half a minute. A sibling that sleeps, is stopped or waits for a lost
    process would not react to that.
    """
    for pid in siblings():
        with suppress(OSError):  # it has ended
            os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> list[str]:
    """Return the words of a process's command line, without directories."""
    return [Path(word).name for word in _read_proc(pid, "cmdline").split("\0")]


def _read_proc(pid: int, name: str) -> str:
    """Return a file of /proc/PID; empty if the process has ended or does not allow it."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
