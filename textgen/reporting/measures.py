"""Measures of generated texts that need no model: variety, repetition, and n-grams copied from the training text.

A text is a sequence of words, as `words` returns it. Most measures depend on the number and the length of the texts, so
only sets with the same number of texts of one length are comparable: cut the texts first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Words = Sequence[str]
"""of a text, as `words` returns them"""
HashArray = NDArray[np.uint64]

WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")

COPIED_SIZES = (4, 12)

# The base of the polynomials. It is odd, so that every word of an n-gram counts in all 64 bits.
MULTIPLIER = 0x9E3779B97F4A7C15


def words(text: str) -> list[str]:
    """Return the lower-cased words of a text. Each punctuation mark is a word; `<br />` is a space."""
    return WORD.findall(text.lower().replace("<br />", " "))


def diversity(texts: Sequence[Words]) -> dict[str, float]:
    """Return all measures that need only the texts, which have one length."""
    return {
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3, 4)},
        "repetition_4": repetition(texts, 4),
        "self_bleu_4": self_bleu(texts, 4),
        "zipf_slope": zipf_slope(texts),
    }


def distinct(texts: Sequence[Words], n: int) -> float:
    """Return the number of different n-grams of all texts over the number of n-grams (distinct-n: Li et al., 2016).

    Source: "A Diversity-Promoting Objective Function for Neural Conversation Models". The measure falls as texts grow.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def repetition(texts: Sequence[Words], n: int) -> float:
    """Return the share of a text's n-grams that occurred in it before, averaged over texts (seq-rep-n).

    Source: Welleck et al., 2020, "Neural Text Generation with Unlikelihood Training".
    """
    shares = [1 - len(set(ngrams)) / len(ngrams) for text in texts if (ngrams := list(_ngrams(text, n)))]
    return sum(shares) / len(shares) if shares else math.nan


def self_bleu(texts: Sequence[Words], n: int) -> float:
    """Return the mean BLEU-n of each text against all others: near 1 if texts are alike; it rises with their number.

    This is the BLEU of a sentence (Papineni et al., 2002): the geometric mean of the clipped precisions of 1- to
    n-grams, times the brevity penalty against the nearest length; of two equally near, the shorter. A precision of 0
    counts as one of 0.1 n-grams (Chen and Cherry, 2014, method 1), as in Texygen (Zhu et al., 2018), which introduced
    self-BLEU.
    """
    if len(texts) < 2 or min(map(len, texts)) < n:
        return math.nan
    logs = np.zeros(len(texts))
    for size in range(1, n + 1):
        counts = [Counter(_ngrams(text, size)) for text in texts]
        matches = np.array(_matches_in_others(counts), dtype=np.float64)
        logs += np.log(np.where(matches, matches, 0.1) / [sum(count.values()) for count in counts]) / n
    lengths = Counter(map(len, texts))
    for index, text in enumerate(texts):
        others = (length for length, count in lengths.items() if count > (length == len(text)))
        nearest = min(others, key=lambda length: (abs(length - len(text)), length))
        logs[index] += min(1 - nearest / len(text), 0)
    return float(np.exp(logs).mean())


def _matches_in_others(counts: Sequence[Counter[Words]]) -> list[int]:
    """Return the matches of each text: the count of each n-gram, clipped to the largest count in another text."""
    # By n-gram: the largest count in a text, the index of that text, the second largest count.
    most: dict[Words, tuple[int, int, int]] = {}
    for index, count in enumerate(counts):
        for ngram, number in count.items():
            first, owner, second = most.get(ngram, (0, -1, 0))
            most[ngram] = (number, index, first) if number > first else (first, owner, max(second, number))
    matches = []
    for index, count in enumerate(counts):
        clipped = 0
        for ngram, number in count.items():
            first, owner, second = most[ngram]
            clipped += min(number, second if owner == index else first)
        matches.append(clipped)
    return matches


def zipf_slope(texts: Sequence[Words], most: int = 5000) -> float:
    """Return minus the slope of log frequency over log rank, which is near 1 in natural language.

    Least squares over the `most` most frequent words. Source: Zipf, 1949; for generated text Holtzman et al., 2020,
    "The Curious Case of Neural Text Degeneration". A larger value means that frequent words are overused.
    """
    frequencies = sorted(Counter(word for text in texts for word in text).values(), reverse=True)[:most]
    if len(frequencies) < 2:
        return math.nan
    ranks = np.log(np.arange(1, len(frequencies) + 1))
    return -float(np.polyfit(ranks, np.log(frequencies), 1)[0])


def copied_shares(
    sets: Sequence[Sequence[Words]], training: Iterable[Words], sizes: Sequence[int] = COPIED_SIZES
) -> list[dict[str, float]]:
    """Return for each set of texts the share of its n-grams that the training text has: `copied_4`, `copied_12`.

    Short n-grams belong to the language, long ones to the training text: McCoy et al., 2023, "How much do language
    models copy from their training data?". Memory holds a hash of 8 bytes for each n-gram of the sets. The training
    text is read once and may have any size. Two n-grams have the same hash with a probability of 2^-64.

    Args:
        sets: sets of texts.
        training: words of the training documents.
        sizes: of the n-grams.
    """
    # The hashes of each set, and without doubles those of all sets, marked as found while the training text is read.
    none = np.zeros(0, dtype=np.uint64)  # for a set without texts
    wanted = {n: [np.concatenate([none, *(_hashes(_ids(text), n) for text in texts)]) for texts in sets] for n in sizes}
    known = {n: np.unique(np.concatenate(hashes)) for n, hashes in wanted.items()}
    found = {n: np.zeros(len(hashes), dtype=np.bool_) for n, hashes in known.items()}
    for document in training:
        ids = _ids(document)
        for n in sizes:
            if len(known[n]):
                hashes = _hashes(ids, n)
                places = np.searchsorted(known[n], hashes).clip(max=len(known[n]) - 1)
                found[n][places[known[n][places] == hashes]] = True
    return [
        {f"copied_{n}": _share(found[n][np.searchsorted(known[n], wanted[n][index])]) for n in sizes}
        for index in range(len(sets))
    ]


def _share(found: NDArray[np.bool_]) -> float:
    return float(found.mean()) if len(found) else math.nan


def _ngrams(text: Words, n: int) -> Iterator[Words]:
    """Yield the n-grams of a text."""
    return zip(*(text[start:] for start in range(n)), strict=False)


def _ids(text: Words) -> HashArray:
    """Return the hash of each word."""
    return np.fromiter(map(_word_hash, text), dtype=np.uint64, count=len(text))


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big")


def _hashes(ids: HashArray, n: int) -> HashArray:
    """Return the hashes (num_ngrams,) of a text's n-grams from the hashes of its words: polynomials modulo 2^64."""
    count = max(len(ids) - n + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(n if count else 0):
        hashes = hashes * np.uint64(MULTIPLIER) + ids[offset : offset + count]
    return hashes
