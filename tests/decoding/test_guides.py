"""Texts that match a regex or are one of a list: checked with another engine, and against the model's own figures."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import regex
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding import batch, guides, sampling
from textgen.decoding.cuda_graphs import GraphRunner, steps_in_place
from textgen.decoding.decoders import CellDecoder, Decoder
from textgen.decoding.generation import generate_stream, sample_all
from textgen.decoding.guides import compile_regex, count_positions, encode_choices, score_choices
from textgen.decoding.samples import Request, Sample, require_drawable
from textgen.decoding.sampling import draw_item, draw_unmasked, new_sampling_state
from textgen.kernels import decoding as decoding_kernels
from textgen.kernels.decoding import compiled_code
from textgen.model.lstm import LSTMLanguageModel
from textgen.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["a good film, and good music", "the good old plot was bad", "naïve café: 漢字, 17 of 100"] * 20
PROMPTS = ["a good", "", "naïve 漢"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXTS, vocab_size=340, model_type="bpe"))


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> LSTMLanguageModel:
    """Return a model that knows nothing, and spells characters by bytes as often as by pieces."""
    torch.manual_seed(3)
    return LSTMLanguageModel(ModelConfig(embedding_dim=16, hidden_size=32), tokenizer.vocab_size).eval()


def require_match(pattern: str, sample: Sample, config: SamplingConfig) -> None:
    """Check a sample of a regex with the package `regex`."""
    assert "\ufffd" not in sample.text
    if sample.reason == "end":
        assert regex.fullmatch(pattern, sample.text), sample
    else:
        assert (sample.reason, sample.num_tokens) == ("length", config.max_new_tokens), sample
        assert regex.fullmatch(pattern, sample.text, partial=True), sample


# --- regexes ---------------------------------------------------------------------------------------------------------

ATOMS = st.sampled_from(
    [
        "a",
        "é",
        "漢",
        " ",
        "good",
        r"\w",
        r"\d",
        r"\s",
        ".",
        "[a-f]",
        "[^a-z]",
        r"\.",
        r"[^\x00-\x7f]",
        "\\n",
        "🙂",
        "(?i:Bad)",
    ]
)
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,4}", "{2,}"])).map(
            lambda p: f"({p[0]}){p[1]}"
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(pattern=REGEXES, seed=st.integers(0, 99), tokens=st.sampled_from([1, 4, 30]))
def test_every_sample_matches_its_regex_as_another_engine_sees_it(
    model: LSTMLanguageModel, tokenizer: Tokenizer, pattern: str, seed: int, tokens: int
) -> None:
    config = SamplingConfig(regex=pattern, seed=seed, max_new_tokens=tokens)
    for sample in sample_all(model, tokenizer, PROMPTS[:2], config, num_samples=2):
        require_match(pattern, sample, config)


@pytest.mark.parametrize(
    "pattern",
    [
        r" (good|bad)(, \w{2,5}){2}\.",
        r"(19|20)\d\d-[01]\d-[0-3]\d",
        r"[^\x00-\x7f]{3}",
        r'\{"stars": [1-5]\}',
        r"a{3}|",
    ],
)
def test_samples_of_common_regexes_end_and_differ(model: LSTMLanguageModel, tokenizer: Tokenizer, pattern: str) -> None:
    config = SamplingConfig(regex=pattern, max_new_tokens=80)
    samples = sample_all(model, tokenizer, PROMPTS, config, num_samples=4)
    for sample in samples:
        require_match(pattern, sample, config)
    assert {sample.reason for sample in samples} == {"end"}
    assert len({sample.text for sample in samples}) > 1


def test_filters_and_penalties_go_on_working_beside_a_regex(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    for more in (
        {"temperature": 0.0}, {"temperature": 1e-30}, {"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"typical_p": 0.1},
        {"no_repeat_ngram": 2}, {"logit_bias": ((" good", 100.0),)}, {"repetition_penalty": 100.0}, {"logprobs": 3},
    ):  # fmt: skip
        config = SamplingConfig(regex=r"( \w+){3,6}[.!]", max_new_tokens=40, **more)  # type: ignore[arg-type]
        for sample in sample_all(model, tokenizer, PROMPTS, config):
            if sample.reason == "nothing_allowed":
                assert "no_repeat_ngram" in more
            else:
                require_match(r"( \w+){3,6}[.!]", sample, config)
            assert sample.logprobs is None or all(math.isfinite(token.logprob) for token in sample.logprobs)


MIXED = [
    SamplingConfig(max_new_tokens=25, seed=1),
    SamplingConfig(max_new_tokens=25, seed=1, regex=r"( \w+)+\."),
    SamplingConfig(max_new_tokens=25, seed=2, top_p=0.9, temperature=0.7),
    SamplingConfig(max_new_tokens=25, choices=(" good", " bad", "é")),
    SamplingConfig(max_new_tokens=25, seed=3, regex=r"[a-z ]{1,30}", top_k=5),
    SamplingConfig(max_new_tokens=25, seed=4, repetition_penalty=1.3),
]


@pytest.mark.parametrize("make", [Decoder, CellDecoder])
@pytest.mark.parametrize("batch_size", [2, 18])
def test_a_sample_is_the_same_alone_and_beside_others_that_are_steered(
    model: LSTMLanguageModel, tokenizer: Tokenizer, make: Callable[[LSTMLanguageModel], Decoder], batch_size: int
) -> None:
    decoder = make(model)
    requests = [Request(prompt, config) for prompt in PROMPTS for config in MIXED]

    def samples(requests: list[Request], **settings: Any) -> list[Sample]:
        events = generate_stream(decoder, tokenizer, requests, **settings)
        ended = {index: event for index, event in events if isinstance(event, Sample)}
        return [ended[index] for index in range(len(requests))]

    alone = [sample for request in requests for sample in samples([request])]
    assert {sample.reason for sample in alone} >= {"end", "length", "choice"}
    assert samples(requests, batch_size=batch_size) == alone
    runner = GraphRunner(decoder, capture=lambda buffers, count: partial(steps_in_place, buffers, count))
    assert samples(requests, batch_size=batch_size, batch_of=runner.batch_of) == alone


@pytest.mark.parametrize("more", [{}, {"temperature": 0.6, "min_new_tokens": 5}, {"temperature": 0.0}, {"top_k": 40}])
def test_texts_are_the_same_if_only_refused_tokens_are_masked(
    model: LSTMLanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    patterns = (r"[\s\S]*", r"( [a-z]{1,12}){2,9}\.", r"( \w+[,.!?]?)*", r" (good|bad)(, [a-z]+){1,3}", None)
    requests = [
        Request(prompt, SamplingConfig(regex=pattern, max_new_tokens=25, seed=seed, **more))
        for pattern, prompt, seed in itertools.product(patterns, PROMPTS, range(2))
    ]
    for request in requests:
        require_drawable(request.config, tokenizer)  # a regex that is new here is tried by its masks
    num_masks: list[int] = []
    allowed = guides.RegexGuide.allowed
    monkeypatch.setattr(guides.RegexGuide, "allowed", lambda guide: num_masks.append(1) or allowed(guide))

    def samples() -> list[Sample]:
        num_masks.clear()
        events = generate_stream(model, tokenizer, requests, batch_size=len(requests))
        return sorted((event for _, event in events if isinstance(event, Sample)), key=repr)

    some_masked, num_some = samples(), len(num_masks)
    monkeypatch.setattr(batch, "draw_unmasked", lambda *_, **__: None)
    assert some_masked == samples()
    if compiled_code() is not None and "top_k" not in more:
        assert num_some < 0.8 * len(num_masks)


def test_logits_are_processed_once_where_there_is_no_compiled_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    processed: list[int] = []
    plain = sampling.process_logits
    monkeypatch.setattr(sampling, "process_logits", lambda *rest, **more: processed.append(1) or plain(*rest, **more))
    monkeypatch.setattr(decoding_kernels, "compiled_code", lambda: None)

    def unmasked(temperature: float) -> torch.Tensor | None:
        config = SamplingConfig(temperature=temperature)
        state = new_sampling_state(config, (), 0, vocab_size=9, device=torch.device("cpu"))
        return draw_unmasked(torch.arange(9.0)[None], state, eos_id=0)

    assert unmasked(0.7) is None
    assert not processed, "the draw with masks does it"
    greedy = unmasked(0.0)
    assert greedy is not None, "it needs no compiled code"
    assert greedy.tolist() == [8]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(pattern=REGEXES, seed=st.integers(0, 99))
def test_a_guide_allows_no_token_that_its_mask_does_not_have(tokenizer: Tokenizer, pattern: str, seed: int) -> None:
    chance = random.Random(seed)
    guide = guides.RegexGuide(compile_regex(pattern, tokenizer).matcher.deep_copy(), tokenizer.vocab_size)
    for _ in range(6):
        mask = guides.unpack(guide.allowed(), tokenizer.vocab_size).copy()
        assert all(mask[token] for token in range(tokenizer.vocab_size) if guide.allows(token))
        tokens = [token for token in mask.nonzero()[0].tolist() if token != tokenizer.eos_id]
        if not tokens:
            break
        guide.push(chance.choice(tokens))


def test_a_text_that_nothing_can_continue_ends_with_a_reason(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    bs = tuple(i for i in range(tokenizer.vocab_size) if b"b" in tokenizer.token_bytes(i))
    (sample,) = sample_all(model, tokenizer, ["a"], SamplingConfig(regex="aab", banned_tokens=bs, logprobs=1))
    assert (sample.text, sample.reason, sample.finished) == ("aa", "nothing_allowed", False)
    assert sample.logprobs is not None
    assert len(sample.logprobs) == sample.num_tokens
    (sample,) = sample_all(model, tokenizer, ["a"], SamplingConfig(regex="a{1,9}", min_new_tokens=50, seed=5))
    assert (sample.text, sample.reason) == ("a" * 9, "nothing_allowed"), "a match, but too short for the other setting"


def test_a_text_that_takes_too_many_states_ends_with_a_reason(
    model: LSTMLanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guides, "MAX_STATES", 40)
    samples = sample_all(model, tokenizer, ["a"], SamplingConfig(regex="[ab]{80}c", max_new_tokens=99))
    assert "regex_limit" in {sample.reason for sample in samples}


def test_texts_go_on_as_alone_though_others_have_built_too_many_states(
    model: LSTMLanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SamplingConfig(regex="(a|b|c)*a(a|b|c){9}", max_new_tokens=30)
    wanted = sample_all(model, tokenizer, PROMPTS, config, num_samples=8)
    compile_regex.cache_clear()
    monkeypatch.setattr(guides, "MAX_STATES", 200)  # enough for one text
    renewed = []
    plain = guides.CompiledRegex.renew
    monkeypatch.setattr(guides.CompiledRegex, "renew", lambda self: renewed.append(1) or plain(self))
    assert sample_all(model, tokenizer, PROMPTS, config, num_samples=8) == wanted
    assert renewed
    compile_regex.cache_clear()


def test_forced_tokens_are_a_part_of_the_match(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    forced = tuple(tokenizer.encode(" good"))
    config = SamplingConfig(regex=r" good (film|plot)", forced_tokens=forced)
    assert sample_all(model, tokenizer, ["a"], config)[0].text in (" good film", " good plot")
    with pytest.raises(ValueError, match=r"^`forced_tokens` must begin a match of `regex`: \d+$"):
        require_drawable(SamplingConfig(regex=r" bad", forced_tokens=forced), tokenizer)


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("a(", "`regex` cannot be used: unclosed group"),
        ("(?=a)b", "`regex` cannot be used: look-around, including look-ahead and look-behind, is not supported"),
        (r"(a)\1", "`regex` cannot be used: backreferences are not supported"),
        (r"\ba", r"`regex` cannot be used: lookarounds not supported yet; WordUnicode in regex /\ba/"),
        (r"[^\s\S]", "`regex` matches no text"),
        ("(a{1,1000}){1,1000}", "`regex` is too large: 1000000 positions with its repetitions, at most 2000"),
        ("(((a{99}){99}){99}){99}", "`regex` is too large: 96059601 positions with its repetitions, at most 2000"),
        ("(a?){900}a{900}", "`regex` is too large: texts that match it take more than 10000 states"),
        ("", "`regex` must be a text of at most 4096 bytes: 0 characters"),
        ("é" * 2049, "`regex` must be a text of at most 4096 bytes: 2049 characters"),
    ],
)  # fmt: skip
def test_a_regex_that_is_wrong_or_too_large_is_refused(tokenizer: Tokenizer, pattern: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"^{regex.escape(wanted)}$"):
        require_drawable(SamplingConfig(regex=pattern), tokenizer)


def test_a_refused_regex_is_not_tried_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guides, "_refused", {})
    monkeypatch.setattr(guides, "MAX_REFUSED", 2)
    tried: list[int] = []

    def refuse(*_: object) -> None:
        tried.append(1)
        raise ValueError("`regex` is too large")

    monkeypatch.setattr(guides, "_try_out", refuse)
    for pattern in ("one", "one", "two", "three", "three", "one"):
        with pytest.raises(ValueError, match=r"^`regex` is too large$"):
            compile_regex(pattern, tokenizer)
    assert len(tried) == 4, "the oldest of more than two is forgotten"


def test_positions_of_a_regex_are_counted_with_its_repetitions() -> None:
    for pattern, size in {
        "abc": 3, "a|bc": 3, "a{3}": 3, "(ab){2,5}c": 11, "[a-z]{4}": 4, r"\p{L}{4}\.": 5, "(?:a(?P<x>b{2})){3}": 9,
        "(?i)ab": 2, r"[\]{9}]{2}": 2, r"\{3}": 3, "a{2,}": 2, "()": 0, "(a{0,7}|b){2}": 16, r"\x{1F642}{3}": 3,
        "(?i:ab){2}": 4, r"\(a\){3}": 5,
    }.items():  # fmt: skip
        assert count_positions(pattern) == size, pattern


def test_a_regex_is_compiled_once_for_all_samples(tokenizer: Tokenizer) -> None:
    before = compile_regex.cache_info().misses
    for _ in range(3):
        compile_regex("ab+c", tokenizer)
    assert compile_regex.cache_info().misses == before + 1


def test_a_word_tokenizer_is_refused() -> None:
    words = Tokenizer(train_tokenizer(TEXTS, vocab_size=10, model_type="word"))
    for setting in ({"regex": "a"}, {"choices": ("a",)}):
        with pytest.raises(ValueError, match=r"^`(regex|choices)` needs a tokenizer that loses no text"):
            require_drawable(SamplingConfig(**setting), words)  # type: ignore[arg-type]


# --- choices ---------------------------------------------------------------------------------------------------------

CHOICES = (" good", " good music", "é", " bad old plot", "漢")


@torch.inference_mode()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_probability_of_a_choice_is_the_models_own(
    model: LSTMLanguageModel, tokenizer: Tokenizer, prompt: str
) -> None:
    before = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    scores = []
    for choice in CHOICES:
        ids = [*before, *tokenizer.encode(choice)]
        logits, _ = model(torch.tensor([ids[:-1]]), model.zero_state(1))
        logprobs = logits[0].log_softmax(-1)[len(before) - 1 :]
        scores.append(sum(float(logprobs[i, token]) for i, token in enumerate(ids[len(before) :])))
    decoder = Decoder(model)
    state = decoder.prefill(before)
    got = score_choices(decoder, before[-1], state, encode_choices(CHOICES, tokenizer))
    assert got == pytest.approx(scores, abs=1e-4)
    (sample,) = sample_all(model, tokenizer, [prompt], SamplingConfig(choices=CHOICES))
    chances = torch.tensor(scores).softmax(-1).tolist()
    assert dict(sample.choices or ()) == pytest.approx(dict(zip(CHOICES, chances, strict=True)), abs=1e-5)
    assert (sample.reason, sample.finished) == ("choice", False)
    assert sample.text in CHOICES


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_choices_are_drawn_as_often_as_their_probabilities(temperature: float) -> None:
    scores, count = torch.tensor([-210.0, -211.0, -213.0], dtype=torch.float64), 3000
    config = SamplingConfig(temperature=temperature, seed=7)
    drawn = [draw_item(scores, config, number) for number in range(count)]
    for item, chance in enumerate((scores / temperature).softmax(-1).tolist()):
        assert abs(drawn.count(item) - count * chance) < 4 * math.sqrt(count * chance)
    assert {draw_item(scores, SamplingConfig(temperature=0.0), number) for number in range(20)} == {0}


def test_a_choice_is_one_whole_text_with_log_probabilities(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    config = SamplingConfig(choices=CHOICES, logprobs=2, max_new_tokens=30)
    samples = sample_all(model, tokenizer, PROMPTS, config, num_samples=8)
    assert len({sample.text for sample in samples}) >= 3
    for sample in samples:
        assert sample.num_tokens == len(tokenizer.encode(sample.text)) == len(sample.logprobs or ())
        chances = dict(sample.choices or ())
        others = {choice: math.log(chances[choice] / chances[sample.text]) for choice in CHOICES}
        score = sum(token.logprob for token in sample.logprobs or ())
        assert all(score + difference < 0 for difference in others.values())


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ({"choices": ("a", "a")}, "`choices` must be different texts that are not empty: ['a', 'a']"),
        ({"choices": ("a", "")}, "`choices` must be different texts that are not empty: ['a', '']"),
        ({"choices": tuple(map(str, range(257)))}, "`choices` must be at most 256 texts: 257"),
        ({"choices": ("é" * 4097,)}, "`choices` must be at most 8192 bytes together: 8194"),
        ({"choices": ("a",), "regex": "a"}, "`choices` cannot be combined with `regex`: a"),
        ({"choices": ("a",), "top_k": 3}, "`choices` cannot be combined with `top_k`: 3"),
        ({"choices": ("a",), "banned_tokens": (7,)}, "`choices` cannot be combined with `banned_tokens`: (7,)"),
        ({"regex": "a", "stop": ("b",)}, "`regex` cannot be combined with `stop`: ('b',)"),
        ({"choices": (" good",), "max_new_tokens": 1, "seed": 1}, None),
        ({"choices": ("a", "b"), "top_p": 1, "min_p": 0, "typical_p": 1, "repetition_penalty": 1}, None),
    ],
)  # fmt: skip
def test_choices_that_cannot_be_are_refused(tokenizer: Tokenizer, setting: dict[str, Any], wanted: str | None) -> None:
    if wanted is None:
        require_drawable(SamplingConfig(**setting), tokenizer)
        return
    with pytest.raises(ValueError, match=f"^{regex.escape(wanted)}$"):
        require_drawable(SamplingConfig(**setting), tokenizer)
