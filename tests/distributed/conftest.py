"""Real processes through `train_distributed.py`, on the real reviews."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

Launch = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def launch_training(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Return a function that trains on N gloo processes and returns the rows of metrics.jsonl.

    One token store of the packaged reviews serves all: 128 lanes, the real tokenizer, two layers, LayerNorm, tying.
    """
    home = tmp_path_factory.mktemp("distributed")

    def launch(
        name: str, *flags: str, processes: int = 1, expect: int = 0, journal: Path | None = None
    ) -> list[dict[str, Any]]:
        run_dir = home / name
        script = "train_distributed.py" if journal is None else "tests/faults/journaled_training.py"
        command = [sys.executable, script]
        if processes > 1:
            options = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
            command = [sys.executable, "-m", "accelerate.commands.launch", *options, script]
        settings = [
            "--run_dir", str(run_dir), "--data.source", "package", "--data.cache_dir", str(home / "cache"),
            "--data.validation_fraction", "0.002", "--seq_len", "16", "--log_every", "1", "--mixed_precision", "no",
            "--tokenizer.vocab_size", "4000", "--model.embedding_dim", "64", "--model.hidden_size", "96",
            "--model.num_layers", "2", "--model.layer_norm", "--model.residual", "--tracking.mode", "disabled",
            "--sample_tokens", "4",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        if journal is not None:
            launches = len({path.name.split("-")[0] for path in journal.iterdir()})
            environment |= {"TEXTGEN_JOURNAL": str(journal), "TEXTGEN_LAUNCH": str(launches), "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [*command, *settings, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == expect, result.stderr
        first_line = f"{processes} process{'es' if processes > 1 else ''} on 1 machine"
        assert first_line in result.stderr, result.stderr
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    return launch
