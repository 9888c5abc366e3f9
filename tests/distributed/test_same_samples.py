"""Sampling from what two processes trained is sampling from what one process trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from textgen.cli import main
from textgen.model.files import load_model

ROOT = Path(__file__).parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def runs(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Train the same on one process and on two; return the run directories by number of processes."""
    home = tmp_path_factory.mktemp("same_samples")
    gang = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for processes in (1, 2):
        run = ["--max_steps", str(STEPS), "--learning_rate", "0.003", "--run_dir", str(home / str(processes))]
        command = [sys.executable, *(gang if processes > 1 else []), str(ROOT / "train_distributed.py")]
        done = subprocess.run(
            [*command, *tiny_flags, *run], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert f"{processes} process" in done.stderr, done.stderr
        assert done.returncode == 0, done.stderr
    return {processes: home / str(processes) for processes in (1, 2)}


def texts(run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    capsys.readouterr()
    prompts = ["--prompt", "The plot", "--prompt", "My wife", "--num_samples", "2", "--json"]
    main(["sample", str(run), *prompts, "--min_new_tokens", "100", "--max_new_tokens", "100", *flags])
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--temperature", "0"), ("--seed", "1"), ("--seed", "2", "--top_p", "0.9")])
def test_samples_do_not_depend_on_how_many_processes_trained(
    flags: tuple[str, ...], runs: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights differ in their last bits; a draw would have to hit such a gap to differ."""
    (one, _), (two, _) = (load_model(runs[processes]) for processes in (1, 2))
    theirs = two.state_tensors()
    gap = max(float((value - theirs[name]).abs().max()) for name, value in one.state_tensors().items())
    print(f"largest difference between weights: {gap:.1e}")
    assert gap < 1e-4
    of_one, of_two = (texts(runs[processes], capsys, "--decoder", "float32", *flags) for processes in (1, 2))
    assert len(of_one) == 4
    assert of_one == of_two
