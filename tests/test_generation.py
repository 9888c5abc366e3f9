"""Streams of text from prompts: the same text whatever stands beside a prompt, and never half a character."""

from __future__ import annotations

import math

import pytest
import torch

from textgen.config import ModelConfig, SamplingConfig
from textgen.generation import Sample, _sample_number, decode_step, generate, prefill, sample_all
from textgen.model import LSTMLanguageModel
from textgen.sampling import draw
from tokenizer import Tokenizer, train_tokenizer

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
    for step in range(config.max_new_tokens):
        logits, _ = model(torch.tensor([ids]), model.zero_state(1))
        logits = logits[:, -1].clone()
        logits[:, tokenizer.unk_id] = -math.inf
        token = int(draw(logits, config, samples=torch.tensor([number]), step=step))
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return ids[start:]


@torch.inference_mode()
def test_prefill_and_steps_equal_one_forward(model: LSTMLanguageModel, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("it was the worst of times")]
    whole, _ = model(torch.tensor([ids]), model.zero_state(1))
    for cut in (1, 2, 10, len(ids)):
        logits, state = prefill(model, ids[:cut])
        for token in ids[cut:]:
            logits, state = decode_step(model, torch.tensor([token]), state)
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
        ids = draw_ids(model, tokenizer, prompt, config, _sample_number(prompt, j))
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
    assert events == [(0, Sample("it was", 0, "", 0, True)), (1, Sample("", 0, "", 0, True))]


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
    assert events == [(0, piece) for piece in text] + [(0, Sample("", 0, text, len(ids), True))]


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
    assert sample.text == tokenizer.decode(draw_ids(model, tokenizer, "", config, _sample_number("", 0)))
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
