"""A head: a small network that reads the pooled states of a text and returns the scores of labels.

The recipe is that of Howard and Ruder 2018 ("Universal Language Model Fine-tuning for Text Classification", sections
3.3 and 4.1): a hidden layer of 50, trained on a frozen model first; then the LSTM and the embeddings learn with it. A
head keeps that tuned copy of the model beside itself, and the model that it was made from stays as it is.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from textgen.classification.decision import fit_temperature
from textgen.classification.reading import Tokens, pool, pooled_states
from textgen.console import Progress
from textgen.errors import TextgenError, first_line
from textgen.files import JSON_BYTES, make_directory, parse_json, write_atomic
from textgen.hardware import has_bfloat16
from textgen.model.lstm import LSTMLanguageModel
from textgen.runs.tensors import read_tensors, serialize

HEAD_NAME, TENSORS_NAME = "head.json", "head.safetensors"
_FORMAT = "textgen.head.1"

HIDDEN = 50
BATCH_SIZE = 32
HELD_OUT = 0.1  # share of the texts that fits the temperature
FROZEN_EPOCHS = 4
HEAD_RATE, MODEL_RATE = 2e-3, 1e-3
# Gradients flow through this many tokens of a text, which bounds the memory of a step. One review in ten is longer.
BACKWARD = 768

log = logging.getLogger("textgen")


@dataclass(frozen=True, kw_only=True)
class Head:
    """A trained head with its copy of the model."""

    model: LSTMLanguageModel
    """its embeddings and LSTM have learned with the head"""
    network: nn.Sequential
    labels: tuple[str, ...]
    temperature: float
    """fitted on texts that were held out of the training"""
    origin: Mapping[str, Any]
    """what it was made of: the sha256 of the model's weights, numbers of texts"""

    @torch.inference_mode()
    def scores(
        self, documents: Sequence[Tokens], begin_id: int, *, batch_size: int = 64, progress: bool = False
    ) -> NDArray[np.float64]:
        """Return the log-probabilities of labels, in nats: (texts, labels)."""
        pooled = pooled_states(self.model, documents, begin_id, batch_size=batch_size, progress=progress)
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
    epochs: int,
    seed: int = 0,
    progress: bool = False,
) -> Head:
    """Train a head, and a copy of the model with it.

    Args:
        model: stays as it is.
        documents: token ids of each text, the end-of-text token last.
        true: (texts,) indices of labels.
        labels: the names.
        begin_id: the first input of a text.
        origin: is kept with the head.
        epochs: passes over the texts in which the model learns too; 0 leaves it frozen.
        seed: of weights, dropout and order.
        progress: show on standard error how far it is.

    Raises:
        TextgenError: there are too few texts.
    """
    if len(documents) < 10 * BATCH_SIZE:
        raise TextgenError(
            f"a head needs at least {10 * BATCH_SIZE} texts with a label to learn from: {len(documents)}"
        )
    model = copy.deepcopy(model)
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out, used = np.split(order, [round(HELD_OUT * len(order))])
    device = model.embedding.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = _network(3 * model.config.hidden_size, len(labels))
        pooled = pooled_states(model, [documents[i] for i in used], begin_id, progress=progress)
        _train_on_frozen(network, torch.from_numpy(pooled), torch.from_numpy(true[used]))
        if epochs:
            _train_together(model, network.to(device), documents, true, used, begin_id, epochs, progress=progress)
    head = Head(
        model=model.eval(), network=network.cpu().eval(), labels=tuple(labels), temperature=1.0, origin=dict(origin)
    )
    scores = head.scores([documents[i] for i in held_out], begin_id)
    # the priors are those of the texts that it has learned from: its scores hold them already
    even = [1 / len(labels)] * len(labels)
    found = float((scores.argmax(1) == true[held_out]).mean())
    log.info("head: %d texts, %.1f %% of the %d held-out ones are right", len(used), 100 * found, len(held_out))
    temperature = fit_temperature(scores, true[held_out], priors=even)
    return Head(**{**vars(head), "temperature": temperature})


