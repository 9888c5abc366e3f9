"""The counts of reading: rows without text, skipped rows, long documents that were cut; logged once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from textgen.config import DataConfig
from textgen.data.cutting import cut_blocks, sizes_of
from textgen.errors import TextgenError

NAMED = 3  # skipped rows that the log names

log = logging.getLogger("textgen")


class RowError(TextgenError):
    """A row or document that cannot be read. The message continues the name of its place.

    Attributes:
        line: number of lines between the start of the document and the fault.
    """

    def __init__(self, message: str, *, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class Tally:
    """Counts of one pass over files. A corpus is read several times; the first whole pass logs.

    Attributes:
        rows: documents, and rows that hold none.
        nulls: rows whose text is null.
        skipped: rows that cannot be read; `skipped_in_all` is their number after a whole pass.
        cut: documents that were cut, and `parts` the documents made of them.
    """

    rows: int = 0
    nulls: int = 0
    skipped: int = 0
    skipped_in_all: int = 0
    cut: int = 0
    parts: int = 0
    _first_fault: str = ""
    _logged: bool = False

    def begin(self) -> None:
        """Start a pass."""
        self.rows = self.nulls = self.skipped = self.cut = self.parts = 0

    def fault(self, path: str, line: int, error: RowError, settings: DataConfig) -> None:
        """Raise the error of a document that begins at a line of a file; with `on_error skip` count it instead."""
        self.fault_at(f"`{path}` line {line + error.line}", error, settings)

    def fault_at(self, where: str, error: RowError, settings: DataConfig) -> None:
        """Raise the error of a row; with `on_error skip` count it instead."""
        message = f"{where}{error}"
        if settings.on_error == "refuse":
            raise TextgenError(message) from error
        self.skipped += 1
        self._first_fault = message if self.skipped == 1 else self._first_fault
        if self.skipped <= NAMED:
            self.say("skipped: %s", message)

    def cut_text(self, text: str, settings: DataConfig) -> Iterator[str]:
        """Yield a document, or its parts if it is long."""
        parts = 0
        for raw, _ in cut_blocks([text.encode()], *sizes_of(settings)):
            parts += 1
            yield raw.decode()
        self.count_parts(parts)

    def count_parts(self, number: int) -> None:
        """Count a document of so many parts."""
        if number > 1:
            self.cut, self.parts = self.cut + 1, self.parts + number

    def say(self, message: str, *values: object) -> None:
        """Log a warning on the first pass."""
        if not self._logged:
            log.warning(message, *values)

    def end(self, where: str, settings: DataConfig) -> None:
        """Log the counts of the first pass.

        Raises:
            TextgenError: more than half of the rows are null or cannot be read.
        """
        if 2 * self.nulls > self.rows:
            raise TextgenError(
                f"{where}: `{settings.text_column}` is null in {self.nulls:,} of {self.rows:,} rows; "
                f"`--data.text_column` names the column of the text"
            )
        if 2 * self.skipped > self.rows:
            raise TextgenError(
                f"{where}: {self.skipped:,} of {self.rows:,} documents cannot be read, the first: {self._first_fault}"
            )
        if self.nulls:
            self.say("%s: dropped %d of %d rows, as `%s` is null", where, self.nulls, self.rows, settings.text_column)
        if self.skipped:
            self.say("%s: skipped %d of %d documents, which cannot be read", where, self.skipped, self.rows)
        if self.cut:
            limit, part = sizes_of(settings)
            self.say(
                "%s: cut %d of its documents, of more than %s bytes, at white space into %d of at most %s; "
                "see `--data.max_document_bytes`",
                where,
                self.cut,
                f"{limit:,}",
                self.parts,
                f"{part:,}",
            )
        self.skipped_in_all = self.skipped
        self._logged = True
