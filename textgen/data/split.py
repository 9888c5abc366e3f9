"""A split of a token store: the tokens of documents, memory-mapped."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAMPLE_BLOCKS = 64
READ_AHEAD_BELOW = 1 << 28  # bytes of a file


@dataclass(frozen=True)
class Split:
    """One split of a token store.

    Attributes:
        tokens: uint16 or uint32, memory-mapped; every document ends with the end-of-text token. A part of a split has
            the tokens of the whole split.
        offsets: (num_documents + 1,) int64, memory-mapped: document i is tokens[offsets[i]:offsets[i + 1]].
        num_bytes: (num_documents,) uint32, memory-mapped: UTF-8 bytes of each document's text.
        begin_ids: (num_documents,) uint32, memory-mapped: the input that begins each document, `vocab_size` + the place
            of its label in the store's `labels`, or the end-of-text token without one. None for a store without labels.
    """

    tokens: NDArray[np.unsignedinteger[Any]]
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.uint32]
    begin_ids: NDArray[np.uint32] | None = None

    def document(self, index: int) -> NDArray[np.unsignedinteger[Any]]:
        """Return a document's tokens, its end-of-text token last."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.num_bytes)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, one end-of-text for each document included."""
        return int(self.offsets[-1] - self.offsets[0])

    def sample(self, count: int) -> NDArray[np.int32]:
        """Return all tokens if they are at most `count`, else those of some evenly spaced blocks: (at most count,)."""
        first, end = int(self.offsets[0]), int(self.offsets[-1])
        if end - first <= count:
            return self.tokens[first:end].astype(np.int32)
        length = count // SAMPLE_BLOCKS
        starts = np.linspace(first, end - length, SAMPLE_BLOCKS).astype(int).tolist()
        return np.concatenate([self.tokens[start : start + length] for start in starts]).astype(np.int32)

    def part(self, first: int, count: int) -> Split:
        """Return some documents that follow each other, as a split."""
        chosen = slice(first, first + count)
        begin_ids = None if self.begin_ids is None else self.begin_ids[chosen]
        return Split(self.tokens, self.offsets[first : first + count + 1], self.num_bytes[chosen], begin_ids)


def map_array(path: Path) -> NDArray[Any]:
    """Map an array whose dtype is the file's ending, read-only; an empty file cannot be mapped."""
    dtype = path.suffix[1:]
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)
    return np.frombuffer(map_file(path, is_random=".tokens." in path.name), dtype=dtype)


def map_file(path: Path, *, is_random: bool) -> mmap.mmap:
    """Map a file that is not empty into memory, read-only; `is_random` says that it is read in no order.

    Arrays on it are plain ones, not `np.memmap`, which reads a window a third slower. An epoch touches a large file's
    documents in no order: without the advice the kernel reads 128 KiB for each of 600 bytes (2e9 tokens, from disk,
    mean of the first 20 steps of 128 lanes: 75 ms for reading each, with it 3 ms; 2026-11-23). A small file is soon in
    memory whole.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if is_random and len(mapped) > READ_AHEAD_BELOW and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped
