"""`textgen serve` as OpenAI's clients see it: the texts of `textgen sample`, whoever else is there."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.serving.servers import Running, running
from textgen.cli import main
from textgen.commands.serve import _prefix_table
from textgen.config import SamplingConfig
from textgen.decoding.choose import choose_decoder
from textgen.decoding.decoders import Decoder
from textgen.decoding.generation import sample_all
from textgen.decoding.samples import Sample
from textgen.model.files import load_model
from textgen.packages import HOME
from textgen.serving import responses
from textgen.serving.api import Api
from textgen.serving.protocol import Limits
from textgen.serving.scheduler import Scheduler
from textgen.serving.states import PrefixTable, StateTable

PROMPTS = ["The plot was", "Ça va, très café", "", "I watched this 🙂"]
ENDLESS = {
    "prompt": "The",
    "temperature": 0,
    "max_tokens": 100_000,
}  # the tiny model's likeliest token is never the end


@pytest.fixture(scope="module")
def server(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with running(tiny_run, log, "--max_tokens", "100000", "--max_waiting", "64", "--batch_size", "16") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


class Alone:
    """Samples without a server, of a batch of one."""

    def __init__(self, run: Path) -> None:
        model, self.tokenizer = load_model(run)
        self.decoder = choose_decoder(model, "int8")

    def __call__(self, prompt: str, number: int = 0, **settings: Any) -> Sample:
        config = SamplingConfig(**{"max_new_tokens": 16, **settings})
        return sample_all(self.decoder, self.tokenizer, [prompt], config, num_samples=number + 1)[number]


@pytest.fixture(scope="module")
def alone(tiny_run: Path) -> Alone:
    return Alone(tiny_run)


# --- the API ---------------------------------------------------------------------------------------------------------


def test_openai_client_gets_the_texts_of_textgen_sample(client: openai.OpenAI, alone: Alone) -> None:
    asked: dict[str, Any] = {"temperature": 0.8, "seed": 7, "max_tokens": 30}
    extra = {"top_k": 50, "min_p": 0.01}
    answer = client.completions.create(model="tiny", prompt=PROMPTS, n=2, top_p=0.9, extra_body=extra, **asked)
    samples = [
        alone(prompt, number, seed=7, temperature=0.8, top_p=0.9, max_new_tokens=30, **extra)
        for prompt in PROMPTS
        for number in range(2)
    ]
    assert [choice.text for choice in answer.choices] == [sample.text for sample in samples]
    assert [choice.index for choice in answer.choices] == list(range(8))
    assert [choice.finish_reason for choice in answer.choices] == [
        "stop" if sample.finished else "length" for sample in samples
    ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(sample.num_tokens for sample in samples)
    assert answer.usage.prompt_tokens == sum(len(alone.tokenizer.encode(prompt)) for prompt in PROMPTS)
    assert (answer.object, answer.model) == ("text_completion", "tiny")


def test_a_streamed_text_is_the_same_and_comes_in_pieces(client: openai.OpenAI, alone: Alone) -> None:
    stream = client.completions.create(
        model="tiny", prompt=PROMPTS[:2], max_tokens=400, seed=3, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, pieces, usage = {0: "", 1: ""}, {}, 0, None
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            assert choice.index not in reasons, "something came after the end"
            texts[choice.index] += choice.text
            pieces += 1
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    samples = [alone(prompt, seed=3, max_new_tokens=400) for prompt in PROMPTS[:2]]
    assert list(texts.values()) == [sample.text for sample in samples]
    assert sorted(reasons) == [0, 1]
    assert pieces > 4
    assert usage is not None
    assert usage.completion_tokens == sum(sample.num_tokens for sample in samples)


def test_stop_strings_end_a_text_and_echo_stands_before_it(client: openai.OpenAI, alone: Alone) -> None:
    whole = alone("The plot", seed=5, max_new_tokens=60).text
    stop = whole[20:23]
    answer = client.completions.create(model="tiny", prompt="The plot", max_tokens=60, seed=5, stop=[stop], echo=True)
    assert answer.choices[0].text == "The plot" + whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_the_models_and_say_where_each_token_stands(client: openai.OpenAI, alone: Alone) -> None:
    sample = alone("The plot", seed=5, max_new_tokens=40, logprobs=3)
    assert sample.logprobs is not None
    told = sample.logprobs
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny", prompt="The plot", max_tokens=40, seed=5, logprobs=3, stream=stream
        )
        parts = [event.choices[0] for event in (answer if stream else [answer])]
        got = [part.logprobs for part in parts if part.logprobs is not None]
        tokens = [token for part in got for token in part.tokens]
        assert tokens == [at.token for at in told]
        assert [v for part in got for v in part.token_logprobs] == pytest.approx([at.logprob for at in told], abs=1e-5)
        tops = [top for part in got for top in part.top_logprobs]
        assert [sorted(top) for top in tops] == [sorted({at.token, *(token for token, _ in at.top)}) for at in told]
        assert {len(top) for top in tops} == {3, 4}, "the drawn token is there, also if it is none of the likeliest"
        offsets = [offset for part in got for offset in part.text_offset]
        for token, start in zip(tokens, offsets, strict=True):
            assert "\\x" in token or sample.text[start:].startswith(token)  # but for parts of characters
    assert any("\\x" not in token for token in tokens)


def test_penalties_and_top_k_reach_the_draw(server: Running, alone: Alone) -> None:
    asked = {"prompt": "The", "seed": 1, "max_tokens": 40}
    text = server.complete(**asked, presence_penalty=1.5, frequency_penalty=-0.5)["choices"][0]["text"]
    wanted = alone("The", seed=1, max_new_tokens=40, presence_penalty=1.5, frequency_penalty=-0.5).text
    assert text == wanted != alone("The", seed=1, max_new_tokens=40).text
    likeliest = alone("The", temperature=0.0, max_new_tokens=40).text
    assert server.complete(**asked, top_k=1)["choices"][0]["text"] == likeliest


def test_samplers_biases_regexes_and_choices_give_the_texts_of_textgen_sample(
    client: openai.OpenAI, server: Running, alone: Alone
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPTS[:2], "n": 3, "seed": 4, "max_tokens": 20}
    settings: list[dict[str, Any]] = [
        {"xtc_probability": 0.5, "xtc_threshold": 0.02, "dry_multiplier": 1.5, "dry_breakers": ["."]},
        {"logit_bias": {"17": 5, "was": 3.5}},
        {"regex": r" [a-z]{2,9}( [a-z]{2,9}){0,2}\."},
        {"choices": [" a", " was good"]},
    ]
    for setting in settings:
        answer = client.completions.create(**asked, extra_body=setting)
        config = {name: tuple(value) if isinstance(value, list) else value for name, value in setting.items()}
        if "logit_bias" in config:
            config["logit_bias"] = tuple(config["logit_bias"].items())
        config |= {"seed": 4, "max_new_tokens": 20}
        samples = [alone(prompt, number, **config) for prompt in PROMPTS[:2] for number in range(3)]
        assert [choice.text for choice in answer.choices] == [sample.text for sample in samples]
        assert samples[0] != alone(PROMPTS[0], seed=4, max_new_tokens=20)
        reasons = {"end": "stop", "choice": "stop", "length": "length"}
        assert [choice.finish_reason for choice in answer.choices] == [reasons[sample.reason] for sample in samples]
        events = client.completions.create(**asked | {"n": 1}, stream=True, extra_body=setting)
        texts = ["", ""]
        for event in events:
            texts[event.choices[0].index] += event.choices[0].text
        assert texts == [samples[0].text, samples[3].text]
    choice = server.complete(prompt=PROMPTS[0], choices=[" a", " was good"])["choices"][0]
    assert choice["probabilities"] == pytest.approx(dict(samples[0].choices or ()), abs=1e-5)


def test_steering_that_cannot_be_is_400_by_name(server: Running) -> None:
    for setting, message in {
        ("regex", "(a{1,1000}){1,1000}"): "`regex` is too large: 1000000 positions with its repetitions, at most 2000",
        ("regex", "(a?){900}a{900}"): "`regex` is too large: texts that match it take more than 10000 states",
        ("regex", "a("): "`regex` cannot be used: unclosed group",
        ("regex", r"[^\s\S]"): "`regex` matches no text",
        ("logit_bias", "9999"): "`logit_bias` must be below the vocabulary's size 340: 9999",
        ("logit_bias", ""): "`logit_bias`: the tokenizer has no token for ''",
        ("choices", "漢" * 100): f"`choices` must be texts of at most 256 tokens: 300 for '{'漢' * 40}'",
    }.items():
        name, value = setting
        given = {value: 1} if name == "logit_bias" else [value] if name == "choices" else value
        status, _, body = server.ask("POST", "/v1/completions", {name: given})
        error = json.loads(body)["error"]
        assert (status, error["message"], error["param"]) == (400, message, name)


def test_a_regex_waits_for_others_no_longer_than_a_request_may_take(tiny_run: Path) -> None:
    model, tokenizer = load_model(tiny_run)
    scheduler = Scheduler(Decoder(model), tokenizer, batch_size=1, max_waiting=1, prefixes=PrefixTable(0))
    api = Api("tiny", "none", scheduler, Limits(timeout=0.01), StateTable(0, 1), lambda: 0)

    async def ask() -> None:
        await api._compiling.acquire()
        with pytest.raises(responses.ApiError, match=r"^not ready within 0\.01 seconds$"):
            await api._require_drawable(SamplingConfig(regex="a"))
        api._compiling.release()
        await api._require_drawable(SamplingConfig(regex="a"))

    asyncio.run(ask())


def test_a_bias_against_the_only_match_bans_nothing(server: Running) -> None:
    ended = server.complete(prompt="The", regex="a{2}", logit_bias={"a": -100}, max_tokens=9, logprobs=1)["choices"][0]
    assert ended["finish_reason"] in ("stop", "length"), "a bias bans nothing for sure"
    assert len(ended["logprobs"]["tokens"]) == len(ended["logprobs"]["text_offset"]) >= 1


@pytest.mark.parametrize("settings", [{}, {"seed": 7}, {"n": 2, "seed": 7}])
def test_equal_prompts_of_a_list_get_different_texts_those_of_n(
    client: openai.OpenAI, alone: Alone, settings: dict[str, Any]
) -> None:
    prompts = ["The plot", "The", "The plot", "The plot"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=30, **settings)
    n = settings.get("n", 1)
    texts = [choice.text for choice in answer.choices]
    equal = texts[:n] + texts[2 * n :]
    assert len(set(equal)) == 3 * n
    if "seed" in settings:
        more = client.completions.create(model="tiny", prompt="The plot", max_tokens=30, n=3 * n, seed=7)
        assert equal == [choice.text for choice in more.choices]
        assert equal == [alone("The plot", number, seed=7, max_new_tokens=30).text for number in range(3 * n)]
        assert texts[n] == alone("The", seed=7, max_new_tokens=30).text


def test_nothing_is_counted_across_requests(server: Running) -> None:
    asked = {"prompt": ["The", "The"], "seed": 3, "max_tokens": 30}
    first, second = server.complete(**asked), server.complete(**asked)
    assert first["choices"] == second["choices"]
    assert server.complete(prompt="The", seed=3, max_tokens=30)["choices"][0] == first["choices"][0]


def test_a_list_of_as_many_prompts_as_the_queue_holds_is_done(client: openai.OpenAI, alone: Alone) -> None:
    prompts = [f"The plot {i % 40}" for i in range(64)]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=5, seed=7, stop=["@", *"ABCDEFGHIJKLM"])
    assert len(answer.choices) == 64
    for i in (0, 39, 40, 63):
        wanted = alone(prompts[i], i // 40, seed=7, max_new_tokens=5, stop=("@", *"ABCDEFGHIJKLM")).text
        assert answer.choices[i].text == wanted
    limit = "at most 64, by the server's flag `--max_waiting`"
    for prompt, n, message in [
        (prompts * 5, 1, f"`prompt` has 320 items; {limit}"),
        (prompts[:20], 4, f"`prompt` has 20 items and `n` is 4: 80 samples; {limit}"),
        ("The", 65, f"`n` is 65; {limit}"),
    ]:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", prompt=prompt, n=n)
        assert refused.value.body == {
            "message": message,
            "type": "invalid_request_error",
            "param": "prompt",
            "code": None,
        }


def test_values_that_ask_for_nothing_change_nothing(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "The", "seed": 7, "max_tokens": 20}
    nothing: dict[str, Any] = {
        "best_of": 1, "suffix": None, "logit_bias": {}, "n": 1, "echo": False, "logprobs": None, "user": "u",
        "presence_penalty": 0, "frequency_penalty": 0, "stop": [], "stream": False, "stream_options": {},
        "extra_body": {
            "tools": [], "tool_choice": "auto", "functions": [], "function_call": "none", "parallel_tool_calls": True,
            "response_format": {"type": "text"}, "store": False, "metadata": {}, "service_tier": "auto",
            "messages": [], "top_logprobs": None, "modalities": None,
        },
    }  # fmt: skip
    wanted = client.completions.create(**asked)
    answer = client.completions.create(**asked, **nothing)
    assert answer.choices == wanted.choices
    assert client.completions.create(**asked, suffix="").choices == wanted.choices
    options = {"include_obfuscation": False, "include_usage": False}
    events = client.completions.create(**asked, stream=True, stream_options=options)
    assert "".join(event.choices[0].text for event in events) == wanted.choices[0].text


def test_a_request_for_a_chat_says_where_texts_are_continued(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`POST /v1/completions` continues texts; chats are not supported"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])


def test_null_is_as_good_as_nothing(server: Running) -> None:
    fields = json.loads(server.ask("GET", "/openapi.json")[2])["components"]["schemas"]["CompletionRequest"][
        "properties"
    ]
    assert "stream_options" in fields
    answer = server.complete(**dict.fromkeys(fields))
    assert answer["usage"]["completion_tokens"] <= 16
    assert answer["choices"][0]["logprobs"] is None


def test_responses_have_the_fields_of_their_models_in_order(server: Running) -> None:
    def check(model: type[BaseModel], body: bytes) -> None:
        parsed = model.model_validate_json(body, strict=True, extra="forbid")
        assert json.dumps(parsed.model_dump(exclude_unset=True)) == json.dumps(json.loads(body))

    asked = {"prompt": ["The", "A"], "logprobs": 2, "max_tokens": 5}
    for path, model, request in [
        ("/v1/models", responses.ModelList, None),
        ("/v1/models/tiny", responses.Model, None),
        ("/healthz", responses.Health, None),
        ("/nothing", responses.ErrorResponse, None),
        ("/v1/completions", responses.ErrorResponse, {"n": 0}),
        ("/v1/completions", responses.Completion, {"prompt": "The"}),
        ("/v1/completions", responses.Completion, asked),
        ("/v1/completions", responses.Completion, {"prompt": "The", "choices": ["a", "b"]}),
    ]:
        check(model, server.ask("GET" if request is None else "POST", path, request)[2])
    events = server.ask("POST", "/v1/completions", asked | {"stream": True})[2].split(b"\n\n")
    choices = [choice for event in events[:-2] for choice in json.loads(event.removeprefix(b"data: "))["choices"]]
    assert {choice["index"] for choice in choices} == {0, 1}
    for choice in choices:
        check(responses.CompletionChoice, json.dumps(choice).encode())


def test_without_a_seed_texts_differ(server: Running) -> None:
    texts = {server.complete(prompt="The", max_tokens=30)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) == 4


def test_the_model_is_listed_and_another_one_is_not_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "textgen"
    for ask in (lambda: client.models.retrieve("gpt"), lambda: client.completions.create(model="gpt", prompt="")):
        with pytest.raises(openai.NotFoundError, match="the model here is `tiny`"):
            ask()


def test_64_streams_at_a_time_are_each_what_they_are_alone(server: Running, alone: Alone) -> None:
    def asked(number: int) -> dict[str, Any]:
        return {"temperature": 0.5 + number / 64, "seed": number, "presence_penalty": number % 3 / 2}

    async def text_of(client: openai.AsyncOpenAI, number: int) -> str:
        await asyncio.sleep(number % 7 / 50)  # they join a batch that runs
        stream = await client.completions.create(
            model="tiny", prompt=PROMPTS[number % 4], max_tokens=20 + number, stream=True, **asked(number)
        )
        return "".join([event.choices[0].text async for event in stream])

    async def texts() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(text_of(client, number) for number in range(64)))

    wanted = [alone(PROMPTS[i % 4], max_new_tokens=20 + i, **asked(i)).text for i in range(64)]
    assert asyncio.run(texts()) == wanted


# --- clients that leave, queues that are full ------------------------------------------------------------------------


def begin(server: Running, **asked: Any) -> socket.socket:
    """Send a request and return its connection, the head of the answer read if it streams."""
    body = json.dumps(ENDLESS | asked).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )
    if asked.get("stream"):
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_places(server: Running, stream: bool) -> None:
    with begin(server, stream=stream, n=3):
        server.wait_until("samples_running", 3)
    server.wait_until("samples_running", 0)


def test_more_than_the_queue_holds_is_refused_and_taken_again_later(server: Running) -> None:
    with ExitStack() as clients:
        for running in (8, 16):
            clients.enter_context(begin(server, n=8))
            server.wait_until("samples_running", running)
        for _ in range(8):
            clients.enter_context(begin(server, n=8))
        server.wait_until("samples_waiting", 64)
        status, headers, body = server.ask("POST", "/v1/completions", {"prompt": "The"})
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["message"] == "64 samples are waiting, at most 64 may wait"
    server.wait_until("samples_running", 0)
    assert server.metric("samples_waiting") == 0
    assert server.complete(prompt="The")["choices"]


# --- what is told to whom --------------------------------------------------------------------------------------------


def test_other_hosts_and_other_sites_are_refused(server: Running) -> None:
    own = f"127.0.0.1:{server.port}"
    for host in (own, "localhost", "LOCALHOST:1", "[::1]:8000"):
        assert server.ask("GET", "/v1/models", headers={"host": host})[0] == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "192.168.0.1", "evil.example@127.0.0.1", "[", ""):
        status, _, body = server.ask("GET", "/", headers={"host": host})
        assert (status, "`Host`" in json.loads(body)["error"]["message"]) == (403, True), host
    assert server.ask("GET", "/", headers={"origin": server.url})[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "", f"http://evil.example?{own}"):
        status, headers, _ = server.ask("POST", "/v1/completions", {"prompt": ""}, headers={"origin": origin})
        assert status == 403, origin
        assert "access-control-allow-origin" not in headers


def test_answers_forbid_what_a_browser_need_not_do(server: Running) -> None:
    for path in ("/", "/page.js", "/v1/models", "/nothing"):
        headers = server.ask("GET", path)[1]
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert "unsafe" not in headers["content-security-policy"]


def test_health_and_metrics_are_told(server: Running) -> None:
    status, _, body = server.ask("GET", "/healthz")
    assert (status, json.loads(body)) == (200, {"status": "ok"})
    before = server.metric("tokens_total")
    server.complete(prompt="The", max_tokens=5, temperature=0)
    assert server.metric("tokens_total") == before + 5
    for line in server.ask("GET", "/metrics")[2].decode().splitlines():
        figure = r'textgen_\w+(\{path="[^"]+",code="\d+"\})? [\d.e+-]+'
        assert re.fullmatch(rf"# TYPE textgen_\w+ (counter|gauge|summary)|{figure}", line)


def test_the_log_holds_neither_prompts_nor_texts(server: Running) -> None:
    text = server.complete(prompt="Xanadu", max_tokens=50, seed=1, stop=["Xerxes"])["choices"][0]["text"]
    server.ask("POST", "/v1/completions", {"prompt": "Xanadu", "n": "Xylophone"})
    server.ask("POST", "/v1/completions?prompt=Xanadu", b'{"prompt": "Xanadu')
    server.ask("GET", "/Xanadu?Xanadu")
    log = server.log.read_text()
    assert "/v1/completions 400 " in log
    assert "other 404 " in log
    assert not re.search("X(anadu|erxes|ylophone)", log)
    assert text not in log
    assert "failed" not in log, "some request before, or one that was cut"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "`host` 0.0.0.0 is not a loopback address: set `token_file`"),
        (["--host", "example.org"], "`host` example.org is not a loopback address: set `token_file`"),
        (["--token_file", "short"], "`short` must contain a token of at least 16 letters, digits and signs"),
        (["--token_file", "none"], "`none` cannot be read: No such file or directory"),
        (["--max_waiting", "0"], "`max_waiting` must be at least 1: 0"),
        (["--port", "65536"], "`port` must be at most 65535: 65536"),
        (["--threads", "0"], "`threads` must be at least 1: 0"),
        (["--prefix_cache", "-1"], "`prefix_cache` must be at least 0: -1.0"),
        (["--prefix_cache", ".nan"], "`prefix_cache` must be below 1073741824 MiB: nan"),
        (["--kept_states", "-1"], "`kept_states` must be at least 0: -1"),
        (["--kept_state_seconds", "0"], "`kept_state_seconds` must be above 0 and at most a year: 0.0"),
        (["--timeout", "0"], "`timeout` must be above 0 and at most 86400: 0.0"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from textgen.cli import main

    monkeypatch.chdir(tmp_path)
    Path("short").write_text("secret\n")
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "nowhere", *flags])
    assert capsys.readouterr().err == f"error: {said}\n"


def test_states_of_prompts_that_no_memory_holds_are_said_in_a_line(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = Decoder(load_model(tiny_run)[0])
    with pytest.raises(SystemExit, match="2"):
        _prefix_table(1e9, decoder)
    said = "error: `prefix_cache` 1e+09 MiB cannot be allocated: this machine has less memory\n"
    assert capsys.readouterr().err == said
    assert _prefix_table(1, decoder).num_bytes == 0


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "nowhere"])
    command = f"run `pip install -e '.[serve]'` in `{HOME}`"
    assert capsys.readouterr().err == f"error: `textgen serve` needs `uvicorn`: {command}\n"


def test_a_port_that_is_taken_is_said_in_a_line(server: Running, tiny_run: Path) -> None:
    argv = [sys.executable, "-m", "textgen", "serve", str(tiny_run), "--port", str(server.port)]
    ended = subprocess.run(argv, capture_output=True, text=True)
    said = f"error: cannot listen on `host` 127.0.0.1 and `port` {server.port}: Address already in use\n"
    assert (ended.returncode, ended.stderr) == (2, said)


def test_a_token_is_demanded_time_is_limited_and_sigterm_drains(tiny_run: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("correct-horse-battery\n")
    flags = ["--host", "0.0.0.0", "--token_file", str(token), "--timeout", "1.5", "--max_tokens", "100000"]
    with running(tiny_run, tmp_path / "log", *flags, "--name", "own") as server:
        for sent in ({}, {"authorization": "Bearer wrong"}, {"authorization": "correct-horse-battery"}):
            for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions")):
                status, headers, body = server.ask(method, path, headers=sent)
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert json.loads(body)["error"]["type"] == "authentication_error"
        assert server.ask("GET", "/", headers={"host": "192.168.0.1"})[0] == 200
        assert server.ask("GET", "/", headers={"host": "evil.example"})[0] == 403
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="correct-horse-battery", max_retries=0)
        with client:
            assert client.completions.create(model="own", prompt="The", max_tokens=3).choices[0].text
            with pytest.raises(openai.APIError, match=r"not ready within 1\.5 seconds"):
                client.completions.create(model="own", **ENDLESS)
            with pytest.raises(openai.APIError, match=r"not ready within 1\.5 seconds"):
                list(client.completions.create(model="own", stream=True, **ENDLESS))

    with running(tiny_run, tmp_path / "log", "--max_tokens", "100000") as server:
        ended: dict[str, bytes] = {}

        def read(name: str, connection: socket.socket) -> None:
            with connection:
                while data := connection.recv(1 << 16):
                    ended[name] = ended.get(name, b"") + data

        asked = {"short": {"max_tokens": 200}, "endless": {}}
        streams = {name: begin(server, stream=True, **more) for name, more in asked.items()}
        threads = [threading.Thread(target=read, args=item) for item in streams.items()]
        for thread in threads:
            thread.start()
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert server.process.wait(30) == 0
        assert time.monotonic() - started > 1.5, "the endless stream was given no time"
        for thread in threads:
            thread.join()
        assert b'"finish_reason": "length"' in ended["short"]
        assert b"the server is shutting down" in ended["endless"]
        assert all(data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for data in ended.values())
