"""The bytes of text files, as UTF-8: decompressed, of any encoding, without a byte order mark."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from textgen.config import DataConfig
from textgen.data.decompression import decompress, split_compression
from textgen.data.tally import RowError
from textgen.errors import TextgenError
from textgen.files import UTF8_MARK, refuse_wide, wide_mark

BUFFER_BYTES = 1 << 17
HEAD_BYTES = 1 << 10
# No text in UTF-8 begins with them.
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\0": ".xz"}

# Bytes that are not of the encoding become this byte, which UTF-8 does not use, and two with a half of the first each.
BAD = 0xFF
MARKED = b"\xff[\x80-\x8f]{2}"


@contextmanager
def open_text(path: str, settings: DataConfig, *, keep_mark: bool = False) -> Iterator[io.BufferedReader]:
    """Open a text file as a stream of UTF-8.

    Bytes that are not of `settings.encoding` come out as bytes that are not UTF-8, for `decode`.

    Args:
        path: a file; the ending of a compressed one says how it is compressed.
        settings: its encoding.
        keep_mark: leave a byte order mark of UTF-8 where it is.

    Raises:
        TextgenError: it is compressed or encoded in another way, or this Python cannot decompress it.
        OSError: it cannot be opened.
    """
    with open(path, "rb", buffering=BUFFER_BYTES) as file:
        stream = decompress(file, path) if split_compression(path)[1] else cast(io.BufferedReader, file)
        head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
        encoding = codecs.lookup(settings.encoding).name.removesuffix("-sig")
        if not encoding.startswith(("utf-16", "utf-32")):
            _require_bytes_of(head, path)
        elif head and encoding in ("utf-16", "utf-32") and wide_mark(head) is None and not head.startswith(UTF8_MARK):
            raise TextgenError(
                f"`{path}` does not begin with a byte order mark of {encoding.upper()}: if it is {encoding.upper()}, "
                f"set `--data.encoding {encoding}-le` or `{encoding}-be`"
            )
        if encoding == "utf-8" and settings.reading_rules > 1:
            _refuse_unmarked(head, path)
        if encoding != "utf-8" and not head.startswith(UTF8_MARK):
            stream = io.BufferedReader(_Transcoded(stream, encoding), BUFFER_BYTES)
            head = stream.peek(len(UTF8_MARK))
        if head.startswith(UTF8_MARK) and not keep_mark:
            stream.read(len(UTF8_MARK))
        yield stream


def _require_bytes_of(head: bytes, path: str) -> None:
    """Raise TextgenError if a file's first bytes are of another encoding or format."""
    if (wide := wide_mark(head)) is not None:
        refuse_wide(head, f"`{path}`", f"set `--data.encoding {wide[0].lower()}`")
    for magic, ending in MAGIC.items():
        if head.startswith(magic):
            raise TextgenError(
                f"`{path}` is compressed (it begins with {magic.hex(' ')}): its name must end in `{ending}`"
            )


def _refuse_unmarked(head: bytes, path: str) -> None:
    """Raise TextgenError if a file looks like UTF-16 without a byte order mark, which is also UTF-8 if it is ASCII."""
    half = len(head) // 2
    for place, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros, others = head[place::2].count(0), head[1 - place :: 2].count(0)
        if half >= 8 and zeros > 0.9 * half and others < 0.1 * half:
            raise TextgenError(f"`{path}` looks like UTF-16 (every second byte is 0): set `--data.encoding {name}`")


def decode(raw: bytes, settings: DataConfig) -> str:
    """Return the text of bytes of `open_text`.

    Raises:
        RowError: they are not of the encoding.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        start = error.start
        name = "UTF-8" if codecs.lookup(settings.encoding).name.startswith("utf-8") else settings.encoding
        seen = raw[start]
        if name != "UTF-8" and re.match(MARKED, raw[start : start + 3]):
            seen = (raw[start + 1] & 15) << 4 | raw[start + 2] & 15
        hint = "see `--data.encoding` and `--data.on_error`"
        raise RowError(f" is not {name}: byte 0x{seen:02x}; {hint}", line=raw.count(b"\n", 0, start)) from error


class _Transcoded(io.RawIOBase):
    """A stream of another encoding as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)("textgen.mark")
        self._ready = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: object) -> int:
        view = memoryview(target).cast("B")  # type: ignore[arg-type]
        while not self._ready and not self._ended:
            raw = self._stream.read(BUFFER_BYTES)
            self._ended = not raw
            self._ready = self._decoder.decode(raw, self._ended).encode("utf-8", "textgen.mark")
        given = self._ready[: len(view)]
        self._ready = self._ready[len(given) :]
        view[: len(given)] = given
        return len(given)


def _mark(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what cannot be decoded, or a surrogate that cannot be encoded, by bytes that are not UTF-8."""
    if isinstance(error, UnicodeDecodeError):
        bad = error.object[error.start]
        return "".join(map(chr, (0xDC00 + BAD, 0xDC80 + (bad >> 4), 0xDC80 + (bad & 15)))), error.end
    if isinstance(error, UnicodeEncodeError):
        return bytes(ord(one) & 0xFF | 0x80 for one in error.object[error.start : error.end]), error.end
    raise error


codecs.register_error("textgen.mark", _mark)
