"""The command `evaluate`: score a checkpoint on whole documents."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from textgen.commands.model_argument import add_model_arguments, open_model
from textgen.commands.parsing import Parser, add_reading_flags, reading_settings
from textgen.config import SPLITS, Precision
from textgen.console import start_log

if TYPE_CHECKING:
    from accelerate import Accelerator

    from textgen.model.lstm import LSTMLanguageModel
    from textgen.tokenizer import Tokenizer

log = logging.getLogger("textgen")


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
        help="a file, folder or glob, or a split of the training's data: train, validation, test. Several sources are "
        "scored one by one, and mixed by their weights",
    )
    add_reading_flags(parser, labels=True)
    parser.add_argument(
        "--label",
        type=Literal["none", "true"],
        default="none",
        help="of a model with labels: none scores documents without labels, true with their own",
    )
    parser.add_argument(
        "--limit", type=int | None, default=None, help="score the first N documents only, of each source"
    )
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


def _evaluate(accelerator: Accelerator, args: Any) -> dict[str, float | str]:
    """Return the figures by name, in the order in which they are printed. Collective."""
    from textgen.data.store import encode_documents
    from textgen.data.texts import texts_by_source
    from textgen.errors import TextgenError
    from textgen.evaluation import mix_scores, score

    opened = open_model(args.checkpoint, best=args.best, accelerator=accelerator)
    tokenizer = opened.tokenizer
    if not tokenizer.is_lossless:
        raise TextgenError(f"`{args.checkpoint}` has a word tokenizer, which loses text: it has no bits per byte")
    by_source, weights = texts_by_source(
        opened.checkpoint, args.data, args.reading, limit=args.limit, normalization=opened.normalization
    )
    texts = [text for its in by_source.values() for text in its]
    first = iter(_first_inputs(opened.model, tokenizer, texts, args))
    scores = {
        name: score(
            accelerator,
            opened.model,
            encode_documents(tokenizer, its),
            sum(len(text.encode()) for text in its),
            bos_id=list(islice(first, len(its))),
            batch_size=args.batch_size,
            progress=True,
        )
        for name, its in by_source.items()
    }
    result = scores[""] if "" in scores else mix_scores(scores, weights)
    label: dict[str, float | str] = {"label": args.label} if opened.model.labels else {}
    words = sum(len(text.split()) for text in texts)
    return label | {
        "bits_per_byte": result.bits_per_byte,
        **{f"bits_per_byte/{name}": its.bits_per_byte for name, its in scores.items() if name},
        "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity,
        **({"word_perplexity": result.word_perplexity(words)} if "" in scores else {}),
        "tokens": result.tokens,
        "bytes": sum(its.bytes for its in scores.values()),
        "documents": result.documents,
        "seconds": round(result.seconds, 3),
    }


def _first_inputs(model: LSTMLanguageModel, tokenizer: Tokenizer, texts: Sequence[str], args: Any) -> list[int]:
    """Return the first input of each text: that of its label with `--label true`, if the model knows the label.

    Raises:
        TextgenError: `--label true`, and the model has no labels, or no text has one of them.
    """
    from textgen.data.labels import label_of
    from textgen.decoding.samples import begin_id
    from textgen.errors import TextgenError

    if args.label == "none":
        return [tokenizer.bos_id] * len(texts)
    if not model.labels:
        raise TextgenError(f"`--label true`: `{args.checkpoint}` was trained without labels")
    of_model = frozenset(model.labels)
    known = [label if (label := label_of(text)) in of_model else None for text in texts]
    if not any(known):
        hint = "" if args.data in SPLITS else ": `--label_column` names the column of the label"
        raise TextgenError(f"`--label true`: no document of `{args.data}` has a label of the model{hint}")
    if unknown := len(known) - sum(label is not None for label in known):
        log.info("%d of %d documents have no label of the model, and are scored without one", unknown, len(known))
    return [begin_id(model, tokenizer, label) for label in known]


def _as_json(figures: dict[str, float | str]) -> str:
    """Return one JSON object; a figure that is not finite is null, since JSON has no infinity."""
    unknown = {name: None for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(figures | unknown)


def _as_lines(figures: dict[str, float | str]) -> str:
    width = max(16, *map(len, figures))
    return "\n".join(
        f"{name:{width}} {value:,.6g}"
        if isinstance(value, float)
        else f"{name:{width}} {value if isinstance(value, str) else format(value, ',')}"
        for name, value in figures.items()
    )
