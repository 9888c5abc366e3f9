"""The choice of a decoder: the fastest one on this device whose loss of quality is negligible."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast, get_args

from textgen.config import REMOVED_VALUES, DecoderName
from textgen.decoding.decoders import CellDecoder, CellDtype, Decoder
from textgen.decoding.fused import WEIGHTS_OF_8_BITS, FusedDecoder, triton_kernels
from textgen.decoding.products import multiplies_int8
from textgen.errors import TextgenError
from textgen.files import JSON_BYTES, parse_json
from textgen.hardware import has_bfloat16
from textgen.model.files import WEIGHTS_NAME
from textgen.model.lstm import LSTMLanguageModel

# Figures that `textgen export` leaves in a checkpoint's directory.
FIGURES_NAME = "decoder.json"
FIGURES_FORMAT = "textgen.decoder.1"

# `auto` takes int8 if it costs at most this many bits per byte.
MOST_BITS_PER_BYTE = 0.002


def choose_decoder(model: LSTMLanguageModel, name: str = "auto", *, directory: Path | None = None) -> Decoder:
    """Return the decoder of a name. `auto` takes the fastest one whose loss of quality is negligible.

    Args:
        model: on the device on which it is to decode.
        name: one of `DecoderName`.
        directory: of the checkpoint; its `decoder.json`, if there is one, holds the measured cost of int8.

    Raises:
        TextgenError: there is no decoder of this name, or it does not run on this device.
    """
    names, device = get_args(DecoderName), model.embedding.weight.device.type
    if (removed := REMOVED_VALUES.get(("decoder", name))) is not None:
        raise TextgenError(removed)
    if name not in names:
        raise TextgenError(f"`decoder` must be one of {', '.join(f'`{known}`' for known in names)}: {name}")
    if name == "graph" and device != "cuda":
        raise TextgenError(f"the decoder `graph` needs a CUDA device, the model is on {device}")
    if name == "int8" and device != "cpu":
        raise TextgenError(f"the decoder `int8` needs a CPU, the model is on {device}")
    if name == "plain":
        return Decoder(model, why="as asked")
    if name in ("auto", "graph"):
        dtype, why = _fastest(device, directory)
        decoder = _decoder_of(model, dtype, why, directory=directory)
        decoder.in_graphs = device == "cuda"
        return decoder
    is_slow = name == "int8" and not multiplies_int8()
    why = "as asked" + (", though this processor has no VNNI: slow" if is_slow else "")
    return _decoder_of(model, cast(CellDtype, name), why)


def _decoder_of(model: LSTMLanguageModel, dtype: CellDtype, why: str, *, directory: Path | None = None) -> Decoder:
    """Return the decoder of a dtype: by fused kernels for bfloat16 on a GPU."""
    if dtype != "bfloat16" or model.embedding.weight.device.type != "cuda":
        return CellDecoder(model, dtype, why=why)
    return fused_or_cells(model, why, directory=directory)


def fused_or_cells(model: LSTMLanguageModel, why: str, *, directory: Path | None = None) -> Decoder:
    """Return a decoder in bfloat16, by fused kernels if some run here.

    They read weights of 8 bits if their cost is measured in the checkpoint's `directory`, and negligible.
    """
    kernels = triton_kernels()
    if kernels is None:
        return CellDecoder(model, "bfloat16", why=f"{why}; no fused kernels, as Triton cannot be imported")
    cost, _ = int8_cost(directory, WEIGHTS_OF_8_BITS)
    int8 = cost is not None and cost <= MOST_BITS_PER_BYTE
    decoder = FusedDecoder(
        model, kernels, int8=int8, why=f"{why}, int8 costs {cost:+.5f} bits per byte" if int8 else why
    )
    decoder.try_kernels()
    if not decoder.fused:
        return CellDecoder(model, "bfloat16", why=f"{why}; no fused kernels: {decoder.refusals[0]}")
    return decoder


def _fastest(device: str, directory: Path | None) -> tuple[CellDtype, str]:
    """Return the fastest dtype of a cell decoder on a device, and the reason."""
    if device == "cuda":
        if has_bfloat16(use_cpu=False):
            return "bfloat16", "the GPU has it"
        return "float32", "the GPU has no bfloat16"
    if device != "cpu":
        return "float32", f"no faster dtype is known for {device}"
    if not multiplies_int8():
        no_int8 = "no int8, as the processor has no VNNI"
    else:
        cost, no_int8 = int8_cost(directory)
        if cost is not None and cost <= MOST_BITS_PER_BYTE:
            return "int8", f"it costs {cost:+.5f} bits per byte"
    if has_bfloat16(use_cpu=True):
        return "bfloat16", f"the processor has it; {no_int8}"
    return "float32", f"the processor has no fast bfloat16; {no_int8}"


def int8_cost(directory: Path | None, name: str = "int8") -> tuple[float | None, str]:
    """Return the bits per byte that an int8 decoder costs a checkpoint, and a reason against it for the log.

    The cost is None if it was not measured for these very weights.

    Args:
        directory: of the checkpoint.
        name: of the decoder in its `decoder.json`.
    """
    path = directory and directory / FIGURES_NAME
    if path is None or not path.is_file():
        return None, "int8 is not measured (`textgen export --to decoder`)"
    try:
        with path.open("rb") as file:
            figures: dict[str, Any] = parse_json(file.read(JSON_BYTES + 1))
        if figures["format"] != FIGURES_FORMAT:
            raise ValueError(f"its format is not {FIGURES_FORMAT}")
        bits = figures["bits_per_byte"]
        cost = float(bits[name] - bits["plain"])
        with (path.parent / WEIGHTS_NAME).open("rb") as file:
            if figures["model_sha256"] != hashlib.file_digest(file, "sha256").hexdigest():
                return None, f"`{FIGURES_NAME}` belongs to other weights"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"`{path}` cannot be used ({type(error).__name__}: {str(error)[:80]})"
    return cost, f"int8 costs {cost:+.5f} bits per byte"
