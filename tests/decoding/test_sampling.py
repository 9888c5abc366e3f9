"""Filters against brute force, draws against the probabilities they should have."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from textgen.config import SamplingConfig
from textgen.decoding.sampling import (
    HISTORY,
    PARTIAL_SORT,
    SamplingState,
    ban_repeated_ngrams,
    join_sampling_states,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    new_sampling_state,
    penalize_counts,
    penalize_repetition,
    process_logits,
    record_tokens,
    select_sampling_state,
)
from textgen.decoding.sampling import draw as draw_controlled
from textgen.noise import exponential, hash_bits

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=24)
CPU = torch.device("cpu")
MILLION = 1_000_000


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


def draw(logits: Tensor, config: SamplingConfig, *, samples: Tensor, step: int) -> Tensor:
    """Draw a token for each row, all of them under one config."""
    size = logits.shape[-1]
    one = new_sampling_state(config, [], 0, vocab_size=size, device=CPU)
    rows = {name: value.expand(len(samples), *value.shape[1:]) for name, value in one.tensors.items()}
    rows |= {"key": hash_bits(config.seed, samples), "step": torch.full_like(samples, step)}
    state = dataclasses.replace(one, tensors=rows)
    return draw_controlled(process_logits(logits, state, eos_id=0), state)


def draw_many(
    logits: Tensor, config: SamplingConfig, count: int, *, prompt: Sequence[int] = (), drawn: Sequence[int] = ()
) -> list[int]:
    """Return how often each token is drawn in `count` samples after a prompt and some tokens."""
    one = new_sampling_state(config, prompt, 0, vocab_size=logits.shape[-1], device=CPU, bias=biases(config))
    for token in drawn:
        record_tokens(one, torch.tensor([token]))
    controlled = process_logits(logits[None], one, eos_id=0)
    rows = {name: value.expand(count, *value.shape[1:]) for name, value in one.tensors.items()}
    rows["key"] = hash_bits(config.seed, torch.arange(count))
    tokens = draw_controlled(controlled.expand(count, -1), dataclasses.replace(one, tensors=rows))
    return torch.bincount(tokens, minlength=logits.shape[-1]).tolist()


# --- filters ---------------------------------------------------------------------------------------------------------


def fewest(order: list[int], probabilities: list[float], mass: float, distance: list[float]) -> set[int]:
    """Return the first of `order` whose probabilities reach `mass`, and those as near as the last of them."""
    chosen: set[int] = set()
    total, last = 0.0, math.inf
    for i in order:
        assume(mass == 1 or abs(total - mass) > 1e-5)  # float32 may see it on the other side
        if total < mass or mass == 1 or distance[i] == last:
            chosen.add(i)
            last = distance[i]
        total += probabilities[i]
    return chosen


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
    exact = logits.tolist()
    order = sorted(range(len(exact)), key=lambda i: -exact[i])
    nucleus = fewest(order, softmax(exact), p, exact)
    filtered = keep_top_p(logits, p)
    assert kept(filtered) == nucleus
    assert all(filtered[i] == logits[i] for i in nucleus)


@settings(deadline=None)
@given(values=LOGITS, p=st.floats(0, 1))
def test_min_p_equals_brute_force(values: list[float], p: float) -> None:
    logits = torch.tensor(values)
    lowest = max(logits.tolist()) + (math.log(p) if p > 0 else -math.inf)
    assume(p == 1 or all(abs(value - lowest) > 1e-5 for value in logits.tolist()))  # or float32 may see it otherwise
    filtered = keep_min_p(logits, p)
    assert kept(filtered) == {i for i, value in enumerate(logits.tolist()) if value >= lowest}
    assert all(filtered[i] == logits[i] for i in kept(filtered))


@settings(deadline=None)
@given(values=LOGITS, mass=st.floats(0.01, 1))
def test_typical_equals_brute_force(values: list[float], mass: float) -> None:
    logits = torch.tensor(values)
    chances = softmax(logits.tolist())
    entropy = -math.fsum(chance * math.log(chance) for chance in chances)
    distance = [abs(-math.log(chance) - entropy) for chance in chances]
    for i, one in enumerate(distance):  # float32 may see near ones in another order
        assume(all(one == other or values[i] == values[j] or abs(one - other) > 1e-4
                   for j, other in enumerate(distance)))  # fmt: skip
    distance = [next(d for d, w in zip(distance, values, strict=True) if w == v) for v in values]
    order = sorted(range(len(chances)), key=lambda i: distance[i])
    typical = fewest(order, chances, mass, distance)
    filtered = keep_typical(logits, mass)
    assert kept(filtered) == typical
    assert all(filtered[i] == logits[i] for i in typical)


@settings(deadline=None)
@given(values=LOGITS, penalty=st.floats(0.1, 10), data=st.data())
def test_repetition_penalty_equals_its_definition(values: list[float], penalty: float, data: st.DataObject) -> None:
    seen = data.draw(st.sets(st.sampled_from(range(len(values)))))
    wanted = list(values)
    for i in seen:
        wanted[i] = values[i] / penalty if values[i] > 0 else values[i] * penalty
    mask = torch.tensor([i in seen for i in range(len(values))])
    torch.testing.assert_close(penalize_repetition(torch.tensor(values), mask, penalty), torch.tensor(wanted))


@settings(deadline=None)
@given(values=LOGITS, presence=st.floats(-3, 3), frequency=st.floats(-3, 3), data=st.data())
def test_presence_and_frequency_penalties_equal_their_definition(
    values: list[float], presence: float, frequency: float, data: st.DataObject
) -> None:
    counts = data.draw(st.lists(st.integers(0, 5), min_size=len(values), max_size=len(values)))
    wanted = [v - presence * (n > 0) - frequency * n for v, n in zip(values, counts, strict=True)]
    penalized = penalize_counts(torch.tensor(values), torch.tensor(counts), presence=presence, frequency=frequency)
    torch.testing.assert_close(penalized, torch.tensor(wanted), atol=1e-5, rtol=1e-5)


@settings(deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=4), n=st.integers(1, 5))
def test_no_ngram_comes_twice(rows: list[list[int]], n: int) -> None:
    length = max(map(len, rows)) + 2
    history = torch.tensor([[-1] * (length - len(row)) + row for row in rows])
    filtered = ban_repeated_ngrams(torch.zeros(len(rows), 4), history, n)
    for place, row in enumerate(rows):
        there = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}
        latest = row[len(row) - n + 1 :] if n > 1 else []
        banned = {token for token in range(4) if len(row) >= n - 1 and (*latest, token) in there}
        assert kept(filtered[place]) == set(range(4)) - banned


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 5), seed=st.integers(0, 1000), data=st.data())
def test_filters_treat_every_row_alone_and_by_its_own_value(rows: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 11, generator=generator) * 3
    ks = torch.randint(1, 14, (rows, 1), generator=generator)
    shares = torch.rand(rows, 1, generator=generator).clamp(min=0.01)
    at_most = data.draw(st.sampled_from([None, int(ks.max())]))
    filters: list[tuple[Callable[[Tensor, Any], Tensor], Tensor]] = [
        (lambda x, k: keep_top_k(x, k, at_most=at_most), ks), (keep_top_p, shares), (keep_min_p, shares),
        (keep_typical, shares), (lambda x, p: penalize_repetition(x, x > 1, p), shares),
        (lambda x, p: penalize_counts(x, (x > 0).int(), presence=p, frequency=2 * p), shares),
    ]  # fmt: skip
    for one, values in filters:
        together = one(logits, values)
        for row in range(rows):
            alone = one(logits[row], values[row].item())
            assert torch.equal(together[row], alone)
            assert torch.equal(one(logits[row : row + 1], values[row : row + 1])[0], alone)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary_does_not_depend_on_how_much_is_sorted(p: float) -> None:
    """A flat row needs all tokens sorted, a steep one those that come first; beside the flat one it has them all."""
    steep = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)) * 6
    flat = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)) / 10
    alone = [keep_top_p(logits, p)[0] for logits in (steep, flat)]
    assert len(kept(alone[0])) < PARTIAL_SORT < len(kept(alone[1]))
    together = keep_top_p(torch.cat([steep, flat]), p)
    for row in range(2):
        assert torch.equal(together[row], alone[row])


def test_top_p_of_one_keeps_every_token_of_a_large_vocabulary() -> None:
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 4
    assert len(kept(keep_top_p(logits, 1.0))) == 50_000


def test_shares_that_are_too_small_for_float32_keep_the_nearest_token() -> None:
    logits = torch.tensor([0.0, 1.0, 0.5])
    for p in (0.3, 1e-9, 1e-50):  # the last is 0 in float32
        assert kept(keep_top_p(logits, p)) == {1}
    for p in (1e-9, 1e-50):
        assert kept(keep_typical(logits, p)) == {2}
        assert kept(keep_min_p(logits, p)) == {0, 1, 2}


# --- controls of a batch ---------------------------------------------------------------------------------------------

SIZE = 23


def biases(config: SamplingConfig) -> dict[int, float]:
    return {int(token): bias for token, bias in config.logit_bias}


CONFIGS = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.0, 1.7]),
    top_k=st.sampled_from([None, None, 1, 5, 22, 100]),
    top_p=st.sampled_from([None, None, 0.2, 0.9, 1.0]),
    min_p=st.sampled_from([None, None, 0.0, 0.1]),
    typical_p=st.sampled_from([None, None, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.4]),
    no_repeat_ngram=st.sampled_from([None, None, 1, 2, 3]),
    xtc_probability=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    dry_multiplier=st.sampled_from([0.0, 0.0, 0.8, 3.7]),
    logit_bias=st.sampled_from([(), (), (("2", 1.5), ("0", -100.0))]),
    banned_tokens=st.sampled_from([(), (), (3, 5)]),
    min_new_tokens=st.sampled_from([0, 0, 3]),
    seed=st.integers(0, 5),
)


def run_rows(state: SamplingState, logits: Tensor, steps: range) -> tuple[list[Tensor], list[Tensor]]:
    """Return what is drawn from logits (step, batch, SIZE) and the logits it is drawn from."""
    drawn, controlled = [], []
    for step in steps:
        controlled.append(process_logits(logits[step], state, eos_id=0))
        drawn.append(draw_controlled(controlled[-1], state))
        record_tokens(state, drawn[-1])
    return drawn, controlled


@settings(deadline=None, max_examples=150)
@given(configs=st.lists(CONFIGS, min_size=2, max_size=4), seed=st.integers(0, 1000), leaving=st.integers(0, 3))
def test_a_rows_draws_are_the_same_whatever_other_rows_want(
    configs: list[SamplingConfig], seed: int, leaving: int
) -> None:
    """To the bit, while rows leave and arrive."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, len(configs), SIZE, generator=generator) * 3
    prompts = torch.randint(SIZE, (len(configs), 6), generator=generator).tolist()

    def state(row: int) -> SamplingState:
        bias = biases(configs[row])
        return new_sampling_state(configs[row], prompts[row], row, vocab_size=SIZE, device=CPU, bias=bias, breaks=[4])

    rows = range(len(configs))
    alone = [run_rows(state(row), logits[:, row : row + 1], range(8)) for row in rows]

    def check(place: int, row: int, steps: range, got: tuple[list[Tensor], list[Tensor]]) -> None:
        for here, there, step in ((0, i, step) for i, step in enumerate(steps)):
            assert got[0][there][place] == alone[row][0][step][here]
            assert torch.equal(got[1][there][place], alone[row][1][step][here])

    late = leaving % len(configs)  # this row arrives after two steps, and at the end runs without the first one
    early = [row for row in rows if row != late]
    batch = join_sampling_states([state(row) for row in early], SIZE)
    got = run_rows(batch, logits[:, early], range(3))
    for place, row in enumerate(early):
        check(place, row, range(3), got)
    batch = join_sampling_states([batch, state(late)], SIZE)
    shifted = torch.cat([logits[3:6, early], logits[:3, late : late + 1]], 1)
    got = run_rows(batch, shifted, range(3))
    for place, row in enumerate(early):
        check(place, row, range(3, 6), got)
    check(len(early), late, range(3), got)
    batch = select_sampling_state(batch, torch.arange(1, len(configs)))
    shifted = torch.cat([logits[6:8, early[1:]], logits[3:5, late : late + 1]], 1)
    got = run_rows(batch, shifted, range(2))
    for place, row in enumerate(early[1:]):
        check(place, row, range(6, 8), got)
    check(len(early) - 1, late, range(3, 5), got)


