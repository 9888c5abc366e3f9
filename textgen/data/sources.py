"""The files that paths, folders and globs name, and the split that each belongs to.

docs/how-to/data.md states the rules for a user. Rules 1 are those of textgen 0.1, for runs that were started with them.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from textgen.data.decompression import ENDINGS as COMPRESSIONS
from textgen.errors import TextgenError, in_backticks, one_line
from textgen.files import JSON_BYTES, parse_json

TEXT_ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".tsv")
EXTENSIONS = (*TEXT_ENDINGS, ".parquet", ".arrow")
COMPRESSED = tuple(ending + compression for ending in TEXT_ENDINGS for compression in COMPRESSIONS)
EXTENSIONS_1 = (*TEXT_ENDINGS, ".parquet")
ARCHIVES = (
    ".zip", ".tar", ".7z", ".rar", ".tgz", ".tbz2", ".txz", ".tzst", *(f".tar{ending}" for ending in COMPRESSIONS)
)  # fmt: skip

_DATASET_FILES = ("state.json", "dataset_info.json")  # of `Dataset.save_to_disk`, beside its .arrow files

SPLITS = {
    "train": ("train",),
    "validation": ("valid", "validation", "val", "dev"),
    "test": ("test", "tests", "testing"),
    "unsupervised": ("unsup", "unsupervised"),
}
_SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}
_WORD = re.compile(rf"({'|'.join(_SPLIT_OF_WORD)})[0-9]*")
# What data sets put after the word: test-00000-of-00001, dev-v2.0, validation_matched, the hash of a shard.
_AFTER_WORD = re.compile(r"|v?[0-9]+|of|(part|shard|split|set|data|matched|mismatched)[0-9]*|(?=.*[0-9])[0-9a-f]{6,}")

logger = logging.getLogger("textgen")


def list_files(paths: Sequence[str], *, rules: int = 2) -> dict[str, str]:
    """Map each file that `paths` name, once and in order, to its split; log the files that are not taken.

    A split is found in the parts of a path below the given folder. Of a given file only its name counts.

    Args:
        paths: files, folders and globs.
        rules: `reading_rules` of the DataConfig.

    Raises:
        TextgenError: a path names no file that can be read.
    """
    split_of = _split_of if rules > 1 else _split_of_1
    found: dict[str, tuple[str, str]] = {}  # absolute path -> path, split
    for given in paths:
        root, files = _expand(os.path.expanduser(given), rules)
        for path in files:
            absolute = os.path.abspath(path)
            found.setdefault(absolute, (path, split_of(os.path.relpath(absolute, root))))
    return dict(found.values())


# Finding files


@dataclass
class _Found:
    """The files below a path that are taken, and those that are not."""

    files: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    """reason -> number of files"""


def _expand(given: str, rules: int) -> tuple[str, list[str]]:
    """Return the folder from which on the parts of a path name a split, and the files."""
    mode = _mode(given)
    if mode is not None and not stat.S_ISDIR(mode):
        _check_given_file(given, mode, rules)
        return os.path.dirname(os.path.abspath(given)), [given]
    if mode is not None:
        root, matches = given, [given]
    elif "://" in given:
        raise TextgenError(f"`{given}` is an address: texts are read from a disk; `data.store` may be an address")
    elif glob.has_magic(given):
        root, pattern = _literal_folder(given)
        matches = sorted(glob.glob(pattern, recursive=True), key=_natural)
        if not matches:
            raise TextgenError(f"`{given}` matches no file")
    else:
        raise TextgenError(f"`{given}` does not exist")
    found = _Found()
    for match in matches:
        _walk(match, found, rules)
    reviews = set(filter(re.compile(r".*(pos|neg|unsup)[/\\][0-9]+_[0-9]+\.txt").fullmatch, found.files))
    if reviews:  # an aclImdb tree: its other .txt files hold addresses and ratings
        taken = [path for path in found.files if path in reviews or not path.endswith(".txt")]
        found.left[".txt beside the reviews"] += len(found.files) - len(taken)
        found.files = taken
    if not found.files:
        raise TextgenError(f"`{given}` holds no file of {_wanted(rules)}{_but(found)}")
    if found.left:
        logger.info("not read in `%s`: %s", given, _in_words(found.left))
    for path in found.archives:
        logger.warning("NOT READ: `%s` is an archive; unpack it to read its files", path)
    return os.path.dirname(os.path.abspath(root)), found.files


def _mode(given: str) -> int | None:
    """Return the kind of what a path names; None if it does not exist."""
    try:
        return os.stat(given).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a ValueError: a null byte
        return None
    except OSError as error:
        raise TextgenError(f"`{given}` cannot be read: {error.strerror}") from error


def _check_given_file(given: str, mode: int, rules: int) -> None:
    name = given.lower()
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise TextgenError(
            f"`{given}` is {kind}, and texts are read more than once: write them to a file; a compressed file can be "
            "given as it is"
        )
    if name.endswith(ARCHIVES):
        raise TextgenError(f"`{given}` is an archive: unpack it, and give the folder of its files")
    if not name.endswith(_endings(rules)):
        raise TextgenError(f"`{given}` is not one of {_wanted(rules)}")
    if os.path.getsize(given) == 0:
        raise TextgenError(f"`{given}` is empty")


def _endings(rules: int) -> tuple[str, ...]:
    return EXTENSIONS + COMPRESSED if rules > 1 else EXTENSIONS_1


def _wanted(rules: int) -> str:
    if rules == 1:
        return f"{in_backticks(EXTENSIONS_1)}; `--data.reading_rules 2` reads compressed files"
    compressed = f"and texts compressed as {in_backticks(COMPRESSIONS)}"
    return f"{in_backticks(EXTENSIONS)}, {compressed}; a plain text needs a name in `.txt`"


def _literal_folder(given: str) -> tuple[str, str]:
    """Return the folder that a glob begins with, and the glob with that folder's own brackets escaped."""
    root, rest = "", given
    while (cut := re.match(r"[/\\]*[^/\\]+[/\\]+", rest)) and os.path.isdir(root + cut[0]):
        root, rest = root + cut[0], rest[cut.end() :]
    return root, glob.escape(root) + rest


