"""Log-probabilities of a given text, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from textgen.decoding.decoders import PREFILL_WINDOW, Decoder, model_state
from textgen.decoding.reading import ReadState


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


@torch.inference_mode()
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
    tokens = torch.tensor(ids, dtype=torch.int64, device=decoder.device)
    start, state = (read.num_read, read.state) if read is not None else (0, [])
    lstm_state = model_state(decoder.model, state)
    parts = []
    for first in range(start, len(ids) - 1, PREFILL_WINDOW):
        window = tokens[first : first + PREFILL_WINDOW][: len(ids) - 1 - first]  # (time,)
        logits, lstm_state = decoder.model(window[None], lstm_state)  # (1, time, vocab_size)
        scored = max(given - 1 - first, 0)  # the token at `first` is followed by that at `first` + 1
        targets = tokens[first + 1 + scored : first + 1 + len(window)]
        logprobs = logits[0, scored:].log_softmax(-1)
        parts.append(logprobs.gather(1, targets[:, None])[:, 0].double().cpu())
    return tuple(torch.cat(parts).tolist())
