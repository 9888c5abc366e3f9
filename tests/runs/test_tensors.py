"""Our safetensors files against the library's, both ways, and weights that share one storage."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from textgen.config import ModelConfig
from textgen.errors import TextgenError
from textgen.files import JSON_BYTES, JSON_DEPTH, parse_json
from textgen.model.files import load_model, model_files, read_model, save_model
from textgen.model.lstm import LSTMLanguageModel
from textgen.runs import tensors as tensor_files
from textgen.runs.checkpoint import Saver, checkpoint_path, verify
from textgen.runs.tensors import DTYPES, read_header, read_tensors, serialize
from textgen.tokenizer import MODEL_NAME, Tokenizer

SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (2, 3, 5), (1, 1, 1, 1, 1, 1, 1, 2)]
MODELS: list[dict[str, Any]] = [
    {},
    {"tie_weights": False},
    {"hidden_size": 12, "num_layers": 3, "layer_norm": True, "residual": True},
]


def build(seed: int = 0, vocab_size: int = 61, **shape: Any) -> LSTMLanguageModel:
    torch.manual_seed(seed)
    return LSTMLanguageModel(ModelConfig(**{"embedding_dim": 12, "hidden_size": 20} | shape), vocab_size)


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.write_bytes(b"".join(bytes(piece) for piece in serialize(tensors)))
    return path


def every_dtype() -> dict[str, Tensor]:
    """Return a tensor of random bits of every dtype in every shape; bits make nan and subnormal values too."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype, name in DTYPES.items():
        for shape in SHAPES:
            numbers = torch.Size(shape).numel()
            if dtype == torch.bool:
                value = torch.randint(0, 2, (numbers,), generator=generator).bool()
            else:
                bits = torch.randint(0, 256, (numbers * dtype.itemsize,), generator=generator, dtype=torch.uint8)
                value = bits.view(dtype) if numbers else torch.empty(0, dtype=dtype)
            tensors[f"{name}.{'x'.join(map(str, shape))}"] = value.reshape(shape)
    return tensors


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(seen: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert seen.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (seen[name].dtype, seen[name].shape) == (value.dtype, value.shape), name
        assert bits(seen[name]) == bits(value), name


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


# --- against the library ---------------------------------------------------------------------------------------------


def test_the_library_reads_every_dtype_and_shape_that_we_write(tmp_path: Path) -> None:
    tensors = every_dtype()
    assert_same(load_file(write(tmp_path / "ours.safetensors", tensors)), tensors)


def test_we_read_every_dtype_and_shape_that_the_library_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "theirs.safetensors")
    seen = read_tensors(tmp_path / "theirs.safetensors", shapes_of(tensors), dtypes=set(DTYPES.values()))
    assert_same(seen, tensors)


def test_we_read_what_we_write(tmp_path: Path) -> None:
    tensors = every_dtype()
    path = write(tmp_path / "ours.safetensors", tensors)
    assert_same(read_tensors(path, shapes_of(tensors), dtypes=set(DTYPES.values())), tensors)


def test_a_file_without_tensors_is_written_and_read_by_both(tmp_path: Path) -> None:
    path = write(tmp_path / "ours.safetensors", {})
    assert load_file(path) == read_tensors(path, {}) == {}


def test_names_that_json_escapes_come_back(tmp_path: Path) -> None:
    tensors = {'a "quoted"\n\\name é \U0001f600': torch.ones(2), "": torch.zeros(1)}
    path = write(tmp_path / "ours.safetensors", tensors)
    assert_same(load_file(path), tensors)
    assert_same(read_tensors(path, shapes_of(tensors)), tensors)


def test_every_tensor_lies_aligned_to_its_own_size(tmp_path: Path) -> None:
    content = write(tmp_path / "ours.safetensors", every_dtype()).read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    sizes = {name: dtype.itemsize for dtype, name in DTYPES.items()}
    entries = json.loads(content[8 : 8 + length])
    entries.pop("__metadata__")
    assert len(entries) == len(DTYPES) * len(SHAPES)
    assert [name for name, entry in entries.items() if entry["data_offsets"][0] % sizes[entry["dtype"]]] == []


