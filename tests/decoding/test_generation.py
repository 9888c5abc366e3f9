"""Streams of text from prompts: the same text whatever stands beside a prompt, and never half a character."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding import batch, generation
from textgen.decoding.batch import _prefill
from textgen.decoding.decoders import CellDecoder, Decoder, DecoderState
from textgen.decoding.generation import generate, generate_stream, number_requests, sample_all
from textgen.decoding.reading import read_tokens
from textgen.decoding.samples import Request, RunningSample, Sample, sample_number
from textgen.decoding.sampling import draw, new_sampling_state, process_logits, record_tokens
from textgen.errors import TextgenError
from textgen.model.lstm import LSTMLanguageModel
from textgen.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["it was the best of times, it was the worst of times", "call me ishmael", "é è ü ß 漢字 🙂🙃 naïve café"]
PROMPTS = ["it was", "", "call me 漢", "an unseen Ω prompt", "it was the best of times"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXTS, vocab_size=400, model_type="char"))


@pytest.fixture
def model(tokenizer: Tokenizer) -> LSTMLanguageModel:
    """Return a model that knows nothing: it draws bytes and characters about evenly, and prefers none."""
    torch.manual_seed(11)
    return LSTMLanguageModel(ModelConfig(embedding_dim=16, hidden_size=24, layer_norm=True), tokenizer.vocab_size)


def prefer(model: LSTMLanguageModel, logits: dict[int, float]) -> None:
    """Add to the logits of some tokens."""
    with torch.no_grad():
        for token, value in logits.items():
            model.output.bias[token] += value


def forbid_end(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    prefer(model, {tokenizer.eos_id: -math.inf})


@torch.inference_mode()
def draw_ids(
    model: LSTMLanguageModel, tokenizer: Tokenizer, prompt: str, config: SamplingConfig, number: int
) -> list[int]:
    """Return the ids of one sample alone, the slow way: the whole text is read anew for each token."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    start = len(ids)
    cpu = torch.device("cpu")
    sampling = new_sampling_state(config, ids[1:], number, vocab_size=tokenizer.vocab_size, device=cpu)
    for token in config.forced_tokens:
        ids.append(token)
        record_tokens(sampling, torch.tensor([token]))
    for _ in range(config.max_new_tokens - len(config.forced_tokens)):
        logits, _ = model(torch.tensor([ids]), model.zero_state(1))
        logits = logits[:, -1].clone()
        logits[:, tokenizer.unk_id] = -math.inf
        token = int(drawn := draw(process_logits(logits, sampling, eos_id=tokenizer.eos_id), sampling))
        record_tokens(sampling, drawn)
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return ids[start:]


@torch.inference_mode()
def test_prefill_and_steps_equal_one_forward(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("it was the worst of times")]
    whole, _ = model(torch.tensor([ids]), model.zero_state(1))
    for cut in (1, 2, 10, len(ids)):
        decoder = Decoder(model)
        state = decoder.prefill(ids[:cut])
        for token in ids[cut - 1 :]:
            logits, state = decoder.step(torch.tensor([token]), state)
        torch.testing.assert_close(logits, whole[:, -1], rtol=1e-5, atol=1e-5)


