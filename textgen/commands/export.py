"""The verb `export`: decoders as files, with figures of what they cost kept beside them.

`decoder` writes int8 weights to `decoder.safetensors` and bits per byte of every decoder to `decoder.json`, by which
`choose_decoder` knows whether int8 may be taken; in a checkpoint's directory they are no part of its manifest. `onnx`
writes one step of decoding, `decoder.onnx`, and compares it with the model under onnxruntime.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from textgen.commands.parsing import Parser

if TYPE_CHECKING:
    from textgen.decoding.decoders import Decoder
    from textgen.evaluation import Tokens
    from textgen.model.lstm import LSTMLanguageModel


DECODER_NAME = "decoder.safetensors"
ONNX_NAME = "decoder.onnx"
ONNX_FIGURES_NAME = "onnx.json"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_command(argv: Sequence[str]) -> None:
    """Write a decoder and print the figures that are kept with it."""
    parser = Parser(prog="textgen export", description="Write a checkpoint's decoder as files, and what it costs.")
    parser.add_argument("checkpoint", help="checkpoint, run folder or hub repository")
    parser.add_argument("--best", action="store_true", help="of a run, the best checkpoint instead of the newest")
    parser.add_argument("--to", type=Literal["decoder", "onnx"], default="decoder", help="what to write")
    parser.add_argument("--out", default=None, help="folder to write to; by default the checkpoint's own")
    parser.add_argument(
        "--data", default="validation", help="a file, folder or glob, or a split of the training's data, to score"
    )
    parser.add_argument("--text_column", default="text", help="column of the text in csv, jsonl and parquet files")
    parser.add_argument("--limit", type=int, default=200, help="score the first N documents only")
    parser.add_argument("--batch_size", type=int, default=128, help="documents read side by side")
    args = parser.parse_args(list(argv))
    for name in ("limit", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"`{name}` must be at least 1: {getattr(args, name)}")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if args.to == "onnx" and missing:
        parser.error(f"`--to onnx` takes the packages of `pip install textgen[export]`: {', '.join(missing)}")
    _export(args)


def _export(args: Any) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # what is written decodes on CPUs
    from textgen.data.store import encode_documents
    from textgen.data.texts import texts_to_score
    from textgen.decoding.choose import FIGURES_FORMAT
    from textgen.distributed import launch
    from textgen.errors import TextgenError
    from textgen.evaluation import score
    from textgen.files import make_directory, write_atomic
    from textgen.model.files import WEIGHTS_NAME, load_model, resolve_model_directory
    from textgen.runs.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(args.checkpoint, best=args.best)
    directory = checkpoint or resolve_model_directory(args.checkpoint)
    model, tokenizer = load_model(directory)
    if not tokenizer.is_lossless:
        raise TextgenError(f"`{args.checkpoint}` has a word tokenizer, which loses text: it has no bits per byte")
    accelerator = launch.start("no")
    normalization = model.text.get("normalization", "none")
    texts = texts_to_score(checkpoint, args.data, args.text_column, limit=args.limit, normalization=normalization)
    documents, num_bytes = encode_documents(tokenizer, texts), sum(len(text.encode()) for text in texts)
    plain = score(accelerator, model, documents, num_bytes, bos_id=tokenizer.bos_id, batch_size=args.batch_size)
    out = directory if args.out is None else Path(args.out)
    make_directory(out)
    path, decoders = (_write_decoder if args.to == "decoder" else _write_onnx)(model, out)
    bits = {"plain": plain.bits_per_byte}
    for name, decoder in decoders.items():
        nats = decoded_nats(decoder, documents, bos_id=tokenizer.bos_id, batch_size=args.batch_size)
        bits[name] = nats / math.log(2) / num_bytes
    figures = {
        "format": FIGURES_FORMAT,
        "model_sha256": hashlib.sha256((directory / WEIGHTS_NAME).read_bytes()).hexdigest(),
        "data": args.data, "documents": len(texts), "tokens": plain.tokens, "bytes": num_bytes, "bits_per_byte": bits,
    }  # fmt: skip
    write_atomic(path, json.dumps(figures, indent=2) + "\n")
    for name, value in bits.items():
        print(f"{name:12} {value:.6f} bits per byte {value - plain.bits_per_byte:+.6f}")
    print(path)


def _write_decoder(model: LSTMLanguageModel, out: Path) -> tuple[Path, dict[str, Decoder]]:
    """Write int8 weights; return where the figures belong, and the decoders that are to be scored."""
    from textgen.decoding.choose import FIGURES_NAME
    from textgen.decoding.decoders import CellDecoder
    from textgen.runs.tensors import serialize

    int8, aside = CellDecoder(model, "int8"), out / f".{DECODER_NAME}.tmp"
    with aside.open("wb") as file:
        file.writelines(serialize({name: value.contiguous() for name, value in int8.int8_tensors().items()}))
    aside.replace(out / DECODER_NAME)
    return out / FIGURES_NAME, {"bfloat16": CellDecoder(model, "bfloat16"), "int8": int8}


def _write_onnx(model: LSTMLanguageModel, out: Path) -> tuple[Path, dict[str, Decoder]]:
    """Do the same for a step of ONNX."""
    from textgen.decoding.onnx import OnnxDecoder, write_onnx

    write_onnx(model, out / ONNX_NAME)
    return out / ONNX_FIGURES_NAME, {"onnxruntime": OnnxDecoder(model, out / ONNX_NAME)}


def decoded_nats(decoder: Decoder, documents: Sequence[Tokens], *, bos_id: int, batch_size: int) -> float:
    """Sum what documents cost token by token, each from `bos_id` on, as `evaluation.score` does window by window."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    nats, order = 0.0, sorted(documents, key=len, reverse=True)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            before = torch.full((len(rows),), bos_id)
            state = [part.expand(len(rows), -1).contiguous() for part in decoder.prefill([bos_id])]
            for place in range(len(rows[0])):
                going = sum(len(row) > place for row in rows)  # the shorter ones have ended
                logits, state = decoder.step(before[:going], [part[:going] for part in state])
                before = torch.from_numpy(np.array([row[place] for row in rows[:going]], dtype=np.int64))
                nats += float(F.cross_entropy(logits, before, reduction="sum"))
    return nats
