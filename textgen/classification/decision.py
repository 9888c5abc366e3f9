"""From scores to labels: margins, probabilities, and the temperature that makes the probabilities right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
"""(texts, labels): the logarithm of each label's weight for a text, up to a constant of the text"""

# Limits of a fitted temperature: a sample whose labels are all found would ask for 0, one that is all noise for
# infinity.
COLDEST, HOTTEST = 1e-3, 1e6


@dataclass(frozen=True, kw_only=True)
class Classification:
    """The label of a text."""

    text: str
    """as it was given"""
    label: str
    """the most probable one"""
    probabilities: dict[str, float]
    """of all labels; they add up to 1"""
    bits: dict[str, float] = field(repr=False)
    """what the text takes under each label; with a head, minus the logarithm (base 2) of the label's probability before
    the temperature"""

    @property
    def probability(self) -> float:
        """Return the probability of the label."""
        return self.probabilities[self.label]

    @property
    def margin(self) -> float:
        """Return how many bits fewer the label takes than the best other one; below 0 if only the priors chose it."""
        others = [bits for label, bits in self.bits.items() if label != self.label]
        return min(others) - self.bits[self.label]

    def as_json(self) -> dict[str, Any]:
        """Return the label and its figures as JSON values, without the text."""
        return {
            "label": self.label,
            "probability": self.probability,
            "margin": self.margin,
            "probabilities": self.probabilities,
            "bits": self.bits,
        }


def classify_scores(
    texts: Sequence[str], labels: Sequence[str], scores: Scores, *, temperature: float, priors: Sequence[float]
) -> list[Classification]:
    """Return the label of each text.

    Args:
        texts: as they were given.
        labels: the names.
        scores: in nats.
        temperature: divides the scores, see `fit_temperature`.
        priors: probability of each label before a text is read.
    """
    probabilities = probabilities_of(scores, temperature=temperature, priors=priors)
    bits = -scores / math.log(2)
    return [
        Classification(
            text=text,
            label=labels[int(row.argmax())],
            probabilities=dict(zip(labels, row.tolist(), strict=True)),
            bits=dict(zip(labels, row_bits.tolist(), strict=True)),
        )
        for text, row, row_bits in zip(texts, probabilities, bits, strict=True)
    ]


def probabilities_of(scores: Scores, *, temperature: float, priors: Sequence[float]) -> Scores:
    """Return the probabilities (texts, labels) by Bayes' rule: softmax(scores / temperature + log priors)."""
    with np.errstate(divide="ignore"):
        weights = scores / temperature + np.log(np.asarray(priors, dtype=np.float64))
    weights = np.exp(weights - weights.max(1, keepdims=True))
    result: Scores = weights / weights.sum(1, keepdims=True)
    return result


def fit_temperature(scores: Scores, true: NDArray[np.int64], *, priors: Sequence[float]) -> float:
    """Return the temperature under which true labels have the largest likelihood (Guo et al. 2017, section 4.2).

    A language model takes its tokens for independent evidence, so that its scores are far too sure of long texts. The
    likelihood is concave in 1 / temperature: its slope is halved down to the zero.

    Args:
        scores: in nats, of texts that the model was not trained on.
        true: (texts,) indices of labels.
        priors: probability of each label before a text is read.
    """
    own = scores[np.arange(len(true)), true]

    def slope(inverse: float) -> float:
        """Return the derivative of the log-likelihood by the inverse temperature."""
        expected = (probabilities_of(scores, temperature=1 / inverse, priors=priors) * scores).sum(1)
        return float((own - expected).sum())

    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) > 0 else (low, middle)
    return math.exp(-(low + high) / 2)
