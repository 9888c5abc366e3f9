"""safetensors files: written without copies, read with suspicion.

The library writes through one bytes object made under the interpreter's lock, which stops a training that goes on
beside it (1.6 s for 480 MB, 2026-11-23), with mode 0600 and without fsync; so the bytes are made here, tensor by
tensor. It reads: after the header was held against what is expected, since the library accepts duplicate keys and takes
42 s and 2 GB for a file of a million empty tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from textgen.errors import TextgenError
from textgen.files import memory_bytes, parse_json

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}

# Ten thousand tensors fit; what is longer was not written by textgen.
HEADER_BYTES = 1 << 20


def serialize(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: its header, then each tensor's memory, uncopied.

    Args:
        tensors: contiguous, on the CPU.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # aligned
    for name, tensor in ordered:
        assert tensor.is_contiguous(), name
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().flatten().view(torch.uint8).numpy().data


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of a file's tensors by name, having checked that they fill it exactly.

    Raises:
        TextgenError: it is none, or damaged.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise TextgenError(f"`{path}` is not a regular file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_BYTES, size - 8):
                raise TextgenError(f"`{path}` is not a tensor file of textgen: its header would have {length} bytes")
            entries = parse_json(file.read(length))
        entries.pop("__metadata__", None)
        header = {name: _entry(value) for name, value in entries.items()}
    except OSError as error:
        raise TextgenError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except TextgenError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TextgenError(f"`{path}` has a damaged header: {str(error)[:200]}") from error
    end = 0
    for start, stop, *_ in sorted(header.values()):
        if start != end:
            raise TextgenError(f"`{path}` has a damaged header: data from byte {start} on, wanted {end}")
        end = stop
    if end != size - 8 - length:
        raise TextgenError(f"`{path}` holds {size - 8 - length} bytes of data, its header says {end}")
    return {name: (dtype, shape) for name, (_, _, dtype, shape) in header.items()}


def _entry(value: Mapping[str, Any]) -> tuple[int, int, str, tuple[int, ...]]:
    """Return start, end, dtype and shape of a header's entry; raise ValueError where they contradict each other."""
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= 8 and len(offsets) == 2):
        raise ValueError("a shape or a pair of offsets is none")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, *offsets)):
        raise ValueError(f"shape {shape}, offsets {offsets}")
    start, stop = offsets
    if stop - start != math.prod(shape) * SIZES[dtype]:
        raise ValueError(f"{dtype} of shape {shape} in {stop - start} bytes")
    return start, stop, dtype, tuple(shape)


def check_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], *, dtypes: Collection[str] = ("F32",)) -> None:
    """Raise TextgenError unless a file holds tensors of these names and shapes, each of one of the dtypes."""
    header = read_header(path)
    if header.keys() != shapes.keys():
        names = sorted(header.keys() ^ shapes.keys())
        raise TextgenError(f"`{path}` holds other tensors than expected: {', '.join(map(repr, names[:3]))[:200]}")
    for name, (dtype, shape) in header.items():
        if shape != tuple(shapes[name]) or dtype not in dtypes:
            raise TextgenError(
                f"`{path}`: `{name}` is {dtype} {list(shape)}, wanted {'/'.join(dtypes)} {list(shapes[name])}"
            )


def read_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, dtypes: Collection[str] = ("F32",)
) -> dict[str, Tensor]:
    """Read a file whose names, shapes and dtypes are known; nothing of it is read before they are found right.

    Raises:
        TextgenError: it is damaged, or holds something else.
    """
    check_tensors(path, shapes, dtypes=dtypes)
    if (size := path.stat().st_size) > memory_bytes():
        raise TextgenError(f"`{path}` has {size} bytes, this machine's memory {memory_bytes()}")
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise TextgenError(f"`{path}` cannot be read: {error}") from error
    except MemoryError as error:
        raise TextgenError(f"`{path}` does not fit into memory: {path.stat().st_size} bytes") from error
