"""Bits per byte of whole documents: sums of nats and bytes, reduced once over all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from textgen.config import TrainConfig
from textgen.console import Progress
from textgen.corpus import normalize
from textgen.data import DataError, Split, TokenStore, prepare_store
from textgen.documents import read_documents
from textgen.model import LSTMLanguageModel
from textgen.runs.checkpoint import TRAINER_NAME, CheckpointError, read_json
from textgen.settings import build_settings

Tokens = NDArray[np.integer[Any]]

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
    """Return e^nats, infinity where that is no float: a word of 800 nats is one of a text without spaces."""
    return math.exp(nats) if nats < 709 else math.inf


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
    bos_id: int,
    batch_size: int = 64,
    progress: bool = False,
    poll: Callable[[], None] | None = None,
) -> Score:
    """Score documents, each from a zero state and `bos_id` on to its own end-of-text token. Collective.

    Documents of like length share a batch; what stands beside a document, and how many processes share the work,
    changes its score by rounding only.

    Args:
        accelerator: the processes; precision is that of its autocast.
        model: the bare model, on the accelerator's device.
        documents: token ids, each ending with the end-of-text token.
        num_bytes: UTF-8 bytes of all of them.
        bos_id: the first input of each.
        batch_size: documents read side by side.
        progress: show on standard error how far it is.
        poll: called before each batch, equally often by all processes; may raise to end the scoring.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    own = batches[accelerator.process_index :: accelerator.num_processes]
    rounds = math.ceil(len(batches) / accelerator.num_processes)
    with Progress("scored batch", rounds, show=progress) as bar:
        for turn in range(rounds):
            if poll is not None:
                poll()
            if turn < len(own):
                nats += _score_batch(accelerator, model, [documents[i] for i in own[turn]], bos_id)
            bar.update(turn + 1)
    total = float(accelerator.reduce(nats, "sum"))
    model.train(was_training)
    return Score(
        nats=total, tokens=sum(len(d) for d in documents), bytes=num_bytes, documents=len(documents),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _score_batch(
    accelerator: Accelerator, model: LSTMLanguageModel, documents: list[Tokens], bos_id: int
) -> torch.Tensor:
    """Return the summed nats of documents sorted by falling length: a float64 scalar."""
    device = accelerator.device
    longest = len(documents[0])
    state = model.zero_state(len(documents))
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, longest, SCORE_WINDOW):
        rows = sum(len(d) > start for d in documents)  # the shorter ones have ended
        state = (state[0][:, :rows], state[1][:, :rows])
        width = min(SCORE_WINDOW, longest - start)
        tokens = np.full((rows, width + 1), -1, dtype=np.int64)  # the token before the window, then the window's
        tokens[:, 0] = bos_id if start == 0 else [document[start - 1] for document in documents[:rows]]
        for row, document in enumerate(documents[:rows]):
            part = document[start : start + width]
            tokens[row, 1 : 1 + len(part)] = part
        x = torch.from_numpy(tokens[:, :-1]).clamp(min=0).to(device)  # what follows a document's end is not scored
        y = torch.from_numpy(tokens[:, 1:]).to(device)
        with accelerator.autocast():
            scored, state = model(x, state, y)
        nats += scored
    return nats


# --- what is scored --------------------------------------------------------------------------------------------------

SPLITS = ("train", "validation", "test")


def texts_to_score(
    checkpoint: Path | None, data: str, text_column: str, *, limit: int | None, normalization: str
) -> list[str]:
    """Return documents of files, or of a split of the data that a checkpoint was trained on.

    Args:
        checkpoint: its directory; None of a model that does not say what it was trained on.
        data: a file, folder or glob, or a split.
        text_column: of csv, jsonl and parquet files.
        limit: the first ones only.
        normalization: what the model reads of texts.

    Raises:
        DataError, CorpusError, CheckpointError: there are none.
    """
    if data in SPLITS:
        if checkpoint is None:
            raise DataError(f"the model does not say what it was trained on: give `--data` a file, not `{data}`")
        texts = _split_texts(checkpoint, data, limit)
    else:
        documents = (text for text in read_documents([data], text_column=text_column) if text.strip())
        texts = [normalize(text, normalization) for text in islice(documents, limit)]
    if not texts:
        raise DataError(f"`{data}` holds no documents")
    return texts


def _split_texts(checkpoint: Path, name: str, limit: int | None) -> list[str]:
    return list(islice(read_split(store_of(checkpoint), name), limit))


def read_split(store: TokenStore, name: str) -> Iterator[str]:
    """Yield the texts of a split's documents."""
    split = store.split(name)
    for i in range(split.num_documents):  # documents end with the end-of-text token, which decodes to nothing
        yield store.tokenizer.decode(split.document(i).tolist())


def store_of(checkpoint: Path) -> TokenStore:
    """Return the tokens that a checkpoint was trained on; they are made anew where they are gone.

    Raises:
        CheckpointError, DataError, CorpusError: it does not say which, or they are not to be had.
    """
    path = checkpoint / TRAINER_NAME
    try:
        settings = read_json(path)["config"]
        config = build_settings(TrainConfig, {"data": settings["data"], "tokenizer": settings["tokenizer"]})
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"`{path}` has no settings of data: {error}") from error
    return prepare_store(config.data, config.tokenizer)
