"""Bits per byte of whole documents: sums of nats and bytes, reduced once over all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from textgen.console import Progress
from textgen.data.side_by_side import Tokens, batch_by_length, document_windows
from textgen.data.split import Split
from textgen.hardware import sum_dtype
from textgen.model.lstm import LSTMLanguageModel

# Tokens of each document read in one call; longer ones carry the state over. Bounds the memory of a batch.
SCORE_WINDOW = 256


@dataclass(frozen=True, kw_only=True)
class Score:
    """What documents cost under a model: sums, and the usual figures made of them."""

    nats: float
    tokens: int  # end-of-text tokens included
    bytes: int
    documents: int
    seconds: float

    @property
    def nats_per_token(self) -> float:
        """Cross-entropy per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per token; compare it between equal tokenizers only."""
        return perplexity(self.nats_per_token)

    def word_perplexity(self, words: int) -> float:
        """Perplexity per whitespace-separated word: comparable between tokenizers."""
        return perplexity(self.nats / words)

    @property
    def bits_per_byte(self) -> float:
        """Code length in bits of all documents, their ends included, over their UTF-8 bytes."""
        return self.nats / math.log(2) / self.bytes


def perplexity(nats: float) -> float:
    """Return e^nats; infinity if no float is as large: a text without spaces may be one word of 800 nats."""
    return math.exp(nats) if nats < 709 else math.inf


def mix_scores(scores: Mapping[str, Score], weights: Mapping[str, float]) -> Score:
    """Return the score of sources whose tokens are mixed by weights, as a training reads them.

    The sums are in proportion to the weights, and their tokens are as many as those of all scores together.
    """
    tokens = sum(its.tokens for its in scores.values())
    weight = sum(weights[name] for name in scores)
    nats = num_bytes = 0.0
    for name, its in scores.items():
        scale = weights[name] / weight * tokens / its.tokens
        nats, num_bytes = nats + scale * its.nats, num_bytes + scale * its.bytes
    return Score(
        nats=nats,
        tokens=tokens,
        bytes=round(num_bytes),
        documents=sum(its.documents for its in scores.values()),
        seconds=sum(its.seconds for its in scores.values()),
    )


def split_documents(split: Split, limit: int | None = None) -> tuple[list[Tokens], int]:
    """Return documents of a split as token arrays, and their bytes: all, or `limit` evenly spaced ones."""
    count = split.num_documents if limit is None else min(limit, split.num_documents)
    chosen = [i * split.num_documents // count for i in range(count)]
    documents: list[Tokens] = [split.document(i) for i in chosen]
    return documents, int(split.num_bytes[chosen].sum(dtype=np.int64))


@torch.no_grad()
def score(
    accelerator: Accelerator,
    model: LSTMLanguageModel,
    documents: Sequence[Tokens],
    num_bytes: int,
    *,
    bos_id: int | Sequence[int],
    batch_size: int = 64,
    progress: bool = False,
    poll: Callable[[], None] | None = None,
) -> Score:
    """Score documents, each from a zero state and its first input on to its own end-of-text token. Collective.

    Documents of similar length share a batch. The other documents of a batch and the number of processes change a
    score by rounding only.

    Args:
        accelerator: the processes; precision is that of its autocast.
        model: the bare model, on the accelerator's device.
        documents: token ids, each ending with the end-of-text token.
        num_bytes: UTF-8 bytes of all of them.
        bos_id: the first input: one of all documents, or one of each, such as that of its label.
        batch_size: documents read side by side.
        progress: show on standard error how far it is.
        poll: called before each batch, equally often by all processes; may raise to end the scoring.
    """
    started = time.perf_counter()
    first = [bos_id] * len(documents) if isinstance(bos_id, int) else bos_id
    was_training = model.training
    model.eval()
    batches = batch_by_length(documents, batch_size)
    nats = torch.zeros((), dtype=sum_dtype(accelerator.device), device=accelerator.device)
    own = batches[accelerator.process_index :: accelerator.num_processes]
    rounds = math.ceil(len(batches) / accelerator.num_processes)
    with Progress("scored batch", rounds, show=progress) as bar:
        for turn in range(rounds):
            if poll is not None:
                poll()
            if turn < len(own):
                chosen = own[turn]
                nats += _score_batch(accelerator, model, [documents[i] for i in chosen], [first[i] for i in chosen])
            bar.update(turn + 1)
    total = float(accelerator.reduce(nats, "sum"))
    model.train(was_training)
    return Score(
        nats=total, tokens=sum(len(d) for d in documents), bytes=num_bytes, documents=len(documents),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _score_batch(
    accelerator: Accelerator, model: LSTMLanguageModel, documents: list[Tokens], first: list[int]
) -> torch.Tensor:
    """Return the summed nats of documents sorted by falling length: a scalar of `sum_dtype`."""
    device = accelerator.device
    state = model.zero_state(len(documents))
    nats = torch.zeros((), dtype=sum_dtype(device), device=device)
    for x, y, _ in document_windows(documents, first, window=SCORE_WINDOW, device=device):
        state = (state[0][:, : len(x)], state[1][:, : len(x)])
        with accelerator.autocast():
            scored, state = model(x, state, y)
        nats += scored
    return nats
