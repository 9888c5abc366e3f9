"""Trainings that nothing happens to, for those of a module's `FLAGS` to be compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.jobs import finish


@pytest.fixture(scope="module")
def flags(tiny_flags: list[str], request: pytest.FixtureRequest) -> list[str]:
    return [*tiny_flags, *request.module.FLAGS]


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run on one process that nothing happened to."""
    return finish(flags, tmp_path_factory.mktemp("whole") / "run").run_dir
