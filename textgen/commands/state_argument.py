"""The flags of kept states: a text is read once, and later commands continue it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgen.commands.model_argument import OpenModel
from textgen.commands.parsing import Parser, fail, require_writable

if TYPE_CHECKING:
    from textgen.commands.prompts import Prompt
    from textgen.decoding.decoders import Decoder
    from textgen.decoding.reading import ReadState

log = logging.getLogger("textgen")


def add_state_arguments(parser: Parser) -> None:
    """Add `--state` and `--save_state`."""
    parser.add_argument(
        "--state",
        metavar="FILE",
        help="file of `--save_state`: its text comes before every prompt and is not read again",
    )
    parser.add_argument(
        "--save_state",
        metavar="FILE",
        help="file for the model's state after the prompt, which `--state` reads; `--num_samples 0` draws no sample",
    )


def require_readable(args: Any, prompts: Sequence[Prompt]) -> None:
    """Fail unless the flags name one text to read and a place for its state."""
    path, labels = args["save_state"], [prompt.label for prompt in prompts if prompt.label is not None]
    if args.state is not None and labels:
        fail(f"label `{labels[0]}` comes before the text of `state`: give it with `save_state`")
    if path is None:
        return
    if args.batch_file is not None:
        fail("`save_state` cannot be combined with `batch_file`")
    if len(prompts) > 1:
        fail(f"`save_state` needs a single prompt: {len(prompts)}")
    if not prompts[0].text and args.state is None:
        fail(f"{prompts[0].source} is empty: there is nothing to read for `save_state`")
    require_writable(path)


def open_state(path: str | None, opened: OpenModel, decoder: Decoder) -> ReadState | None:
    """Return the state of `--state`; None without it.

    Raises:
        TextgenError: it cannot be read, or is not of this model.
    """
    if path is None:
        return None
    from textgen.decoding.state_files import read_state

    read = read_state(Path(path), decoder, opened.tokenizer, normalization=opened.normalization)
    log.info("reused %s tokens", f"{read.num_read:,}")
    return read


def keep_state(path: str, prompt: Prompt, after: ReadState | None, opened: OpenModel, decoder: Decoder) -> ReadState:
    """Read a prompt, write its state for `--save_state`, and return it.

    Raises:
        TextgenError: the file cannot be written.
    """
    from textgen.decoding.reading import read_prompt
    from textgen.decoding.state_files import write_state

    begin = None if prompt.label is None else opened.model.label_id(prompt.label)
    read = read_prompt(
        decoder, opened.tokenizer, prompt.text, normalization=opened.normalization, after=after, begin=begin
    )
    write_state(read, Path(path))
    log.info("`%s` saves the reading of %s of %s tokens", path, f"{read.num_read:,}", f"{len(read.ids):,}")
    return read
