"""Conversion of settings between dataclasses and plain values, and the words for their types in errors."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

# Settings of the command, not of the training: two runs that differ in these alone have the same result.
COMMAND_SETTINGS = {"run_dir", "resume", "resume_override", "profile", "dry_run"}

Settings = TypeVar("Settings")

# The type of settings that JSON holds as an object of numbers; the settings are frozen, so they hold pairs.
PAIRS = tuple[tuple[str, float], ...]


def unknown_setting(name: str, known: Iterable[str], where: str = "") -> str:
    """Return the error for an unknown setting, with the nearest known one.

    Args:
        name: the unknown name.
        known: the names of all settings.
        where: a part of the sentence after the name, such as " in `FILE`".
    """
    nearest = [option for option in known if option.endswith(f".{name}")]  # `vocab_size` without its `tokenizer.`
    nearest = nearest or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown setting `{name}`{where}" + (f"; the nearest is `{nearest[0]}`" if nearest else "")


def in_words(kind: Any) -> str:
    """Return the words for a type in "`name` must be ..."."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else in_words(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in parts)
    if kind == PAIRS:
        return 'an object of numbers such as {" good": 2}'
    if _item_settings(kind) is not None:
        return "a list of mappings with a `name` and a `weight`"
    if origin is tuple:
        items = {int: "integers", float: "numbers", str: "texts"}.get(parts[0]) or in_words(parts[0])
        return f"a list of {items}" if parts[-1] is ... else f"a list of {len(parts)} {items}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))


def settings_of(settings: type, prefix: str = "") -> dict[str, Any]:
    """Return the types of all settings by dotted name, those of nested dataclasses included."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(settings).items():
        if dataclasses.is_dataclass(kind):
            kinds |= settings_of(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            kinds[prefix + name] = kind
    return kinds


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name, which is the name of the flag."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def build_settings(settings: type[Settings], values: Mapping[str, Any], prefix: str = "") -> Settings:
    """Build a dataclass of settings, and the dataclasses in it, from plain values as in JSON.

    Args:
        settings: the dataclass.
        values: the values by name; those of a nested dataclass are a mapping. A list becomes a tuple.
        prefix: the prefix of the dotted names in errors.

    Raises:
        ValueError: a setting is unknown, or its value is not allowed. The message has the dotted name.
    """
    kinds = typing.get_type_hints(settings)
    built: dict[str, Any] = {}
    for name, value in values.items():
        if name == "__path__" or (name == "config" and not prefix):  # jsonargparse adds the source of the values
            continue
        if name not in kinds:
            raise ValueError(unknown_setting(str(name), kinds).replace(f"`{name}`", f"`{prefix}{name}`", 1))
        kind = kinds[name]
        if kind == PAIRS and isinstance(value, Mapping):
            value = [(str(key), number) for key, number in value.items()]
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            built[name] = build_settings(typing.cast(type, kind), value, f"{prefix}{name}.")
        elif (item := _item_settings(kind)) is not None and isinstance(value, list | tuple):
            parts = enumerate(map(_as_mapping, value))
            built[name] = tuple(build_settings(item, part, f"{prefix}{name}[{i}].") for i, part in parts)
        elif not _fits(value, kind):
            shown = "null" if value is None else str(value)[:40]
            raise ValueError(f"`{prefix}{name}` must be {in_words(kind)}: {shown}")
        else:
            built[name] = _as_tuple(value) if typing.get_origin(kind) is tuple else value
    for field in dataclasses.fields(typing.cast(Any, settings)):
        if field.name not in built and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"`{prefix}{field.name}` is missing")
    try:
        return settings(**built)
    except ValueError as error:
        names = "|".join(kinds)  # a nested dataclass does not know its prefix
        raise ValueError(re.sub(f"`({names})`", rf"`{prefix}\1`", str(error)) if prefix else str(error)) from None


def _item_settings(kind: Any) -> type | None:
    """Return the dataclass of the items if a type is a tuple of settings."""
    item = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
    return typing.cast(type, item) if dataclasses.is_dataclass(item) else None


def _as_mapping(value: Any) -> Mapping[str, Any]:
    """Return an item of a list of settings as a mapping; Python may give a dataclass.

    Raises:
        ValueError: it is none of them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"`sources` must be mappings with a `name` and a `weight`: {str(value)[:40]}")
    return value


def complete_record(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings of a training with those that its version of textgen did not have yet.

    A default would be wrong for them: `data.reading_rules` was 1 before there was such a setting.

    Raises:
        ValueError, TypeError: the record is not a mapping.
    """
    completed = dict(settings)
    if isinstance(data := completed.get("data"), dict):
        completed["data"] = {"reading_rules": 1} | data
    return completed


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a plain value is allowed for a type; a list is allowed for a tuple, an integer for a float."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, list | tuple) or (parts[-1] is not ... and len(value) != len(parts)):
            return False
        kinds = itertools.repeat(parts[0]) if parts[-1] is ... else parts
        return all(_fits(item, part) for item, part in zip(value, kinds, strict=False))
    return type(value) in ((int, float) if kind is float else (kind,))