def test_the_pieces_are_the_tensors_own_memory() -> None:
    tensor = torch.zeros(5)
    _, piece = list(serialize({"a": tensor}))
    tensor.fill_(1)
    assert bytes(piece) == bits(torch.ones(5))


@pytest.mark.parametrize("tensor", [torch.arange(6.0).view(2, 3).T, torch.arange(6, dtype=torch.uint8)[::2]])
def test_a_tensor_that_is_not_contiguous_is_no_file_at_all(tmp_path: Path, tensor: Tensor) -> None:
    # contiguity is the caller's duty: a copy here would be one that nobody sees
    with pytest.raises(AssertionError):
        write(tmp_path / "ours.safetensors", {"a": tensor})
    assert not (tmp_path / "ours.safetensors").exists()


def test_a_checkpoint_holds_a_tensor_that_is_not_contiguous_by_value(tmp_path: Path) -> None:
    tensors = {"columns": torch.arange(6.0).view(2, 3).T, "every other": torch.arange(6.0)[::2]}
    saver = Saver(tmp_path, keep_last=2)
    saver.save(1, {"model": tensors}, {}, best_step=None, since=time.perf_counter())
    saver.wait()
    assert_same(read_tensors(checkpoint_path(tmp_path, 1) / "model.safetensors", shapes_of(tensors)), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shapes: shapes | {"c": (1,)}, "holds other tensors than expected: 'c'"),
        (lambda shapes: {"a": shapes["a"]}, "holds other tensors than expected: 'b'"),
        (lambda shapes: shapes | {"a": (3, 2)}, "`a` is F32 [2, 3], wanted F32 [3, 2]"),
        (lambda shapes: shapes | {"a": (6,)}, "`a` is F32 [2, 3], wanted F32 [6]"),
    ],
)
def test_names_and_shapes_other_than_expected_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    path = write(tmp_path / "ours.safetensors", tensors)
    read_tensors(path, shapes_of(tensors))
    with pytest.raises(TextgenError) as refused:
        read_tensors(path, change(shapes_of(tensors)))
    assert message in str(refused.value)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "ours.safetensors", {"a": torch.zeros(2, 3)})

    def shorten() -> int:  # called after the header was read
        os.truncate(path, path.stat().st_size - 4)
        return 1 << 40

    monkeypatch.setattr(tensor_files, "memory_bytes", shorten)
    with pytest.raises(TextgenError, match="cannot be read"):
        read_tensors(path, {"a": (2, 3)})


def test_a_dtype_other_than_expected_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "ours.safetensors", {"a": torch.zeros(2, dtype=torch.float16)})
    with pytest.raises(TextgenError, match=r"`a` is F16 \[2\], wanted F32 \[2\]"):
        read_tensors(path, {"a": (2,)})


def test_a_header_is_read_without_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "ours.safetensors", {})
    text = json.dumps({"a": {"dtype": "F32", "shape": [1 << 36], "data_offsets": [0, 4 << 36]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + (4 << 36))  # 256 GB, without a block on disk
    started = time.perf_counter()
    assert read_header(path) == {"a": ("F32", (1 << 36,))}
    assert time.perf_counter() - started < 10  # reading 256 GB takes minutes


# --- strict JSON -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"1", b"null", b'"a"', b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}', b'{"a": NaN}',
        b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": 1} x', b"{'a': 1}", b'{"a": 01}',
        b"\xff\xfe{}", '{"a": 1}'.encode("utf-16"), '{"a": 1}'.encode("utf-32"), b"\xef\xbb\xbf{}", b'{"a": "\xff"}',
        b'{"a": ' + b"9" * 100_000 + b"}", b'{"a": ' * 200_000, b"[" * 1_000_000, b"{}" + b" " * JSON_BYTES,
        b'{"a":' * (JSON_DEPTH + 1) + b"1" + b"}" * (JSON_DEPTH + 1),
        b'{"a":' + b"[" * JSON_DEPTH + b"]" * JSON_DEPTH + b"}",
    ],
)  # fmt: skip
def test_what_is_not_one_strict_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_as_textgen_writes_it_is_read() -> None:
    value = {"a": [1, 2.5, -3e-7, True, None, "é", {"b": {}}], "": {}}
    assert parse_json(json.dumps(value, indent=2).encode() + b"\n") == value
    deep = b'{"a":' * JSON_DEPTH + b"1" + b"}" * JSON_DEPTH
    assert parse_json(deep) == json.loads(deep)


