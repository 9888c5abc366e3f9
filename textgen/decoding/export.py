"""Decoders as files, and the cost of a decoder in nats.

- `decoder.safetensors`: the weights of the int8 decoder; `decoder.json`: the bits per byte of every decoder, by which
  `choose_decoder` decides whether int8 may be taken. The end of a training writes those of int8
- `decoder.onnx`: one step of decoding; `onnx.json`: its bits per byte under onnxruntime

In a checkpoint's directory these files are not part of the manifest.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from textgen.data.store import TokenStore
from textgen.decoding.choose import FIGURES_FORMAT, FIGURES_NAME, int8_cost
from textgen.decoding.decoders import CellDecoder, CellDtype, Decoder
from textgen.decoding.fused import WEIGHTS_OF_8_BITS, FusedDecoder
from textgen.decoding.products import multiplies_int8
from textgen.files import write_atomic
from textgen.model.files import read_model_and_tokenizer, weights_sha256
from textgen.model.lstm import LSTMLanguageModel
from textgen.runs.tensors import serialize

log = logging.getLogger("textgen")

DECODER_NAME = "decoder.safetensors"
ONNX_NAME = "decoder.onnx"
ONNX_FIGURES_NAME = "onnx.json"

# Parts of a split on which the end of a training measures int8, and their tokens. The standard error is then 0.00015
# bits per byte (model of `quick`, 2026-11-29), a thirteenth of what `auto` may lose.
PARTS, PART_LENGTH = 128, 64
LEAST_PARTS = 64

# Parameters times tokens: fewer parts of larger models. This is 109 parts of the preset `large`, all parts up to 67
# million parameters, and nothing beyond 134 million.
MOST_WORK = 1 << 39


def write_decoder(model: LSTMLanguageModel, out: Path) -> tuple[Path, dict[str, Decoder]]:
    """Write the weights of the int8 decoder into a folder.

    Returns:
        The path for the figures, and the decoders to score, by name.
    """
    int8, aside = CellDecoder(model, "int8"), out / f".{DECODER_NAME}.tmp"
    with aside.open("wb") as file:
        file.writelines(serialize({name: value.contiguous() for name, value in int8.int8_tensors().items()}))
    aside.replace(out / DECODER_NAME)
    decoders = {"bfloat16": CellDecoder(model, "bfloat16"), "int8": int8}
    return out / FIGURES_NAME, decoders | {WEIGHTS_OF_8_BITS: FusedDecoder(model, None, int8=True)}


def write_onnx_decoder(model: LSTMLanguageModel, out: Path) -> tuple[Path, dict[str, Decoder]]:
    """Write one step of decoding as an ONNX file into a folder; needs the packages of the extra `export`.

    Returns:
        The path for the figures, and the decoders to score, by name.
    """
    from textgen.decoding.onnx import OnnxDecoder, write_onnx

    write_onnx(model, out / ONNX_NAME)
    return out / ONNX_FIGURES_NAME, {"onnxruntime": OnnxDecoder(model, out / ONNX_NAME)}


def copy_decoder(directory: Path, out: Path) -> float | None:
    """Copy the figures of int8, and its weights if they were exported, from a checkpoint to a folder with the model.

    Returns:
        The cost of int8 in bits per byte; None, and nothing is copied, if it is not measured for these weights.
    """
    try:
        figures = json.loads((directory / FIGURES_NAME).read_bytes())
        cost = float(figures["bits_per_byte"]["int8"] - figures["bits_per_byte"]["plain"])
        if figures["model_sha256"] != weights_sha256(out):
            return None
        if (directory / DECODER_NAME).exists():
            shutil.copyfile(directory / DECODER_NAME, out / DECODER_NAME)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    figures["data"] = Path(str(figures.get("data"))).name  # without the folders of this machine
    (out / FIGURES_NAME).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return cost


def measure_int8(directory: Path, store: TokenStore) -> float | None:
    """Measure what int8 costs a checkpoint, on parts of its held-out text, and write it into its `decoder.json`.

    Args:
        directory: of the checkpoint.
        store: the data of its training; the train split is taken if the validation split is too short.

    Returns:
        The cost in bits per byte. None, and nothing is written: if it is measured already, as by `textgen export`; on a
        processor without VNNI, where int8 is slow; for a word tokenizer, which loses text; if both splits are too short
        or the model is too large.

    Raises:
        TextgenError: the model cannot be read.
        OSError: the file cannot be written.
    """
    if int8_cost(directory)[0] is not None:
        return None
    splits = (name for name in ("validation", "train") if name in store.record["splits"])
    found = ((name, next(store.parts(name))) for name in splits)  # of a split in shards the first one
    long = ((name, split) for name, split in found if split.num_tokens >= LEAST_PARTS * PART_LENGTH)
    if not multiplies_int8() or not store.tokenizer.is_lossless or (chosen := next(long, None)) is None:
        return None
    name, split = chosen
    model, tokenizer = read_model_and_tokenizer(directory)
    parts = min(PARTS, split.num_tokens // PART_LENGTH, MOST_WORK // model.num_parameters // PART_LENGTH)
    if parts < LEAST_PARTS:
        return None
    log.info("measuring what int8 costs `%s`", directory.name)
    places = [i * split.num_tokens // parts for i in range(parts)]
    texts = [split.tokens[place : place + PART_LENGTH] for place in places]
    num_tokens, bits = parts * PART_LENGTH, dict[str, float]()
    for decoder, dtype in _MEASURED.items():
        nats = decoded_nats(CellDecoder(model, dtype), texts, bos_id=tokenizer.bos_id, batch_size=parts)
        bits[decoder] = nats / math.log(2) / (num_tokens * store.bytes_per_token(name))
    figures = {
        "format": FIGURES_FORMAT,
        "model_sha256": weights_sha256(directory),
        "data": name,
        "tokens": num_tokens,
        "bits_per_byte": bits,
    }
    write_atomic(directory / FIGURES_NAME, json.dumps(figures, indent=2) + "\n")
    return bits["int8"] - bits["plain"]


# float32 cells compute what the model computes, but for rounding, and take less time
_MEASURED: dict[str, CellDtype] = {"plain": "float32", "int8": "int8"}


def decoded_nats(
    decoder: Decoder, documents: Sequence[NDArray[np.integer[Any]]], *, bos_id: int, batch_size: int
) -> float:
    """Return the cost of documents, decoded token by token; `evaluation.score` computes it window by window.

    Args:
        decoder: on the CPU.
        documents: token ids, each document with its end-of-text token.
        bos_id: the first input of each document.
        batch_size: documents that are read side by side.

    Returns:
        The sum over all tokens, in nats.
    """
    nats, order = 0.0, sorted(documents, key=len, reverse=True)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            before = torch.full((len(rows),), bos_id)
            state = [part.expand(len(rows), -1).contiguous() for part in decoder.prefill([bos_id])]
            for place in range(len(rows[0])):
                active = sum(len(row) > place for row in rows)  # the shorter documents have ended
                logits, state = decoder.step(before[:active], [part[:active] for part in state])
                before = torch.from_numpy(np.array([row[place] for row in rows[:active]], dtype=np.int64))
                nats += float(F.cross_entropy(logits, before, reduction="sum"))
    return nats
