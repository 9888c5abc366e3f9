"""Addresses of folders that are no local paths, such as `s3://bucket/store`.

Credentials come from the environment or from the files of each provider, never from an address, which is written to
config.yaml, to logs and to W&B.
"""

from __future__ import annotations

import re

from textgen.errors import TextgenError, in_backticks

PROTOCOLS = ("file", "s3", "gs", "az", "hf", "https")


def is_address(text: str) -> bool:
    """Return whether a text is an address, right or wrong, and no local path."""
    return "://" in text


def protocol_of(address: str) -> str:
    """Return what is before the `://` of an address."""
    return address.partition("://")[0]


def check_address(address: str) -> str:
    """Return the address of a folder without the slash at its end.

    Chains such as `simplecache::s3://...` and protocols such as `reference:` are refused: they can read any other
    address. Credentials are refused.

    Raises:
        TextgenError: it cannot be used; the message holds no credentials.
    """
    protocol, _, path = address.partition("://")
    name = f"`{show(address)}`"
    if "::" in address:
        raise TextgenError(f"{name} is a chain of addresses (`::`): wanted a single one")
    if protocol not in PROTOCOLS:
        raise TextgenError(f"{name} is not of a protocol that can be used: wanted {in_backticks(PROTOCOLS)}")
    if _USER.search(address) or _QUERY.search(address):
        raise TextgenError(
            f"{name} was given with a user, a password or a query: wanted none, credentials come from the environment "
            "(docs/how-to/remote.md)"
        )
    if not address.isprintable() or " " in address or "\\" in address:
        raise TextgenError(f"`{protocol}://` is followed by a space or another character that addresses do not have")
    path = path.rstrip("/")
    parts = path.split("/")
    if protocol == "file":
        if parts[0]:
            raise TextgenError(f"{name} is not of this machine: wanted `file:///` and a path")
        parts = parts[1:]
    if not all(parts) or not {".", ".."}.isdisjoint(parts):
        raise TextgenError(f"{name} has an empty part, `.` or `..` in its path")
    return f"{protocol}://{path}"


# A secret key may hold slashes, so a user reaches from `://` to the last `@`. That of the hub is a revision.
_USER = re.compile(r"(?<!\bhf)(://)[^\s'\"<>]*@")
_QUERY = re.compile(r"(://[^\s?#'\"<>]*)[?#][^\s'\"<>)]*")


def show(text: str) -> str:
    """Return an address, or a message with addresses, without users, passwords and queries, which may be secret."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))
