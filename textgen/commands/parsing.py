"""From flags and YAML to a frozen config, or to one line that says what is wrong.

Nothing heavy (torch, accelerate, datasets) is imported here: `--help` and a wrong flag are answered without it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from textgen.config import REMOVED_VALUES, TrainConfig
from textgen.settings import build_settings, in_words, settings_of, unknown_setting

# A launcher ends all processes once one has ended. The first process says what is wrong with all of them; another one
# waits this long to be ended, and speaks only if nobody did.
PATIENCE_SECONDS = 3

# Settings of whole trainings: launch/presets in a checkout.
PRESETS = Path(__file__).parents[1] / "presets"

TRAINING = """Train an LSTM language model, alone or under `accelerate launch`.
Flags override the file of `--config`, which overrides the defaults; of a flag given twice the last counts.
A list is written `--data.files a.txt b.txt`, a switch `--dry_run`."""


def fail(message: str) -> NoReturn:
    """End this process with exit code 2; the first one says why."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(PATIENCE_SECONDS)
        message = f"process {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Parser(ArgumentParser):
    """jsonargparse's parser with one-line errors that say what is wanted."""

    def __init__(self, **kwargs: Any) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line from the first process and end with exit code 2."""
        fail(self._in_one_line(message))

    def _in_one_line(self, message: str) -> str:
        options = {name.removeprefix("--"): action for action in self._actions for name in action.option_strings}
        if wrong := re.match(r"unrecognized arguments: (\S+)", message):
            if not wrong[1].startswith("-"):
                return f"unexpected argument `{wrong[1]}`"
            return unknown_setting(wrong[1].split("=")[0].lstrip("-"), options)
        if wrong := re.match(r"argument (--\S+): expected (?:at least )?one argument", message):
            return f"`{wrong[1]}` wants a value; one that begins with a dash is written `{wrong[1]}=-...`"
        if wrong := re.match(r"the following arguments are required: (.+)", message):
            return f"an argument is missing: `{wrong[1]}`"
        if wrong := re.match(r'Parser key "([^"]+)":.*?(?:Got value|Given value): (.*)', message, re.DOTALL):
            key, value = wrong.groups()
            if (removed := REMOVED_VALUES.get((key, value.strip()))) is not None:
                return removed
            kind = getattr(options.get(key), "_typehint", getattr(options.get(key), "type", None))
            quote = (
                " (YAML reads a bare `no` as false: put it in quotes)"
                if value == "False" and "`no`" in in_words(kind)
                else ""
            )
            return f"`{key}` must be {in_words(kind)}: {' '.join(value.split())}{quote}"
        if wrong := re.match(r'Parser key "([^"]+)":\s+Unable to load config \'(.*?)\'', message):
            return f"`{wrong[1]}` must be a YAML file of settings: {wrong[2]}"
        return " ".join(message.split())


def parse_train_config(argv: Sequence[str] | None = None, *, prog: str | None = None) -> TrainConfig:
    """Parse defaults < `--config FILE` < flags; end with one line and exit code 2 where something is wrong."""
    parser = build_train_parser(prog)
    flags = _plain_flags(sys.argv[1:] if argv is None else argv, settings_of(TrainConfig))
    files = [_preset_or_file(flag.partition("=")[2]) for flag in flags if flag.startswith("--config=")]
    files = [f"--config={path}" for path in files if _check_config_file(path)]
    # a file stands before all flags, wherever it was named
    parsed = parser.parse_args(files + [flag for flag in flags if not flag.startswith("--config=")])
    try:
        return build_settings(TrainConfig, parsed.as_dict())
    except ValueError as error:
        parser.error(str(error))


def config_file(argv: Sequence[str] | None = None) -> str | None:
    """Return the file of the last `--config`, as it was named."""
    flags = _plain_flags(sys.argv[1:] if argv is None else argv, settings_of(TrainConfig))
    return next((flag.partition("=")[2] for flag in reversed(flags) if flag.startswith("--config=")), None)


def build_train_parser(prog: str | None = None) -> Parser:
    """Return the parser of a training's settings."""
    parser = Parser(prog=prog, description=TRAINING, usage="%(prog)s [--config FILE] [--SETTING VALUE] ...")
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file of settings, or a preset's name, such as quick"
    )
    parser.add_class_arguments(TrainConfig, None, fail_untyped=True)
    kinds = settings_of(TrainConfig)
    for action in parser._actions:
        kind = kinds.get(action.dest)
        if typing.get_origin(kind) is tuple:
            action.metavar = "ITEM ..."
        elif kind is bool:
            action.metavar = "[true|false]"
    return parser


def _plain_flags(argv: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """Spell flags as jsonargparse wants them: `--files a b` as `--files=["a", "b"]`, a bare `--dry_run` as true."""
    out: list[str] = []
    rest = list(argv)
    while rest:
        flag, equals, first = rest.pop(0).partition("=")
        kind = kinds.get(flag.removeprefix("--"))
        values = [first] if equals else []
        several = typing.get_origin(kind) is tuple
        while not equals and rest and not rest[0].startswith("--") and (several or (kind is bool and not values)):
            values.append(rest.pop(0))
        if flag == "--config" and not equals and rest and not rest[0].startswith("--"):
            values = [rest.pop(0)]
        if kind is bool and not values:
            values = ["true"]
        if several and not (len(values) == 1 and re.fullmatch(r"\[.*\]", values[0])):
            values = [json.dumps([_number(v) for v in values] if typing.get_args(kind)[0] is float else values)]
        out.append(f"{flag}={values[0]}" if values else flag)
    return out


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _preset_or_file(name: str) -> str:
    """Return the file that `--config` means: a preset, by its bare name, unless there is a file of that name."""
    preset = PRESETS / f"{name}.yaml"
    return str(preset) if re.fullmatch(r"[\w-]+", name) and preset.is_file() and not Path(name).is_file() else name


def _check_config_file(path: str) -> bool:
    """Tell whether a YAML file holds settings; fail where it is not to be read or a name in it is unknown."""
    try:
        # for its names only: PyYAML reads 1e-4 as text, jsonargparse as a number
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"`{path}` cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"`{path}` is not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        fail(f"`{path}`{line} is not YAML: {getattr(error, 'problem', None) or ' '.join(str(error).split())}")
    if content is None:
        return False
    if not isinstance(content, dict):
        fail(f"`{path}` is not a mapping of settings such as `batch_size: 128`: {str(content)[:40]}")
    kinds = settings_of(TrainConfig)
    for name, value in content.items():
        group = {kind for kind in kinds if kind.startswith(f"{name}.")}
        if group and not isinstance(value, dict):
            fail(f"`{name}` in `{path}` must be a group of settings: {'null' if value is None else value}")
        for full in [f"{name}.{key}" for key in value] if group else [str(name)]:
            if full not in kinds:
                groups = {kind.split(".")[0] for kind in kinds}
                fail(unknown_setting(full, [*kinds, *groups], f" in `{path}`"))
    return True
