"""From text to the first step: `python -m benchmarks.prepare`.

Megabytes of text a second that become tokens, beside `datasets.map` over `encode` one document at a time; seconds from
the start of a process to its first step, with a store that is there; and the memory of preparing a large text
(`--megabytes`), made of the packaged reviews over and over, a few words of each swapped for others of theirs.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import load, save
from textgen.config import DataConfig
from textgen.data.corpus import open_corpus
from textgen.data.store import encode_batches
from textgen.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 8192
NUM_SWAPPED = 5  # words of a review of 230: no two are the same, and the words are no others than in the reviews


def reviews(number: int) -> list[str]:
    """Return the first so many packaged reviews."""
    documents = open_corpus(DataConfig(source="package")).splits["train"]()
    return [text for text, _ in zip(documents, range(number), strict=False)]


def tokenizing(texts: Sequence[str], model: bytes, rounds: int = 3) -> dict[str, float]:
    """Return megabytes a second of each way, the median of interleaved rounds."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer = Tokenizer(model)
    size = sum(len(text.encode()) for text in texts) / 1e6
    rows = datasets.Dataset.from_dict({"text": list(texts)})

    def ours() -> None:
        for _ in encode_batches(tokenizer, texts):
            pass

    def one_by_one() -> None:
        rows.map(
            lambda row: {"ids": tokenizer.encode(row["text"])},
            remove_columns="text", load_from_cache_file=False, keep_in_memory=True,
        )  # fmt: skip

    ways = {"textgen": ours, "datasets.map": one_by_one}
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seen[name].append(size / (time.perf_counter() - started))
    return {name: round(statistics.median(rates), 1) for name, rates in seen.items()}


def first_step(rounds: int = 3) -> dict[str, float]:
    """Return seconds from the start of a training to its first row of metrics, and those of the step itself."""
    flags = ["--max_steps", "2", "--log_every", "1", "--tracking.mode", "disabled", "--resume", "never"]
    seen: dict[str, list[float]] = {"to the end of the first step": [], "of these, a step": []}
    for round_ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as run_dir:
            rows = Path(run_dir) / "run" / "metrics.jsonl"
            argv = [sys.executable, "train_distributed.py", "--config", "launch/presets/quick.yaml", *flags]
            started = time.perf_counter()
            with subprocess.Popen(
                [*argv, "--max_minutes", "null", "--run_dir", str(rows.parent)], cwd=ROOT, stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            ) as process:  # fmt: skip
                times: list[float] = []
                while len(times) < 2 and process.poll() is None:
                    lines = rows.read_text().count("train/loss") if rows.exists() else 0
                    times += [time.perf_counter()] * (lines - len(times))
                    time.sleep(0.002)
            if round_ > 0:  # the first one may have to make the store
                seen["to the end of the first step"].append(times[0] - started)
                seen["of these, a step"].append(times[1] - times[0])
    return {name: round(statistics.median(seconds), 3) for name, seconds in seen.items()}


def endless_reviews(seed: int = 0) -> Iterator[str]:
    """Yield the packaged reviews over and over; after the first time, words of each are swapped for others' words."""
    documents = [text.split(" ") for text in reviews(25_000)]
    yield from (" ".join(words) for words in documents)
    drawn = [word for words in documents for word in words]  # so a word comes as often as it does in the reviews
    draw = random.Random(seed)
    while True:
        for document in documents:
            words = document.copy()
            for _ in range(NUM_SWAPPED):
                words[int(draw.random() * len(words))] = drawn[int(draw.random() * len(drawn))]
            yield " ".join(words)


def write_large(path: Path, megabytes: int) -> int:
    """Write so much text as jsonl; return the number of documents."""
    with path.open("w") as file:
        for number, text in enumerate(endless_reviews(), start=1):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if number % 1000 == 0 and file.tell() > megabytes * 1e6:
                return number
    raise AssertionError("the reviews ended")


def large_text(megabytes: int, folder: Path) -> dict[str, Any]:
    """Return the seconds of preparing a text of this size in a process of its own, and its memory by the way."""
    path = folder / "large.jsonl"
    number = write_large(path, megabytes)
    code = (
        "import logging\n"
        "from textgen.config import DataConfig, TokenizerConfig\nfrom textgen.data.store import prepare_store\n"
        "logging.basicConfig(level=logging.INFO, format='%(relativeCreated)d ms: %(message)s')\n"
        f"data = DataConfig(source='files', files=({str(path)!r},), cache_dir={str(folder / 'cache')!r})\n"
        f"prepare_store(data, TokenizerConfig(vocab_size={VOCAB_SIZE}), progress=False)\n"
    )
    curve: list[tuple[float, int]] = []
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            anonymous = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
            curve += [(time.perf_counter() - started, int(size) // 1024) for size in anonymous]
            time.sleep(0.2)
    assert process.returncode == 0
    seconds, size = time.perf_counter() - started, path.stat().st_size / 1e6
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    tenths = [max(mb for at, mb in curve if int(10 * at / seconds) == i) for i in range(10) if curve]
    return {
        "megabytes": round(size), "seconds": round(seconds, 1), "megabytes_per_second": round(size / seconds, 1),
        "processor_seconds": round(processor_seconds, 1), "documents": number,
        "peak_memory_mb": max(mb for _, mb in curve), "memory_mb_by_tenth_of_the_time": tenths,
    }  # fmt: skip


def main() -> None:
    """Measure what the flags say; into benchmarks/results/prepare.json, the large text into prepare_large.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("tokenizing", "first_step", "large_text")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure (default: all)")
    parser.add_argument("--documents", type=int, default=5000, help="reviews to tokenize (default: 5000)")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the large text (default: 100)")
    parser.add_argument("--folder", default=None, help="where it is written for a while (default: a temporary one)")
    parser.add_argument("--note", default=None, help="kept with its figures, as `beside other work`")
    args = parser.parse_args()
    figures = load("prepare")
    if "tokenizing" in args.parts:
        texts = reviews(args.documents)
        figures["megabytes_per_second"] = tokenizing(texts, train_tokenizer(texts, vocab_size=VOCAB_SIZE))
    if "first_step" in args.parts:
        figures["seconds"] = first_step()
    if {"tokenizing", "first_step"} & set(args.parts):
        print(json.dumps(figures, indent=2))
        save("prepare", figures)
    if "large_text" in args.parts:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            large = large_text(args.megabytes, Path(folder))
        large |= {"note": args.note} if args.note else {}
        print(json.dumps(large, indent=2))
        save("prepare_large", large)


if __name__ == "__main__":
    main()
