"""Prompts of `textgen sample`: from flags, standard input, a file, or a batch file with settings for each prompt."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from textgen.commands.parsing import fail
from textgen.config import SamplingConfig
from textgen.errors import TextgenError
from textgen.files import decode_text
from textgen.settings import build_settings, in_words, unknown_setting

if TYPE_CHECKING:
    from textgen.model.lstm import LSTMLanguageModel
    from textgen.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A text to continue, with its settings."""

    text: str
    config: SamplingConfig
    source: str
    """its name in errors: a flag, a file, or a line of a file"""
    id: str | int | None = None
    """the `id` of a batch file, which is copied to the samples"""
    label: str | None = None
    """of the text, for a model with labels"""
    whole: str = ""
    """normalized: everything before a sample, with the text of `--state`"""


def read_prompts(flags: Sequence[str], file: str | None, config: SamplingConfig) -> list[Prompt]:
    """Return the prompts of the command line.

    Without any prompt standard input is read; if it is a terminal or closed, there is one empty prompt.

    Args:
        flags: the values of `--prompt`.
        file: the value of `--prompt_file`; `-` is standard input.
        config: the settings of all prompts.
    """
    prompts = [Prompt(decode_text(os.fsencode(text), "`--prompt`"), config, "`--prompt`") for text in flags]
    if file is None and not prompts:
        if sys.stdin is None or sys.stdin.isatty():  # None: standard input is closed
            return [Prompt("", config, "`--prompt`")]
        file = "-"
    if file is not None:
        name = name_of(file)
        text = decode_text(read_bytes(file), name)
        # Editors and `echo` end a file with a line break, which is not part of the prompt.
        prompts.append(Prompt(text.removesuffix("\n").removesuffix("\r"), config, name))
    return prompts


def parse_batch(raw: bytes, name: str, defaults: SamplingConfig) -> list[Prompt]:
    """Return the prompts of a batch file; fail at the first wrong line.

    Args:
        raw: the file's bytes, one JSON object per line.
        name: the file's name in errors.
        defaults: the settings that a line does not set.
    """
    lines = raw.removesuffix(b"\n").split(b"\n") if raw else []
    if not lines:
        fail(f"{name} holds no prompts")
    return [_parse_line(line, f"{name} line {number}", defaults) for number, line in enumerate(lines, 1)]


def _parse_line(line: bytes, source: str, defaults: SamplingConfig) -> Prompt:
    text = decode_text(line, source)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        fail(f"{source} is not JSON: {text[:40]}")
    if not isinstance(values, dict):
        fail(f'{source} is not an object such as {{"prompt": "..."}}: {text[:40]}')
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, which is not text
        fail(f"{source} holds a lone surrogate")
    if "prompt" not in values:
        fail(f"{source} has no `prompt`")
    prompt, id_, label = values.pop("prompt"), values.pop("id", None), values.pop("label", None)
    if not isinstance(prompt, str):
        fail(f"{source}: `prompt` must be {in_words(str)}: {json.dumps(prompt)[:40]}")
    if id_ is not None and type(id_) not in (str, int):
        fail(f"{source}: `id` must be {in_words(str | int)}: {json.dumps(id_)[:40]}")
    if label is not None and not isinstance(label, str):
        fail(f"{source}: `label` must be {in_words(str)}: {json.dumps(label)[:40]}")
    known = [field.name for field in dataclasses.fields(SamplingConfig)]
    if unknown := [name for name in values if name not in known]:
        fail(f"{source}: {unknown_setting(unknown[0], ['prompt', 'id', 'label', *known])}")
    try:
        config = build_settings(SamplingConfig, dataclasses.asdict(defaults) | values) if values else defaults
    except ValueError as error:
        fail(f"{source}: {error}")
    return Prompt(prompt, config, source, id_, label)


def require_text(prompts: Sequence[Prompt]) -> None:
    """Fail at a prompt of white space alone: the tokenizer would read it as an empty one."""
    for prompt in prompts:
        if prompt.text and not prompt.text.strip():
            fail(f"{prompt.source} is only spaces; an empty prompt starts a text")


def normalize_prompt(prompt: Prompt, normalization: str, tokenizer: Tokenizer, *, before: str = "") -> Prompt:
    """Return a prompt whose text and settings are normalized as the model's training text was.

    Fail if its settings leave no token to draw.

    Args:
        prompt: with its text as it was given.
        normalization: of the model's training text.
        tokenizer: the model's.
        before: the text of `--state`.
    """
    from textgen.data.corpus import normalize
    from textgen.decoding.steering import normalize_settings

    try:
        config = normalize_settings(prompt.config, normalization)
    except ValueError as error:  # a text that is too long in lower case
        fail(f"{prompt.source}: {error}")
    require_drawable(config, tokenizer, f"{prompt.source}: ")
    # The texts are normalized together: what a letter becomes may depend on the next one.
    whole = normalize(before + prompt.text, normalization)
    return dataclasses.replace(prompt, text=normalize(prompt.text, normalization), whole=whole, config=config)


def with_labels(prompts: Sequence[Prompt], labels: Sequence[str], model: LSTMLanguageModel) -> list[Prompt]:
    """Return each prompt with each label of `labels`; a prompt that has a label keeps it. Fail at an unknown label.

    Args:
        prompts: of the command line or a batch file.
        labels: values of `--label`.
        model: knows its labels.
    """
    of_flag: Sequence[str | None] = labels or (None,)
    made = [
        dataclasses.replace(prompt, label=label)
        for prompt in prompts
        for label in (of_flag if prompt.label is None else (prompt.label,))
    ]
    for prompt in made:
        if prompt.label is not None:
            try:
                model.label_id(prompt.label)
            except TextgenError as error:
                fail(f"`--label`: {error}" if prompt.label in labels else f"{prompt.source}: {error}")
    return made


def require_drawable(config: SamplingConfig, tokenizer: Tokenizer, prefix: str = "") -> None:
    """Fail if settings leave no token to draw; `prefix` begins the message."""
    from textgen.decoding import samples

    try:
        samples.require_drawable(config, tokenizer)
    except ValueError as error:
        fail(f"{prefix}{error}")


def name_of(path: str) -> str:
    """Return the name of a file in errors; `-` is standard input."""
    return "standard input" if path == "-" else f"`{path}`"


def read_bytes(path: str) -> bytes:
    """Return the bytes of a file, or of standard input for `-`; fail if it cannot be read."""
    if path == "-" and sys.stdin is None:
        fail("standard input is closed")
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        fail(f"{name_of(path)} cannot be read: {error.strerror}")
