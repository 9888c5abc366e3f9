"""Prompts that are scored, token ids as prompts, the best of several samples, and the tokenizer's paths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import textgen
from tests.serving.servers import Running, running
from textgen.config import SamplingConfig
from textgen.decoding.choose import choose_decoder
from textgen.decoding.decoders import Decoder
from textgen.decoding.generation import sample_all
from textgen.model.files import load_model
from textgen.tokenizer import Tokenizer

TEXTS = ["The plot was thin, but", "Ça va, très café 🙂 and more", "a" * 700 + " long " * 300, "x"]


@pytest.fixture(scope="module")
def server(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with running(tiny_run, log, "--max_tokens", "100000", "--batch_size", "8") as server:
        yield server


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> textgen.LanguageModel:
    return textgen.load(tiny_run, decoder="int8")


@pytest.fixture(scope="module")
def tokenizer(tiny_run: Path) -> Tokenizer:
    return load_model(tiny_run)[1]


@pytest.fixture(scope="module")
def decoder(tiny_run: Path) -> Decoder:
    return choose_decoder(load_model(tiny_run)[0], "int8")


def ask(server: Running, path: str, **fields: Any) -> dict[str, Any]:
    """Return the answer to a POST that must succeed."""
    status, _, body = server.ask("POST", path, fields)
    assert status == 200, body
    answer: dict[str, Any] = json.loads(body)
    return answer


def refusal(server: Running, path: str, **fields: Any) -> tuple[int, str, str]:
    """Return status, message and field of an error."""
    status, _, body = server.ask("POST", path, fields)
    error = json.loads(body)["error"]
    return status, error["message"], error["param"]


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_an_echoed_prompt_has_the_scores_of_the_python_api(
    server: Running, model: textgen.LanguageModel, text: str
) -> None:
    score = model.score(text, end=False)
    choice = server.complete(prompt=text, echo=True, logprobs=2, max_tokens=0)["choices"][0]
    logprobs = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    assert logprobs["tokens"] == list(score.tokens)
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["token_logprobs"][1:] == pytest.approx(score.logprobs[1:], abs=2e-5)
    rows = [logprobs[name][1:] for name in ("tokens", "token_logprobs", "top_logprobs")]
    for token, value, top in zip(*rows, strict=True):
        assert top[token] == value, "the token itself is always there"
        assert len(top) in (2, 3)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert "\\x" in token or text[offset:].startswith(token)
    assert server.complete(prompt=text, echo=True, logprobs=2, max_tokens=0)["usage"]["completion_tokens"] == 0


def test_a_boundary_before_the_prompt_scores_its_first_token_and_is_not_doubled(
    server: Running, model: textgen.LanguageModel, tokenizer: Tokenizer
) -> None:
    text = TEXTS[0]
    ids, eos = tokenizer.encode(text), tokenizer.eos_id
    wanted = list(model.score(text).logprobs)
    for prompt in ([eos, *ids, eos], f"</s>{text}</s>"):
        choice = server.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=0)["choices"][0]
        assert choice["text"] == text
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted, abs=2e-5)
        assert choice["logprobs"]["tokens"][0] == choice["logprobs"]["tokens"][-1] == ""
    plain = [server.complete(prompt=prompt, seed=3)["choices"][0]["text"] for prompt in (text, ids, [eos, *ids])]
    assert plain[0] == plain[1] == plain[2]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("settings", [{}, {"n": 2, "presence_penalty": 1.5}])
def test_scoring_changes_no_text(server: Running, text: str, settings: dict[str, Any]) -> None:
    asked = {"prompt": text, "seed": 5, "max_tokens": 20, **settings}
    server.complete(prompt="another")  # the server keeps the state of the last prompt
    plain = server.complete(**asked, logprobs=0)
    scored = server.complete(**asked, echo=True, logprobs=3)
    assert [text + choice["text"] for choice in plain["choices"]] == [choice["text"] for choice in scored["choices"]]
    assert plain["usage"] == scored["usage"]
    for choice, drawn in zip(scored["choices"], plain["choices"], strict=True):  # the state is the same too
        values = drawn["logprobs"]["token_logprobs"]
        assert choice["logprobs"]["token_logprobs"][-len(values) :] == values


def test_a_stream_has_the_prompts_scores_first(server: Running) -> None:
    asked = {"prompt": [TEXTS[0], TEXTS[2]], "seed": 5, "max_tokens": 30, "echo": True, "logprobs": 2}
    events = server.ask("POST", "/v1/completions", asked | {"stream": True})[2].split(b"\n\n")[:-2]
    whole = server.complete(**asked)["choices"]
    for index, choice in enumerate(whole):
        parts = [c for event in events for c in json.loads(event[6:])["choices"] if c["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values
        for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
            assert "\\x" in token or choice["text"][offset:].startswith(token)


def test_the_end_of_a_text_has_a_score_too(server: Running, model: textgen.LanguageModel) -> None:
    for seed in range(200):
        choice = server.complete(prompt="The", seed=seed, max_tokens=200, logprobs=1)["choices"][0]
        if choice["finish_reason"] == "stop":
            break
    logprobs = choice["logprobs"]
    assert (logprobs["tokens"][-1], logprobs["text_offset"][-1]) == ("", len(choice["text"]))
    assert len(logprobs["tokens"]) == 1 + server.complete(prompt="The", seed=seed, max_tokens=200)["usage"][
        "completion_tokens"
    ]  # fmt: skip


def test_an_empty_prompt_is_scored(server: Running) -> None:
    for prompt in ("", [[]], [""]):
        choice = server.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=0)["choices"][0]
        assert choice["text"] == ""
        names = "tokens", "token_logprobs", "token_ranks", "top_logprobs", "text_offset"
        assert choice["logprobs"] == {name: [] for name in names}
    assert server.complete(prompt="", echo=True, logprobs=1, max_tokens=3)["choices"][0]["logprobs"]["tokens"]


# --- token ids -------------------------------------------------------------------------------------------------------


def test_ids_are_continued_as_their_text(server: Running, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(text) for text in TEXTS]
    asked = {"seed": 5, "max_tokens": 20, "echo": True}
    texts = [choice["text"] for choice in server.complete(prompt=TEXTS, **asked)["choices"]]
    assert [choice["text"] for choice in server.complete(prompt=ids, **asked)["choices"]] == texts
    assert server.complete(prompt=ids[0], **asked)["choices"][0]["text"] == texts[0]


def test_ids_and_limits_are_checked(server: Running, tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    low = f"must be below the vocabulary's size {size}: {size}"
    assert refusal(server, "/v1/completions", prompt=[1, size]) == (400, f"`prompt[1]` {low}", "prompt[1]")
    assert refusal(server, "/v1/completions", prompt=[[], [size]]) == (400, f"`prompt[1][0]` {low}", "prompt[1][0]")
    assert refusal(server, "/detokenize", tokens=[size]) == (400, f"`tokens[0]` {low}", "tokens[0]")
    limit = "at most 2048, by the server's flag `--max_prompt_tokens`"
    for prompt, name in (([5] * 2049, "prompt"), ([[5], [5] * 2049], "prompt[1]")):
        assert refusal(server, "/v1/completions", prompt=prompt) == (400, f"`{name}` has 2049 tokens; {limit}", name)
    many = {"prompt": [[5] * 2048] * 17, "max_tokens": 0, "echo": True}
    message = "`prompt` has 34816 tokens in all; at most 32768 with `echo` and `logprobs`, 16 times the server's flag"
    assert refusal(server, "/v1/completions", **many, logprobs=1)[1] == f"{message} `--max_prompt_tokens`"
    server.complete(**many)
    message = "`prompt` has 40960 tokens in all, `n` 20 times; at most 32768 with `echo` and `logprobs`, 16 times"
    asked = {"prompt": [5] * 2048, "n": 20, "max_tokens": 1, "echo": True, "logprobs": 1}
    assert refusal(server, "/v1/completions", **asked)[1] == f"{message} the server's flag `--max_prompt_tokens`"
    # Begin-of-text is read before every prompt, so it is not counted where a client writes it.
    with_begin = {"max_tokens": 0, "echo": True, "prompt": [tokenizer.bos_id] + [5] * 2048}
    server.complete(**with_begin)
    with_begin["prompt"] += [5]
    assert refusal(server, "/v1/completions", **with_begin)[1] == f"`prompt` has 2049 tokens; {limit}"


# --- the best of several samples -------------------------------------------------------------------------------------


def test_the_likeliest_samples_are_returned(server: Running, decoder: Decoder, tokenizer: Tokenizer) -> None:
    prompts = ["The plot", "A film"]
    answer = server.complete(prompt=prompts, n=2, best_of=5, seed=3, max_tokens=20)
    config = SamplingConfig(seed=3, max_new_tokens=20, logprobs=0)
    samples = sample_all(decoder, tokenizer, prompts, config, num_samples=5)
    wanted = []
    for group in (samples[:5], samples[5:]):
        wanted += sorted(group, key=lambda sample: -sample.mean_logprob)[:2]
    assert [choice["text"] for choice in answer["choices"]] == [sample.text for sample in wanted]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["logprobs"] for choice in answer["choices"]} == {None}
    assert answer["usage"]["completion_tokens"] == sum(sample.num_tokens for sample in samples), "as OpenAI counts"


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_the_tokenizers_paths_are_those_of_vllm(server: Running, tokenizer: Tokenizer) -> None:
    text = TEXTS[1] + " <s>in</s> it"
    ids, eos = tokenizer.encode(text), tokenizer.eos_id
    assert ask(server, "/tokenize", prompt=text)["tokens"] == [eos, *ids]
    answer = ask(server, "/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True)
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (ids, len(ids), 102048)
    assert "".join(answer["token_strs"]).startswith("Ça va")
    assert ask(server, "/detokenize", tokens=ids) == {"prompt": text}
    assert ask(server, "/detokenize", tokens=[eos, *ids, eos]) == {"prompt": f"</s>{text}</s>"}
    assert ask(server, "/tokenize", prompt=f"</s>{text}</s>", model="tiny")["tokens"] == [eos, *ids, eos]
    info = json.loads(server.ask("GET", "/tokenizer_info")[2])
    assert (info["bos_token"], info["eos_token"], info["vocab_size"]) == ("</s>", "</s>", tokenizer.vocab_size)
    assert ask(server, "/tokenize", prompt=info["eos_token"], add_special_tokens=False)["tokens"] == [eos]
    assert refusal(server, "/tokenize", prompt="a", messages=[])[1] == "unknown field `messages`"
    assert refusal(server, "/tokenize", prompt="a", model="gpt")[0] == 404


def test_boundaries_are_text_where_nothing_is_scored(server: Running, decoder: Decoder, tokenizer: Tokenizer) -> None:
    """A prompt means the same on the command line and here."""
    config = SamplingConfig(seed=3, max_new_tokens=16)
    wanted = sample_all(decoder, tokenizer, ["</s>The"], config)[0].text
    assert server.complete(prompt="</s>The", seed=3)["choices"][0]["text"] == wanted
    assert server.complete(prompt="</s>The", seed=3)["usage"]["prompt_tokens"] == len(tokenizer.encode("</s>The"))
