"""The command `evaluate`: score a checkpoint on whole documents."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from textgen.commands.model_argument import add_model_arguments, open_model
from textgen.commands.parsing import Parser, add_reading_flags, reading_settings
from textgen.config import Precision
from textgen.console import start_log

if TYPE_CHECKING:
    from accelerate import Accelerator


def evaluate_command(argv: Sequence[str]) -> None:
    """Score a checkpoint on whole documents and print the figures. Collective."""
    args = _parse(argv)
    start_log()
    from textgen.distributed import launch

    accelerator = launch.start(args.mixed_precision)
    figures = _evaluate(accelerator, args)
    if accelerator.is_main_process:
        print(_as_json(figures) if args.json else _as_lines(figures))
    accelerator.end_training()


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(prog="textgen evaluate", description="Score whole documents. Runs under `accelerate launch` too.")
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        default="validation",
        help="a file, folder or glob, or a split of the training's data: train, validation, test",
    )
    add_reading_flags(parser)
    parser.add_argument("--limit", type=int | None, default=None, help="score the first N documents only")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="documents that are read side by side; does not change the figures"
    )
    parser.add_argument(
        "--mixed_precision",
        type=Precision,
        default="no",
        help="precision of matrix products; auto: the fastest precision of the hardware",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(list(argv))
    args.reading = reading_settings(args)
    for name in ("limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"`{name}` must be at least 1: {getattr(args, name)}")
    return args


def _evaluate(accelerator: Accelerator, args: Any) -> dict[str, float]:
    """Return the figures by name, in the order in which they are printed. Collective."""
    from textgen.data.store import encode_documents
    from textgen.data.texts import texts_to_score
    from textgen.errors import TextgenError
    from textgen.evaluation import score

    opened = open_model(args.checkpoint, best=args.best, accelerator=accelerator)
    tokenizer = opened.tokenizer
    if not tokenizer.is_lossless:
        raise TextgenError(f"`{args.checkpoint}` has a word tokenizer, which loses text: it has no bits per byte")
    texts = texts_to_score(
        opened.checkpoint, args.data, args.reading, limit=args.limit, normalization=opened.normalization
    )
    documents, num_bytes = encode_documents(tokenizer, texts), sum(len(text.encode()) for text in texts)
    result = score(
        accelerator,
        opened.model,
        documents,
        num_bytes,
        bos_id=tokenizer.bos_id,
        batch_size=args.batch_size,
        progress=True,
    )
    return {
        "bits_per_byte": result.bits_per_byte,
        "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity,
        "word_perplexity": result.word_perplexity(sum(len(text.split()) for text in texts)),
        "tokens": result.tokens,
        "bytes": result.bytes,
        "documents": result.documents,
        "seconds": round(result.seconds, 3),
    }


def _as_json(figures: dict[str, float]) -> str:
    """Return one JSON object; a figure that is not finite is null, since JSON has no infinity."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in figures.items()})


def _as_lines(figures: dict[str, float]) -> str:
    return "\n".join(
        f"{name:16} {value:,.6g}" if isinstance(value, float) else f"{name:16} {value:,}"
        for name, value in figures.items()
    )
