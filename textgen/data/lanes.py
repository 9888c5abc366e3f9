"""Lanes and windows: the way of a token from the store to a batch.

An epoch is a permutation of a split's documents. The permuted stream is cut into `batch_size` lanes, each read left to
right in windows of `seq_len` tokens. The position in the data is (epoch, window), two integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from textgen.data.store import Split
from textgen.errors import TextgenError
from textgen.noise import permutation

# Documents between two entries of an epoch's table of stream positions. Positions in between are found by walking
# over at most this many lengths, so that the table is small beside the permutation.
STRIDE = 64


class Epoch:
    """One pass over a split: the permuted documents as a stream, cut into lanes and windows.

    The stream has `split.num_tokens` tokens. Lane i starts at token i * lane_length; window w of it reads `seq_len`
    tokens from w * seq_len on, and its targets are the tokens one further. What is left at a lane's end and does not
    fill a window, less than `batch_size` x (`seq_len` + 1) tokens in all, is left out of this epoch; the next epoch's
    order leaves out another part.

    Args:
        split: the documents.
        batch_size: number of lanes.
        seq_len: tokens in a window.
        seed, epoch: decide the order of the documents.

    Raises:
        TextgenError: the split has too few tokens for one window of every lane.
    """

    def __init__(self, split: Split, *, batch_size: int, seq_len: int, seed: int, epoch: int) -> None:
        self.split, self.batch_size, self.seq_len = split, batch_size, seq_len
        self.num_windows = windows_per_epoch(split, batch_size=batch_size, seq_len=seq_len)
        self.lane_length = (split.num_tokens - 1) // batch_size
        self._order = _document_order(seed, epoch, split.num_documents)
        # stream position at every STRIDE-th document of the order, summed up block by block
        starts = np.zeros(math.ceil(len(self._order) / STRIDE) + 1, dtype=np.int64)
        for block in range(len(starts) - 1):
            starts[block + 1] = self._lengths(block).sum()
        self._starts = np.cumsum(starts)

    def _lengths(self, block: int) -> NDArray[np.int64]:
        """Return the lengths of the documents of a block of the order: (at most STRIDE,)."""
        documents = self._order[block * STRIDE : (block + 1) * STRIDE]
        lengths: NDArray[np.int64] = self.split.offsets[documents + 1] - self.split.offsets[documents]
        return lengths

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Read `count` tokens of the stream from position `start` on: (count,)."""
        out = np.empty(count, dtype=np.int64)
        block = int(self._starts.searchsorted(start, side="right")) - 1
        ends = self._starts[block] + self._lengths(block).cumsum()
        place = int(ends.searchsorted(start, side="right"))  # of the document in its block
        filled = 0
        while filled < count:
            if place == len(ends):
                block, place = block + 1, 0
                ends = self._starts[block] + self._lengths(block).cumsum()
            document_end = int(self.split.offsets[int(self._order[block * STRIDE + place]) + 1])
            left = int(ends[place]) - (start + filled)  # tokens of this document from here on
            taken = min(left, count - filled)
            out[filled : filled + taken] = self.split.tokens[document_end - left : document_end - left + taken]
            filled, place = filled + taken, place + 1
        return out

    def window(self, lane: int, window: int) -> NDArray[np.int64]:
        """Return a window's tokens and the one after them: (seq_len + 1,)."""
        return self.read(lane * self.lane_length + window * self.seq_len, self.seq_len + 1)


def _document_order(seed: int, epoch: int, count: int) -> NDArray[np.unsignedinteger[Any]]:
    """Return an epoch's permutation in 4 bytes a document where they suffice; while it is made, in 12."""
    order = permutation(seed, epoch, count).numpy()
    return order.astype(np.uint32 if count < 1 << 32 else np.uint64)


def windows_per_epoch(split: Split, *, batch_size: int, seq_len: int) -> int:
    """Return the number of optimizer steps in an epoch.

    Raises:
        TextgenError: not one window fits; the message says which sizes would.
    """
    windows = (split.num_tokens - 1) // batch_size // seq_len
    if windows < 1:
        targets = max(split.num_tokens - 1, 0)
        if targets >= seq_len:
            fitting = f"batch_size {targets // seq_len} would fit"
        elif targets:
            lanes = min(batch_size, 2, targets)
            fitting = f"batch_size {lanes} x seq_len {targets // lanes} would fit"
        else:
            fitting = "no sizes would fit, at least 2 tokens are needed"
        raise TextgenError(
            f"{split.num_tokens} tokens are too few for batch_size {batch_size} x seq_len {seq_len}: {fitting}"
        )
    return windows


class _Windows(Dataset[dict[str, Tensor]]):
    """Windows of an epoch by index lane * num_windows + window, a whole micro-batch in one call."""

    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.epoch.batch_size * self.epoch.num_windows

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        pairs = [divmod(index, self.epoch.num_windows) for index in indices]
        rows = torch.from_numpy(np.stack([self.epoch.window(lane, window) for lane, window in pairs]))
        lanes, windows = torch.tensor(pairs).T
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "lanes": lanes, "windows": windows}


class LaneSampler:
    """Yields the indices of a micro-batch: window by window, in each the lanes micro-batch by micro-batch.

    Accelerate (`split_batches`) gives every process its share of each; it asks for the attributes.
    """

    drop_last = True

    def __init__(self, epoch: Epoch, *, micro_batches: int, first_window: int, last_window: int) -> None:
        self.batch_size = epoch.batch_size // micro_batches
        self._epoch, self._micro_batches = epoch, micro_batches
        self._windows = range(first_window, last_window)

    def __len__(self) -> int:
        return len(self._windows) * self._micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for window in self._windows:
            for first in range(0, self._epoch.batch_size, self.batch_size):
                yield [lane * self._epoch.num_windows + window for lane in range(first, first + self.batch_size)]


def build_loader(
    epoch: Epoch, *, micro_batches: int, first_window: int = 0, last_window: int | None = None
) -> DataLoader[dict[str, Tensor]]:
    """Build the loader of windows `first_window` up to `last_window`, for Accelerate to prepare.

    Each item is a micro-batch: `tokens` and `targets` (batch, seq_len), `lanes` and `windows` (batch,), all int64.
    """
    last_window = epoch.num_windows if last_window is None else last_window
    sampler = LaneSampler(epoch, micro_batches=micro_batches, first_window=first_window, last_window=last_window)
    return DataLoader(_Windows(epoch), batch_sampler=sampler, collate_fn=lambda batch: batch)
