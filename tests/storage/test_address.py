"""Which addresses can be used, and that none shows what is secret."""

from __future__ import annotations

import pytest

from textgen.errors import TextgenError
from textgen.storage.address import check_address, is_address, show


@pytest.mark.parametrize(
    ("address", "checked"),
    [
        ("s3://bucket/a/store/", "s3://bucket/a/store"),
        ("gs://bucket", "gs://bucket"),
        ("az://container/store", "az://container/store"),
        ("hf://datasets/owner/name@main/store", "hf://datasets/owner/name@main/store"),
        ("https://example.org:8443/store", "https://example.org:8443/store"),
        ("file:///mnt/disk/store", "file:///mnt/disk/store"),
    ],
)
def test_addresses_of_the_allowed_protocols_are_taken(address: str, checked: str) -> None:
    assert is_address(address)
    assert check_address(address) == checked


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://host/store", "wanted `file`, `s3`, `gs`, `az`, `hf`, `https`"),
        ("ftp://host/store", "protocol"),
        ("reference://x", "protocol"),
        ("memory://x", "protocol"),
        ("S3://bucket/x", "protocol"),
        ("simplecache::s3://bucket/x", "chain"),
        ("zip://a::s3://bucket/x", "chain"),
        ("s3://bucket/x::file:///y", "chain"),
        ("s3://", "empty part"),
        ("s3://bucket//x", "empty part"),
        ("s3://bucket/../x", "`..`"),
        ("file://mnt/x", "wanted `file:///`"),
        ("s3://bucket/x y", "a space"),
        ("s3://bucket/x\ny", "a space"),
        ("https://user:hidden@host/x", "password"),
        ("s3://KEY:hid/den@bucket/x", "password"),
        ("https://host/x?sig=hidden", "password"),
        ("https://host/x#hidden", "password"),
        ("ftp://user:hidden@host/x?hidden", "protocol"),
        ("zip://hidden@a::https://user:hidden@host/x?hidden", "chain"),
    ],
)
def test_others_are_refused_in_a_line_without_secrets(address: str, reason: str) -> None:
    with pytest.raises(TextgenError) as refused:
        check_address(address)
    message = str(refused.value)
    assert reason in message
    assert "\n" not in message
    assert "hid" not in message


def test_a_message_shows_no_secrets_of_its_addresses() -> None:
    message = "Cannot connect to https://me:hid/den@host:1/x?sig=hidden&y=hidden (https://cdn/a?token=hidden), retry?"
    assert show(message) == "Cannot connect to https://host:1/x (https://cdn/a), retry?"
