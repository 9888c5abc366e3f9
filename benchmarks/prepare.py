"""From text to the first step: `python -m benchmarks.prepare`.

Megabytes of text a second that become tokens, beside `datasets.map` over `encode` one document at a time; seconds from
the start of a process to its first step, with a store that is there; and the memory of preparing a large text
(`--megabytes`), made of the packaged reviews over and over, each a little changed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, save
from textgen.config import DataConfig
from textgen.corpus import open_corpus
from textgen.data import ENCODE_BATCH, encode_documents
from textgen.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 8192


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
        for start in range(0, len(texts), ENCODE_BATCH):
            encode_documents(tokenizer, texts[start : start + ENCODE_BATCH])

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


def large_text(megabytes: int, folder: Path) -> dict[str, Any]:
    """Return the seconds of preparing a text of this size in a process of its own, and its memory by the way."""
    path, texts = folder / "large.jsonl", reviews(25_000)
    with path.open("w") as file:
        for number in count():
            text = texts[number % len(texts)]
            file.write(json.dumps({"text": f"{text} ({number})"}, ensure_ascii=False) + "\n")
            if number % 1000 == 0 and file.tell() > megabytes * 1e6:
                break
    code = (
        "from textgen.config import DataConfig, TokenizerConfig\nfrom textgen.data import prepare_store\n"
        f"data = DataConfig(source='files', files=({str(path)!r},), cache_dir={str(folder / 'cache')!r})\n"
        f"prepare_store(data, TokenizerConfig(vocab_size={VOCAB_SIZE}), progress=False)\n"
    )
    curve: list[tuple[float, int]] = []
    started = time.perf_counter()
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
    tenths = [max(mb for at, mb in curve if int(10 * at / seconds) == i) for i in range(10) if curve]
    return {
        "megabytes": round(size), "seconds": round(seconds, 1), "megabytes_per_second": round(size / seconds, 1),
        "documents": number + 1, "peak_memory_mb": max(mb for _, mb in curve), "memory_mb_by_tenth_of_the_time": tenths,
    }  # fmt: skip


def main() -> None:
    """Measure what the flags say and put it into benchmarks/results/prepare.json beside what stands there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("tokenizing", "first_step", "large_text")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure (default: all)")
    parser.add_argument("--documents", type=int, default=5000, help="reviews to tokenize (default: 5000)")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the large text (default: 100)")
    parser.add_argument("--folder", default=None, help="where it is written for a while (default: a temporary one)")
    args = parser.parse_args()
    path = RESULTS / "prepare.json"
    figures: dict[str, Any] = json.loads(path.read_text())["figures"] if path.exists() else {}
    if "tokenizing" in args.parts:
        texts = reviews(args.documents)
        figures["megabytes_per_second"] = tokenizing(texts, train_tokenizer(texts, vocab_size=VOCAB_SIZE))
    if "first_step" in args.parts:
        figures["seconds"] = first_step()
    if "large_text" in args.parts:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            figures["large"] = large_text(args.megabytes, Path(folder))
    print(json.dumps(figures, indent=2))
    save("prepare", figures)


if __name__ == "__main__":
    main()
