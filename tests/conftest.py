"""A small corpus and one tiny finished training, made once for all tests."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Threads that wait must not spin, and wandb and the hub must not be asked, in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

OPENINGS = (
    "I watched this",
    "My wife rented it",
    "Nobody warned me:",
    "We saw the premiere.",
    "Twice now I have seen this",
)
THINGS = """
plot acting music ending script dialogue camera hero villain director humour romance scenery pacing cast
""".split()  # noqa: SIM905
VERBS = ["was", "seemed", "felt", "became", "remained", "turned", "stayed", "looked"]
WORDS = """
wonderful dreadful boring charming clumsy honest thrilling hollow beautiful predictable silly moving weak
strong forgettable lovely terrible brilliant tedious surprising
""".split()  # noqa: SIM905
VERDICTS = ("Avoid it!", "See it twice.", "10/10.", "A waste of time...", 'They call it "art".', "Ça va, très café.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let no test skip where `TEXTGEN_NO_SKIPS` is set, as in CI: what it needs is to be installed there.

    A GPU, and what a processor can do, cannot be.
    """
    report = yield
    hardware = "gpu" in item.keywords or "this processor" in str(report.longrepr)
    if report.skipped and not hardware and os.environ.get("TEXTGEN_NO_SKIPS"):
        report.outcome = "failed"
    return report


def write_reviews(path: Path) -> None:
    """Write 300 short, varied, made-up reviews to a jsonl file, the same ones always; no two are equal."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(300):
            said = " ".join(
                f"The {draw.choice(THINGS)} {draw.choice(VERBS)} {draw.choice(WORDS)}"
                f"{draw.choice(['.', ', really.', '!<br /><br />', ' and ' + draw.choice(WORDS) + '.'])}"
                for _ in range(draw.randint(2, 6))
            )
            text = f"{draw.choice(OPENINGS)} {said} {draw.choice(VERDICTS)} (No. {number})"
            file.write(json.dumps({"id": number, "text": text}, ensure_ascii=False) + "\n")


@pytest.fixture(scope="session")
def reviews_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of `write_reviews`."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    write_reviews(path)
    return path


@pytest.fixture(scope="session")
def tiny_flags(reviews_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return flags of a training that takes a second; `--run_dir` is left to the test."""
    return [
        "--data.source", "files", "--data.files", str(reviews_file),
        "--data.cache_dir", str(tmp_path_factory.mktemp("cache")), "--tokenizer.vocab_size", "340",
        "--model.embedding_dim", "16", "--model.hidden_size", "32", "--batch_size", "8", "--seq_len", "16",
        "--max_steps", "4", "--mixed_precision", "no", "--tracking.mode", "disabled",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished tiny training; do not change what is in it."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    subprocess.run(
        [sys.executable, str(ROOT / "train_distributed.py"), *tiny_flags, "--run_dir", str(run_dir)],
        check=True, timeout=300,
    )  # fmt: skip
    return run_dir


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Yield a function that mounts an empty file system of a size, and unmount it in the end."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(size: str) -> Path:
        argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        tried = subprocess.run(argv, capture_output=True, text=True) if shutil.which("mount") else None
        if tried is None or tried.returncode != 0:
            pytest.skip(f"a small file system cannot be mounted here, which takes root: {tried and tried.stderr}")
        mounted.append(place)
        return place

    yield mount
    for one in mounted:
        subprocess.run(["umount", str(one)], check=True)
