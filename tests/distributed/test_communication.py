"""What processes send each other at a step, and what `--gradient_compression bf16` makes of it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forking import Server
from textgen.runs.metrics_file import read_metrics

STEPS = 40


@dataclass(frozen=True)
class Trained:
    """What is left of a training."""

    losses: list[float]
    bytes_per_step: float
    """that all processes together sent at a step, on average over the whole training"""
    parameters: int


Train = Callable[..., Trained]
BF16 = ("--gradient_compression", "bf16")


@pytest.fixture(scope="module")
def train(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Yield a function that trains in a network of its own, where nobody else sends anything, once per case."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("a network namespace takes root and `unshare`")
    home = tmp_path_factory.mktemp("communication")
    server = Server("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")

    server.ask(ready=True)  # until `unshare` has run, its process is in the network of the machine

    def received() -> int:
        counted = Path(f"/proc/{server.pid}/net/dev").read_text()
        return int(counted.split("lo:")[1].split()[0])

    @functools.cache
    def run(processes: int, *compression: str) -> Trained:
        run_dir = Path(tempfile.mkdtemp(dir=home))
        command = [
            "train_distributed.py", *tiny_flags, "--run_dir", str(run_dir), "--max_steps", str(STEPS),
            "--log_every", "1", "--sample_tokens", "1", *compression,
        ]  # fmt: skip
        own = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
        before = received()
        ended = server.run(command, env=os.environ | own, processes=processes)
        sent = received() - before
        assert [one.returncode for one in ended] == [0] * processes, ended
        assert f"{processes} process" in ended[0].stderr, ended
        parameters = re.search(r"([\d,]+) parameters", ended[0].stderr)
        assert parameters is not None
        losses = [row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row]
        assert len(losses) == STEPS
        return Trained(losses, sent / STEPS, int(parameters[1].replace(",", "")))

    yield run
    server.close()


def largest_difference(ours: Trained, theirs: Trained) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours.losses, theirs.losses, strict=True))


def test_two_processes_send_their_gradients_once_and_half_of_it_as_bfloat16(train: Train) -> None:
    """A ring of two: each sends 4 bytes a parameter. Setting up, headers and agreements come on top."""
    whole, half = train(2), train(2, *BF16)
    gradients = 2 * 4 * whole.parameters
    assert 1 < whole.bytes_per_step / gradients < 1.2
    assert 0.5 < half.bytes_per_step / gradients < 0.7
    assert whole.bytes_per_step - half.bytes_per_step == pytest.approx(gradients / 2, rel=0.05)


def test_losses_with_bfloat16_gradients_differ_within_their_band(train: Train) -> None:
    difference = largest_difference(train(2, *BF16), train(2))
    print(f"largest relative difference {difference:.1e}")
    assert 1e-7 < difference < 1e-4


def test_float32_is_the_default_and_has_the_losses_of_one_process(train: Train) -> None:
    whole, half = largest_difference(train(2), train(1)), largest_difference(train(2, *BF16), train(1))
    print(f"largest relative differences {whole:.1e}, with bfloat16 {half:.1e}")
    assert whole < half / 4


def test_one_process_has_nothing_to_compress(train: Train) -> None:
    assert train(1, *BF16).losses == train(1).losses
    assert train(1, *BF16).bytes_per_step == 0
