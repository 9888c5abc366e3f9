"""The n-gram models that the README compares a model with are probability models, and count the right histories."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.references import BITS, KneserNey, history_keys
from textgen.data.split import Split


def split_of(*documents: list[int]) -> Split:
    offsets = np.cumsum([0, *map(len, documents)])
    return Split(np.concatenate(documents).astype(np.uint16), offsets, np.ones(len(documents), np.uint32))


def test_a_key_holds_a_token_and_its_history_within_the_document() -> None:
    keys = history_keys(split_of([5, 6, 0], [7, 0]), order=3, end=0)
    unpacked = [[int(key >> BITS * n) & ((1 << BITS) - 1) for n in (2, 1, 0)] for key in keys]
    assert unpacked == [[0, 0, 5], [0, 5, 6], [5, 6, 0], [0, 0, 7], [0, 7, 0]]


@pytest.mark.parametrize("vocab_size", [5, 40])
def test_probabilities_of_all_tokens_add_up_to_one_after_any_history(vocab_size: int) -> None:
    random = np.random.default_rng(0)
    documents = [[*random.zipf(1.5, 60).clip(max=vocab_size - 1).tolist(), 0] for _ in range(20)]
    grams, counts = np.unique(history_keys(split_of(*documents), 3, 0), return_counts=True)
    models = [KneserNey(grams, counts)]
    for n in (2, 1):
        grams, counts = np.unique(grams & ((1 << BITS * n) - 1), return_counts=True)
        models.append(KneserNey(grams, counts))
    for first in range(vocab_size):  # seen histories, and some that never occur
        for second in range(vocab_size):
            keys = (first << 2 * BITS) + (second << BITS) + np.arange(vocab_size)
            probabilities = np.full(vocab_size, 1 / vocab_size)
            for n, model in enumerate(reversed(models), 1):
                probabilities = model.interpolate(keys & ((1 << BITS * n) - 1), probabilities)
            assert probabilities.sum() == pytest.approx(1)
            assert (probabilities > 0).all()
