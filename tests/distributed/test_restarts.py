"""`torchrun --max_restarts` and `--nnodes 1:2 --elastic`: workers are lost and come back; the losses stay the same."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.distributed.losses import all_losses
from tests.forking import free_port, run_script, server
from textgen.files import write_atomic
from textgen.runs.metrics_file import read_metrics

STEPS = 24
GATE = "TEXTGEN_TEST_GATE"
# A training that takes as many steps as the file of this variable says, and then waits for more, or for a signal.
SCRIPT = f"""
import os, time
from pathlib import Path
from textgen.cli import train_main
from textgen.training import loop

agree, gate = loop.agree, Path(os.environ["{GATE}"])

def agree_at_gate(training, *args, **options):
    while training.stop.number is None and training.learner.progression.step >= int(gate.read_text()):
        time.sleep(0.02)
    return agree(training, *args, **options)

loop.agree = agree_at_gate
train_main()
"""
PATIENCE = 300.0  # seconds; a busy machine is no failure


@pytest.fixture(scope="module")
def flags(tiny_flags: list[str]) -> list[str]:
    return [*tiny_flags, "--max_steps", str(STEPS), "--log_every", "1", "--save_every", "4", "--sample_prompts=[]"]


@pytest.fixture(scope="module")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of a training of one process to which nothing happened."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_script("train_distributed.py", *flags, "--run_dir", str(run))
    return losses(run)


def losses(run: Path) -> list[float]:
    assert [row["step"] for row in read_metrics(run) if "train/loss" in row] == list(range(1, STEPS + 1))
    return all_losses(run)


class Agent:
    """A torchrun that runs, in a session of its own."""

    def __init__(self, options: Sequence[str], flags: Sequence[str], home: Path, name: str) -> None:
        self.log = home / f"{name}.log"
        self.log.touch()
        script = [str(home / "script.py"), *flags]
        # without the second one, torchrun (torch 2.13) tells a machine that comes later of no place to meet
        own = {"CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", GATE: str(home / "gate")}
        environment = os.environ | own
        run = ["-m", "torch.distributed.run", *options, *script]
        self.process = server().start(run, output=self.log, error=self.log, env=environment)

    def workers(self) -> dict[int, int]:
        """Return the pids of its living workers by rank."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) != self.process.pid:
                    continue
                environment = (entry / "environ").read_text().split("\0")
                rank = next((line for line in environment if line.startswith("RANK=")), None)
                if rank is not None:
                    found[int(rank.partition("=")[2])] = int(entry.name)
        return found

    def worlds(self) -> list[int]:
        """Return the number of processes of each start, as the first lines of its trainings say."""
        return [int(number) for number in re.findall(r"^(\d+) process(?:es)? on", self.log.read_text(), re.MULTILINE)]

    def kill(self) -> None:
        """Kill it; the kernel then kills its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    started: list[Agent] = []
    (tmp_path / "script.py").write_text(SCRIPT)
    open_gate(tmp_path, STEPS)

    def start(name: str, *options: str, flags: Sequence[str]) -> Agent:
        started.append(Agent(options, flags, tmp_path, name))
        return started[-1]

    yield start
    for agent in started:
        agent.kill()


def open_gate(home: Path, steps: int) -> None:
    """Let trainings take this many steps."""
    write_atomic(home / "gate", str(steps))


def wait(condition: Callable[[], object], agent: Agent) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert agent.process.poll() is None, agent.log.read_text()
        assert time.monotonic() < deadline, agent.log.read_text()
        time.sleep(0.02)


def last_step(run: Path) -> int:
    rows = read_metrics(run)
    return int(rows[-1]["step"]) if rows else 0


def test_killed_worker_is_started_again_and_the_losses_are_the_same(
    flags: list[str], undisturbed: list[float], agents: Callable[..., Agent], tmp_path: Path
) -> None:
    """The first process is killed, which writes what a run leaves. `--elastic` below goes on after two losses."""
    run = tmp_path / "run"
    options = ["--nproc_per_node", "2", "--max_restarts", "1", "--master_port", str(free_port())]
    open_gate(tmp_path, 6)
    agent = agents("agent", *options, flags=[*flags, "--run_dir", str(run)])
    wait(lambda: last_step(run) >= 5 and (run / "checkpoints" / "step-000004").is_dir(), agent)
    os.kill(agent.workers()[0], signal.SIGKILL)
    open_gate(tmp_path, STEPS + 1)
    assert agent.process.wait(PATIENCE) == 0, agent.log.read_text()
    assert agent.worlds() == [2, 2]
    assert agent.log.read_text().count("resuming at step ") == 1
    assert losses(run) == pytest.approx(undisturbed, rel=1e-5)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_elastic_training_loses_a_machine_and_gets_one_again(
    flags: list[str], undisturbed: list[float], agents: Callable[..., Agent], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = [
        "--nproc_per_node", "1", "--nnodes", "1:2", "--max_restarts", "1", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "training", "--local_addr", "127.0.0.1",
    ]  # fmt: skip
    conf = (
        "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=10,is_host="  # a lost agent is missed in 10 s
    )
    host, guest = [*options, "--rdzv_conf", conf + "1"], [*options, "--rdzv_conf", conf + "0"]
    flags = [*flags, "--run_dir", str(run), "--elastic"]
    open_gate(tmp_path, 6)
    first = agents("first", *host, flags=flags)
    second = agents("second", *guest, flags=flags)
    wait(lambda: said(first, second)[-1:] == [2] and last_step(run) >= 5, first)
    second.kill()
    open_gate(tmp_path, 16)
    wait(lambda: said(first)[-1:] == [1] and last_step(run) >= 15, first)
    third = agents("third", *guest, flags=flags)
    wait(lambda: said(first, third)[-1:] == [2], first)
    open_gate(tmp_path, STEPS + 1)
    assert first.process.wait(PATIENCE) == 0, first.log.read_text()
    assert losses(run) == pytest.approx(undisturbed, rel=1e-5)


def said(*agents: Agent) -> list[int]:
    return [world for agent in agents for world in agent.worlds()]


def test_world_that_does_not_divide_the_batch_waits_and_says_which_do(
    flags: list[str], agents: Callable[..., Agent], tmp_path: Path
) -> None:
    options = ["--nproc_per_node", "3", "--max_restarts", "3", "--master_port", str(free_port())]
    agent = agents("agent", *options, flags=[*flags, "--run_dir", str(tmp_path / "run"), "--elastic"])
    line = "batch_size 8 cannot be divided among 3 processes, but among 1, 2, 4, 8: waiting 600 s"
    wait(lambda: line in agent.log.read_text(), agent)
    workers = agent.workers()
    assert len(workers) == 3
    time.sleep(1)
    assert agent.workers() == workers, "no restart is used up"
    os.kill(agent.process.pid, signal.SIGTERM)
    assert agent.process.wait(PATIENCE) != 0
    assert agent.log.read_text().count(line) == 1
