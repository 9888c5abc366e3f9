"""The command `score`: what each token of texts costs under a model, as lines, JSON, CSV or a page of colours."""

from __future__ import annotations

import csv
import json
import logging
import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgen.commands.model_argument import add_model_arguments, open_model
from textgen.commands.parsing import Parser, fail, require_writable
from textgen.commands.texts_argument import add_text_arguments, check_text_arguments, read_texts
from textgen.console import quoted, setup_logging

if TYPE_CHECKING:
    from textgen.decoding.scoring import TextScore
    from textgen.reporting.heatmap import HeatText

log = logging.getLogger("textgen")


def score_command(argv: Sequence[str]) -> None:
    """Score texts and print the figures of each; only they go to standard output."""
    args = _parse(argv)
    setup_logging(main=True)
    from textgen.decoding.decoders import Decoder
    from textgen.decoding.samples import begin_id
    from textgen.decoding.scoring import score_stream

    opened = open_model(args.checkpoint, best=args.best)
    tokenizer = opened.tokenizer
    if not tokenizer.is_lossless:
        fail(f"`{args.checkpoint}` has a word tokenizer, which loses text: it has no bits per byte")
    scores = score_stream(
        Decoder(opened.model),
        tokenizer,
        read_texts(args, opened.checkpoint, opened.normalization),
        batch_size=args.batch_size,
        end=not args.no_end,
        num_top=min(args.alternatives, tokenizer.vocab_size),
        begin=begin_id(opened.model, tokenizer, args.label),
    )
    printed = _print_json(scores, args) if args.json else _print_csv(scores) if args.csv else _print_lines(scores, args)
    if args.heatmap is None:
        deque(printed, maxlen=0)
    else:
        from textgen.reporting.heatmap import write_heatmap

        write_heatmap(Path(args.heatmap), (_heat_text(number, score) for number, score in enumerate(printed, 1)))
        log.info("%s", args.heatmap)


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="textgen score",
        description="Print the log-probability and the rank of each token of a text, and the text's bits per byte.",
    )
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--label", help="of a model with labels: score the texts as texts with this label")
    parser.add_argument(
        "--alternatives", type=int, default=5, help="number of the likeliest tokens that are shown beside each token"
    )
    parser.add_argument(
        "--no_end", action="store_true", help="do not score the end of a text: for a part of a document"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="texts that are read side by side; changes figures by rounding only"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per text")
    parser.add_argument("--csv", action="store_true", help="print CSV, one row per token")
    parser.add_argument("--heatmap", metavar="FILE", help="also write a page that colours each token by its cost")
    args = parser.parse_args(list(argv))
    for name, least in (("alternatives", 0), ("batch_size", 1)):
        if args[name] < least:
            parser.error(f"`{name}` must be at least {least}: {args[name]}")
    if args.json and args.csv:
        parser.error("`json` cannot be combined with `csv`")
    if args.heatmap is not None:
        require_writable(args.heatmap)
    check_text_arguments(args)
    return args


# --- output: each function prints scores as they come, and yields them -----------------------------------------------


def _print_lines(scores: Iterator[TextScore], args: Any) -> Iterator[TextScore]:
    """Print a line per text, and of texts of the command line also a line per token; in the end a line for all."""
    nats, num_bytes, num_tokens, number = 0.0, 0, 0, 0
    for number, score in enumerate(scores, 1):
        nats, num_bytes, num_tokens = nats + score.nats, num_bytes + score.num_bytes, num_tokens + len(score.ids)
        labelled = "" if args.label is None else f" with label {args.label}"
        print(f"text {number}{labelled}: {_figures(score.nats, score.num_bytes, len(score.ids))}", flush=True)
        if args.data is None:
            print("logprob    rank  token")
            print("\n".join(_token_lines(score)), flush=True)
        yield score
    if number > 1:
        print(f"all {number} texts: {_figures(nats, num_bytes, num_tokens)}")


def _figures(nats: float, num_bytes: int, num_tokens: int) -> str:
    bits = nats / math.log(2) / num_bytes
    return f"{bits:.4f} bits per byte, {nats:,.2f} nats, {num_tokens:,} tokens, {num_bytes:,} bytes"


def _token_lines(score: TextScore) -> Iterator[str]:
    for _, _, name, logprob, rank, top in token_rows(score):
        others = "  ".join(f"{_shown(token)} {value:.2f}" for token, value in top)
        yield f"{logprob:7.2f} {rank:7,}  {_shown(name):16}  {others}".rstrip()


def _shown(token: str) -> str:
    return quoted(token) if token else "(end)"


def _print_json(scores: Iterator[TextScore], args: Any) -> Iterator[TextScore]:
    for score in scores:
        record = {
            "text": score.text,
            **({} if args.label is None else {"label": args.label}),
            "bits_per_byte": _for_json(score.bits_per_byte),
            "nats": _for_json(score.nats),
            "num_bytes": score.num_bytes,
            "tokens": [
                {"token": name, "id": token, "logprob": _for_json(logprob), "rank": rank, "alternatives": _top(top)}
                for _, token, name, logprob, rank, top in token_rows(score)
            ],
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)
        yield score


def _for_json(value: float) -> float | None:
    """Return a figure; None for infinity, which JSON does not have: a token may have the probability 0."""
    return value if math.isfinite(value) else None


def _top(alternatives: list[tuple[str, float]]) -> list[tuple[str, float | None]]:
    return [(token, _for_json(value)) for token, value in alternatives]


def _print_csv(scores: Iterator[TextScore]) -> Iterator[TextScore]:
    """Print a row per token; the figures of its text are in each of them."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["text", "bits_per_byte", "nats", "place", "id", "token", "logprob", "rank", "alternatives"])
    for number, score in enumerate(scores, 1):
        figures = [number, round(score.bits_per_byte, 6), round(score.nats, 6)]
        for place, token, name, logprob, rank, top in token_rows(score):
            table.writerow([*figures, place, token, name, logprob, rank, json.dumps(_top(top), ensure_ascii=False)])
        yield score


Row = tuple[int, int, str, float, int, list[tuple[str, float]]]


def token_rows(score: TextScore) -> Iterator[Row]:
    """Yield place, id, text, log-probability, rank and alternatives of each token; six decimals."""
    assert score.ranks is not None
    assert score.alternatives is not None
    rows = zip(score.ids, score.tokens, score.logprobs, score.ranks, score.alternatives, strict=True)
    for place, (token, name, logprob, rank, top) in enumerate(rows):
        yield place, token, name, round(logprob, 6), rank, [(text, round(value, 6)) for text, value in top]


def _heat_text(number: int, score: TextScore) -> HeatText:
    from textgen.reporting.heatmap import HeatText, HeatToken

    figures = _figures(score.nats, score.num_bytes, len(score.ids))
    tokens = [HeatToken(name, logprob, rank, top) for _, _, name, logprob, rank, top in token_rows(score)]
    return HeatText(f"Text {number}", figures, tokens)
