"""The command `evaluate`: score a checkpoint on whole documents."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from textgen.commands.model_argument import add_model_arguments, open_model
from textgen.commands.parsing import Parser
from textgen.config import Precision
from textgen.console import start_log


def evaluate_command(argv: Sequence[str]) -> None:
    """Score a checkpoint on whole documents and print the figures."""
    parser = Parser(prog="textgen evaluate", description="Score whole documents. Runs under `accelerate launch` too.")
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        default="validation",
        help="a file, folder or glob, or a split of the training's data: train, validation, test",
    )
    parser.add_argument("--text_column", default="text", help="column of the text in csv, jsonl and parquet files")
    parser.add_argument("--limit", type=int | None, default=None, help="score the first N documents only")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="documents read side by side; no influence on the figures"
    )
    parser.add_argument(
        "--mixed_precision",
        type=Precision,
        default="no",
        help="precision of matrix products; auto: what the hardware is fast in",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(list(argv))
    for name in ("limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"`{name}` must be at least 1: {getattr(args, name)}")

    start_log()
    from textgen.data.store import encode_documents
    from textgen.data.texts import texts_to_score
    from textgen.distributed import launch
    from textgen.errors import TextgenError
    from textgen.evaluation import score

    accelerator = launch.start(args.mixed_precision)
    opened = open_model(args.checkpoint, best=args.best, accelerator=accelerator)
    model, tokenizer = opened.model, opened.tokenizer
    if not tokenizer.is_lossless:
        raise TextgenError(f"`{args.checkpoint}` has a word tokenizer, which loses text: it has no bits per byte")
    texts = texts_to_score(
        opened.checkpoint, args.data, args.text_column, limit=args.limit, normalization=opened.normalization
    )
    documents = encode_documents(tokenizer, texts)
    num_bytes, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    result = score(
        accelerator, model, documents, num_bytes, bos_id=tokenizer.bos_id, batch_size=args.batch_size, progress=True
    )
    figures = {
        "bits_per_byte": result.bits_per_byte, "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity, "word_perplexity": result.word_perplexity(words),
        "tokens": result.tokens, "bytes": result.bytes, "documents": result.documents,
        "seconds": round(result.seconds, 3),
    }  # fmt: skip
    if accelerator.is_main_process:
        if args.json:  # JSON knows no infinity
            print(json.dumps({name: value if math.isfinite(value) else None for name, value in figures.items()}))
        else:
            print(
                "\n".join(
                    f"{name:16} {value:,.6g}" if isinstance(value, float) else f"{name:16} {value:,}"
                    for name, value in figures.items()
                )
            )
    accelerator.end_training()
