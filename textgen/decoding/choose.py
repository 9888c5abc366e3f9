"""The choice of a decoder: the fastest on this device that costs nothing worth knowing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast, get_args

from textgen.config import REMOVED_VALUES, DecoderName
from textgen.decoding.decoders import CellDecoder, CellDtype, Decoder
from textgen.decoding.products import multiplies_int8
from textgen.errors import TextgenError
from textgen.files import JSON_BYTES, parse_json
from textgen.hardware import has_bfloat16
from textgen.model.files import WEIGHTS_NAME
from textgen.model.lstm import LSTMLanguageModel

# Figures of an export, in the checkpoint's directory, and what int8 may cost to be taken unasked.
FIGURES_NAME = "decoder.json"
FIGURES_FORMAT = "textgen.decoder.1"
MOST_BITS_PER_BYTE = 0.002


def choose_decoder(model: LSTMLanguageModel, name: str = "auto", *, directory: Path | None = None) -> Decoder:
    """Return the decoder of a name; `auto` takes the fastest that costs nothing worth knowing.

    Args:
        model: on the device where it is to decode.
        name: one of `DecoderName`.
        directory: the checkpoint's, whose `decoder.json` says what int8 costs.

    Raises:
        TextgenError: there is no such decoder, or not here.
    """
    names, device = get_args(DecoderName), model.embedding.weight.device.type
    if (removed := REMOVED_VALUES.get(("decoder", name))) is not None:
        raise TextgenError(removed)
    if name not in names:
        raise TextgenError(f"`decoder` must be one of {', '.join(f'`{known}`' for known in names)}: {name}")
    if name == "plain":
        return Decoder(model, why="as asked")
    if name == "graph" and device != "cuda":
        raise TextgenError(f"the decoder `graph` needs a CUDA device, the model is on {device}")
    if name == "int8" and device != "cpu":
        raise TextgenError(f"the decoder `int8` is one of CPUs, the model is on {device}")
    if name not in ("auto", "graph"):
        slow = name == "int8" and not multiplies_int8()
        why = "as asked" + (", though this processor has no VNNI: slow" if slow else "")
        return CellDecoder(model, cast(CellDtype, name), why=why)
    dtype, why = _fastest(device, directory)
    decoder = CellDecoder(model, dtype, why=why)
    decoder.in_graphs = device == "cuda"
    return decoder


def _fastest(device: str, directory: Path | None) -> tuple[CellDtype, str]:
    """Return what products of cells best read on a device, and why."""
    if device == "cuda":
        if has_bfloat16(use_cpu=False):
            return "bfloat16", "the GPU has it"
        return "float32", "the GPU has no bfloat16"
    if device != "cpu":
        return "float32", f"nothing else is known of {device}"
    if not multiplies_int8():
        no_int8 = "no int8, which takes VNNI"
    else:
        cost, no_int8 = _int8_cost(directory)
        if cost is not None and cost <= MOST_BITS_PER_BYTE:
            return "int8", f"it costs {cost:+.5f} bits per byte"
    if has_bfloat16(use_cpu=True):
        return "bfloat16", f"the processor has it; {no_int8}"
    return "float32", f"the processor has no fast bfloat16; {no_int8}"


def _int8_cost(directory: Path | None) -> tuple[float | None, str]:
    """Return what an export has found int8 to cost, if it did, and why int8 is not taken."""
    path = directory and directory / FIGURES_NAME
    if path is None or not path.is_file():
        return None, "int8 is not measured (`textgen export --to decoder`)"
    try:
        with path.open("rb") as file:
            figures: dict[str, Any] = parse_json(file.read(JSON_BYTES + 1))
        if figures["format"] != FIGURES_FORMAT:
            raise ValueError(f"its format is not {FIGURES_FORMAT}")
        bits = figures["bits_per_byte"]
        cost = float(bits["int8"] - bits["plain"])
        with (path.parent / WEIGHTS_NAME).open("rb") as file:
            if figures["model_sha256"] != hashlib.file_digest(file, "sha256").hexdigest():
                return None, f"`{FIGURES_NAME}` is of other weights"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"`{path}` cannot be used ({type(error).__name__}: {str(error)[:80]})"
    return cost, f"int8 costs {cost:+.5f} bits per byte"
