"""Errors that are the user's to mend, one line each.

The command line (`textgen/cli.py`) passes the line to `fail` of `textgen/commands/parsing.py`, which prints it and ends
with exit code 2.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

# Errors of the disk and of permissions: the user can correct them. ENOENT: a file system without new files, such as
# /proc, or a folder that was deleted.
DISK_ERRORS = (
    errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
    errno.EISDIR, errno.EIO, errno.ESTALE, errno.EEXIST,
)  # fmt: skip


# Modules of Python that Windows lacks: locks, and limits of processes.
UNIX_MODULES = ("fcntl", "resource")


# What torch says, in a plain RuntimeError, if a processor's memory is too small for a tensor.
MEMORY_MESSAGES = ("can't allocate memory", "Storage size calculation overflowed")


class TextgenError(ValueError):
    """Input that cannot be used. The message is one line: what, where, seen, wanted."""


class BrokenSourceError(TextgenError):
    """A source that could not be read to its end; nothing says that its text has changed."""


class DivergedError(TextgenError):
    """A training whose loss, gradient or weights are not finite any more."""


class CheckpointError(TextgenError):
    """A checkpoint that cannot be used; an older one may still be."""


class UnreadableError(CheckpointError):
    """A checkpoint that cannot be read here and now; its content may be whole."""


def user_error(error: BaseException) -> str | None:
    """Return the line of an error that ends a command with exit code 2; None for an error of the program."""
    from textgen.tokenizer import TokenizerError  # not a TextgenError: the tokenizer does not import textgen

    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.strerror or error}" + (f": `{error.filename}`" if error.filename else "")
    if isinstance(error, ModuleNotFoundError) and error.name in UNIX_MODULES:
        return f"this command needs Linux or macOS: Python has no module `{error.name}` here"
    if is_lack_of_memory(error):
        reason = first_line(error).rpartition("err == 0. ")[2]  # without the place in torch's sources
        # a MemoryError is mostly of a text that Python holds
        advice = "" if isinstance(error, MemoryError) else "; a smaller model, `batch_size` or `seq_len` needs less"
        return f"not enough memory{advice}: {reason}"
    return str(error) if isinstance(error, TextgenError | TokenizerError) else None


def is_lack_of_memory(error: BaseException) -> bool:
    """Tell whether memory was too small. The error of a GPU is known by its name, since torch may not be imported."""
    if isinstance(error, RuntimeError) and any(message in str(error) for message in MEMORY_MESSAGES):
        return True
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, 300 characters at most; with its class if that says too little."""
    lines = str(error).strip().splitlines()
    if not lines or isinstance(error, KeyError):  # the message of a KeyError is the key alone
        return f"{type(error).__name__} {error}".strip()[:300]
    return lines[0][:300]


def one_line(error: BaseException) -> str:
    """Return all lines of an error's message joined, at most 300 characters; the name of its class if it has none.

    This suits libraries whose first line does not hold the reason, such as the clients of the hub.
    """
    return " ".join(str(error).split())[:300] or type(error).__name__


def in_backticks(names: Iterable[str]) -> str:
    """Return names as a message lists them."""
    return ", ".join(f"`{name}`" for name in names) or "none"