def after(config: SamplingConfig, prompt: list[int], drawn: list[int], *, size: int = 6) -> SamplingState:
    state = new_sampling_state(config, prompt, 0, vocab_size=size, device=CPU)
    for token in drawn:
        record_tokens(state, torch.tensor([token]))
    return state


def test_repetition_counts_prompt_and_text_and_the_other_penalties_the_text_alone() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, -1.0, 1.0, 1.0]])
    halved = process_logits(logits, after(SamplingConfig(repetition_penalty=2), [1, 3], [2]), eos_id=0)
    assert halved.tolist() == [[1.0, 0.5, 0.5, -2.0, 1.0, 1.0]]
    config = SamplingConfig(presence_penalty=0.5, frequency_penalty=0.25)
    lowered = process_logits(logits, after(config, [1, 3], [2, 2, 4]), eos_id=0)
    assert lowered.tolist() == [[1.0, 1.0, 0.0, -1.0, 0.25, 1.0]]


def test_the_text_does_not_end_before_its_shortest_length() -> None:
    config = SamplingConfig(min_new_tokens=2)
    for drawn, wanted in (([], True), ([1], True), ([1, 2], False), ([1, 2, 3], False)):
        controlled = process_logits(torch.zeros(1, 6), after(config, [], drawn), eos_id=4)
        assert (controlled[0, 4] == -math.inf) == wanted
        assert kept(controlled[0]) >= {0, 1, 2, 3, 5}


