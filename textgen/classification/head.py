"""A head: a small network that reads the pooled states of a text and returns the scores of labels.

The network is that of Howard and Ruder 2018 ("Universal Language Model Fine-tuning for Text Classification", section
3.3), with a hidden layer of 50. The model stays as it is: its states are computed once (docs/decisions/0025).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from textgen.classification.decision import fit_temperature
from textgen.classification.reading import pooled_states
from textgen.data.side_by_side import Tokens
from textgen.errors import TextgenError, first_line
from textgen.files import JSON_BYTES, make_directory, parse_json, write_atomic
from textgen.model.files import check_labels
from textgen.model.lstm import LSTMLanguageModel
from textgen.runs.tensors import read_tensors, serialize

HEAD_NAME, TENSORS_NAME = "head.json", "head.safetensors"
_FORMAT = "textgen.head.1"

HIDDEN = 50
BATCH_SIZE = 32
HELD_OUT = 0.1  # share of the texts that fits the temperature
EPOCHS, MIN_STEPS = 4, 500  # few texts are passed over more often
LEARNING_RATE = 2e-3

log = logging.getLogger("textgen")


@dataclass(frozen=True, kw_only=True)
class Head:
    """A trained head of a model."""

    network: nn.Sequential
    labels: tuple[str, ...]
    temperature: float
    """fitted on texts that were held out of the training"""
    origin: Mapping[str, Any]
    """what it was made of: the sha256 of the model's weights, numbers of texts"""

    @torch.inference_mode()
    def scores(self, pooled: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the log-probabilities of labels, in nats (texts, labels), of `pooled_states`."""
        scores: Tensor = self.network(torch.from_numpy(pooled)).double().log_softmax(1)
        result: NDArray[np.float64] = scores.numpy()
        return result


def _network(size: int, num_labels: int) -> nn.Sequential:
    """Return the network; `size` is that of the pooled states."""
    return nn.Sequential(
        nn.BatchNorm1d(size), nn.Dropout(0.3), nn.Linear(size, HIDDEN), nn.ReLU(),
        nn.BatchNorm1d(HIDDEN), nn.Dropout(0.1), nn.Linear(HIDDEN, num_labels),
    )  # fmt: skip


# --- training --------------------------------------------------------------------------------------------------------


def train_head(
    model: LSTMLanguageModel,
    documents: Sequence[Tokens],
    true: NDArray[np.int64],
    labels: Sequence[str],
    begin_id: int,
    *,
    origin: Mapping[str, Any],
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Head:
    """Train a head of a model, which stays as it is.

    Args:
        model: in evaluation mode.
        documents: token ids of each text, the end-of-text token last.
        true: (texts,) indices of labels.
        labels: the names.
        begin_id: the first input of a text.
        origin: is kept with the head.
        seed: of weights, dropout and order.
        batch_size: texts that are read side by side.
        progress: show on standard error how far it is.

    Raises:
        TextgenError: there are too few texts.
    """
    if len(documents) < 10 * BATCH_SIZE:
        raise TextgenError(f"a head needs {10 * BATCH_SIZE} texts with a label or more: {len(documents)}")
    pooled = pooled_states(model, documents, begin_id, batch_size=batch_size, progress=progress)
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out, used = np.split(order, [round(HELD_OUT * len(order))])
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = _network(pooled.shape[1], len(labels))
        _train(network, torch.from_numpy(pooled[used]), torch.from_numpy(true[used]))
    head = Head(network=network.eval(), labels=tuple(labels), temperature=1.0, origin=dict(origin))
    scores = head.scores(pooled[held_out])
    found = float((scores.argmax(1) == true[held_out]).mean())
    log.info("head: %d texts, %.1f %% of the %d held-out ones are right", len(used), 100 * found, len(held_out))
    # The head has learned the shares of its texts, so its priors are even.
    temperature = fit_temperature(scores, true[held_out], priors=[1 / len(labels)] * len(labels))
    return replace(head, temperature=temperature)


def _train(network: nn.Sequential, pooled: Tensor, true: Tensor) -> None:
    """Train the network on pooled states (texts, size)."""
    steps_per_epoch = len(pooled) // BATCH_SIZE
    epochs = max(EPOCHS, -(-MIN_STEPS // steps_per_epoch))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, epochs * steps_per_epoch)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(pooled)), BATCH_SIZE):
            if len(rows) == BATCH_SIZE:  # a batch norm of one row has no variance
                nn.functional.cross_entropy(network(pooled[rows]), true[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()


# --- files -----------------------------------------------------------------------------------------------------------


def _tensors(network: nn.Sequential) -> dict[str, Tensor]:
    """Return what a head's file holds."""
    return {name: value.detach() for name, value in network.state_dict().items() if value.is_floating_point()}


def save_head(head: Head, directory: Path) -> None:
    """Write `head.safetensors` and then `head.json` into a directory, which is made if it is missing."""
    make_directory(directory)
    with (directory / TENSORS_NAME).open("wb") as file:
        for piece in serialize(_tensors(head.network)):
            file.write(piece)
    record = {
        "format": _FORMAT, "labels": list(head.labels), "temperature": head.temperature, "origin": dict(head.origin),
    }  # fmt: skip
    write_atomic(directory / HEAD_NAME, json.dumps(record, indent=2) + "\n")


def read_head(directory: Path, model: LSTMLanguageModel, *, weights_sha256: str) -> Head:
    """Read a head.

    Args:
        directory: of its files.
        model: that it was made from.
        weights_sha256: of the model's file.

    Raises:
        TextgenError: it cannot be read, or was made from another model.
    """
    path = directory / HEAD_NAME
    try:
        with path.open("rb") as file:
            record = parse_json(file.read(JSON_BYTES + 1))
        if record.get("format") != _FORMAT:
            raise TextgenError(f"`{path}` is not a head: `format` is not {_FORMAT}")
        labels, temperature, origin = record["labels"], record["temperature"], dict(record["origin"])
        check_labels(labels)
        if len(labels) < 2:
            raise TextgenError(f"`{path}`: `labels` must be at least two names")
        if not isinstance(temperature, float) or not 0 < temperature < math.inf:
            raise TextgenError(f"`{path}`: `temperature` must be a number above 0")
    except TextgenError:
        raise
    except OSError as error:
        raise TextgenError(f"`{path}` cannot be read: {error.strerror}") from error
    except Exception as error:  # JSON raises its own
        raise TextgenError(f"`{path}` is not a head: {first_line(error)}") from error
    if origin.get("weights_sha256") != weights_sha256:
        raise TextgenError(f"`{directory}` is the head of another model, or of another checkpoint: train one for this")
    network = _network(3 * model.config.hidden_size, len(labels))
    shapes = {name: tuple(value.shape) for name, value in _tensors(network).items()}
    network.load_state_dict(read_tensors(directory / TENSORS_NAME, shapes), strict=False)
    return Head(network=network.eval(), labels=tuple(labels), temperature=temperature, origin=origin)
