"""Crafted files: each is refused, or passed over, in no time and in no memory, and no payload ever runs.

A child process has everything imported, and forks for each case: what a case takes is measured from outside the case.
"""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import marshal
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]

SECONDS, MEGABYTES = 2.0, 300.0
# Seconds are those of the processor, which a busy machine does not stretch. What waits for something is killed.
KILL_SECONDS = 20

OURS = [
    "manifest.json", "config.json", "tokenizer.model", "trainer.json", "model.safetensors", "optimizer.safetensors",
    "lanes.safetensors",
]  # fmt: skip
READ_BY_LOAD_MODEL = ["manifest.json", "config.json", "tokenizer.model", "trainer.json", "model.safetensors"]


@dataclass(frozen=True)
class End:
    """How a case ended."""

    how: str
    """refused, loaded, killed, or the type of another exception"""
    said: str
    seconds: float
    megabytes: float
    """of memory beyond what the process had"""


# --- the child -------------------------------------------------------------------------------------------------------


def build_readers(flags: list[str]) -> tuple[dict[str, Callable[[str], object]], tuple[type[Exception], ...]]:
    """Return everything that reads a checkpoint's files, and what it may raise."""
    from textgen import cli
    from textgen.commands.parsing import parse_train_config
    from textgen.data.store import prepare_store
    from textgen.data.texts import texts_to_score
    from textgen.distributed import launch
    from textgen.distributed.signals import StopSignals
    from textgen.errors import TextgenError
    from textgen.model.files import load_model, read_model
    from textgen.runs.checkpoint import find_checkpoint, newest_valid, verify
    from textgen.runs.tensors import read_header
    from textgen.tokenizer import Tokenizer, TokenizerError
    from textgen.training.resume import find_resume_point, load_training
    from textgen.training.setup import build

    config = parse_train_config([*flags, "--run_dir", os.devnull])
    training = build(config, launch.start("no"), prepare_store(config.data, config.tokenizer), StopSignals())
    torch.set_num_threads(1)

    def resume_from(path: str) -> object:
        training.learner.config = replace(config, resume=path)
        point = find_resume_point(training)
        assert point is not None
        load_training(training, point)
        return point

    def run_verb(*words: str) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        cli.main(words)

    def newest(path: str) -> None:
        directory, problems = newest_valid(Path(path))
        if directory is None:
            raise problems[0]

    return {
        "verify": lambda path: verify(Path(path)),
        "newest": newest,
        "load_model": load_model,
        "best": lambda path: load_model(path, best=True),
        "from_pretrained": read_model,
        "resume": resume_from,
        "header": lambda path: read_header(Path(path)),
        "tokenizer": Tokenizer.from_file,
        "texts": lambda path: texts_to_score(
            find_checkpoint(path), "validation", "text", limit=None, normalization="none"
        ),
        "sample": lambda path: run_verb("sample", path, "--prompt", "a", "--max_new_tokens", "2"),
        "evaluate": lambda path: run_verb("evaluate", path, "--limit", "2"),
    }, (TextgenError, TokenizerError)


