"""The command `play`: write a text in the terminal, in turns with a model.

prompt_toolkit gives a terminal its editing keys. A pipe, a dumb terminal, or a machine without it gets plain lines.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from textgen.commands.model_argument import add_model_arguments, open_decoder
from textgen.commands.parsing import Parser
from textgen.commands.prompts import require_drawable
from textgen.commands.sample import LISTS, first_interrupt, stream_samples
from textgen.config import SamplingConfig
from textgen.console import escape_controls, setup_logging
from textgen.errors import TextgenError, user_error
from textgen.files import decode_text, write_atomic
from textgen.settings import build_settings

if TYPE_CHECKING:
    from textgen.decoding.draft import Draft
    from textgen.decoding.samples import Sample

HELP = """\
A line is appended to the text as it is typed, and the model continues from there. Begin it with a space if a new word
begins. An empty line lets the model continue. Ctrl-C stops a continuation. A line that begins with a colon is a
command; write `::` to begin a text with a colon.

  :again       another continuation of the same beginning
  :undo        back to before the last continuation or line
  :n 3         draw three continuations at a time
  :pick 2      continue from the second of them
  :label good  label of the whole text, of a model with labels; `none` takes it away
  :t 0.8       temperature; so do :p (top_p), :k (top_k) and the long names of the settings below.
               A name alone shows the value, `none` turns a filter off
  :text        the text so far
  :save FILE   write the text to a file; `:save! FILE` replaces one that exists
  :help, :quit (or Ctrl-D)
"""
SHORT_NAMES = {"t": "temperature", "p": "top_p", "k": "top_k"}
NOT_HERE = {*LISTS, "logprobs"}  # settings of `sample` that a line cannot give, or that `play` does not show
SETTINGS = [field.name for field in dataclasses.fields(SamplingConfig) if field.name not in NOT_HERE]
MAX_ALTERNATIVES = 64

# Returns the next line without its line break, None at the end; the argument is shown before what the user types.
ReadLine = Callable[[str], str | None]


def play_command(argv: Sequence[str]) -> None:
    """Write a text in turns with a model."""
    parser = Parser(
        prog="textgen play",
        description="Write a text in turns with a trained model: a line is continued, `:help` lists the commands.",
    )
    add_model_arguments(parser, "run", help="run folder, checkpoint or hub repository", decoder=True)
    parser.add_class_arguments(SamplingConfig, None, fail_untyped=True, skip=NOT_HERE)
    parser.add_argument("--label", default=None, help="label of the text, of a model with labels")
    args = parser.parse_args(list(argv))
    try:
        config = build_settings(SamplingConfig, {name: args[name] for name in SETTINGS})
    except ValueError as error:
        parser.error(str(error))
    if sys.stdin is None:
        raise TextgenError("standard input is closed")

    setup_logging(main=True)
    opened, decoder = open_decoder(args.run, args.decoder, best=args.best)
    from textgen.data.corpus import normalize
    from textgen.decoding.draft import Draft

    require_drawable(config, opened.tokenizer)
    draft = Draft(decoder, opened.tokenizer)
    draft.set_label(args.label)
    player = _Player(draft, config, lambda text: normalize(text, opened.normalization))
    if sys.stdin.isatty():
        _converse(player, _terminal_lines())
    else:
        _follow(player)


def _converse(player: _Player, read_line: ReadLine) -> None:
    """Run the user's lines; after an error, print it and continue."""
    _note("type a text, or `:help`")
    while True:
        try:
            line = read_line(_tail(player.draft.text))
            if line is None or not player.obey(line):
                return
        except KeyboardInterrupt:  # while a line is typed, or a second one while a text is drawn
            _note("")
        except Exception as error:
            if (said := user_error(error)) is None:
                raise
            _note(f"error: {said}")


def _follow(player: _Player) -> None:
    """Obey the lines of a pipe or a file; an error ends the command."""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        line = decode_text(raw, f"standard input line {number}")
        try:
            if not player.obey(line.removesuffix("\n").removesuffix("\r")):
                return
        except TextgenError as error:
            raise TextgenError(f"standard input line {number}: {error}") from error


# --- lines -----------------------------------------------------------------------------------------------------------


def _terminal_lines() -> ReadLine:
    """Return a reader of lines with editing keys and a history, or a plain one where that is not possible."""
    if os.environ.get("TERM", "dumb") == "dumb" or not sys.stdout.isatty():
        return _read_plain_line
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        _note("no editing keys: prompt_toolkit is not installed")
        return _read_plain_line
    session: PromptSession[str] = PromptSession()

    def read(shown: str) -> str | None:
        try:
            return session.prompt(shown)
        except EOFError:
            return None

    return read


def _read_plain_line(shown: str) -> str | None:
    print(shown, end="", file=sys.stderr, flush=True)
    raw = sys.stdin.buffer.readline()
    return decode_text(raw, "the line").removesuffix("\n") if raw else None


