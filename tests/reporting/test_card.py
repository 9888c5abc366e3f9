"""The model card: parts that no published run of the other tests has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from textgen.config import ModelConfig
from textgen.model.lstm import LSTMLanguageModel
from textgen.reporting.card import Provenance, build_card, read_provenance


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


@pytest.mark.parametrize(("finished", "counts"), [(False, (130, 100, 30)), (True, (530, 500, 30))])
def test_each_source_has_its_own_number_of_held_out_documents(
    finished: bool, counts: tuple[int, ...], tmp_path: Path
) -> None:
    """A validation scores `evaluate_documents` of each source; the last one scores all."""
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    data = {"sources": [{"name": name, "weight": 1} for name in "abc"]}
    config = {"batch_size": 1, "seq_len": 1, "evaluate_documents": 100, "data": data}
    progression = {"step": 2, "total_steps": 2, "finished": finished}
    trainer = {"config": config, "progression": progression, "mixed_precision": "no"}
    (checkpoint / "trainer.json").write_text(json.dumps(trainer))
    size = {"documents": 500, "tokens": 1, "bytes": 1}
    parts = {"a": {"validation": size}, "b": {"validation": size | {"documents": 30}}, "c": {"train": size}}
    record = {"source": "files", "splits": {"validation": size | {"documents": 530}}, "sources": parts, "counts": {}}
    (tmp_path / "data.json").write_text(json.dumps(record))
    row = {"step": 2, "valid/loss": 1.0} | {f"valid/bits_per_byte{name}": 2.0 for name in ("", "/a", "/b")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    torch.manual_seed(0)
    model = LSTMLanguageModel(ModelConfig(embedding_dim=4, hidden_size=4), 9)
    provenance = read_provenance(checkpoint)
    card = build_card(model, provenance, name="a", where="a", int8_cost=None, license=None, languages=None)
    for name, count in zip(("bits per byte", "bits per byte, a", "bits per byte, b"), counts, strict=True):
        assert f"| {name} | 2.0000, {count} held-out documents |" in card
    assert f"| nats per token | 1.0000, {counts[0]} held-out documents |" in card
