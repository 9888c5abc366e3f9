"""A process that has textgen, torch and all they need imported, and forks for each script that a test runs.

A training of a second otherwise spends four more on imports (2026-11-29). What is forked is a process with a pid, an
exit code, files and an environment of a test's choice; it gets signals, and ends as a started one does. Two things
differ: its parent is the server, and /proc shows the environment of the server.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTED = [
    "accelerate", "docstring_parser", "jinja2", "matplotlib.backends.backend_agg", "matplotlib.pyplot",
    "torch._dynamo", "torch.distributed", "textgen.cli", "textgen.commands.sample", "textgen.commands.serve",
    "textgen.decoding.generation", "textgen.evaluation", "textgen.reporting.report", "textgen.training.loop",
]  # fmt: skip
# For the other processes to end once one has failed.
LOST_SECONDS = 120
# What is read while modules are imported; computing in several threads before a fork would not do.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


class Forked:
    """A process that was forked, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, server: Server, pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Wait for its end and return the exit code; raise TimeoutExpired if it does not come."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that forks; starting it takes four seconds.

    Args:
        around: a command that starts it, for one in a network of its own.
    """

    def __init__(self, *around: str) -> None:
        self._process = subprocess.Popen(
            [*around, sys.executable, __file__], cwd=ROOT, env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Return its number."""
        return self._process.pid

    def ask(self, **question: Any) -> Any:
        """Send a line of JSON and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        argv: Sequence[str],
        *,
        output: Path,
        error: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> Forked:
        """Fork a process that runs a script in a session of its own, with an empty standard input.

        Args:
            argv: the script and its arguments, or `-m`, a module and its arguments.
            output: a file, to which its standard output is appended.
            error: the same for its standard error.
            env: its environment; none for that of the tests.
            cwd: where.
        """
        environment = dict(os.environ if env is None else env) | ENVIRONMENT
        files = {"output": str(output), "error": str(error), "cwd": str(cwd)}
        return Forked(self, self.ask(argv=list(map(str, argv)), env=environment, **files))

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        processes: int = 1,
        last: Sequence[str] | None = None,
        timeout: float = 300,
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run a script on one process, or on several that meet; return how each ended and what it said.

        Several are forked with the variables that a launcher sets, on the CPU.

        Args:
            argv: the script and its arguments.
            env: the environment; none for that of the tests.
            processes: how many.
            last: one more argument for each process, by rank.
            timeout: in seconds, for each of them.
        """
        with tempfile.TemporaryDirectory() as directory:
            gang = [dict(os.environ if env is None else env) for _ in range(processes)]
            if processes > 1:
                world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
                meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
                for rank, own in enumerate(gang):
                    own |= world | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            endings = [[]] * processes if last is None else [[word] for word in last]
            files = [(Path(directory, f"{rank}.out"), Path(directory, f"{rank}.err")) for rank in range(processes)]
            started = [
                self.start([*argv, *more], output=output, error=error, env=own)
                for (output, error), own, more in zip(files, gang, endings, strict=True)
            ]
            deadline = time.monotonic() + timeout
            try:
                while None in (codes := [process.poll() for process in started]) and time.monotonic() < deadline:
                    if any(codes):  # one has failed: the others notice, or wait for it in vain
                        deadline = min(deadline, time.monotonic() + LOST_SECONDS)
                    time.sleep(0.01)
            finally:
                for process in started:
                    process.kill()
            if None in codes:
                said = "".join(error.read_text()[-2000:] for _, error in files)
                raise subprocess.TimeoutExpired(f"processes that ended with {codes}: {said}", timeout)
            return [
                subprocess.CompletedProcess(list(argv), code, output.read_text(), error.read_text())
                for code, (output, error) in zip(codes, files, strict=True)
            ]

    def close(self) -> None:
        """End the server."""
        self._process.communicate()


@functools.cache
def server() -> Server:
    """Return the server of this process, started at the first call."""
    one = Server()
    atexit.register(one.close)
    return one


def run_script(*argv: str, env: Mapping[str, str] | None = None, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script on one process, which must end with the expected exit code."""
    (done,) = server().run(argv, env=env)
    assert done.returncode == expect, done.stderr
    return done


def free_port() -> int:
    """Return a free port below those that the kernel gives to outgoing connections.

    A port of the kernel's choice is taken now and then by another process before the one that is to listen on it does.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


# --- the server ------------------------------------------------------------------------------------------------------


def serve() -> dict[str, Any] | None:
    """Answer questions until there are no more; return None then, and in a forked process what that is to run."""
    import gc
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the first collection in each fork would copy all memory
    for line in iter(sys.stdin.readline, ""):
        question = json.loads(line)
        if "ready" in question:
            answer = True
        elif "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            return question
        print(json.dumps(answer), flush=True)
    return None


def become(question: dict[str, Any]) -> None:
    """Let a forked process be what a started one would be."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the background job of a shell ignores it
    for descriptor, path in enumerate((os.devnull, question["output"], question["error"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(question["env"])
    os.chdir(question["cwd"])


def run_as_main(argv: list[str]) -> None:
    """Run a script or a module as Python would."""
    if argv[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(argv[0]).resolve().parent), argv
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    if (job := serve()) is not None:
        become(job)
        run_as_main(job["argv"])
