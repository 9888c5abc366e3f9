"""A training without a base: its embedding starts from the neighbours of each token in its own text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from tests.training.test_resume import flags_for
from textgen.cli import train_main
from textgen.data.split import Split
from textgen.data.store import TokenStore
from textgen.model.neighbours import embed_by_neighbours
from textgen.runs.checkpoint import checkpoints
from textgen.training.setup import Training
from textgen.training.start import start_from_neighbours

pytestmark = pytest.mark.usefixtures("any_precision")


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[TokenStore]:
    """The stores that trainings of this test open."""
    opened: list[TokenStore] = []

    def keep(*args: object, **options: object) -> TokenStore:
        opened.append(prepare(*args, **options))  # type: ignore[arg-type]
        return opened[-1]

    from textgen.training import loop

    prepare = loop.prepare_store
    monkeypatch.setattr(loop, "prepare_store", keep)
    return opened


def start_of(flags: list[str], run_dir: Path, *more: str) -> dict[str, Tensor]:
    """Return the weights that a training starts from: those after a step that is too small to change them."""
    train_main(flags_for(flags, run_dir, "--max_steps", "1", "--learning_rate", "1e-30", *more))
    return load_file(checkpoints(run_dir)[0][1] / "model.safetensors")


def rows_of(tokens: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
    return embed_by_neighbours(tokens, vocab_size=340, embedding_dim=16, generator=torch.Generator().manual_seed(42))


def whole(store: TokenStore) -> NDArray[np.int32]:
    return store.split("train").tokens.astype(np.int32)


def test_an_embedding_starts_from_the_text(tiny_flags: list[str], stores: list[TokenStore], tmp_path: Path) -> None:
    weights = start_of(tiny_flags, tmp_path / "run", "--ema_decay", "0.9")
    rows, known = rows_of(whole(stores[0]))
    assert 60 < known.sum() < 340  # of 256 bytes most never occur
    averaged = load_file(checkpoints(tmp_path / "run")[0][1] / "weights.safetensors")
    for weight in (weights["embedding.weight"], averaged["embedding.weight"]):
        assert torch.allclose(weight[known], rows[known], atol=1e-6)
        assert weight[~known].norm(dim=1).min() > 0.3  # random, as all rows were


def test_labels_keep_the_row_of_the_end_of_text(
    labelled_flags: list[str], stores: list[TokenStore], tmp_path: Path
) -> None:
    """It opens the cells that keep the label of a text."""
    weight = start_of(labelled_flags, tmp_path / "run")["embedding.weight"]
    rows, known = rows_of(whole(stores[0]))
    end = stores[0].tokenizer.eos_id
    assert 7 < weight[end].norm() < 10
    known[end] = False
    assert torch.allclose(weight[known], rows[known], atol=1e-6)


def test_a_text_in_shards_is_counted_in_the_shard_that_is_read_first(
    tiny_flags: list[str], stores: list[TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from textgen.data.shards import Shards

    opened: list[int] = []
    split = Shards.split

    def note(self: Shards, index: int) -> Split:
        opened.append(index)
        return split(self, index)

    monkeypatch.setattr(Shards, "split", note)
    weight = start_of(tiny_flags, tmp_path / "run", "--data.shards", "5")["embedding.weight"]
    assert opened[0] == opened[1]  # the first one is for the start, the second for the first step
    shards = stores[0].shards
    assert shards is not None
    rows, known = rows_of(split(shards, opened[0]).tokens.astype(np.int32))
    assert torch.allclose(weight[known], rows[known], atol=1e-6)


def test_sources_are_counted_by_their_shares(
    tiny_flags: list[str], labelled_reviews: Path, stores: list[TokenStore], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("textgen.training.start.NUM_TOKENS", 1280)
    files = {"reviews": tiny_flags[3], "others": str(labelled_reviews)}
    weights = {"reviews": 0.7, "others": 0.3}
    sources = [{"name": name, "weight": weights[name], "files": [file]} for name, file in files.items()]
    weight = start_of(tiny_flags[4:], tmp_path / "run", "--data.sources", json.dumps(sources))["embedding.weight"]
    parts = stores[0].split_by_source("train")
    tokens = [parts["reviews"].sample(896), parts["others"].sample(384)]
    assert [len(its) for its in tokens] == [896, 384]
    rows, known = rows_of(np.concatenate(tokens))
    assert torch.allclose(weight[known], rows[known], atol=1e-6)


def test_the_start_is_computed_in_one_thread(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its bits do not depend on the number of processes, which decides the threads of each."""
    seen: list[int] = []

    def embed(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append(torch.get_num_threads())
        return embed_by_neighbours(*args, **options)

    def start(training: Training) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        start_from_neighbours(training)
        seen.append(torch.get_num_threads())
        torch.set_num_threads(threads)

    monkeypatch.setattr("textgen.training.start.embed_by_neighbours", embed)
    monkeypatch.setattr("textgen.training.loop.start_from_neighbours", start)
    start_of(tiny_flags, tmp_path / "run")
    assert seen == [1, 2]