def _train_on_frozen(network: nn.Sequential, pooled: Tensor, true: Tensor) -> None:
    """Train the network on pooled states (texts, size) that do not change."""
    steps = FROZEN_EPOCHS * (len(pooled) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=HEAD_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(FROZEN_EPOCHS):
        for rows in torch.split(torch.randperm(len(pooled)), BATCH_SIZE):
            if len(rows) == BATCH_SIZE:  # a batch norm of one row has no variance
                _step(network(pooled[rows]), true[rows], optimizer, schedule)


def _train_together(
    model: LSTMLanguageModel,
    network: nn.Sequential,
    documents: Sequence[Tokens],
    true: NDArray[np.int64],
    used: NDArray[np.int64],
    begin_id: int,
    epochs: int,
    *,
    progress: bool,
) -> None:
    """Train network, LSTM and embeddings."""
    device = model.embedding.weight.device
    own = [model.embedding.weight, *model.layers.parameters(), *model.norms.parameters()]
    groups: list[dict[str, Any]] = [{"params": network.parameters()}, {"params": own}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = epochs * (len(used) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [HEAD_RATE, MODEL_RATE], total_steps=steps + 1, pct_start=0.1
    )
    network.train()
    fast = has_bfloat16(use_cpu=device.type == "cpu")
    with Progress("step", steps, show=progress) as bar:
        for step, rows in enumerate(_similar_batches(documents, used, epochs)):
            with torch.autocast(device.type, torch.bfloat16, enabled=fast):
                pooled = pool(model, [documents[row] for row in rows], begin_id, backward=BACKWARD)
            targets = torch.from_numpy(true[rows]).to(device)
            _step(network(pooled.float()), targets, optimizer, schedule, clipped=own)
            bar.update(step + 1)


def _step(
    scores: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer, schedule: Any, *, clipped: Sequence[Tensor] = ()
) -> None:
    nn.functional.cross_entropy(scores, targets).backward()  # type: ignore[no-untyped-call]
    if clipped:
        nn.utils.clip_grad_norm_(clipped, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def _similar_batches(documents: Sequence[Tokens], used: NDArray[np.int64], epochs: int) -> Iterator[list[int]]:
    """Yield batches of texts of similar length, the longest first, in random order."""
    for _ in range(epochs):
        mixed = used[torch.randperm(len(used)).numpy()]
        batches = []
        for start in range(0, len(mixed), 20 * BATCH_SIZE):
            near = sorted(mixed[start : start + 20 * BATCH_SIZE].tolist(), key=lambda i: -len(documents[i]))
            batches += [near[i : i + BATCH_SIZE] for i in range(0, len(near), BATCH_SIZE)]
        whole = [batch for batch in batches if len(batch) == BATCH_SIZE]
        for i in torch.randperm(len(whole)).tolist():
            yield whole[i]


# --- files -----------------------------------------------------------------------------------------------------------


def _tensors(model: LSTMLanguageModel, network: nn.Sequential) -> dict[str, Tensor]:
    """Return what a head's file holds: the network, and of the model what a head reads."""
    read = {
        f"model.{name}": value
        for name, value in model.state_tensors().items()
        if name.startswith(("embedding.", "layers.", "norms."))
    }
    kept = {f"network.{name}": value for name, value in network.state_dict().items() if value.is_floating_point()}
    return {name: value.detach().cpu().contiguous() for name, value in (read | kept).items()}


def save_head(head: Head, directory: Path) -> None:
    """Write `head.safetensors` and then `head.json` into a directory, which is made if it is missing."""
    make_directory(directory)
    with (directory / TENSORS_NAME).open("wb") as file:
        for piece in serialize(_tensors(head.model, head.network)):
            file.write(piece)
    record = {
        "format": _FORMAT, "labels": list(head.labels), "temperature": head.temperature, "origin": dict(head.origin),
    }  # fmt: skip
    write_atomic(directory / HEAD_NAME, json.dumps(record, indent=2) + "\n")


def read_head(directory: Path, model: LSTMLanguageModel, *, weights_sha256: str) -> Head:
    """Read a head.

    Args:
        directory: of its files.
        model: that it was made from; stays as it is.
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
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels) or len(labels) < 2:
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
    model = copy.deepcopy(model)
    network = _network(3 * model.config.hidden_size, len(labels))
    shapes = {name: tuple(value.shape) for name, value in _tensors(model, network).items()}
    tensors = read_tensors(directory / TENSORS_NAME, shapes)
    for module, prefix in ((model, "model."), (network, "network.")):
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        module.load_state_dict(own, strict=False)
    return Head(
        model=model.eval(), network=network.eval(), labels=tuple(labels), temperature=temperature, origin=origin
    )