def test_no_ngram_of_prompt_and_text_comes_twice() -> None:
    config = SamplingConfig(no_repeat_ngram=2)
    assert kept(process_logits(torch.zeros(1, 6), after(config, [1, 2, 1, 3], [1]), eos_id=0)[0]) == {0, 1, 4, 5}
    assert kept(process_logits(torch.zeros(1, 6), after(config, [1, 2], [1, 4, 1]), eos_id=0)[0]) == {0, 1, 3, 5}


def test_ngrams_are_forgotten_after_so_many_tokens_as_said() -> None:
    assert SamplingConfig(no_repeat_ngram=HISTORY)
    with pytest.raises(ValueError, match=f"^`no_repeat_ngram` must be at most {HISTORY}: "):
        SamplingConfig(no_repeat_ngram=HISTORY + 1)
    config = SamplingConfig(no_repeat_ngram=1)
    for length, wanted in ((HISTORY - 1, False), (HISTORY, True)):
        controlled = process_logits(torch.zeros(1, 6), after(config, [5, *[1] * length], []), eos_id=0)
        assert (5 in kept(controlled[0])) == wanted


def test_a_text_ends_where_ngrams_leave_nothing_else() -> None:
    config = SamplingConfig(no_repeat_ngram=1, min_new_tokens=100, temperature=0.5, top_p=0.9)
    state = after(config, [], [1, 2, 3, 4, 5])
    controlled = process_logits(torch.zeros(1, 6), state, eos_id=0)
    assert kept(controlled[0]) == {0}
    assert int(draw_controlled(controlled, state)) == 0


