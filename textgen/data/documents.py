"""Documents of txt, jsonl, json, csv and parquet files; every text is checked.

Memory holds one document at a time, and long ones are cut.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

from textgen.config import DataConfig
from textgen.data.csv_files import read_csv
from textgen.data.cutting import cut_blocks, sizes_of
from textgen.data.decompression import split_compression
from textgen.data.encodings import decode, open_text
from textgen.data.json_files import read_json
from textgen.data.labels import (
    class_names,
    copy_label,
    dataset_columns,
    features_of_schema,
    label_of_folder,
    labelled,
    name_classes,
    take_label,
)
from textgen.data.rows import find_column, take_text
from textgen.data.sources import TEXT_ENDINGS, list_files
from textgen.data.tally import RowError, Tally
from textgen.errors import TextgenError, in_backticks, one_line

ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
BLOCK_BYTES = 1 << 20

log = logging.getLogger("textgen")


def read_documents(paths: Sequence[str], settings: DataConfig | None = None) -> Iterator[str]:
    """Yield the documents of files, folders and globs in order, of all splits; skip documents without text.

    Args:
        paths: of files, folders and globs.
        settings: how files are read; the settings of source and splits are not used.

    Raises:
        TextgenError: a path, a file or a text is not what it should be, or there are no documents.
    """
    settings, text = settings or DataConfig(), None
    paths_of_files = list(list_files(paths, rules=settings.reading_rules))
    warn_of_unused_settings(paths_of_files, settings)
    for text in filter(has_text, read_files(paths_of_files, settings, Tally())):
        yield text
    if text is None:
        raise TextgenError(f"no documents in {in_backticks(paths)}")


def has_text(document: str) -> bool:
    """Tell whether a document holds more than white space."""
    return bool(document) and not document.isspace()


# Reading files

# Settings of reading, and the formats that they are for.
FORMATS_OF_SETTINGS = {
    "text_column": (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"),
    "txt_documents": (".txt",),
    "encoding": TEXT_ENDINGS,
    "csv_delimiter": (".csv", ".tsv"),
    "csv_quoting": (".csv", ".tsv"),
    "csv_escape": (".csv", ".tsv"),
}


def warn_of_unused_settings(paths: Sequence[str], settings: DataConfig) -> None:
    """Log the settings that are not the default, and are for none of the files."""
    formats = {os.path.splitext(split_compression(path)[0])[1].lower() for path in paths}
    for name, wanted in FORMATS_OF_SETTINGS.items():
        value = getattr(settings, name)
        if value != getattr(DataConfig(), name) and formats.isdisjoint(wanted):
            log.warning("`%s` %s has no effect: no file of %s is read", name, value, in_backticks(wanted))


def read_files(paths: Sequence[str], settings: DataConfig, tally: Tally) -> Iterator[str]:
    """Yield all documents of files in order, those without text too; "" stands for null.

    If `settings` ask for labels, the documents are `LabelledText`.

    Args:
        paths: of files.
        settings: how they are read.
        tally: counts what is left out and cut. Another pass with the same one logs nothing twice.

    Raises:
        TextgenError: a file or a text is not what it should be.
    """
    where = in_backticks(paths) if len(paths) == 1 else f"{len(paths)} files"
    documents = chain.from_iterable(_read_file(path, settings, tally) for path in paths)
    return _cut_and_count(documents, where, settings, tally)


def read_batches(batches: Iterable[Sequence[object]], where: str, settings: DataConfig, tally: Tally) -> Iterator[str]:
    """Yield the texts of a column that comes in batches, as `read_files` does; `where` names it in messages.

    If `settings` has a `label_column`, the values are pairs of text and label.
    """
    return _cut_and_count(_check_rows(batches, where, settings, tally), where, settings, tally)


def _cut_and_count(documents: Iterable[str], where: str, settings: DataConfig, tally: Tally) -> Iterator[str]:
    """Yield the documents of a whole pass, long ones in parts; log the counts."""
    tally.begin()
    longest = sizes_of(settings)[0] // 4  # characters, each of which has at most four bytes
    for text in documents:
        if len(text) <= longest:
            yield text
        else:
            yield from (copy_label(part, text) for part in tally.cut_text(text, settings))
    tally.end(where, settings)


def _read_file(path: str, settings: DataConfig, tally: Tally) -> Iterator[str]:
    texts = _read_rows(path, settings, tally)
    if not settings.label_folders:
        return texts
    try:
        label = label_of_folder(path)
    except RowError as error:
        raise TextgenError(f"`{path}`{error}") from error
    return (labelled(text, label) for text in texts)


def _read_rows(path: str, settings: DataConfig, tally: Tally) -> Iterator[str]:
    inner, compression = split_compression(path)
    try:
        match os.path.splitext(inner)[1].lower():
            case ".txt" if settings.label_column is not None:
                raise TextgenError(
                    f"`{path}` is a text without columns, and `--data.label_column` is {settings.label_column}: "
                    "`--data.label_folders true` takes the label from the folder"
                )
            case ".txt":
                yield from _read_txt(path, settings, tally)
            case ".csv" | ".tsv":
                rows = read_csv(path, settings.text_column, settings=settings, tally=tally)
                yield from (text for (text,) in rows)
            case ".parquet" if compression:
                raise TextgenError(f"`{path}` is compressed twice, as parquet is compressed inside: decompress it")
            case ".parquet":
                yield from _read_parquet(path, settings, tally)
            case ".arrow":
                yield from _read_arrow(path, settings, tally)
            case _:
                with open_text(path, settings) as file:
                    yield from read_json(file, path, settings, tally)
    except OSError as error:
        raise TextgenError(f"`{path}` cannot be read: {error.strerror or one_line(error)}") from error


def _read_txt(path: str, settings: DataConfig, tally: Tally) -> Iterator[str]:
    """Yield the documents of a text file, long ones in parts; memory holds the largest size of a document."""
    limit, part = sizes_of(settings)
    unit = settings.txt_documents
    line = 1
    with open_text(path, settings, keep_mark=unit == "file" and settings.reading_rules == 1) as file:
        for is_document, blocks in _split_txt(file, unit, limit):
            if not is_document:
                line += sum(1 for _ in blocks)
                continue
            num_parts = 0
            # Nearly every line is one piece; with the call, lines of 650 bytes take a fifth more time to read.
            pieces = ((blocks, True),) if isinstance(blocks, bytes) else cut_blocks(blocks, limit, part)
            for raw, is_last in pieces:
                num_parts += 1
                tally.rows += 1
                try:
                    text = decode(raw, settings)
                except RowError as error:
                    tally.fault(path, line, error, settings)
                else:
                    text = _without_end(text) if is_last and unit != "file" else text
                    if text or num_parts == 1:
                        yield text
                line += raw.count(b"\n")
            tally.count_parts(num_parts)


def _split_txt(file: io.BufferedReader, unit: str, limit: int) -> Iterator[tuple[bool, bytes | Iterator[bytes]]]:
    """Yield whether what follows is a document or blank lines between documents, and its bytes or blocks of them."""
    if unit == "file":
        yield True, iter(lambda: file.read(BLOCK_BYTES), b"")
        return
    pieces = iter(lambda: file.readline(limit + 1), b"")
    if unit == "line":
        for raw in pieces:
            yield True, raw if raw.endswith(b"\n") else chain((raw,), _rest_of_line(file))
    else:
        for is_blank, lines in groupby(pieces, key=_BlankLines()):
            yield not is_blank, lines


def _rest_of_line(file: io.BufferedReader) -> Iterator[bytes]:
    while raw := file.readline(BLOCK_BYTES):
        yield raw
        if raw.endswith(b"\n"):
            return


class _BlankLines:
    """Distinguishes blank lines from others; the pieces of a long line are never blank, except the first one."""

    def __init__(self) -> None:
        self._is_within_line = False

    def __call__(self, raw: bytes) -> bool:
        is_within_line, self._is_within_line = self._is_within_line, not raw.endswith(b"\n")
        if is_within_line or raw.isascii():
            return not is_within_line and raw.isspace()
        return raw.decode(errors="replace").isspace()


def _read_parquet(path: str, settings: DataConfig, tally: Tally) -> Iterator[str]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            schema = file.schema_arrow
            columns = _find_columns(f"`{path}`", schema.names, settings)
            batches = file.iter_batches(batch_size=256, columns=columns)
            texts = (_values_of(batch, columns, schema.metadata) for batch in batches)
            yield from _check_rows(texts, f"`{path}`", settings, tally)
    except pyarrow.ArrowException as error:
        raise TextgenError(f"`{path}` is not valid parquet: {one_line(error)}") from error


def _find_columns(where: str, names: Sequence[str], settings: DataConfig) -> list[str]:
    """Return the columns to read of a file with these columns: that of the text and, if there is one, of the label."""
    columns = dataset_columns(settings)
    for column in columns:
        find_column(where, column, names, rules=settings.reading_rules)
    return columns


def _values_of(batch: Any, columns: Sequence[str], metadata: Mapping[bytes, bytes] | None) -> Sequence[object]:
    """Return the texts of a batch of Arrow, or pairs of text and label if `columns` has that of the label too."""
    texts, *labels = (_to_texts(batch.column(batch.schema.names.index(column))) for column in columns)
    if not labels:
        return texts
    names = class_names(features_of_schema(metadata), columns[1])
    return list(zip(texts, name_classes(labels[0], names), strict=True))


def _to_texts(values: Any) -> Sequence[object]:
    """Return the values of an array of Arrow; a text that is not UTF-8 as bytes."""
    import pyarrow

    try:
        return values.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_text_or_bytes(raw) for raw in values.cast(pyarrow.large_binary()).to_pylist()]


def _text_or_bytes(raw: bytes | None) -> str | bytes | None:
    try:
        return raw and raw.decode()
    except UnicodeDecodeError:
        return raw


def _read_arrow(path: str, settings: DataConfig, tally: Tally) -> Iterator[str]:
    """Yield the texts of one file of `datasets.Dataset.save_to_disk`."""
    import pyarrow

    with open(path, "rb") as file:  # the reader takes a stream that ends after any of its batches
        file.seek(max(0, os.path.getsize(path) - len(ARROW_END)))
        if file.read() != ARROW_END:
            raise TextgenError(f"`{path}` is cut short: it does not end as a stream of Arrow")
    try:
        with pyarrow.memory_map(path) as source, pyarrow.ipc.open_stream(source) as batches:
            schema = batches.schema
            columns = _find_columns(f"`{path}`", schema.names, settings)
            texts = (_values_of(batch, columns, schema.metadata) for batch in batches)
            yield from _check_rows(texts, f"`{path}`", settings, tally)
    except pyarrow.ArrowException as error:
        raise TextgenError(f"`{path}` is not a stream of Arrow: {one_line(error)}") from error


# Checks and messages


def _check_rows(batches: Iterable[Sequence[Any]], where: str, settings: DataConfig, tally: Tally) -> Iterator[str]:
    """Yield the values of a column that comes in batches; "" for null. With a `label_column` they are pairs.

    Raises:
        TextgenError: one is not a text.
    """
    for number, value in enumerate(chain.from_iterable(batches), start=1):
        tally.rows += 1
        value, label = value if settings.label_column is not None else (value, None)
        if value is None:
            tally.nulls += 1
            yield ""
            continue
        try:
            text = take_text(value, settings.text_column)
            if settings.label_column is not None:
                text = labelled(text, take_label(label, settings.label_column))
        except RowError as error:
            tally.fault_at(f"{where} row {number}", error, settings)
        else:
            yield text


def _without_end(line: str) -> str:
    return line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")
