"""Lanes and windows: how the token store becomes batches.

An epoch is a permutation of a split's documents. The permuted documents form one stream of tokens. The stream is cut
into `batch_size` lanes of equal length. Each step reads one window of `seq_len` tokens from every lane, from left to
right. The position in the data is therefore one integer, the step: `divmod(step, windows_per_epoch)` gives the epoch
and the window. Of a text in shards, `Course` finds the shard and the window in it.

A batch goes from here to training/step.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from textgen.data.shards import Shard, Shards
from textgen.data.split import Split
from textgen.errors import TextgenError
from textgen.noise import permutation, uniform

# `Epoch` stores the stream position of every STRIDE-th document only. `Epoch.read` finds the others by summing at most
# this many lengths. A table entry for every document would be twice as large as the permutation itself.
STRIDE = 64

# This share of the labelled documents of an epoch is read without its label, so that the model can do without one.
WITHOUT_LABEL = 0.1
# The coordinate of `noise.uniform` that separates this choice from dropout's, whose coordinates count from 0 up.
_LABEL_SITE = -1 << 32


class Epoch:
    """One pass over a split: the permuted documents as a stream, cut into lanes and windows.

    The stream has `split.num_tokens` tokens. Lane i starts at token i * lane_length. Window w of a lane reads `seq_len`
    tokens from w * seq_len on; its targets are the tokens one position later. Fewer than `batch_size` x (`seq_len` + 1)
    tokens at the ends of the lanes do not fill a window. This epoch leaves them out; the next epoch has another order
    and leaves out others.

    Args:
        split: the documents.
        batch_size: number of lanes; a fraction if the last one is only a part of a lane.
        seq_len: tokens in a window.
        seed, epoch: decide the order of the documents.
        shard: number of the shard that the documents are; it decides their order too. None for a whole split.
        first_document: number of the shard's first document in the whole split.

    Raises:
        TextgenError: the split has too few tokens for one window of every lane.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int | Fraction,
        seq_len: int,
        seed: int,
        epoch: int,
        shard: int | None = None,
        first_document: int = 0,
    ) -> None:
        self.split, self.batch_size, self.seq_len, self.number, self._seed = split, batch_size, seq_len, epoch, seed
        self._first_document = first_document
        self.num_windows = windows_per_epoch(split, batch_size=batch_size, seq_len=seq_len)
        self.lane_length = (
            split.num_tokens - 1
        ) // batch_size  # minus 1: the last lane's last target is one token after its input
        self._order = _document_order(seed, epoch, split.num_documents, shard=shard)
        # The stream position of every STRIDE-th document. The lengths are summed block by block: all of them at once
        # would take 8 bytes a document.
        starts = np.zeros(math.ceil(len(self._order) / STRIDE) + 1, dtype=np.int64)
        for block in range(len(starts) - 1):
            starts[block + 1] = self._lengths(block).sum()
        self._starts = np.cumsum(starts)

    def _lengths(self, block: int) -> NDArray[np.int64]:
        """Return the lengths of the documents in a block of the order: (at most STRIDE,)."""
        documents = self._order[block * STRIDE : (block + 1) * STRIDE]
        lengths: NDArray[np.int64] = self.split.offsets[documents + 1] - self.split.offsets[documents]
        return lengths

    def read(self, start: int, count: int, *, begun: list[tuple[int, int]] | None = None) -> NDArray[np.int64]:
        """Read `count` tokens of the stream from position `start` on: (count,).

        Args:
            start: of the first token.
            count: of tokens.
            begun: gets, for each document whose first token is read after another token, the place of the token before
                it, an end-of-text, and the document.
        """
        out = np.empty(count, dtype=np.int64)
        filled = 0
        for document, first, end in self.documents(start):
            if filled and begun is not None:
                begun.append((filled - 1, document))
            copied = min(end - first, count - filled)
            out[filled : filled + copied] = self.split.tokens[first : first + copied]
            filled += copied
            if filled == count:
                break
        return out

    def documents(self, start: int) -> Iterator[tuple[int, int, int]]:
        """Yield the documents of the stream from position `start` on: each with its place in `split.tokens`.

        A place is that of the first token and the one after the last. The first document begins with the token at
        `start`, which may be inside of it.
        """
        # Find the document that holds `start`: first its block in the table, then its place in the block.
        block = int(self._starts.searchsorted(start, side="right")) - 1
        ends = self._starts[block] + self._lengths(block).cumsum()  # stream position after each document of the block
        place = int(ends.searchsorted(start, side="right"))
        while block < len(self._starts) - 1:
            for document, end in zip(
                self._order[block * STRIDE + place : (block + 1) * STRIDE].tolist(), ends[place:].tolist(), strict=True
            ):
                document_end = int(self.split.offsets[document + 1])
                yield document, document_end - (end - start), document_end
                start = end
            block, place = block + 1, 0
            ends = self._starts[block] + self._lengths(block).cumsum()

    def window(self, lane: int, window: int, *, begun: list[tuple[int, int]] | None = None) -> NDArray[np.int64]:
        """Return a window's tokens and the one after them: (seq_len + 1,); `begun` as in `read`."""
        return self.read(lane * self.lane_length + window * self.seq_len, self.seq_len + 1, begun=begun)

    def windows(self, lanes: Sequence[int], window: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a window of some lanes, each (lanes, seq_len) int64.

        The targets are the tokens one position later. The inputs are the tokens, but the label of a document takes the
        place of the end-of-text before it.
        """
        begun: list[list[tuple[int, int]]] = [[] for _ in lanes]
        rows = [self.window(lane, window, begun=its) for lane, its in zip(lanes, begun, strict=True)]
        tokens = torch.from_numpy(np.stack(rows))  # (lanes, seq_len + 1)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if self.split.begin_ids is None or not any(begun):
            return inputs, targets
        row, place, document = torch.tensor([(i, *its) for i, one in enumerate(begun) for its in one]).unbind(1)
        labels = torch.from_numpy(self.split.begin_ids[document.numpy()].astype(np.int64))
        kept = keeps_label(self._seed, self.number, document + self._first_document)
        inputs = inputs.clone()
        inputs[row[kept], place[kept]] = labels[kept]
        return inputs, targets


def keeps_label(seed: int, epoch: int, document: Tensor) -> Tensor:
    """Return whether documents are read with their labels in an epoch, if they have labels."""
    return uniform(seed, epoch, _LABEL_SITE, document) >= WITHOUT_LABEL


def _document_order(seed: int, epoch: int, count: int, *, shard: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
    """Return an epoch's permutation. It takes 4 bytes a document (8 above 2^32 documents), 12 while it is computed."""
    order = permutation(seed, epoch, count, shard=shard).numpy()
    return order.astype(np.uint32 if count < 1 << 32 else np.uint64)


def windows_per_epoch(split: Split, *, batch_size: int | Fraction, seq_len: int) -> int:
    """Return the number of windows in a lane of an epoch, or of a shard.

    Raises:
        TextgenError: the split has too few tokens for one window of every lane; the message names sizes that fit.
    """
    return _windows_of(split.num_tokens, batch_size=batch_size, seq_len=seq_len)


def _windows_of(num_tokens: int, *, batch_size: int | Fraction, seq_len: int) -> int:
    windows = (num_tokens - 1) // batch_size // seq_len
    if windows < 1:
        targets = max(num_tokens - 1, 0)
        if targets >= seq_len:
            fitting = f"batch_size {targets // seq_len} would fit"
        elif targets:
            lanes = min(int(batch_size), 2, targets)
            fitting = f"batch_size {lanes} x seq_len {targets // lanes} would fit"
        else:
            fitting = "no sizes would fit, at least 2 tokens are needed"
        raise TextgenError(
            f"{num_tokens} tokens are too few for batch_size {batch_size} x seq_len {seq_len}: {fitting}"
        )
    return windows


@dataclass(frozen=True)
class Place:
    """Where a step reads: the window, in an order of documents."""

    epoch: int
    shard: int | None
    """None if the split is not in shards"""
    window: int


class Course:
    """Where each step of a training reads: in one epoch after the other, and in its shards one after the other.

    A shard is read as a split is, by all lanes. What does not fill a window of every lane is left out for each shard.

    Args:
        text: the train split.
        batch_size: number of lanes.
        seq_len: tokens in a window.
        seed: decides the orders of shards and documents.

    Raises:
        TextgenError: the split or one of its shards has too few tokens for one window of every lane.
    """

    def __init__(self, text: Split | Shards, *, batch_size: int, seq_len: int, seed: int) -> None:
        self._text, self._batch_size, self._seq_len, self._seed = text, batch_size, seq_len, seed
        sizes = {"batch_size": batch_size, "seq_len": seq_len}
        if isinstance(text, Split):
            self._windows = np.array([windows_per_epoch(text, **sizes)])
        else:
            self._windows = np.array([_windows_of_shard(record, **sizes) for record in text.records])
        self._last: tuple[int, NDArray[np.int64]] | None = None
        self.per_epoch = int(self._windows.sum())
        """optimizer steps of an epoch"""

    @property
    def first_part(self) -> Split:
        """The part of the text that the first step reads: the split, or one of its shards.

        Raises:
            TextgenError: the shard is missing or damaged.
        """
        return self._text if isinstance(self._text, Split) else self._text.split(int(self._order(0)[0]))

    def find(self, step: int) -> Place:
        """Return where a step reads."""
        epoch, window = divmod(step, self.per_epoch)
        if isinstance(self._text, Split):
            return Place(epoch, None, window)
        order = self._order(epoch)
        ends = self._windows[order].cumsum()
        place = int(ends.searchsorted(window, side="right"))
        return Place(epoch, int(order[place]), window - int(ends[place] - self._windows[order[place]]))

    def epoch_at(self, place: Place) -> Epoch:
        """Return the documents in the order in which a step reads them, cut into lanes and windows.

        Raises:
            TextgenError: a shard is missing or damaged.
        """
        sizes = {"batch_size": self._batch_size, "seq_len": self._seq_len, "seed": self._seed, "epoch": place.epoch}
        if isinstance(self._text, Split):
            return Epoch(self._text, **sizes)
        assert place.shard is not None
        order = self._order(place.epoch).tolist()
        following = [*order[order.index(place.shard) + 1 :], *self._order(place.epoch + 1).tolist()]
        self._text.expect(following)
        first = int(self._text.first_documents[place.shard])
        return Epoch(self._text.split(place.shard), **sizes, shard=place.shard, first_document=first)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of the shards in an epoch: (shards,). The last one is kept, since each step asks for it."""
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, permutation(self._seed, epoch, len(self._windows)).numpy()
        return self._last[1]


def _windows_of_shard(shard: Shard, *, batch_size: int, seq_len: int) -> int:
    try:
        return _windows_of(shard.tokens, batch_size=batch_size, seq_len=seq_len)
    except TextgenError as error:
        raise TextgenError(f"shard `{shard.name}`: {error}, or fewer shards") from error


class LaneSampler:
    """Yields one list per micro-batch, with a (step, lane) pair for each row: steps in order, lanes in order.

    Accelerate reads the attributes `batch_size` and `drop_last`. With `split_batches` it gives each process an equal
    slice of every list and does not look into the pairs. A lane therefore stays on its process.

    Args:
        batch_size: number of lanes.
        micro_batches: lists per step.
        steps: the steps to list. It may be replaced between two iterations.
    """

    drop_last = True

    def __init__(self, *, batch_size: int, micro_batches: int, steps: range = range(0)) -> None:
        self.num_lanes, self.batch_size, self.steps = batch_size, batch_size // micro_batches, steps

    def __len__(self) -> int:
        return len(self.steps) * (self.num_lanes // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            for first in range(0, self.num_lanes, self.batch_size):
                yield [(step, lane) for lane in range(first, first + self.batch_size)]


class _Windows(Dataset[dict[str, Tensor]]):
    """Reads windows by (step, lane), a whole micro-batch in one call.

    Only the epoch read last is kept: its order of documents may be the largest array of a training's memory.
    """

    def __init__(self, course: Course) -> None:
        self._course = course
        self._opened: tuple[int, int | None] | None = None  # epoch and shard
        self._epoch: Epoch | None = None

    def _open_epoch(self, place: Place) -> Epoch:
        if self._epoch is None or self._opened != (place.epoch, place.shard):
            self._epoch = None  # free the old order before the new one is computed
            self._epoch, self._opened = self._course.epoch_at(place), (place.epoch, place.shard)
        return self._epoch

    def __getitems__(self, rows: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        step, lanes = rows[0][0], [lane for _, lane in rows]  # a micro-batch is of one step
        place = self._course.find(step)
        inputs, targets = self._open_epoch(place).windows(lanes, place.window)
        return {
            "tokens": inputs,
            "targets": targets,
            "lanes": torch.tensor(lanes),
            "windows": torch.full((len(lanes),), place.window),
        }


def build_loader(
    text: Split | Shards, sampler: LaneSampler, *, seq_len: int, seed: int
) -> DataLoader[dict[str, Tensor]]:
    """Build the loader of a training, for Accelerate to prepare. It reads the steps that `sampler` lists.

    Each item is a micro-batch: `tokens` and `targets` (rows, seq_len), `lanes` and `windows` (rows,), all int64.
    `windows` counts from the start of the epoch, or of the shard.

    Raises:
        TextgenError: as `Course`.
    """
    course = Course(text, batch_size=sampler.num_lanes, seq_len=seq_len, seed=seed)
    return DataLoader(_Windows(course), batch_sampler=sampler, collate_fn=lambda batch: batch)
