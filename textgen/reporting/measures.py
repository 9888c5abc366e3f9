"""Measures of texts that need no model to judge them: variety, repetition, what is copied from the training text.

A text is a list of words here, as `words` returns it. Most measures depend on how many texts there are and how long
they are, so only sets of as many texts of the same length are comparable: cut them first.
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

Text = Sequence[str]
Hashes = NDArray[np.uint64]

WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")

COPIED_SIZES = (4, 12)

# Odd, so that the place of every word of an n-gram counts in all 64 bits.
MULTIPLIER = 0x9E3779B97F4A7C15


def words(text: str) -> list[str]:
    """Return the lower-cased words of a text, each mark of punctuation one of its own; `<br />` is a space."""
    return WORD.findall(text.lower().replace("<br />", " "))


def diversity(texts: Sequence[Text]) -> dict[str, float]:
    """Return all measures of texts of one length that need nothing else."""
    return {
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3, 4)},
        "repetition_4": repetition(texts, 4),
        "self_bleu_4": self_bleu(texts, 4),
        "zipf_slope": zipf_slope(texts),
    }


def distinct(texts: Sequence[Text], n: int) -> float:
    """Return how many different n-grams all texts have, over how many they have (distinct-n: Li et al., 2016).

    Source: "A Diversity-Promoting Objective Function for Neural Conversation Models". Falls as texts grow.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def repetition(texts: Sequence[Text], n: int) -> float:
    """Return the share of a text's n-grams that stood in it before, averaged over texts (seq-rep-n).

    Source: Welleck et al., 2020, "Neural Text Generation with Unlikelihood Training".
    """
    shares = [1 - len(set(ngrams)) / len(ngrams) for text in texts if (ngrams := list(_ngrams(text, n)))]
    return sum(shares) / len(shares) if shares else math.nan


def self_bleu(texts: Sequence[Text], n: int) -> float:
    """Return the mean BLEU-n of each text against all others: near 1 where they say the same; rises with their number.

    BLEU is that of a sentence (Papineni et al., 2002): the geometric mean of the clipped precisions of 1- to n-grams,
    times the brevity penalty against the nearest length, the shorter of two. A precision of 0 counts as one of 0.1
    n-grams (Chen and Cherry, 2014, method 1), as in Texygen (Zhu et al., 2018), which brought the measure up.
    """
    if len(texts) < 2 or min(map(len, texts)) < n:
        return math.nan
    logs = np.zeros(len(texts))
    for size in range(1, n + 1):
        counts = [Counter(_ngrams(text, size)) for text in texts]
        matches = np.array(_matches_in_others(counts), dtype=np.float64)
        logs += np.log(np.where(matches, matches, 0.1) / [sum(count.values()) for count in counts]) / n
    lengths = Counter(map(len, texts))
    for place, text in enumerate(texts):
        others = (length for length, count in lengths.items() if count > (length == len(text)))
        nearest = min(others, key=lambda length: (abs(length - len(text)), length))
        logs[place] += min(1 - nearest / len(text), 0)
    return float(np.exp(logs).mean())


def _matches_in_others(counts: Sequence[Counter[Text]]) -> list[int]:
    """Return how many n-grams of each text some other one has, each at most as often as one other has it."""
    most: dict[Text, tuple[int, int, int]] = {}  # of an n-gram: the largest count, in which text, the second largest
    for place, count in enumerate(counts):
        for ngram, number in count.items():
            first, where, second = most.get(ngram, (0, -1, 0))
            most[ngram] = (number, place, first) if number > first else (first, where, max(second, number))
    return [
        sum(min(number, second if where == place else first) for ngram, number in count.items()
            for first, where, second in (most[ngram],))
        for place, count in enumerate(counts)
    ]  # fmt: skip


def zipf_slope(texts: Sequence[Text], most: int = 5000) -> float:
    """Return how steeply words get rarer: minus the slope of log frequency over log rank, near 1 in natural language.

    Least squares over the 5,000 most frequent words. Source: Zipf, 1949; for generated text Holtzman et al., 2020, "The
    Curious Case of Neural Text Degeneration". Larger: frequent words are overused.
    """
    frequencies = sorted(Counter(word for text in texts for word in text).values(), reverse=True)[:most]
    if len(frequencies) < 2:
        return math.nan
    ranks = np.log(np.arange(1, len(frequencies) + 1))
    return -float(np.polyfit(ranks, np.log(frequencies), 1)[0])


def copied_shares(
    sets: Sequence[Sequence[Text]], training: Iterable[Text], sizes: Sequence[int] = COPIED_SIZES
) -> list[dict[str, float]]:
    """Return for each set of texts the share of its n-grams that stand in the training text: `copied_4`, `copied_12`.

    Short runs are language, long ones memory: McCoy et al., 2023, "How much do language models copy from their training
    data?". What is kept is a hash of 8 bytes for each n-gram of the sets; the training text is read once and may be of
    any size. Two n-grams in 2^64 share a hash.

    Args:
        sets: of texts.
        training: the words of its documents.
        sizes: of n-grams.
    """
    none = np.zeros(0, dtype=np.uint64)  # of a set without texts
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
        {f"copied_{n}": _share(found[n][np.searchsorted(known[n], wanted[n][place])]) for n in sizes}
        for place in range(len(sets))
    ]


def _share(found: NDArray[np.bool_]) -> float:
    return float(found.mean()) if len(found) else math.nan


def _ngrams(text: Text, n: int) -> Iterator[Text]:
    return zip(*(text[start:] for start in range(n)), strict=False)


def _ids(text: Text) -> Hashes:
    return np.fromiter(map(_word_hash, text), dtype=np.uint64, count=len(text))


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big")


def _hashes(ids: Hashes, n: int) -> Hashes:
    """Return the hashes (count,) of the n-grams of a text by its words' hashes: polynomials modulo 2^64."""
    count = max(len(ids) - n + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(n if count else 0):
        hashes = hashes * np.uint64(MULTIPLIER) + ids[place : place + count]
    return hashes
