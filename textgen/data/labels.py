"""Labels of documents: a text that carries one, the values of a column that are one, and the labels of a corpus."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textgen.config import DataConfig
from textgen.data.rows import take_text
from textgen.data.sources import split_of_name
from textgen.data.tally import RowError
from textgen.errors import TextgenError

Labels = NDArray[np.int32]  # the number of each document's label; NO_LABEL without one
NO_LABEL = -1
NO_LABEL_NAME = "none"  # a value that says in words that there is no label
MAX_LABELS = 10_000  # a column with more of them holds something else, such as ids or texts
MAX_CHARACTERS = 100
NAMED = 20  # labels in the log


class LabelledText(str):
    """A text with the label of its row or folder.

    It is a string, so whoever needs no label reads it as one. A text that is made of it, such as a part, has no label
    unless `copy_label` gives it one.
    """

    __slots__ = ("label",)
    label: str | None


def labelled(text: str, label: str | None) -> LabelledText:
    """Return a text with a label; None for a text without one."""
    result = LabelledText(text)
    result.label = label
    return result


def label_of(text: str) -> str | None:
    """Return the label of a text; None if it has none."""
    return text.label if isinstance(text, LabelledText) else None


def copy_label(text: str, source: str) -> str:
    """Return a text with the label of the text that it was made of."""
    return labelled(text, source.label) if isinstance(source, LabelledText) else text


def dataset_columns(settings: DataConfig) -> list[str]:
    """Return the columns to read: that of the text and, if there is one, that of the label."""
    return [settings.text_column, *([] if settings.label_column is None else [settings.label_column])]


# Values


def take_label(value: object, column: str) -> str | None:
    """Return the label that a value of a column is; None for null, an empty value, nan and `none`.

    Numbers and truth values become their text. White space around a label is not part of it.

    Raises:
        RowError: the value is not a label.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        label = str(value).lower()
    elif isinstance(value, int | float):  # pandas writes integers beside nulls as 1.0
        label = str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
    elif isinstance(value, str):
        label = take_text(value, column).strip()
    else:
        raise RowError(f": `{column}` is not a label: {reprlib.repr(value)}, wanted a text or a number")
    if len(label) > MAX_CHARACTERS or not label.isprintable():
        raise RowError(
            f": `{column}` is not a label: {reprlib.repr(label)}, wanted a line of at most {MAX_CHARACTERS} characters"
        )
    return None if label in ("", NO_LABEL_NAME) else label


def label_of_folder(path: str) -> str | None:
    """Return the name of a file's folder as a label; None if the folder is named after a split, such as `unsup`.

    Raises:
        RowError: the name is not a label.
    """
    name = os.path.basename(os.path.dirname(os.path.abspath(path)))
    return None if split_of_name(name) else take_label(name, "label_folders")


def class_names(features: Any, column: str) -> list[str]:
    """Return the names of the integers of a column that the library datasets calls a ClassLabel; [] of another one.

    Args:
        features: of a dataset, or their description in the metadata of a file that `datasets` wrote.
        column: its name.
    """
    feature = features.get(column) if hasattr(features, "get") else None
    names = feature.get("names") if isinstance(feature, Mapping) else getattr(feature, "names", None)
    return [str(name) for name in names] if isinstance(names, list) else []


def features_of_schema(metadata: Mapping[bytes, bytes] | None) -> Any:
    """Return the description of columns that `datasets` left in a file of Arrow or parquet; {} if there is none."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}


def name_classes(values: Iterable[object], names: Sequence[str]) -> list[object]:
    """Return values with the names of classes in place of their numbers; -1 is no class."""
    if not names:
        return list(values)
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else None if v == -1 else v for v in values]


# The labels of a corpus


class LabelNumbers:
    """Numbers labels in the order in which they are met."""

    def __init__(self) -> None:
        self._number_of: dict[str, int] = {}

    def number(self, text: str) -> int:
        """Return the number of a text's label; NO_LABEL without one.

        Raises:
            TextgenError: there are too many labels.
        """
        label = label_of(text)
        if label is None:
            return NO_LABEL
        number = self._number_of.setdefault(label, len(self._number_of))
        if number >= MAX_LABELS:
            raise TextgenError(
                f"the labels are more than {MAX_LABELS:,} different ones, the last {label!r}: "
                "does `--data.label_column` name the column of the label?"
            )
        return number

    def sort(self, used: Iterable[int]) -> tuple[tuple[str, ...], Labels]:
        """Return the names of the used labels in natural order, and the place in it of each number.

        The place of a number that is not used is NO_LABEL, as is the last element, so that NO_LABEL stays NO_LABEL.
        """
        names, wanted = list(self._number_of), set(used)
        order = sorted((n for n in range(len(names)) if n in wanted), key=lambda n: natural_key(names[n]))
        places = np.full(len(names) + 1, NO_LABEL, dtype=np.int32)
        places[order] = np.arange(len(order))
        return tuple(names[n] for n in order), places


def natural_key(label: str) -> tuple[list[str | int], str]:
    """Return a key that compares numbers as numbers; text and numbers alternate in it."""
    parts = re.split(r"([0-9]+)", label)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], label


def agree(groups: NDArray[np.int64], labels: Labels) -> tuple[Labels, int]:
    """Return the label that the copies of each text agree on, and the number of texts whose copies contradict.

    Args:
        groups: (copies,), the number of the text of each copy.
        labels: (copies,), copies without a label do not count.

    Returns:
        (texts,), NO_LABEL for a text whose copies have different labels.
    """
    num_texts = int(groups.max(initial=-1)) + 1
    beyond = np.iinfo(np.int32).max
    highest = np.full(num_texts, NO_LABEL, dtype=np.int32)
    lowest = np.full(num_texts, beyond, dtype=np.int32)
    np.maximum.at(highest, groups, labels)
    np.minimum.at(lowest, groups, np.where(labels == NO_LABEL, beyond, labels))
    return np.where(lowest == highest, highest, NO_LABEL).astype(np.int32), int((lowest < highest).sum())


def describe_labels(names: Sequence[str], labels: Labels) -> str:
    """Return the number of documents of each label as one line; of many labels the number of labels."""
    counts = np.bincount(labels[labels != NO_LABEL], minlength=len(names))
    without = f", without a label {int((labels == NO_LABEL).sum()):,}"
    if len(names) <= NAMED:
        return ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True)) + without
    once = f", {int((counts == 1).sum()):,} of them in one" if (counts == 1).any() else ""
    return f"{len(names):,} labels of {counts.min():,} to {counts.max():,} documents{once}{without}"