# --- one storage for all weights -------------------------------------------------------------------------------------


def flatten(model: LSTMLanguageModel) -> Tensor:
    """Make all parameters views of one buffer, as cuDNN's flatten_parameters does; return it."""
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    return flat


def snapshot(model: LSTMLanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_flat(model: LSTMLanguageModel, flat: Tensor) -> None:
    """Assert that the parameters still lie in one buffer, one behind the other."""
    starts = [p.data_ptr() for p in model.parameters()]
    assert starts[0] == flat.data_ptr()
    sizes = [p.numel() * 4 for p in model.parameters()]
    assert [b - a for a, b in pairwise(starts)] == sizes[:-1]
    assert torch.equal(flat, torch.cat([p.detach().flatten() for p in model.parameters()]))


@pytest.mark.parametrize("shape", MODELS)
def test_a_flattened_model_is_saved_and_read_back_right(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = build(**shape)
    wanted = snapshot(model)
    flat = flatten(model)
    save_model(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * flat.numel() + 4096  # each value once
    back = read_model(tmp_path)
    assert_same(back.state_dict(), wanted)
    assert (back.output.weight is back.embedding.weight) == model.config.tie_weights


@pytest.mark.parametrize("shape", MODELS)
def test_a_flattened_model_goes_through_a_checkpoint_into_a_flattened_model(
    tmp_path: Path, tiny_run: Path, shape: dict[str, Any]
) -> None:
    tokenizer = Tokenizer.from_file(next(tiny_run.glob("checkpoints/*/tokenizer.model")))
    model = build(1, tokenizer.vocab_size, **shape)
    wanted = snapshot(model)
    flat = flatten(model)
    saver = Saver(tmp_path, keep_last=2)
    saver.reserve({"model": model.state_shapes()})
    files = model_files(model) | {MODEL_NAME: tokenizer.model_proto}
    saver.save(3, {"model": model.state_tensors()}, files, best_step=None, since=time.perf_counter())
    flat.zero_()  # the training goes on; what is written is the copy
    saver.wait()
    directory = checkpoint_path(tmp_path, 3)
    verify(directory)
    assert_same(load_file(directory / "model.safetensors"), {name: wanted[name] for name in model.state_shapes()})
    assert_same(load_model(directory)[0].state_dict(), wanted)

    other = build(2, tokenizer.vocab_size, **shape)
    flat = flatten(other)
    other.load_state_dict(read_tensors(directory / "model.safetensors", other.state_shapes()), strict=False)
    assert_same(other.state_dict(), wanted)
    assert_flat(other, flat)
    assert (other.output.weight is other.embedding.weight) == other.config.tie_weights


def test_a_save_into_buffers_of_the_save_before_holds_the_new_weights(tmp_path: Path) -> None:
    model = build()
    flat = flatten(model)
    saver = Saver(tmp_path, keep_last=2)
    for step in (1, 2):
        saver.save(step, {"model": model.state_tensors()}, {}, best_step=None, since=time.perf_counter())
        saver.wait()
        seen = read_tensors(checkpoint_path(tmp_path, step) / "model.safetensors", model.state_shapes())
        assert_same(seen, model.state_tensors())
        flat += 1
