"""Files of read texts: a `ReadState` as safetensors, bound to the model and the tokenizer that made it.

The tensors are `text` (UTF-8 bytes), `ids` (the tokens, begin-of-text first) and, unless no window was read, `hidden.i`
and `cell.i` of each layer. Header: `format`, `num_read`, `device`, and the sha256 of model and tokenizer.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch

from textgen.data.corpus import normalize
from textgen.decoding.decoders import PREFILL_WINDOW, Decoder
from textgen.decoding.reading import ReadState
from textgen.errors import TextgenError
from textgen.files import write_atomic
from textgen.runs.tensors import read_header, read_metadata, read_tensors, serialize
from textgen.tokenizer import Tokenizer

FORMAT = "textgen.state.1"

# Ten million tokens. A file of a stranger is encoded before it is believed, at 26 MB/s.
MOST_BYTES = 64 << 20


def write_state(read: ReadState, path: Path) -> None:
    """Write a state whole or not at all.

    Raises:
        TextgenError: the text is too long for a file, or the file cannot be written.
    """
    assert read.tokenizer_sha256
    tensors = {name: part.cpu().contiguous() for name, part in zip(_names(len(read.state)), read.state, strict=True)}
    tensors["text"] = torch.frombuffer(bytearray(read.text.encode()), dtype=torch.uint8)
    tensors["ids"] = torch.tensor(read.ids, dtype=torch.int32)
    metadata = _origin(read.decoder, read.tokenizer_sha256) | {"num_read": str(read.num_read)}
    pieces = list(serialize(tensors, metadata=metadata))
    if (size := sum(map(len, pieces))) > MOST_BYTES:
        raise TextgenError(f"`{path}` would have {size} bytes, a state has at most {MOST_BYTES}: the text is too long")
    try:
        write_atomic(path, pieces)
    except OSError as error:
        raise TextgenError(f"`{path}` cannot be written: {error.strerror}") from error


def read_state(path: Path, decoder: Decoder, tokenizer: Tokenizer, *, normalization: str) -> ReadState:
    """Read a state, and check that this model has made it with this tokenizer.

    Args:
        path: the file.
        decoder: of the model.
        tokenizer: the model's.
        normalization: of the model's training text.

    Raises:
        TextgenError: the file cannot be read, is damaged, or is of another model, tokenizer or device.
    """
    header, metadata = read_header(path), read_metadata(path)
    for name, ours in _origin(decoder, tokenizer.sha256).items():
        if (seen := str(metadata.get(name))[:64]) != ours:
            if name.endswith("_sha256"):
                what = "model" if name.startswith("weights") else "tokenizer"
                message = f"`{path}` is the state of another {what}: {name} {seen}, this one has {ours}"
            else:
                message = f"`{path}` is of another {name}: {seen}, wanted {ours}"
            raise TextgenError(message)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise TextgenError(f"`{path}` has {size} bytes, a state has at most {MOST_BYTES}")
    num_read = int(count) if re.fullmatch(r"\d{1,9}", count := metadata.get("num_read", "")) else -1
    names = _names(2 * decoder.model.config.num_layers if num_read else 0)
    shape = (1, decoder.model.config.hidden_size)
    lengths = {name: header[name][1][:1] or (0,) if name in header else (0,) for name in ("text", "ids")}
    wanted: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(names, ("F32", shape))
    wanted |= {"text": ("U8", lengths["text"]), "ids": ("I32", lengths["ids"])}
    if header != wanted:
        raise TextgenError(f"`{path}` is damaged: it holds other tensors than a state of this model")
    tensors = read_tensors(path, {name: shape for name, (_, shape) in wanted.items()}, dtypes=("F32", "U8", "I32"))
    ids, parts = tuple(tensors["ids"].tolist()), [tensors[name] for name in names]
    text = tensors["text"].numpy().tobytes().decode(errors="replace")
    is_border = num_read % PREFILL_WINDOW == 0 and 0 <= num_read < len(ids)
    finite = all(bool(part.isfinite().all()) for part in parts)
    encoded = (*ids[:1], *tokenizer.encode(normalize(text, normalization)))
    if not (is_border and finite and ids == encoded and 0 <= ids[0] < decoder.vocab_size + decoder.model.num_labels):
        raise TextgenError(f"`{path}` is damaged: its text, tokens and state do not fit together")
    return ReadState(
        text=text,
        ids=ids,
        num_read=num_read,
        state=[part.to(decoder.device) for part in parts],
        decoder=decoder,
        tokenizer_sha256=tokenizer.sha256,
    )


def _names(count: int) -> list[str]:
    """Return the names of the first tensors of a decoder's state."""
    return [f"{part}.{layer}" for layer in range(count // 2) for part in ("hidden", "cell")]


def _origin(decoder: Decoder, tokenizer_sha256: str) -> dict[str, str]:
    """Return what the bits of a state depend on. The model itself reads prompts, so the decoder is not part of it."""
    weights = hashlib.sha256()  # that of `model.safetensors`
    for piece in serialize({name: value.cpu().contiguous() for name, value in decoder.model.state_tensors().items()}):
        weights.update(piece)
    return {
        "format": FORMAT,
        "weights_sha256": weights.hexdigest(),
        "tokenizer_sha256": tokenizer_sha256,
        "device": decoder.device.type,
    }
