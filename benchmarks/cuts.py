"""Texts that are cut at random, and ways to encode the halves: `python -m benchmarks.cuts runs/quick`.

Counts how often the tokens of the halves are not those of the whole text, for three ways to treat a cut:

- last piece: the first half without its last token, which may go on in the second half
- last space: the first half up to its last space, and the rest encoded alone
- settled: the first half up to the last place where tokens surely end, and the whole encoded again, as kept states do
"""

from __future__ import annotations

import argparse
import random
from itertools import islice
from typing import Any

from benchmarks.machine import save
from textgen.config import DataConfig
from textgen.data.corpus import open_corpus
from textgen.model.files import load_model
from textgen.tokenizer import Tokenizer


def is_changed(tokenizer: Tokenizer, text: str, cut: int) -> dict[str, bool]:
    """Return for each way whether the halves of a text give other tokens than the whole."""
    whole = tokenizer.encode(text)
    without_last = tokenizer.encode(text[:cut])[:-1]
    space, settled = max(text.rfind(" ", 0, cut), 0), tokenizer.settled(text[:cut])
    first = tokenizer.encode(text[:settled])
    return {
        "last piece": whole[: len(without_last)] != without_last,
        "last space": tokenizer.encode(text[:space]) + tokenizer.encode(text[space:]) != whole,
        "settled": whole[: len(first)] != first,
    }


def main() -> None:
    """Count, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    args = parser.parse_args()
    _, tokenizer = load_model(args.checkpoint)
    reviews = list(islice(open_corpus(DataConfig(source="package")).splits["train"](), 3000))
    draw, rows = random.Random(0), []
    for length, count in ((None, 1000), (20_000, 200), (200_000, 100), (1_000_000, 20)):
        wrong: dict[str, int] = {}
        for _ in range(count):
            text = draw.choice(reviews) if length is None else " ".join(draw.choices(reviews, k=length // 500))[:length]
            for way, changed in is_changed(tokenizer, text, draw.randrange(1, len(text))).items():
                wrong[way] = wrong.get(way, 0) + changed
        row: dict[str, Any] = {"characters": length or "one review", "texts": count, "wrong": wrong}
        rows.append(row)
        print(row, flush=True)
    save("cuts", {"vocab_size": tokenizer.vocab_size, "rows": rows})


if __name__ == "__main__":
    main()
