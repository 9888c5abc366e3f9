"""Signals, launchers and siblings: how a process is asked to stop, and what ends with what. No torch here.

Nothing is ever saved inside a signal handler: it notes the signal, and the training loop, which asks at every step,
agrees with the other processes and saves (`textgen/training/loop.py`).
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

# A terminal's Ctrl-C reaches the processes twice under a launcher, from the terminal and from the launcher.
SAME_KEYPRESS_SECONDS = 1.0

# A process that is asked to end and has nothing to save may be inside a call that lasts, or wait for a lost peer.
HANGING_SECONDS = 5.0

_PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """A signal asked the training to stop, and the work at hand is left as it is."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells count."""
        return 128 + self.number


class StopSignals:
    """Handles SIGTERM, SIGINT and one more signal for the time of a training.

    Until `defer` is called there is nothing to save, and a signal raises Interrupted where it arrives: while text is
    encoded, a tokenizer is trained, files are loaded. From then on it is only noted. A second SIGINT ends the process
    at once, whatever it is at. Since Python runs no handler while the main thread is in one long call, a thread watches
    too. Outside the main thread Python allows no handlers, and this does nothing.

    Args:
        more: name of a further signal, such as `SIGUSR1`; None for none.
    """

    def __init__(self, more: str | None = None) -> None:
        names = ["SIGTERM", "SIGINT", *([more] if more else [])]
        self._numbers = [getattr(signal, name) for name in names]
        self._before: dict[int, Any] = {}
        self.deferred = False
        """whether signals are noted only"""
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1
        self._timer: threading.Timer | None = None
        self.number: int | None = None
        """the signal that asked to stop, if one did"""

    def defer(self) -> None:
        """Note signals from here on instead of raising."""
        self.deferred = True

    def __enter__(self) -> Self:
        try:
            self._before = {number: signal.signal(number, self._note) for number in self._numbers}
        except ValueError:  # not the main thread
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=self._pipe[:1], name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._pipe[1])  # which ends the thread
            self._thread.join()
        if self._timer is not None:
            self._timer.cancel()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            if not self.deferred:
                raise Interrupted(number)

    def _watch(self, reader: int) -> None:
        """End this process where its main thread does not come to it; Python writes signals' numbers into a pipe.

        That is at a second SIGINT; and some seconds after a first signal where there is nothing to save yet, or where
        a sibling is missing: then torchrun ends those who are left, and they may be waiting for it.
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
    """Have the kernel end this process when its launcher dies, so that no orphan goes on writing. Linux only.

    torchrun, and with it `accelerate launch` of several processes, passes signals on and waits: when it dies without
    that, its processes are killed. `accelerate launch` of one process passes nothing on and dies of a SIGTERM: its
    process is told by a SIGTERM of its own, and saves. Without a launcher (a shell, nohup, srun) nothing is done.
    """
    parent = os.getppid()
    if sys.platform != "linux" or (launcher := _launcher_signal(parent)) is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, launcher)
    # It may have died before the kernel was asked, or even before it was looked for: then the parent is init.
    if os.getppid() != parent or (parent == 1 and not _starts_python(parent)):
        os.kill(os.getpid(), launcher)


def _launcher_signal(parent: int) -> int | None:
    """Return the signal that a process should get when its parent dies; None where that is no launcher."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return signal.SIGKILL
    launchers = (word == "accelerate" or word.startswith("accelerate.commands") for word in _command(parent))
    return signal.SIGTERM if any(launchers) else None


def _starts_python(pid: int) -> bool:
    """Tell whether a process may be a launcher, which it can be as a container's first process too."""
    return any(word.startswith(("python", "torchrun", "accelerate")) for word in _command(pid))


def siblings() -> list[int]:
    """Return the pids of the other processes that this one's torchrun has started on this machine and that live.

    Linux only; none without torchrun.
    """
    run_id, found = os.environ.get("TORCHELASTIC_RUN_ID"), []
    for entry in Path("/proc").glob("[0-9]*") if run_id is not None else ():
        pid = int(entry.name)
        state, parent, *_ = [*_read_proc(pid, "stat").rpartition(")")[2].split(), "", ""]
        if pid == os.getpid() or parent != str(os.getppid()) or state == "Z":
            continue
        environment = _read_proc(pid, "environ").split("\0")
        if f"TORCHELASTIC_RUN_ID={run_id}" in environment and any(e.startswith("LOCAL_RANK=") for e in environment):
            found.append(pid)
    return found


def is_sibling_missing() -> bool:
    """Tell whether fewer processes than torchrun has started on this machine are left; False without torchrun."""
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "TORCHELASTIC_RUN_ID" in os.environ and len(siblings()) + 1 < started


def end_siblings() -> None:
    """Kill the siblings.

    Called when this process fails: one that sleeps, is stopped or waits for a lost peer would hold the launcher for
    half a minute more, since it asks with SIGTERM first.
    """
    for pid in siblings():
        with suppress(OSError):  # it is gone
            os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> list[str]:
    """Return the words of a process's command line without their directories."""
    return [Path(word).name for word in _read_proc(pid, "cmdline").split("\0")]


def _read_proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
