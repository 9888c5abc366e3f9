"""Writes the tables of docs/reference/ from the parsers of the command line: `python -m docs.write_reference`.

A test compares them with what this module would write.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from textgen.cli import COMMAND_GROUPS
from textgen.commands.parsing import Parser, build_train_parser
from textgen.config import TrainConfig
from textgen.settings import in_words, settings_of

FOLDER = Path(__file__).parent / "reference"

SETTINGS = """# Settings of a training

A setting is a flag of `python train_distributed.py` and of `textgen train`, and a line of a YAML file for `--config`.
Flags override the file, the file overrides the defaults. A name with a dot is nested in YAML:

```yaml
max_minutes: 5
model:
  hidden_size: 512
```

A list is written `--data.files a.txt b.txt`, a switch `--dry_run` or `--dry_run false`. A setting without a default is
`null`: off, or not set.
`--config` also takes a preset's name: `quick`, `original-char`, `default`, `large`. The settings of a run are in its
`config.yaml`.
"""

COMMANDS = """# Commands

`textgen COMMAND --help` prints the same in a terminal. RUN is the folder of a run, such as `runs/quick`. A CHECKPOINT
is the folder of a run, one of its `checkpoints/step-*`, or `hub:OWNER/NAME` for a model on the Hugging Face hub.

Results go to standard output, messages to standard error. A wrong setting or file ends a command with one line that
starts with `error:`, and exit code 2.
"""


def settings_page() -> str:
    """Return the page of the settings of a training."""
    kinds = settings_of(TrainConfig)
    text = SETTINGS
    for group in build_train_parser()._action_groups:
        if actions := [action for action in group._group_actions if action.dest in kinds]:
            rows = [[f"`{action.dest}`", _words(kinds[action.dest]), *_default_and_text(action)] for action in actions]
            title = (group.title or "").split(". ")[0].rstrip(".:")
            text += f"\n## {title[:1].upper()}{title[1:]}\n\n" + _table("setting", rows)
    return text


def commands_page() -> str:
    """Return the page of all commands with their flags."""
    text = COMMANDS
    for title, commands in COMMAND_GROUPS.items():
        text += f"\n## {title.capitalize()}\n"
        for name, line in commands.items():
            text += f"\n### textgen {name}\n\n"
            if name in ("train", "prepare", "doctor"):
                summary = line[:1].upper() + line[1:].split(";")[0]
                text += f"{summary}. Its flags are the [settings](settings.md) of a training"
                text += ", and `--json`; `--profile RUN` reads a profile instead.\n" if name == "doctor" else ".\n"
                continue
            parser = parser_of(name)
            actions = [action for action in parser._actions if action.dest not in ("help", argparse.SUPPRESS)]
            rows = [[f"`{_name(action)}`", _kind(action), *_default_and_text(action)] for action in actions]
            text += f"{' '.join((parser.description or line).split())}\n\n" + _table("argument", rows)
    return text


def parser_of(command: str) -> Parser:
    """Return the parser that a command builds: the command is ended where it would parse its flags."""
    parsers: list[Parser] = []

    class Parsed(BaseException):
        pass

    def keep(parser: Parser, *_: Any, **__: Any) -> None:
        parsers.append(parser)
        raise Parsed

    run = getattr(import_module(f"textgen.commands.{command}"), f"{command}_command")
    with mock.patch.object(Parser, "parse_args", keep), contextlib.suppress(Parsed):
        run([])
    return parsers[0]


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest).upper()


def _words(kind: Any) -> str:
    """Return the words for a type without the article, and without the null that a missing default says."""
    return re.sub(r"^(an?|one of) | or null$", "", in_words(kind))


def _kind(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "switch"
    kind = _words(getattr(action, "_typehint", None) or action.type or str)
    return f"one or more: {kind}" if action.nargs == "+" else kind


def _default_and_text(action: argparse.Action) -> list[str]:
    default: Any = action.default
    if action.default in (None, argparse.SUPPRESS) or action.nargs == 0 or not action.option_strings:
        default = None
    if isinstance(default, list | tuple):
        default = " ".join(f'"{item}"' if " " in str(item) else str(item) for item in default)
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    return [f"`{shown}`" if default not in (None, "") else "", " ".join((action.help or "").split())]


def _table(name: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [[name, "value", "default", "meaning"], ["---"] * 4, *rows]
    cells = ([re.sub(r"([|<])", r"\\\1", cell) for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


PAGES = {"settings.md": settings_page, "commands.md": commands_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
