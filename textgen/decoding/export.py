"""Decoders as files, and the cost of a decoder in nats.

- `decoder.safetensors`: the weights of the int8 decoder; `decoder.json`: the bits per byte of every decoder, by which
  `choose_decoder` decides whether int8 may be taken
- `decoder.onnx`: one step of decoding; `onnx.json`: its bits per byte under onnxruntime

In a checkpoint's directory these files are not part of the manifest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from textgen.decoding.choose import FIGURES_NAME
from textgen.decoding.decoders import CellDecoder, Decoder
from textgen.decoding.fused import WEIGHTS_OF_8_BITS, FusedDecoder
from textgen.model.files import weights_sha256
from textgen.model.lstm import LSTMLanguageModel
from textgen.runs.tensors import serialize

DECODER_NAME = "decoder.safetensors"
ONNX_NAME = "decoder.onnx"
ONNX_FIGURES_NAME = "onnx.json"


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
    """Copy the int8 decoder and its figures from a checkpoint into a folder that holds the model.

    Returns:
        The cost of int8 in bits per byte; None, and nothing is copied, if there is no export of these weights.
    """
    try:
        figures = json.loads((directory / FIGURES_NAME).read_bytes())
        cost = float(figures["bits_per_byte"]["int8"] - figures["bits_per_byte"]["plain"])
        if figures["model_sha256"] != weights_sha256(out):
            return None
        shutil.copyfile(directory / DECODER_NAME, out / DECODER_NAME)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    figures["data"] = Path(str(figures.get("data"))).name  # without the folders of this machine
    (out / FIGURES_NAME).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return cost


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
