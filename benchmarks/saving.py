"""What a checkpoint costs a training: `python -m benchmarks.saving`.

Trains a model of 40 million parameters with Adam for a few steps on the packaged reviews, saving every few of them, and
reads the pauses that the training itself reports.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.report import write_result

ROOT = Path(__file__).parents[1]
SAVES, STEPS_BETWEEN = 10, 4
FLAGS = [
    "--data.source", "package", "--model.embedding_dim", "1024", "--model.hidden_size", "1280", "--model.num_layers",
    "3", "--tokenizer.vocab_size", "4000", "--batch_size", "32", "--seq_len", "32", "--evaluate_every", "1000",
    "--evaluate_documents", "10", "--sample_tokens", "1", "--tracking.mode", "disabled", "--mixed_precision", "no",
    "--save_every", str(STEPS_BETWEEN), "--max_steps", str(SAVES * STEPS_BETWEEN + 1),
]  # fmt: skip


def main() -> None:
    """Train, read the pauses from the log, print and keep them."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        result = subprocess.run(
            [sys.executable, "train_distributed.py", *FLAGS, "--run_dir", str(run_dir)],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        newest = max((run_dir / "checkpoints").iterdir())
        size = sum(path.stat().st_size for path in newest.iterdir())
    lines = re.findall(r"checkpoint written in ([\d.]+) s, training paused (\d+) ms", result.stderr)
    written, pauses = [float(a) for a, _ in lines], [int(b) for _, b in lines]
    assert len(lines) == SAVES + 1, result.stderr
    parameters = re.search(r"([\d,]+) parameters", result.stderr)
    assert parameters is not None
    columns = ("parameters", "bytes", "saves", "pause, median", "pause, largest", "written in, median")
    row = (
        parameters[1], f"{size:,}", len(lines), f"{statistics.median(pauses):.0f} ms", f"{max(pauses)} ms",
        f"{statistics.median(written):.2f} s",
    )  # fmt: skip
    write_result("saving", columns, [row], seconds=time.monotonic() - started)


if __name__ == "__main__":
    main()
