"""Signals as a training takes them, and whom a process takes for its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from textgen.cli import train_main
from textgen.distributed.signals import Interrupted, StopSignals, _launcher_signal, end_siblings

HANDLED = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in HANDLED]


def test_signal_raises_until_it_is_deferred_and_then_is_noted() -> None:
    with StopSignals() as stop:
        with pytest.raises(Interrupted, match="SIGTERM") as interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted.value.exit_code == 143
        assert stop.number == signal.SIGTERM
    with StopSignals("SIGUSR1") as stop:
        stop.defer()
        assert stop.number is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.number == signal.SIGUSR1


def test_first_signal_stays_the_reason() -> None:
    with StopSignals("SIGUSR1") as stop:
        stop.defer()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.number == signal.SIGUSR1


def test_handlers_and_wakeup_and_thread_are_gone_afterwards() -> None:
    before = handlers()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    another = signal.set_wakeup_fd(writer)
    try:
        with StopSignals("SIGUSR1") as stop:
            stop.defer()
            assert all(ours is not theirs for ours, theirs in zip(handlers(), before, strict=True))
        assert handlers() == before
        assert signal.set_wakeup_fd(another) == writer
    finally:
        os.close(reader)
        os.close(writer)
    deadline = time.monotonic() + 30
    while any(thread.name == "signals" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "signals" for thread in threading.enumerate())


def test_a_process_of_somebody_else_is_never_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread watches; a second SIGINT is a KeyboardInterrupt, unless it is of the same press of the key."""
    before = handlers()
    with StopSignals("SIGUSR1", owns_process=False) as stop:
        assert not any(thread.name == "signals" for thread in threading.enumerate())
        stop.defer()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr("textgen.distributed.signals.SAME_KEYPRESS_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
    assert handlers() == before


def test_outside_the_main_thread_nothing_is_handled() -> None:
    before, seen = handlers(), []

    def run() -> None:
        with StopSignals("SIGUSR1") as stop:
            stop.defer()
            seen.append((handlers(), stop.number))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
    assert handlers() == before


def test_training_leaves_handlers_as_they_were(tiny_flags: list[str], tmp_path: Path) -> None:
    before = handlers()
    train_main([*tiny_flags, "--run_dir", str(tmp_path / "run"), "--max_steps", "1"])
    assert handlers() == before
    with pytest.raises(SystemExit):
        train_main([*tiny_flags, "--run_dir", str(tmp_path / "run"), "--max_steps", "2", "--seed", "1"])
    assert handlers() == before


# --- launchers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["/usr/bin/python", "/usr/local/bin/accelerate", "launch", "train.py"], signal.SIGTERM),
        (["python", "-m", "accelerate.commands.launch", "train.py"], signal.SIGTERM),
        (["bash", "-c", "python train.py"], None),
        (["python", "tests/accelerated.py"], None),
        (["srun", "python", "train.py"], None),
    ],
)
def test_launcher_of_one_process_is_told_by_its_command_line(
    words: list[str], wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process of each command line: Python takes what follows its code for arguments."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        assert _launcher_signal(process.pid) == wanted


def test_under_torchrun_a_process_dies_with_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    assert _launcher_signal(os.getpid()) == signal.SIGKILL


def test_parent_that_is_gone_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert _launcher_signal(process.pid) is None


LAUNCHER = """
import os, subprocess, sys, time
sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
def start(**more):
    return subprocess.Popen(sleeper, env=os.environ | more)
ours, other_run, helper = start(LOCAL_RANK="1"), start(LOCAL_RANK="1", TORCHELASTIC_RUN_ID="other"), start()
time.sleep(0.5)
code = "from textgen.distributed.signals import end_siblings; end_siblings()"
subprocess.run([sys.executable, "-c", code], env=os.environ | {"LOCAL_RANK": "0"}, check=True)
ours.wait(30)
print([process.poll() for process in (ours, other_run, helper)])
for process in (other_run, helper):
    process.kill()
"""


def test_siblings_are_the_other_workers_of_this_launcher_only() -> None:
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "this"}
    environment.pop("LOCAL_RANK", None)
    ended = subprocess.run(
        [sys.executable, "-c", LAUNCHER], env=environment, cwd=Path(__file__).parents[2], capture_output=True,
        text=True, check=True, timeout=60,
    )  # fmt: skip
    assert ended.stdout.strip() == "[-9, None, None]"


def test_without_torchrun_there_are_no_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"LOCAL_RANK": "1"}) as other:
        end_siblings()
        assert other.poll() is None
