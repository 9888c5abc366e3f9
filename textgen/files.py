"""Files that are written whole or not at all, and users' text and JSON that are read with bounds."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from textgen.errors import TextgenError


def write_atomic(
    path: Path, content: str | Iterable[str | bytes | memoryview], *, require: Callable[[], None] | None = None
) -> None:
    """Write a file of a run so that it holds the old content or the new, whatever happens.

    Args:
        path: the file.
        content: text, or parts of it that are made while the file is written; or bytes in parts.
        require: called just before the file is replaced; if it raises, the file stays as it is.

    Raises:
        OSError: it cannot be written; it names the file.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("wb") as file:
            parts = [content] if isinstance(content, str) else content
            file.writelines(part.encode() if isinstance(part, str) else part for part in parts)
            file.flush()
            os.fsync(file.fileno())
        if require is not None:
            require()
        aside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


# Byte order marks and their encodings. That of UTF-32 begins with that of UTF-16, so it is first.
MARKS = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
UTF8_MARK = b"\xef\xbb\xbf"


def decode_text(raw: bytes, source: str) -> str:
    """Return the text of a user's UTF-8 bytes, without the byte order mark that may begin it.

    Args:
        raw: the bytes of a whole file, of standard input or of a flag.
        source: its name in errors, in backticks if it is a file.

    Raises:
        TextgenError: the bytes are not UTF-8. UTF-16 and UTF-32 with a byte order mark are named.
    """
    refuse_wide(raw, source, "wanted UTF-8")
    try:
        return raw.removeprefix(UTF8_MARK).decode()
    except UnicodeDecodeError as error:
        start = error.start + len(UTF8_MARK) * raw.startswith(UTF8_MARK)
        raise TextgenError(f"{source} is not UTF-8: byte 0x{raw[start]:02x} at position {start}") from error


def refuse_wide(raw: bytes, source: str, wanted: str) -> None:
    """Raise TextgenError if bytes begin with the byte order mark of UTF-16 or UTF-32; `wanted` ends its message."""
    if (wide := wide_mark(raw)) is not None:
        name, mark = wide
        raise TextgenError(f"{source} is {name} (it begins with {mark.hex(' ')}): {wanted}")


def wide_mark(raw: bytes) -> tuple[str, bytes] | None:
    """Return the encoding and the byte order mark that bytes begin with; None if it is neither UTF-16 nor UTF-32."""
    return next(((name, mark) for mark, name in MARKS if raw.startswith(mark)), None)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, and wait until they are on disk."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        fsync_path(place.parent)


def fsync_path(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on disk; some file systems do not support it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# What textgen writes as JSON has a few KB and four levels. Python itself would take any size, and about a thousand
# levels, which it then could not print.
JSON_BYTES = 8 << 20
JSON_DEPTH = 16


def memory_bytes() -> int:
    """Return this machine's memory: no file beyond it can be loaded, and reading a sparse one would take hours."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object of UTF-8 strictly.

    Raises:
        ValueError: it is not a JSON object, gives a key twice, holds nan or infinity, is longer than `JSON_BYTES`, or
            is nested deeper than `JSON_DEPTH`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key is given twice")
        return values

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError("a number is not finite")
        return number

    if len(data) > JSON_BYTES:
        raise ValueError(f"longer than {JSON_BYTES} bytes")
    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    level: list[Any] = [value]
    for _ in range(JSON_DEPTH):
        groups = [group.values() if isinstance(group, dict) else group for group in level]
        level = [item for group in groups for item in group if isinstance(item, dict | list)]
    if level:
        raise ValueError("nested too deeply")
    return value
