"""An embedding from neighbours: tokens that are used alike are near each other before any training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from textgen.model.neighbours import LENGTH, embed_by_neighbours

KINDS, OF_A_KIND = 5, 8
VOCAB = KINDS * OF_A_KIND + 2  # the last two never occur


def text(seed: int = 0, count: int = 40_000) -> NDArray[np.int32]:
    """Return a text in which kinds of tokens follow each other in turn; which token of its kind is drawn."""
    draw = np.random.default_rng(seed)
    return (np.arange(count) % KINDS * OF_A_KIND + draw.integers(0, OF_A_KIND, count)).astype(np.int32)


def embed(tokens: NDArray[np.int32], *, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return embed_by_neighbours(tokens, vocab_size=VOCAB, embedding_dim=size, generator=generator)


@pytest.mark.parametrize("size", [3, 16, 100])  # fewer than kinds, and more than tokens
def test_tokens_of_a_kind_are_nearest_to_each_other(size: int) -> None:
    rows, _ = embed(text(), size=size)
    near = rows[:-2] @ rows[:-2].T
    near.fill_diagonal_(-torch.inf)
    kind = torch.arange(VOCAB - 2) // OF_A_KIND
    assert torch.equal(kind[near.argmax(1)], kind)


def test_rows_have_one_length_and_no_unit_has_most_of_it() -> None:
    rows, known = embed(text())
    assert known.tolist() == [True] * (VOCAB - 2) + [False] * 2
    assert rows[known].norm(dim=1).tolist() == pytest.approx([LENGTH] * (VOCAB - 2))
    assert not rows[~known].any()
    share = (rows / LENGTH).square().mean(0)
    assert float(share.max()) < 0.5  # of a decomposition that is not turned, the first unit has nearly all


def test_rows_follow_from_text_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    first, _ = embed(text())
    torch.manual_seed(2)
    drawn = torch.rand(3)
    torch.manual_seed(2)
    again, _ = embed(text())
    assert torch.equal(first, again)
    assert torch.equal(torch.rand(3), drawn)  # torch's own generator is left as it was
    assert not torch.allclose(first, embed(text(), seed=1)[0])


@pytest.mark.parametrize("tokens", [[3, 4], [3, 3, 3, 3], [3, 4, 5, 3, 4]])
def test_a_text_of_a_few_tokens_has_finite_rows(tokens: list[int]) -> None:
    rows, known = embed(np.array(tokens, dtype=np.int32))
    assert rows.isfinite().all()
    assert rows[known].norm(dim=1).tolist() == pytest.approx([LENGTH] * int(known.sum()))


def test_a_large_vocabulary_counts_fewer_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of counts stays within its bound, and the kinds are still found by their most frequent tokens."""
    monkeypatch.setattr("textgen.model.neighbours.MAX_COUNTS", VOCAB * 12)
    tokens = text()
    tokens[tokens % OF_A_KIND > 1] -= np.random.default_rng(1).integers(0, 2, (tokens % OF_A_KIND > 1).sum())
    rows, known = embed(tokens)
    near = rows[known] @ rows[known].T
    near.fill_diagonal_(-torch.inf)
    kind = torch.arange(VOCAB)[known] // OF_A_KIND
    assert (kind[near.argmax(1)] == kind).float().mean() > 0.9
