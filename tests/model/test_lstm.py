"""The model against torch's own layers and losses, and against the files it writes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import textgen.model.lstm
from textgen.config import ModelConfig
from textgen.errors import TextgenError
from textgen.model.files import read_model, save_model
from textgen.model.lstm import DropoutMasks, LSTMLanguageModel, LSTMLayer, summed_cross_entropy

VOCAB = 61
SHAPES = [
    {},
    {"tie_weights": False},
    {"layer_norm": True, "residual": True},
    {"hidden_size": 12, "num_layers": 3, "layer_norm": True, "tie_weights": False},
    {"num_layers": 1},
]


def build(seed: int = 0, **shape: Any) -> LSTMLanguageModel:
    torch.manual_seed(seed)
    return LSTMLanguageModel(ModelConfig(**{"embedding_dim": 12, "hidden_size": 20} | shape), VOCAB)


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def relative(seen: Tensor, wanted: Tensor) -> float:
    return float((seen - wanted).detach().norm() / wanted.detach().norm())


# --- the loss --------------------------------------------------------------------------------------------------------


def output_layer(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x (300, 64), weight (500, 64), bias (500,) and targets (300,), some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 64, generator=generator, requires_grad=True)
    weight = (torch.randn(500, 64, generator=generator) * 0.2).requires_grad_()
    bias = torch.randn(500, generator=generator, requires_grad=True)
    targets = torch.randint(0, 500, (300,), generator=generator)
    targets[torch.rand(300, generator=generator) < 0.2] = -1
    return x, weight, bias, targets


def reference(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), targets, ignore_index=-1, reduction="sum")


# logits alive at a time: one row, a chunk that 300 rows do not fill evenly, one row less than all, all
@pytest.mark.parametrize("chunk", [1, 500 * 7, 500 * 299, 1 << 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_summed_cross_entropy_equals_torchs_with_any_chunk(
    monkeypatch: pytest.MonkeyPatch, chunk: int, seed: int
) -> None:
    monkeypatch.setattr(textgen.model.lstm, "LOGITS_CHUNK", {"cpu": chunk})
    x, weight, bias, targets = output_layer(seed)
    wanted = reference(x, weight, bias, targets)
    seen = summed_cross_entropy(x, weight, bias, targets)
    assert seen.item() == pytest.approx(wanted.item(), rel=1e-6)
    wanted_gradients = torch.autograd.grad(wanted * 0.37, (x, weight, bias))
    for a, b in zip(torch.autograd.grad(seen * 0.37, (x, weight, bias)), wanted_gradients, strict=True):
        assert relative(a, b) < 1e-5


def test_summed_cross_entropy_under_no_grad_is_the_same_number() -> None:
    x, weight, bias, targets = output_layer(2)
    with torch.no_grad():
        alone = summed_cross_entropy(x, weight, bias, targets)
    assert not alone.requires_grad
    assert alone.item() == summed_cross_entropy(x, weight, bias, targets).item()


def test_targets_of_minus_one_score_nothing_and_move_nothing() -> None:
    x, weight, bias, targets = output_layer(3)
    nats = summed_cross_entropy(x, weight, bias, torch.full_like(targets, -1))
    assert nats.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(nats, (x, weight, bias)))


def test_summed_cross_entropy_survives_huge_logits() -> None:
    x, weight, bias, targets = output_layer(4)
    with torch.no_grad():
        x *= 1000
    wanted = reference(x, weight, bias, targets)
    seen = summed_cross_entropy(x, weight, bias, targets)
    assert seen.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(seen, (x, weight, bias)))


@pytest.mark.parametrize("seed", range(5))
def test_summed_cross_entropy_under_bf16_autocast_stays_in_its_band(seed: int) -> None:
    # measured 2026-11-23 on these seeds: value within 4e-5 of float32, gradients within 3e-3 in norm
    x, weight, bias, targets = output_layer(seed)
    wanted = reference(x, weight, bias, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = summed_cross_entropy(x, weight, bias, targets)
    assert seen.dtype == torch.float32
    assert abs(seen.item() / wanted.item() - 1) < 1e-4
    assert seen.item() != wanted.item()  # products really were in bfloat16
    wanted_gradients = torch.autograd.grad(wanted, (x, weight, bias))
    for a, b in zip(torch.autograd.grad(seen, (x, weight, bias)), wanted_gradients, strict=True):
        assert a.dtype == torch.float32
        assert relative(a, b) < 6e-3


# --- the layer -------------------------------------------------------------------------------------------------------


def test_layer_equals_torch_lstm_with_the_same_weights() -> None:
    torch.manual_seed(1)
    ours, theirs = LSTMLayer(7, 11), nn.LSTM(7, 11, batch_first=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            nn.init.normal_(parameter, std=0.3)
        theirs.weight_ih_l0.copy_(ours.weight_ih)
        theirs.weight_hh_l0.copy_(ours.weight_hh)
        theirs.bias_ih_l0.copy_(ours.bias * 0.25)
        theirs.bias_hh_l0.copy_(ours.bias * 0.75)
    x, state = torch.randn(3, 9, 7), (torch.randn(1, 3, 11), torch.randn(1, 3, 11))
    y, (hidden, cell) = ours(x, state)
    wanted, (wanted_hidden, wanted_cell) = theirs(x, state)
    for a, b in ((y, wanted), (hidden, wanted_hidden), (cell, wanted_cell)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    y.square().sum().backward()
    wanted.square().sum().backward()
    assert relative(ours.weight_hh.grad, theirs.weight_hh_l0.grad) < 1e-5
    assert relative(ours.bias.grad, theirs.bias_ih_l0.grad) < 1e-5


def test_layer_computes_in_autocasts_dtype_and_in_float32_without() -> None:
    torch.manual_seed(1)
    layer, x = LSTMLayer(8, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    state = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)
    exact, exact_state = layer(x, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, low_state = layer(x, state)
    assert {t.dtype for t in (exact, *exact_state)} == {torch.float32}
    assert {t.dtype for t in (low, *low_state)} == {torch.bfloat16}
    assert 0 < relative(low.float(), exact) < 2e-2
    low.float().sum().backward()
    assert {p.dtype for p in layer.parameters()} == {p.grad.dtype for p in layer.parameters()} == {torch.float32}


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_one_forward_equals_token_by_token_decoding(shape: dict[str, Any]) -> None:
    model, tokens = build(**shape), random_tokens(3, 17)
    whole, whole_state = model(tokens, model.zero_state(3))
    state, steps = model.zero_state(3), []
    for time_ in range(17):
        logits, state = model(tokens[:, time_ : time_ + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(state, whole_state, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_of_a_window_equals_cross_entropy_of_its_logits(shape: dict[str, Any]) -> None:
    model, tokens, targets = build(**shape), random_tokens(3, 17), random_tokens(3, 17, seed=1)
    targets[1, 5:] = -1
    logits, _ = model(tokens, model.zero_state(3))
    nats, _ = model(tokens, model.zero_state(3), targets)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    assert nats.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_state_carries_the_past() -> None:
    model, tokens = build(), random_tokens(2, 8)
    _, state = model(tokens, model.zero_state(2))
    carried, fresh = (model(tokens, s)[0] for s in (state, model.zero_state(2)))
    assert relative(carried, fresh) > 1e-3


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    model, tokens = build(layer_norm=True, residual=True), random_tokens(4, 9)
    whole, _ = model(tokens, model.zero_state(4))
    for row in range(4):
        alone, _ = model(tokens[row : row + 1], model.zero_state(1))
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_initial_output_bias_gives_the_unigram_loss(tie_weights: bool) -> None:
    # without LayerNorm: it lifts the features to unit size, and the loss at step 0 by up to half a nat
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 2000, (500,), generator=generator) ** 3
    chances = counts.double() / counts.sum()
    tokens = torch.multinomial(chances, 64 * 33, replacement=True, generator=generator).view(64, 33)
    unigram = -chances.log()[tokens[:, 1:]].mean().item()
    config = ModelConfig(embedding_dim=64, hidden_size=96, tie_weights=tie_weights)
    losses = {}
    for given in (counts, None):
        torch.manual_seed(0)
        model = LSTMLanguageModel(config, 500, unigram_counts=given)
        nats, _ = model(tokens[:, :-1], model.zero_state(64), tokens[:, 1:])
        losses[given is None] = nats.item() / (64 * 32)
    assert losses[False] == pytest.approx(unigram, rel=2e-3)
    assert losses[True] > unigram + 0.3


def test_a_token_that_training_text_never_holds_has_a_finite_bias() -> None:
    model = LSTMLanguageModel(ModelConfig(embedding_dim=4, hidden_size=4), 3, unigram_counts=torch.tensor([0, 5, 9]))
    assert model.output.bias.exp().tolist() == pytest.approx([1 / 17, 6 / 17, 10 / 17])


def test_tied_output_is_the_embedding_and_is_counted_once() -> None:
    tied, untied = build(), build(tie_weights=False, embedding_dim=20)
    assert tied.output.weight is tied.embedding.weight
    assert untied.output.weight is not untied.embedding.weight
    assert tied.num_parameters == sum(t.numel() for t in tied.state_tensors().values())
    assert "output.weight" not in tied.state_tensors()


# --- dropout ---------------------------------------------------------------------------------------------------------


def masks_for(lanes: Tensor, *, seed: int = 3, step: int = 5) -> DropoutMasks:
    return DropoutMasks(seed, step, lanes)


@pytest.mark.parametrize("cuts", [[0, 8], [0, 4, 8], [0, 1, 2, 8], [0, 3, 5, 8]])
def test_dropout_is_the_same_however_the_rows_are_split(cuts: list[int]) -> None:
    model, tokens, lanes = build(dropout=0.4), random_tokens(8, 6), torch.arange(8) + 100
    whole, _ = model(tokens, model.zero_state(8), masks=masks_for(lanes))
    parts = [
        model(tokens[a:b], model.zero_state(b - a), masks=masks_for(lanes[a:b]))[0] for a, b in pairwise(cuts)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_dropout_depends_on_seed_step_lane_and_site_and_on_nothing_else() -> None:
    model, x, lanes = build(dropout=0.5), torch.ones(4, 2, 200), torch.arange(4)

    def zeros(site: int = 1, **coordinates: Any) -> Tensor:
        return model._drop(x, DropoutMasks(**{"seed": 3, "step": 5, "lanes": lanes} | coordinates), site) == 0

    base = zeros()
    torch.manual_seed(1)
    assert torch.equal(base, zeros())
    for other in (zeros(seed=4), zeros(step=6), zeros(site=2), zeros(lanes=lanes + 4)):
        assert 0.4 < float((other != base).float().mean()) < 0.6  # independent
    assert torch.equal(zeros(lanes=lanes.flip(0)), base.flip(0))


def test_dropout_is_locked_over_time_and_keeps_the_expected_value() -> None:
    model, x = build(dropout=0.3), torch.ones(400, 5, 500)
    dropped = model._drop(x, masks_for(torch.arange(400)), 0)
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    # 200,000 masks: the mean of all is within 4 standard errors, 0.0015 each
    assert float(dropped[:, 0].mean()) == pytest.approx(1, abs=0.006)


def test_dropout_is_off_without_masks_and_at_zero() -> None:
    tokens, masks = random_tokens(4, 6), masks_for(torch.arange(4))
    plain, dropping = build(), build(dropout=0.5)
    wanted, _ = plain(tokens, plain.zero_state(4))
    for training in (True, False):
        for model, given in ((plain, masks), (dropping, None), (plain, None)):
            seen, _ = model.train(training)(tokens, model.zero_state(4), masks=given)
            assert torch.equal(seen, wanted)
    dropped, _ = dropping(tokens, dropping.zero_state(4), masks=masks)
    assert relative(dropped, wanted) > 1e-2


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load_give_the_same_bits(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = build(seed=4, dropout=0.25, **shape)
    model.text = {"tokenizer_sha256": "ab", "normalization": "lowercase"}
    save_model(model, tmp_path / "deep" / "model")
    torch.manual_seed(99)
    back = read_model(tmp_path / "deep" / "model")
    assert (back.config, back.vocab_size, back.text) == (model.config, VOCAB, model.text)
    own, theirs = model.state_dict(), back.state_dict()
    assert own.keys() == theirs.keys()
    assert [name for name in own if not torch.equal(own[name], theirs[name])] == []
    tokens = random_tokens(2, 5)
    assert torch.equal(model(tokens, model.zero_state(2))[0], back(tokens, back.zero_state(2))[0])
    assert (back.output.weight is back.embedding.weight) == model.config.tie_weights


@pytest.mark.parametrize(("embedding_dim", "hidden_size", "has_one"), [(20, 20, False), (12, 20, True)])
def test_a_model_older_than_the_setting_has_a_projection_where_sizes_differ(
    tmp_path: Path, embedding_dim: int, hidden_size: int, has_one: bool
) -> None:
    model = build(embedding_dim=embedding_dim, hidden_size=hidden_size, projection=has_one)
    assert isinstance(model.projection, nn.Linear) == has_one
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["projection"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = read_model(tmp_path)
    assert back.config == model.config
    assert back.state_shapes() == model.state_shapes()


def test_a_tied_output_has_a_projection_also_where_sizes_are_equal() -> None:
    assert isinstance(build(embedding_dim=20, hidden_size=20).projection, nn.Linear)
    assert not isinstance(build(embedding_dim=20, hidden_size=20, tie_weights=False).projection, nn.Linear)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_weights_in_one_storage_are_saved_one_by_one(tmp_path: Path, tie_weights: bool) -> None:
    model = build(tie_weights=tie_weights)
    wanted = model.state_tensors()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])  # as cuDNN's flatten_parameters lays them
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    save_model(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * flat.numel() + 4096
    back = read_model(tmp_path).state_tensors()
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[name], wanted[name]) for name in wanted)


def test_a_column_major_weight_is_saved_by_value(tmp_path: Path) -> None:
    model = build()
    layer = model.layers[0]
    layer.weight_hh.data = layer.weight_hh.data.T.contiguous().T
    assert not layer.weight_hh.is_contiguous()
    save_model(model, tmp_path)
    back = read_model(tmp_path)
    assert torch.equal(back.layers[0].weight_hh, layer.weight_hh)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_model(build(), tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {"config.json": mode, "model.safetensors": mode}


def test_state_tensors_are_the_weights_themselves_uncopied_and_without_a_gradient() -> None:
    model = build()
    tensors = model.state_tensors()
    assert {name: t.data_ptr() for name, t in tensors.items()} == {n: p.data_ptr() for n, p in model.named_parameters()}
    tensors["output.bias"].add_(1)
    assert torch.equal(model.output.bias, tensors["output.bias"])
    assert not any(t.requires_grad for t in tensors.values())


def damage_nothing(directory: Path) -> None:
    (directory / "config.json").unlink()


def damage_weights_away(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def damage_truncated_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_garbage_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\x80\x04\x95 a pickle\n.")


def damage_empty_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def damage_truncated_config(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text()[:40])


def damage_binary_config(directory: Path) -> None:
    (directory / "config.json").write_bytes(b"\xff\xfe\n\x00")


def damage_foreign_config(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 50257}))


def damage_list_config(directory: Path) -> None:
    (directory / "config.json").write_text("[1, 2]")


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def damage_no_vocab(directory: Path) -> None:
    change_config(directory, vocab_size=None)


def damage_negative_vocab(directory: Path) -> None:
    change_config(directory, vocab_size=-3)


def damage_unknown_setting(directory: Path) -> None:
    change_config(directory, heads=8)


def damage_other_shape(directory: Path) -> None:
    change_config(directory, hidden_size=24)


def damage_other_layers(directory: Path) -> None:
    change_config(directory, num_layers=3)


def damage_bool_layers(directory: Path) -> None:
    save_model(build(num_layers=1), directory)
    change_config(directory, num_layers=True)


def damage_switch_in_words(directory: Path) -> None:
    change_config(directory, tie_weights="no")


def damage_text_list(directory: Path) -> None:
    change_config(directory, text=[["tokenizer_sha256", "ab"]])


def damage_text_number(directory: Path) -> None:
    change_config(directory, text={"normalization": 1})


def damage_foreign_weights(directory: Path) -> None:
    save_file({"wte.weight": torch.zeros(3, 3)}, directory / "model.safetensors")


DAMAGES = {
    damage_nothing: "no `config.json`",
    damage_weights_away: "model.safetensors` cannot be read: No such file or directory",
    damage_truncated_weights: "bytes of data, its header says",
    damage_garbage_weights: "not a tensor file of textgen",
    damage_empty_weights: "not a tensor file of textgen",
    damage_truncated_config: "no readable model",
    damage_binary_config: "no readable model",
    damage_foreign_config: "not a textgen model",
    damage_list_config: "no readable model",
    damage_no_vocab: "vocab_size",
    damage_negative_vocab: "no readable model",
    damage_unknown_setting: "heads",
    damage_other_shape: "`layers.0.bias` is F32 [80], wanted F32 [96]",
    damage_other_layers: "other tensors than expected: 'layers.2.bias'",
    damage_bool_layers: "`num_layers` is True, wanted int",
    damage_switch_in_words: "`tie_weights` is 'no', wanted bool",
    damage_text_list: "`text` does not hold texts",
    damage_text_number: "`text` does not hold texts",
    damage_foreign_weights: "too few tensors for 2 layers",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_a_damaged_or_foreign_model_is_refused_in_one_line(tmp_path: Path, damage: Any) -> None:
    save_model(build(), tmp_path)
    damage(tmp_path)
    with pytest.raises(TextgenError) as caught:
        read_model(tmp_path)
    assert DAMAGES[damage] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c"])
def test_a_missing_directory_is_refused_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextgenError, match=r"has no `config.json`: not a checkpoint directory"):
        read_model(name)


def test_an_unreachable_hub_is_one_line_and_quick(tmp_path: Path) -> None:
    script = (
        "import time\nfrom textgen.errors import TextgenError\nfrom textgen.model.files import read_model\n"
        "started = time.perf_counter()\n"
        "try:\n    read_model('nobody/nothing')\n"
        "except TextgenError as error:\n    print(error)\nprint(time.perf_counter() - started)"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    started = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    message, seconds = ended.stdout.splitlines()
    assert message.startswith("`nobody/nothing` is not a directory and cannot be read from the hub: ")
    assert float(seconds) < 10, f"the whole process took {time.perf_counter() - started:.1f} s"


def test_the_weights_file_is_plain_safetensors(tmp_path: Path) -> None:
    model = build()
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == model.state_tensors().keys()
    assert {t.dtype for t in tensors.values()} == {torch.float32}
