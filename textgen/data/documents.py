"""Documents of txt, jsonl, csv and parquet files; every text is checked.

Memory holds one document at a time. No document may be longer than MAX_DOCUMENT_BYTES.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

from textgen.config import MAX_DOCUMENT_BYTES, DataConfig
from textgen.data.sources import list_files
from textgen.errors import TextgenError, in_backticks, one_line

TxtDocuments = Literal["file", "line", "paragraph"]
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_documents(paths: Sequence[str], settings: DataConfig | None = None) -> Iterator[str]:
    """Yield the documents of files, folders and globs in order, of all splits; skip documents without text.

    Args:
        paths: of files, folders and globs.
        settings: how files are read; the settings of source and splits are not used.

    Raises:
        TextgenError: a path, a file or a text is not what it should be, or there are no documents.
    """
    settings, text = settings or DataConfig(), None
    for text in filter(has_text, read_files(list(list_files(paths, rules=settings.reading_rules)), settings)):
        yield text
    if text is None:
        raise TextgenError(f"no documents in {in_backticks(paths)}")


def has_text(document: str) -> bool:
    """Tell whether a document holds more than white space."""
    return bool(document) and not document.isspace()


# Reading files


def read_files(paths: Sequence[str], settings: DataConfig) -> Iterator[str]:
    """Yield all documents of files in order, those without text too.

    Raises:
        TextgenError: a file or a text is not what it should be.
    """
    text_column, txt_documents = settings.text_column, settings.txt_documents
    for path in paths:
        try:
            match os.path.splitext(path)[1].lower():
                case ".txt":
                    yield from _read_txt(path, txt_documents)
                case ".csv" | ".tsv":
                    yield from (text for (text,) in read_csv(path, text_column))
                case ".parquet":
                    yield from _read_parquet(path, text_column)
                case ".arrow":
                    yield from _read_arrow(path, text_column)
                case _:
                    yield from _read_jsonl(path, text_column)
        except OSError as error:
            raise TextgenError(f"`{path}` cannot be read: {error.strerror or one_line(error)}") from error


def _read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines with their ends, never holding more than MAX_DOCUMENT_BYTES of the file."""
    with open(path, "rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_DOCUMENT_BYTES + 1), b""), start=1):
            _check_size(len(raw), f"`{path}` line {number}")
            line = _decode(raw, path, number)
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def _read_txt(path: str, txt_documents: TxtDocuments) -> Iterator[str]:
    if txt_documents == "file":
        _check_size(os.path.getsize(path), f"`{path}`, read as one document,")
        yield _decode(Path(path).read_bytes(), path, 1)
    elif txt_documents == "line":
        yield from (_without_end(line) for _, line in _read_lines(path))
    else:
        for blank, lines in groupby(_read_lines(path), key=lambda numbered: numbered[1].isspace()):
            if not blank:
                yield _without_end("".join(_take_lines(lines, path)))


def _take_lines(numbered: Iterable[tuple[int, str]], path: str) -> Iterator[str]:
    """Yield the lines of one document."""
    start = size = 0
    for number, line in numbered:
        start, size = start or number, size + len(line.encode())
        _check_size(size, f"`{path}` line {start}")
        yield line


def _read_jsonl(path: str, text_column: str) -> Iterator[str]:
    for number, line in _read_lines(path):
        if line.isspace():
            continue
        where = f"`{path}` line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextgenError(f"{where} is not valid JSON: {one_line(error)}") from error
        if not isinstance(row, dict):
            raise TextgenError(f"{where} is not a JSON object with a key `{text_column}`")
        if text_column not in row:
            raise no_column(where, text_column, row)
        yield _checked(row[text_column], where, text_column)


def read_csv(path: str, *columns: str) -> Iterator[list[str]]:
    """Yield the values of columns, row by row, of a file with a header."""
    where = (
        f"`{path}` line 1"  # where the row that is being read starts: an open quote may swallow the rest of the file
    )
    csv.field_size_limit(MAX_DOCUMENT_BYTES)  # in characters; the standard library's own limit is 128 KiB
    lines = (line for _, line in _read_lines(path))
    rows = csv.reader(lines, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
    try:
        header = next(rows, [])
        for column in columns:
            if column not in header:
                raise no_column(f"`{path}`", column, header)
        places = [header.index(column) for column in columns]
        where = f"`{path}` line {rows.line_num + 1}"
        for row in rows:
            if row and len(row) != len(header):
                raise TextgenError(f"{where} has {len(row)} fields; its header has {len(header)}")
            if row:
                yield [_checked(row[place], where, header[place]) for place in places]
            where = f"`{path}` line {rows.line_num + 1}"
    except csv.Error as error:
        if "field limit" in str(error):
            raise _too_long(where) from error
        raise TextgenError(f"{where} is not valid CSV: {one_line(error)}") from error


def _read_parquet(path: str, text_column: str) -> Iterator[str]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            if text_column not in file.schema_arrow.names:
                raise no_column(f"`{path}`", text_column, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=256, columns=[text_column])
            yield from check_rows((batch.column(0).to_pylist() for batch in batches), f"`{path}`", text_column)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise TextgenError(f"`{path}` is not valid parquet with UTF-8 texts: {one_line(error)}") from error


def _read_arrow(path: str, text_column: str) -> Iterator[str]:
    """Yield the texts of one file of `datasets.Dataset.save_to_disk`."""
    import pyarrow

    with open(path, "rb") as file:  # the reader takes a stream that ends after any of its batches
        file.seek(max(0, os.path.getsize(path) - len(ARROW_END)))
        if file.read() != ARROW_END:
            raise TextgenError(f"`{path}` is cut short: it does not end as a stream of Arrow")
    try:
        with pyarrow.memory_map(path) as source, pyarrow.ipc.open_stream(source) as batches:
            if text_column not in batches.schema.names:
                raise no_column(f"`{path}`", text_column, batches.schema.names)
            texts = (batch.column(text_column).to_pylist() for batch in batches)
            yield from check_rows(texts, f"`{path}`", text_column)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise TextgenError(f"`{path}` is not a stream of Arrow with UTF-8 texts: {one_line(error)}") from error


# Checks and messages


def check_rows(batches: Iterable[Sequence[object]], where: str, text_column: str) -> Iterator[str]:
    """Yield the values of a column that comes in batches.

    Raises:
        TextgenError: one is not a text.
    """
    for number, value in enumerate(chain.from_iterable(batches), start=1):
        yield _checked(value, f"{where} row {number}", text_column)


def _checked(value: object, where: str, text_column: str) -> str:
    """Return a value if it is a document: a string of Unicode scalars of bounded size."""
    if not isinstance(value, str):
        raise TextgenError(f"{where}: `{text_column}` is not a string: {str(value)[:40]}")
    try:
        _check_size(len(value) if value.isascii() else len(value.encode()), where)
    except UnicodeEncodeError as error:
        surrogate = f"`\\u{ord(value[error.start]):04x}`"
        raise TextgenError(f"{where}: `{text_column}` holds a lone surrogate, which is no text: {surrogate}") from error
    return value


def _decode(raw: bytes, path: str, number: int) -> str:
    """Decode lines of a file from line `number` on."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        number += raw.count(b"\n", 0, error.start)
        raise TextgenError(f"`{path}` line {number} is not UTF-8: byte 0x{raw[error.start]:02x}") from error


def _check_size(num_bytes: int, where: str) -> None:
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise _too_long(where)


def _too_long(where: str) -> TextgenError:
    return TextgenError(f"{where} is longer than a document may be: {MAX_DOCUMENT_BYTES // 2**20} MiB")


def no_column(where: str, column: str, columns: Iterable[str]) -> TextgenError:
    """Return the error that names a missing column and those that are there."""
    return TextgenError(f"{where} has no column `{column}`; it has {in_backticks(columns)}")


def _without_end(line: str) -> str:
    return line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")
