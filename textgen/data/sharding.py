"""Preparing a store in shards, by any number of processes that share the work.

The same command is started any number of times, on one machine or on several with a common disk. One process reads the
text and decides which documents are kept, and trains the tokenizer; the others wait. Then every process reads the text
once and encodes what no other one has claimed:

- the held-out splits;
- *blocks* of the documents of train, which follow each other in the text;
- shards: shard i of N is made of the blocks i, i + N, i + 2N and so on, so that each is a sample of the whole text.

A claim is a file lock, and ends with its holder. What is claimed is written aside and then renamed, so it is whole or
not there, and its content depends on the text and the settings alone. So a process may be killed at any time, and what
it has finished stays. A block has the hashes of its files, which are compared before it is used: a disk may have lost
its bytes. The last step writes `store.json` and gives the folder the name of the store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from textgen.config import DataConfig, TokenizerConfig
from textgen.console import Progress
from textgen.data.corpus import CleanCorpus, Corpus, clean_corpus
from textgen.data.plan import read_plan, remove_plan, save_plan
from textgen.data.shards import DTYPE_NAMES, ORDER, Shard
from textgen.data.split import map_array
from textgen.data.store import (
    SHARDS_FORMAT,
    STORE_NAME,
    UNIGRAM_NAME,
    TokenStore,
    exclusive,
    open_prepared,
    store_key,
    store_record,
    token_dtype,
    tokenizer_of,
    write_split,
)
from textgen.errors import BrokenSourceError, TextgenError
from textgen.files import fsync_path, write_atomic
from textgen.runs.lock import FileLock
from textgen.runs.tensors import build_header
from textgen.storage.remote_folder import hash_file
from textgen.tokenizer import MODEL_NAME, Tokenizer

log = logging.getLogger("textgen")

PARTS = "parts"  # folder of what is not in the finished store: blocks, locks
HASHES_NAME = "hashes"  # of the documents of a block
SUMS_NAME = "sums.json"  # sha256 of each file of a block
# More blocks mix the text better; a larger block is encoded by more cores at a time.
BLOCKS_PER_SHARD, MAX_BLOCK_DOCUMENTS = 8, 1 << 15


def prepare_shards(
    data: DataConfig,
    config: TokenizerConfig,
    corpus: Corpus,
    *,
    index: Path,
    wanted: str,
    own: Tokenizer | None,
    progress: bool,
) -> TokenStore:
    """Return the store of a corpus in `data.shards` shards, encoding it first, with other processes that do the same.

    Args:
        data: the source and its settings.
        config: the settings of the tokenizer.
        corpus: the opened source.
        index: the file that names the store of this corpus.
        wanted: tells the tokenizer from others.
        own: the tokenizer, if it is given.
        progress: show how far the encoding is.

    Raises:
        TextgenError, TokenizerError: the text or a setting cannot be used.
    """
    cache, plan = index.parent.parent, index.with_name(f"{index.name}.plan")
    try:
        with exclusive(cache / "prepare.lock"):
            if (found := open_prepared(cache, index)) is not None:
                log.info("%s: encoded earlier, in `%s`", corpus.description, found.directory)
                return found
            work = _begin(data, config, corpus, plan, wanted=wanted, own=own)
        store = work.open_store() or _encode(work, data, progress=progress)
    except BrokenSourceError:
        raise  # the next start goes on with the plan
    except TextgenError:
        remove_plan(plan)  # perhaps the text has changed since
        raise
    write_atomic(index, store.directory.name)
    remove_plan(plan)
    return store


def _begin(
    data: DataConfig, config: TokenizerConfig, corpus: Corpus, plan: Path, *, wanted: str, own: Tokenizer | None
) -> _Work:
    """Decide which documents are kept and make the tokenizer, unless a process has done so; return the work."""
    assert data.shards is not None
    plan.parent.mkdir(exist_ok=True)
    clean = read_plan(plan, corpus)
    if clean is None:
        clean = clean_corpus(corpus, data)
        if clean.counts["train_documents"] < data.shards:
            raise TextgenError(
                f"`data.shards` is {data.shards}, and there are {clean.counts['train_documents']} documents to train "
                "on: give at most so many shards"
            )
        save_plan(plan, clean)
    key = store_key(clean, wanted, shards=data.shards)
    work = _Work(plan.parent.parent / key[:16], key, clean, data.shards)
    if work.open_store() is None:
        if not work.parts.exists():
            _name_others(work.aside)
        work.parts.mkdir(parents=True, exist_ok=True)
        if not (work.aside / MODEL_NAME).exists():
            (own or tokenizer_of(clean, config)).save(work.aside / MODEL_NAME)
    return work


def _encode(work: _Work, data: DataConfig, *, progress: bool) -> TokenStore:
    """Do the work with other processes, and return the store that one of them finishes."""
    started = time.perf_counter()
    try:
        work.do(progress=progress)
    except FileNotFoundError:  # another process has finished the store, and removed the parts
        if work.open_store() is None:
            raise
    with exclusive(work.directory.parent / "prepare.lock"):
        store = work.open_store() or _finish(work, data)
    log.info("encoded in %.0f s into `%s`", time.perf_counter() - started, store.directory)
    return store


@dataclass(frozen=True)
class _Work:
    """The work on a store: what is done is in files, which all processes see."""

    directory: Path
    """of the finished store"""
    key: str
    clean: CleanCorpus
    num_shards: int

    @property
    def aside(self) -> Path:
        """Folder that becomes the store."""
        return self.directory.with_name(f"{self.directory.name}.work")

    @property
    def parts(self) -> Path:
        """Folder of what is not in the finished store."""
        return self.aside / PARTS

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the store."""
        return Tokenizer.from_file(self.aside / MODEL_NAME)

    @property
    def block_documents(self) -> int:
        """Number of documents in a block; the last one may have fewer."""
        fitting = self.clean.counts["train_documents"] // (self.num_shards * BLOCKS_PER_SHARD)
        return max(1, min(fitting, MAX_BLOCK_DOCUMENTS))

    @cached_property
    def blocks(self) -> list[Path]:
        """The folders of the blocks in their order."""
        num_blocks = -(-self.clean.counts["train_documents"] // self.block_documents)
        return [self.parts / f"block-{number:07}" for number in range(num_blocks)]

    @cached_property
    def shards(self) -> list[Path]:
        """The files of the shards in their order."""
        return [self.aside / f"train-{index:05}.safetensors" for index in range(self.num_shards)]

    @property
    def held_out(self) -> list[Path]:
        """The files that hold sizes and hashes of the splits besides train, written when a split is done."""
        return [self.parts / f"{split}.json" for split in self.clean.digests if split != "train"]

    def open_store(self) -> TokenStore | None:
        """Return the finished store; None if it is not there, or is damaged."""
        try:
            return TokenStore.open(self.directory)
        except TextgenError:
            return None

    def do(self, *, progress: bool) -> None:
        """Do what is left to do, together with other processes; return when all of it is done."""
        self._do_held_out(self.held_out)
        blocks = self.blocks
        self._share(blocks, lambda left: self._do_blocks(blocks, left, progress=progress))
        self._share(self.shards, self._do_shards)
        self._share(self.held_out, self._do_held_out)

    def _share(self, results: list[Path], do: Callable[[list[Path]], None]) -> None:
        """Have results made: by `do`, which leaves out what others have claimed, or by those others."""
        while left := [path for path in results if not path.exists()]:
            do(left)
            for path in left:
                if not path.exists():
                    lock = self._lock(path)
                    if not lock.try_acquire():
                        log.info("waiting for another process to write `%s`", path)
                        lock.acquire(seconds=None)
                    lock.release()
                    break  # the other process has done it, or has ended and left it to us

    def _lock(self, result: Path) -> FileLock:
        return FileLock(self.parts / f"{result.name}.lock")

    @contextmanager
    def _claim(self, result: Path) -> Iterator[bool]:
        """Claim a result. Yields whether this process is to make it: if it is not there, and nobody else has it."""
        lock = self._lock(result)
        if result.exists() or not lock.try_acquire():
            yield False
            return
        with lock.hold():
            yield not result.exists()

    def _do_held_out(self, results: list[Path]) -> None:
        for result in results:
            with self._claim(result) as is_ours:
                if is_ours:
                    self._write_held_out(result)

    def _write_held_out(self, result: Path) -> None:
        split = result.stem
        with _aside_of(result) as aside:
            sizes = self._write_split(aside, split, self.clean.documents(split))
            sums = _hash_files(aside)
            _sync_files(aside)
            for path in aside.iterdir():
                path.replace(self.aside / path.name)
            write_atomic(result, json.dumps({"sizes": sizes, "sums": sums}))

    def read_held_out(self, result: Path) -> dict[str, Any]:
        """Return sizes and hashes of a split that is done; it is encoded again if its files are damaged."""
        record: dict[str, Any] = json.loads(result.read_bytes())
        if not _are_whole(self.aside, record["sums"]):
            log.warning("the files of `%s` in `%s` are damaged: encoding them again", result.stem, self.aside)
            self._write_held_out(result)
        return record

    def _write_split(self, directory: Path, split: str, texts: Iterable[str], **more: Any) -> dict[str, int]:
        more.setdefault("labels", self.clean.labels.get(split))
        return write_split(directory, split, texts, self.tokenizer, **more)

    def _do_blocks(self, blocks: list[Path], left: list[Path], *, progress: bool) -> None:
        """Encode blocks that are left and that no other process has claimed, in one pass over the text."""
        documents, size, waiting = self.clean.hashed_documents("train"), self.block_documents, deque(left)
        with Progress("read train document", self.clean.counts["train_documents"], show=progress) as bar:
            for number, block in enumerate(blocks):
                while waiting and (waiting[0] < block or waiting[0].exists()):
                    waiting.popleft()
                if not waiting:
                    break
                texts = islice(documents, size)
                with self._claim(block) as is_ours:
                    if is_ours:
                        self._write_block(block, number * size, texts)
                deque(texts, maxlen=0)  # skips the block of another process
                bar.update((number + 1) * size)

    def _write_block(self, block: Path, first: int, documents: Iterator[tuple[bytes, str]]) -> None:
        labels = self.clean.labels.get("train")
        with _aside_of(block) as aside, (aside / HASHES_NAME).open("wb") as hashes:

            def texts() -> Iterator[str]:
                for hashed, text in documents:
                    hashes.write(hashed)
                    yield text

            own = None if labels is None else labels[first : first + self.block_documents]
            self._write_split(aside, "train", texts(), labels=own)
            hashes.close()
            (aside / SUMS_NAME).write_text(json.dumps(_hash_files(aside)), encoding="utf-8")
            _sync_files(aside)
            aside.rename(block)

    def _do_shards(self, left: list[Path]) -> None:
        wanted = set(left)
        for index, shard in enumerate(self.shards):
            if shard in wanted:
                with self._claim(shard) as is_ours:
                    if is_ours:
                        blocks = self.blocks[index :: self.num_shards]
                        self._mend(blocks)
                        self._write_shard(shard, blocks)

    def _mend(self, blocks: list[Path]) -> None:
        """Encode again those blocks of a shard that are damaged. The shard is claimed."""
        damaged = [block for block in blocks if not _is_whole(block)]
        for block in damaged:
            log.warning("`%s` is damaged: encoding it again", block)
            shutil.rmtree(block)
        self._share(damaged, lambda left: self._do_blocks(self.blocks, left, progress=False))

    def _write_shard(self, shard: Path, blocks: list[Path]) -> None:
        """Join blocks to a shard, and remove their tokens."""
        dtype = token_dtype(self.tokenizer)
        names = {"tokens": f"train.tokens.{dtype}", "offsets": "train.offsets.int64", "bytes": "train.bytes.uint32"}
        if self.clean.label_names:
            names["begins"] = "train.begins.uint32"
        items = {
            name: sum((block / file).stat().st_size for block in blocks) // np.dtype(file.rpartition(".")[2]).itemsize
            for name, file in names.items()
        }
        items["offsets"] -= len(blocks) - 1  # each block has a 0 in front
        header, order = build_header(
            {name: (DTYPE_NAMES[file.rpartition(".")[2]], (items[name],)) for name, file in names.items()}
        )
        digest, size = hashlib.sha256(), 0
        num_bytes = sum(int(map_array(block / names["bytes"]).sum(dtype=np.int64)) for block in blocks)

        def content() -> Iterator[bytes | memoryview]:
            yield header
            for name in order:
                start = 0
                for number, block in enumerate(blocks):
                    array = map_array(block / names[name])
                    if name == "offsets":
                        array = array[min(number, 1) :] + start  # one 0 in all
                        start = int(array[-1])
                    yield array.data.cast("B")

        def hashed() -> Iterator[bytes | memoryview]:
            nonlocal size
            for part in content():
                digest.update(part)
                size += len(part)
                yield part

        def write_record() -> None:
            record = Shard(shard.name, size, digest.hexdigest(), items["bytes"], items["tokens"], num_bytes)
            write_atomic(self.parts / f"{shard.name}.json", json.dumps(asdict(record)))

        write_atomic(shard, hashed(), require=write_record)  # the record is there when the shard is
        for block in blocks:
            for file in names.values():
                (block / file).unlink()


@contextmanager
def _aside_of(result: Path) -> Iterator[Path]:
    """Yield a new folder beside a result, which is removed at the end unless it was renamed."""
    aside = result.with_name(f"{result.name}.{secrets.token_hex(4)}.tmp")
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _hash_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a folder by name."""
    return {path.name: hash_file(path) for path in folder.iterdir()}


def _sync_files(folder: Path) -> None:
    """Wait until the files of a folder are on disk."""
    for path in folder.iterdir():
        fsync_path(path)


def _are_whole(folder: Path, sums: Mapping[str, str]) -> bool:
    """Return whether files of a folder have the sha256 that they had."""
    try:
        return all(hash_file(folder / name) == digest for name, digest in sums.items())
    except FileNotFoundError:
        return False


def _is_whole(block: Path) -> bool:
    try:
        return _are_whole(block, json.loads((block / SUMS_NAME).read_bytes()))
    except (FileNotFoundError, ValueError):
        return False


def _name_others(aside: Path) -> None:
    """Log the folders of other preparations that have not ended, and their sizes."""
    for other in sorted(aside.parent.glob("*.work")):
        size = 0
        for folder, _, names in os.walk(other):  # which passes over folders that vanish meanwhile
            for name in names:
                with suppress(FileNotFoundError):
                    size += os.stat(os.path.join(folder, name)).st_size
        log.info(
            "`%s` holds %.3g GB of a preparation that has not ended: remove it if you gave it up", other, size / 1e9
        )


def _finish(work: _Work, data: DataConfig) -> TokenStore:
    """Write the record of a store whose shards and splits are done, and give its folder the store's name."""
    clean, tokenizer = work.clean, work.tokenizer
    digest = hashlib.sha256(data.normalization.encode())
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for block in work.blocks:
        digest.update((block / HASHES_NAME).read_bytes())
        counts += map_array(block / UNIGRAM_NAME)
    if digest.hexdigest() != clean.digests["train"]:
        shutil.rmtree(work.aside)
        raise TextgenError(f"{clean.description} changed while it was encoded: prepare it again")
    records = [json.loads((work.parts / f"{shard.name}.json").read_bytes()) for shard in work.shards]
    splits = {"train": _sum_sizes(records)}
    held_out = {path.stem: work.read_held_out(path) for path in work.held_out}
    splits |= {split: its["sizes"] for split, its in held_out.items()}
    record = store_record(work.key, data, clean, tokenizer, splits)
    record |= {"format": SHARDS_FORMAT, "order": ORDER, "shards": records}
    write_atomic(work.aside / UNIGRAM_NAME, [counts.tobytes()])
    sums = {UNIGRAM_NAME: hash_file(work.aside / UNIGRAM_NAME)}
    for its in held_out.values():
        sums |= its["sums"]
    record["files"] = dict(sorted(sums.items()))
    for left in work.aside.glob(".*"):  # of a process that was killed
        left.unlink()
    write_atomic(work.aside / STORE_NAME, json.dumps(record, indent=2) + "\n")
    shutil.rmtree(work.directory, ignore_errors=True)  # a damaged one
    work.aside.rename(work.directory)
    shutil.rmtree(work.directory / PARTS, ignore_errors=True)
    return TokenStore.open(work.directory)


def _sum_sizes(records: list[Mapping[str, Any]]) -> dict[str, int]:
    return {name: sum(record[name] for record in records) for name in ("documents", "tokens", "bytes")}
