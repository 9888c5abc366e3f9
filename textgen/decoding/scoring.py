"""Log-probabilities of a given text, token by token; long texts a window at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from textgen.decoding.decoders import PREFILL_WINDOW, Decoder, model_state
from textgen.decoding.reading import ReadState
from textgen.model.lstm import State


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """The log-probability of every token of a text, by the model alone: no temperature, no filters."""

    text: str
    """normalized as the training text was"""
    tokens: tuple[str, ...]
    """the text of each token; bytes that are no whole character as `\\xff`. The end-of-text token, if it is scored, is
    the last one and empty"""
    ids: tuple[int, ...] = field(repr=False)
    """of the tokens"""
    logprobs: tuple[float, ...] = field(repr=False)
    """natural logarithm of each token's probability after all tokens before it, at most 0"""
    num_bytes: int
    """of the text in UTF-8, at least 1"""

    @property
    def nats(self) -> float:
        """Cross-entropy of the whole text: minus the sum of the log-probabilities."""
        return -math.fsum(self.logprobs)

    @property
    def bits_per_byte(self) -> float:
        """Code length in bits over UTF-8 bytes: comparable between tokenizers, lower is better."""
        return self.nats / math.log(2) / self.num_bytes


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a text that a model has read."""

    state: State
    """of the model, after the window"""
    logprobs: Tensor
    """(scored,) float64 on the CPU, of the tokens that are scored"""
    top_logprobs: Tensor
    """(scored, `num_top`), the largest log-probabilities at each of these places, in falling order"""
    top_ids: Tensor
    """(scored, `num_top`), their tokens"""


@torch.inference_mode()
def read_windows(
    decoder: Decoder, ids: Sequence[int], *, given: int, num_top: int = 0, read: ReadState | None = None
) -> Iterator[Window]:
    """Read all tokens but the last one, and score `ids[given:]`, a window at a time.

    The model itself reads, in its own precision. The windows are those of `Decoder.prefill`, and so are the states.

    Args:
        decoder: of the model.
        ids: (tokens,), the begin-of-text token first.
        given: number of first tokens that are not scored, at least 1.
        num_top: number of likeliest tokens to report at each place.
        read: state after some of the tokens; they are not read again.
    """
    model, tokens = decoder.model, torch.tensor(ids, dtype=torch.int64, device=decoder.device)
    start, state = (read.num_read, read.state) if read is not None else (0, [])
    lstm_state = model_state(model, state)
    for first in range(start, len(ids) - 1, PREFILL_WINDOW):
        window = tokens[first : min(first + PREFILL_WINDOW, len(ids) - 1)]  # (time,)
        skipped = min(max(given - 1 - first, 0), len(window))  # the token at `first` is followed by that at `first` + 1
        if skipped == len(window):  # nothing to score: the model computes no logits
            _, lstm_state = model(window[None], lstm_state, torch.full_like(window, -1)[None])
            logprobs = torch.zeros(0, model.vocab_size, device=decoder.device)
        else:
            logits, lstm_state = model(window[None], lstm_state)  # (1, time, vocab_size)
            logprobs = logits[0, skipped:].log_softmax(-1)  # (scored, vocab_size)
        targets = tokens[first + 1 + skipped : first + 1 + len(window)]  # (scored,)
        top = logprobs.topk(min(num_top, logprobs.shape[-1]))
        drawn = logprobs.gather(1, targets[:, None])[:, 0]
        yield Window(lstm_state, drawn.cpu().double(), top.values.cpu(), top.indices.cpu())


def token_logprobs(
    decoder: Decoder, ids: Sequence[int], *, given: int, read: ReadState | None = None
) -> tuple[float, ...]:
    """Return the log-probabilities of tokens, computed by the model itself in its own precision.

    Args:
        decoder: of the model.
        ids: (tokens,), the begin-of-text token first.
        given: number of first tokens that are not scored, at least 1.
        read: state after some of them; it is not read again.

    Returns:
        For each of `ids[given:]` the natural logarithm of its probability after all tokens before it.
    """
    return tuple(
        value for window in read_windows(decoder, ids, given=given, read=read) for value in window.logprobs.tolist()
    )
