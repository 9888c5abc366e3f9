"""Scores to labels, temperatures and figures, on made-up scores whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from textgen.classification.decision import classify_scores, fit_temperature, probabilities_of
from textgen.classification.figures import compute_figures, wilson_interval

LABELS = ["negative", "positive"]


def test_the_label_of_fewest_bits_with_its_margin() -> None:
    scores = np.array([[-8.0, -10.0], [-7.0, -3.0]]) * math.log(2)  # so that bits are 8 and 10, 7 and 3
    first, second = classify_scores(["a", "b"], LABELS, scores, temperature=1, priors=[0.5, 0.5])
    assert (first.label, second.label) == ("negative", "positive")
    assert first.bits == pytest.approx({"negative": 8, "positive": 10})
    assert (first.margin, second.margin) == pytest.approx((2, 4))
    assert first.probabilities == pytest.approx({"negative": 0.8, "positive": 0.2})  # 2 bits are odds of 4 to 1
    assert first.probability == pytest.approx(0.8)
    assert first.text == "a"


def test_priors_count_like_evidence() -> None:
    scores = np.array([[0.0, math.log(2)]])
    (found,) = classify_scores(["a"], LABELS, scores, temperature=1, priors=[0.9, 0.1])
    assert found.probabilities == pytest.approx({"negative": 9 / 11, "positive": 2 / 11})
    assert found.label == "negative"
    assert found.margin == pytest.approx(-1)  # the text alone takes a bit fewer as `positive`
    (never,) = classify_scores(["a"], LABELS, scores, temperature=1, priors=[1.0, 0.0])
    assert never.probabilities == {"negative": 1.0, "positive": 0.0}


def test_fitted_temperature_gives_back_the_one_of_made_up_scores() -> None:
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(20000, 3)) * 2
    chance = probabilities_of(scores, temperature=1, priors=[0.5, 0.3, 0.2])
    true = (draw.random((len(chance), 1)) > chance.cumsum(1)).sum(1)
    assert fit_temperature(scores * 7, true, priors=[0.5, 0.3, 0.2]) == pytest.approx(7, rel=0.05)


def test_temperature_of_labels_that_are_all_found_is_finite() -> None:
    scores = np.array([[0.0, 5.0], [5.0, 0.0]])
    assert 0 < fit_temperature(scores, np.array([1, 0]), priors=[0.5, 0.5]) < 1
    assert 1000 < fit_temperature(scores, np.array([0, 1]), priors=[0.5, 0.5]) < math.inf


def test_accuracy_interval_and_confusion() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    figures = compute_figures(LABELS, probabilities, np.array([0, 1, 1, 1]))
    assert figures.confusion.tolist() == [[1, 0], [1, 2]]
    assert figures.accuracy == 0.75
    assert figures.log_loss == pytest.approx(-np.log2([0.9, 0.4, 0.7, 0.8]).mean())
    lines = "\n".join(figures.as_lines())
    assert "accuracy           75.00% (95 % interval 30.06% to 95.44%)" in lines
    assert "positive           1         2" in lines


def test_calibration_error_is_the_distance_of_sureness_from_truth() -> None:
    probabilities = np.tile([[0.25, 0.75]], (4, 1))
    assert compute_figures(LABELS, probabilities, np.array([1, 1, 1, 0])).calibration_error == pytest.approx(0)
    assert compute_figures(LABELS, probabilities, np.array([1, 0, 0, 0])).calibration_error == pytest.approx(0.5)


def test_wilson_interval_is_that_of_the_paper_and_within_bounds() -> None:
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
