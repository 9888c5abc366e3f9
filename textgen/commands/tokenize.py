"""The command `tokenize`: the tokens of texts, or the text of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from textgen.commands.model_argument import add_model_arguments, open_model
from textgen.commands.parsing import Parser, fail
from textgen.commands.texts_argument import add_text_arguments, check_text_arguments, read_texts
from textgen.config import READING_SETTINGS
from textgen.console import quoted, setup_logging

if TYPE_CHECKING:
    from textgen.tokenizer import Tokenizer


def tokenize_command(argv: Sequence[str]) -> None:
    """Print the tokens of each text, or the text of `--decode`."""
    args = _parse(argv)
    setup_logging(main=True)

    opened = open_model(args.checkpoint, best=args.best)
    tokenizer = opened.tokenizer
    if args.decode is not None:
        if wrong := [i for i in args.decode if not re.fullmatch(r"\d{1,9}", i) or int(i) >= tokenizer.vocab_size]:
            fail(f"`decode` must be ids below the vocabulary's size {tokenizer.vocab_size}: {wrong[0]}")
        ids = list(map(int, args.decode))
        text = tokenizer.decode(ids)
        print(json.dumps({"ids": ids, "text": text}, ensure_ascii=False) if args.json else text)
        return
    for text in read_texts(args, opened.checkpoint, opened.normalization):
        ids = tokenizer.encode(text)
        pieces = [tokenizer.token_text(token) for token in ids]
        offsets = _offsets(tokenizer, text, ids)
        if args.json:
            record = {"text": text, "ids": ids, "pieces": pieces, "offsets": offsets}
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            places = ["" if offsets is None else "{}-{}".format(*offsets[i]) for i in range(len(ids))]
            rows = zip(ids, places, pieces, strict=True)
            print("\n".join(f"{token:7}  {place:12}  {quoted(piece)}" for token, place, piece in rows), flush=True)


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="textgen tokenize",
        description="Print id, place (in characters) and text of each token. A part of a character is shown by its "
        "bytes, such as `\\xc3`, and has the place of the whole one; a word tokenizer has no places.",
    )
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--decode", nargs="+", default=None, metavar="ID", help="print the text of these ids")
    parser.add_argument("--json", action="store_true", help="print one JSON object per text")
    args = parser.parse_args(list(argv))
    if args.decode is None:
        check_text_arguments(args)
        return args
    others = ("text", "data", "limit", *READING_SETTINGS)
    if given := [name for name in others if args[name] != parser.get_default(name)]:
        parser.error(f"`decode` cannot be combined with `{given[0]}`")
    return args


def _offsets(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[tuple[int, int]] | None:
    """Return where each token begins and ends in a text, in characters; None if the tokenizer loses text."""
    if not tokenizer.is_lossless:
        return None
    place_of = [place for place, letter in enumerate(text) for _ in letter.encode()]  # of each byte
    ends = list(accumulate(len(tokenizer.token_bytes(token)) for token in ids))
    return [(place_of[start], place_of[end - 1] + 1) for start, end in zip([0, *ends], ends, strict=False)]