def serve(flags: list[str]) -> None:
    """Answer each line `[path, reader, ...]` with how the readers ended, one after the other, in a fork of its own."""
    readers, refusals = build_readers(flags)
    gc.collect()
    gc.freeze()  # else the first collection in each fork would copy all memory
    print("ready", flush=True)
    for line in sys.stdin:
        path, *names = json.loads(line)
        receiving, sending = os.pipe()
        if (child := os.fork()) == 0:
            os.close(receiving)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            ends = [_read(readers[name], path, refusals, memory) for name in names]
            with open(sending, "wb") as pipe:
                pipe.write(json.dumps(ends).encode())
            os._exit(0)
        os.close(sending)
        with open(receiving, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        print(answer.decode() or json.dumps([["killed", "", KILL_SECONDS, 0.0]] * len(names)), flush=True)


def _read(
    reader: Callable[[str], object], path: str, refusals: tuple[type[Exception], ...], memory: int
) -> tuple[Any, ...]:
    signal.alarm(KILL_SECONDS)
    started = time.process_time()
    how, said = "loaded", ""
    try:
        reader(path)
    except refusals as error:
        how, said = "refused", str(error)
    except SystemExit as ended:
        how, said = "refused" if ended.code == 2 else f"exit {ended.code}", "as a command"
    except BaseException as error:
        how, said = type(error).__name__, str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return how, said[:2000], time.process_time() - started, (peak - memory) / 1024


class Child:
    """A process that tries files."""

    def __init__(self, flags: list[str]) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(flags)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, path: Path, *readers: str) -> list[End]:
        """Have a file or directory read in several ways, each of which adds to one process's memory."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(path), *readers]) + "\n")
        self.process.stdin.flush()
        return [End(*end) for end in json.loads(self.process.stdout.readline())]

    def refuses(self, path: Path, *readers: str) -> None:
        """Assert that each reader refuses a path in one line, in no time and in no memory."""
        for reader, end in zip(readers, self.ask(path, *readers), strict=True):
            assert end.how == "refused", (reader, end)
            assert len(end.said.splitlines()) == 1, (reader, end)
            assert len(end.said) < 1000, (reader, end)
            assert end.seconds < SECONDS, (reader, end)
            assert end.megabytes < MEGABYTES, (reader, end)

    def loads(self, path: Path, *readers: str) -> None:
        """Assert that each reader reads a path."""
        for reader, end in zip(readers, self.ask(path, *readers), strict=True):
            assert end.how == "loaded", (reader, end)
            assert end.megabytes < MEGABYTES, (reader, end)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


@pytest.fixture(scope="module")
def child(tiny_flags: list[str], tiny_run: Path) -> Iterator[Child]:
    child = Child(tiny_flags)
    yield child
    child.close()


def brief(value: object) -> str:
    """Name a case."""
    return ascii(value)[:40]


# --- crafting --------------------------------------------------------------------------------------------------------


@pytest.fixture
def original(tiny_run: Path) -> Path:
    """Return a checkpoint that is whole."""
    (directory,) = (tiny_run / "checkpoints").iterdir()
    assert sorted(path.name for path in directory.iterdir()) == sorted(OURS)
    return directory


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """Return a copy of a checkpoint, to be changed."""
    return Path(shutil.copytree(original, tmp_path / original.name))


def vouch(directory: Path) -> None:
    """Make the manifest fit the files: the damage is then no damage to it."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (directory / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def safetensors(header: bytes | Mapping[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a tensor file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_an_untouched_checkpoint_is_loaded_by_every_reader(child: Child, checkpoint: Path) -> None:
    child.loads(checkpoint, "verify", "load_model", "from_pretrained", "resume", "texts", "sample")
    vouch(checkpoint)
    child.loads(checkpoint, "verify", "load_model", "from_pretrained", "resume", "texts", "evaluate")
    child.loads(checkpoint / "model.safetensors", "header")
    child.loads(checkpoint / "tokenizer.model", "tokenizer")


# --- safetensors -----------------------------------------------------------------------------------------------------

