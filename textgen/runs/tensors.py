"""safetensors files, written without copies and checked before they are read.

Writing: the safetensors library makes one bytes object under the interpreter's lock, which stops the training meanwhile
(1.6 s for 480 MB, 2026-11-23). It also writes with mode 0600 and without fsync. So this module makes the bytes, tensor
by tensor.

Reading: the library reads the tensors after this module has compared the header with the expected one. The library
accepts duplicate keys, and takes 42 s and 2 GB for a file of a million empty tensors.
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
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}

# Room for ten thousand tensors; textgen writes no longer header.
HEADER_BYTES = 1 << 20


def serialize(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: its header, then the memory of each tensor without a copy.

    Args:
        tensors: contiguous tensors on the CPU, by name.
        metadata: more texts for the header, by name.
    """
    header, names = build_header({n: (DTYPES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}, metadata=metadata)
    yield header
    for name in names:
        assert tensors[name].is_contiguous(), name
        yield tensors[name].detach().flatten().view(torch.uint8).numpy().data


def build_header(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], *, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """Return the header of a safetensors file, and the names of its tensors in the order of their data.

    Args:
        entries: dtype and shape of each tensor.
        metadata: as in `serialize`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    names = sorted(entries, key=lambda name: (-SIZES[entries[name][0]], name))  # large items first, so all are aligned
    end = 0
    for name in names:
        dtype, shape = entries[name]
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, names


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of a file's tensors by name. The tensors must fill the file without gaps.

    Raises:
        TextgenError: the file is not a safetensors file, or is damaged.
    """
    return {name: (dtype, shape) for name, (_, dtype, shape) in find_tensors(path).items()}


def find_tensors(path: Path) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """Return the place of the first byte in the file, dtype and shape of a file's tensors by name.

    Raises:
        TextgenError: as `read_header`.
    """
    return _read_header(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts in a file's header by name.

    Raises:
        TextgenError: as `read_header`.
    """
    return {name: value for name, value in _read_header(path)[1].items() if isinstance(value, str)}


def _read_header(path: Path) -> tuple[dict[str, tuple[int, str, tuple[int, ...]]], dict[str, Any]]:
    """Return place, dtype and shape of a file's tensors by name, and its metadata."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise TextgenError(f"`{path}` is not a regular file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_BYTES, size - 8):
                raise TextgenError(f"`{path}` is not a tensor file of textgen: its header would have {length} bytes")
            entries = parse_json(file.read(length))
        metadata = dict(entries.pop("__metadata__", {}))
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
    return {name: (8 + length + start, dtype, shape) for name, (start, _, dtype, shape) in header.items()}, metadata


def _entry(value: Mapping[str, Any]) -> tuple[int, int, str, tuple[int, ...]]:
    """Return start, end, dtype and shape of a header's entry; raise ValueError if they contradict each other."""
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= 8 and len(offsets) == 2):
        raise ValueError("a shape or a pair of offsets is not valid")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, *offsets)):
        raise ValueError(f"shape {shape}, offsets {offsets}")
    start, stop = offsets
    if stop - start != math.prod(shape) * SIZES[dtype]:
        raise ValueError(f"{dtype} of shape {shape} in {stop - start} bytes")
    return start, stop, dtype, tuple(shape)


def check_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], *, dtypes: Collection[str] = ("F32",)) -> None:
    """Raise TextgenError unless a file holds exactly these names and shapes, and only the given dtypes."""
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
    """Read the tensors of a file, after its names, shapes and dtypes were checked.

    Raises:
        TextgenError: the file is damaged, holds other tensors, or does not fit into memory.
    """
    check_tensors(path, shapes, dtypes=dtypes)
    if (size := path.stat().st_size) > memory_bytes():
        raise TextgenError(f"`{path}` has {size} bytes, this machine has {memory_bytes()} bytes of memory")
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise TextgenError(f"`{path}` cannot be read: {error}") from error
    except MemoryError as error:
        raise TextgenError(f"`{path}` does not fit into memory: {path.stat().st_size} bytes") from error
