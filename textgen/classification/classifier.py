"""A classifier: a model and how it judges texts, by the bits of each label or by a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from textgen.classification.decision import Classification, Scores, classify_scores, fit_temperature
from textgen.classification.head import Head
from textgen.classification.reading import label_scores, pooled_states
from textgen.data.corpus import normalize
from textgen.data.labels import label_of
from textgen.data.store import TokenStore, encode_documents
from textgen.errors import TextgenError, in_backticks
from textgen.model.lstm import LSTMLanguageModel
from textgen.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Judges texts by the bits that they take under each label, or by a head."""

    model: LSTMLanguageModel
    tokenizer: Tokenizer
    head: Head | None
    priors: tuple[float, ...]
    """of the labels; even with a head, which has learned the shares of its texts"""
    temperature: float

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.model.labels if self.head is None else self.head.labels

    def scores(self, texts: Sequence[str], *, batch_size: int = 64, progress: bool = False) -> Scores:
        """Return the scores of texts that are normalized as the training text was: (texts, labels), in nats."""
        documents, begin = encode_documents(self.tokenizer, texts), self.tokenizer.bos_id
        if self.head is not None:
            return self.head.scores(
                pooled_states(self.model, documents, begin, batch_size=batch_size, progress=progress)
            )
        begins = [self.model.label_id(label) for label in self.labels]
        return label_scores(self.model, documents, begins, batch_size=batch_size, progress=progress)

    def classify(
        self, texts: Sequence[str], *, batch_size: int = 64, progress: bool = False
    ) -> tuple[list[Classification], Scores]:
        """Return the labels of texts as users gave them, and their scores."""
        read = [normalize(text, self.model.text.get("normalization", "none")) for text in texts]
        scores = self.scores(read, batch_size=batch_size, progress=progress)
        found = classify_scores(texts, self.labels, scores, temperature=self.temperature, priors=self.priors)
        return found, scores

    def calibrated(self, texts: Sequence[str], *, batch_size: int = 64, progress: bool = False) -> Classifier:
        """Return this classifier with the temperature that fits texts with labels.

        Raises:
            TextgenError: no text has a label of the model.
        """
        places, true = true_labels(texts, self.labels)
        scores = self.classify([texts[place] for place in places], batch_size=batch_size, progress=progress)[1]
        return replace(self, temperature=fit_temperature(scores, true, priors=self.priors))


def new_classifier(
    model: LSTMLanguageModel,
    tokenizer: Tokenizer,
    *,
    name: str,
    head: Head | None = None,
    priors: Mapping[str, float] | None = None,
    temperature: float | None = None,
) -> Classifier:
    """Return a classifier.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        name: of the model in errors.
        head: judges in place of the model's bits.
        priors: weight of each label before a text is read; None for equal ones.
        temperature: divides the scores; default 1, or that of the head.

    Raises:
        TextgenError: the model has fewer than two labels, or the priors are not for its labels.
    """
    if head is not None and priors is not None:
        raise TextgenError("`priors` are for a model's own labels: a head has learned the shares of its texts")
    labels = model.labels if head is None else head.labels
    if not labels:
        raise TextgenError(f"`{name}` was trained without labels: train a head, which needs none (`--head`, `--train`)")
    if len(labels) < 2:
        raise TextgenError(f"`{name}` has one label, `{labels[0]}`: there is nothing to decide")
    if priors is not None and set(priors) != set(labels):
        raise TextgenError(f"`priors` are for {in_backticks(priors)}; the labels are {in_backticks(labels)}")
    weights = np.array([1.0 if priors is None else priors[label] for label in labels])
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise TextgenError(f"`priors` must be at least 0, and one above: {dict(priors or {})}")
    if temperature is None:
        temperature = 1.0 if head is None else head.temperature
    if not 0 < temperature < np.inf:
        raise TextgenError(f"`temperature` must be above 0: {temperature}")
    shares = tuple((weights / weights.sum()).tolist())
    return Classifier(model=model, tokenizer=tokenizer, head=head, priors=shares, temperature=temperature)


def true_labels(texts: Sequence[str], labels: Sequence[str]) -> tuple[list[int], NDArray[np.int64]]:
    """Return the places of the texts that have one of the labels, and the indices of these labels.

    Raises:
        TextgenError: no text has one.
    """
    index = {label: place for place, label in enumerate(labels)}
    known = [(place, index[label]) for place, text in enumerate(texts) if (label := label_of(text)) in index]
    if not known:
        seen = sorted({label for text in texts if (label := label_of(text)) is not None})[:10]
        raise TextgenError(
            f"no text has a label of {in_backticks(labels[:10])}: "
            + (f"the labels are {in_backticks(seen)}" if seen else "`--label_column` names their column")
        )
    return [place for place, _ in known], np.array([label for _, label in known])


def training_shares(store: TokenStore) -> dict[str, float]:
    """Return the share of each label among the labelled documents of a store's train split.

    Raises:
        TextgenError: the store has no labels.
    """
    if not store.labels:
        raise TextgenError(f"`{store.directory}` has no labels")
    first, counts = store.tokenizer.vocab_size, np.zeros(len(store.labels), dtype=np.int64)
    for part in store.parts("train"):
        assert part.begin_ids is not None
        counts += np.bincount(part.begin_ids[part.begin_ids >= first] - first, minlength=len(store.labels))
    return dict(zip(store.labels, (counts / counts.sum()).tolist(), strict=True))
