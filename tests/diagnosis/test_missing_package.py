"""A missing package fails the checks that need it, and the other checks still run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from textgen.diagnosis import machine

# None in sys.modules makes an import fail as that of a missing package does.
PROGRAM = """
import sys
sys.modules["sentencepiece"] = None
from textgen.cli import main
main(["doctor", *sys.argv[1:]])
"""


def test_missing_package_fails_the_checks_that_need_it_and_no_others(tmp_path: Path) -> None:
    flags = ["--run_dir", str(tmp_path / "run"), "--data.cache_dir", str(tmp_path / "cache"), "--json"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *flags], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {name for name, check in checks.items() if check["status"] == "fail"} == {"space", "data"}
    assert all("sentencepiece" in checks[name]["advice"] for name in ("space", "data"))


class OneProcess:
    """The part of a process group that a check of one process uses."""

    def gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        return [value]


def test_a_textgen_of_another_project_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "foreign_version", lambda: "1.1.2")
    check = machine.check_versions(OneProcess())  # type: ignore[arg-type]
    assert check.status == "warn"
    assert check.advice.startswith("the installed `textgen` 1.1.2 is another project of this name: run `pip uninstall")
