"""Long documents are cut at white space. The parts joined are the document."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain

from textgen.config import MAX_DOCUMENT_BYTES, DataConfig

# Parts are smaller than the limit: held-out documents are a tenth of 17 parts of 1 MiB, but half of two of 16 MiB.
PART_BYTES = 1 << 20

WHITE_SPACE = tuple(chr(code).encode() for code in range(0x3001) if chr(code).isspace())


def sizes_of(settings: DataConfig) -> tuple[int, int]:
    """Return the largest size of a document, and that of a part of a longer one, in bytes of UTF-8."""
    given = settings.max_document_bytes
    return (MAX_DOCUMENT_BYTES, PART_BYTES) if given is None else (given, given)


def cut_blocks(blocks: Iterable[bytes], limit: int, part: int) -> Iterator[tuple[bytes, bool]]:
    """Yield a document whole, or in parts if it has more than `limit` bytes; memory holds about `limit` bytes.

    Args:
        blocks: the document's bytes.
        limit: the largest size of a document.
        part: the largest size of a part.

    Yields:
        The bytes, and whether they end the document.
    """
    blocks = iter(blocks)
    gathered: list[bytes] = []
    size = 0
    for block in blocks:
        gathered.append(block)
        size += len(block)
        if size > limit:
            break
    else:
        yield b"".join(gathered), True
        return
    rest = b"".join(gathered)
    gathered.clear()
    for block in chain((b"",), blocks):
        rest += block
        start = 0
        while len(rest) - start > part:
            window = rest[start : start + part]
            end = _place_of_cut(window)
            yield window[:end], False
            start += end
        rest = rest[start:]
    yield rest, True


def _place_of_cut(window: bytes) -> int:
    """Return the length of the part that begins a text: up to a white space, else up to a whole character."""
    # The decoder leaves the bytes of a character that is not whole.
    end = len(window) - len(window[-8:]) + codecs.utf_8_decode(window[-8:], "replace", False)[1]
    end -= window[end - 1 : end] == b"\r"  # perhaps of a line end of two characters
    ends = [place + len(space) for space in WHITE_SPACE if (place := window.rfind(space, 0, end)) >= 0]
    return max(ends, default=end)