def test_banned_tokens_are_never_drawn() -> None:
    counts = draw_many(torch.tensor([9.0, 1.0, 8.0, 0.5]), SamplingConfig(banned_tokens=(0, 2)), 9999)
    assert counts[0] == counts[2] == 0
    assert min(counts[1], counts[3]) > 0


# --- the draw --------------------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = torch.randn(50, 31, generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(temperature=0)
    assert torch.equal(draw(logits, config, samples=torch.arange(50), step=3), logits.argmax(-1))


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_narrowest_filters_take_the_likeliest_token(setting: dict[str, Any]) -> None:
    logits = torch.randn(500, 31, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits, SamplingConfig(**setting), samples=torch.arange(500), step=3)
    assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e6, 1e30, 1e300])
def test_a_large_temperature_draws_all_tokens_alike(temperature: float) -> None:
    logits = torch.tensor([5.0, -3.0, 0.0, 2.0, -math.inf, 9.0])
    counts = draw_many(logits, SamplingConfig(temperature=temperature), MILLION)
    assert counts.pop(4) == 0
    assert abs(chi_square(counts, [1 / 5] * 5)) < 4


@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1e-42, 1e-310])
def test_tiny_temperatures_go_to_the_likeliest_token(temperature: float, top_p: float | None) -> None:
    logits = 50 + torch.randn(50, 31, generator=torch.Generator().manual_seed(1))
    logits[:, 7] = 60  # over 1e-37 it is infinite in float32, as are the others; 1e-310 is 0
    config = SamplingConfig(temperature=temperature, top_p=top_p)
    assert draw(logits, config, samples=torch.arange(50), step=0).tolist() == [7] * 50


