"""What textgen reads, drawn by hypothesis: whatever it is, it is loaded or refused by an error of textgen's own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from textgen.errors import CheckpointError, TextgenError
from textgen.model.files import load_model, read_model
from textgen.runs.checkpoint import verify
from textgen.runs.tensors import SIZES, read_header, read_tensors
from textgen.tokenizer import Tokenizer, TokenizerError
from textgen.training.resume import read_trainer
from textgen.training.step import Progression

Result = TypeVar("Result")

# No hang: an example takes milliseconds, and may take twenty seconds on a busy machine.
fuzz = settings(
    max_examples=300, deadline=20_000, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip

NUMBERS = [0, 1, -1, 2, 3, 4, 16, 32, 340, 1 << 31, 1 << 48, 1 << 63, 1 << 64, 10**12, 10**4000]
scalars = (
    st.none() | st.booleans() | st.integers() | st.sampled_from(NUMBERS) | st.floats() | st.text(max_size=20)
    | st.sampled_from([1e308, -0.0, 5e-324, "\ud800", "\0", "../../etc/passwd", "NaN", "F32", "config.json"])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def changed_json(draw: st.DrawFn, original: Any) -> Any:
    """Draw a JSON value near an original: some values replaced, dropped or added, at any depth."""
    if isinstance(original, dict):
        changed = dict(original)
        for name in draw(st.lists(st.sampled_from([*original, "new", "\n", "__class__"]), max_size=2, unique=True)):
            what = draw(st.integers(0, 9))
            if what == 0:
                changed.pop(name, None)
            elif what <= 4 or name not in original:
                changed[name] = draw(values)
            else:
                changed[name] = draw(changed_json(original[name]))
        return changed
    if isinstance(original, list) and original and draw(st.booleans()):
        changed_list = list(original)
        changed_list[draw(st.integers(0, len(original) - 1))] = draw(values)
        return changed_list
    return draw(values)


@st.composite
def changed_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """Draw bytes near an original: some replaced, taken out, put in, said twice, or cut off."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 16))
        match draw(st.integers(0, 4)):
            case 0 if data:
                data[start] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del data[start : start + length]
            case 2:
                data[start:start] = draw(st.binary(min_size=1, max_size=16))
            case 3:
                data[start:start] = data[start : start + length]
            case 4:
                data[start : start + length] = (
                    draw(st.sampled_from([b"\0", b"\xff", b"\x80", b'"', b"{", b"9"])) * length
                )
    return bytes(data)


