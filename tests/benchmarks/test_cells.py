"""Cells that stand in for textgen's layer in benchmarks: each computes what it says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import cells
from benchmarks.cells import CELLS, Exponential, Loop, Mogrifier, Normalized, drop_embeddings, in_place_of_layers
from textgen.config import ModelConfig
from textgen.model import lstm as model
from textgen.model.lstm import LSTMLanguageModel, LSTMLayer, State

ROWS, STEPS, INPUTS, UNITS = 3, 8, 32, 64


def build(kind: type[LSTMLayer]) -> LSTMLayer:
    torch.manual_seed(0)
    layer = kind(INPUTS, UNITS)
    for name, parameter in layer.named_parameters():
        if name in ("weight_ih", "weight_hh", "bias"):
            nn.init.normal_(parameter, std=0.2)
    return layer


def window() -> tuple[Tensor, State]:
    torch.manual_seed(1)
    state = torch.randn(1, ROWS, UNITS) / 2, torch.randn(1, ROWS, UNITS)
    return torch.randn(ROWS, STEPS, INPUTS), state


@pytest.mark.parametrize("kind", [Loop, Mogrifier])
def test_a_loop_is_the_layer_and_so_is_a_mogrifier_before_it_has_learned(kind: type[LSTMLayer]) -> None:
    seen, wanted = (build(each)(*window()) for each in (kind, LSTMLayer))
    torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=1e-6)


def test_a_mogrifier_scales_input_and_output_in_turns() -> None:
    """Equations 1 and 2 of Melis et al. 2020, written out."""
    layer = build(Mogrifier)
    assert isinstance(layer, Mogrifier)
    nn.init.normal_(layer.to_input, std=0.3)
    nn.init.normal_(layer.to_hidden, std=0.3)
    x, (hidden, cell) = window()
    now, last = x[:, 0], hidden[0]
    now = 2 * torch.sigmoid(last @ layer.to_input[0].T) * now
    last = 2 * torch.sigmoid(now @ layer.to_hidden[0].T) * last
    now = 2 * torch.sigmoid(last @ layer.to_input[1].T) * now
    last = 2 * torch.sigmoid(now @ layer.to_hidden[1].T) * last
    now = 2 * torch.sigmoid(last @ layer.to_input[2].T) * now
    wanted, _ = build(LSTMLayer)(now[:, None], (last[None], cell))
    torch.testing.assert_close(layer(x[:, :1], (hidden, cell))[0], wanted)


def test_exponential_gates_are_those_without_stabilizer() -> None:
    """Where nothing overflows, the stabilizer cancels: cell / normalizer is what matters."""
    layer, (x, _) = build(Exponential), window()
    hidden = cell = normalizer = torch.zeros(ROWS, UNITS)
    for now in x.unbind(1):
        gates = now @ layer.weight_ih.T + hidden @ layer.weight_hh.T + layer.bias
        let_in, forget, fresh, out = gates.chunk(4, 1)
        cell = forget.sigmoid() * cell + let_in.exp() * fresh.tanh()
        normalizer = forget.sigmoid() * normalizer + let_in.exp()
        hidden = out.sigmoid() * cell / normalizer
    zeros = torch.zeros(1, ROWS, UNITS)
    torch.testing.assert_close(layer(x, (zeros, zeros))[0][:, -1], hidden, rtol=1e-4, atol=1e-5)


def test_a_normalized_cell_does_not_see_the_scale_of_its_weights() -> None:
    layer, (x, state) = build(Normalized), window()
    before, _ = layer(x, state)
    with torch.no_grad():
        layer.weight_ih *= 3
        layer.weight_hh *= 5
    torch.testing.assert_close(layer(x, state)[0], before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CELLS)
def test_two_windows_are_one(name: str) -> None:
    """A state is carried; in scoring the first rows may go on alone."""
    layer, (x, _) = build(CELLS[name]), window()
    zeros = torch.zeros(1, ROWS, UNITS)
    with torch.no_grad():
        whole, _ = layer(x, (zeros, zeros))
        first, (hidden, cell) = layer(x[:, :5], (zeros, zeros))
        second, _ = layer(x[:2, 5:], (hidden[:, :2], cell[:, :2]))
    torch.testing.assert_close(torch.cat([first[:2], second], 1), whole[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_models_are_built_with_a_cell_only_where_it_is_asked_for(name: str) -> None:
    config = ModelConfig(embedding_dim=16, hidden_size=32, num_layers=2)
    with in_place_of_layers(name):
        built = LSTMLanguageModel(config, 50)
    assert [type(layer) for layer in built.layers] == [CELLS[name]] * 2
    assert [type(layer) for layer in LSTMLanguageModel(config, 50).layers] == [LSTMLayer] * 2
    assert model.LSTMLayer is LSTMLayer
    tokens = torch.arange(12).view(2, 6)
    nats, _ = built(tokens, built.zero_state(2), tokens)
    nats.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())


def test_embedding_dropout_leaves_tokens_out_of_a_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "EMBEDDING_DROPOUT", 0.5)
    unwrapped_model = LSTMLanguageModel(ModelConfig(embedding_dim=16, hidden_size=32), 200)
    progression = SimpleNamespace(step=1)
    learner: Any = SimpleNamespace(
        unwrapped_model=unwrapped_model, config=SimpleNamespace(seed=3), progression=progression
    )
    drop_embeddings(learner)
    tokens = torch.arange(200).repeat(2, 1)

    def kept() -> Tensor:
        rows = unwrapped_model.embedding(tokens)
        whole = torch.nn.functional.embedding(tokens, unwrapped_model.embedding.weight)
        there = rows.abs().sum(2) > 0
        torch.testing.assert_close(rows, 2 * whole * there[..., None])
        assert torch.equal(there[0], there[1])  # wherever the token stands
        return there[0]

    first = kept()
    assert 60 < int(first.sum()) < 140
    assert torch.equal(first, kept())
    progression.step = 2
    assert not torch.equal(first, kept())
    with torch.no_grad():
        torch.testing.assert_close(
            unwrapped_model.embedding(tokens), torch.nn.functional.embedding(tokens, unwrapped_model.embedding.weight)
        )
