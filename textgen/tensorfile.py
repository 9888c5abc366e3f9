"""safetensors files: written without copies, read with suspicion.

The library writes through one bytes object made under the interpreter's lock, which stops a training that goes on
beside it (1.6 s for 480 MB, 2026-11-23), with mode 0600 and without fsync; so the bytes are made here, tensor by
tensor. It reads: after the header was held against what is expected, since the library accepts duplicate keys and takes
42 s and 2 GB for a file of a million empty tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}

# Ten thousand tensors fit; what is longer was not written by textgen.
HEADER_BYTES = 1 << 20

# What textgen writes as JSON has a few KB and four levels. Python itself would take any size, and about a thousand
# levels, which it then could not print.
JSON_BYTES = 8 << 20
JSON_DEPTH = 16


class TensorFileError(ValueError):
    """A tensor file that is not what it should be; the message is one line."""


def chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
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
        TensorFileError: it is none, or damaged.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise TensorFileError(f"`{path}` is not a regular file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_BYTES, size - 8):
                raise TensorFileError(f"`{path}` is not a tensor file of textgen: its header would have {length} bytes")
            entries = parse_json(file.read(length))
        entries.pop("__metadata__", None)
        header = {name: _entry(value) for name, value in entries.items()}
    except OSError as error:
        raise TensorFileError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except TensorFileError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TensorFileError(f"`{path}` has a damaged header: {str(error)[:200]}") from error
    end = 0
    for start, stop, *_ in sorted(header.values()):
        if start != end:
            raise TensorFileError(f"`{path}` has a damaged header: data from byte {start} on, wanted {end}")
        end = stop
    if end != size - 8 - length:
        raise TensorFileError(f"`{path}` holds {size - 8 - length} bytes of data, its header says {end}")
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
    """Raise TensorFileError unless a file holds tensors of these names and shapes, each of one of the dtypes."""
    header = read_header(path)
    if header.keys() != shapes.keys():
        names = sorted(header.keys() ^ shapes.keys())
        raise TensorFileError(f"`{path}` holds other tensors than expected: {', '.join(map(repr, names[:3]))[:200]}")
    for name, (dtype, shape) in header.items():
        if shape != tuple(shapes[name]) or dtype not in dtypes:
            raise TensorFileError(
                f"`{path}`: `{name}` is {dtype} {list(shape)}, wanted {'/'.join(dtypes)} {list(shapes[name])}"
            )


def read_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, dtypes: Collection[str] = ("F32",)
) -> dict[str, Tensor]:
    """Read a file whose names, shapes and dtypes are known; nothing of it is read before they are found right.

    Raises:
        TensorFileError: it is damaged, or holds something else.
    """
    check_tensors(path, shapes, dtypes=dtypes)
    if (size := path.stat().st_size) > memory_bytes():
        raise TensorFileError(f"`{path}` has {size} bytes, this machine's memory {memory_bytes()}")
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise TensorFileError(f"`{path}` cannot be read: {error}") from error
    except MemoryError as error:
        raise TensorFileError(f"`{path}` does not fit into memory: {path.stat().st_size} bytes") from error


def memory_bytes() -> int:
    """Return this machine's memory: no file beyond it can be loaded, and reading a sparse one would take hours."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object of UTF-8 strictly.

    Raises:
        ValueError: it is none, gives a key twice, holds nan or infinity, is longer than `JSON_BYTES`, or nested deeper
            than `JSON_DEPTH`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key stands twice")
        return values

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError("a number is not finite")
        return number

    if len(data) > JSON_BYTES:
        raise ValueError(f"longer than {JSON_BYTES} bytes")
    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    level: list[Any] = [value]
    for _ in range(JSON_DEPTH):
        groups = [group.values() if isinstance(group, dict) else group for group in level]
        level = [item for group in groups for item in group if isinstance(item, dict | list)]
    if level:
        raise ValueError("nested too deeply")
    return value
