"""Log-probabilities of a given text, token by token; long texts a window at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from textgen.decoding.decoders import PREFILL_WINDOW, Decoder, model_state
from textgen.decoding.reading import ReadState
from textgen.model.lstm import State
from textgen.tokenizer import Tokenizer


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
    ranks: tuple[int, ...] | None = field(default=None, repr=False)
    """1 for the likeliest token of the vocabulary at its place; None unless alternatives are asked for"""
    alternatives: tuple[tuple[tuple[str, float], ...], ...] | None = field(default=None, repr=False)
    """for each token the likeliest ones at its place with their log-probabilities, in falling order; None unless asked
    for"""

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
    """of the model, after the window; in a batch, of all rows"""
    logprobs: Tensor
    """(scored,) float64 on the CPU, of the tokens that are scored"""
    ranks: Tensor
    """(scored,), 1 for the likeliest token; empty unless `num_top` is given"""
    top_logprobs: Tensor
    """(scored, `num_top`), the largest log-probabilities at each of these places, in falling order"""
    top_ids: Tensor
    """(scored, `num_top`), their tokens"""


# Logits of a batch that are in memory at a time: 64 MB.
BATCH_LOGITS = 1 << 24


def read_windows(
    decoder: Decoder, ids: Sequence[int], *, given: int, num_top: int | None = None, read: ReadState | None = None
) -> Iterator[Window]:
    """Read all tokens but the last one, and score `ids[given:]`, a window at a time.

    The windows are those of `Decoder.prefill`, and so are the states. The other arguments are those of `read_rows`.
    """
    return (window for (window,) in read_rows(decoder, [ids], given=given, num_top=num_top, read=read))


@torch.inference_mode()
def read_rows(
    decoder: Decoder,
    rows: Sequence[Sequence[int]],
    *,
    given: int,
    num_top: int | None = None,
    read: ReadState | None = None,
) -> Iterator[list[Window]]:
    """Read texts side by side, and score their tokens but the first `given` ones, a window at a time.

    The model itself reads, in its own precision.

    Args:
        decoder: of the model.
        rows: tokens of each text, the begin-of-text token first, in the order of falling length.
        given: number of first tokens that are not scored, at least 1.
        num_top: number of likeliest tokens to report at each place; None for no ranks either.
        read: state after some first tokens of every row; they are not read again.

    Yields:
        The window of each row that has not ended.
    """
    model, longest = decoder.model, len(rows[0]) - 1
    start, read_state = (read.num_read, read.state) if read is not None else (0, [])
    hidden, cell = (part.expand(-1, len(rows), -1).contiguous() for part in model_state(model, read_state))
    width = PREFILL_WINDOW
    if len(rows) > 1:
        width = min(width, max(BATCH_LOGITS // (len(rows) * model.vocab_size), 1))
    for first in range(start, longest, width):
        rows = [row for row in rows if len(row) - 1 > first]
        size = min(width, longest - first)
        parts = [torch.tensor(row[first : first + size + 1]) for row in rows]
        tokens = pad_sequence(parts, batch_first=True).to(decoder.device)  # (rows, time + 1)
        inputs, state = tokens[:, :-1], (hidden[:, : len(rows)], cell[:, : len(rows)])
        skipped = min(max(given - 1 - first, 0), size)  # the token at `first` is followed by that at `first` + 1
        if skipped == size:  # nothing to score: the model computes no logits
            _, (hidden, cell) = model(inputs, state, torch.full_like(inputs, -1))
            logprobs = torch.zeros(len(rows), 0, model.vocab_size, device=decoder.device)
        else:
            logits, (hidden, cell) = model(inputs, state)  # (rows, time, vocab_size)
            logprobs = logits[:, skipped:].log_softmax(-1)  # (rows, scored, vocab_size)
        drawn = logprobs.gather(-1, tokens[:, 1 + skipped :, None])  # (rows, scored, 1)
        ranks = 1 + (logprobs > drawn).sum(-1).cpu() if num_top is not None else torch.zeros(len(rows), 0)
        top = logprobs.topk(min(num_top or 0, logprobs.shape[-1]))
        scores = drawn[..., 0].cpu().double(), ranks, top.values.cpu(), top.indices.cpu()
        yield [
            Window((hidden, cell), *(values[i, : max(len(part) - 1 - skipped, 0)] for values in scores))
            for i, part in enumerate(parts)
        ]


def score_texts(
    decoder: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    end: bool = True,
    read: ReadState | None = None,
    num_top: int | None = None,
    begin: int | None = None,
) -> list[TextScore]:
    """Score texts side by side. The other texts of a batch change a score by rounding only.

    Args:
        decoder: of the model.
        tokenizer: the model's, a lossless one.
        texts: normalized, none of them empty.
        end: score the end of each text too.
        read: state after a text before each of them.
        num_top: number of alternatives of each token; None for no ranks either.
        begin: the first input of each text; None for begin-of-text. Not used with `read`.
    """
    before = (tokenizer.bos_id if begin is None else begin,) if read is None else read.ids
    ids = [(*tokenizer.encode(text), *((tokenizer.eos_id,) if end else ())) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: -len(ids[i]))
    logprobs: list[list[float]] = [[] for _ in texts]
    ranks: list[list[int]] = [[] for _ in texts]
    alternatives: list[list[tuple[tuple[str, float], ...]]] = [[] for _ in texts]
    rows = [[*before, *ids[i]] for i in order]
    for windows in read_rows(decoder, rows, given=len(before), num_top=num_top, read=read):
        for i, window in zip(order, windows, strict=False):  # the shorter texts, which are last, end first
            logprobs[i] += window.logprobs.tolist()
            if num_top is not None:
                ranks[i] += window.ranks.tolist()
                tops = zip(window.top_ids.tolist(), window.top_logprobs.tolist(), strict=True)
                names = ((map(tokenizer.token_text, top), values) for top, values in tops)
                alternatives[i] += [tuple(zip(top, values, strict=True)) for top, values in names]
    return [
        TextScore(
            text=text,
            tokens=tuple(tokenizer.token_text(token) for token in ids[i]),
            ids=ids[i],
            logprobs=tuple(logprobs[i]),
            num_bytes=len(text.encode()),
            ranks=None if num_top is None else tuple(ranks[i]),
            alternatives=None if num_top is None else tuple(alternatives[i]),
        )
        for i, text in enumerate(texts)
    ]


def score_stream(
    decoder: Decoder,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    batch_size: int,
    end: bool = True,
    read: ReadState | None = None,
    num_top: int | None = None,
    begin: int | None = None,
) -> Iterator[TextScore]:
    """Score any number of texts in their order, `batch_size` of similar length at a time; see `score_texts`."""
    waiting = iter(texts)
    while pool := list(_take_pool(waiting, POOL_BATCHES * batch_size)):
        order = sorted(range(len(pool)), key=lambda i: len(pool[i]))
        scores: dict[int, TextScore] = {}
        for first in range(0, len(pool), batch_size):
            chosen = order[first : first + batch_size]
            batch = [pool[i] for i in chosen]
            found = score_texts(decoder, tokenizer, batch, end=end, read=read, num_top=num_top, begin=begin)
            scores.update(zip(chosen, found, strict=True))
        yield from (scores[i] for i in range(len(pool)))


# Texts that `score_stream` holds to sort them by length: so many batches, or fewer if they have so many characters.
POOL_BATCHES = 8
POOL_CHARACTERS = 1 << 20


def _take_pool(texts: Iterator[str], count: int) -> Iterator[str]:
    length = 0
    for text in islice(texts, count):
        yield text
        length += len(text)
        if length >= POOL_CHARACTERS:
            return
