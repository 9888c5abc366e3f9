"""Filters against brute force, draws against the probabilities they should have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from textgen.config import SamplingConfig
from textgen.sampling import draw, keep_top_k, keep_top_p

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=24)


def kept(filtered: Tensor) -> set[int]:
    return {i for i, value in enumerate(filtered.tolist()) if value != -math.inf}


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    """Return how many standard deviations the chi-square statistic is off its mean."""
    total = sum(counts)
    statistic = sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, probabilities, strict=True))
    return (statistic - len(counts) + 1) / math.sqrt(2 * (len(counts) - 1))


def draw_many(logits: Tensor, config: SamplingConfig, count: int, *, step: int = 0) -> list[int]:
    drawn = draw(logits.expand(count, -1), config, samples=torch.arange(count), step=step)
    return torch.bincount(drawn, minlength=logits.shape[-1]).tolist()


@settings(deadline=None)
@given(values=LOGITS, k=st.integers(1, 30))
def test_top_k_equals_brute_force(values: list[float], k: int) -> None:
    logits = torch.tensor(values)
    threshold = sorted(logits.tolist(), reverse=True)[min(k, len(values)) - 1]
    filtered = keep_top_k(logits, k)
    assert kept(filtered) == {i for i, value in enumerate(logits.tolist()) if value >= threshold}
    assert all(filtered[i] == logits[i] for i in kept(filtered))


@settings(deadline=None)
@given(values=LOGITS, p=st.floats(0.01, 1))
def test_top_p_equals_brute_force(values: list[float], p: float) -> None:
    logits = torch.tensor(values)
    probabilities = softmax(logits.tolist())
    nucleus: set[int] = set()
    mass = 0.0
    for i in sorted(range(len(values)), key=lambda i: (-logits[i].item(), i)):
        assume(p == 1 or abs(mass - p) > 1e-5)  # float32 may see it on the other side
        if mass < p or p == 1:
            nucleus.add(i)
        mass += probabilities[i]
    filtered = keep_top_p(logits, p)
    assert kept(filtered) == nucleus
    assert all(filtered[i] == logits[i] for i in nucleus)


@settings(deadline=None)
@given(rows=st.integers(1, 4), seed=st.integers(0, 1000))
def test_filters_treat_every_row_alone(rows: int, seed: int) -> None:
    logits = torch.randn(rows, 2, 11, generator=torch.Generator().manual_seed(seed))
    for one in (lambda x: keep_top_k(x, 3), lambda x: keep_top_p(x, 0.7)):
        alone = torch.stack([torch.stack([one(part) for part in row]) for row in logits])
        assert torch.equal(one(logits), alone)


def test_top_p_of_one_keeps_every_token_of_a_large_vocabulary() -> None:
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 4
    assert len(kept(keep_top_p(logits, 1.0))) == 50_000


def test_top_p_keeps_the_likeliest_token_however_small_p_is() -> None:
    for p in (0.3, 1e-9, 1e-50):  # the last is 0 in float32
        assert kept(keep_top_p(torch.tensor([0.0, 1.0, 0.5]), p)) == {1}


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = torch.randn(50, 31, generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(temperature=0)
    assert torch.equal(draw(logits, config, samples=torch.arange(50), step=3), logits.argmax(-1))


@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1e-42, 1e-310])
def test_tiny_temperatures_go_to_the_likeliest_token(temperature: float, top_p: float | None) -> None:
    logits = 50 + torch.randn(50, 31, generator=torch.Generator().manual_seed(1))
    logits[:, 7] = 60  # over 1e-37 it is infinite in float32, as are the others; 1e-310 is 0
    config = SamplingConfig(temperature=temperature, top_p=top_p)
    assert draw(logits, config, samples=torch.arange(50), step=0).tolist() == [7] * 50


@pytest.mark.parametrize(
    "settings_",
    [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9}],
)
def test_draws_follow_the_softmax(settings_: dict[str, Any]) -> None:
    config = SamplingConfig(seed=3, **settings_)
    logits = torch.tensor([1.5, 0.3, -0.2, 2.0, -1.0, 0.9, -0.7, 1.1])
    values = [value / config.temperature for value in logits.tolist()]
    by_rank = sorted(range(8), key=lambda i: -values[i])
    allowed = by_rank[: config.top_k or 8]
    if config.top_p is not None:
        chances = softmax([values[i] for i in allowed])
        allowed = [i for n, i in enumerate(allowed) if math.fsum(chances[:n]) < config.top_p]
    assert len(allowed) > 1
    counts = draw_many(logits, config, 20_000)
    assert sum(counts[i] for i in allowed) == 20_000
    assert abs(chi_square([counts[i] for i in allowed], softmax([values[i] for i in allowed]))) < 4


def test_draws_of_successive_steps_are_independent() -> None:
    config, logits, count = SamplingConfig(seed=5), torch.zeros(6), 36_000
    samples = torch.arange(count)
    one, two = (draw(logits.expand(count, -1), config, samples=samples, step=step) for step in (0, 1))
    pairs = torch.bincount(one * 6 + two, minlength=36).tolist()
    assert abs(chi_square(pairs, [1 / 36] * 36)) < 4


def test_a_row_is_drawn_the_same_in_any_batch() -> None:
    config = SamplingConfig(seed=8, top_p=0.95)
    logits = torch.randn(12, 100, generator=torch.Generator().manual_seed(2))
    samples = torch.arange(12) * 1000 + 7
    together = draw(logits, config, samples=samples, step=4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(logits[order], config, samples=samples[order], step=4), together[order])
    for row in range(12):
        alone = draw(logits[row : row + 1], config, samples=samples[row : row + 1], step=4)
        assert int(alone) == int(together[row])


def test_the_draw_does_not_touch_its_logits_or_torchs_generator() -> None:
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))
    before, state = logits.clone(), torch.get_rng_state()
    draw(logits, SamplingConfig(temperature=0.5, top_k=3, top_p=0.5), samples=torch.arange(3), step=0)
    assert torch.equal(logits, before)
    assert torch.equal(state, torch.get_rng_state())


def test_seed_sample_and_step_each_change_the_noise() -> None:
    logits = torch.zeros(1, 10_000)

    def token(seed: int, sample: int, step: int) -> int:
        return int(draw(logits, SamplingConfig(seed=seed), samples=torch.tensor([sample]), step=step))

    assert len({token(1, 2, 3), token(2, 2, 3), token(1, 3, 3), token(1, 2, 4), token(3, 2, 1)}) == 5


def test_a_token_at_minus_infinity_is_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, 0.0])
    for config in (
        SamplingConfig(),
        SamplingConfig(top_k=3),
        SamplingConfig(top_p=0.99),
        SamplingConfig(temperature=9),
    ):
        assert draw_many(logits, config, 3000)[0] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan), ("temperature", -0.1), ("temperature", math.inf),
        ("top_k", 0), ("top_k", -1), ("top_k", math.nan),
        ("top_p", 0.0), ("top_p", -0.5), ("top_p", 1.1), ("top_p", math.nan),
        ("max_new_tokens", 0), ("max_new_tokens", -5), ("max_new_tokens", math.nan),
        ("seed", -1), ("seed", 1 << 63), ("seed", math.nan),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` must be .*: {value}$".replace("+", r"\+")):
        SamplingConfig(**{name: value})