def _walk(path: str, found: _Found, rules: int) -> None:
    """Add a file, or those of a folder in natural order (2 before 10), without hidden names and linked folders."""
    if not os.path.isdir(path):
        _add(path, found, rules)
        return
    for folder, folders, names in os.walk(path, onerror=_refuse_folder):
        hidden = [name for name in folders + names if name.startswith(".")]
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name)) and name not in hidden]
        found.left += Counter({"hidden": len(hidden), "linked folders": len(linked)})
        folders[:] = sorted((name for name in folders if name not in hidden), key=_natural)
        if rules > 1 and (saved := _saved_dataset(folder)) is not None:
            found.files += saved
            others = set(names) - {*map(os.path.basename, saved), *_DATASET_FILES, *hidden}
            found.left += Counter(_ending(name.lower()) or "without ending" for name in others)
            continue
        if rules > 1 and "dataset_dict.json" in names:
            names.remove("dataset_dict.json")
        for name in sorted((name for name in names if name not in hidden), key=_natural):
            _add(os.path.join(folder, name), found, rules)


def is_saved_dataset(folder: str) -> bool:
    """Tell whether a folder is one of `save_to_disk` of a `datasets.Dataset` or `DatasetDict`."""
    return os.path.isfile(os.path.join(folder, "dataset_dict.json")) or _saved_dataset(folder) is not None


