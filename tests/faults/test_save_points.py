"""Kills and power failures at every point of a save: `tests/faults/save_points.py`, in a process of one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(results: Path, *flags: str) -> list[dict[str, Any]]:
    """Run all scenarios; return what came of them."""
    command = [sys.executable, "-m", "tests.faults.save_points", "--json", str(results), *flags]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("points") / "results.json")


def test_a_kill_at_any_point_of_a_save_leaves_the_state_before_or_after(results: list[dict[str, Any]]) -> None:
    """And the next save works and leaves nothing else."""
    assert [problem for result in results for problem in result["problems"] if ", power, " not in problem] == []
    assert [result["recovered"] for result in results] == [result["kills"] for result in results]
    assert all(result["kills"] > 40 for result in results)


def test_a_power_failure_at_any_point_of_a_save_leaves_the_state_before_or_after(results: list[dict[str, Any]]) -> None:
    """And a save that was said to be on disk is."""
    assert [problem for result in results for problem in result["problems"] if ", power, " in problem] == []
    assert [result["power_recovered"] for result in results] == [result["power_failures"] for result in results]
    assert all(result["power_failures"] >= 80 for result in results)


@pytest.mark.parametrize("syncs", ["files", "directories"])
def test_a_save_that_syncs_less_is_found_out(tmp_path: Path, syncs: str) -> None:
    """The simulated power failures do find what a missing fsync loses."""
    flags = ["--ignore", syncs, "--scenario", "third save, one is pruned", "save in the background"]
    for result in run(tmp_path / "results.json", *flags):
        assert result["recovered"] == result["kills"], "a kill alone loses nothing that the kernel has"
        assert result["power_recovered"] < result["power_failures"]