VALUES = [1.5, 0.3, -0.2, 2.0, -1.0, 0.9, -0.7, 1.1]


def dry_by_hand(config: SamplingConfig, text: list[int], token: int, breaks: Sequence[int] = ()) -> float:
    """Return what DRY subtracts from a token's logit, as llama.cpp's description has it."""
    longest = 0
    for place in range(len(text)):
        if text[place] == token:
            n = 0
            while n < place and text[place - 1 - n] == text[len(text) - 1 - n] and text[place - 1 - n] not in breaks:
                n += 1
            longest = max(longest, n)
    allowed = config.dry_allowed_length
    return config.dry_multiplier * config.dry_base ** (longest - allowed) if longest >= allowed else 0.0


def expected(config: SamplingConfig, prompt: list[int], drawn: list[int]) -> dict[int, float]:
    """Return the chances that tokens with VALUES for logits should have, 0 ending the text, by the book."""
    values = {i: value + biases(config).get(i, 0) for i, value in enumerate(VALUES)}
    for i in {*prompt, *drawn}:
        values[i] *= 1 / config.repetition_penalty if values[i] > 0 else config.repetition_penalty
    for i in drawn:
        values[i] -= config.frequency_penalty
    for i in set(drawn):
        values[i] -= config.presence_penalty
    text, n = [*prompt, *drawn], config.no_repeat_ngram
    for i in values:
        values[i] -= dry_by_hand(config, text, i)
    banned = set(config.banned_tokens) | ({0} if len(drawn) < config.min_new_tokens else set())
    if n is not None:
        pairs = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        banned |= {i for i in values if (*text[len(text) - n + 1 :], i) in pairs}
    values = {i: value / config.temperature for i, value in values.items() if i not in banned}
    for name in ("top_k", "top_p", "min_p", "typical_p"):
        limit = getattr(config, name)
        if limit is None:
            continue
        ranked = sorted(values, key=lambda i: -values[i])
        chances = dict(zip(values, softmax(list(values.values())), strict=True))
        if name == "typical_p":
            entropy = -math.fsum(p * math.log(p) for p in chances.values())
            ranked.sort(key=lambda i: abs(-math.log(chances[i]) - entropy))
        before = [math.fsum(chances[i] for i in ranked[:k]) for k in range(len(ranked))]
        if name == "top_k":
            ranked = ranked[:limit]
        elif name == "min_p":
            ranked = [i for i in ranked if chances[i] >= limit * max(chances.values())]
        else:
            ranked = [i for i, mass in zip(ranked, before, strict=True) if mass < limit]
        values = {i: values[i] for i in ranked}
    chances = dict(zip(values, softmax(list(values.values())), strict=True))
    tops = sorted((i for i in values if chances[i] >= config.xtc_threshold), key=lambda i: -chances[i])
    if config.xtc_probability == 1:
        values = {i: value for i, value in values.items() if i not in tops[:-1]}
    return dict(zip(values, softmax(list(values.values())), strict=True))


