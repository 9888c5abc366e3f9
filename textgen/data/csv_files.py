"""Documents of csv and tsv files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from textgen.config import DataConfig
from textgen.data.decompression import split_compression
from textgen.data.encodings import decode, open_text
from textgen.data.labels import labelled, take_label
from textgen.data.rows import ROW_BYTES, TOO_LONG, find_column, read_raw_lines
from textgen.data.tally import RowError, Tally
from textgen.errors import one_line

SAMPLE_LINES, SAMPLE_BYTES = 200, 1 << 20  # that decide which delimiter a file has
# Rows of a file with commas may span lines: a text has line ends. The log names a row of so many lines.
MANY_LINES = 100


@dataclass(frozen=True)
class _Format:
    """How the fields of a file are separated and quoted."""

    delimiter: str
    skip_space: bool
    quoting: Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE
    escape: str | None

    def reader(self, lines: Iterator[str]) -> Any:
        return csv.reader(
            lines, delimiter=self.delimiter, skipinitialspace=self.skip_space, quoting=self.quoting,
            escapechar=self.escape, strict=True,
        )  # fmt: skip

    def __str__(self) -> str:
        return repr(self.delimiter + " " * self.skip_space)


def read_csv(
    path: str, *columns: str, settings: DataConfig | None = None, tally: Tally | None = None
) -> Iterator[list[str]]:
    """Yield the values of columns, row by row, of a file with a header.

    If `settings` has a `label_column`, the first value carries its row's label.

    Args:
        path: a csv or tsv file, which may be compressed.
        columns: names of the header; the first one is that of the text.
        settings: encoding, quotation and the treatment of faults.
        tally: the counts of the pass.

    Raises:
        TextgenError: the header lacks a column or has it twice, or a row cannot be read.
    """
    settings, tally = settings or DataConfig(), tally or Tally()
    label_column = settings.label_column
    columns = columns if label_column is None else (*columns, label_column)
    csv.field_size_limit(ROW_BYTES)  # in characters; the standard library's own limit is 128 KiB
    with open_text(path, settings) as file:
        lines = _decode_lines(file, path, settings, tally)
        sample = _take_sample(lines)
        form, num_above = _find_format(sample, path, columns, settings, tally)
        rows = _read_rows(form.reader(chain(sample[num_above:], lines)), num_above, path, form, settings, tally)
        _, header = next(rows, (0, []))
        places = [find_column(f"`{path}`", column, header, rules=settings.reading_rules) for column in columns]
        for line, row in rows:
            tally.rows += 1
            try:
                if len(row) != len(header):
                    hint = "; see `--data.csv_delimiter` and `--data.csv_quoting`"
                    raise RowError(f" has {len(row)} fields; its header has {len(header)}{hint}")
                values = [row[place] for place in places]
                if not values[0].isascii():
                    decode(values[0].encode("utf-8", "surrogateescape"), settings)
                if label_column is not None:
                    label = take_label(values.pop(), label_column)
                    values[0] = labelled(values[0], label)
            except RowError as error:
                tally.fault(path, line, error, settings)
            else:
                yield values


def _decode_lines(file: io.BufferedReader, path: str, settings: DataConfig, tally: Tally) -> Iterator[str]:
    """Yield lines. If faults are skipped, bytes that are not text become surrogates, as only the row can be skipped."""
    for number, raw in read_raw_lines(file, path, settings, tally):
        try:
            yield decode(raw, settings)
        except RowError as error:
            if settings.on_error == "refuse":
                tally.fault(path, number, error, settings)
            yield raw.decode("utf-8", "surrogateescape")


def _take_sample(lines: Iterator[str]) -> list[str]:
    sample: list[str] = []
    size = 0
    for line in lines:
        sample.append(line)
        size += len(line)
        if len(sample) == SAMPLE_LINES or size > SAMPLE_BYTES:
            break
    return sample


def _find_format(
    sample: list[str], path: str, columns: Sequence[str], settings: DataConfig, tally: Tally
) -> tuple[_Format, int]:
    """Return the format of a file, and the number of lines above its header.

    A comma or tab is replaced only if the sample cannot be read with it.
    """
    # Excel's first line, which names the delimiter
    named = re.fullmatch(r"sep=(.)\r?\n?", sample[0]) if sample else None
    usual = "\t" if split_compression(path)[0].lower().endswith(".tsv") else ","
    delimiter = (settings.csv_delimiter or "").replace("\\t", "\t") or (named[1] if named else usual)
    given = _Format(
        delimiter=delimiter[0],
        skip_space=len(delimiter) > 1,
        quoting=csv.QUOTE_NONE if settings.csv_quoting == "none" else csv.QUOTE_MINIMAL,
        escape=settings.csv_escape,
    )
    if settings.csv_delimiter or named or _fits(given, sample, columns, min_width=1):
        return given, 1 if named else 0
    for other in dict.fromkeys((usual, ";", "|", "\t", ",")):
        for skip_space in (False, True):
            form = replace(given, delimiter=other, skip_space=skip_space)
            if _fits(form, sample, columns, min_width=2):
                tally.say("`%s` is read with `--data.csv_delimiter %s`", path, form)
                return form, 0
    return given, 0


def _fits(form: _Format, sample: Sequence[str], columns: Sequence[str], *, min_width: int) -> bool:
    """Return whether a format makes a table with the wanted columns of the first lines of a file."""
    rows = form.reader(iter(sample))
    try:
        header: list[str] = next(rows, [])
        width = len(header)
        return width >= min_width and {*columns} <= {*header} and all(len(row) == width for row in rows if row)
    except csv.Error as error:
        return "unexpected end" in str(error)  # the sample may end within a field


def _read_rows(
    rows: Any, num_above: int, path: str, form: _Format, settings: DataConfig, tally: Tally
) -> Iterator[tuple[int, list[str]]]:
    """Yield rows that are not empty, and the lines at which they begin; log rows that span suspiciously many lines."""
    num_rows = num_lines = num_spanning = most = where = 0
    line = num_above + 1  # of the start of a row
    is_odd = form.delimiter == "\t"
    while True:
        try:
            for row in rows:
                end = rows.line_num + num_above
                if end > line:
                    num_spanning += 1
                    num_lines += end - line
                    most, where = max((most, where), (end - line + 1, line))
                    is_odd = is_odd or end - line + 1 >= MANY_LINES or _holds_rows(row, form.delimiter)
                if row:
                    num_rows += 1
                    yield line, row
                line = end + 1
            break
        except csv.Error as error:
            tally.rows += 1
            end = rows.line_num + num_above
            if "field limit" in str(error):
                fault = RowError(TOO_LONG)
            elif "new-line character" in str(error):
                fault = RowError(" holds a carriage return that ends a line alone: convert the line ends of the file")
            else:
                there = f" at line {end}" if end > line else ""
                hint = "see `--data.csv_quoting` and `--data.csv_escape`"
                fault = RowError(f" is not valid CSV: {one_line(error)}{there}; {hint}")
            tally.fault(path, line, fault, settings)
            line = end + 1
    if num_spanning and (is_odd or num_lines > num_rows):
        tally.say(
            "`%s`: %d of %d rows span several lines, the one at line %d spans %d; if quotation marks are part of the "
            "text, set `--data.csv_quoting none`",
            path, num_spanning, num_rows - 1, where, most,
        )  # fmt: skip


def _holds_rows(row: list[str], delimiter: str) -> bool:
    """Return whether the lines within a field have the delimiters of rows, which an open quotation mark swallowed."""
    lines = max(row, key=len).split("\n")[1:-1]
    return len(lines) > 2 and len(row) > 1 and all(line.count(delimiter) == len(row) - 1 for line in lines)
