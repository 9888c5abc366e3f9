"""Several sources as one corpus: each is opened, cleaned and split by its own settings, and they follow each other."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from textgen.config import DataConfig
from textgen.data.corpus import CleanCorpus, Corpus, Hashes, clean_corpus, leave_out, open_corpus
from textgen.data.labels import NO_LABEL, Labels, natural_key
from textgen.errors import TextgenError

logger = logging.getLogger("textgen")


def open_sources(config: DataConfig) -> Corpus:
    """Open the source of a config, or all of its `sources`, and log which they are.

    Raises:
        TextgenError: as `open_corpus`; the message names the source.
    """
    if not config.sources:
        return open_corpus(config)
    corpora = {}
    for source in config.sources:
        with _named(source.name):
            corpora[source.name] = open_corpus(config.of_source(source))
    fingerprints = [[name, corpus.fingerprint] for name, corpus in corpora.items()]
    return Corpus(
        description="; ".join(f"{name}: {corpus.description}" for name, corpus in corpora.items()),
        fingerprint=hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest(),
        splits={},
        sources=corpora,
    )


def clean_sources(corpus: Corpus, config: DataConfig) -> CleanCorpus:
    """Decide which documents of several sources are kept.

    Each source is cleaned as if it were the only one. Training then drops the documents that another source holds out
    for validation or test, and the long documents of which it holds out the end, unless their own source holds out the
    same end. A document that two sources train on is drawn from both.

    Args:
        corpus: the opened sources.
        config: the settings that they were opened with.

    Raises:
        TextgenError: as `clean_corpus`; the message names the source.
    """
    cleaned = {}
    for source in config.sources:
        with _named(source.name):
            its = config.of_source(source)
            cleaned[source.name] = clean_corpus(corpus.sources[source.name], its, keep_hashes=True)
    sources = {}
    for name, clean in cleaned.items():
        with _named(name):
            others = _held_out_by([its for other, its in cleaned.items() if other != name], clean)
            sources[name] = replace(leave_out(clean, others), hashes={}, cuts={})
        logger.info("`%s`: %s", name, ", ".join(f"{k.replace('_', ' ')} {n}" for k, n in sources[name].counts.items()))
    splits = [s for s in ("train", "validation", "test") if any(s in clean.digests for clean in sources.values())]
    counts: Counter[str] = Counter()
    for clean in sources.values():
        counts.update(clean.counts)
    names, labels = _join_labels(sources, splits)
    digests = {
        split: [[name, its.digests.get(split), its.counts.get(f"{split}_documents")] for name, its in sources.items()]
        for split in splits
    }
    return CleanCorpus(
        description=corpus.description,
        counts=counts,
        digests={split: hashlib.sha256(json.dumps(its).encode()).hexdigest() for split, its in digests.items()},
        _corpus=corpus,
        _parts={},
        _normalization=config.normalization,
        label_names=names,
        labels=labels,
        sources=sources,
    )


def _held_out_by(others: Sequence[CleanCorpus], clean: CleanCorpus) -> Hashes:
    """Return hashes of the documents that `clean` may not train on, since others hold out them or a part of them."""
    held_out = np.concatenate(
        [np.empty(0, dtype=np.uint64)]
        + [its.hashes[split] for its in others for split in ("validation", "test") if split in its.hashes]
    )
    # A document that is cut at the same place here and elsewhere stays: both hold out the same end.
    same = {whole: end for whole, (_, end) in clean.cuts.items()}
    cut = {whole for its in others for whole, (_, end) in its.cuts.items() if same.get(whole) != end}
    starts = [start for whole, (start, _) in clean.cuts.items() if whole in cut or whole in held_out]
    return np.concatenate([held_out, np.array([*cut, *starts], dtype=np.uint64)])


def _join_labels(sources: Mapping[str, CleanCorpus], splits: list[str]) -> tuple[tuple[str, ...], dict[str, Labels]]:
    """Return the labels of all sources in natural order, and those of the documents of each split."""
    names = tuple(sorted({name for clean in sources.values() for name in clean.label_names}, key=natural_key))
    place_of = {name: place for place, name in enumerate(names)}
    labels: dict[str, Labels] = {}
    for split in splits if names else ():
        parts = []
        for clean in sources.values():
            # NO_LABEL is -1, the place of the last element
            places = np.array([*(place_of[name] for name in clean.label_names), NO_LABEL], dtype=np.int32)
            count = clean.counts.get(f"{split}_documents", 0)
            parts.append(places[clean.labels.get(split, np.full(count, NO_LABEL))])
        labels[split] = np.concatenate(parts)
    return names, labels


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Name the source in errors."""
    try:
        yield
    except TextgenError as error:
        raise TextgenError(f"source `{source}`: {error}") from error
