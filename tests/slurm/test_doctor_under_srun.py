"""`textgen doctor` of an allocation: started by `srun`, it reports once, of all machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.slurm.conftest import Slurm

DOCTOR = [sys.executable, "-m", "textgen", "doctor", "--json"]


def examine(slurm: Slurm, *options: str, run_dir: Path, flags: list[str], **env: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the report of a doctor on two nodes."""
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **env}
    argv = ["srun", "--nodes", "2", "--ntasks-per-node", "2", *options, *DOCTOR, *flags, "--run_dir", str(run_dir)]
    done = slurm.run(argv, env=own, check=False)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)  # one value: a second report would not be JSON
    return done.returncode, report


def test_four_tasks_on_two_nodes_report_once(slurm: Slurm, tiny_flags: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    code, report = examine(slurm, run_dir=run_dir, flags=tiny_flags, ACCELERATE_USE_CPU="true")
    checks = {check["name"]: check for check in report["checks"]}
    assert code == 0, report
    assert (report["processes"], report["machines"]) == (4, ["node1", "node2"])
    assert (checks["world"]["value"]["machines"], checks["world"]["value"]["backend"]) == (2, "gloo")
    assert checks["disk"]["value"]["seen_by"] == 4
    assert max(checks["all_reduce"]["value"]["latency_us"]) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_gpus_that_slurm_promises_and_torch_does_not_see_fail(
    slurm: Slurm, tiny_flags: list[str], tmp_path: Path
) -> None:
    code, report = examine(slurm, "--gpus-per-node", "2", run_dir=tmp_path / "run", flags=tiny_flags)
    checks = {check["name"]: check for check in report["checks"]}
    assert code == 1
    assert {name for name, check in checks.items() if check["status"] == "fail"} == {"world", "gpus"}
    assert "GPUs are promised (" in checks["world"]["advice"]
    assert checks["gpus"]["advice"].startswith("2 GPUs are promised, torch sees 0")