@pytest.fixture(scope="module")
def directory(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of a checkpoint; each example writes the file that it changes anew."""
    (source,) = (tiny_run / "checkpoints").iterdir()
    load_model(source)  # imports what loading imports: hypothesis draws constants of modules that it finds
    return Path(shutil.copytree(source, tmp_path_factory.mktemp("fuzz") / source.name))


@pytest.fixture(scope="module")
def originals(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tried(action: Callable[[], Result], refusal: type[Exception]) -> Result | None:
    """Return what an action returns, or None where it refuses in a line."""
    try:
        return action()
    except refusal as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    assert len(said) < 2000
    return None


# --- config.json -----------------------------------------------------------------------------------------------------


def read_config(directory: Path, content: bytes) -> None:
    """Assert that a config is refused, or is that of the model that is read."""
    (directory / "config.json").write_bytes(content)
    model = tried(lambda: read_model(directory), TextgenError)
    if model is None:
        return
    assert model.embedding.weight.shape == (model.vocab_size, model.config.embedding_dim)
    seen = {"vocab_size": model.vocab_size, "text": model.text} | vars(model.config)
    wanted = {name: value for name, value in json.loads(content).items() if name != "format"}
    assert {name: seen[name] for name in wanted} == wanted


@fuzz
@given(data=st.data())
def test_any_values_of_a_config_are_refused_or_are_the_models(
    directory: Path, originals: dict[str, bytes], data: st.DataObject
) -> None:
    config = data.draw(changed_json(json.loads(originals["config.json"])))
    read_config(directory, json.dumps(config).encode())
    (directory / "config.json").write_bytes(originals["config.json"])


@fuzz
@given(data=st.data())
def test_any_bytes_of_a_config_are_refused_or_are_the_models(
    directory: Path, originals: dict[str, bytes], data: st.DataObject
) -> None:
    read_config(directory, data.draw(changed_bytes(originals["config.json"]) | st.binary(max_size=200)))
    (directory / "config.json").write_bytes(originals["config.json"])


# --- manifest.json ---------------------------------------------------------------------------------------------------


def read_manifest(directory: Path, content: bytes, original: bytes) -> None:
    """Assert that a manifest is refused, or says what the right one says of files that it names."""
    (directory / "manifest.json").write_bytes(content)
    try:
        manifest = tried(lambda: verify(directory), CheckpointError)
    finally:
        (directory / "manifest.json").write_bytes(original)
    if manifest is None:
        return
    wanted = json.loads(original)
    assert manifest.step == wanted["step"]
    entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in wanted["files"].items()}
    assert manifest.files.items() <= entries.items()
    if manifest.files.keys() < entries.keys():
        with pytest.raises(CheckpointError, match="has no"):
            read_trainer(directory, manifest)
    else:
        read_trainer(directory, manifest)


@fuzz
@given(data=st.data())
def test_any_values_of_a_manifest_are_refused_or_true(
    directory: Path, originals: dict[str, bytes], data: st.DataObject
) -> None:
    manifest = data.draw(changed_json(json.loads(originals["manifest.json"])))
    read_manifest(directory, json.dumps(manifest).encode(), originals["manifest.json"])


@fuzz
@given(data=st.data())
def test_any_bytes_of_a_manifest_are_refused_or_true(
    directory: Path, originals: dict[str, bytes], data: st.DataObject
) -> None:
    content = data.draw(changed_bytes(originals["manifest.json"]) | st.binary(max_size=200))
    read_manifest(directory, content, originals["manifest.json"])


# --- trainer.json ----------------------------------------------------------------------------------------------------


def read_changed(directory: Path, trainer: Any, original: bytes) -> tuple[dict[str, Any], Progression] | None:
    """Return what is read of a changed trainer.json, or None where it is refused."""
    manifest = verify(directory, [])
    (directory / "trainer.json").write_text(json.dumps(trainer))
    try:
        return tried(lambda: read_trainer(directory, manifest), CheckpointError)
    finally:
        (directory / "trainer.json").write_bytes(original)


@fuzz
@given(data=st.data())
def test_any_progression_is_refused_or_read_as_it_is(
    directory: Path, originals: dict[str, bytes], data: st.DataObject
) -> None:
    trainer = json.loads(originals["trainer.json"])
    progression = data.draw(changed_json(trainer["progression"]))
    read = read_changed(directory, trainer | {"progression": progression}, originals["trainer.json"])
    if read is None:
        return
    assert vars(read[1]) == progression
    for name, value in vars(read[1]).items():
        assert value is None or -1 < value < math.inf, name
    assert type(read[1].step) is type(read[1].total_steps) is int


@fuzz
@given(data=st.data())
def test_any_trainer_is_refused_or_has_what_is_read_of_it(
    directory: Path, originals: dict[str, bytes], data: st.DataObject
) -> None:
    trainer = data.draw(changed_json(json.loads(originals["trainer.json"])))
    read = read_changed(directory, trainer, originals["trainer.json"])
    if read is not None:
        assert isinstance(read[0]["config"], dict)
        assert isinstance(read[0]["data"], str)


# --- safetensors -----------------------------------------------------------------------------------------------------

entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*SIZES, "F8_E4M3", "", "f32"]) | values,
        "shape": st.lists(st.integers(0, 4) | st.sampled_from(NUMBERS), max_size=4) | values,
        "data_offsets": st.tuples(st.integers(0, 64), st.integers(0, 64)) | values,
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3), entries, max_size=3)


@st.composite
def sound_headers(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the header of a right file."""
    header, end = {}, 0
    for name in draw(
        st.lists(st.text(max_size=3).filter(lambda text: text != "__metadata__"), max_size=3, unique=True)
    ):
        dtype, shape = draw(st.sampled_from(sorted(SIZES))), draw(st.lists(st.integers(0, 4), max_size=3))
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header


@fuzz
@given(data=st.data())
@example(data=None)
def test_any_header_is_refused_or_that_of_the_tensors_that_are_read(tmp_path_factory: Any, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    if data is None:
        header: Any = {"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]}}
        size = 4
    else:
        header = data.draw(headers | sound_headers() | sound_headers().flatmap(changed_json) | values)
        ends = [entry["data_offsets"][1] for entry in header.values()] if isinstance(header, dict) and all(
            isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list | tuple)
            and len(entry["data_offsets"]) == 2 and type(entry["data_offsets"][1]) is int
            for entry in header.values()) else []  # fmt: skip
        size = min(max([*ends, 0]), 4096) if data.draw(st.integers(0, 3)) else data.draw(st.integers(0, 64))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    seen = tried(lambda: read_header(path), TextgenError)
    if seen is None:
        return
    shapes = {name: shape for name, (_, shape) in seen.items()}
    tensors = tried(lambda: read_tensors(path, shapes, dtypes=set(SIZES)), TextgenError)
    if tensors is None:  # the library looks at metadata too
        assert "__metadata__" in header
        return
    assert {name: tuple(value.shape) for name, value in tensors.items()} == shapes
    assert sum(value.numel() * value.itemsize for value in tensors.values()) == size


@fuzz
@given(data=st.data())
def test_any_bytes_of_a_tensor_file_are_refused_or_those_of_its_tensors(
    tmp_path_factory: Any, originals: dict[str, bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data.draw(changed_bytes(originals["lanes.safetensors"][:400]) | st.binary(max_size=100)))
    seen = tried(lambda: read_header(path), TextgenError)
    if seen is not None:
        shapes = {name: shape for name, (_, shape) in seen.items()}
        tried(lambda: read_tensors(path, shapes, dtypes=set(SIZES)), TextgenError)


# --- tokenizer.model -------------------------------------------------------------------------------------------------


@settings(fuzz, max_examples=600)
@given(data=st.data())
def test_any_tokenizer_is_refused_or_keeps_every_text(originals: dict[str, bytes], data: st.DataObject) -> None:
    original = originals["tokenizer.model"]
    settings_at = original.index(b"tsv") - 12  # its last 120 bytes: the trainer's and the normalizer's settings
    content = data.draw(
        changed_bytes(original)
        | changed_bytes(original[settings_at:]).map(lambda end: original[:settings_at] + end)
        | st.binary(max_size=200)
        | st.binary(max_size=40).map(lambda end: original + end)
    )
    tokenizer = tried(lambda: Tokenizer(content), TokenizerError)
    if tokenizer is None:
        return
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    if tokenizer.is_lossless:
        assert tokenizer.decode(ids) == text
