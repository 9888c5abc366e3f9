"""What the tests on a GPU rest on, as far as a CPU shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from textgen.cli import train_main


@pytest.mark.filterwarnings("default")  # of kernels that have no deterministic twin
@pytest.mark.usefixtures("settings_of_a_new_process")
@pytest.mark.parametrize("precision", ["no", "bf16", "auto"])
def test_one_process_trains_in_several_precisions(tiny_flags: list[str], tmp_path: Path, precision: str) -> None:
    """Accelerate refuses a second precision in a process, and torch keeps the choice of deterministic kernels."""
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.allow_tf32
    train_main([*tiny_flags, "--run_dir", str(tmp_path / "run"), "--mixed_precision", precision, "--max_steps", "1"])
    torch.use_deterministic_algorithms(True, warn_only=True)
