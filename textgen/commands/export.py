"""The command `export`: write a checkpoint's decoder with its cost in bits per byte, or its tokenizer, as files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from textgen.commands.model_argument import add_model_arguments, open_model
from textgen.commands.parsing import Parser, add_reading_flags, reading_settings
from textgen.config import READING_SETTINGS
from textgen.packages import require_packages


def export_command(argv: Sequence[str]) -> None:
    """Write a decoder, and print the figures that are kept with it; or write a tokenizer."""
    args = _parse(argv)
    if args.to == "tokenizer":
        _export_tokenizer(args)
    else:
        _export(args)


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="textgen export", description="Write a checkpoint's decoder as files, with its cost, or its tokenizer."
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--to",
        type=Literal["decoder", "onnx", "tokenizer"],
        default="decoder",
        help="what to write; tokenizer: tokenizer.json and tokenizer_config.json, which `AutoTokenizer` reads",
    )
    parser.add_argument("--out", default=None, help="folder to write to; default: the checkpoint's folder")
    parser.add_argument(
        "--data",
        default="validation",
        help="documents to score: a file, folder or glob, or a split of the training's data",
    )
    add_reading_flags(parser)
    parser.add_argument("--limit", type=int, default=200, help="score the first N documents only, of each source")
    parser.add_argument("--batch_size", type=int, default=128, help="documents that are read side by side")
    args = parser.parse_args(list(argv))
    args.reading = reading_settings(args)
    for name in ("limit", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"`{name}` must be at least 1: {getattr(args, name)}")
    scoring = ("data", "limit", "batch_size", *READING_SETTINGS)
    if args.to == "tokenizer" and (given := [n for n in scoring if args[n] != parser.get_default(n)]):
        parser.error(f"`{given[0]}` has no effect with `--to tokenizer`, which scores no documents")
    if args.to == "onnx":
        require_packages("`--to onnx`", "onnx", "onnxscript", "onnxruntime", extra="export")
    return args


def _export_tokenizer(args: Any) -> None:
    from textgen.files import make_directory, write_atomic
    from textgen.tokenizer.hugging_face import hugging_face_files

    opened = open_model(args.checkpoint, best=args.best)
    files = hugging_face_files(opened.tokenizer)
    out = opened.directory if args.out is None else Path(args.out)
    make_directory(out)
    for name, content in files.items():
        write_atomic(out / name, content)
        print(out / name)


def _export(args: Any) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # the decoders that are written run on CPUs
    from textgen.data.store import encode_documents
    from textgen.data.texts import texts_to_score
    from textgen.decoding.choose import FIGURES_FORMAT
    from textgen.decoding.export import decoded_nats, write_decoder, write_onnx_decoder
    from textgen.distributed import launch
    from textgen.errors import TextgenError
    from textgen.evaluation import score
    from textgen.files import decode_text, make_directory, write_atomic
    from textgen.model.files import weights_sha256

    accelerator = launch.start("no")
    opened = open_model(args.checkpoint, best=args.best, accelerator=accelerator)
    model, tokenizer = opened.model, opened.tokenizer
    if not tokenizer.is_lossless:
        raise TextgenError(f"`{args.checkpoint}` has a word tokenizer, which loses text: it has no bits per byte")
    texts = texts_to_score(
        opened.checkpoint, args.data, args.reading, limit=args.limit, normalization=opened.normalization
    )
    documents, num_bytes = encode_documents(tokenizer, texts), sum(len(text.encode()) for text in texts)
    plain = score(accelerator, model, documents, num_bytes, bos_id=tokenizer.bos_id, batch_size=args.batch_size)

    out = opened.directory if args.out is None else Path(args.out)
    if args.to == "onnx":
        decode_text(os.fsencode(out), f"`{out}`")  # onnxruntime opens no other path
    make_directory(out)
    path, decoders = (write_decoder if args.to == "decoder" else write_onnx_decoder)(model, out)
    bits = {"plain": plain.bits_per_byte}
    for name, decoder in decoders.items():
        nats = decoded_nats(decoder, documents, bos_id=tokenizer.bos_id, batch_size=args.batch_size)
        bits[name] = nats / math.log(2) / num_bytes
    figures = {
        "format": FIGURES_FORMAT,
        "model_sha256": weights_sha256(opened.directory),
        "data": args.data,
        "documents": len(texts),
        "tokens": plain.tokens,
        "bytes": num_bytes,
        "bits_per_byte": bits,
    }
    write_atomic(path, json.dumps(figures, indent=2) + "\n")
    width = max(map(len, bits))
    for name, value in bits.items():
        print(f"{name:{width}} {value:.6f} bits per byte {value - plain.bits_per_byte:+.6f}")
    print(path)
