"""Fixtures of the tests of reading."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder whose name names no split."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder
