"""Trains as train_distributed.py does, and has something go wrong at a chosen call of a chosen function.

`$TEXTGEN_FAULTS` is a list in JSON of {"at": a name of PLACES, "call": from 1, "rank": null for all, "do": what}. `act`
describes what it can be: `signal N` to this process, `signal launcher N` to its parent, or `run COMMAND`. With
`$TEXTGEN_NO_LOCKS` the disk has no locks, as over NFS without lockd: {"errno": of flock, "beat": seconds, "silent":
seconds, "host": name of the machine, null for this one}. Nothing else of the product is changed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from textgen import cli
from textgen.commands import train

# name -> module and function, looked up there when it is called
PLACES = {
    "starting": ("textgen.distributed.launch", "start"),
    "tokenizing": ("textgen.data.store", "train_tokenizer"),
    "encoding": ("textgen.data.store", "encode_documents"),
    "resuming": ("textgen.training.resume", "load_optimizer"),
    "stepping": ("textgen.training.loop", "train_step"),
    "updating": ("textgen.training.step", "_update"),
    "scoring": ("textgen.training.validation", "score"),
    "evaluating": ("textgen.evaluation", "_score_batch"),
    "sampling": ("textgen.decoding.batch", "advance"),
    "saving": ("textgen.runs.checkpoint", "_write"),
}


def act(action: str, args: tuple[Any, ...]) -> None:
    """Let something go wrong; `args` are those of the function that is about to be called."""
    print(f"fault: {action}", file=sys.stderr, flush=True)
    match action.split():
        case ["signal", "launcher", number]:
            os.kill(os.getppid(), int(number))
        case ["signal", number]:
            os.kill(os.getpid(), int(number))
        case ["run", *_]:
            subprocess.run(action.removeprefix("run "), shell=True, check=False, stdout=subprocess.DEVNULL)
        case ["raise"]:
            raise RuntimeError("made to fail")
        case ["exit"]:
            sys.exit(0)
        case ["sleep", *seconds]:
            time.sleep(float(*seconds or (1e6,)))
        case ["compute"]:  # one long kernel: no Python runs in the main thread for half a minute or more
            import torch

            torch.matrix_power(torch.zeros(3000, 3000), 1 << 40)
        case ["nan", "loss"]:  # of this process; its gradient stays as it is
            args[0].recent[-1].parts[0][1].fill_(float("nan"))
            args[1].fill_(float("nan"))
        case ["nan", "embedding"]:
            embedding = args[0].unwrapped_model.embedding
            handle = embedding.register_forward_hook(lambda *given: (handle.remove(), given[2] * float("nan"))[1])
        case _:
            raise AssertionError(action)


def install() -> None:
    """Wrap the functions that faults are to happen at."""
    if no_locks := os.environ.get("TEXTGEN_NO_LOCKS"):
        take_locks_away(**json.loads(no_locks))
    faults = json.loads(os.environ.get("TEXTGEN_FAULTS", "[]"))
    rank = int(os.environ.get("RANK", "0"))
    for place in {fault["at"] for fault in faults}:
        here = {f["call"]: f["do"] for f in faults if f["at"] == place and f.get("rank") in (None, rank)}
        module_name, name = PLACES[place]
        wrap(importlib.import_module(module_name), name, here)


def take_locks_away(errno: int, beat: float, silent: float, host: str | None) -> None:
    """Let every flock fail, and make the limits of a lease short; a process of another host knows other pids."""
    from textgen.runs import lock

    def flock(*_: object) -> None:
        raise OSError(errno, os.strerror(errno))

    lock.fcntl.flock = flock
    lock.BEAT_SECONDS, lock.SILENT_SECONDS = beat, silent
    if host is not None:
        lock.socket.gethostname = lambda: host


def wrap(module: Any, name: str, actions: dict[int, str]) -> None:
    """Have actions by number of the call happen before a function of a module runs."""
    original: Callable[..., Any] = getattr(module, name)
    calls = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in actions:
            act(actions[calls], args)
        return original(*args, **options)

    setattr(module, name, wrapped)


def main() -> None:
    """Train; the wrapping waits until the flags are read, since it imports torch."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the background job of a shell ignores it
    start_log = train.start_log

    def start_log_and_install() -> None:
        start_log()
        install()

    train.start_log = start_log_and_install
    cli.train_main()


if __name__ == "__main__":
    main()
