"""Scores and pooled states of a batch are those of each text alone, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from textgen.classification import reading
from textgen.classification.reading import label_scores, pooled_states
from textgen.config import ModelConfig
from textgen.data.side_by_side import Tokens
from textgen.model.lstm import LSTMLanguageModel

END = 0
LABELS = ["bad", "good"]


@pytest.fixture(params=[1, 2], ids=["one layer", "two layers"])
def model(request: pytest.FixtureRequest) -> LSTMLanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(embedding_dim=8, hidden_size=8, num_layers=request.param)
    return LSTMLanguageModel(config, 20, labels=LABELS).eval()


@pytest.fixture
def documents() -> list[Tokens]:
    """Return texts of many lengths, also of the end alone and of whole windows."""
    draw = np.random.default_rng(0)
    return [np.append(draw.integers(1, 20, length), END) for length in (9, 0, 1, 6, 7, 30, 13, 14, 3)]


def test_label_scores_without_float64_are_the_same_up_to_rounding(
    model: LSTMLanguageModel, documents: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = label_scores(model, documents, [20, 21])
    monkeypatch.setattr(reading, "sum_dtype", lambda _: torch.float32)
    found = label_scores(model, documents, [20, 21])
    assert np.array_equal(found, found.astype(np.float32))
    assert not np.array_equal(wanted, found)
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_label_scores_are_the_sums_of_token_logprobs(
    model: LSTMLanguageModel, documents: list[Tokens], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WINDOW", 7)
    scores = label_scores(model, documents, [20, 21, END], batch_size=batch_size)
    for row, document in enumerate(documents):
        for column, begin in enumerate((20, 21, END)):
            x = torch.tensor([[begin, *document[:-1]]])
            with torch.inference_mode():
                logits, _ = model(x, model.zero_state(1))
            wanted = logits[0].log_softmax(-1)[range(len(document)), document].sum()
            assert scores[row, column] == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_pooled_states_are_the_last_the_mean_and_the_largest_outputs(
    model: LSTMLanguageModel, documents: list[Tokens], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WINDOW", 7)
    pooled = pooled_states(model, documents, END, batch_size=batch_size)
    for row, document in enumerate(documents):
        x = torch.tensor([[END, *document[:-1]]])
        hidden, cell = model.zero_state(1)
        states = [(hidden[i : i + 1], cell[i : i + 1]) for i in range(len(hidden))]
        with torch.inference_mode():
            output = model.run_layers(model.embed(x), states, None)[0][0]  # (time, hidden_size)
        wanted = torch.cat([output[-1], output.mean(0), output.amax(0)])
        np.testing.assert_allclose(pooled[row], wanted, atol=1e-6)
