"""Stores in shards, made of whole ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from textgen.data.shards import Shard
from textgen.data.store import SHARDS_FORMAT, TokenStore
from textgen.runs.tensors import serialize

SHARDS = 8  # of the store of the fixture `sharded`


def write_in_shards(store: TokenStore, directory: Path, count: int) -> TokenStore:
    """Write a store in a folder, with the documents of its train split in `count` shards; return the new store."""
    shutil.copytree(store.directory, directory, ignore=shutil.ignore_patterns("train.*"))
    split, records = store.split("train"), []
    for index in range(count):
        chosen = range(index, split.num_documents, count)
        documents = [split.document(document) for document in chosen]
        arrays = {
            "tokens": np.concatenate(documents),
            "offsets": np.cumsum([0, *map(len, documents)], dtype=np.int64),
            "bytes": split.num_bytes[chosen],
        }
        path = directory / f"train-{index:05}.safetensors"
        path.write_bytes(b"".join(serialize({name: torch.from_numpy(array) for name, array in arrays.items()})))
        sha256, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
        tokens, text_bytes = len(arrays["tokens"]), int(arrays["bytes"].sum())
        records.append(asdict(Shard(path.name, size, sha256, len(documents), tokens, text_bytes)))
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.name.startswith(("validation", "test", "unigram"))
    }
    record = store.record | {"format": SHARDS_FORMAT, "order": "shards", "shards": records, "files": files}
    (directory / "store.json").write_text(json.dumps(record))
    return TokenStore.open(directory)
