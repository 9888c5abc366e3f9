"""Rows of text files: their lines, and the check of their texts."""

from __future__ import annotations

import io
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from textgen.config import DataConfig
from textgen.data.encodings import decode
from textgen.data.tally import RowError, Tally
from textgen.errors import TextgenError, in_backticks

# A row is read whole, before its text is cut. csv holds four bytes for each character.
ROW_BYTES = 32 << 20
NAMED = 20  # columns of a row without a text
TOO_LONG = f" is longer than the limit of a row, {ROW_BYTES >> 20} MiB; a longer text can be a .txt file"


def read_lines(file: io.BufferedReader, path: str, settings: DataConfig, tally: Tally) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines with their ends; memory holds one line."""
    for number, raw in read_raw_lines(file, path, settings, tally):
        try:
            yield number, decode(raw, settings)
        except RowError as error:
            tally.rows += 1
            tally.fault(path, number, error, settings)


def read_raw_lines(
    file: io.BufferedReader, path: str, settings: DataConfig, tally: Tally
) -> Iterator[tuple[int, bytes]]:
    """Yield line numbers and the bytes of lines; a line of more than ROW_BYTES is a fault."""
    for number, raw in enumerate(iter(lambda: file.readline(ROW_BYTES + 1), b""), start=1):
        if len(raw) <= ROW_BYTES:
            yield number, raw
            continue
        tally.rows += 1
        tally.fault(path, number, RowError(TOO_LONG), settings)
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(ROW_BYTES)


def take_text(value: object, column: str) -> str:
    """Return a value that is a text: a string of Unicode scalars.

    Raises:
        RowError: the value is not a text.
    """
    if not isinstance(value, str):
        raise RowError(f": `{column}` is not a string: {reprlib.repr(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            surrogate = f"`\\u{ord(value[error.start]):04x}`"
            raise RowError(f": `{column}` holds a lone surrogate, which is not valid text: {surrogate}") from error
    return value


def find_column(where: str, column: str, columns: Sequence[str], *, rules: int) -> int:
    """Return the place of a column; with rules 1 the first of its name.

    Raises:
        TextgenError: there is none with this name, or several.
    """
    if column not in columns:
        raise no_column(where, column, columns)
    if rules > 1 and (number := columns.count(column)) > 1:
        raise TextgenError(f"{where} has {number} columns `{column}`: rename all but that of the text")
    return columns.index(column)


def no_column(where: str, column: str, columns: Iterable[object]) -> TextgenError:
    """Return the error that names a missing column and the first of those that are there."""
    shown = [" ".join(str(name)[:40].split()) for name in islice(columns, NAMED)]
    return TextgenError(f"{where} has no column `{column}`; it has {in_backticks(shown)}")
