"""Many tokens in one compiled call against one step at a time, bit for bit, and what the host does around them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding.batch import MOST_STEPS, Batch, SingleSteps
from textgen.decoding.decoders import CellDecoder
from textgen.decoding.generation import generate_stream, sample_all
from textgen.decoding.samples import Request, RunningSample, Sample
from textgen.decoding.sampling import NOT_COMPILED, is_compiled
from textgen.hardware import processor_flags
from textgen.kernels import decoding as kernels
from textgen.kernels.decoding import Halt
from textgen.model.lstm import LSTMLanguageModel
from textgen.tokenizer import Tokenizer, train_tokenizer

compiled = pytest.mark.skipif(
    shutil.which("g++") is None or "avx512_vnni" not in processor_flags(),
    reason="there is no C++ compiler, or this processor has no AVX512-VNNI",
)

TEXTS = ["it was the best of times, it was the worst of times", "call me ishmael", "é è ü ß 漢字 🙂🙃 naïve café"]
LONG = {"max_new_tokens": 10_000}

# every setting that compiled code knows, alone and together
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 1e-6, "top_p": 0.3},
    {"temperature": 1e-40, "top_k": 1},
    {"temperature": 30.0, "top_k": 1000},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 200, "temperature": 1.3},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.99999},
    {"top_p": 1.0, "min_p": 1.0},
    {"min_p": 0.02},
    {"min_p": 0.0, "top_p": 0.5},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5, "presence_penalty": 0.4, "top_p": 0.8},
    {"frequency_penalty": -0.5, "temperature": 0.6},
    {"min_new_tokens": 9},
    {"banned_tokens": (5, 6, 40), "min_new_tokens": 40, "top_k": 3},
    {"logit_bias": (("7", -100.0), ("é", 3.0)), "presence_penalty": 1.0, "frequency_penalty": 0.3},
    {"dry_multiplier": 0.8},
    {"dry_multiplier": 20.0, "dry_allowed_length": 1, "dry_breakers": ("e",), "temperature": 0.3, "top_k": 4},
    {"xtc_probability": 0.5, "xtc_threshold": 0.01},
    {"xtc_probability": 1.0, "xtc_threshold": 0.0, "top_p": 0.6},
    {"xtc_probability": 0.9, "xtc_threshold": 0.05, "temperature": 0.5, "top_k": 20, "min_p": 0.01},
    {"xtc_probability": 0.8, "xtc_threshold": 0.02, "top_p": 0.9},
    {"logprobs": 0},
    {"logprobs": 3, "temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5},
]

# settings that need the host, or torch
HOSTED: list[dict[str, Any]] = [
    {"no_repeat_ngram": 2},
    {"typical_p": 0.9},
    {"regex": "[a-z]{5}( [a-z]+)*"},
    {"choices": ("good", "it was")},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXTS, vocab_size=341, model_type="char"))


def build(
    tokenizer: Tokenizer, *, ending: float = -4.0, scale: float = 0.3, labels: tuple[str, ...] = (), **shape: Any
) -> CellDecoder:
    """Return an int8 decoder; the larger `ending`, the sooner its texts end."""
    torch.manual_seed(4)
    config = ModelConfig(**{"embedding_dim": 32, "hidden_size": 64, "num_layers": 2} | shape)
    model = LSTMLanguageModel(config, tokenizer.vocab_size, labels=labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
        model.output.bias[tokenizer.eos_id] += ending
    return CellDecoder(model, "int8")


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> CellDecoder:
    return build(tokenizer)


def batch_of(decoder: CellDecoder, tokenizer: Tokenizer, settings: list[dict[str, Any]], rows: int) -> Batch:
    configs = [SamplingConfig(**LONG | settings[row % len(settings)]) for row in range(rows)]
    begins = [None if config.label_scale == 1 else decoder.model.label_id("bad") for config in configs]
    requests = [Request(f"it was {row}", config, row) for row, config in enumerate(configs)]
    samples = [RunningSample.of(i, r, tokenizer, begin=begins[i]) for i, r in enumerate(requests)]
    return Batch.of(decoder, tokenizer, samples)


@torch.inference_mode()
def compare(many: Batch, one: Batch, calls: int) -> tuple[int, int]:
    """Assert that calls of many steps draw what single steps draw; return the number of steps, and of early ends."""
    num_steps = num_early = 0
    for _ in range(calls):
        texts, logprobs = many._draw_many(10.0, max(len(many.samples) // 8, 1), Halt())
        eos_id, length, running = many.tokenizer.eos_id, len(texts[0]), []
        steps = [one.advance() for _ in texts[0]]
        wanted = zip(*(tokens for tokens, _ in steps), strict=True)
        for row, (text, wanted_text) in enumerate(zip(texts, wanted, strict=True)):
            end = wanted_text.index(eos_id) + 1 if eos_id in wanted_text else length
            assert text == [*wanted_text[:end]] + [eos_id] * (length - end)
            asked = many.samples[row].request.config.logprobs is not None
            ours = None if logprobs is None else logprobs[row]
            assert asked == (ours is not None)
            assert ours is None or ours[:end] == [of_all[row] for _, of_all in steps[:end] if of_all is not None]
            running += [row] if end == length else []
        num_steps += length
        num_early += length < MOST_STEPS
        # what later steps depend on; rows that have ended have none
        both = [(many.tokens, one.tokens), *zip(many.state, one.state, strict=True)]
        names = ("step", "seen", "counts", "history")
        both += [(many.sampling.tensors[n], one.sampling.tensors[n]) for n in names if n in many.sampling.tensors]
        for ours, theirs in both:
            assert torch.equal(ours[running], theirs[running])
        for row in set(range(len(many.samples))) - set(running):
            many.samples[row].ended = one.samples[row].ended = True
        scaled = [row for row in running if many.samples[row].request.config.label_scale != 1]
        for name in many.sampling.tensors if scaled else ():
            if name.startswith("unlabelled"):
                assert torch.equal(many.sampling.tensors[name][scaled], one.sampling.tensors[name][scaled])
        still, other = many.without_ended(), one.without_ended()
        if still is None or other is None:
            break
    return num_steps, num_early


@compiled
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_layers": 1, "projection": False, "hidden_size": 32},
        {"num_layers": 3, "tie_weights": False, "embedding_dim": 96},
    ],
    ids=["projected", "one layer", "untied"],
)
def test_many_steps_are_single_steps(tokenizer: Tokenizer, shape: dict[str, Any], rows: int) -> None:
    decoder = build(tokenizer, **shape)
    for first in range(0, len(SETTINGS), rows):
        settings = SETTINGS[first:] + SETTINGS[:first]
        steps, _ = compare(*(batch_of(decoder, tokenizer, settings, rows) for _ in range(2)), calls=4)
        assert steps > 0


@compiled
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_setting_draws_what_single_steps_draw(
    decoder: CellDecoder, tokenizer: Tokenizer, setting: dict[str, Any]
) -> None:
    compare(*(batch_of(decoder, tokenizer, [setting], 5) for _ in range(2)), calls=8)


@compiled
@pytest.mark.parametrize("rows", [1, 7])
def test_scaled_labels_draw_what_single_steps_draw(tokenizer: Tokenizer, rows: int) -> None:
    """A row with a scaled label has a twin without it; rows beside it have none."""
    decoder = build(tokenizer, labels=("good", "bad"))
    for first in range(0, len(SETTINGS), rows):
        settings = [
            setting | ({} if i % 3 or "repetition_penalty" in setting else {"label_scale": (2.5, 9.0, 0.0)[i // 3 % 3]})
            for i, setting in enumerate(SETTINGS[first:] + SETTINGS[:first])
        ]
        steps, _ = compare(*(batch_of(decoder, tokenizer, settings, rows) for _ in range(2)), calls=4)
        assert steps > 0


@compiled
def test_logprobs_that_take_much_memory_shorten_a_call(
    decoder: CellDecoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "KEPT_LOGITS", 5 * 3 * decoder.vocab_size)
    endless = {"logprobs": 1, "min_new_tokens": 9999}
    batches = [batch_of(decoder, tokenizer, [endless], 3) for _ in range(2)]
    tokens, _ = batches[0].advance_many(seconds=10.0)
    assert list(map(len, tokens)) == [5, 5, 5]
    monkeypatch.setattr(kernels, "KEPT_LOGITS", 1)
    tokens, _ = batches[1].advance_many(seconds=10.0)
    assert list(map(len, tokens)) == [1, 1, 1]


def hostile(batch: Batch, seed: int) -> None:
    """Give the rows biases with ties, gaps, infinite and huge values."""
    random = torch.Generator().manual_seed(seed)
    bias = torch.randn(len(batch.samples), batch.decoder.vocab_size, generator=random) * 3
    bias[torch.rand(bias.shape, generator=random) < 0.2] = -torch.inf
    bias[1::6] = bias[1::6].round()  # ties
    bias[2::6] = 0.0  # a uniform distribution: its nucleus ends at a tie of all
    bias[3::6, 11] = 3e38
    bias[4::6] = -torch.inf  # nothing, or one token, is left
    bias[4::12, 13] = 1.0
    bias[5::18, 17] = torch.inf
    bias[11::18, 19] = torch.nan
    batch.sampling.tensors["bias"] = bias


@compiled
@pytest.mark.parametrize("seed", range(6))
def test_hostile_logits_draw_what_single_steps_draw(tokenizer: Tokenizer, seed: int) -> None:
    decoder = build(tokenizer, num_layers=1, projection=False, hidden_size=32)
    with torch.no_grad():
        decoder.model.output.weight.zero_()  # logits are the biases
        decoder.model.output.bias.zero_()
    decoder = CellDecoder(decoder.model, "int8")
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(SETTINGS), generator=random).tolist()
    batches = [batch_of(decoder, tokenizer, [SETTINGS[i] for i in order], 33) for _ in range(2)]
    for batch in batches:
        hostile(batch, seed)
    steps, num_early = compare(*batches, calls=6)
    assert steps > 0
    assert num_early > 0  # torch has drawn some


@compiled
def test_a_nucleus_that_ends_between_two_sums_is_cut_where_torch_cuts_it(tokenizer: Tokenizer) -> None:
    """Each of 16 tokens has a probability of 1/16, but for rounding: with p = k/16 rounding decides where to stop."""
    decoder = build(tokenizer, num_layers=1, projection=False, hidden_size=32)
    with torch.no_grad():
        decoder.model.output.weight.zero_()
        decoder.model.output.bias.fill_(-torch.inf)
        decoder.model.output.bias[20:36] = torch.arange(16.0) * 1e-7 + 1.0
    decoder = CellDecoder(decoder.model, "int8")
    settings = [{"top_p": k / 16, "seed": seed, "min_new_tokens": 9999} for k in range(1, 17) for seed in range(2)]
    _, num_early = compare(*(batch_of(decoder, tokenizer, settings, 32) for _ in range(2)), calls=40)
    assert num_early > 0


@compiled
@pytest.mark.parametrize("threshold", [0.02, 0.1])
def test_xtc_after_a_nucleus_leaves_few_steps_to_torch(
    decoder: CellDecoder, tokenizer: Tokenizer, threshold: float
) -> None:
    """A token in doubt at the border of the nucleus is common in a batch; that XTC or the draw depends on it is not."""
    setting = {"xtc_probability": 1.0, "xtc_threshold": threshold, "top_p": 0.97, "min_new_tokens": 9999}
    num_steps, _ = compare(*(batch_of(decoder, tokenizer, [setting], 33) for _ in range(2)), calls=20)
    assert num_steps > 100, "about 20 if each token in doubt ended a call"


# --- whole texts -----------------------------------------------------------------------------------------------------


def texts_of(
    batch_of: Callable[..., Batch] | None,
    decoder: CellDecoder,
    tokenizer: Tokenizer,
    requests: list[Request],
    batch_size: int,
) -> tuple[dict[int, Sample], dict[int, str]]:
    """Return the samples, and the joined pieces of their texts."""
    samples, texts = {}, dict.fromkeys(range(len(requests)), "")
    for index, event in generate_stream(decoder, tokenizer, requests, batch_size=batch_size, batch_of=batch_of):
        if isinstance(event, str):
            texts[index] += event
        else:
            samples[index] = event
    return samples, texts


@compiled
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_texts_of_all_kinds_are_those_of_single_steps(tokenizer: Tokenizer, batch_size: int) -> None:
    decoder = build(tokenizer, ending=2.5)
    kinds = [
        *SETTINGS,
        *HOSTED,
        {"stop": ("ee", "🙂"), "logit_bias": (("e", 6.0),)},
        {"forced_tokens": (60, 61), "stop": ("st",), "top_k": 20},
    ]
    lengths, requests = [1, 2, 31, 32, 33, 70], []
    for i in range(2 * len(kinds)):
        setting = kinds[i % len(kinds)]
        least = max(setting.get("min_new_tokens", 0), len(setting.get("forced_tokens", ())))
        length = max(lengths[i % len(lengths)], least)
        requests.append(Request(f"it was {i}", SamplingConfig(**setting, max_new_tokens=length), i))
    samples, texts = texts_of(None, decoder, tokenizer, requests, batch_size)
    assert samples == texts_of(SingleSteps.of, decoder, tokenizer, requests, batch_size)[0]
    assert {index: sample.text for index, sample in samples.items()} == texts
    assert {sample.reason for sample in samples.values()} >= {"end", "length", "stop", "choice"}


@compiled
def test_rows_that_need_the_host_leave_many_steps_to_the_others(decoder: CellDecoder, tokenizer: Tokenizer) -> None:
    batch = batch_of(decoder, tokenizer, [{"no_repeat_ngram": 2}, {"min_new_tokens": 9999}], 4)
    times = iter([0.0, 10.0])  # the host's step takes long
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textgen.decoding.batch.time", SimpleNamespace(perf_counter=lambda: next(times)))
        tokens, _ = batch.advance_many(seconds=10.0)
    assert [sample.request.config.no_repeat_ngram for sample in batch.samples] == [None, None, 2, 2]
    assert list(map(len, tokens)) == [MOST_STEPS, MOST_STEPS, 1, 1]


@compiled
def test_a_call_ends_at_its_halt_its_time_and_the_ends_of_rows(decoder: CellDecoder, tokenizer: Tokenizer) -> None:
    def lengths(batch: Batch, seconds: float = 10.0) -> set[int]:
        return set(map(len, batch.advance_many(seconds=seconds, halt=halt)[0]))

    endless, five = {"min_new_tokens": 9999}, {"max_new_tokens": 5, "min_new_tokens": 5}
    halt = Halt()
    batch = batch_of(decoder, tokenizer, [endless], 3)
    assert lengths(batch) == {MOST_STEPS}
    halt.set(True)
    assert lengths(batch) == {1}
    halt.set(False)
    assert lengths(batch, 0.0) == {1}
    assert lengths(batch_of(decoder, tokenizer, [endless, endless, five], 3)) == {5}
    # of many rows an eighth has to end
    many = batch_of(decoder, tokenizer, [endless] * 15 + [five], 16)
    tokens, _ = many.advance_many(seconds=10.0)
    assert tokens[15][5:] == [tokenizer.eos_id] * (MOST_STEPS - 5)


@compiled
def test_an_interrupt_cuts_texts_between_two_calls(decoder: CellDecoder, tokenizer: Tokenizer) -> None:
    config = SamplingConfig(min_new_tokens=200)
    (whole,) = sample_all(decoder, tokenizer, ["it was"], config)
    answers = iter([False] * 2 + [True] * 99)
    events = generate_stream(decoder, tokenizer, [Request("it was", config)], interrupted=lambda: next(answers))
    sample = [event for _, event in events][-1]
    assert isinstance(sample, Sample)
    assert 2 <= sample.num_tokens <= 2 * MOST_STEPS
    assert sample.text
    assert whole.text.startswith(sample.text)


def test_settings_that_need_the_host_are_known(tokenizer: Tokenizer) -> None:
    assert all(is_compiled(SamplingConfig(**setting | LONG)) for setting in SETTINGS)
    assert not any(is_compiled(SamplingConfig(**setting)) for setting in HOSTED)
    assert is_compiled(SamplingConfig(label_scale=2.0))
    assert not is_compiled(SamplingConfig(label_scale=2.0, repetition_penalty=1.2))
    # a new setting has to be put into one of the lists
    known = {name for setting in SETTINGS for name in setting} | set(NOT_COMPILED)
    # a part of another, what ends a text, and what needs a label
    other = {"stop", "forced_tokens", "max_new_tokens", "dry_base", "label_scale"}
    assert {f.name for f in dataclasses.fields(SamplingConfig)} <= known | other
