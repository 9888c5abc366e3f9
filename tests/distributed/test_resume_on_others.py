"""Law 2 on several processes: a training that goes on where it stood, on as many processes or on others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.losses import train_losses
from tests.faults.jobs import Job, assert_as_if_nothing_had_happened, fault, finish

Launch = Callable[..., list[dict[str, Any]]]

pytestmark = pytest.mark.slow
FLAGS = ("--model.dropout", "0.1", "--ema_decay", "0.9", "--max_grad_norm", "1")


def test_resume_on_two_processes_is_bitwise(launch_training: Launch) -> None:
    whole = launch_training("whole", "--max_steps", "30", *FLAGS, processes=2)
    for steps in ("10", "30"):
        rows = launch_training("two", "--max_steps", steps, *FLAGS, processes=2)
    assert train_losses(rows) == train_losses(whole)


def test_two_processes_from_a_base_have_the_losses_of_one(launch_training: Launch, tmp_path: Path) -> None:
    base = tmp_path / "base"
    launch_training(str(base), "--max_steps", "5")
    flags = ("--init_from", str(base), "--tokenizer.vocab_size", "900", "--max_steps", "20", *FLAGS)
    one = train_losses(launch_training("from-base-1", *flags))
    two = train_losses(launch_training("from-base-2", *flags, processes=2))
    assert max(abs(a / b - 1) for a, b in zip(one, two, strict=True)) <= 1e-5


def test_a_killed_labelled_training_from_a_base_ends_as_an_untouched_one(
    tiny_flags: list[str], tiny_run: Path, reviews_file: Path, tmp_path: Path
) -> None:
    """Two processes, one of them killed between two checkpoints; then the base is gone. All is the same bit for bit."""
    base, labelled = shutil.copytree(tiny_run, tmp_path / "base"), tmp_path / "labelled.jsonl"
    texts = [json.loads(line)["text"] for line in reviews_file.read_text().splitlines()]
    rows = (json.dumps({"text": text, "label": "good" if "won" in text else "bad"}) for text in texts)
    labelled.write_text("\n".join(rows))
    flags = [
        *tiny_flags, "--data.files", str(labelled), "--data.label_column", "label", "--init_from", str(base),
        "--model.dropout", "0.1", "--ema_decay", "0.9", "--max_steps", "12", "--evaluate_every", "6", "--save_every",
        "3", "--log_every", "1", "--sample_tokens", "4",
    ]  # fmt: skip
    finish(flags, tmp_path / "whole", processes=2)
    killed = Job(flags, tmp_path / "parts", fault("signal 9", at="stepping", call=6, rank=1), processes=2)
    assert killed.end() != 0
    killed.kill()
    shutil.rmtree(base)
    finish(flags, tmp_path / "parts", processes=2)
    assert_as_if_nothing_had_happened(tmp_path / "parts", tmp_path / "whole")


def test_any_number_of_processes_goes_on_from_any_other(launch_training: Launch, tmp_path: Path) -> None:
    """All six changes between 1, 2 and 4, over 308 steps in fp32: losses within 1e-5, each window of a lane once."""
    whole = train_losses(launch_training("one", "--max_steps", "308", *FLAGS))
    for part, processes in enumerate((2, 1, 4, 2, 4, 1, 2), start=1):
        flags = ("--max_steps", str(44 * part), *FLAGS)
        micro_batches = "2" if processes == 1 else "1"
        rows = launch_training(
            "any", *flags, "--gradient_accumulation_steps", micro_batches, processes=processes, journal=tmp_path
        )
    difference = max(abs(a / b - 1) for a, b in zip(train_losses(rows), whole, strict=True))
    print(f"largest relative difference {difference:.1e}")
    assert difference <= 1e-5
    read: dict[int, list[tuple[int, int, int]]] = {}
    for file in tmp_path.iterdir():
        for line in file.read_text().splitlines():
            step, _, epoch, windows, lanes, *_ = json.loads(line)
            read.setdefault(step, []).extend((epoch, w, lane) for w, lane in zip(windows, lanes, strict=True))
    assert sorted(read) == list(range(308))
    for step, triples in read.items():
        assert sorted(triples) == [(0, step, lane) for lane in range(128)], f"step {step}"


def test_training_that_turns_to_nan_stops_all_processes(launch_training: Launch) -> None:
    """No launcher ends them: that they end at all shows that no process waits for another."""
    rows = launch_training("nan", "--max_steps", "6", "--learning_rate", "1e38", processes=2, expect=2)
    assert len(train_losses(rows)) < 6
