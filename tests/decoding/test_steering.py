"""Settings that steer a text: biases of tokens by id and by text."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding.generation import sample_all
from textgen.decoding.steering import bias_of, breaks_of, normalize_settings
from textgen.model.lstm import LSTMLanguageModel
from textgen.settings import build_settings
from textgen.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["a good film, and good music", "the good old plot was bad", "not bad, not good: 17 of 100"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXTS, vocab_size=320, model_type="bpe"))


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> LSTMLanguageModel:
    """Return a model that knows nothing."""
    torch.manual_seed(3)
    return LSTMLanguageModel(ModelConfig(embedding_dim=16, hidden_size=24), tokenizer.vocab_size).eval()


# --- logit_bias ------------------------------------------------------------------------------------------------------


def test_a_biased_text_stands_for_the_token_that_holds_most_of_its_beginning(tokenizer: Tokenizer) -> None:
    def tokens(key: str) -> dict[bytes, float]:
        biases = bias_of(SamplingConfig(logit_bias=((key, 2.0),)), tokenizer)
        return {tokenizer.token_bytes(token): bias for token, bias in biases.items()}

    assert tokens(" good") == {b" good": 2.0}
    assert tokens("good") == {b" good": 2.0}, "a word"
    assert tokens("goody") == {b" good": 2.0}, "the beginning of a word"
    assert tokens("o") == {b"o": 2.0, b" o": 2.0}, "both hold the whole text"
    assert tokens("17") == {tokenizer.token_bytes(17): 2.0}, "digits are an id"
    assert tokens('"17"') == {b" 17": 2.0}, "digits in quotation marks are a text"
    assert tokens("\N{SNOWMAN}") == {"\N{SNOWMAN}".encode()[:1]: 2.0}, "a character that only bytes spell"
    several = SamplingConfig(logit_bias=(("17", 2.0), ("17", -3.5)))
    assert bias_of(several, tokenizer) == {17: -1.5}


def test_biases_are_looked_up_once_for_all_samples(tokenizer: Tokenizer) -> None:
    bias = ((" good music", 3.0),)
    assert bias_of(SamplingConfig(logit_bias=bias, seed=1), tokenizer) is bias_of(
        SamplingConfig(logit_bias=bias, seed=2), tokenizer
    )


def test_biases_of_100_decide_every_token(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    wanted = SamplingConfig(max_new_tokens=5, logit_bias=((" good", 100.0),))
    assert [sample.text for sample in sample_all(model, tokenizer, ["a", "the"], wanted)] == [" good" * 5] * 2
    plain = sample_all(model, tokenizer, ["a"], SamplingConfig(max_new_tokens=30))[0].text
    letter = next(filter(str.isascii, plain))
    banned = tuple((str(i), -100.0) for i in range(tokenizer.vocab_size) if letter.encode() in tokenizer.token_bytes(i))
    assert (
        letter not in sample_all(model, tokenizer, ["a"], SamplingConfig(max_new_tokens=30, logit_bias=banned))[0].text
    )


def test_wrong_biases_are_refused_by_name(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^`logit_bias` must be below the vocabulary's size 320: 320$"):
        bias_of(SamplingConfig(logit_bias=(("320", 1.0),)), tokenizer)
    for zeros in ("0" * 11, "0" * 240):  # `int` of the first digits alone would be small
        with pytest.raises(ValueError, match=r"^`logit_bias` must be below the vocabulary's size 320: 9999999$"):
            bias_of(SamplingConfig(logit_bias=((zeros + "9999999", 1.0),)), tokenizer)
        assert bias_of(SamplingConfig(logit_bias=((zeros + "17", 1.0),)), tokenizer) == {17: 1.0}
    assert bias_of(SamplingConfig(logit_bias=(("000", 1.0),)), tokenizer) == {0: 1.0}
    with pytest.raises(ValueError, match=r"^`logit_bias` must be of texts of at most 256 characters: 257$"):
        SamplingConfig(logit_bias=(("a" * 257, 1.0),))
    with pytest.raises(ValueError, match=r"^`logit_bias`: the tokenizer has no token for ''$"):
        bias_of(SamplingConfig(logit_bias=(("", 1.0),)), tokenizer)
    with pytest.raises(ValueError, match=r"^`logit_bias` must be at least -100 and at most 100: nan for ' good'$"):
        SamplingConfig(logit_bias=((" good", float("nan")),))
    for wrong in ([1], {"a": "2"}, [["a", 1, 2]], "a=1"):
        with pytest.raises(ValueError, match=r"^`logit_bias` must be an object of numbers such as"):
            build_settings(SamplingConfig, {"logit_bias": wrong})
    for given in ({"17": 1}, {17: 1}, [["17", 1]], (("17", 1),)):
        assert build_settings(SamplingConfig, {"logit_bias": given}).logit_bias == (("17", 1),)


def test_texts_of_settings_are_normalized_as_the_training_text() -> None:
    config = SamplingConfig(stop=("END",), logit_bias=(("Good", 1.0),))
    lower = normalize_settings(config, "lowercase")
    assert (lower.stop, lower.logit_bias) == (("end",), (("good", 1.0),))
    assert normalize_settings(config, "none") == config


# --- samplers --------------------------------------------------------------------------------------------------------


def test_settings_of_a_sampler_that_is_off_are_refused() -> None:
    for part, value in {"xtc_threshold": 0.2, "dry_base": 2.0, "dry_allowed_length": 3, "dry_breakers": ("a",)}.items():
        needed = "xtc_probability" if part.startswith("xtc") else "dry_multiplier"
        with pytest.raises(ValueError, match=f"^`{part}` needs `{needed}`$"):
            SamplingConfig(**{part: value})  # type: ignore[arg-type]
        SamplingConfig(**{part: value, needed: 0.5})  # type: ignore[arg-type]


def test_dry_counts_no_repetition_across_its_breakers(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    assert {tokenizer.token_bytes(token) for token in breaks_of((":", "."), tokenizer)} >= {b":"}
    greedy = SamplingConfig(temperature=0, max_new_tokens=60)
    (loop,) = sample_all(model, tokenizer, ["a"], greedy)
    strong = dataclasses.replace(greedy, dry_multiplier=5.0, dry_breakers=())
    (varied,) = sample_all(model, tokenizer, ["a"], strong)
    (broken,) = sample_all(model, tokenizer, ["a"], dataclasses.replace(strong, dry_breakers=(loop.text[-1:],)))
    assert longest_repetition(tokenizer.encode(varied.text)) < longest_repetition(tokenizer.encode(loop.text))
    assert longest_repetition(tokenizer.encode(broken.text)) > longest_repetition(tokenizer.encode(varied.text))


def longest_repetition(ids: list[int]) -> int:
    """Return the length of the longest sequence of tokens that comes twice."""
    return max(
        n for n in range(len(ids)) if len({tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}) <= len(ids) - n
    )
