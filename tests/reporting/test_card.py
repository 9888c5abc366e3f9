"""The model card: parts that no published run of the other tests has."""

from __future__ import annotations

import pytest
import torch

from textgen.config import ModelConfig
from textgen.model.lstm import LSTMLanguageModel
from textgen.reporting.card import Provenance, build_card


@pytest.mark.parametrize("count", [0, 2, 60])
def test_labels_are_named_in_a_block_of_code(count: int) -> None:
    torch.manual_seed(0)
    labels = [f"<b>```{i}" for i in range(count)]
    model = LSTMLanguageModel(ModelConfig(embedding_dim=4, hidden_size=4), 9, labels=labels)
    card = build_card(model, Provenance(), name="a", where="a", int8_cost=None, license=None, languages=None)
    assert ("## Labels" in card) == (count > 0)
    if count:
        (block,) = card.split("````text\n")[1:]
        assert block.split("\n````")[0].splitlines() == labels[:50]
        assert f"one of {count} labels" in card
        assert ("The first 50 are shown." in card) == (count > 50)


def test_a_base_that_is_no_object_is_none() -> None:
    """trainer.json may be a stranger's."""
    torch.manual_seed(0)
    model = LSTMLanguageModel(ModelConfig(embedding_dim=4, hidden_size=4), 9)
    config = {"batch_size": 1, "seq_len": 1}
    trainer = {"base": [1], "config": config, "progression": {"step": 1, "total_steps": 1}, "mixed_precision": "no"}
    card = build_card(
        model, Provenance(trainer=trainer), name="a", where="a", int8_cost=None, license=None, languages=None
    )
    assert "base_model" not in card
    assert "## Base" not in card
