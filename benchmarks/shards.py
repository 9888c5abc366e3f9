"""A store in shards at scale: `python -m benchmarks.shards`, into benchmarks/results/shards.json.

- `training`: memory of a training on 2e10 tokens in shards, and seconds from its start to its first step, beside a
  store of 2e7 tokens. The tokens are holes in sparse files; offsets are written for real.
- `order`: memory and seconds of the order of 1e8 documents, in one shard of 64 and without shards.
- `preparing`: seconds of a text, without shards, in shards by one process and by two, and of its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import load, save
from benchmarks.prepare import VOCAB_SIZE, reviews, write_large
from textgen.config import DataConfig
from textgen.data.corpus import clean_corpus, open_corpus
from textgen.data.shards import ORDER, Shard
from textgen.data.split import Split
from textgen.data.store import SHARDS_FORMAT
from textgen.runs.tensors import build_header
from textgen.tokenizer import MODEL_NAME, Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
NUM_SHARDS = 64
STEPS = 30


def make_store(directory: Path, num_tokens: int, tokenizer: Tokenizer) -> int:
    """Write a store in shards of documents of 200 to 399 tokens, all of them 0; return their number."""
    directory.mkdir(parents=True)
    draw, records = np.random.default_rng(0), []
    of_shard = num_tokens // NUM_SHARDS
    for index in range(NUM_SHARDS):
        ends = np.cumsum(draw.integers(200, 400, size=of_shard // 200))
        ends = ends[: int(np.searchsorted(ends, of_shard)) + 1]
        ends[-1] = of_shard
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        header, names = build_header(
            {"tokens": ("U16", (of_shard,)), "offsets": ("I64", (len(offsets),)), "bytes": ("U32", (len(ends),))}
        )
        assert names == ["offsets", "bytes", "tokens"]
        path = directory / f"train-{index:05}.safetensors"
        with path.open("wb") as file:
            file.write(header)
            file.write(offsets.data)
            file.write(np.full(len(ends), 1200, dtype=np.uint32).data)
            file.truncate(file.tell() + 2 * of_shard)
        size = path.stat().st_size
        records.append(Shard(path.name, size, "0" * 64, len(ends), of_shard, 1200 * len(ends)))
    tokenizer.save(directory / MODEL_NAME)
    np.ones(tokenizer.vocab_size, dtype=np.int64).tofile(directory / "unigram.int64")
    sizes = {name: sum(getattr(record, name) for record in records) for name in ("documents", "tokens", "bytes")}
    record = {
        "format": SHARDS_FORMAT, "key": str(num_tokens), "source": "holes", "normalization": "none", "counts": {},
        "digests": {"train": str(num_tokens)}, "tokenizer": tokenizer.sha256, "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16", "splits": {"train": sizes}, "order": ORDER, "shards": [asdict(record) for record in records],
    }  # fmt: skip
    (directory / "store.json").write_text(json.dumps(record))
    return int(sizes["documents"])


def train(store: Path, run_dir: Path) -> dict[str, float]:
    """Train a small model for some steps; return seconds to the first row of metrics, and the highest RssAnon."""
    command = [
        sys.executable, str(ROOT / "train_distributed.py"), "--data.store", str(store), "--run_dir", str(run_dir),
        "--model.embedding_dim", "8", "--model.hidden_size", "16", "--batch_size", "128", "--seq_len", "64",
        "--max_steps", str(STEPS), "--log_every", "1", "--mixed_precision", "no", "--tracking.mode", "disabled",
        "--sample_prompts", "[]",
    ]  # fmt: skip
    metrics, highest, first, used = run_dir / "metrics.jsonl", 0.0, 0.0, 0.0
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if not first and metrics.exists() and '"step"' in metrics.read_text():
                first = time.perf_counter() - started
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # of user and system
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            found = re.findall(r"RssAnon:\s+(\d+) kB", status)
            highest = max([highest, *(int(size) / 1000 for size in found)])
            time.sleep(0.01)
    assert process.returncode == 0
    return {
        "seconds_to_first_step": round(first, 2),
        "processor_seconds_to_first_step": round(used, 2),
        "highest_anonymous_memory_mb": round(highest),
    }


def training(folder: Path) -> dict[str, Any]:
    """Return the figures of a training on a small store and on a large one."""
    tokenizer = Tokenizer(train_tokenizer(reviews(200), vocab_size=300, model_type="char"))
    figures: dict[str, Any] = {}
    for name, num_tokens in (("small", 20_000_000), ("large", 20_000_000_000)):
        documents = make_store(folder / name, num_tokens, tokenizer)
        figures[name] = {"tokens": num_tokens, "documents": documents, "shards": NUM_SHARDS}
        figures[name] |= train(folder / name, folder / f"run-{name}")
    return figures


ORDER_CODE = """
import resource, sys, time
from benchmarks.shards import split_of
from textgen.data.lanes import Epoch
split = split_of(int(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
epoch = Epoch(split, batch_size=128, seq_len=64, seed=0, epoch=0)
seconds = time.perf_counter() - started
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000, epoch._order.nbytes / 1e6)
"""


def split_of(documents: int) -> Split:
    """Return a split of documents of 300 tokens, which are not there."""
    offsets = np.arange(documents + 1, dtype=np.int64) * 300
    return Split(np.empty(0, dtype=np.uint16), offsets, np.broadcast_to(np.uint32(1200), documents))


def order() -> dict[str, Any]:
    """Return seconds and memory of an order and its lengths: peak above the split, and what is kept."""
    figures = {}
    for name, documents in (("one of 64 shards", 10**8 // NUM_SHARDS), ("without shards", 10**8)):
        argv = [sys.executable, "-c", ORDER_CODE, str(documents)]
        printed = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        seconds, peak, kept = map(float, printed)
        figures[name] = {
            "documents": documents, "seconds": round(seconds, 2), "peak_mb": round(peak), "kept_mb": round(kept, 1),
        }  # fmt: skip
    return figures


PREPARE_CODE = """
import sys
from textgen.config import DataConfig, TokenizerConfig
from textgen.data.store import prepare_store
path, cache, model, shards = sys.argv[1:]
data = DataConfig(source='files', files=(path,), cache_dir=cache, shards=int(shards) or None)
prepare_store(data, TokenizerConfig(path=model), progress=False)
"""


def preparing(folder: Path, megabytes: int) -> dict[str, Any]:
    """Return the seconds of preparing a text whose tokenizer is given, the start of the processes included."""
    path, model = folder / "large.jsonl", folder / MODEL_NAME
    documents = write_large(path, megabytes)
    Tokenizer(train_tokenizer(reviews(5000), vocab_size=VOCAB_SIZE)).save(model)

    def prepare(cache: str, shards: int, processes: int) -> dict[str, float]:
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        argv = [sys.executable, "-c", PREPARE_CODE, str(path), str(folder / cache), str(model), str(shards)]
        started_processes = [subprocess.Popen(argv, cwd=ROOT) for _ in range(processes)]
        assert [process.wait() for process in started_processes] == [0] * processes
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"seconds": round(time.perf_counter() - started, 1), "processor_seconds": round(used, 1)}

    data = DataConfig(source="files", files=(str(path),))
    started = time.perf_counter()
    clean = clean_corpus(open_corpus(data), data)
    decided = time.perf_counter()
    deque(clean.documents("train"), maxlen=0)
    read = time.perf_counter()
    return {
        "megabytes": round(path.stat().st_size / 1e6), "documents": documents,
        "deciding which documents are kept": {"seconds": round(decided - started, 1)},
        "reading the train split": {"seconds": round(read - decided, 1)},
        "without shards": prepare("whole", 0, 1),
        f"{NUM_SHARDS} shards, 1 process": prepare("one", NUM_SHARDS, 1),
        f"{NUM_SHARDS} shards, 2 processes": prepare("two", NUM_SHARDS, 2),
    }  # fmt: skip


def main() -> None:
    """Measure what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("training", "order", "preparing")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure (default: all)")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the text to prepare (default: 100)")
    parser.add_argument("--note", default=None, help="kept with the figures, as `beside other work`")
    args = parser.parse_args()
    figures = load("shards")
    note = {"note": args.note} if args.note else {}
    with tempfile.TemporaryDirectory() as folder:
        if "training" in args.parts:
            figures["training"] = training(Path(folder)) | note
        if "order" in args.parts:
            figures["order"] = order() | note
        if "preparing" in args.parts:
            figures["preparing"] = preparing(Path(folder), args.megabytes) | note
    print(json.dumps(figures, indent=2))
    save("shards", figures)


if __name__ == "__main__":
    main()
