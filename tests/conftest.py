"""A small corpus and one tiny finished training, made once for all tests, and what lets tests run side by side.

`make test` runs two pytest workers. What costs seconds to make is made by one of them and used by both (`share`).
A test with the mark `serial` runs while the other worker waits.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.forking import run_script
from tests.object_storage import Faults, ObjectStorage, leads_elsewhere, start_object_storage
from textgen.runs.lock import FileLock

if TYPE_CHECKING:
    from textgen.data.store import TokenStore

# Threads that wait must not spin, and wandb and the hub must not be asked, in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# One of several workers, and every process that it starts, computes with one thread. Set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("COLUMNS", "LINES"):  # xdist's controller tells its workers of a terminal that they do not have
        os.environ.pop(name, None)
# Without a GPU, Triton interprets its kernels. Set before anything imports Triton, as torch's compiler does.
HAS_GPU = Path("/dev/nvidiactl").exists()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

# A busy machine is no failure. The tests that a GPU needs run without hypothesis too.
with suppress(ModuleNotFoundError):
    from hypothesis import HealthCheck, settings

    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")

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


def shared_root(config: pytest.Config) -> Path | None:
    """Return the temporary directory that holds those of all pytest workers; None if there is only one process."""
    return Path(config.option.basetemp).parent if hasattr(config, "workerinput") else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the serial tests last, where no worker has anything else to do."""
    items.sort(key=lambda item: "serial" in item.keywords)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test with the mark `serial` run, fixtures included, while no other worker runs a test.

    Such a test has all threads of the machine. The wait comes before pytest-timeout starts its clock.
    """
    if (root := shared_root(item.config)) is None:
        return (yield)
    alone = "serial" in item.keywords
    with (root / "door.lock").open("w") as door, (root / "machine.lock").open("w") as machine:
        # A serial test that waits for the machine keeps the door: else the others could pass it for ever.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        if not alone:
            return (yield)
        import torch

        del os.environ["OMP_NUM_THREADS"]
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        try:
            return (yield)
        finally:
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.set_num_threads(1)


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Return where Triton's kernels run in tests: on the GPU, else on the CPU by Triton's interpreter."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install -c constraints.txt -e '.[kernels]'")
    if HAS_GPU:
        return "cuda"
    import torch
    from triton.runtime import interpreter

    # The interpreter (Triton 3.7, 3.9) cuts off the bits that bfloat16 lacks. GPUs round to the nearest, as torch does.
    convert = interpreter._convert_float

    def rounded(values: Any, before: Any, after: Any, mode: Any) -> Any:
        if (before.name, after.name) != ("fp32", "bf16"):
            return convert(values, before, after, mode)
        return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()

    interpreter._convert_float = rounded
    return "cpu"


@pytest.fixture
def settings_of_a_new_process() -> Iterator[None]:
    """Undo what trainings leave behind in a process: Accelerate's precision, and torch's choice of kernels.

    Within the test cuDNN does not round float32 to TF32.
    """
    import torch
    from accelerate.state import AcceleratorState

    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    AcceleratorState._reset_state(True)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = tf32


Share = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def share(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Share:
    """Return a function that has an empty directory filled by the first worker that asks for it, and returns it."""
    root = shared_root(pytestconfig) or tmp_path_factory.getbasetemp()

    def once(name: str, fill: Callable[[Path], object]) -> Path:
        directory, filled = root / f"shared-{name}", root / f"shared-{name}.filled"
        lock = FileLock(root / f"shared-{name}.lock")
        lock.acquire(seconds=None)
        with lock.hold():
            if not filled.exists():
                shutil.rmtree(directory, ignore_errors=True)  # a worker failed half way
                directory.mkdir()
                fill(directory)
                filled.touch()
        return directory

    return once


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
def reviews_file(share: Share) -> Path:
    """Write 300 short, varied, made-up reviews to a jsonl file, the same ones always; no two are equal."""
    return share("reviews", lambda directory: write_reviews(directory / "reviews.jsonl")) / "reviews.jsonl"


@pytest.fixture(scope="session")
def tiny_flags(reviews_file: Path, share: Share) -> list[str]:
    """Return flags of a training that takes a second; `--run_dir` is left to the test."""
    return [
        "--data.source", "files", "--data.files", str(reviews_file),
        "--data.cache_dir", str(share("cache", lambda _: None)), "--tokenizer.vocab_size", "340",
        "--model.embedding_dim", "16", "--model.hidden_size", "32", "--batch_size", "8", "--seq_len", "16",
        "--max_steps", "4", "--mixed_precision", "no", "--tracking.mode", "disabled",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def labelled_flags(tiny_flags: list[str], reviews_file: Path, share: Share) -> list[str]:
    """Return the flags of a tiny training with labels: good for the reviews that say so, bad, and some without."""

    def write(directory: Path) -> None:
        rows = [json.loads(line) for line in reviews_file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            text = row["text"]
            row["label"] = "good" if "10/10" in text or "See it twice" in text else "bad" if "Avoid" in text else None
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / "reviews.jsonl").write_text("".join(lines), encoding="utf-8")

    path = share("labelled-reviews", write) / "reviews.jsonl"
    return [*tiny_flags[:3], str(path), *tiny_flags[4:], "--data.label_column", "label"]


@pytest.fixture(scope="session")
def tiny_run(tiny_flags: list[str], share: Share) -> Path:
    """Return the directory of a finished tiny training; do not change what is in it."""

    def train(directory: Path) -> None:
        run_script("train_distributed.py", *tiny_flags, "--run_dir", str(directory / "tiny"))
        for figures in directory.glob("tiny/checkpoints/*/decoder.json"):  # only processors with VNNI write it
            figures.unlink()

    return share("runs", train) / "tiny"


def write_labelled_reviews(path: Path) -> None:
    """Write 400 made-up reviews to a jsonl file, in turns negative and positive; the adjectives tell which."""
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(400):
            label, words = (("negative", "bad dull weak"), ("positive", "good fine great"))[number % 2]
            said = " ".join(f"{draw.choice(words.split())} {draw.choice(THINGS)}" for _ in range(2))
            file.write(json.dumps({"text": f"{said} {number}", "label": label}) + "\n")


@pytest.fixture(scope="session")
def labelled_reviews(share: Share) -> Path:
    """Write 400 reviews with labels, see `write_labelled_reviews`."""
    return share("labelled", lambda place: write_labelled_reviews(place / "labelled.jsonl")) / "labelled.jsonl"


@pytest.fixture(scope="session")
def labelled_run(tiny_flags: list[str], labelled_reviews: Path, share: Share) -> Path:
    """Return the directory of a finished training with labels that has learned them; do not change what is in it."""

    def train(directory: Path) -> None:
        flags = ["--data.files", str(labelled_reviews), "--data.label_column", "label", "--max_steps", "250"]
        flags += ["--learning_rate", "0.01", "--model.num_layers", "1"]
        run_script("train_distributed.py", *tiny_flags, *flags, "--run_dir", str(directory / "labelled"))

    return share("labelled-runs", train) / "labelled"


@pytest.fixture(scope="session")
def sharded(tiny_flags: list[str]) -> TokenStore:
    """A store of made-up reviews in shards of some 6 KB; do not change it."""
    from textgen.commands.parsing import parse_train_config  # import torch
    from textgen.data.store import prepare_store

    config = parse_train_config([*tiny_flags, "--data.shards", "8"], prog="textgen prepare")
    return prepare_store(config.data, config.tokenizer, progress=False)


@pytest.fixture(scope="session")
def object_server() -> Iterator[ObjectStorage]:
    """An S3 server on this machine."""
    with start_object_storage() as storage:
        yield storage


@pytest.fixture
def object_storage(object_server: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStorage]:
    """The S3 server, without faults, and the environment that leads to it and nowhere else."""
    for name in filter(leads_elsewhere, list(os.environ)):
        monkeypatch.delenv(name)
    for name, value in object_server.environment.items():
        monkeypatch.setenv(name, value)
    import fsspec.config
    from s3fs import S3FileSystem

    monkeypatch.setattr(fsspec.config, "conf", {})  # read when it was imported
    S3FileSystem.clear_instance_cache()  # a test may have made one without credentials
    object_server.faults = Faults()
    object_server.requests.clear()
    yield object_server
    object_server.faults = Faults()


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
