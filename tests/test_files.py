"""Text of a user's file: a byte order mark is no part of it, and what is not UTF-8 is named."""

from __future__ import annotations

import pytest

from textgen.errors import TextgenError
from textgen.files import decode_text


@pytest.mark.parametrize(
    ("raw", "text"),
    [(b"", ""), ("\ufeffé".encode(), "é"), ("\ufeff\ufeffa\ufeff".encode(), "\ufeffa\ufeff"), (b"a\r\nb", "a\r\nb")],
)
def test_one_byte_order_mark_is_taken_off_the_start_and_nothing_else_is(raw: bytes, text: str) -> None:
    assert decode_text(raw, "`a.txt`") == text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("\ufeffa".encode("utf-16-le"), "`a.txt` is UTF-16 (it begins with ff fe): wanted UTF-8"),
        ("\ufeffa".encode("utf-16-be"), "`a.txt` is UTF-16 (it begins with fe ff): wanted UTF-8"),
        ("\ufeffa".encode("utf-32-le"), "`a.txt` is UTF-32 (it begins with ff fe 00 00): wanted UTF-8"),
        ("\ufeffa".encode("utf-32-be"), "`a.txt` is UTF-32 (it begins with 00 00 fe ff): wanted UTF-8"),
        ("é".encode("latin-1"), "`a.txt` is not UTF-8: byte 0xe9 at position 0"),
        ("\ufeffcaf".encode() + b"\xe9", "`a.txt` is not UTF-8: byte 0xe9 at position 6"),
    ],
)
def test_bytes_that_are_not_utf8_are_named(raw: bytes, message: str) -> None:
    with pytest.raises(TextgenError) as caught:
        decode_text(raw, "`a.txt`")
    assert str(caught.value) == message
