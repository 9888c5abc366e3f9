"""The train split of a store in shards: files of documents, of which a training reads one after the other.

A shard is one safetensors file, written whole or not at all. Its arrays are those of a `Split`: `tokens` (uint16 or
uint32), `offsets` (int64, from 0), `bytes` (uint32), and in a store with labels `begins` (uint32). `store.json` has a
record of each shard with its size and sha256.

The order is called `shards`: in each epoch a permutation of the shards, and in each shard a permutation of its
documents. A shard is read by all lanes from its start to its end, then comes the next one (see `lanes.Course`). So a
training needs one shard at a time, whatever the size of the store. The documents of the text are dealt to the shards in
small blocks, so that each shard is a sample of the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textgen.data.split import Split, map_file
from textgen.errors import TextgenError
from textgen.runs.tensors import find_tensors

ORDER = "shards"
DTYPE_NAMES = {"uint16": "U16", "uint32": "U32", "int64": "I64"}


@dataclass(frozen=True)
class Shard:
    """The record of a shard in `store.json`."""

    name: str
    """of its file"""
    size: int
    """bytes of its file"""
    sha256: str
    documents: int
    tokens: int
    bytes: int
    """of its texts in UTF-8"""

    @classmethod
    def parse(cls, record: object) -> Shard:
        """Return the shard of a record that was read from a file.

        Raises:
            ValueError: it is not one.
        """
        kinds = {"name": str, "size": int, "sha256": str, "documents": int, "tokens": int, "bytes": int}
        if not isinstance(record, dict) or {name: type(value) for name, value in record.items()} != kinds:
            raise ValueError("a record of a shard has other fields")
        shard = cls(**record)
        if not re.fullmatch(r"train-[0-9]{5}\.safetensors", shard.name) or not re.fullmatch(
            "[0-9a-f]{64}", shard.sha256
        ):
            raise ValueError(f"a record of a shard names {shard.name!r:.60} with sha256 {shard.sha256!r:.70}")
        if min(shard.size, shard.documents, shard.tokens) < 1:
            raise ValueError(f"the record of `{shard.name}` has no tokens")
        return shard


class Shards:
    """The shards of a store whose files are in its folder.

    A subclass may keep the files elsewhere: `path` is called when a shard is about to be read, and `expect` says before
    that which ones will be wanted.

    Args:
        directory: the folder of the store.
        records: of the shards in their order.
        dtype: of the tokens.
        has_labels: whether the documents have labels.
    """

    def __init__(self, directory: Path, records: Sequence[Shard], *, dtype: str, has_labels: bool) -> None:
        self.directory, self.records = directory, tuple(records)
        self._dtypes = {"tokens": dtype, "offsets": "int64", "bytes": "uint32"}
        if has_labels:
            self._dtypes["begins"] = "uint32"

    def path(self, index: int) -> Path:
        """Return the local file of a shard, whole; every process of a training may call this at the same time.

        Raises:
            TextgenError: the file is not there.
        """
        return self.directory / self.records[index].name

    def expect(self, indices: Sequence[int]) -> None:
        """Say which shards will be wanted next, the first one first, after the one that is being read.

        Called at each shard, from the thread that reads the training text. It must not wait.
        """

    def split(self, index: int) -> Split:
        """Map a shard into memory. It is unmapped when the split is no longer used.

        Raises:
            TextgenError: the file is missing or damaged.
        """
        record, path = self.records[index], self.path(index)
        seen = path.stat().st_size if path.exists() else 0
        if seen != record.size:
            raise TextgenError(f"`{path}` is damaged: {seen} bytes, wanted {record.size}")
        arrays = map_arrays(path, self._dtypes)
        lengths = {name: len(array) for name, array in arrays.items()}
        wanted = dict.fromkeys(self._dtypes, record.documents)
        wanted |= {"tokens": record.tokens, "offsets": record.documents + 1}
        if lengths != wanted or int(arrays["offsets"][-1]) != record.tokens:
            raise TextgenError(f"`{path}` is damaged: its arrays do not have the lengths of its record")
        return Split(arrays["tokens"], arrays["offsets"], arrays["bytes"], arrays.get("begins"))

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def first_documents(self) -> NDArray[np.int64]:
        """The number in the split of the first document of each shard: (shards,)."""
        return np.cumsum([0, *(record.documents for record in self.records[:-1])], dtype=np.int64)


def map_arrays(path: Path, dtypes: dict[str, str]) -> dict[str, NDArray[Any]]:
    """Map the arrays of one dimension of a safetensors file, read-only.

    Args:
        path: of the file.
        dtypes: the names of the arrays and of their dtypes, all of them.

    Raises:
        TextgenError: the file is damaged, or has other arrays.
    """
    found = find_tensors(path)
    seen = {name: (dtype, len(shape)) for name, (_, dtype, shape) in found.items()}
    if seen != {name: (DTYPE_NAMES[dtype], 1) for name, dtype in dtypes.items()}:
        raise TextgenError(f"`{path}` holds other arrays than a shard of this store: {', '.join(sorted(seen))[:200]}")
    mapped = map_file(path, is_random=True)
    return {
        name: np.frombuffer(mapped, dtype=dtypes[name], count=shape[0], offset=place)
        for name, (place, _, shape) in found.items()
    }
