"""The token store: an encoded corpus on disk, written once and memory-mapped by every process.

A split is one array of token ids with document offsets.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textgen.config import DataConfig, TokenizerConfig
from textgen.console import Progress
from textgen.data.corpus import CleanCorpus, Corpus, clean_corpus
from textgen.data.labels import NO_LABEL, Labels
from textgen.data.mixture import clean_sources, open_sources
from textgen.data.remote import RemoteShards
from textgen.data.shards import ORDER, Shard, Shards
from textgen.data.split import Split, map_array
from textgen.errors import TextgenError, first_line, in_backticks
from textgen.files import write_atomic
from textgen.runs.lock import FileLock
from textgen.storage.address import is_address, protocol_of
from textgen.storage.remote_folder import RemoteFolder
from textgen.tokenizer import MODEL_NAME, Tokenizer, train_tokenizer
from textgen.tokenizer.trainer import MAX_TRAINING_BYTES

log = logging.getLogger("textgen")

STORE_FORMAT = 2
SHARDS_FORMAT = 3  # of a store in shards, which versions that know no shards refuse
STORE_NAME = "store.json"
MAX_RECORD_BYTES = 1 << 28  # of a store.json at an address: a million shards
UNIGRAM_NAME = "unigram.int64"
# At a time in a thread, whose check takes some 60 bytes a token. Half was as fast, four times as much 5 % slower.
ENCODE_BATCH, ENCODE_CHARACTERS = 512, 1 << 18
MAX_ENCODE_THREADS = 16  # more would wait for the texts, which one thread reads


# --- the store -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenStore:
    """An encoded corpus in a directory.

    Attributes:
        directory: the folder of the store, or the cache of a store at an address.
        record: what `store.json` holds: source, counts, digests, sizes of the splits.
        folder: where the shards are, of a store at an address.
        cache_bytes: how many bytes of them the cache may hold.
    """

    directory: Path
    record: dict[str, Any]
    folder: RemoteFolder | None = None
    cache_bytes: int = 0

    @classmethod
    def open(cls, directory: str | Path) -> TokenStore:
        """Open a store in a folder, without reading its tokens.

        Raises:
            TextgenError: the store is missing, damaged or incomplete.
        """
        directory = Path(directory).expanduser()
        try:
            record = _parse_record((directory / STORE_NAME).read_bytes(), str(directory))
        except OSError as error:
            raise TextgenError(f"`{directory}` is not a token store: no readable `{STORE_NAME}`") from error
        store = cls(directory, record)
        store._check_files()
        return store

    @classmethod
    def open_remote(cls, address: str, cache: Path, *, cache_bytes: int) -> TokenStore:
        """Open a store in shards at an address: fetch all but its shards. Every process may call this at once.

        Args:
            address: of the store.
            cache: folder of the stores' caches. The one of this store has the name of its `store.json`'s hash.
            cache_bytes: how many bytes of shards the cache may hold.

        Raises:
            TextgenError: the store is missing, damaged or not in shards, or cannot be fetched.
        """
        folder = RemoteFolder(address)
        content = folder.read(STORE_NAME, limit=MAX_RECORD_BYTES)
        record = _parse_record(content, str(folder))
        directory = cache / hashlib.sha256(content).hexdigest()[:16]
        directory.mkdir(parents=True, exist_ok=True)
        store = cls(directory, record, folder, cache_bytes)
        try:
            if store.shards is None:
                raise TextgenError(f"`{folder}` is not in shards: make a store with `textgen prepare --shards N`")
            files = {path.name: size for path, size in store._whole_files()}
            hashes = {MODEL_NAME: record["tokenizer"]} | record.get("files", {})
        except (KeyError, TypeError, AttributeError) as error:
            raise TextgenError(f"`{folder}/{STORE_NAME}` is damaged: {first_line(error)}") from error
        lock = FileLock(directory / "open.lock")
        lock.acquire(seconds=None)
        with lock.hold():
            for name in [MODEL_NAME, *files]:
                path, size = directory / name, files.get(name)
                if not path.exists() or size not in (None, path.stat().st_size):
                    folder.fetch(name, path, size=size, sha256=hashes.get(name))
            write_atomic(directory / STORE_NAME, [content])
        store._check_files()
        return store

    def _check_files(self) -> None:
        """Raise TextgenError unless the files have their sizes and the tokenizer is the right one."""
        shards = self.shards.records if self.shards is not None and self.folder is None else ()
        in_shards = [(self.directory / shard.name, shard.size) for shard in shards]
        for path, size in [*self._whole_files(), *in_shards]:
            seen = path.stat().st_size if path.exists() else 0
            if seen != size or not path.exists():
                raise TextgenError(f"`{path}` is damaged: {seen} bytes, wanted {size}")
        path = self.directory / MODEL_NAME
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != self.record["tokenizer"]:
            raise TextgenError(f"`{path}` is damaged: not the tokenizer that the store was made with")

    @property
    def location(self) -> str:
        """The address of the store, or its folder, as `data.store` takes it."""
        return str(self.folder or self.directory)

    @property
    def key(self) -> str:
        """Hash of everything the tokens depend on: text, tokenizer, settings."""
        return str(self.record["key"])

    @property
    def training_key(self) -> str:
        """Hash of what a training depends on: the tokens of train and validation, whatever source they came from."""
        digests, of_labels = self.record["digests"], self.record.get("label_digests", {})
        wanted = [of_labels[split] for split in ("train", "validation") if split in of_labels]
        if self.shards is not None:
            wanted += [self.order, *(shard.sha256 for shard in self.shards.records)]
        return _digest(self.record["tokenizer"], digests["train"], digests.get("validation", ""), *wanted)

    @property
    def order(self) -> str:
        """Name of the order in which a training reads the documents: `documents`, or `shards`."""
        return str(self.record.get("order", "documents"))

    @cached_property
    def shards(self) -> Shards | None:
        """The shards of the train split; None if it is not in shards.

        Raises:
            TextgenError: their records are damaged.
        """
        if self.order == "documents":
            return None
        if self.order != ORDER:
            raise TextgenError(f"`{self.directory}` has the order `{self.order}`, wanted `documents` or `{ORDER}`")
        try:
            records = [Shard.parse(record) for record in self.record["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise TextgenError(f"`{self.directory / STORE_NAME}` is damaged: {error}") from error
        kind = {"dtype": self.record["dtype"], "has_labels": bool(self.labels)}
        if self.folder is not None:
            return RemoteShards(self.folder, self.directory, records, **kind, cache_bytes=self.cache_bytes)
        return Shards(self.directory, records, **kind)

    @property
    def train(self) -> Split | Shards:
        """The train split, whole or in shards."""
        return self.split("train") if self.shards is None else self.shards

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels that documents have; () for a store without labels."""
        return tuple(self.record.get("labels", ()))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the store was made with."""
        return Tokenizer.from_file(self.directory / MODEL_NAME)

    def bytes_per_token(self, split: str) -> float:
        """Return UTF-8 bytes of a split per token of it, its end-of-text tokens included."""
        sizes = self.record["splits"][split]
        return float(sizes["bytes"] / sizes["tokens"])

    @property
    def unigram_counts(self) -> Tensor:
        """How often each token occurs in the train split: (vocab_size,) int64."""
        return torch.from_numpy(np.fromfile(self.directory / UNIGRAM_NAME, dtype=np.int64))

    def split(self, name: str) -> Split:
        """Map a split that is not in shards into memory.

        Raises:
            TextgenError: the store has no such split.
        """
        if name not in self.record["splits"]:
            have = ", ".join(f"`{s}`" for s in self.record["splits"])
            raise TextgenError(f"the data has no split `{name}`; it has {have}")
        assert name != "train" or self.shards is None
        return Split(*(map_array(path) for path, _ in self._files(name)))

    def parts(self, name: str) -> Iterator[Split]:
        """Map the parts of a split into memory one after the other: its shards, or the split as the only one.

        Raises:
            TextgenError: as `split`, or a shard is missing or damaged.
        """
        if name == "train" and self.shards is not None:
            for index in range(len(self.shards)):
                self.shards.expect(range(index + 1, len(self.shards)))
                yield self.shards.split(index)
        else:
            yield self.split(name)

    @property
    def sources(self) -> dict[str, dict[str, dict[str, int]]]:
        """The sizes of the splits of each of several sources by name; {} for a store of one source."""
        return dict(self.record.get("sources", {}))

    def split_by_source(self, name: str) -> dict[str, Split]:
        """Map a split into memory, in the parts that come from each of several sources that have this split."""
        split, first, parts = self.split(name), 0, {}
        for source, sizes in self.sources.items():
            if name in sizes:
                parts[source] = split.part(first, sizes[name]["documents"])
                first += sizes[name]["documents"]
        return parts

    def _whole_files(self) -> list[tuple[Path, int]]:
        """Return path and size of all files but the tokenizer and the shards."""
        splits = [name for name in self.record["splits"] if name != "train" or self.shards is None]
        unigram = (self.directory / UNIGRAM_NAME, self.record["vocab_size"] * 8)
        return [unigram, *(file for name in splits for file in self._files(name))]

    def _files(self, split: str) -> list[tuple[Path, int]]:
        """Return path and size of a split's files: tokens, offsets, bytes of each document, and its first input."""
        sizes = self.record["splits"][split]
        documents, dtype = sizes["documents"], np.dtype(self.record["dtype"])
        files = [
            (self.directory / f"{split}.tokens.{dtype}", sizes["tokens"] * dtype.itemsize),
            (self.directory / f"{split}.offsets.int64", (documents + 1) * 8),
            (self.directory / f"{split}.bytes.uint32", documents * 4),
        ]
        return files + ([(self.directory / f"{split}.begins.uint32", documents * 4)] if self.labels else [])


