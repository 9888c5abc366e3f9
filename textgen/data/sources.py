"""The files that paths, folders and globs name, and the split that each belongs to."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from textgen.errors import TextgenError, in_backticks

EXTENSIONS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def list_files(paths: Sequence[str]) -> dict[str, str]:
    """Map each file that `paths` name, once and in order, to its split.

    A split is found in the parts of a path below the given folder. Of a given file only its name counts.
    """
    found: dict[str, tuple[str, str]] = {}  # absolute path -> path, split
    for given in paths:
        root, files = _expand(os.path.expanduser(given))
        for path in files:
            absolute = os.path.abspath(path)
            found.setdefault(absolute, (path, _split_of(os.path.relpath(absolute, root))))
    return dict(found.values())


def _expand(given: str) -> tuple[str, list[str]]:
    """Return the folder from which on the parts of a path name a split, and the files."""
    if os.path.isfile(given):
        if not given.lower().endswith(EXTENSIONS):
            raise TextgenError(f"`{given}` is not one of {in_backticks(EXTENSIONS)}")
        if os.path.getsize(given) == 0:
            raise TextgenError(f"`{given}` is empty")
        return os.path.dirname(os.path.abspath(given)), [given]
    if os.path.isdir(given):
        root, matches = given, [given]
    elif glob.has_magic(given):
        root, matches = given, sorted(glob.glob(given, recursive=True), key=_natural)
        while glob.has_magic(root):
            root = os.path.dirname(root)
        if not matches:
            raise TextgenError(f"`{given}` matches no file")
    else:
        raise TextgenError(f"`{given}` does not exist")
    files = [path for match in matches for path in _walk(match) if path.lower().endswith(EXTENSIONS)]
    reviews = set(filter(re.compile(r".*(pos|neg|unsup)[/\\][0-9]+_[0-9]+\.txt").fullmatch, files))
    if reviews:  # an aclImdb tree: its other .txt files hold addresses and ratings
        files = [path for path in files if path in reviews or not path.endswith(".txt")]
    if not files:
        raise TextgenError(f"`{given}` holds no file of {in_backticks(EXTENSIONS)}")
    return os.path.dirname(os.path.abspath(root)), files


def _walk(path: str) -> Iterator[str]:
    """Yield a file, or those of a folder in natural order (2 before 10), without hidden names and linked folders."""
    if os.path.isfile(path):
        yield path
    for folder, folders, names in os.walk(path, onerror=_refuse_folder):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=_natural)
        yield from (os.path.join(folder, name) for name in sorted(names, key=_natural) if not name.startswith("."))


def _refuse_folder(error: OSError) -> None:
    if os.path.isdir(error.filename):  # os.walk lists a file too, and fails
        raise TextgenError(f"`{error.filename}` cannot be read: {error.strerror}") from error


def _natural(path: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", path)]


def _split_of(path: str) -> str:
    parts = Path(path.lower()).parts
    for split, pattern in (
        ("test", r"test(s|ing)?(?![a-z])"),
        ("validation", r"valid|(val|dev)(?![a-z])"),  # not devices.csv
        ("unsupervised", r"unsup"),
    ):
        if any(re.match(pattern, part) for part in parts):
            return split
    return "train"
