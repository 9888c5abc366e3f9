"""What is measured of the quality of learning, and a small training that must learn as well as it did."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import quality
from benchmarks.quality import (
    GROUPS,
    GUARD,
    RECORDED,
    Law,
    Point,
    Recipe,
    fit,
    guard,
    identity,
    levers,
    run_all,
    settings_of,
    table,
    worth,
)
from textgen.cli import train_main
from textgen.config import DataConfig, ModelConfig
from textgen.model.lstm import DropoutMasks, LSTMLanguageModel
from textgen.runs.metrics_file import read_metrics


def finished(recipe: Recipe, seed: int, bits_per_byte: float) -> dict[str, Any]:
    return {"recipe": "any", **identity(recipe, seed), "bits_per_byte": bits_per_byte}


@pytest.mark.parametrize("group", GROUPS)
def test_every_recipe_has_settings_that_are_allowed_and_its_own(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "subset_of_reviews", lambda every: DataConfig(source="files", files=(str(tmp_path),)))
    recipes = GROUPS[group]()
    for recipe in recipes.values():
        assert settings_of(recipe, 3).seed == 3
    assert len({json.dumps(identity(recipe, 0)) for recipe in recipes.values()}) == len(recipes)


def test_a_finished_run_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = levers()["baseline"]
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(finished(recipe, 1, 2.0)) + "\n")
    before = path.read_bytes()
    run_all({"baseline": recipe}, [1], path, jobs=1)
    assert path.read_bytes() == before
    assert capsys.readouterr().out == ""


def test_recipes_are_compared_seed_by_seed() -> None:
    one, other = levers()["baseline"], levers()["dropout 0.1"]
    rows = [finished(one, seed, bits) for seed, bits in ((1, 2.00), (2, 2.10), (3, 2.20))]
    rows += [finished(other, seed, bits) for seed, bits in ((1, 1.95), (2, 2.06))]
    lines = list(table({"one": one, "other": other}, rows))
    assert lines[2:] == [
        "| one | 3 | 2.1000 | 0.1000 | - |",
        "| other | 2 | 2.0050 | 0.0778 | -0.0450 ± 0.0050 |",
    ]


def test_a_law_is_found_again_and_predicts_a_larger_run() -> None:
    law = Law(floor=1.0, of_size=40.0, size_exponent=0.35, of_text=900.0, text_exponent=0.5, patience=8.0)
    draw = random.Random(0)
    runs = [(n, read, unique) for n in (2e5, 5e5, 2e6) for read in (1e6, 2e6, 4e6) for unique in (5e5, 8e6)]
    laws = fit([Point(*run, law(*run) + draw.gauss(0, 0.002)) for run in runs])
    assert laws[0][0] < 0.003
    for larger in ((2e6, 1.6e7, 8e6), (4e6, 1e7, 1e6)):
        told = [each(*larger) for error, each in laws if error <= 2 * laws[0][0]]
        assert told[0] == pytest.approx(law(*larger), abs=0.02)
        assert min(told) <= law(*larger) <= max(told)


def test_text_that_is_read_again_is_worth_less_each_time() -> None:
    worths = [worth(passes * 100.0, 100.0, patience=8.0) for passes in (0.5, 1, 2, 3, 1000)]
    assert worths[:2] == [50, 100]
    assert 190 < worths[2] < 200
    assert worths[3] - worths[2] < worths[2] - worths[1]
    assert worths[4] == pytest.approx(900)  # all repetitions together: 8 times the text


def test_an_unknown_recipe_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        quality.main(["levers", "--only", "magic"])
    assert refused.value.code == 2
    assert "no recipe `magic` in levers; it has baseline, " in capsys.readouterr().err.splitlines()[-1]


# --- what a step leaves out ------------------------------------------------------------------------------------------


def model_that_drops(**settings: float) -> LSTMLanguageModel:
    torch.manual_seed(0)
    return LSTMLanguageModel(ModelConfig(embedding_dim=64, hidden_size=50, **settings), 1000)  # type: ignore[arg-type]


def masks_of(seed: int = 3, step: int = 5, lanes: int = 4) -> DropoutMasks:
    return DropoutMasks(seed, step, torch.arange(lanes))


def test_weight_drop_has_one_mask_a_step_of_the_share_that_is_asked_for() -> None:
    model = model_that_drops(weight_drop=0.2)
    mask = model.weight_mask(masks_of(), 0)
    assert mask is not None
    assert mask.shape == model.layers[0].weight_hh.shape  # 10,000 weights
    share = round(0.2 * 256) / 256
    assert sorted(mask.unique().tolist()) == pytest.approx([0, 1 / (1 - share)])
    assert float(mask.mean()) == pytest.approx(1, abs=4 * (share / (1 - share) / mask.numel()) ** 0.5)
    assert torch.equal(mask, model.weight_mask(masks_of(lanes=2), 0))
    for other in (model.weight_mask(masks_of(seed=4), 0), model.weight_mask(masks_of(step=6), 0),
                  model.weight_mask(masks_of(), 1)):  # fmt: skip
        assert other is not None
        assert 0.29 < float((other != mask).float().mean()) < 0.35  # 0.32 where they are independent


def test_weight_drop_multiplies_the_recurrent_weights_and_their_gradient() -> None:
    model, tokens = model_that_drops(weight_drop=0.5), torch.arange(24).reshape(4, 6)
    nats, _ = model(tokens, model.zero_state(4), tokens, masks=masks_of())
    nats.backward()
    masks = [model.weight_mask(masks_of(), i) for i in range(2)]
    for layer, mask in zip(model.layers, masks, strict=True):
        assert torch.equal(layer.weight_hh.grad == 0, mask == 0)
        layer.weight_hh.data *= mask
    again, _ = model(tokens, model.zero_state(4), tokens)
    assert again.item() == pytest.approx(nats.item(), rel=1e-6)


def test_scoring_leaves_nothing_out() -> None:
    tokens, plain, dropping = torch.arange(24).reshape(4, 6), model_that_drops(), model_that_drops(weight_drop=0.5)
    wanted, _ = plain(tokens, plain.zero_state(4))
    assert torch.equal(dropping(tokens, dropping.zero_state(4))[0], wanted)
    assert torch.equal(plain(tokens, plain.zero_state(4), masks=masks_of())[0], wanted)
    assert not torch.equal(dropping(tokens, dropping.zero_state(4), masks=masks_of())[0], wanted)


def test_micro_batches_leave_out_the_same(tiny_flags: list[str], tmp_path: Path) -> None:
    losses = []
    for share, micro_batches in (("0.3", "1"), ("0.3", "4"), ("0", "1")):
        run_dir = tmp_path / f"{share}-{micro_batches}"
        flags = ["--run_dir", str(run_dir), "--log_every", "1", "--model.weight_drop", share]
        train_main([*tiny_flags, *flags, "--gradient_accumulation_steps", micro_batches])
        losses.append([row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-5)


# --- the guard -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_training_learns_as_well_as_recorded() -> None:
    bits = guard()
    assert RECORDED.holds(bits), f"{bits}, recorded {RECORDED}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [GUARD.but("carried state"), GUARD.but("unigram bias"), GUARD.but(lr_schedule="constant")],
    ids=["state is lost between windows", "output bias begins at zero", "rate does not decay"],
)
def test_the_guard_notices_when(broken: Recipe) -> None:
    bits = guard(broken)
    assert not RECORDED.holds(bits), f"{bits}, recorded {RECORDED}"