def _parse_record(content: bytes, where: str) -> dict[str, Any]:
    """Return what a `store.json` holds.

    Raises:
        TextgenError: it is not one, or of another format.
    """
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TextgenError(f"`{where}` is not a token store: no readable `{STORE_NAME}`") from error
    seen = record.get("format") if isinstance(record, dict) else None
    if seen not in (STORE_FORMAT, SHARDS_FORMAT):
        raise TextgenError(f"`{where}` is a token store of format {seen}, wanted {STORE_FORMAT} or {SHARDS_FORMAT}")
    return dict(record)


def open_store(data: DataConfig) -> TokenStore:
    """Open the store that `data.store` names, in a folder or at an address.

    Raises:
        TextgenError: it cannot be used, or has other sources than `data.sources`.
    """
    assert data.store is not None
    if is_address(data.store) and protocol_of(data.store) != "file":
        cache = _make_cache(data.cache_dir) / "remote"
        store = TokenStore.open_remote(data.store, cache, cache_bytes=int(data.store_cache_gib * 2**30))
    else:
        store = TokenStore.open(data.store.removeprefix("file://"))
    check_sources(data, store)
    return store


def prepare_store(
    data: DataConfig, tokenizer: TokenizerConfig, *, corpus: Corpus | None = None, progress: bool = True
) -> TokenStore:
    """Return the token store of a corpus, encoding it first if there is none.

    Every process may call this at once: one prepares while the others wait at a file lock, outside any collective. With
    `data.shards` they share the encoding (see `sharding`).
    Stores are keyed by content. A small index from the source's fingerprint (file sizes and times, package version)
    to that key spares later calls reading the text at all.

    Args:
        data: the source and its settings.
        tokenizer: the settings of the tokenizer.
        corpus: the opened source; None to open that of `data`.
        progress: show how far the encoding is.

    Raises:
        TextgenError, TokenizerError: the text or a setting cannot be used.
    """
    if data.store is not None:
        if data.source == "memory" and not Path(data.store).exists():
            raise TextgenError(
                f"the texts were given in Python, and their encoding `{data.store}` is gone: `textgen.train` with the "
                "same texts makes it again"
            )
        store = open_store(data)
        _name_unused(data, tokenizer)
        return store
    cache = _make_cache(data.cache_dir)
    corpus = corpus or open_sources(data)
    own, wanted = _wanted(tokenizer)
    index = _index_path(data, corpus, wanted)
    if data.shards is not None:
        from textgen.data.sharding import prepare_shards  # which imports this module

        return prepare_shards(data, tokenizer, corpus, index=index, wanted=wanted, own=own, progress=progress)
    with exclusive(cache / "prepare.lock") as require:
        if (found := open_prepared(cache, index)) is not None:
            log.info("%s: encoded earlier, in `%s`", corpus.description, found.directory)
            return found
        clean = clean_sources(corpus, data) if corpus.sources else clean_corpus(corpus, data)
        key = store_key(clean, wanted)
        directory = cache / key[:16]
        try:
            store = TokenStore.open(directory)
        except TextgenError:
            store = _write_store(directory, key, data, clean, own, tokenizer, progress=progress, require=require)
        index.parent.mkdir(exist_ok=True)
        index.write_text(directory.name, encoding="utf-8")
    return store


