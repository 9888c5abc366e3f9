"""Law 1: the losses do not depend on how many processes and micro-batches computed them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import write_real_reviews
from tests.distributed.losses import train_losses

Launch = Callable[..., list[dict[str, Any]]]
DROPOUT = ("--model.dropout", "0.1", "--model.weight_drop", "0.2")
LAYOUTS = [(1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1)]


def norms(rows: list[dict[str, Any]]) -> list[float]:
    return [row["train/gradient_norm"] for row in rows if "train/gradient_norm" in row]


@pytest.fixture(scope="session")
def alone(launch_training: Launch) -> list[dict[str, Any]]:
    return launch_training("1x1", "--max_steps", "50", *DROPOUT)


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("processes", "micro_batches"), LAYOUTS)
def test_any_layout_has_the_losses_of_one_process(
    launch_training: Launch, alone: list[dict[str, Any]], processes: int, micro_batches: int
) -> None:
    """50 steps in fp32, dropout on: its masks are functions of seed and step, and of lane or weight."""
    rows = launch_training(
        f"{processes}x{micro_batches}", "--max_steps", "50", *DROPOUT,
        "--gradient_accumulation_steps", str(micro_batches), processes=processes,
    )  # fmt: skip
    assert len(train_losses(rows)) == 50
    assert largest_difference(train_losses(rows), train_losses(alone)) <= 1e-5
    # Adam hides the scale of a gradient: averaged over processes instead of summed, it would give the same losses.
    assert largest_difference(norms(rows), norms(alone)) <= 1e-4
    assert rows[-1]["valid/loss"] == pytest.approx(alone[-1]["valid/loss"], rel=1e-5)


def test_another_seed_has_other_losses(launch_training: Launch, alone: list[dict[str, Any]]) -> None:
    """The band above is far below what a different order of data makes."""
    rows = launch_training("seed", "--max_steps", "5", *DROPOUT, "--seed", "43")
    assert largest_difference(train_losses(rows), train_losses(alone)[:5]) > 1e-4


LABELS = (*DROPOUT, "--data.label_column", "label", "--max_steps", "20", "--batch_size", "32")


@pytest.fixture(scope="session")
def labelled(launch_training: Launch) -> list[dict[str, Any]]:
    return launch_training("labels", *LABELS)


@pytest.mark.parametrize(("processes", "micro_batches"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_labels_are_the_same_inputs_in_any_layout(
    launch_training: Launch, labelled: list[dict[str, Any]], processes: int, micro_batches: int
) -> None:
    accumulated = ("--gradient_accumulation_steps", str(micro_batches))
    rows = launch_training(f"labels-{processes}", *LABELS, *accumulated, processes=processes)
    assert largest_difference(train_losses(rows), train_losses(labelled)) <= 1e-5
    assert largest_difference(norms(rows), norms(labelled)) <= 1e-4


@pytest.fixture(scope="session")
def mixed(share: Callable[..., Path]) -> list[str]:
    """Return flags for two sources with 22.4 and 9.6 lanes; the small one is read twice in the first 20 steps."""
    sources = [
        {
            "name": "reviews",
            "weight": 0.7,
            "files": [
                str(share("real-reviews", lambda place: write_real_reviews(place / "r.jsonl", 3000)) / "r.jsonl")
            ],
        },
        {"name": "others", "weight": 0.3, "files": [str(share("few-texts", write_few_texts) / "few.jsonl")]},
    ]
    one_source = ["--data.source", "imdb", "--data.files", "[]", "--data.validation_fraction", "0.1"]  # the defaults
    sizes = ["--max_steps", "20", "--batch_size", "32", "--evaluate_documents", "20"]
    return [*DROPOUT, *one_source, "--data.sources", json.dumps(sources), *sizes]


def write_few_texts(directory: Path) -> None:
    texts = (" ".join(f"number {i * k % 97} follows" for k in range(1, 40)) for i in range(1, 9))
    (directory / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="session")
def mixed_alone(launch_training: Launch, mixed: list[str]) -> list[dict[str, Any]]:
    rows = launch_training("mixed", *mixed)
    assert [row for row in rows if "passes/others" in row][-1]["passes/others"] > 1
    return rows


@pytest.mark.parametrize(("processes", "micro_batches"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_several_sources_have_the_same_losses_in_any_layout(
    launch_training: Launch,
    mixed: list[str],
    mixed_alone: list[dict[str, Any]],
    processes: int,
    micro_batches: int,
) -> None:
    """Stopped after 12 steps, and gone on with on one process."""
    name, accumulated = f"mixed-{processes}", ("--gradient_accumulation_steps", str(micro_batches))
    launch_training(name, *mixed, *accumulated, "--max_steps", "12", processes=processes)
    rows = launch_training(name, *mixed)
    assert len(train_losses(rows)) == 20
    assert largest_difference(train_losses(rows), train_losses(mixed_alone)) <= 1e-5
    assert largest_difference(norms(rows), norms(mixed_alone)) <= 1e-4
    for metric in ("valid/loss", "valid/loss/others"):
        assert rows[-1][metric] == pytest.approx(mixed_alone[-1][metric], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("hidden_size", ["32", "64"])  # compiled code takes multiples of 64
def test_bfloat16_on_two_processes_stays_within_its_band(launch_training: Launch, hidden_size: str) -> None:
    """Rounding differs with the shape of a micro-batch: the band is measured, see exactness.md."""
    flags = ("--max_steps", "50", "--mixed_precision", "bf16", "--model.hidden_size", hidden_size)
    alone = launch_training(f"bf16-1x1-{hidden_size}", *flags)
    rows = launch_training(f"bf16-2x2-{hidden_size}", *flags, "--gradient_accumulation_steps", "2", processes=2)
    assert largest_difference(train_losses(rows), train_losses(alone)) <= 5e-4


SHARDS = (*DROPOUT, "--data.shards", "5", "--max_steps", "20", "--batch_size", "32", "--evaluate_documents", "20")


@pytest.fixture(scope="session")
def in_shards(launch_training: Launch) -> list[dict[str, Any]]:
    return launch_training("shards", *SHARDS)


@pytest.mark.parametrize(("processes", "micro_batches"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_a_store_in_shards_has_the_same_losses_in_any_layout(
    launch_training: Launch, in_shards: list[dict[str, Any]], processes: int, micro_batches: int
) -> None:
    """Stopped after 12 steps, and gone on with on one process."""
    name, accumulated = f"shards-{processes}", ("--gradient_accumulation_steps", str(micro_batches))
    launch_training(name, *SHARDS, *accumulated, "--max_steps", "12", processes=processes)
    rows = launch_training(name, *SHARDS)
    assert len(train_losses(rows)) == 20
    assert largest_difference(train_losses(rows), train_losses(in_shards)) <= 1e-5
    assert largest_difference(norms(rows), norms(in_shards)) <= 1e-4
