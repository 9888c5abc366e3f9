"""Real trainings, killed at random moments: `tests/faults/kills.py`, with fewer kills and a smaller model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.faults.kills import IN_A_SAVE, Kill, Outcome, Trial
from textgen.runs.checkpoint import checkpoints

KILLS = {1: 10, 2: 6, 4: 4}
pytestmark = pytest.mark.serial
MEDIUM = ["--model.embedding_dim", "256", "--model.hidden_size", "640"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Return what came of 20 kills on 1, 2 and 4 processes; the three trainings share the machine."""
    home = tmp_path_factory.mktemp("kills")

    def run(processes: int, count: int) -> Outcome:
        # torchrun ends in a second or two, but not where ten processes share two cores
        return Trial(processes, count, home / str(processes), seed=0, flags=MEDIUM, share=5, gone_seconds=20.0).run()

    with ThreadPoolExecutor(len(KILLS)) as pool:
        return list(pool.map(run, KILLS.keys(), KILLS.values()))


def kills_of(outcomes: list[Outcome]) -> list[Kill]:
    return [kill for outcome in outcomes for kill in outcome.kills]


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_newest_checkpoint(outcomes: list[Outcome]) -> None:
    kills = kills_of(outcomes)
    assert [note for outcome in outcomes for note in outcome.notes] == []
    assert len(kills) == sum(KILLS.values())
    assert sum(kill.failed for kill in kills) == 0
    assert sum(kill.invalid for kill in kills) == 0


@pytest.mark.slow
def test_two_kills_in_five_strike_a_save(outcomes: list[Outcome]) -> None:
    """Else the other tests would show little."""
    kills = kills_of(outcomes)
    assert sum(kill.phase in IN_A_SAVE for kill in kills) >= 0.4 * len(kills)


@pytest.mark.slow
def test_no_process_outlives_a_kill(outcomes: list[Outcome]) -> None:
    assert sum(kill.left_over for kill in kills_of(outcomes)) == 0


@pytest.mark.slow
def test_steps_taken_again_have_the_same_losses(outcomes: list[Outcome]) -> None:
    assert sum(outcome.replayed for outcome in outcomes) > 0
    assert sum(kill.differing for kill in kills_of(outcomes)) == 0


@pytest.mark.slow
def test_no_sample_is_skipped_or_repeated(outcomes: list[Outcome]) -> None:
    kills = kills_of(outcomes)
    assert sum(kill.skipped for kill in kills) == 0
    assert sum(kill.repeated for kill in kills) == 0


@pytest.mark.slow
def test_a_killed_training_ends_as_an_untouched_one(outcomes: list[Outcome]) -> None:
    """Rows of metrics.jsonl, weights, averages, Adam's moments and lane states: the same bits."""
    assert [outcome.metrics for outcome in outcomes] == [0, 0, 0]
    assert [outcome.tensors for outcome in outcomes] == [0, 0, 0]


@pytest.mark.slow
def test_a_killed_training_with_labels_ends_as_an_untouched_one(tmp_path: Path) -> None:
    """A document's label may be the last input of a window: it must not depend on where a training starts again."""
    flags = [*MEDIUM, "--data.label_column", "label"]
    outcome = Trial(2, 3, tmp_path, seed=1, flags=flags, share=5, gone_seconds=20.0).run()
    assert outcome.notes == []
    assert sum(kill.failed + kill.differing for kill in outcome.kills) == 0
    assert (outcome.metrics, outcome.tensors) == (0, 0)
    _, checkpoint = checkpoints(tmp_path / "killed" / "run")[0]
    assert load_file(checkpoint / "model.safetensors")["label_embedding.weight"].shape == (2, 256)