def check_sources(data: DataConfig, store: TokenStore) -> None:
    """Raise TextgenError unless a store that is given has the sources whose weights are given."""
    have, given = sorted(store.sources), sorted(source.name for source in data.sources)
    if have != given:
        raise TextgenError(
            f"`{data.store}` holds {in_backticks(have) if have else 'one source without a name'}, and `data.sources`, "
            f"which gives the weights, has {in_backticks(given) if given else 'none'}"
        )


def _name_unused(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    """Log the settings of source and tokenizer that were given beside a store, which is encoded already."""
    used = ("store", "store_cache_gib", "source", "sources", "cache_dir", "reading_rules")
    names = [
        f"{group}.{name}"
        for group, settings, usual in (("data", data, DataConfig()), ("tokenizer", tokenizer, TokenizerConfig()))
        for name, value in asdict(settings).items()
        if name not in used and value != getattr(usual, name)
    ]
    if names and data.source != "memory":
        log.info("`%s` holds encoded text, so these settings are not used: %s", data.store, in_backticks(names))


def _make_cache(directory: str) -> Path:
    """Make the folder of token stores; a home may be read-only or missing."""
    try:
        cache = Path(directory).expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TextgenError(
            f"`{directory}` cannot be written: {reason}; name another folder for encoded text: `--data.cache_dir`"
        ) from error


def find_prepared(data: DataConfig, tokenizer: TokenizerConfig, corpus: Corpus) -> TokenStore | None:
    """Return the token store that `prepare_store` has made of a corpus; None if it is missing or damaged."""
    index = _index_path(data, corpus, _wanted(tokenizer)[1])
    return open_prepared(Path(data.cache_dir).expanduser(), index)


def open_prepared(cache: Path, index: Path) -> TokenStore | None:
    if not index.exists():
        return None
    try:
        return TokenStore.open(cache / index.read_text(encoding="utf-8"))
    except ValueError as error:  # a TextgenError, or an index that is no text
        log.warning("%s: encoding again", error)
        return None


def _wanted(tokenizer: TokenizerConfig) -> tuple[Tokenizer | None, str]:
    """Return the tokenizer that is given, if one is, and what tells the wanted one from others."""
    own = Tokenizer.from_file(tokenizer.path) if tokenizer.path else None
    trainer = f"sentencepiece {importlib.metadata.version('sentencepiece')}"  # other versions make other pieces
    return own, own.sha256 if own else f"{tokenizer.model_type} {tokenizer.vocab_size} {trainer}"


def store_key(clean: CleanCorpus, wanted: str, *, shards: int | None = None) -> str:
    """Return the key of the store of a corpus; `wanted` tells its tokenizer from others."""
    digests = sorted(clean.digests.items()) + sorted(clean.label_digests.items())
    parts = [f"{k} {v}" for k, v in digests]
    if shards is None:
        return _digest(str(STORE_FORMAT), wanted, *parts)
    return _digest(str(SHARDS_FORMAT), wanted, *parts, f"shards {shards}")


def _index_path(data: DataConfig, corpus: Corpus, wanted: str) -> Path:
    shards = [] if data.shards is None else [f"shards {data.shards}"]
    return Path(data.cache_dir).expanduser() / "index" / _digest(corpus.fingerprint, wanted, *shards)


@contextmanager
def exclusive(path: Path) -> Iterator[Callable[[], None]]:
    """Hold a file lock; say so where another process holds it. Yields a function that raises if the lock was lost."""
    lock = FileLock(path)
    if not lock.try_acquire():
        log.info("waiting for another process to prepare its text: `%s`", path)
        lock.acquire(seconds=None)
    with lock.hold():
        yield lock.require


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write_store(
    directory: Path,
    key: str,
    data: DataConfig,
    clean: CleanCorpus,
    own: Tokenizer | None,
    config: TokenizerConfig,
    *,
    progress: bool,
    require: Callable[[], None],
) -> TokenStore:
    """Encode all splits into a temporary directory and rename it, so that a store is whole or not there."""
    for left in directory.parent.glob(f"{directory.name}.*.tmp"):  # of killed processes: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    aside = directory.with_name(f"{directory.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.mkdir()
        started = time.perf_counter()
        own = own or tokenizer_of(clean, config)
        own.save(aside / MODEL_NAME)
        splits = {
            name: write_split(
                aside, name, clean.documents(name), own, num_documents=clean.counts.get(f"{name}_documents"),
                labels=clean.labels.get(name), progress=progress,
            )
            for name in clean.digests
        }  # fmt: skip
        record = store_record(key, data, clean, own, splits)
        if clean.sources:
            record["sources"] = _source_sizes(aside, clean)
        (aside / STORE_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        require()
        shutil.rmtree(directory, ignore_errors=True)  # a damaged one
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log.info("encoded in %.0f s into `%s`", time.perf_counter() - started, directory)
    return TokenStore.open(directory)


def tokenizer_of(clean: CleanCorpus, config: TokenizerConfig) -> Tokenizer:
    """Train the tokenizer of a corpus."""
    started = time.perf_counter()
    log.info("training a %s tokenizer of %d pieces", config.model_type, config.vocab_size)
    texts = _tokenizer_texts(clean)
    tokenizer = Tokenizer(train_tokenizer(texts, vocab_size=config.vocab_size, model_type=config.model_type))
    log.info("trained it in %.0f s", time.perf_counter() - started)
    return tokenizer


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Return the dtype of the tokens in a store."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def store_record(
    key: str, data: DataConfig, clean: CleanCorpus, tokenizer: Tokenizer, splits: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Return what `store.json` says of every store."""
    record = {
        "format": STORE_FORMAT, "key": key, "source": clean.description,
        "normalization": data.normalization, "counts": dict(clean.counts), "digests": dict(clean.digests),
        "tokenizer": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "dtype": str(token_dtype(tokenizer)),
        "splits": splits,
    }  # fmt: skip
    if clean.label_names:
        record |= {"labels": list(clean.label_names), "label_digests": clean.label_digests}
    return record


def _tokenizer_texts(clean: CleanCorpus) -> Iterator[str]:
    """Yield the texts to train a tokenizer on: all of train, but of each of several sources an equal part at most.

    The trainer stops after `MAX_TRAINING_BYTES`, and would not get to the last sources.
    """
    if not clean.sources:
        yield from clean.documents("train")
    for source in clean.sources.values():
        left = MAX_TRAINING_BYTES // len(clean.sources)
        for text in source.documents("train"):
            yield text
            left -= len(text.encode())
            if left <= 0:
                break


def _source_sizes(directory: Path, clean: CleanCorpus) -> dict[str, dict[str, dict[str, int]]]:
    """Return documents, tokens and bytes of the splits of each source, whose documents follow each other in a split."""
    sizes: dict[str, dict[str, dict[str, int]]] = {name: {} for name in clean.sources}
    for split in clean.digests:
        offsets, num_bytes = (
            map_array(directory / f"{split}.offsets.int64"),
            map_array(directory / f"{split}.bytes.uint32"),
        )
        first = 0
        for name, source in clean.sources.items():
            if count := source.counts.get(f"{split}_documents", 0):
                last = first + count
                tokens, total = int(offsets[last] - offsets[first]), int(num_bytes[first:last].sum(dtype=np.int64))
                sizes[name][split] = {"documents": count, "tokens": tokens, "bytes": total}
                first = last
    return sizes


def write_split(
    directory: Path,
    name: str,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    num_documents: int | None = None,
    labels: Labels | None = None,
    progress: bool = False,
) -> dict[str, int]:
    """Encode documents into the files of a split; return its sizes.

    Args:
        directory: gets the files.
        name: of the split; for `train` the unigram counts are written too.
        texts: the documents.
        tokenizer: encodes them.
        num_documents: for the progress bar.
        labels: of the documents; None for a corpus without labels.
        progress: show how far the encoding is.
    """
    total, num_bytes, num_done, dtype = 0, 0, 0, token_dtype(tokenizer)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    with (
        open(directory / f"{name}.tokens.{dtype}", "wb") as tokens,
        open(directory / f"{name}.offsets.int64", "wb") as offsets,
        open(directory / f"{name}.bytes.uint32", "wb") as sizes,
        Progress(f"encoded {name} document", num_documents, show=progress) as bar,
    ):
        offsets.write(np.int64(0).tobytes())
        for batch, encoded in encode_batches(tokenizer, texts):
            flat = np.concatenate(encoded).astype(dtype)
            ends = total + np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
            lengths = np.array([len(text.encode()) for text in batch], dtype=np.uint32)
            for file, values in ((tokens, flat), (offsets, ends), (sizes, lengths)):
                file.write(values.data)  # numpy's `tofile` on a full disk raises an OSError that does not say so
            counts += np.bincount(flat, minlength=tokenizer.vocab_size)
            total, num_bytes, num_done = int(ends[-1]), num_bytes + int(lengths.sum()), num_done + len(batch)
            bar.update(num_done)
    if labels is not None:
        begin_ids = np.where(labels == NO_LABEL, tokenizer.eos_id, labels + tokenizer.vocab_size).astype(np.uint32)
        (directory / f"{name}.begins.uint32").write_bytes(begin_ids.data)
    if name == "train":
        (directory / UNIGRAM_NAME).write_bytes(counts.data)
    return {"documents": num_done, "tokens": total, "bytes": num_bytes}


def encode_batches(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[list[str], list[NDArray[np.int64]]]]:
    """Yield a few texts at a time, in order, with their ids: encoded on all cores while the next ones are read.

    Raises:
        TextgenError: as `encode_documents`.
    """
    num_threads = min(os.cpu_count() or 1, MAX_ENCODE_THREADS)
    waiting: deque[tuple[list[str], Future[list[NDArray[np.int64]]]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for batch in _in_batches(texts):
            waiting.append((batch, pool.submit(encode_documents, tokenizer, batch, num_threads=1)))
            if len(waiting) > num_threads:  # bounds the texts that are held
                first, encoded = waiting.popleft()
                yield first, encoded.result()
        for first, encoded in waiting:
            yield first, encoded.result()


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], *, num_threads: int | None = None
) -> list[NDArray[np.int64]]:
    """Encode texts, on all cores unless `num_threads` says otherwise, each with the end-of-text token after it.

    Raises:
        TextgenError: a text does not come back from its tokens; with a lossless tokenizer that cannot be.
    """
    encoded = tokenizer.encode_batch(texts, num_threads=num_threads or os.cpu_count() or 1)
    documents = [np.append(ids, tokenizer.eos_id).astype(np.int64) for ids in encoded]
    if not tokenizer.is_lossless or not texts:
        return documents
    utf8, ends = tokenizer.utf8_of(np.concatenate(documents))
    start = 0
    for text, end in zip(texts, ends[np.cumsum([len(ids) for ids in documents]) - 1], strict=True):
        if utf8[start:end] != text.encode():
            raise TextgenError(f"the tokenizer loses text of the document that starts {text[:40]!r}")
        start = end
    return documents


def _in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in lists of ENCODE_BATCH, or fewer long ones."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == ENCODE_BATCH or size > ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
