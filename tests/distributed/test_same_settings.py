"""Processes that were told different things do not train."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("flag", "values"), [("--seed", ("1", "2")), ("--mixed_precision", ("no", "bf16"))])
def test_other_settings_on_one_process_are_refused(
    tiny_flags: list[str], tmp_path: Path, flag: str, values: tuple[str, str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run_dir = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train_distributed.py"), *tiny_flags, "--run_dir", str(run_dir), flag]
    processes = [
        subprocess.Popen(
            [*command, values[rank]], stderr=subprocess.PIPE, text=True,
            env=os.environ | {
                "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert "error: what flags and config file say is not the same on all 2 processes\n" in errors[0]
    assert not run_dir.exists()
