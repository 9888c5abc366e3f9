"""Flags and YAML to a frozen config, or to one line that says what is wrong.

No heavy package (torch, accelerate, datasets) is imported here, so that `--help` and a wrong flag are answered at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from textgen.config import (
    LABEL_SETTINGS,
    READING_SETTINGS,
    REMOVED_VALUES,
    SPLITS,
    DataConfig,
    TrainConfig,
)
from textgen.errors import TextgenError, in_backticks
from textgen.files import decode_text
from textgen.settings import build_settings, in_words, settings_of, unknown_setting

# A launcher ends all processes once one has ended. Process 0 prints an error that all processes share. Another process
# waits this long for the launcher to end it; then its error is its own, and it prints it.
PEER_WAIT_SECONDS = 3

# Presets for `--config NAME`. In a checkout this is a link to launch/presets.
PRESETS = Path(__file__).parents[1] / "presets"

TRAINING = """Train an LSTM language model, alone or under `accelerate launch`.
Flags override the file of `--config`, which overrides the defaults. If a flag is given twice, the last one counts.
A list is written `--data.files a.txt b.txt`, a switch `--dry_run`."""

# The order of `--help`: first the flags of a first training, then the rest by subject. A setting that no group names is
# in the last group of its section.
HELP_GROUPS = {
    "the basics": (
        "config", "run_dir", "data.files", "max_epochs", "max_minutes", "batch_size", "learning_rate",
        "model.hidden_size", "model.num_layers", "dry_run",
    ),
    "optimization": (
        "seq_len", "seed", "max_steps", "lr_schedule", "warmup_steps", "max_grad_norm", "weight_decay", "adam_betas",
        "ema_decay", "early_stopping_patience",
    ),
    "evaluation and samples": (
        "log_every", "evaluate_every", "evaluate_documents", "sample_prompts", "sample_temperatures", "sample_tokens",
    ),
    "checkpoints, and the end of a training": (
        "init_from", "save_every", "keep_last", "checkpoint_copy", "resume", "resume_override", "stop_signal",
    ),
    "processes and hardware": (
        "gradient_accumulation_steps", "mixed_precision", "gradient_compression", "distributed_timeout",
        "elastic", "deterministic", "cuda_graph", "profile",
    ),
}  # fmt: skip
METAVARS = {int: "N", float: "X", bool: "[true|false]", str: "TEXT"}


def fail(message: str) -> NoReturn:
    """Print an error and end with exit code 2; processes other than 0 wait first, to be ended in silence."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(PEER_WAIT_SECONDS)
        message = f"process {rank}: {message}"
    message = message.replace("\n", "\\n").replace("\r", "\\r")  # of a file name: an error is one line
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def require_writable(path: str) -> None:
    """Fail if a file cannot be written, or would take the place of something that is not a file, such as a device."""
    if not Path(path).parent.is_dir() or Path(path).is_dir():
        fail(f"`{path}` cannot be written: it is a folder, or its folder does not exist")
    if Path(path).exists() and not Path(path).is_file():
        fail(f"`{path}` is not a file")


