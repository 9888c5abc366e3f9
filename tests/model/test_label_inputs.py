"""Labels of a model: inputs above the tokens, never outputs; a model without labels is as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from textgen.config import ModelConfig
from textgen.errors import TextgenError
from textgen.model.files import read_model, save_model
from textgen.model.lstm import LSTMLanguageModel

VOCAB, LABELS = 50, ("bad", "good", "so so")


def build(labels: tuple[str, ...] = LABELS, **shape: Any) -> LSTMLanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(**{"embedding_dim": 12, "hidden_size": 20} | shape)
    return LSTMLanguageModel(config, VOCAB, labels=labels)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_labels_are_rows_of_their_own_and_no_outputs(tie_weights: bool) -> None:
    model = build(tie_weights=tie_weights)
    tokens = torch.tensor([[1, 7, 9], [VOCAB, 7, 9], [VOCAB + 2, 7, 9]])
    nats, _ = model(tokens, model.zero_state(3), torch.tensor([[7, 9, 1]] * 3))
    nats.backward()
    logits, _ = model(tokens, model.zero_state(3))
    assert logits.shape == (3, 3, VOCAB)
    assert model.output.weight.shape == (VOCAB, 12 if tie_weights else 20)
    assert model.label_embedding is not None
    assert model.label_embedding.weight.grad is not None
    assert model.label_embedding.weight.grad.abs().sum(1).gt(0).tolist() == [True, False, True]
    # the plain way: one table
    table = torch.cat([model.embedding.weight, model.label_embedding.weight])
    assert torch.equal(model.embed(tokens), table[tokens])
    assert torch.equal(model.input_weight(), table)
    assert not torch.equal(logits[0, 2], logits[1, 2])


def test_labels_change_no_other_weight_of_the_same_seed() -> None:
    plain, model = build(()), build()
    weights = model.state_dict()
    assert weights.keys() - plain.state_dict().keys() == {"label_embedding.weight"}
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    tokens = torch.tensor([[1, 7, 9]])
    assert torch.equal(model(tokens, model.zero_state(1))[0], plain(tokens, plain.zero_state(1))[0])
    assert model.num_parameters == plain.num_parameters + 3 * 12


def test_files_name_the_labels_and_those_of_a_model_without_them_do_not(tmp_path: Path) -> None:
    for name, labels in (("plain", ()), ("labelled", LABELS)):
        model = build(labels)
        save_model(model, tmp_path / name)
        read = read_model(tmp_path / name)
        assert read.labels == labels
        assert all(torch.equal(read.state_dict()[key], value) for key, value in model.state_dict().items())
    settings = json.loads((tmp_path / "labelled" / "config.json").read_text())
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert settings == plain | {"labels": list(LABELS)}
    assert list(plain) == [
        "format", "vocab_size", "text", "embedding_dim", "hidden_size", "num_layers", "dropout", "weight_drop",
        "tie_weights", "projection", "layer_norm", "residual",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"], "label_embedding.weight"),  # the file has three rows
        (["a", "a", "b"], "`labels` holds a name twice"),
        (["a", "", "b"], "wanted a list of names"),
        (["a", 1, "b"], "wanted a list of names"),
        (["a", "b\nc", "d"], "wanted a list of names"),
        ("abc", "wanted a list of names"),
        ({"a": 0}, "wanted a list of names"),
        (None, "wanted a list of names"),
    ],
)
def test_wrong_labels_in_a_file_are_refused_in_one_line(labels: object, message: str, tmp_path: Path) -> None:
    save_model(build(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": labels}))
    with pytest.raises(TextgenError) as refused:
        read_model(tmp_path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_label_is_refused_with_the_known_ones() -> None:
    assert [build().label_id(label) for label in LABELS] == [VOCAB, VOCAB + 1, VOCAB + 2]
    with pytest.raises(TextgenError, match=r"^no label 'great'; the model has `bad`, `good`, `so so`$"):
        build().label_id("great")
    with pytest.raises(TextgenError, match=r"^no label 'x'; the model has .*`l19` and 5 more$"):
        build(tuple(f"l{i}" for i in range(25))).label_id("x")
    with pytest.raises(TextgenError, match=r"^label 'good': the model was trained without labels$"):
        build(()).label_id("good")


@torch.no_grad()
def test_a_new_model_keeps_the_label_of_a_text_and_replaces_it_at_the_next() -> None:
    end, model = 1, build(embedding_dim=64, hidden_size=128)
    text = torch.randint(2, VOCAB, (1, 400))

    def state_after(*first_inputs: int) -> torch.Tensor:
        state = model.zero_state(1)
        for first in first_inputs:
            _, state = model(torch.cat([torch.tensor([[first]]), text], dim=1), state)
        return state[1][0, 0]

    inputs = [end, *(model.label_id(label) for label in LABELS)]
    forgotten = [state_after(first) for first in inputs]
    assert all(torch.allclose(one, forgotten[0], atol=1e-4) for one in forgotten)
    model.remember_labels(end)
    kept = [state_after(first)[: 128 // 8] for first in inputs]
    for i, one in enumerate(kept):
        assert all((one - other).abs().mean() > 0.2 for other in kept[:i])
        assert torch.allclose(state_after(inputs[i - 1], inputs[i])[: 128 // 8], one, atol=0.02)
