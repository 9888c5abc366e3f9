"""Errors that are the user's to mend, one line each.

The command line (`textgen/cli.py`) passes the line to `fail` of `textgen/commands/parsing.py`, which prints it and ends
with exit code 2.
"""

from __future__ import annotations


class TextgenError(ValueError):
    """Input that cannot be used. The message is one line: what, where, seen, wanted."""


class CheckpointError(TextgenError):
    """A checkpoint that cannot be used; an older one may still be."""


class UnreadableError(CheckpointError):
    """A checkpoint that cannot be read here and now; its content may be whole."""


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line of at most 300 characters; its class if it says nothing else."""
    lines = str(error).strip().splitlines()
    if not lines or isinstance(error, KeyError):  # a KeyError says the key alone
        return f"{type(error).__name__} {error}".strip()[:300]
    return lines[0][:300]
