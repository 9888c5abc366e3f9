"""What a model's bits per byte are compared with: `python -m benchmarks.references STORE` (of `textgen prepare`).

Compressors see the validation documents as one file. The n-gram models are trained on the tokens of the training split.
They score the validation documents as textgen does: all tokens, the ends of documents included. They are interpolated
models with modified Kneser-Ney discounts (Chen and Goodman 1999, sections 3 and 4.1).
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import save
from textgen.data.split import Split
from textgen.data.store import TokenStore
from textgen.data.texts import read_split

BITS = 12  # of a token in a key; five tokens fit into 60 bits

Ids = NDArray[np.int64]


def history_keys(split: Split, order: int, end: int) -> Ids:
    """Return a key for every token of a split: the token in the lowest bits, the `order` - 1 tokens before it above.

    Before a document there are end-of-text tokens.
    """
    keys = []
    for i in range(split.num_documents):
        ids = np.concatenate([np.full(order - 1, end), split.document(i).astype(np.int64)])
        windows = np.lib.stride_tricks.sliding_window_view(ids, order)
        keys.append(windows @ (1 << BITS * np.arange(order)[::-1]))
    return np.concatenate(keys)


class KneserNey:
    """Probabilities of one order of n-grams, interpolated with the order below."""

    def __init__(self, grams: Ids, counts: Ids) -> None:
        """Compute the discounts and the sums of each context.

        Args:
            grams: the different n-grams, sorted.
            counts: how often each occurs, or in the lower orders: after how many different tokens.
        """
        self.grams, self.counts = grams, counts
        self.discounts = _discounts(counts)
        self.contexts, first = np.unique(grams >> BITS, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.left = np.add.reduceat(self.discounts[np.minimum(counts, 3)], first)  # what the discounts take

    def interpolate(self, keys: Ids, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the probability of each key's token after its history, given that of the order below."""
        at, known = find(self.contexts, keys >> BITS)
        gram, seen = find(self.grams, keys)
        counts = np.where(seen, self.counts[gram], 0)
        own = counts - self.discounts[np.minimum(counts, 3)]
        return np.where(known, (own + self.left[at] * lower) / self.totals[at], lower)


def _discounts(counts: Ids) -> NDArray[np.float64]:
    """Return what is subtracted from a count of 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        found = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (found[1:] > 0).all() and (found <= np.arange(4)).all():
            return found
    return np.array([0, 0.5, 1, 1.5])  # too few rare ones to estimate by, as of single tokens


def find(sorted_keys: Ids, keys: Ids) -> tuple[Ids, NDArray[np.bool_]]:
    """Return the index of each key in `sorted_keys`, and whether it is there."""
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return at, sorted_keys[at] == keys


def ngram_bits(store: TokenStore, order: int) -> float:
    """Return the bits per byte of the validation split by an n-gram model of the training split."""
    end, vocab_size = store.tokenizer.eos_id, store.tokenizer.vocab_size
    train, valid = (history_keys(store.split(name), order, end) for name in ("train", "validation"))
    grams, counts = np.unique(train, return_counts=True)
    models = [KneserNey(grams, counts)]
    for n in range(order - 1, 0, -1):  # count the different tokens before each shorter n-gram
        grams, counts = np.unique(grams & ((1 << BITS * n) - 1), return_counts=True)
        models.append(KneserNey(grams, counts))
    probabilities = np.full(len(valid), 1 / vocab_size)
    for n, model in enumerate(reversed(models), 1):
        probabilities = model.interpolate(valid & ((1 << BITS * n) - 1), probabilities)
    return float(-np.log2(probabilities).sum() / num_bytes(list(read_split(store, "validation"))))


def num_bytes(texts: list[str]) -> int:
    """Return the number of UTF-8 bytes of texts."""
    return sum(len(text.encode()) for text in texts)


def compressor_bits(texts: list[str]) -> dict[str, float]:
    """Return the bits per byte of general compressors on texts that are joined by line ends."""
    joined, size = "\n".join(texts).encode(), num_bytes(texts)
    packed = {
        "gzip -9": len(gzip.compress(joined, 9)),
        "xz -9e": len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)),
        "bzip2 -9": len(bz2.compress(joined, 9)),
        "gzip -9, each document alone": sum(len(gzip.compress(text.encode(), 9)) for text in texts),
    }
    return {name: 8 * length / size for name, length in packed.items()}


def main(argv: list[str]) -> None:
    """Measure, print and keep the figures."""
    store = TokenStore.open(Path(argv[0]))
    if store.tokenizer.vocab_size > 1 << BITS:
        raise SystemExit(f"the vocabulary must have at most {1 << BITS} pieces: {store.tokenizer.vocab_size}")
    figures: dict[str, Any] = compressor_bits(list(read_split(store, "validation")))
    for order in range(1, 6):
        figures[f"{order}-gram"] = ngram_bits(store, order)
    for name, bits in figures.items():
        print(f"{name:30} {bits:.4f}")
    save("references", figures)


if __name__ == "__main__":
    main(sys.argv[1:])