def _tail(text: str) -> str:
    """Return the end of a text as the prompt of a terminal: it shows whether a word is unfinished."""
    return f"…{escape_controls(text.splitlines()[-1][-20:])}|" if text and text[-1] != "\n" else "> "


# --- commands --------------------------------------------------------------------------------------------------------


class _Player:
    """Turns lines into steps of a draft and into texts on standard output."""

    def __init__(self, draft: Draft, config: SamplingConfig, normalize: Callable[[str], str]) -> None:
        self.draft, self._config, self._normalize, self._n = draft, config, normalize, 1

    def obey(self, line: str) -> bool:
        """Run one line; return whether to continue.

        Raises:
            TextgenError: it cannot be done; the draft is as before.
        """
        if not line.startswith(":") or line.startswith("::"):
            if text := self._normalize(line.removeprefix(":")):
                self.draft.write(text)
            self._draw()
            return True
        name, _, given = line[1:].lstrip().partition(" ")
        name, value = name.strip(), given.strip()
        if name in ("again", "undo", "text", "help", "quit") and value:
            raise TextgenError(f"`:{name}` takes no value: {value[:40]}")
        if name == "again":
            self._draw(again=True)
        elif name == "undo":
            self.draft.undo()
        elif name == "label":
            self._set_label(value)
        elif name == "pick":
            self.draft.pick(_integer(name, value, MAX_ALTERNATIVES))
        elif name == "text":
            print(escape_controls(self.draft.text) if sys.stdout.isatty() else self.draft.text, flush=True)
        elif name in ("save", "save!"):
            self._save(value, replace=name.endswith("!"))
        elif name == "help":
            print(
                HELP + "".join(f"\n  {setting} {self._value_of(setting)}" for setting in ["n", *SETTINGS]), flush=True
            )
        elif name != "quit":
            self._set(SHORT_NAMES.get(name, name), given if name == "regex" and value not in ("", "none") else value)
        return name != "quit"

    def _draw(self, *, again: bool = False) -> None:
        """Continue the text, and print the continuations while they are drawn."""
        n, ended = self._n, list[int]()

        def events() -> Iterator[tuple[int, str | Sample]]:
            for index, event in self.draft.draw(self._config, n, again=again, interrupted=interrupted):
                if not isinstance(event, str) and event.finished:
                    ended.append(index + 1)
                yield index, event

        with first_interrupt() as interrupted:
            stream_samples(events(), lambda index: f"{index + 1}: " if n > 1 else "")
        if ended:
            _note(f"the model ended {'the text' if n == 1 else ', '.join(map(str, sorted(ended)))}")

    def _set_label(self, value: str) -> None:
        """Set the label of the text, or print it."""
        if value:
            self.draft.set_label(None if value == "none" else value)
        else:
            print(f"label {self.draft.label or 'none'}", flush=True)

    def _save(self, name: str, *, replace: bool) -> None:
        """Write the text to a file that does not exist yet, or in place of one."""

        def require_free() -> None:
            if path.exists() and not path.is_file():
                raise TextgenError(f"`{name}` is not a file")
            if path.exists() and not replace:
                raise TextgenError(f"`{name}` exists: `:save! {name}` replaces it")

        if not name:
            raise TextgenError("`:save` wants a file: `:save story.txt`")
        if not self.draft.text:
            raise TextgenError("there is no text to save")
        try:
            path = Path(name).expanduser()
            require_free()
            write_atomic(path, self.draft.text, require=require_free)
        except TextgenError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # the latter two: a name that no file can have
            raise TextgenError(f"`{name}` cannot be written: {getattr(error, 'strerror', None) or error}") from error
        _note(f"saved `{name}`")

    def _set(self, name: str, value: str) -> None:
        """Set a setting, or print its value."""
        if name not in ("n", *SETTINGS):
            raise TextgenError(
                f"`:{name[:40]}` is not a command; `:help` lists them, and `::` begins a text with a colon"
            )
        if not value:
            print(f"{name} {self._value_of(name)}", flush=True)
        elif name == "n":
            self._n = _integer(name, value, MAX_ALTERNATIVES)
        else:
            try:
                made = value if name == "regex" and value != "none" else _plain(value)
                changed = build_settings(SamplingConfig, dataclasses.asdict(self._config) | {name: made})
                self.draft.require_drawable(changed)
                self._config = changed
            except ValueError as error:
                raise TextgenError(str(error)) from None

    def _value_of(self, name: str) -> str:
        value = self._n if name == "n" else getattr(self._config, name)
        return value if isinstance(value, str) else str(value).lower()


def _note(message: str) -> None:
    """Print a message that is not part of the text; standard output is for texts."""
    print(message, file=sys.stderr, flush=True)


def _integer(name: str, value: str, most: int) -> int:
    if not re.fullmatch("[0-9]{1,9}", value) or not 1 <= int(value) <= most:
        raise TextgenError(f"`:{name}` wants an integer from 1 to {most}: {value[:40]}")
    return int(value)


def _plain(value: str) -> int | float | str | None:
    """Return a value as JSON would hold it: a number, or None; other texts as they are."""
    if value in ("none", "null"):
        return None
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value
