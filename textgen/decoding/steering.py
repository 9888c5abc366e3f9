"""What settings that name texts mean for a tokenizer: biases, and ends of repetitions."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Mapping

from textgen.config import SamplingConfig
from textgen.data.corpus import normalize
from textgen.tokenizer import Tokenizer


def normalize_settings(config: SamplingConfig, normalization: str) -> SamplingConfig:
    """Return settings whose texts are normalized as the model's training text was."""
    if normalization == "none":
        return config
    return dataclasses.replace(
        config,
        stop=tuple(normalize(stop, normalization) for stop in config.stop),
        dry_breakers=tuple(normalize(breaker, normalization) for breaker in config.dry_breakers),
        logit_bias=tuple((normalize(token, normalization), bias) for token, bias in config.logit_bias),
    )


def bias_of(config: SamplingConfig, tokenizer: Tokenizer) -> Mapping[int, float]:
    """Return what is added to the logits of which tokens; several biases of a token add up.

    Raises:
        ValueError: an id is not in the vocabulary, or the tokenizer has no token for a text.
    """
    return _biases(config.logit_bias, tokenizer)


@functools.lru_cache(maxsize=32)
def _biases(logit_bias: tuple[tuple[str, float], ...], tokenizer: Tokenizer) -> Mapping[int, float]:
    biases: dict[int, float] = defaultdict(float)
    for token, bias in logit_bias:
        for token_id in _tokens_of(token, tokenizer):
            biases[token_id] += bias
    return biases


def _tokens_of(token: str, tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that a key of `logit_bias` means: an id, or a text in or without quotation marks.

    A word has other tokens alone than in a text, where most tokens begin with the space before them. So a text stands
    for the token that it begins with, alone or after a space: for the one that holds more of the text, or for both.
    """
    if re.fullmatch("[0-9]+", token):
        number = token.lstrip("0") or "0"
        if len(number) > 9 or int(number) >= tokenizer.vocab_size:
            raise ValueError(f"`logit_bias` must be below the vocabulary's size {tokenizer.vocab_size}: {number[:12]}")
        return {int(number)}
    text = token[1:-1] if re.fullmatch('".+"', token, re.DOTALL) else token
    held: dict[int, int] = {}  # bytes of the text, by token
    for space in ("",) if text[:1].isspace() else ("", " "):
        for first in tokenizer.encode(space + text)[: 1 if text else 0]:
            held[first] = len(tokenizer.token_bytes(first)) - len(space)
    if not held or tokenizer.unk_id in held:
        raise ValueError(f"`logit_bias`: the tokenizer has no token for {text[:40]!r}")
    chosen = {first for first in held if held[first] == max(held.values())}
    if text.strip() and not all(tokenizer.token_bytes(first).strip() for first in chosen):
        raise ValueError(f"`logit_bias`: the first token of {text[:40]!r} is a space alone; leave the space out")
    return chosen


@functools.lru_cache(maxsize=32)
def breaks_of(breakers: tuple[str, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that hold one of the texts of `dry_breakers`."""
    texts = [breaker.encode() for breaker in breakers]
    pieces = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    return tuple(i for i, piece in enumerate(pieces) if any(text in piece for text in texts))