class HelpFormatter(DefaultHelpFormatter):
    """Prints a short usage; of each flag the kind of its value, the text, and the default unless the text has it."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 30, **kwargs})  # type: ignore[no-untyped-call]

    def _format_usage(self, usage: str | None, actions: Any, *rest: Any) -> str:
        if usage is None:  # argparse would list every flag
            names = [f"{a.metavar or a.dest}{' ...' * (a.nargs == '+')}" for a in actions if not a.option_strings]
            usage = " ".join(["%(prog)s [--FLAG VALUE] ...", *names])
        return str(super()._format_usage(usage, actions, *rest))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action).replace("(type: %(type)s, default:", "(default:")
        return (action.help or "") if action.default is None and "efault:" in (action.help or "") else text


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors of one line that name the flag, the wanted value and the given one."""

    def __init__(self, **kwargs: Any) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and end with exit code 2."""
        fail(self._explain(message, ex))

    def _explain(self, message: str, error: Exception | None) -> str:
        """Return a parsing error in one line, in the words of this project.

        argparse's ArgumentError has the flag as an attribute. jsonargparse's errors have flag and value in their text
        alone, so pyproject.toml pins jsonargparse's minor version.
        """
        options = {name.removeprefix("--"): action for action in self._actions for name in action.option_strings}
        if isinstance(error, argparse.ArgumentError) and error.message.startswith("expected "):
            flag = error.argument_name
            return f"`{flag}` wants a value; one that begins with a dash is written `{flag}=-...`"
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            if not found[1].startswith("-"):
                return f"unexpected argument `{found[1]}`"
            return unknown_setting(found[1].split("=")[0].lstrip("-"), options)
        if found := re.match(r"the following arguments are required: (.+)", message):
            return f"an argument is missing: `{found[1]}`"
        if message.startswith('Parser key "data.sources":'):
            return f"`data.sources` must be {in_words(settings_of(TrainConfig)['data.sources'])}"
        if found := re.match(r'Parser key "([^"]+)":.*?(?:Got value|Given value): (.*)', message, re.DOTALL):
            name, value = found.groups()
            if (removed := REMOVED_VALUES.get((name, value.strip()))) is not None:
                return removed
            kind = getattr(options.get(name), "_typehint", getattr(options.get(name), "type", None))
            wanted = in_words(kind)
            is_bare_no = value == "False" and "`no`" in wanted
            hint = " (YAML reads a bare `no` as false: put it in quotes)" if is_bare_no else ""
            return f"`{name}` must be {wanted}: {' '.join(value.split())}{hint}"
        if found := re.match(r'Parser key "([^"]+)":\s+Unable to load config \'(.*?)\'', message):
            return f"`{found[1]}` must be a YAML file of settings: {found[2]}"
        return " ".join(message.split())


class _RaisingParser(Parser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise TextgenError(self._explain(message, ex))


def parse_train_config(argv: Sequence[str] | None = None, *, prog: str | None = None) -> TrainConfig:
    """Parse the settings of a training; end with exit code 2 if one is wrong.

    Flags override files of `--config`, which override the defaults.

    Args:
        argv: the flags; None for those of this process.
        prog: the name of the program in `--help`.
    """
    try:
        return _parse_settings(build_train_parser(prog), sys.argv[1:] if argv is None else argv)
    except TextgenError as error:
        fail(str(error))


def read_config_file(name: str) -> TrainConfig:
    """Return the settings of a YAML file or a preset.

    Raises:
        TextgenError: the file cannot be read, or a setting is wrong.
    """
    return _parse_settings(_add_settings(_RaisingParser()), [f"--config={name}"])


def take_base(config: TrainConfig, argv: Sequence[str] | None = None) -> TrainConfig:
    """Return the settings of a training with the shape and the tokenizer of the model that `init_from` names.

    Args:
        config: the parsed settings.
        argv: the flags that they were parsed from; None for those of this process.

    Raises:
        TextgenError: the model cannot be read, or a flag wants another shape.
    """
    if config.init_from is None:
        return config
    flags = _plain_flags(sys.argv[1:] if argv is None else argv, settings_of(TrainConfig))
    from textgen.training.start import settings_from_base  # imports torch

    from_files = [name for path in _files(flags) for name in names_in(path)]
    return settings_from_base(config, given=set(_given(flags)), from_files=from_files)


def _given(flags: Sequence[str]) -> Iterator[str]:
    """Yield the names of the settings in flags that were parsed; a flag of a whole section gives several."""
    sections = {name.partition(".")[0] for name in settings_of(TrainConfig) if "." in name}
    for flag, following in pairwise([*flags, ""]):
        name, equals, value = flag.removeprefix("--").partition("=")
        if name not in sections or not flag.startswith("--"):
            yield name
            continue
        content = yaml.safe_load(value if equals else following)
        if not isinstance(content, dict):  # the name of a file
            content = yaml.safe_load(Path(content).read_bytes())
        yield from (f"{name}.{key}" for key in content or {})


def given_run_dir(flags: Sequence[str]) -> str | None:
    """Return the value of the last `--run_dir`; None if there is none."""
    found = None
    for flag, following in pairwise([*flags, ""]):
        if flag == "--run_dir":
            found = following
        elif flag.startswith("--run_dir="):
            found = flag.partition("=")[2]
    return found


def names_in(config_file: str) -> list[str]:
    """Return the names of the settings that a YAML file or a preset sets.

    Raises:
        TextgenError: the file cannot be read, or a name is unknown.
    """
    return _check_config_file(_preset_or_file(config_file))


def _files(flags: Sequence[str]) -> list[str]:
    return [flag.partition("=")[2] for flag in flags if flag.startswith("--config=")]


def _parse_settings(parser: Parser, argv: Sequence[str]) -> TrainConfig:
    flags = _plain_flags(argv, settings_of(TrainConfig))
    files = [f"--config={_preset_or_file(name)}" for name in _files(flags) if names_in(name)]
    # Files come first, so that every flag overrides them, also a flag that was given before `--config`.
    parsed = parser.parse_args(files + [flag for flag in flags if not flag.startswith("--config=")])
    try:
        return build_settings(TrainConfig, parsed.as_dict())
    except ValueError as error:
        parser.error(str(error))


def add_reading_flags(parser: Parser, *, labels: bool = False) -> None:
    """Add the flags of a training that say how documents are read from files; `labels` adds those of labels."""
    kinds, defaults = settings_of(DataConfig), DataConfig()
    for name in READING_SETTINGS + (LABEL_SETTINGS if labels else ()):
        help_text = f"as `--data.{name}` of a training"
        parser.add_argument(f"--{name}", type=kinds[name], default=getattr(defaults, name), help=help_text)


def reading_settings(args: Any, *data: str) -> DataConfig:
    """Return the settings that these flags give for the files of `data`; default those of `--data`.

    Raises:
        TextgenError: a value is not allowed, or all of `data` are splits, which are read as the training read them.
    """
    values = {name: args[name] for name in READING_SETTINGS + LABEL_SETTINGS if name in args}
    try:
        settings = DataConfig(**values)
    except ValueError as error:
        raise TextgenError(str(error)) from error
    data = data or (args.data,)
    for name, value in values.items():
        if all(one in SPLITS for one in data) and value != getattr(DataConfig(), name):
            raise TextgenError(f"`{name}` {value} is for files; the split `{data[0]}` is read as the training read it")
    return settings


def config_file(argv: Sequence[str] | None = None) -> str | None:
    """Return the argument of the last `--config`; None if there is no `--config`."""
    flags = _plain_flags(sys.argv[1:] if argv is None else argv, settings_of(TrainConfig))
    return next(reversed(_files(flags)), None)


def build_train_parser(prog: str | None = None) -> Parser:
    """Return a parser with a flag for every setting of a training."""
    parser = Parser(prog=prog, description=TRAINING, usage="%(prog)s [--config FILE] [--SETTING VALUE] ...")
    return _add_settings(parser)


def _add_settings(parser: Parser) -> Parser:
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file of settings, or a preset's name, such as quick"
    )
    parser.add_class_arguments(TrainConfig, None, fail_untyped=True)
    kinds = settings_of(TrainConfig)
    for action in parser._actions:
        if action.dest == "data.sources":
            # `build_settings` checks the items, since its errors say which one is wrong. If an item were a dataclass,
            # jsonargparse would import what a `class_path` in it names.
            action._typehint = tuple[dict, ...]  # type: ignore[attr-defined, type-arg]
        if action.dest in kinds:
            action.metavar = _metavar(kinds[action.dest])
        elif action.dest in ("data", "tokenizer", "model", "tracking", "data.sources.help"):
            action.help = argparse.SUPPRESS  # a file of one section; `--config` is the documented way
    _group_flags(parser)
    return parser


def _metavar(kind: Any) -> str:
    """Return the word for a setting's value in `--help`."""
    if typing.get_origin(kind) is tuple:
        return "ITEM ..."
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # a setting that may be null
        return _metavar(typing.get_args(kind)[0])
    return METAVARS.get(kind) or "{" + ",".join(map(str, typing.get_args(kind))) + "}"


