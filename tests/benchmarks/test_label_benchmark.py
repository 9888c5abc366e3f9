"""The benchmark of labels on a tiny run that has learned two labels, with a judge that knows its words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import textgen
from benchmarks import labels

GOOD, BAD = {"good", "fine", "great"}, {"bad", "dull", "weak"}


class Judge:
    """Takes a text for positive if it has more good words than bad ones."""

    def predict(self, texts: list[str]) -> np.ndarray:
        words = [text.split() for text in texts]
        good, bad = (np.array([sum(word in own for word in text) for text in words]) for own in (GOOD, BAD))
        return (good > bad).astype(np.int64)


@pytest.fixture
def reviews(labelled_reviews: Path) -> labels.Reviews:
    rows = [json.loads(line) for line in labelled_reviews.read_text().splitlines()][:60]
    return [row["text"] for row in rows], np.array([labels.LABELS.index(row["label"]) for row in rows])


def test_texts_drawn_by_label_are_judged(
    labelled_run: Path, reviews: labels.Reviews, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "PROMPTS", ("", "good"))
    found = labels.judge(str(labelled_run), Judge(), reviews, 20, {"label_scale": 2}, str(labelled_run))
    assert found["human reviews"]["accuracy"] == found["their first 256 tokens"]["accuracy"] == 1
    assert found["both"]["texts"] == 40
    assert found["both"]["accuracy"] == (found["negative"]["accuracy"] + found["positive"]["accuracy"]) / 2 > 0.6
    assert 0 < found["distinct-1"] < found["distinct-2"] <= 1
    assert found["bits per byte"] > 0


def test_temperatures_are_fitted_on_the_other_half(labelled_run: Path, reviews: labels.Reviews) -> None:
    found = labels.classify(str(labelled_run), reviews, None)
    plain, fitted = found["as it is"], found["temperature of the other half"]
    assert plain["documents"] == 60
    texts, lm = reviews[0], textgen.load(labelled_run)
    scores = [lm.score(text, label=labels.LABELS[label]) for text, label in zip(texts, reviews[1], strict=True)]
    nats, num_bytes = sum(score.nats for score in scores), sum(score.num_bytes for score in scores)
    assert found["bits per byte"] == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-4)
    assert found["bits per byte"] < labels.bits_per_byte(str(labelled_run))
    assert plain["accuracy"] == fitted["accuracy"] > 0.9
    assert len(fitted["fitted"]) == 2
    low, high = fitted["interval"]
    assert low < fitted["accuracy"] <= high
