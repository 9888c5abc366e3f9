"""What CUDA graphs capture, walked on tensors of a GPU that is not there: nothing waits, nothing is of the host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.fake_cuda import SETTINGS, SHAPES, TRAININGS
from tests.forking import ROOT

HAS_TRITON = find_spec("triton") is not None


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    """Return what `tests.fake_cuda` found."""
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler (g++)")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-W", "ignore", "-m", "tests.fake_cuda"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("of", "count"),
    [
        ("decoding", (5 if HAS_TRITON else 3) * len(SHAPES) * len(SETTINGS)),
        ("reading", (3 if HAS_TRITON else 1) * len(SHAPES)),
        ("training", 2 * len(TRAININGS) + HAS_TRITON),
    ],
)
def test_captured_operators_stay_on_the_device(cases: list[dict[str, Any]], of: str, count: int) -> None:
    found = [case for case in cases if case["of"] == of]
    assert len(found) == count
    assert all(case["operators"] > (10 if case["name"].startswith("fused") else 50) for case in found)
    assert {case["name"]: case["wrong"] for case in found if case["wrong"]} == {}


def test_operators_that_touch_the_host_are_found(cases: list[dict[str, Any]]) -> None:
    planted = [case for case in cases if case["of"] == "planted"]
    assert len(planted) == 2
    assert all(case["wrong"] for case in planted)
