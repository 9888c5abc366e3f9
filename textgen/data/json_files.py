"""Documents of jsonl and json files: an object a line, an array of objects, or objects of several lines."""

from __future__ import annotations

import codecs
import io
import json
import re
import reprlib
from collections.abc import Iterator
from typing import Any

from textgen.config import DataConfig
from textgen.data.decompression import split_compression
from textgen.data.encodings import decode
from textgen.data.labels import labelled, take_label
from textgen.data.rows import ROW_BYTES, TOO_LONG, no_column, read_lines, take_text
from textgen.data.tally import RowError, Tally
from textgen.errors import TextgenError, one_line

READ_BYTES = 1 << 16
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
# A value that ends in what was not read yet is an error within its last characters, as of `\u00e9`, or in a string.
NEAR_END = 16


def read_json(file: io.BufferedReader, path: str, settings: DataConfig, tally: Tally) -> Iterator[str]:
    """Yield the texts of the objects of a file; "" if a text is null.

    Raises:
        TextgenError: the file is not JSON, or an object has no text.
    """
    if _spans_lines(file.peek(1).lstrip(), path, settings):
        yield from _read_values(file, path, settings, tally)
        return
    for number, line in read_lines(file, path, settings, tally):
        if line.isspace():
            continue
        tally.rows += 1
        try:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RowError(f" is not valid JSON: {one_line(error)}") from error
            text = _text_of(row, settings, tally)
        except RowError as error:
            tally.fault(path, number, error, settings)
        else:
            yield text


def _spans_lines(head: bytes, path: str, settings: DataConfig) -> bool:
    """Return whether a file that begins so holds an array, or objects of several lines."""
    first, end, _ = head.partition(b"\n")
    if first.startswith(b"[") or first.rstrip() == b"{":
        return True
    if not end or settings.on_error == "skip" or not split_compression(path)[0].lower().endswith(".json"):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False


def _text_of(row: object, settings: DataConfig, tally: Tally) -> str:
    column, label_column = settings.text_column, settings.label_column
    if not isinstance(row, dict):
        raise RowError(f" is not a JSON object with a key `{column}`: {reprlib.repr(row)}")
    if label_column is not None and label_column not in row:
        raise RowError(f"{no_column('', label_column, row)}; a text without a label has null there")
    if column not in row:
        hint = (
            "; wanted the array without an object around it"
            if any(isinstance(value, list) for value in row.values())
            else ""
        )
        raise RowError(f"{no_column('', column, row)}{hint}")
    value = row[column]
    if value is None:
        tally.nulls += 1
        return ""
    text = take_text(value, column)
    return text if label_column is None else labelled(text, take_label(row[label_column], label_column))


def _read_values(file: io.BufferedReader, path: str, settings: DataConfig, tally: Tally) -> Iterator[str]:
    """Yield the texts of the objects of an array, or of objects that follow each other."""
    values = _Values(file, path)
    is_array = values.peek() == "["
    end = "]" if is_array else ""
    values.place += is_array
    while (seen := values.peek()) != end:
        value, start = values.take()
        tally.rows += 1
        try:
            source = values.text[start : values.place]
            if not source.isascii():
                decode(source.encode("utf-8", "surrogateescape"), settings)
            text = _text_of(value, settings, tally)
        except RowError as error:
            tally.fault(path, values.line_of(start), error, settings)
        else:
            yield text
        if is_array:
            seen = values.peek()
            if seen not in (",", "]") or not seen:
                raise values.error(f"wanted `,` or `]` after a value of the array: {seen or 'the file ends'}")
            values.place += seen == ","
            if seen == "," and values.peek() == "]":
                raise values.error("wanted a value after `,`: ]")
    values.place += is_array
    if rest := values.peek():
        raise values.error(f"wanted the end of the file after the array: {rest}")


class _Values:
    """The JSON values of a file; memory holds the one that is read.

    Attributes:
        text: a part of the file. Bytes that are not UTF-8 are surrogates in it.
        place: of the next character.
    """

    def __init__(self, file: io.BufferedReader, path: str) -> None:
        self.text, self.place = "", 0
        self._line = 1  # of the start of the text
        self._file, self._path = file, path
        self._to_text = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder()

    def line_of(self, place: int) -> int:
        """Return the line of a place in the text."""
        return self._line + self.text.count("\n", 0, place)

    def error(self, message: str) -> TextgenError:
        """Return an error about the text at the current place."""
        return TextgenError(f"`{self._path}` line {self.line_of(self.place)} is not valid JSON: {message}")

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            found = WHITE_SPACE.match(self.text, self.place)
            self.place = found.end() if found else self.place
            if self.place < len(self.text) or not self._read():
                return self.text[self.place : self.place + 1]

    def take(self) -> tuple[Any, int]:
        """Return the next value, and the place where it starts; leave the place after it."""
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.place)
                if end < len(self.text) or not self._read():  # a number may go on
                    start, self.place = self.place, end
                    return value, start
            except RecursionError as error:
                raise self.error(one_line(error)) from error
            except json.JSONDecodeError as error:
                at_end = error.pos > len(self.text) - NEAR_END or error.msg.startswith("Unterminated string")
                if not at_end or not self._read():
                    self.place = error.pos
                    raise self.error(error.msg) from error
            if len(self.text) - self.place > ROW_BYTES:
                raise TextgenError(f"`{self._path}` line {self.line_of(self.place)}{TOO_LONG}")

    def _read(self) -> bool:
        """Read on, more of a longer value, and forget the text before the present place; return False at the end."""
        raw = self._file.read(max(READ_BYTES, len(self.text) - self.place))
        if not raw:
            return False
        self._line = self.line_of(self.place)
        self.text = self.text[self.place :] + self._to_text.decode(raw)
        self.place = 0
        return True
