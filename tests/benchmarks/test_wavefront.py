"""The model whose layers run side by side, against the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.wavefront import WavefrontModel
from textgen.config import ModelConfig
from textgen.model.lstm import DropoutMasks, LSTMLanguageModel

VOCAB = 61


def build(num_pieces: int, **shape: Any) -> LSTMLanguageModel:
    """Return the plain model for one piece, else the other one; the weights are equal."""
    torch.manual_seed(0)
    config = ModelConfig(**{"embedding_dim": 12, "hidden_size": 20} | shape)
    return LSTMLanguageModel(config, VOCAB) if num_pieces == 1 else WavefrontModel(config, VOCAB, num_pieces=num_pieces)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))


def relative(seen: Tensor, wanted: Tensor) -> float:
    return float((seen - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("shape", [{}, {"num_layers": 4, "layer_norm": True, "residual": True}, {"num_layers": 1}])
@pytest.mark.parametrize("num_pieces", [2, 3, 5, 30])
def test_layers_side_by_side_compute_what_they_do_one_after_the_other(shape: dict[str, Any], num_pieces: int) -> None:
    """Loss, states and gradients, with dropout and weight drop; of 23 time steps, more pieces than those too."""
    tokens, masks = random_tokens(4, 24), DropoutMasks(42, 7, torch.arange(4))
    found = []
    for pieces in (1, num_pieces):
        model = build(pieces, dropout=0.3, weight_drop=0.4, **shape)
        before = tuple(part + 0.1 for part in model.zero_state(4))
        nats, state = model(tokens[:, :-1], before, tokens[:, 1:], masks=masks)
        nats.backward()
        found.append([nats, *state, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert relative(other, one) < 1e-6


def test_layers_side_by_side_are_each_a_piece_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's piece comes after the same piece of the layer below, and before anything that the latter does next."""
    model, order = build(4, num_layers=3), []
    original = LSTMLanguageModel.run_layer

    def layer(self: LSTMLanguageModel, i: int, *args: Any) -> Any:
        order.append((i, sum(number == i for number, _ in order)))
        return original(self, i, *args)

    monkeypatch.setattr(LSTMLanguageModel, "run_layer", layer)
    model(random_tokens(2, 20), model.zero_state(2))
    assert order == [
        (0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (2, 1), (1, 2), (0, 3), (2, 2), (1, 3), (2, 3)
    ]  # fmt: skip