MANY = 1_000_000
ONE = tensor([1], [0, 4])
HEADERS: dict[str, Callable[[], bytes]] = {
    "length 2^64 - 1": lambda: safetensors(b"{}", length=(1 << 64) - 1),
    "length 2^63": lambda: safetensors(b"{}", length=1 << 63),
    "length 0": lambda: safetensors(b""),
    "length 1": lambda: safetensors(b"{"),
    "length beyond the end": lambda: safetensors(b"{}", length=3),
    "seven bytes": lambda: b"\2\0\0\0\0\0\0",
    "nothing": lambda: b"",
    "2 MB of spaces": lambda: safetensors(b"{}" + b" " * 2_000_000),
    "a million empty tensors": lambda: safetensors(
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(MANY)) + b"}"
    ),
    "as many empty tensors as a header holds": lambda: safetensors(
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(17_000)) + b"}"
    ),
    "a key twice": lambda: safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "a shape twice": lambda: safetensors(
        b'{"a":{"dtype":"F32","shape":[9],"shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "overlapping": lambda: safetensors({"a": tensor([2], [0, 8]), "b": tensor([2], [4, 12])}, bytes(12)),
    "the same place twice": lambda: safetensors({"a": ONE, "b": ONE}, bytes(4)),
    "a gap": lambda: safetensors({"a": ONE, "b": tensor([1], [8, 12])}, bytes(12)),
    "a gap before the first": lambda: safetensors({"a": tensor([1], [4, 8])}, bytes(8)),
    "data behind the last": lambda: safetensors({"a": ONE}, bytes(5)),
    "data that is missing": lambda: safetensors({"a": ONE}, bytes(3)),
    "offsets reversed": lambda: safetensors({"a": tensor([1], [4, 0])}, bytes(4)),
    "offsets negative": lambda: safetensors({"a": tensor([1], [-4, 0])}, bytes(4)),
    "offsets huge": lambda: safetensors({"a": tensor([1], [1 << 70, (1 << 70) + 4])}, bytes(4)),
    "offsets wrapping around": lambda: safetensors({"a": tensor([1], [(1 << 64) - 4, 1 << 64])}, bytes(4)),
    "offsets of floats": lambda: safetensors({"a": tensor([1], [0.0, 4.0])}, bytes(4)),
    "offsets of bools": lambda: safetensors({"a": tensor([1], [False, True], "U8")}, bytes(1)),
    "offsets of texts": lambda: safetensors({"a": tensor([1], ["0", "4"])}, bytes(4)),
    "three offsets": lambda: safetensors({"a": tensor([1], [0, 4, 4])}, bytes(4)),
    "offsets as an object": lambda: safetensors({"a": tensor([1], {"0": 0, "4": 4})}, bytes(4)),
    "shape negative": lambda: safetensors({"a": tensor([-1, -1], [0, 4])}, bytes(4)),
    "shape of a float": lambda: safetensors({"a": tensor([1.0], [0, 4])}, bytes(4)),
    "shape of a bool": lambda: safetensors({"a": tensor([True], [0, 4])}, bytes(4)),
    "shape as text": lambda: safetensors({"a": tensor("", [0, 4])}, bytes(4)),
    "shape as an object": lambda: safetensors({"a": tensor({}, [0, 4])}, bytes(4)),
    "shape null": lambda: safetensors({"a": tensor(None, [0, 4])}, bytes(4)),
    "shape whose product wraps around": lambda: safetensors({"a": tensor([1 << 32, 1 << 32], [0, 0])}),
    "shape of a zero and 2^60": lambda: safetensors({"a": tensor([0, 1 << 60], [0, 0])}),
    "shape of 100,000 ones": lambda: safetensors({"a": tensor([1] * 100_000, [0, 4])}, bytes(4)),
    "shape nested deeply": lambda: safetensors(b'{"a":{"shape":' + b"[" * 400_000 + b"]" * 400_000 + b"}}"),
    "dtype unknown": lambda: safetensors({"a": tensor([1], [0, 4], "PICKLE")}, bytes(4)),
    "dtype of a list": lambda: safetensors({"a": tensor([1], [0, 4], [])}, bytes(4)),
    "dtype null": lambda: safetensors({"a": tensor([1], [0, 4], None)}, bytes(4)),
    "dtype missing": lambda: safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "entry as a list": lambda: safetensors({"a": ["F32", [1], [0, 4]]}, bytes(4)),
    "header as a list": lambda: safetensors(b"[]"),
    "header of 10^5 digits": lambda: safetensors(b'{"a":' + b"9" * 100_000 + b"}"),
    "header with nan": lambda: safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "header in UTF-16": lambda: safetensors(json.dumps({"a": ONE}).encode("utf-16"), bytes(4)),
    "header not UTF-8": lambda: safetensors(b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "names with line breaks, escapes and surrogates": lambda: safetensors(
        b'{"\\ud800\\n\\u001b[2J":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "a name of 900 KB": lambda: safetensors({"a" * 900_000: ONE}, bytes(4)),
}


# These say what is so, of tensors that nobody expects.
SOUND = {
    "as many empty tensors as a header holds", "names with line breaks, escapes and surrogates", "a name of 900 KB",
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_crafted_tensor_file_is_refused_even_where_the_manifest_vouches_for_it(
    child: Child, original: Path, checkpoint: Path, case: str
) -> None:
    content = HEADERS[case]()
    (checkpoint / "model.safetensors").write_bytes(content)
    vouch(checkpoint)
    if case not in SOUND:
        child.refuses(checkpoint / "model.safetensors", "header")
    child.refuses(checkpoint, "load_model", "from_pretrained", "resume")
    for name in ("optimizer.safetensors", "lanes.safetensors"):
        (checkpoint / name).write_bytes(content)
    shutil.copyfile(original / "model.safetensors", checkpoint / "model.safetensors")
    vouch(checkpoint)
    child.refuses(checkpoint, "resume")


def edit_weights(change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> Callable[[bytes], bytes]:
    return lambda content: safetensors(*change(*split(content)))


def rename_tensor(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    return {name.replace("hidden", "h").replace(".bias", ".Bias"): entry for name, entry in header.items()}, data


def add_tensor(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    return header | {"extra": tensor([1], [len(data), len(data) + 4])}, data + bytes(4)


def drop_tensor(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    start = header.pop(last)["data_offsets"][0]
    return header, data[:start]


def transpose_tensors(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    for name, entry in header.items():
        if name != "__metadata__":
            entry["shape"] = entry["shape"][::-1] if len(entry["shape"]) > 1 else [1, *entry["shape"]]
    return header, data


def relabel_dtype(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    for name, entry in header.items():
        if name != "__metadata__":
            entry["dtype"] = "I32"
    return header, data


def halve_numbers(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    for name, entry in header.items():
        if name != "__metadata__":
            entry["dtype"], entry["data_offsets"] = "F8_E4M3", [offset // 4 for offset in entry["data_offsets"]]
    return header, data[: len(data) // 4]


def leave_gap(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return header, bytes(8) + data


def share_data(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    for one, other in itertools.combinations(entries, 2):
        if one["shape"] == other["shape"]:
            other["data_offsets"] = one["data_offsets"]
            return header, data
    raise AssertionError("no two tensors of one shape")


def swap_ends(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        entry["data_offsets"] = entry["data_offsets"][::-1]
    return header, data


def metadata_list(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    return header | {"__metadata__": [1, 2]}, data


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "lanes.safetensors"])
@pytest.mark.parametrize(
    "change",
    [
        rename_tensor,
        add_tensor,
        drop_tensor,
        transpose_tensors,
        relabel_dtype,
        halve_numbers,
        leave_gap,
        share_data,
        swap_ends,
        metadata_list,
    ],
    ids=lambda change: change.__name__,
)
def test_a_tensor_file_of_other_names_shapes_or_dtypes_is_refused(
    child: Child, checkpoint: Path, change: Any, name: str
) -> None:
    path = checkpoint / name
    path.write_bytes(edit_weights(change)(path.read_bytes()))
    vouch(checkpoint)
    child.loads(checkpoint, "verify")
    child.refuses(checkpoint, "resume")
    if name == "model.safetensors":
        child.refuses(checkpoint, "load_model", "from_pretrained")


# --- config.json -----------------------------------------------------------------------------------------------------

STRANGE = [-1, 0, 1.5, True, None, "", "9", [], {}, 10**9, 10**12, 10**18, 1 << 64, 10**4000]


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "embedding_dim", "num_layers", "dropout", "tie_weights", "projection"]
)
def test_a_config_that_asks_for_what_the_weights_are_not_is_refused(child: Child, checkpoint: Path, name: str) -> None:
    original = json.loads((checkpoint / "config.json").read_text())
    for value in STRANGE:
        if value is original[name] or (name == "dropout" and value == 0 and value is not True):
            continue
        (checkpoint / "config.json").write_text(json.dumps(original | {name: value}))
        vouch(checkpoint)
        child.refuses(checkpoint, "from_pretrained", "load_model")


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 10**9, "num_layers": 10**9, "vocab_size": 10**12},
        {"hidden_size": 10**9, "num_layers": 3},
        {"embedding_dim": 10**6, "vocab_size": 10**6},
        {"text": []},
        {"text": [["tokenizer_sha256", "a"]]},
        {"text": {"tokenizer_sha256": 5}},
        {"text": {"tokenizer_sha256": "0" * 64}},
        {"text": {"normalization": {}}},
        {"format": "textgen.lstm.2"},
        {"format": ["textgen.lstm.1"]},
        {"unknown\n\u001b[2J\ud800": 1},
        {"__class__": "os.system"},
    ],
)
def test_a_config_of_strange_values_is_refused(child: Child, checkpoint: Path, values: dict[str, Any]) -> None:
    change_json(checkpoint / "config.json", **values)
    vouch(checkpoint)
    child.refuses(checkpoint, "load_model")


def test_more_layers_than_weights_cost_nothing(child: Child, checkpoint: Path) -> None:
    entries = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(17_000))
    (checkpoint / "model.safetensors").write_bytes(safetensors(b"{" + entries + b"}"))
    for num_layers in (17_000 // 3, 17_000, 10**9):
        change_json(checkpoint / "config.json", num_layers=num_layers)
        vouch(checkpoint)
        child.refuses(checkpoint, "load_model", "from_pretrained")


JSONS: dict[str, bytes] = {
    "nested deeply in lists": b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "nested deeply in objects": b'{"a":' * 150_000 + b"1" + b"}" * 150_000,
    "nested to 900 levels": b'{"config":' * 900 + b"1" + b"}" * 900,
    "an integer of 10^5 digits": b'{"format":' + b"9" * 100_000 + b"}",
    "an integer of 4000 digits": b'{"format":' + b"9" * 4000 + b"}",
    "nan": b'{"format": NaN}',
    "beyond a float": b'{"format": 1e999}',
    "a list": b"[]",
    "nothing": b"",
    "null": b"null",
    "2 MB of spaces": b"{}" + b" " * 2_000_000,
    "UTF-16": '{"format": 1}'.encode("utf-16"),
    "a text with line breaks and a surrogate": b'{"format": "a\\nb\\ud800\\u001b[2J"}',
    "a text of 900 KB": b'{"format": "' + b"a" * 900_000 + b'"}',
    "100,000 keys": json.dumps({f"k{i}": 0 for i in range(80_000)}).encode(),
}


@pytest.mark.parametrize("name", ["config.json", "trainer.json", "manifest.json"])
def test_crafted_json_is_refused_wherever_it_stands(child: Child, checkpoint: Path, name: str) -> None:
    for content in JSONS.values():
        (checkpoint / name).write_bytes(content)
        if name != "manifest.json":
            vouch(checkpoint)
        if name == "config.json":
            child.refuses(checkpoint, "from_pretrained")
        if name != "trainer.json":
            child.refuses(checkpoint, "load_model")
        if name != "config.json":  # a resume has the model's shape from its settings
            child.refuses(checkpoint, "resume", "texts")


# --- what is no file -------------------------------------------------------------------------------------------------


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_loop(path: Path) -> None:
    path.symlink_to(path.name)


def put_directory(path: Path) -> None:
    path.mkdir()


def put_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def put_process_memory(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


PUTS = [put_fifo, put_zeros, put_loop, put_directory, put_sparse, put_process_memory]


@pytest.mark.parametrize("put", PUTS, ids=lambda put: put.__name__)
@pytest.mark.parametrize("name", OURS)
def test_what_is_no_plain_file_is_refused_at_once(child: Child, checkpoint: Path, put: Any, name: str) -> None:
    (checkpoint / name).unlink()
    put(checkpoint / name)
    child.refuses(checkpoint, "verify", "resume")
    if name in READ_BY_LOAD_MODEL and not (name == "trainer.json" and put is put_loop):  # a loop is not there
        child.refuses(checkpoint, "load_model")
    if name in ("config.json", "model.safetensors"):
        child.refuses(checkpoint, "from_pretrained")
    if name.endswith(".safetensors"):
        child.refuses(checkpoint / name, "header")
    if name == "tokenizer.model":
        child.refuses(checkpoint / name, "tokenizer")
    # a model's directory without a checkpoint's files, as one from the hub is
    for extra in {"manifest.json", "trainer.json"} - {name}:
        (checkpoint / extra).unlink()
    if name in ("config.json", "model.safetensors", "tokenizer.model"):
        child.refuses(checkpoint, "load_model")


def test_a_header_of_a_terabyte_is_not_read(child: Child, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(safetensors(b"{}", length=(1 << 40) - 8))
    os.truncate(path, 1 << 40)
    child.refuses(path, "header")
    child.refuses(checkpoint, "from_pretrained")


@pytest.mark.parametrize("name", [name for name in OURS if name != "manifest.json"])
def test_a_terabyte_that_the_manifest_vouches_for_is_refused_at_once(child: Child, checkpoint: Path, name: str) -> None:
    put_sparse(checkpoint / name)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name]["bytes"] = 1 << 40
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    child.refuses(checkpoint, "verify", "resume", *(["load_model"] if name in READ_BY_LOAD_MODEL else []))


def test_a_terabyte_of_weights_that_the_config_asks_for_is_refused_at_once(child: Child, checkpoint: Path) -> None:
    size = 250_000
    change_json(checkpoint / "config.json", hidden_size=size, embedding_dim=size, num_layers=1, vocab_size=340)
    shapes = {
        "embedding.weight": [340, size], "layers.0.weight_ih": [4 * size, size], "layers.0.weight_hh": [4 * size, size],
        "layers.0.bias": [4 * size], "output.bias": [340],
    }  # fmt: skip
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = tensor(shape, [start, end])
    content = safetensors(header)
    (checkpoint / "model.safetensors").write_bytes(content)
    os.truncate(checkpoint / "model.safetensors", len(content) + end)
    assert end > 1 << 40
    child.loads(checkpoint / "model.safetensors", "header")
    child.refuses(checkpoint, "from_pretrained", "load_model", "resume")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["bytes"] = len(content) + end
    config = (checkpoint / "config.json").read_bytes()
    manifest["files"]["config.json"] = {"bytes": len(config), "sha256": hashlib.sha256(config).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    child.refuses(checkpoint, "load_model", "resume", "verify")


# --- manifest.json ---------------------------------------------------------------------------------------------------

NAMES = [
    "../../etc/passwd", "/etc/passwd", "..", ".", "", "config.json\0", "\0", "a\\..\\b.json", "..\\..\\config.json",
    "sub/config.json", "./config.json", "config.json/", "config.json\n", "CONFIG.json", "config.jsonx", "config",
    "\ud800.json", "ｃonfig.json", "a" * 5000 + ".json", "config.json/../../../../etc/passwd", "~/config.json",
    "rng_0.pkl", "%2e%2e/config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=brief)
def test_a_manifest_that_names_what_is_no_file_of_a_checkpoint_is_refused(
    child: Child, checkpoint: Path, name: str
) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = Path("/etc/passwd").read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    child.refuses(checkpoint, "verify", "load_model", "resume")


@pytest.mark.parametrize(
    "entry",
    [
        {"bytes": -1}, {"bytes": 1 << 70}, {"bytes": 10**4000}, {"bytes": 339.0}, {"bytes": True}, {"bytes": None},
        {"bytes": "339"}, {"bytes": [339]}, {"sha256": ""}, {"sha256": None}, {"sha256": 5}, {"sha256": ["0" * 64]},
        {"sha256": "0" * 63 + "\n"}, {"sha256": "é" * 64}, {"sha256": "0" * 900_000},
    ],
    ids=brief,
)  # fmt: skip
def test_a_manifest_of_strange_sizes_or_digests_is_refused(child: Child, checkpoint: Path, entry: Any) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in ("config.json", "optimizer.safetensors"):
        changed = manifest | {"files": manifest["files"] | {name: manifest["files"][name] | entry}}
        (checkpoint / "manifest.json").write_text(json.dumps(changed))
        child.refuses(checkpoint, "verify", "load_model", "resume")


@pytest.mark.parametrize(
    "values",
    [
        {"step": -4}, {"step": 4.0}, {"step": True}, {"step": "4"}, {"step": None}, {"step": 5}, {"step": 10**4000},
        {"files": []}, {"files": None}, {"files": "config.json"}, {"files": {"config.json": None}}, {"format": None},
        {"files": {"config.json": []}}, {"format": {"a": 1}}, {"files": {f"{'a' * i}.json": 0 for i in range(1, 900)}},
    ],
    ids=brief,
)  # fmt: skip
def test_a_manifest_of_strange_values_is_refused(child: Child, checkpoint: Path, values: Any) -> None:
    change_json(checkpoint / "manifest.json", **values)
    child.refuses(checkpoint, "verify", "load_model", "resume")


def test_a_manifest_without_files_vouches_for_none(child: Child, checkpoint: Path) -> None:
    change_json(checkpoint / "manifest.json", files={})
    child.refuses(checkpoint, "load_model", "resume", "texts")


# --- trainer.json ----------------------------------------------------------------------------------------------------


def change_progression(checkpoint: Path, **values: Any) -> None:
    progression = json.loads((checkpoint / "trainer.json").read_text())["progression"]
    change_json(checkpoint / "trainer.json", progression=progression | values)


@pytest.mark.parametrize(
    "values",
    [
        {"step": -1}, {"step": 5}, {"step": 4.0}, {"step": True}, {"step": 1 << 64}, {"step": 10**4000},
        {"total_steps": None}, {"epoch_nats": "1"}, {"epoch_nats": 5}, {"best_loss": []}, {"best_step": "x\ny"},
        {"finished": 1}, {"unlogged_nats": {}}, {"more": 1}, {"evaluations_without_better": -1},
    ],
    ids=brief,
)  # fmt: skip
def test_a_progression_of_strange_numbers_is_refused(child: Child, checkpoint: Path, values: Any) -> None:
    change_progression(checkpoint, **values)
    vouch(checkpoint)
    child.refuses(checkpoint, "resume")


@pytest.mark.parametrize("name", ["config", "mixed_precision", "data", "progression"])
def test_a_trainer_without_what_is_read_of_it_is_refused(child: Child, checkpoint: Path, name: str) -> None:
    values = json.loads((checkpoint / "trainer.json").read_text())
    del values[name]
    (checkpoint / "trainer.json").write_text(json.dumps(values))
    vouch(checkpoint)
    child.refuses(checkpoint, "resume")


@pytest.mark.parametrize(
    "values",
    [
        {"config": []}, {"config": None}, {"config": "data"}, {"config": 5}, {"config": {"data": 5}},
        {"progression": []}, {"wandb_id": {}}, {"wandb_id": 5}, {"run_id": 5}, {"scaler": []}, {"scaler": "x"},
        {"data": {}}, {"data": "0" * 64}, {"mixed_precision": {}},
    ],
    ids=brief,
)  # fmt: skip
def test_a_trainer_of_strange_values_is_refused(child: Child, checkpoint: Path, values: Any) -> None:
    change_json(checkpoint / "trainer.json", **values)
    vouch(checkpoint)
    child.refuses(checkpoint, "resume")


@pytest.mark.parametrize("step", [-4, 10**18, 10**4000, True, 4.0, "4", None, "../../../etc"], ids=brief)
def test_a_best_step_that_is_none_is_refused(child: Child, checkpoint: Path, tmp_path: Path, step: Any) -> None:
    change_progression(checkpoint, best_step=step)
    vouch(checkpoint)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint.rename(tmp_path / "run" / "checkpoints" / checkpoint.name)
    child.loads(tmp_path / "run", "newest", "load_model")
    child.refuses(tmp_path / "run", "best")


@pytest.mark.parametrize(
    "settings",
    [
        None, "data", 5, {"data": []}, {"data": None}, {"data": "files"}, {"data": {"unknown": 1}},
        {"data": {"validation_fraction": "x"}}, {"data": {"validation_fraction": 2}}, {"data": {"files": 5}},
        {"data": {"source": None}}, {"tokenizer": {"vocab_size": -1}}, {"tokenizer": {"vocab_size": {}}},
        {"tokenizer": {"path": "/dev/zero"}, "data": {"source": "files", "files": ["/nowhere"]}},
        {"data": {"store": "/nowhere"}}, {"data": {"source": "files", "files": ["/nowhere/x.jsonl"]}},
    ],
    ids=brief,
)  # fmt: skip
def test_evaluation_refuses_settings_that_are_none(child: Child, checkpoint: Path, settings: Any) -> None:
    change_json(checkpoint / "trainer.json", config=settings)
    vouch(checkpoint)
    child.refuses(checkpoint, "texts", "evaluate")


def test_evaluation_refuses_settings_that_were_damaged(child: Child, checkpoint: Path) -> None:
    path = checkpoint / "trainer.json"
    path.write_text(path.read_text().replace('"validation_fraction": 0.1', '"validation_fraction": 0.2'))
    child.refuses(checkpoint, "texts", "evaluate")


# --- tokenizer.model -------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(text: bytes, kind: int | None = None, score: float = -1.0) -> bytes:
    return field(1, field(1, text) + varint(2 << 3 | 5) + struct.pack("<f", score) + (field(3, kind) if kind else b""))


SELF_TESTS = field(4, b"".join(field(1, field(1, b"a") + field(2, b"zzz")) for _ in range(100)))
# (add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces) of a normalizer
LOSSY = field(3, field(3, 1) + field(4, 1) + field(5, 0))
LOSSLESS = field(3, field(3, 0) + field(4, 0) + field(5, 1))
APPENDED: dict[str, Callable[[], bytes]] = {
    "a piece that is not UTF-8": lambda: piece(b"\xff\xfe"),
    "an empty piece": lambda: piece(b""),
    "a piece twice": lambda: piece(b"the") * 2,
    "a piece of nan": lambda: piece(b"qz", None, float("nan")),
    "a piece of 5 MB": lambda: piece(b"a" * 5_000_000),
    "a byte piece that is none": lambda: piece(b"<0xZZ>", 6),
    "a second unknown": lambda: piece(b"unknown", 2),
    "a charsmap of noise": lambda: field(3, field(2, bytes(range(256)) * 20)),
    "a charsmap that says it is huge": lambda: field(3, field(2, b"\xff\xff\xff\x7f" + bytes(100))),
    "no end of a varint": lambda: b"\x80" * 1_000_000,
    "a field without an end": lambda: b"\x0a\xff\xff\xff\x7f",
    "a group": lambda: varint(9 << 3 | 3) + varint(9 << 3 | 4),
    "a million pieces": lambda: b"".join(piece(b"q%d" % i) for i in range(MANY)),
    "a model type that there is not": lambda: field(2, field(3, 99)),
    "a model type beyond 32 bits": lambda: field(2, field(3, (1 << 32) + 3)),
    "a lossy normalizer": lambda: LOSSY,
    "part of a lossy normalizer, as a second one": lambda: field(3, field(5, 0)),
    "a lossy normalizer that an empty one seems to replace": lambda: LOSSY + field(3, b""),
    "a lossy normalizer that a number seems to replace": lambda: LOSSY + field(3, 1),
    "a denormalizer": lambda: field(5, field(2, b"noise" * 10)),
    "20 MB of zeros": lambda: bytes(20_000_000),
}


@pytest.mark.parametrize("case", APPENDED)
def test_a_crafted_tokenizer_is_refused(child: Child, checkpoint: Path, case: str) -> None:
    path = checkpoint / "tokenizer.model"
    path.write_bytes(path.read_bytes() + APPENDED[case]())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change_json(checkpoint / "config.json", text={"tokenizer_sha256": digest})
    vouch(checkpoint)
    child.refuses(path, "tokenizer")
    child.refuses(checkpoint, "load_model", "sample")


@pytest.mark.parametrize(
    "more",
    [SELF_TESTS, LOSSLESS, LOSSY + LOSSLESS, field(2, 7), field(3, 7), field(1000, b"unknown"), piece(b"zzq")[:0]],
)
def test_a_tokenizer_with_harmless_additions_is_read(child: Child, checkpoint: Path, more: bytes) -> None:
    path = checkpoint / "tokenizer.model"
    path.write_bytes(path.read_bytes() + more)
    child.loads(path, "tokenizer")


def test_a_tokenizer_of_other_tokens_than_the_model_is_refused(child: Child, checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.model"
    path.write_bytes(path.read_bytes() + piece(b"zzq"))
    child.loads(path, "tokenizer")
    change_json(checkpoint / "config.json", text={})
    vouch(checkpoint)
    child.refuses(checkpoint, "load_model", "sample")


def test_the_largest_tokenizer_that_is_read_costs_little(child: Child, checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.model"
    content = path.read_bytes() + b"".join(piece(b"q%d" % i) for i in range(520_000))
    assert 0.95 * (8 << 20) < len(content) <= 8 << 20
    path.write_bytes(content)
    (end,) = child.ask(path, "tokenizer")
    assert (end.how, end.megabytes < MEGABYTES, end.seconds < 2 * SECONDS) == ("loaded", True, True), end


# --- pickles ---------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it runs a command."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def numpy_file(payload: Payload, *, archive: bool = False) -> bytes:
    file = io.BytesIO()
    array = np.array([payload], dtype=object)
    if archive:
        np.savez(file, a=array)
    else:
        np.save(file, array, allow_pickle=True)
    return file.getvalue()


def torch_file(content: Any, *, archive: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


def zip_of(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "rng_0.pkl": lambda marker: pickle.dumps(Payload(os.system, f"touch {marker}")),
    "optimizer.bin": lambda marker: pickle.dumps(Payload(os.system, f"touch {marker}"), protocol=0),
    "pytorch_model.bin": lambda marker: torch_file({"a": Payload(os.system, f"touch {marker}")}),
    "random_states_0.pkl": lambda marker: torch_file([Payload(open, str(marker), "w")], archive=False),
    "custom_checkpoint_0.pkl": lambda marker: pickle.dumps({"state": Payload(exec, f"open({str(marker)!r}, 'w')")}),
    ".metadata": lambda marker: pickle.dumps(Payload(subprocess.call, ["touch", str(marker)]), protocol=2),
    "scheduler.bin": lambda marker: pickle.dumps([Payload(eval, f"open({str(marker)!r}, 'w')")], protocol=5),
    "model.joblib": lambda marker: zlib.compress(pickle.dumps(Payload(os.system, f"touch {marker}"))),
    "arrays.npy": lambda marker: numpy_file(Payload(os.system, f"touch {marker}")),
    "arrays.npz": lambda marker: numpy_file(Payload(os.system, f"touch {marker}"), archive=True),
    "training_args.bin": lambda marker: zip_of(
        **{"data.pkl": pickle.dumps(Payload(os.mkdir, str(marker))), "version": b"3"}
    ),
    "scaler.pt": lambda marker: b"\x80\x02cos\nsystem\nU%ctouch %s\x85R." % (6 + len(bytes(marker)), bytes(marker)),
    "modeling.pyc": lambda marker: bytes(16) + marshal.dumps(compile(f"open({str(marker)!r}, 'w')", "x", "exec")),
    "sitecustomize.py": lambda marker: f"open({str(marker)!r}, 'w')\n".encode(),
    "config.yaml": lambda marker: f"!!python/object/apply:os.system ['touch {marker}']\n".encode(),
}  # fmt: skip

# Payloads that a reader of their kind runs: with it they prove to be live.
RUNNERS: dict[str, Callable[[bytes], object]] = {
    "rng_0.pkl": pickle.loads,
    "optimizer.bin": pickle.loads,
    "pytorch_model.bin": lambda data: torch.load(io.BytesIO(data), weights_only=False),
    "random_states_0.pkl": lambda data: torch.load(io.BytesIO(data), weights_only=False),
    "custom_checkpoint_0.pkl": pickle.loads,
    ".metadata": pickle.loads,
    "scheduler.bin": pickle.loads,
    "model.joblib": lambda data: pickle.loads(zlib.decompress(data)),
    "arrays.npy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
    "arrays.npz": lambda data: np.load(io.BytesIO(data), allow_pickle=True)["a"],
    "training_args.bin": lambda data: pickle.loads(zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl")),
    "scaler.pt": pickle.loads,
    "modeling.pyc": lambda data: exec(marshal.loads(data[16:])),
    "sitecustomize.py": lambda data: exec(data),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", RUNNERS)
def test_the_payloads_are_live(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    RUNNERS[name](PAYLOADS[name](marker))
    assert marker.exists()


def test_planted_payloads_are_passed_over(child: Child, checkpoint: Path, tmp_path: Path) -> None:
    markers = tmp_path / "markers"
    markers.mkdir()
    for number, (name, payload) in enumerate(PAYLOADS.items()):
        (checkpoint / name).write_bytes(payload(markers / f"{number}"))
    child.loads(checkpoint, "verify", "load_model", "from_pretrained", "resume", "texts", "sample", "evaluate")
    assert list(markers.iterdir()) == []


@pytest.mark.parametrize("name", OURS)
def test_payloads_in_place_of_our_files_are_refused_and_never_run(
    child: Child, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    markers = tmp_path / "markers"
    markers.mkdir()
    for number, payload in enumerate(PAYLOADS.values()):
        (checkpoint / name).write_bytes(payload(markers / f"{number}"))
        readers = {
            "manifest.json": ["resume", "load_model", "texts", "sample"],
            "config.json": ["load_model", "from_pretrained", "sample"],  # a resume takes the shape from its settings
            "tokenizer.model": ["load_model", "sample"],  # and the tokenizer from its data
            "trainer.json": ["resume", "texts"],
            "model.safetensors": ["resume", "load_model", "from_pretrained", "sample"],
        }.get(name, ["resume"])
        if name != "manifest.json":
            vouch(checkpoint)
        child.refuses(checkpoint, *readers)
    assert list(markers.iterdir()) == []


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
