"""Random damages of a checkpoint, some of the thousands of `python -m tests.faults.corruption`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.corruption import (
    DAMAGES,
    FLAGS,
    REFUSED,
    RIGHT,
    WAYS,
    Checkpoints,
    figures,
    train,
    try_damages,
)

COUNT = 150


@pytest.fixture(scope="module")
def flags(tiny_flags: list[str]) -> list[str]:
    return [*tiny_flags, *FLAGS]


@pytest.fixture(scope="module")
def checkpoints(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return train(tmp_path_factory.mktemp("trainings"), flags)


def test_a_damaged_checkpoint_is_refused_or_loads_what_was_saved(
    checkpoints: Checkpoints, flags: list[str], tmp_path: Path
) -> None:
    ended, wrong = try_damages(checkpoints, flags, tmp_path, count=COUNT, seed=1)
    assert wrong == []
    assert ended.keys() == DAMAGES.keys()
    for kind, ways in ended.items():
        for way in WAYS:
            assert ways[way].keys() <= {REFUSED, RIGHT}, (kind, way)
    total = {way: sum((ways[way] for ways in ended.values()), Counter[str]()) for way in WAYS}
    assert {way: counts.total() for way, counts in total.items()} == dict.fromkeys(WAYS, COUNT)
    assert total["resume"][REFUSED] > COUNT / 2  # they do damage
    assert total["load_model of the run"][RIGHT] > 0.9 * COUNT
    for harmless in ("manifest laid out anew", "foreign files added"):
        assert set(ended[harmless]["resume"]) == set(ended[harmless]["load_model"]) == {RIGHT}
    for fatal in ("directory renamed", "older checkpoint under this name", "file damaged and out of the manifest"):
        assert set(ended[fatal]["resume"]) == {REFUSED}
    assert all(figures(ways)[-2:] == [0, 0] for ways in ended.values())
