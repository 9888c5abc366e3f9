"""Processes that were told different things do not train."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forking import server


@pytest.mark.parametrize(("flag", "values"), [("--seed", ("1", "2")), ("--mixed_precision", ("no", "bf16"))])
def test_other_settings_on_one_process_are_refused(
    tiny_flags: list[str], tmp_path: Path, flag: str, values: tuple[str, str]
) -> None:
    run_dir = tmp_path / "run"
    command = ["train_distributed.py", *tiny_flags, "--run_dir", str(run_dir), flag]
    ended = server().run(command, last=values, processes=2)
    assert [one.returncode for one in ended] == [2, 2], ended
    assert "error: the configuration (flags and config file) is not the same on all 2 processes\n" in ended[0].stderr
    assert not run_dir.exists()
