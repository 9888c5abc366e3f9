"""Losses of several layouts side by side: `python -m benchmarks.same_losses` prints the table of exactness.md."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import save
from textgen.runs.metrics_file import read_metrics

LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)]  # processes x micro-batches
SHOWN = (1, 2, 5, 10, 20, 30, 40, 50)


def losses_of(home: Path, processes: int, micro_batches: int, precision: str) -> dict[int, float]:
    """Train 50 steps through `train_distributed.py` and return the loss of each."""
    run_dir = home / f"{precision}-{processes}x{micro_batches}"
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    flags = [
        "--run_dir", str(run_dir), "--max_steps", "50", "--log_every", "1", "--mixed_precision", precision,
        "--gradient_accumulation_steps", str(micro_batches), "--data.cache_dir", str(home / "cache"),
        "--data.source", "package", "--data.validation_fraction", "0.002", "--model.layer_norm",
        "--model.dropout", "0.1",
        "--model.hidden_size", "256", "--model.embedding_dim", "128", "--seq_len", "32", "--tracking.mode", "disabled",
    ]  # fmt: skip
    command = [sys.executable, *(launcher if processes > 1 else []), "train_distributed.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return {row["step"]: row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row}


def main() -> None:
    """Print one Markdown table per precision and the largest relative differences."""
    figures = {}
    with tempfile.TemporaryDirectory() as home:
        for precision in ("no", "bf16"):
            columns = {layout: losses_of(Path(home), *layout, precision) for layout in LAYOUTS}
            print(f"\nmixed_precision {precision}\n\n| step | " + " | ".join(f"{p}x{m}" for p, m in LAYOUTS) + " |")
            print("|---" * (len(LAYOUTS) + 1) + "|")
            for step in SHOWN:
                print(f"| {step} | " + " | ".join(f"{columns[layout][step]:.7f}" for layout in LAYOUTS) + " |")
            alone = columns[1, 1]
            differences = {
                f"{p}x{m}": max(abs(columns[p, m][step] / alone[step] - 1) for step in alone) for p, m in LAYOUTS
            }
            print("| largest difference | " + " | ".join(f"{d:.1e}" for d in differences.values()) + " |")
            figures[precision] = differences
    save("same_losses", figures)


if __name__ == "__main__":
    main()
