"""No pickle is written or read anywhere: not in the source, not in the files of a run."""

from __future__ import annotations

import ast
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from textgen.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SOURCES = [
    *sorted(path for folder in ("textgen", "tokenizer", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
    ROOT / "train_distributed.py",
]

# Modules that read or write pickles, or code.
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "pickletools", "cloudpickle", "dill", "marshal", "shelve", "joblib",
}  # fmt: skip
# By full name; `numpy.load` only where pickles are allowed, or might be.
FORBIDDEN_CALLS = {
    "torch.save", "torch.load", "torch.serialization", "torch.jit.load", "torch.hub.load", "torch.package",
    "torch.distributed.checkpoint", "numpy.save", "numpy.savez", "numpy.savez_compressed", "pandas.read_pickle",
    "eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile", "__import__", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip
# Of whatever object: Accelerate's own state files and torch's collectives of objects are pickles.
FORBIDDEN_NAMES = {
    "save_state", "load_state", "register_for_checkpointing", "gather_object", "all_gather_object",
    "broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list", "to_pickle", "read_pickle",
    "read_object_array", "unsafe_load",
}  # fmt: skip


def full_names(tree: ast.AST) -> dict[str, str]:
    """Return what each imported name stands for: `import torch as t` gives t: torch."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module or ''}.{alias.name}"
    return names


def flatten(node: ast.AST, names: dict[str, str]) -> str | None:
    """Return the full dotted name of an expression such as `t.load`, aliases resolved; None for another one."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = flatten(node.value, names)
        return f"{owner or '?'}.{node.attr}"
    return None


def findings(source: str) -> Iterator[str]:
    """Yield `line: name` of everything in a module that reads or writes pickles, or runs text as code."""
    tree = ast.parse(source)
    names = full_names(tree)
    # `f = t.load` is as good as a call of it
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = flatten(node.value, names)
            if value and "." in value and value.split(".")[0] in {full.split(".")[0] for full in names.values()}:
                names.setdefault(node.targets[0].id, value)
    for node in ast.walk(tree):
        seen: list[str] = []
        if isinstance(node, ast.Import):
            seen = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            seen = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Name | ast.Attribute):
            seen = [name] if (name := flatten(node, names)) else []
        elif isinstance(node, ast.Call):
            called = flatten(node.func, names) or ""
            texts = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            if called.split(".")[-1] == "getattr":
                seen = [f"{flatten(node.args[0], names)}.{text}" for text in texts]
            elif called.split(".")[-1] in {"import_module", "attrgetter", "methodcaller"}:
                seen = texts
            switches = {word.arg: word.value for word in node.keywords}
            allowed = switches.get("allow_pickle")
            if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
                yield f"{node.lineno}: allow_pickle"
            if "trust_remote_code" in switches:
                yield f"{node.lineno}: trust_remote_code"
            safe = switches.get("safe_serialization")
            if isinstance(safe, ast.Constant) and safe.value is False:
                yield f"{node.lineno}: safe_serialization=False"
        for name in seen:
            parts = name.split(".")
            prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
            if (
                parts[-1] == "*"
                or FORBIDDEN_MODULES & set(parts)
                or FORBIDDEN_CALLS & prefixes
                or FORBIDDEN_NAMES & set(parts)
            ):
                yield f"{node.lineno}: {name}"


def test_nothing_in_the_source_reads_or_writes_a_pickle_or_runs_text() -> None:
    assert len(SOURCES) > 20
    found = [f"{path.relative_to(ROOT)}:{finding}" for path in SOURCES for finding in findings(path.read_text())]
    assert found == []


WAYS = [
    "import pickle",
    "import pickle as p",
    "from pickle import loads",
    "def f():\n    import pickle\n",
    "import torch\ntorch.load(x)",
    "import torch\ntorch.save(x, y)",
    "import torch as t\nt.load(x)",
    "import torch as t\nf = t.load\nf(x)",
    "from torch import load",
    "from torch import load as read\nread(x)",
    "from torch import save as s",
    "import torch.serialization",
    "from torch import serialization",
    "import torch\ntorch.serialization.load(x)",
    "import torch\ntorch.load(x, weights_only=True)",
    "getattr(accelerator, 'save_state')(x)",
    "import torch as t\ngetattr(t, 'load')(x)",
    "from torch import *",
    "prepare(x).load_state(d)",
    "import importlib\nimportlib.import_module('pickle')",
    "__import__('pickle')",
    "accelerator.save_state(d)",
    "self.training.accelerator.load_state(d)",
    "accelerator.register_for_checkpointing(x)",
    "from accelerate.utils import gather_object",
    "from accelerate.utils import gather_object as g\ng(x)",
    "import accelerate\naccelerate.utils.gather_object(x)",
    "import torch.distributed as dist\ndist.broadcast_object_list(x)",
    "from torch.distributed import all_gather_object",
    "import torch\ntorch.distributed.scatter_object_list(a, b)",
    "import torch.distributed.checkpoint as dcp\ndcp.load(x)",
    "from torch.distributed.checkpoint import load",
    "import marshal",
    "import shelve",
    "import joblib",
    "from joblib import load",
    "import dill",
    "import numpy as np\nnp.load(x, allow_pickle=True)",
    "import numpy as np\nnp.load(x, allow_pickle=flag)",
    "import numpy as np\nnp.save(x, y)",
    "import pandas as pd\npd.read_pickle(x)",
    "frame.to_pickle(x)",
    "eval('1')",
    "exec(code)",
    "f = eval",
    "import builtins\nbuiltins.exec(code)",
    "import yaml\nyaml.load(x)",
    "import yaml\nyaml.unsafe_load(x)",
    "load_dataset(x, trust_remote_code=True)",
    "model.save_pretrained(x, safe_serialization=False)",
]

NO_WAYS = [
    "model.eval()\nmodel.to(device).eval()\nf(x).compile()",
    "import re\nre.compile('a')",
    "import json\njson.load(file)\njson.loads(x)",
    "from safetensors.torch import load\nload(x)",
    "import yaml\nyaml.safe_load(x)",
    "import numpy as np\nnp.load(x, allow_pickle=False)\nnp.fromfile(x)",
    "tokenizer.save(path)\nself.save(x)",
    "optimizer.load_state_dict(x)\nmodel.state_dict()",
    "'pickle in a text'",
    "# torch.load",
]


def test_the_search_of_the_source_finds_each_way_to_a_pickle() -> None:
    assert [snippet for snippet in WAYS if not list(findings(snippet))] == []


def test_the_search_of_the_source_passes_over_what_is_no_pickle() -> None:
    assert {snippet: found for snippet in NO_WAYS if (found := list(findings(snippet)))} == {}


# --- the files of a run ----------------------------------------------------------------------------------------------


def is_pickle_or_zip(data: bytes) -> bool:
    """Tell whether data is a pickle that loads, or holds an archive such as torch.save makes."""
    if b"data.pkl" in data or zipfile.is_zipfile(io.BytesIO(data)):
        return True
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if data[:6] == b"\x93NUMPY" and b"|O" in data[:128]:
        return True
    try:  # protocols 0 and 1 have no mark; a program of opcodes that reaches its end is a pickle
        ended = [opcode.name for opcode, _, _ in _opcodes(data)]
    except (ValueError, IndexError, UnicodeDecodeError, struct.error, EOFError):
        return False
    return ended[-1] == "STOP"


def _opcodes(data: bytes) -> Iterator[tuple[object, object, object]]:
    import pickletools

    return pickletools.genops(data)


def assert_known_kind(path: Path) -> None:
    """Assert that a file is what its name says."""
    match path.suffix, path.name:
        case ".json", _:
            assert isinstance(json.loads(path.read_text()), dict)
        case ".jsonl", _:
            assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
        case ".yaml", _:
            assert isinstance(yaml.safe_load(path.read_text()), dict)
        case ".safetensors", _:
            assert load_file(path)
        case ".model", _:
            Tokenizer.from_file(path)
        case ".png", _:
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        case ".md" | ".html", _:
            assert all(line.isprintable() for line in path.read_text(encoding="utf-8").splitlines())
        case _, ".lock":
            assert path.read_bytes() == b""
        case _:
            raise AssertionError(f"{path.name} is of no known kind")


def test_every_file_of_a_finished_run_is_of_a_known_kind(tiny_run: Path) -> None:
    files = [path for path in tiny_run.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".json", ".jsonl", ".yaml", ".safetensors", ".model", ".png", ".md"}
    for path in files:
        assert_known_kind(path)


def test_no_file_of_a_finished_run_is_a_pickle_or_an_archive(tiny_run: Path) -> None:
    files = [path for path in tiny_run.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path.name for path in files if is_pickle_or_zip(path.read_bytes())] == []


def test_no_file_of_a_finished_run_hides_a_pickle_further_in(tiny_run: Path) -> None:
    # four bytes of a weight may look like a pickle's begin: only one that runs to its STOP and builds something counts
    for path in (path for path in tiny_run.rglob("*") if path.is_file()):
        data = path.read_bytes()
        assert b"PK\x03\x04" not in data, path
        start = -1
        while (start := data.find(b"\x80", start + 1)) >= 0:
            if data[start + 1 : start + 2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
                try:
                    opcodes = [opcode.name for opcode, _, _ in _opcodes(data[start:])]
                except (ValueError, IndexError, UnicodeDecodeError, struct.error, EOFError):
                    continue
                assert len(opcodes) <= 3, f"{path} at byte {start}: {opcodes[:10]}"


def test_the_search_of_files_finds_a_pickle_of_every_protocol() -> None:
    pickles = [pickle.dumps({"a": [1, 2, "b"]}, protocol=protocol) for protocol in range(6)]
    assert [is_pickle_or_zip(data) for data in pickles] == [True] * 6


def test_the_search_of_files_finds_an_archive_of_torch_and_a_plain_one(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("x", "y")
    assert all(is_pickle_or_zip(path.read_bytes()) for path in tmp_path.iterdir())
