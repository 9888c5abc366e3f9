"""Compressed files (gz, zst, xz, bz2), decompressed while they are read.

A file may be made to fill memory or disk, so the window of a decompressor and the growth of a file are bounded.
"""

from __future__ import annotations

import io
import os
import sys
import zlib
from typing import BinaryIO, Protocol

from textgen.errors import TextgenError, one_line
from textgen.packages import how_to_install

ENDINGS = (".gz", ".zst", ".xz", ".bz2")

READ_BYTES = 1 << 18
# A decompressor keeps a window of its output. The program `zstd` has the same limit; `xz -9` needs 65 MiB.
WINDOW_LOG = 27
# Text shrinks to a third or a tenth, a repetitive log to a hundredth. gzip ends at 1,032, the others beyond 10,000.
MAX_RATIO = 200
FREE_BYTES = 64 << 20  # of output, at any ratio


class _Decompressor(Protocol):
    """The interface that the standard library's decompressors share; each decompresses one member of a file."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


def split_compression(path: str) -> tuple[str, str]:
    """Return a path without its ending of compression, and that ending in lower case; "" if it has none."""
    stem, ending = os.path.splitext(path)
    return (stem, ending.lower()) if ending.lower() in ENDINGS else (path, "")


def decompress(file: BinaryIO, path: str) -> io.BufferedReader:
    """Return the decompressed bytes of an open file as a stream; the ending of its path names the compression.

    Reading the stream raises a TextgenError if the file is cut off, damaged, or grows or needs more than is allowed.

    Raises:
        TextgenError: this Python cannot decompress it; the message names the missing package.
    """
    return io.BufferedReader(_Decompressed(file, path), READ_BYTES)


class _Decompressed(io.RawIOBase):
    """The bytes of all members of a compressed file, one after the other."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file, self._path = file, path
        self._ending = split_compression(path)[1]
        self._member: _Decompressor | None = self._new_member()
        self._rest = b""  # compressed bytes after the last member
        self._taken = self._given = 0
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: object) -> int:
        """Fill the target unless the file ends, so that a peek at the stream shows the beginning of the text."""
        view = memoryview(target).cast("B")  # type: ignore[arg-type]
        filled = 0
        while filled < len(view) and not self._ended:
            data = self._decompress(len(view) - filled)
            view[filled : filled + len(data)] = data
            filled += len(data)
        return filled

    def _decompress(self, size: int) -> bytes:
        """Return at most `size` bytes; there may be none before the end."""
        at_end = False
        if self._member is None:
            # Archives on tape and `xz` pad a file with zeros, which are not a member.
            while not (data := self._rest.lstrip(b"\0")):
                if not (data := self._read()):
                    self._ended = True
                    return b""
                self._rest = data
            self._member = self._new_member()
        elif self._member.needs_input:
            data = self._read()
            at_end = not data
        else:
            data = b""
        try:
            output = self._member.decompress(data, size)
        except Exception as error:  # each library has its own class
            raise TextgenError(f"`{self._path}` {self._fault(error)}") from error
        self._given += len(output)
        if self._given > max(FREE_BYTES, MAX_RATIO * self._taken):
            raise TextgenError(
                f"`{self._path}` holds more than {MAX_RATIO} times its size: {self._given >> 20} MiB in the first "
                f"{self._taken:,} bytes; if the file is what you expect, decompress it first"
            )
        if self._member.eof:
            self._rest, self._member = self._member.unused_data, None
        elif at_end and not output:
            raise TextgenError(f"`{self._path}` is cut off: its data end after {self._given:,} decompressed bytes")
        return output

    def _read(self) -> bytes:
        data = self._file.read(READ_BYTES)
        self._taken += len(data)
        return data

    def _fault(self, error: Exception) -> str:
        if "memory" in str(error).lower():
            return f"needs more memory to decompress than {1 << WINDOW_LOG - 20} MiB: {one_line(error)}"
        if not self._given:
            return f"cannot be decompressed as `{self._ending}`: {one_line(error)}"
        return f"is damaged after {self._given:,} decompressed bytes: {one_line(error)}"

    def _new_member(self) -> _Decompressor:
        # Imported here: Python may have been built without a library.
        try:
            match self._ending:
                case ".gz":
                    return _GzipDecompressor()
                case ".bz2":
                    import bz2

                    return bz2.BZ2Decompressor()
                case ".xz":
                    import lzma

                    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << WINDOW_LOG)
                case _:
                    if sys.version_info >= (3, 14):
                        from compression import zstd
                    else:
                        from backports import zstd
                    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
                    return zstd.ZstdDecompressor(options=options)
        except ImportError as error:
            if self._ending != ".zst":
                raise TextgenError(
                    f"`{self._path}` cannot be read: this Python has no module `{error.name}`"
                ) from error
            how = how_to_install("backports.zstd", extra="zst")
            raise TextgenError(f"`{self._path}` needs `backports.zstd`: {how}") from error


class _GzipDecompressor:
    """zlib's decompressor of a gzip member, with the interface of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)  # a header and a checksum of gzip

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