def _saved_dataset(folder: str) -> list[str] | None:
    """Return the files that the `state.json` of `Dataset.save_to_disk` names; None if the folder has no such file.

    A file may come from a stranger: it may name files of its folder alone, and no link out of it.
    """
    path = os.path.join(folder, "state.json")
    if not all(os.path.isfile(os.path.join(folder, name)) for name in _DATASET_FILES):
        return None
    try:
        with open(path, "rb") as file:
            state = parse_json(file.read(JSON_BYTES + 1))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TextgenError(f"`{path}` is not the state of a saved dataset: {one_line(error)}") from error
    if state.get("_indices_data_files"):
        raise TextgenError(f"`{path}` names rows by an index, as old versions of datasets did: save the dataset again")
    for name in names:
        file_path = os.path.join(folder, str(name))
        if (
            str(name) != os.path.basename(str(name))
            or not str(name).endswith(".arrow")
            or os.path.islink(file_path)
            or not os.path.isfile(file_path)
        ):
            raise TextgenError(f"`{path}` names `{name}`, which is not a plain .arrow file of its folder")
    return [os.path.join(folder, name) for name in names]


def _add(path: str, found: _Found, rules: int) -> None:
    name = os.path.basename(path).lower()
    if name.endswith(ARCHIVES):
        found.archives.append(path)
    elif not name.endswith(_endings(rules)):
        found.left[_ending(name) or "without ending"] += 1
    elif not os.path.isfile(path):  # a pipe or a broken link
        found.left["not a plain file"] += 1
    else:
        found.files.append(path)


def _ending(name: str) -> str:
    """Return the ending of a name, with the one before it if the last one is a compression."""
    stem, ending = os.path.splitext(name)
    return os.path.splitext(stem)[1] + ending if ending in COMPRESSIONS else ending


def _but(found: _Found) -> str:
    if found.archives:
        return f"; it holds the archive `{found.archives[0]}`: unpack it"
    return f"; it holds {_in_words(found.left)}" if found.left else ""


def _in_words(left: Counter[str]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in left.most_common())


def _refuse_folder(error: OSError) -> None:
    raise TextgenError(f"`{error.filename}` cannot be read: {error.strerror}") from error


def _natural(path: str) -> list[str | int]:
    """Return a key that compares numbers as numbers; text and numbers alternate in it."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", path))]


# Splits


def _split_of(path: str) -> str:
    """Return the split that a path names: the part nearest to the file that names one decides."""
    return next((split for part in reversed(Path(path).parts) if (split := split_of_name(part))), "train")


def split_of_name(name: str) -> str | None:
    """Return the split that a folder or file is named after; None if it is named after none.

    A word for a split is the whole name without its endings, or has the name of a data set before it (`imdb_test`) or
    numbers and the like after it (`test-00000-of-00001`). A name with spaces is a title (`Test Pilot`).
    """
    stem = name.lower()
    for endings in (COMPRESSIONS, EXTENSIONS):
        stem = os.path.splitext(stem)[0] if stem.endswith(endings) else stem
    stem = re.sub(r" ?\([0-9]+\)$| [0-9]+$", "", stem)  # a copy: `test (1).txt`
    second = re.sub(r"\.[a-z]{2,3}$", "", stem)  # a language or the like: `test.en.txt`
    return _split_of_stem(stem) or _split_of_stem(second)


def _split_of_stem(stem: str) -> str | None:
    if re.search(r"\s", stem):
        return None
    for piece in reversed(re.split(r"[-_.]", stem)):
        if match := _WORD.fullmatch(piece):
            return _SPLIT_OF_WORD[match[1]]
        if not _AFTER_WORD.fullmatch(piece):
            return None
    return None


def _split_of_1(path: str) -> str:
    parts = Path(path.lower()).parts
    for split, pattern in (
        ("test", r"test(s|ing)?(?![a-z])"),
        ("validation", r"valid|(val|dev)(?![a-z])"),
        ("unsupervised", r"unsup"),
    ):
        if any(re.match(pattern, part) for part in parts):
            return split
    return "train"
