"""Texts to score: documents of files, or of a split that a checkpoint was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from textgen.config import SPLITS, DataConfig, TrainConfig
from textgen.data.corpus import normalize
from textgen.data.documents import read_documents
from textgen.data.labels import copy_label, labelled
from textgen.data.split import Split
from textgen.data.store import TokenStore, prepare_store
from textgen.errors import CheckpointError, TextgenError
from textgen.runs.checkpoint import TRAINER_NAME, read_json
from textgen.settings import build_settings, complete_record


def texts_to_score(
    checkpoint: Path | None, data: str, settings: DataConfig, *, limit: int | None, normalization: str
) -> list[str]:
    """Return the texts of `documents_to_score` in memory."""
    return list(documents_to_score(checkpoint, data, settings, limit=limit, normalization=normalization))


def texts_by_source(
    checkpoint: Path | None, data: str, settings: DataConfig, *, limit: int | None, normalization: str
) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Return the texts of `documents_to_score` by source, and the weights of the sources.

    They are by source if `data` is a split of a training on several sources. Else they are under the name "".
    """
    if data not in SPLITS or checkpoint is None:
        return {"": texts_to_score(checkpoint, data, settings, limit=limit, normalization=normalization)}, {"": 1.0}
    texts = {name: list(its) for name, its in _read_sources(store_of(checkpoint), data, limit).items()}
    if not any(texts.values()):
        raise TextgenError(f"`{data}` holds no documents")
    return texts, {source.name: source.weight for source in _settings_of(checkpoint).data.sources} or {"": 1.0}


def documents_to_score(
    checkpoint: Path | None, data: str, settings: DataConfig, *, limit: int | None, normalization: str
) -> Iterator[str]:
    """Yield documents of files, or of a split of the data that a checkpoint was trained on.

    They carry their labels if `settings` or the training ask for them, see `label_of`.

    Args:
        checkpoint: its directory; None for a model without a record of its training text.
        data: a file, folder or glob, or a split.
        settings: how files are read.
        limit: the first ones only; of a split, those of each source.
        normalization: the one of the model's training text.

    Raises:
        TextgenError, CheckpointError: there are no documents, or they cannot be read.
    """
    if data in SPLITS:
        if checkpoint is None:
            raise TextgenError(f"the model has no record of its training text: give `--data` a file, not `{data}`")
        texts: Iterator[str] = chain.from_iterable(_read_sources(store_of(checkpoint), data, limit).values())
    else:
        documents = (text for text in read_documents([data], settings) if text.strip())
        texts = islice((copy_label(normalize(text, normalization), text) for text in documents), limit)
    text = None
    for text in texts:
        yield text
    if text is None:
        raise TextgenError(f"`{data}` holds no documents")


def read_split(store: TokenStore, name: str) -> Iterator[str]:
    """Yield the texts of a split's documents, with their labels if the store has labels."""
    return chain.from_iterable(_read(store, part) for part in store.parts(name))


def _read_sources(store: TokenStore, split: str, limit: int | None) -> dict[str, Iterator[str]]:
    """Return the first documents of a split by source; a single source has the name ""."""
    if not store.sources:
        return {"": islice(read_split(store, split), limit)}
    return {name: islice(_read(store, part), limit) for name, part in store.split_by_source(split).items()}


def _read(store: TokenStore, split: Split) -> Iterator[str]:
    first = store.tokenizer.vocab_size
    for i in range(split.num_documents):  # documents end with the end-of-text token, which decodes to nothing
        text = store.tokenizer.decode(split.document(i).tolist())
        if split.begin_ids is None:
            yield text
        else:
            place = int(split.begin_ids[i]) - first
            yield labelled(text, store.labels[place] if place >= 0 else None)


def store_of(checkpoint: Path) -> TokenStore:
    """Return the tokens that a checkpoint was trained on; they are encoded again if they are gone.

    Raises:
        CheckpointError, TextgenError: it does not name its data, or the data cannot be read.
    """
    config = _settings_of(checkpoint)
    tokenizer = config.tokenizer
    if tokenizer.path is not None:  # the checkpoint has the same one, and that file may be gone
        tokenizer = replace(tokenizer, path=str(checkpoint))
    return prepare_store(config.data, tokenizer)


def _settings_of(checkpoint: Path) -> TrainConfig:
    """Return settings with the data and the tokenizer of a checkpoint's training."""
    path = checkpoint / TRAINER_NAME
    try:
        settings = complete_record(read_json(path)["config"])
        return build_settings(TrainConfig, {"data": settings["data"], "tokenizer": settings["tokenizer"]})
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"`{path}` has no settings of data: {error}") from error
