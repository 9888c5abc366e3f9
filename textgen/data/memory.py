"""Documents that a program holds in memory, as a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any

from textgen.config import DataConfig
from textgen.data.corpus import Corpus, fingerprint, read_dataset, require_splits
from textgen.data.documents import read_batches
from textgen.data.labels import dataset_columns, label_of
from textgen.data.tally import Tally
from textgen.errors import TextgenError, in_backticks

SPLITS = ("train", "unsupervised", "validation", "test")


def corpus_of_texts(texts: Sequence[str] | Mapping[str, Sequence[str]], config: DataConfig) -> Corpus:
    """Return texts as a corpus.

    Args:
        texts: one document each, all of them to train on, or several lists by split.
        config: the settings of data.

    Raises:
        TextgenError: there is no list of texts, or an item is not a string of valid text.
    """
    if config.label_column is not None:
        raise TextgenError(f"`texts` have no column `{config.label_column}`: labelled texts are a `dataset`")
    splits = {}
    for split, documents in _by_split(texts, "texts").items():
        # a set has no order, and what a table iterates over is its columns
        refused = isinstance(documents, str | bytes | Mapping | Set) or hasattr(documents, "columns")
        if refused or not isinstance(documents, Iterable):
            raise TextgenError(f"`texts` must be a list of texts, not {type(documents).__name__}")
        # a list, since the texts are read several times
        settings = replace(config, text_column="text")
        splits[split] = partial(read_batches, [list(documents)], f"`texts` of {split}", settings, Tally())
    return _corpus(splits, config)


def corpus_of_dataset(dataset: Any, config: DataConfig) -> Corpus:
    """Return a `datasets.Dataset`, or a `datasets.DatasetDict`, as a corpus; its texts stay where they are.

    Args:
        dataset: with the column `text_column` of `config`.
        config: the settings of data.

    Raises:
        TextgenError: it is another object, or lacks the column.
    """
    splits = {}
    for split, rows in _by_split(dataset, "dataset").items():
        if not hasattr(rows, "select_columns") or not hasattr(rows, "__len__"):
            raise TextgenError(
                f"`dataset` must be a datasets.Dataset, not {type(rows).__name__}; a name on the hub is the setting "
                "`data.dataset`"
            )
        for column, setting in zip(dataset_columns(config), ("text_column", "label_column"), strict=False):
            if column not in rows.column_names:
                have = in_backticks(rows.column_names)
                raise TextgenError(f"`dataset` has no column `{column}`; it has {have}: see `data.{setting}`")
        splits[split] = partial(read_dataset, rows, f"`dataset` of {split}", config, Tally())
    return _corpus(splits, config)


def _by_split(given: Any, name: str) -> dict[str, Any]:
    splits = dict(given) if isinstance(given, Mapping) else {"train": given}
    if unknown := [split for split in splits if split not in SPLITS]:
        raise TextgenError(f"`{name}` has a split `{unknown[0]}`; textgen's splits are {in_backticks(SPLITS)}")
    return splits


def _corpus(splits: dict[str, Any], config: DataConfig) -> Corpus:
    require_splits(config, splits, "memory")
    if config.label_folders:
        raise TextgenError("`data.label_folders` needs files, and the texts are in memory")
    digest = hashlib.sha256()
    for split, read in splits.items():
        for text in read():
            digest.update(f"{split} {len(text)} {text}\n".encode())
            if (label := label_of(text)) is not None:
                digest.update(f"{len(label)} {label}\n".encode())
    return Corpus(description="memory", fingerprint=fingerprint(config, digest.hexdigest()), splits=splits)