@pytest.mark.parametrize(
    "setting",
    [
        {}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {"typical_p": 0.7},
        {"repetition_penalty": 1.8}, {"presence_penalty": 0.9}, {"frequency_penalty": 0.6}, {"no_repeat_ngram": 2},
        {"logit_bias": (("2", 1.7), ("3", -1.0))}, {"logit_bias": (("4", 2.5),), "repetition_penalty": 1.5},
        {"dry_multiplier": 0.9, "dry_allowed_length": 1}, {"xtc_probability": 1.0, "xtc_threshold": 0.15},
        {"temperature": 0.8, "min_p": 0.05, "xtc_probability": 1.0, "xtc_threshold": 0.1},
        {"banned_tokens": (3, 6)}, {"min_new_tokens": 9}, {"temperature": 1.5, "top_k": 6, "top_p": 0.9},
        {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": -0.5, "min_p": 0.05, "typical_p": 0.9},
    ],
    ids=lambda setting: "+".join(setting) or "softmax",
)  # fmt: skip
def test_a_million_draws_follow_the_softmax(setting: dict[str, Any]) -> None:
    config, prompt, drawn = SamplingConfig(seed=3, **setting), [3, 5, 7, 5], [1, 3, 3, 5]
    wanted = expected(config, prompt, drawn)
    counts = draw_many(torch.tensor(VALUES), config, MILLION, prompt=prompt, drawn=drawn)
    assert 1 < len(wanted) <= 8
    assert sum(counts[i] for i in wanted) == MILLION
    assert abs(chi_square([counts[i] for i in wanted], list(wanted.values()))) < 4


@settings(deadline=None)
@given(
    text=st.lists(st.integers(0, 3), max_size=60),
    breaks=st.sampled_from([(), (2,), (0, 3)]),
    allowed=st.integers(1, 4),
    base=st.sampled_from([1.0, 1.75, 2.5]),
)
def test_dry_subtracts_what_its_description_says(
    text: list[int], breaks: tuple[int, ...], allowed: int, base: float
) -> None:
    text = [*text, *text[:20]]  # a long repetition
    config = SamplingConfig(dry_multiplier=0.8, dry_base=base, dry_allowed_length=allowed)
    state = new_sampling_state(config, text, 0, vocab_size=6, device=CPU, breaks=breaks)
    got = -process_logits(torch.zeros(1, 6), state, eos_id=5)[0]
    wanted = [dry_by_hand(config, text, token, breaks) for token in range(6)]
    # a repetition of more than 32 tokens counts as 32
    most = 0.8 * base ** (32 - allowed)
    assert got.tolist() == pytest.approx([min(penalty, most) for penalty in wanted], rel=1e-4)


def test_xtc_leaves_the_likeliest_tokens_out_as_often_as_it_should() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()
    config, count = SamplingConfig(seed=2, xtc_probability=0.3, xtc_threshold=0.1), 50_000

    def drawn(config: SamplingConfig, count: int) -> list[int]:
        tokens = draw(logits.expand(count, -1), config, samples=torch.arange(count), step=2)
        return torch.bincount(tokens, minlength=5).tolist()

    counts = drawn(config, count)
    # in three of ten draws 0 and 1 are left out, and 2, 3, 4 are drawn by what is left
    chances = [0.7 * p + 0.3 * (p / 0.3 if i >= 2 else 0) for i, p in enumerate([0.4, 0.3, 0.2, 0.06, 0.04])]
    assert abs(chi_square(counts, chances)) < 4
    for none in (SamplingConfig(seed=2), SamplingConfig(seed=2, xtc_probability=1, xtc_threshold=0.45)):
        assert drawn(none, 2000) == drawn(SamplingConfig(seed=2), 2000), "fewer than two such tokens"
    logits = torch.tensor([-math.inf, 0.4, 0.3, 0.2, -math.inf])  # as `<unk>`, and what a ban leaves
    lowest = SamplingConfig(seed=2, xtc_probability=1, xtc_threshold=0)
    assert drawn(lowest, 100) == [0, 0, 0, 100, 0], "the least likely of the tokens that may be drawn"


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should_be() -> None:
    size, count = 1000, 100_000
    logits = -2 * torch.arange(1, size + 1).log()  # the last one comes once in 1.6 million draws
    counts = draw_many(logits, SamplingConfig(seed=1), count)
    chances = softmax(logits.tolist())
    common = sum(chance * count > 8 for chance in chances)
    assert common > 80
    observed, wanted = [*counts[:common], sum(counts[common:])], [*chances[:common], math.fsum(chances[common:])]
    assert abs(chi_square(observed, wanted)) < 4


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
        ("xtc_probability", 1.5), ("xtc_threshold", 0.6), ("dry_multiplier", -1), ("dry_base", 0.5),
        ("dry_allowed_length", 0), ("dry_allowed_length", math.nan),
        ("seed", -1), ("seed", 1 << 63), ("seed", math.nan),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` must be .*: {value}$".replace("+", r"\+")):
        SamplingConfig(**{name: value})


# --- the noise of the draw -------------------------------------------------------------------------------------------


def exponential_exactly(key: int, item: int) -> float:
    """Return the noise at (key, item) by Python's integers, which have no bounds to wrap at."""
    bits = (key ^ int(hash_bits(0, item))) & 0xFFFFFFFF
    bits = bits * 0x7FEB352D & 0xFFFFFFFF
    bits ^= bits >> 15
    bits = bits * 0x846CA68B & 0xFFFFFFFF
    bits ^= bits >> 16
    share = float(torch.tensor(bits & 0x7FFFFFFF, dtype=torch.float32) + 0.5) / 2**31  # float32 keeps 24 bits of 31
    return -math.log1p(-min(share, 1 - 2**-24))


def test_the_noise_equals_big_integer_arithmetic() -> None:
    keys = hash_bits(7, torch.arange(50), torch.arange(50) * 3)
    wanted = [[exponential_exactly(key, item) for item in range(40)] for key in keys.tolist()]
    torch.testing.assert_close(exponential(keys, 40), torch.tensor(wanted), rtol=1e-6, atol=0)


def test_pinned_noise_never_changes() -> None:
    # a change of these changes every sample of models that exist
    wanted = [[1.3867861, 0.615557611, 0.527552605], [0.687835574, 2.41192484, 0.19782272]]
    drawn = exponential(hash_bits(42, torch.arange(2)), 3)
    torch.testing.assert_close(drawn, torch.tensor(wanted), rtol=1e-6, atol=0)


def test_the_noise_of_a_key_does_not_depend_on_the_others_or_on_the_count() -> None:
    keys = hash_bits(1, torch.arange(9))
    drawn = exponential(keys, 100)
    for row in range(9):
        assert torch.equal(exponential(keys[row : row + 1], 60)[0], drawn[row, :60])


def test_the_noise_is_exponential_from_end_to_end() -> None:
    count, size = 20_000, 500
    drawn = exponential(hash_bits(5, torch.arange(count)), size).double().flatten()
    total = count * size
    assert 2**-32 <= float(drawn.min()) < 1e-6
    assert 14 < float(drawn.max()) < 16.7
    for power, moment, deviation in ((1, 1, 1), (2, 2, math.sqrt(20)), (3, 6, math.sqrt(684))):
        assert abs(float((drawn**power).mean()) - moment) < 4 * deviation / math.sqrt(total)
    ends = [1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.7, 1, 2, 4, 6, 8, 10, 12]
    above = [1.0, *(math.exp(-end) for end in ends), 0.0]
    chances = [high - low for high, low in itertools.pairwise(above)]
    counts = torch.bincount(torch.bucketize(drawn, torch.tensor(ends, dtype=torch.float64)), minlength=len(chances))
    assert abs(chi_square(counts.tolist(), chances)) < 4


@pytest.mark.parametrize("neighbour", ["seed", "sample", "step", "token"])
def test_noise_of_neighbours_is_independent(neighbour: str) -> None:
    """In pairs over a 16 x 16 grid of equal chances: of tokens that follow each other, or of keys that do."""
    size = 64
    places = {"seed": 3, "sample": torch.arange(20_000) * 2, "step": 5}
    pairs = []
    for shift in (0, 1):
        at = {name: place + shift * (name == neighbour) for name, place in places.items()}
        keys = hash_bits(hash_bits(int(at["seed"]), at["sample"]), at["step"])
        tokens = slice(shift, size + shift) if neighbour == "token" else slice(0, size)
        pairs.append(((1 - (-exponential(keys, size + 1)[:, tokens]).exp()) * 16).long().clamp(max=15))
    counts = torch.bincount((pairs[0] * 16 + pairs[1]).flatten(), minlength=256).tolist()
    assert abs(chi_square(counts, [1 / 256] * 256)) < 4


def test_no_two_tokens_share_their_noise() -> None:
    """They would at every draw: the likelier of the two would always win."""
    for key in hash_bits(9, torch.arange(2)):
        assert len(exponential(key[None], 100_000).unique()) > 99_000  # equal by chance: float32 has few values
    items = hash_bits(0, torch.arange(128_000)).to(torch.int32)
    assert len(items.unique()) == 128_000