def test_streamed_text_equals_decoded_ids(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    config = SamplingConfig(max_new_tokens=60, seed=1)
    prefer(model, {tokenizer.eos_id: 1.0})
    pieces: dict[int, list[str]] = {row: [] for row in range(10)}
    samples: dict[int, Sample] = {}
    for row, event in generate(model, tokenizer, PROMPTS, config, num_samples=2):
        assert row not in samples, "something came after the sample"
        if isinstance(event, str):
            assert event
            pieces[row].append(event)
        else:
            samples[row] = event
    assert sorted(samples) == list(range(10))
    for row, sample in samples.items():
        prompt, j = PROMPTS[row // 2], row % 2
        ids = draw_ids(model, tokenizer, prompt, config, sample_number(prompt, j))
        assert "".join(pieces[row]) == sample.text == tokenizer.decode(ids)
        assert (sample.prompt, sample.number, sample.num_tokens) == (prompt, j, len(ids))
        assert sample.finished == (len(ids) < 60)
    assert len({sample.finished for sample in samples.values()}) == 2  # some ended, some were cut
    assert any("\ufffd" in sample.text for sample in samples.values())  # broken bytes were among them


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}])
def test_a_sample_is_the_same_alone_in_a_batch_and_among_others(
    model: LSTMLanguageModel, tokenizer: Tokenizer, settings: dict[str, float]
) -> None:
    config = SamplingConfig(max_new_tokens=40, seed=9, **settings)
    prefer(model, {tokenizer.eos_id: 1.5})
    alone = {prompt: sample_all(model, tokenizer, [prompt], config)[0] for prompt in PROMPTS}
    assert sample_all(model, tokenizer, PROMPTS, config) == [alone[prompt] for prompt in PROMPTS]
    assert sample_all(model, tokenizer, PROMPTS[::-1], config) == [alone[prompt] for prompt in PROMPTS[::-1]]
    several = sample_all(model, tokenizer, PROMPTS, config, num_samples=3)
    assert several[::3] == list(alone.values())
    assert [(sample.prompt, sample.number) for sample in several] == [(p, j) for p in PROMPTS for j in range(3)]
    assert several[3:6] == sample_all(model, tokenizer, PROMPTS[1:2], config, num_samples=3)


def test_equal_prompts_of_a_list_are_samples_with_numbers_that_go_on(
    model: LSTMLanguageModel, tokenizer: Tokenizer
) -> None:
    config = SamplingConfig(max_new_tokens=20)
    got = sample_all(model, tokenizer, ["it was", "", "it was", "it was"], config, num_samples=2)
    assert [sample.number for sample in got] == [0, 1, 0, 1, 2, 3, 4, 5]
    assert got[:2] + got[4:] == sample_all(model, tokenizer, ["it was"], config, num_samples=6)
    assert len({sample.text for sample in got[:2] + got[4:]}) == 6


def test_prompts_are_equal_with_the_same_settings_and_seed_alone() -> None:
    config, other = SamplingConfig(seed=1), SamplingConfig(seed=2)
    prompts = [("a", config), ("a", other), ("a", SamplingConfig(seed=1)), ("b", config), ("a", other)]
    numbers = [request.number for request in number_requests(prompts, 3)]
    assert numbers == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]