def _group_flags(parser: Parser) -> None:
    """Sort the flags of `--help` into the groups of `HELP_GROUPS`; the other groups keep the rest."""
    options, settings, *sections = parser._action_groups[1:]
    settings.title = "more settings"
    actions = {action.dest: action for action in parser._actions}
    found: list[str] = []
    for title, names in HELP_GROUPS.items():
        group = parser.add_argument_group(title)
        group._group_actions += [actions[name] for name in names]
        found += names
    for group in (options, settings, *sections):
        group._group_actions[:] = [action for action in group._group_actions if action.dest not in found]
    groups = parser._action_groups[-len(HELP_GROUPS) :]
    parser._action_groups = [*parser._action_groups[:1], *groups, settings, *sections, options]


def _plain_flags(argv: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """Return flags in jsonargparse's spelling.

    A list `--files a b` becomes `--files=["a", "b"]`, and a switch `--dry_run` becomes `--dry_run=true`.

    Args:
        argv: the flags as a user writes them.
        kinds: the types of all settings by dotted name.
    """
    out: list[str] = []
    rest = list(argv)
    while rest:
        flag, equals, first = rest.pop(0).partition("=")
        kind = kinds.get(flag.removeprefix("--"))
        values = [first] if equals else []
        is_list = typing.get_origin(kind) is tuple
        # A list takes all words up to the next flag; a switch and `--config` take one.
        takes_one = kind is bool or flag == "--config"
        while not equals and rest and not re.match("--|-h$", rest[0]) and (is_list or (takes_one and not values)):
            values.append(rest.pop(0))
        if kind is bool and not values:
            values = ["true"]
        if is_list:  # YAML holds no bytes that are not text
            values = [decode_text(os.fsencode(value), f"`{flag}`") for value in values]
        if is_list and not (len(values) == 1 and re.fullmatch(r"\[.*\]", values[0])):  # one word may be a YAML list
            values = [json.dumps([_number(v) for v in values] if typing.get_args(kind)[0] is float else values)]
        out.append(f"{flag}={values[0]}" if values else flag)
    return out


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _preset_or_file(name: str) -> str:
    """Return the path for a `--config` argument: a file of that name if there is one, else the preset's file."""
    preset = PRESETS / f"{name}.yaml"
    return str(preset) if re.fullmatch(r"[\w-]+", name) and preset.is_file() and not Path(name).is_file() else name


def _check_config_file(path: str) -> list[str]:
    """Return the names of the settings in a YAML file.

    Raises:
        TextgenError: the file cannot be read, or a name is unknown.
    """
    try:
        # Only the names are checked here. jsonargparse reads the values: PyYAML reads 1e-4 as text.
        content = yaml.safe_load(decode_text(Path(path).read_bytes(), f"`{path}`"))
    except OSError as error:
        presets = in_backticks(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        is_name = isinstance(error, FileNotFoundError) and not Path(path).suffix
        hint = f"; the presets are {presets}" if is_name else ""
        raise TextgenError(f"`{path}` cannot be read: {error.strerror}{hint}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise TextgenError(
            f"`{path}`{line} is not YAML: {getattr(error, 'problem', None) or ' '.join(str(error).split())}"
        ) from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise TextgenError(f"`{path}` is not a mapping of settings such as `batch_size: 128`: {str(content)[:40]}")
    kinds = settings_of(TrainConfig)
    names = []
    for name, value in content.items():
        group = {kind for kind in kinds if kind.startswith(f"{name}.")}
        if group and not isinstance(value, dict):
            raise TextgenError(
                f"`{name}` in `{path}` must be a group of settings: {'null' if value is None else value}"
            )
        for full in [f"{name}.{key}" for key in value] if group else [str(name)]:
            if full not in kinds:
                groups = {kind.split(".")[0] for kind in kinds}
                raise TextgenError(unknown_setting(full, [*kinds, *groups], f" in `{path}`"))
            names.append(full)
    return names
