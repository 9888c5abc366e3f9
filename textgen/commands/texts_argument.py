"""The flags that name texts to read: `--text`, `--data` with the flags of reading, or standard input."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from textgen.commands.parsing import Parser, add_reading_flags, fail, reading_settings
from textgen.commands.prompts import read_bytes
from textgen.config import READING_SETTINGS, DataConfig
from textgen.files import decode_text

if TYPE_CHECKING:
    from pathlib import Path


def add_text_arguments(parser: Parser) -> None:
    """Add the flags that name texts."""
    parser.add_argument(
        "--text",
        action="append",
        help="a text; can be given several times. Without `--text` and `--data`, standard input is read as one text, "
        "without a last line break",
    )
    parser.add_argument(
        "--data",
        default=None,
        help="documents: a file, folder or glob, or a split of the training's data: train, validation, test",
    )
    add_reading_flags(parser)
    parser.add_argument(
        "--limit",
        type=int | None,
        default=None,
        help="read the first N documents of `--data` only; of a split, N of each source",
    )


def check_text_arguments(args: Any) -> None:
    """Read the flags of reading into `args.reading`, and the texts of the command line into `args.texts`.

    Fail if flags contradict each other, or a text is empty.
    """
    given = [name for name in READING_SETTINGS if args[name] != getattr(DataConfig(), name)]
    given += ["limit"] if args.limit is not None else []
    if args.data is None and given:
        fail(f"`{given[0]}` needs `data`")
    if args.data is not None and args.text is not None:
        fail("`text` cannot be combined with `data`")
    if args.limit is not None and args.limit < 1:
        fail(f"`limit` must be at least 1: {args.limit}")
    args.reading = reading_settings(args)
    args.texts = [] if args.data is not None else list(_given_texts(args.text))


def _given_texts(flags: list[str] | None) -> Iterator[str]:
    if flags is None and (sys.stdin is None or sys.stdin.isatty()):
        fail("there is no text: give `--text` or `--data`, or pipe a text to standard input")
    name = "`--text`" if flags is not None else "standard input"
    for raw in [read_bytes("-")] if flags is None else map(os.fsencode, flags):
        text = decode_text(raw, name)
        text = text.removesuffix("\n").removesuffix("\r") if flags is None else text
        if not text.strip():
            fail(f"{name} is {'only spaces' if text else 'empty'}")
        yield text


def read_texts(args: Any, checkpoint: Path | None, normalization: str) -> Iterator[str]:
    """Yield the texts that the flags name, normalized as the model's training text was; documents one by one.

    Raises:
        TextgenError, CheckpointError: documents cannot be read, or there are none.
    """
    from textgen.data.corpus import normalize
    from textgen.data.texts import documents_to_score

    if args.data is None:
        return (normalize(text, normalization) for text in args.texts)
    return documents_to_score(checkpoint, args.data, args.reading, limit=args.limit, normalization=normalization)