def test_samples_prompts_and_seeds_draw_other_noise(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the noise alone decides
    forbid_end(model, tokenizer)
    config = SamplingConfig(max_new_tokens=20, seed=9)
    texts = [sample.text for sample in sample_all(model, tokenizer, ["a", "b"], config, num_samples=3)]
    texts += [sample.text for sample in sample_all(model, tokenizer, ["a"], SamplingConfig(max_new_tokens=20, seed=8))]
    assert len(set(texts)) == 7


def test_sampling_again_gives_the_same_text_whatever_torchs_seed(
    model: LSTMLanguageModel, tokenizer: Tokenizer
) -> None:
    config = SamplingConfig(max_new_tokens=30)
    first = sample_all(model, tokenizer, PROMPTS, config)
    torch.manual_seed(123)
    assert sample_all(model.train(), tokenizer, PROMPTS, config) == first
    assert sample_all(model.eval(), tokenizer, PROMPTS, config) == first


def test_dropout_plays_no_part_in_sampling(tokenizer: Tokenizer) -> None:
    samples = []
    for dropout in (0.0, 0.6):
        torch.manual_seed(11)
        model = LSTMLanguageModel(ModelConfig(embedding_dim=16, hidden_size=24, dropout=dropout), tokenizer.vocab_size)
        samples.append(sample_all(model.train(), tokenizer, ["call"], SamplingConfig(max_new_tokens=20)))
    assert samples[0] == samples[1]


def test_a_sample_stops_at_the_end_of_its_text(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    prefer(model, {tokenizer.eos_id: 1000.0})
    events = list(generate(model, tokenizer, ["it was", ""], SamplingConfig(max_new_tokens=50)))
    assert events == [
        (0, Sample("it was", 0, "", 0, True, reason="end")),
        (1, Sample("", 0, "", 0, True, reason="end")),
    ]


@pytest.mark.parametrize("limit", [1, 2, 17])
def test_a_sample_has_at_most_max_new_tokens(model: LSTMLanguageModel, tokenizer: Tokenizer, limit: int) -> None:
    forbid_end(model, tokenizer)
    samples = sample_all(model, tokenizer, PROMPTS, SamplingConfig(max_new_tokens=limit))
    assert [(sample.num_tokens, sample.finished) for sample in samples] == [(limit, False)] * len(PROMPTS)


def spell(model: LSTMLanguageModel, tokenizer: Tokenizer, ids: list[int]) -> None:
    """Make the model say these ids and end, whatever it reads."""
    following = iter([*ids, tokenizer.eos_id])

    def steer(module: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        steered = torch.zeros_like(logits)
        steered[..., next(following)] = 1.0
        return steered

    model.output.register_forward_hook(steer)


def test_a_character_of_several_bytes_is_held_back_until_it_is_whole(
    model: LSTMLanguageModel, tokenizer: Tokenizer
) -> None:
    text = "aΩ🚀é"  # a rocket and an omega are not in the vocabulary: two and four byte pieces
    ids = tokenizer.encode(text)
    assert len(ids) == 1 + 2 + 4 + 1
    spell(model, tokenizer, ids)
    events = list(generate(model, tokenizer, [""], SamplingConfig(temperature=0, max_new_tokens=50)))
    assert events == [(0, piece) for piece in text] + [(0, Sample("", 0, text, len(ids), True, reason="end"))]


def test_bytes_left_over_at_the_limit_come_as_one_replacement_character(
    model: LSTMLanguageModel, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("a🚀")
    spell(model, tokenizer, ids)
    events = list(generate(model, tokenizer, [""], SamplingConfig(temperature=0, max_new_tokens=3)))
    assert events == [(0, "a"), (0, "\ufffd"), (0, Sample("", 0, "a\ufffd", 3, False))]


def test_an_empty_prompt_starts_a_text(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    config = SamplingConfig(max_new_tokens=25, seed=2)
    forbid_end(model, tokenizer)
    (sample,) = sample_all(model, tokenizer, [""], config)
    assert sample.text == tokenizer.decode(draw_ids(model, tokenizer, "", config, sample_number("", 0)))
    assert sample.num_tokens == 25


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_the_unknown_token_is_never_drawn(model: LSTMLanguageModel, tokenizer: Tokenizer, temperature: float) -> None:
    assert tokenizer.decode([tokenizer.unk_id]) == "\ufffd"
    a_id = tokenizer.encode("a")[0]
    prefer(model, {tokenizer.unk_id: 1000.0, a_id: 500.0})
    config = SamplingConfig(temperature=temperature, max_new_tokens=10)
    assert [sample.text for sample in sample_all(model, tokenizer, PROMPTS, config)] == ["a" * 10] * len(PROMPTS)


def test_no_prompts_give_no_samples(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    assert sample_all(model, tokenizer, [], SamplingConfig()) == []


# --- rows that come and go -------------------------------------------------------------------------------------------


def all_of(events: Iterator[tuple[int, str | Sample]]) -> list[Sample]:
    ended = {row: event for row, event in events if isinstance(event, Sample)}
    return [ended[row] for row in sorted(ended)]


@pytest.mark.parametrize(("batch_size", "refill"), [(1, 8), (2, 8), (7, 8), (6, 2)])
def test_requests_of_all_kinds_are_what_they_are_alone(
    model: LSTMLanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, batch_size: int, refill: int
) -> None:
    for module in (batch, generation):
        monkeypatch.setattr(module, "REFILL_DIVISOR", refill)
    prefer(model, {tokenizer.eos_id: 1.5})
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"top_k": 5, "seed": 3}, {"max_new_tokens": 3}, {"stop": ("a", "\u6f22")},
        {"repetition_penalty": 1.5, "no_repeat_ngram": 2}, {"logprobs": 2, "min_p": 0.3}, {"forced_tokens": (9, 10)},
        {"banned_tokens": (7, 8), "typical_p": 0.8}, {"min_new_tokens": 20, "presence_penalty": 0.4, "logprobs": 0},
        {"temperature": 1.4, "top_p": 0.9, "frequency_penalty": 0.2}, {"forced_tokens": (9,), "max_new_tokens": 1},
    ]  # fmt: skip
    requests = [
        Request(PROMPTS[i % 5], SamplingConfig(**{"max_new_tokens": 30, **kind}), i) for i, kind in enumerate(kinds)
    ]
    alone = [all_of(generate_stream(model, tokenizer, [request]))[0] for request in requests]
    together = all_of(generate_stream(model, tokenizer, requests, batch_size=batch_size))
    for one, other in zip(alone, together, strict=True):
        rounded = [[(t.token, round(t.logprob, 4)) for t in sample.logprobs or ()] for sample in (one, other)]
        assert rounded[0] == rounded[1]
        assert (one.prompt, one.number, one.text, one.num_tokens, one.finished, one.stop) == (
            other.prompt, other.number, other.text, other.num_tokens, other.finished, other.stop,
        )  # fmt: skip
    assert [sample.prompt for sample in together] == [request.prompt for request in requests]


def test_a_free_row_is_given_to_the_next_request_but_not_far_ahead_of_the_oldest(
    model: LSTMLanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_end(model, tokenizer)
    taken: list[int] = []

    def requests() -> Iterator[Request]:
        for number in range(40):
            taken.append(number)
            yield Request("a", SamplingConfig(max_new_tokens=60 if number == 0 else 2), number)

    monkeypatch.setattr(generation, "MAX_AHEAD", 10)
    order = []
    for row, event in generate_stream(model, tokenizer, requests(), batch_size=4):
        if isinstance(event, Sample):
            order.append(row)
            assert len(taken) <= 10 or 0 in order
        running = len(taken) - len(order)
        assert running <= 4 + 1  # an ended row is told before the next request is taken
    assert sorted(order) == list(range(40))
    assert order.index(0) == 9


def test_a_prompt_of_many_samples_is_read_once(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    class Counting(Decoder):
        reads = 0

        def prefill(self, tokens: Sequence[int]) -> DecoderState:
            self.reads += 1
            return super().prefill(tokens)

    decoder = Counting(model)
    config = SamplingConfig(max_new_tokens=5)
    list(generate(decoder, tokenizer, ["it was", "call"], config, num_samples=9, batch_size=2))
    assert decoder.reads == 2


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[9], [129], [1], [5, 9, 9, 2, 1], [400, 3, 128, 1, 30], [30] * 9])
def test_prompts_are_read_side_by_side_as_alone(
    model: LSTMLanguageModel, tokenizer: Tokenizer, lengths: list[int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(tokenizer.vocab_size, (n,), generator=generator).tolist()) for n in lengths]
    wanted = {ids: Decoder(model).prefill(ids) for ids in prompts}
    steps = []

    class Counting(CellDecoder):
        def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
            steps.append(len(tokens))
            return super().step(tokens, state)

    states = _prefill(Counting(model), prompts)
    assert states.keys() == wanted.keys()
    for ids in prompts:
        torch.testing.assert_close(states[ids], wanted[ids], rtol=1e-5, atol=1e-5)
    stepped = [n for n in lengths if n <= 128]
    assert len(steps) == max(stepped, default=1) - 1
    assert sum(steps) == sum(n - 1 for n in stepped)


def test_an_interrupt_ends_samples_as_they_are(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    """What may begin a stop string is told after all, half a character is not."""
    ids = tokenizer.encode("ab\U0001f680")  # four bytes make the rocket
    spell(model, tokenizer, ids)
    drawn = iter(range(10))
    config = SamplingConfig(temperature=0, stop=("bcd",))
    events = list(
        generate_stream(model, tokenizer, [Request("", config), *[Request("x", config)]], batch_size=1,
              interrupted=lambda: next(drawn) == 4)
    )  # fmt: skip
    assert events == [(0, "a"), (0, "b"), (0, Sample("", 0, "ab", 4, False))]


# --- what a request may want -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merging_tokenizer() -> Tokenizer:
    """Return a tokenizer whose tokens hold several characters, one, or a part of one."""
    return Tokenizer(train_tokenizer([*TEXTS, "abab abc cab bca" * 9], vocab_size=330, model_type="bpe"))


def cut_by_hand(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Return the text before the stop string that is complete first, of those the longest, character by character."""
    for end in range(1, len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_stop_strings_end_the_text_wherever_tokens_end(merging_tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokenizer = merging_tokenizer
    known = [i for i in range(tokenizer.vocab_size) if i not in (tokenizer.eos_id, tokenizer.unk_id)]
    ids = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=12))
    if data.draw(st.booleans()):
        ids = tokenizer.encode(data.draw(st.text("abc \u00e9", min_size=1, max_size=12)))
    text = tokenizer.decode(ids)
    part = st.tuples(st.integers(0, len(text)), st.integers(1, 5)).map(lambda at: text[at[0] : at[0] + at[1]])
    stops = data.draw(st.lists(part | st.text("abc", min_size=1, max_size=3), max_size=3))
    stops = [stop for stop in stops if stop]
    config = SamplingConfig(stop=tuple(stops), max_new_tokens=len(ids))
    row = RunningSample.of(0, Request("", config), tokenizer)
    events = []
    for token in ids:
        if not row.ended:
            events += list(row.push(token, None))
    *pieces, sample = events
    assert isinstance(sample, Sample)
    wanted, stop = cut_by_hand(text, stops)
    assert (sample.text, sample.stop) == (wanted, stop)
    assert "".join(map(str, pieces)) == wanted, "what was streamed is the text: nothing of a stop string was shown"


def test_forced_tokens_are_read_counted_and_told(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    forced = tuple(tokenizer.encode("\u6f22 was"))
    for settings_ in ({}, {"repetition_penalty": 1.5, "frequency_penalty": 0.5}, {"no_repeat_ngram": 1}):
        config = SamplingConfig(forced_tokens=forced, max_new_tokens=20, seed=4, **settings_)
        (sample,) = sample_all(model, tokenizer, ["it"], config)
        ids = draw_ids(model, tokenizer, "it", config, sample_number("it", 0))
        assert ids[: len(forced)] == list(forced)
        assert (sample.text, sample.num_tokens) == (tokenizer.decode(ids), len(ids))
    whole = SamplingConfig(forced_tokens=forced, max_new_tokens=len(forced), stop=("s",))
    assert sample_all(model, tokenizer, ["it"], whole) == [
        Sample("it", 0, "\u6f22 wa", len(forced), False, "s", reason="stop")
    ]
    ended = SamplingConfig(forced_tokens=(forced[0], tokenizer.eos_id), stop=("\u6f22a",))
    assert sample_all(model, tokenizer, ["it"], ended) == [Sample("it", 0, "\u6f22", 1, True, reason="end")]


@torch.inference_mode()
@pytest.mark.parametrize("settings_", [{}, {"temperature": 0.5, "top_k": 3, "repetition_penalty": 1.4}])
def test_logprobs_are_the_models_own_whatever_filters_do(
    model: LSTMLanguageModel, tokenizer: Tokenizer, settings_: dict[str, Any]
) -> None:
    prefer(model, {tokenizer.unk_id: 2.0, tokenizer.eos_id: 1.0})
    config = SamplingConfig(logprobs=4, max_new_tokens=15, **settings_)
    unasked = SamplingConfig(max_new_tokens=15, **settings_)
    sample, other = all_of(
        generate_stream(model, tokenizer, [Request("it was", config), Request("it was", unasked, 1)])
    )
    assert other.logprobs is None
    assert sample.logprobs is not None
    ids = draw_ids(model, tokenizer, "it was", config, sample_number("it was", 0))
    assert len(sample.logprobs) == len(ids) + sample.finished
    read = [tokenizer.bos_id, *tokenizer.encode("it was")]
    exact = []
    for token, told in zip([*ids, tokenizer.eos_id], sample.logprobs, strict=False):
        logits, _ = model(torch.tensor([read]), model.zero_state(1))
        logprobs = logits[0, -1].double().log_softmax(-1)
        exact.append(float(logprobs[token]))
        values, places = logprobs.topk(4)
        assert told.logprob == pytest.approx(exact[-1], abs=1e-5)
        assert told.token.encode() == tokenizer.token_bytes(token) or "\\x" in told.token
        assert [value for _, value in told.top] == pytest.approx(values.tolist(), abs=1e-5)
        words = [tokenizer.token_bytes(i).decode(errors="backslashreplace") for i in places.tolist()]
        assert [word for word, _ in told.top] == words
        read.append(token)
    assert sample.mean_logprob == pytest.approx(math.fsum(exact) / len(exact), abs=1e-5)


def test_a_text_may_end_though_its_first_token_is_the_one_that_ends(
    model: LSTMLanguageModel, tokenizer: Tokenizer
) -> None:
    prefer(model, {tokenizer.eos_id: 50.0})
    config = SamplingConfig(no_repeat_ngram=1, repetition_penalty=100)
    assert [sample.finished for sample in sample_all(model, tokenizer, PROMPTS, config)] == [True] * len(PROMPTS)


def test_a_prompt_may_be_longer_than_all_that_was_trained_on(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    prompt = "it was the best of times " * 60
    config = SamplingConfig(max_new_tokens=4, no_repeat_ngram=3, repetition_penalty=1.1)
    (sample,) = sample_all(model, tokenizer, [prompt], config)
    ids = draw_ids(model, tokenizer, prompt, config, sample_number(prompt, 0))
    assert len(tokenizer.encode(prompt)) > 1024
    assert (sample.text, sample.num_tokens) == (tokenizer.decode(ids), len(ids))


@pytest.mark.parametrize("name", ["banned_tokens", "forced_tokens"])
def test_tokens_that_the_model_has_not_are_refused(model: LSTMLanguageModel, tokenizer: Tokenizer, name: str) -> None:
    config = SamplingConfig(**{name: (3, 9999)})
    wanted = rf"^`{name}` must be below the vocabulary's size {tokenizer.vocab_size}: 9999$"
    with pytest.raises(ValueError, match=wanted):
        sample_all(model, tokenizer, ["a"], config)


def test_bans_that_leave_nothing_to_draw_are_refused(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    but_the_end = tuple(i for i in range(tokenizer.vocab_size) if i not in (tokenizer.eos_id, tokenizer.unk_id))
    assert [s.finished for s in sample_all(model, tokenizer, ["a"], SamplingConfig(banned_tokens=but_the_end))] == [
        True
    ]
    for settings_ in ({"banned_tokens": but_the_end, "min_new_tokens": 1},
                      {"banned_tokens": (*but_the_end, tokenizer.eos_id)}):  # fmt: skip
        with pytest.raises(ValueError, match=r"^`banned_tokens` leaves no token to draw$"):
            sample_all(model, tokenizer, ["a"], SamplingConfig(**settings_))


def test_a_label_begins_a_text_alone_and_in_any_batch(tokenizer: Tokenizer) -> None:
    torch.manual_seed(11)
    config = ModelConfig(embedding_dim=16, hidden_size=24, layer_norm=True)
    model = LSTMLanguageModel(config, tokenizer.vocab_size, labels=("bad", "good"))
    sampling = SamplingConfig(max_new_tokens=20, seed=1, repetition_penalty=1.3)
    requests = [Request("it was", sampling, 0, label=label) for label in (None, "bad", "good", "bad")]

    def texts(requests: list[Request], decoder: Decoder, batch_size: int = 64) -> list[str]:
        events = generate_stream(decoder, tokenizer, requests, batch_size=batch_size)
        ended = {index: event.text for index, event in events if isinstance(event, Sample)}
        return [ended[index] for index in sorted(ended)]

    for decoder in (Decoder(model), CellDecoder(model, "int8")):
        none, bad, good, again = together = texts(requests, decoder)
        assert len({none, bad, good}) == 3
        assert again == bad
        assert together == texts(requests, decoder, 1) == [texts([one], decoder)[0] for one in requests]
        assert none == texts([Request("it was", sampling, 0)], decoder)[0]
    with pytest.raises(TextgenError, match="no label 'great'; the model has `bad`, `good`"):
        texts([Request("it was", sampling, 0, label="great")], Decoder(model))
    ids = (tokenizer.bos_id, *tokenizer.encode("it was"))
    with pytest.raises(ValueError, match="label 'bad' and `ids` both say how the text begins"):
        Request("it was", sampling, ids=ids, label="bad")
    labelled = Request("it was", sampling, ids=(model.label_id("bad"), *ids[1:]))
    assert texts([labelled], Decoder(model)) == texts(requests[1:2], Decoder(model))
    read = read_tokens(Decoder(model), "it was", ids)  # without the label
    again = Request("it was", sampling, read=read, label="bad")
    assert texts([again], Decoder(model)) == texts(requests[1:2], Decoder(model))
