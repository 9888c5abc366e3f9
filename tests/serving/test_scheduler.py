"""The thread that decodes for all clients: what it does between two steps, and what it does when a step fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoding.test_cuda_graphs import Captures
from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding import batch, cuda_graphs
from textgen.decoding.batch import RunningBatch, SingleSteps
from textgen.decoding.decoders import CellDecoder, Decoder, DecoderState
from textgen.decoding.generation import generate_stream
from textgen.decoding.guides import score_choices
from textgen.decoding.samples import Request, Sample
from textgen.model.files import load_model
from textgen.model.lstm import LSTMLanguageModel
from textgen.serving import scheduler
from textgen.serving.prompts import Prompt, PromptReader
from textgen.serving.scheduler import Delta, Scheduler, Stream
from textgen.serving.states import PrefixTable
from textgen.tokenizer import Tokenizer, train_tokenizer

LONG = [5, 6, 7, 8] * 1000


class Watched:
    """A scheduler on a plain decoder, with the shape of every call of the model: (rows, tokens)."""

    def __init__(self, run: Path) -> None:
        model, self.tokenizer = load_model(run)
        self.calls: list[tuple[int, int]] = []
        self.on_call: Callable[[int, int], None] = lambda rows, tokens: None
        model.register_forward_pre_hook(self._note)
        prefixes = PrefixTable(0)
        self.scheduler = Scheduler(Decoder(model), self.tokenizer, batch_size=8, max_waiting=8, prefixes=prefixes)
        self.ended = {name: threading.Event() for name in ("stream", "long", "short")}
        self.order: list[str] = []
        self.errors: dict[str, str] = {}

    def _note(self, _: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.calls.append((args[0].shape[0], args[0].shape[1]))
        self.on_call(*self.calls[-1])

    def on_deltas(self, deltas: list[tuple[Stream, Delta]]) -> None:
        for stream, delta in deltas:
            if delta.sample is not None or delta.error is not None:
                self.order.append(stream.owner)
                self.ended[stream.owner].set()
            if delta.error is not None:
                self.errors[stream.owner] = delta.error

    def submit(self, name: str, tokens: list[int], *, num_tokens: int, scored: bool) -> None:
        """Queue a sample; one of no tokens reads its prompt only."""
        prompt = Prompt(self.tokenizer.decode(tokens), tokens, "", self.tokenizer.bos_id)
        config = SamplingConfig(max_new_tokens=max(num_tokens, 1), min_new_tokens=max(num_tokens, 1), seed=1)
        readers = [PromptReader(prompt, self.tokenizer.bos_id, 1)] if scored else []
        ids = prompt.ids(self.tokenizer.bos_id)
        stream = self.scheduler.new_stream(
            Request(prompt.text, config), ids, name, readers=readers, reads_only=num_tokens == 0
        )
        self.scheduler.submit([stream])

    def wait_for(self, *names: str) -> None:
        for name in names:
            assert self.ended[name].wait(60), f"{name} does not end"


@contextmanager
def started(run: Path) -> Iterator[Watched]:
    watched = Watched(run)
    watched.scheduler.start(watched.on_deltas)
    try:
        yield watched
    finally:
        watched.scheduler.stop(0)
        watched.scheduler.join(10)


def test_a_scored_prompt_is_read_a_window_at_a_time_between_steps(tiny_run: Path) -> None:
    def submit_short(rows: int, tokens: int) -> None:
        if tokens == 512 and watched.calls.count((1, 512)) == 1:
            watched.submit("short", LONG[:100], num_tokens=0, scored=True)

    with started(tiny_run) as watched:
        watched.on_call = submit_short
        watched.submit("stream", [5], num_tokens=100_000, scored=False)
        watched.submit("long", LONG, num_tokens=0, scored=True)
        watched.wait_for("long", "short")
    slots = [0]  # tokens that are read between two steps
    for _, tokens in watched.calls:
        slots = [*slots, 0] if tokens == 1 else [*slots[:-1], slots[-1] + tokens]
    assert sorted(size for size in slots if size) == sorted([512] * 7 + [416, 100])
    assert watched.order.index("short") < watched.order.index("long"), "prompts take turns"


def test_prompts_are_read_when_nothing_runs(tiny_run: Path) -> None:
    with started(tiny_run) as watched:
        watched.submit("long", LONG, num_tokens=0, scored=True)
        watched.wait_for("long")
        watched.submit("short", LONG[:100], num_tokens=3, scored=True)
        watched.wait_for("short")
    assert watched.errors == {}
    assert watched.calls[-1] == (1, 1)


def test_a_window_that_fails_fails_all_and_the_next_request_is_done(tiny_run: Path) -> None:
    def fail(rows: int, tokens: int) -> None:
        if tokens == 416:
            raise RuntimeError("no memory")

    with started(tiny_run) as watched:
        watched.on_call = fail
        watched.submit("stream", [5], num_tokens=100_000, scored=False)
        watched.submit("long", LONG, num_tokens=0, scored=True)
        watched.wait_for("stream", "long")
        assert watched.errors == dict.fromkeys(("stream", "long"), "the model failed")
        watched.submit("short", LONG[:100], num_tokens=3, scored=True)
        watched.wait_for("short")
        assert "short" not in watched.errors


def test_choices_are_scored_once_for_all_samples_of_a_prompt(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []

    def score(decoder: Decoder, token: int, state: DecoderState, choices: Sequence[Sequence[int]]) -> list[float]:
        scored.append(token)
        return score_choices(decoder, token, state, choices)

    monkeypatch.setattr(batch, "score_choices", score)
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS_PER_STEP", 1)  # the samples join one after the other
    with started(tiny_run) as watched:
        names = [str(number) for number in range(6)]
        watched.ended |= {name: threading.Event() for name in names}
        for token, some in ((5, names[:4]), (6, names[4:])):
            request = Request("", SamplingConfig(choices=("a good film", "bad")))
            streams = [watched.scheduler.new_stream(request, [watched.tokenizer.bos_id, token], name) for name in some]
            watched.scheduler.submit(streams)
        watched.wait_for(*names)
    assert scored == [5, 6]


@pytest.mark.parametrize("length", [20, 600])
def test_a_cancelled_prompt_is_not_read_on(tiny_run: Path, length: int) -> None:
    with started(tiny_run) as watched:
        tokenizer: Tokenizer = watched.tokenizer
        prompt = Prompt("", LONG, "", tokenizer.bos_id)
        reader = PromptReader(prompt, tokenizer.bos_id, 1)
        stream = watched.scheduler.new_stream(
            Request("", SamplingConfig()), prompt.ids(tokenizer.bos_id), "long", readers=[reader], reads_only=True
        )
        watched.on_call = lambda rows, tokens: watched.scheduler.cancel([stream])
        watched.scheduler.submit([stream])
        watched.submit("short", LONG[:length], num_tokens=0, scored=True)
        watched.wait_for("short")
    assert [tokens for _, tokens in watched.calls].count(512) == 1 + (length == 600)
    assert not watched.ended["long"].is_set()


# --- many tokens in one call -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8() -> tuple[CellDecoder, Tokenizer]:
    """Return a decoder whose compiled code, if there is any, draws many tokens in one call."""
    tokenizer = Tokenizer(
        train_tokenizer(["it was the best of times", "call me ishmael"], vocab_size=300, model_type="char")
    )
    torch.manual_seed(1)
    model = LSTMLanguageModel(ModelConfig(embedding_dim=32, hidden_size=64), tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return CellDecoder(model, "int8"), tokenizer


KINDS: list[dict[str, Any]] = [
    {}, {"temperature": 0.5, "top_p": 0.9}, {"stop": ("e",)}, {"logprobs": 1}, {"choices": ("it", "was")},
    {"repetition_penalty": 1.2, "top_k": 20},
]  # fmt: skip


def served(
    decoder: Decoder, tokenizer: Tokenizer, requests: Sequence[Request], batch_of: Callable[..., RunningBatch] | None
) -> tuple[dict[int, Sample], dict[int, str], dict[int, list[int]], int]:
    """Return samples, texts, places of log-probabilities, and the counted tokens, of 5 rows at a time."""
    texts, ended, all_ended = dict.fromkeys(range(len(requests)), ""), dict[int, Sample](), threading.Event()
    places: dict[int, list[int]] = {i: [] for i in texts}

    def note(deltas: list[tuple[Stream, Delta]]) -> None:
        for stream, delta in deltas:
            texts[stream.owner] += delta.text
            places[stream.owner] += [place for place, _ in delta.logprobs]
            if delta.sample is not None:
                ended[stream.owner] = delta.sample
        if len(ended) == len(requests):
            all_ended.set()

    running = Scheduler(decoder, tokenizer, batch_size=5, max_waiting=99, prefixes=PrefixTable(0), batch_of=batch_of)
    running.start(note)
    for index, request in enumerate(requests):
        ids = [tokenizer.bos_id, *tokenizer.encode(request.prompt)]
        running.submit([running.new_stream(request, ids, index)])
    assert all_ended.wait(60)
    running.stop(0)
    running.join(10)
    return ended, texts, places, running.num_tokens


@pytest.mark.parametrize("way", ["one call", "graphs"])
def test_many_tokens_in_one_call_are_the_texts_and_counts_of_single_steps(
    int8: tuple[CellDecoder, Tokenizer], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """In a compiled call, and in replays as on a GPU; a text has the log-probabilities at their places."""
    decoder, tokenizer = int8
    configs = [SamplingConfig(**KINDS[i % 6], max_new_tokens=(1, 40, 90, 200)[i % 4]) for i in range(24)]
    requests = [Request(f"it was {i}", config, i) for i, config in enumerate(configs)]
    events = generate_stream(decoder, tokenizer, requests, batch_of=SingleSteps.of)
    wanted = {index: event for index, event in events if isinstance(event, Sample)}
    batch_of, captures = None, Captures()
    if way == "graphs":
        monkeypatch.setattr(cuda_graphs, "CAPTURE_AFTER", {32: 0, 8: 0, 1: 0})
        batch_of = cuda_graphs.GraphRunner(decoder, capture=captures).batch_of
    ended, texts, places, num_tokens = served(decoder, tokenizer, requests, batch_of)
    assert ended == wanted
    assert texts == {index: sample.text for index, sample in wanted.items()}
    assert num_tokens == sum(sample.num_tokens for sample in wanted.values())
    assert places == served(decoder, tokenizer, requests, SingleSteps.of)[2]
    if way == "graphs":
        assert set(captures.replays) == {32, 8, 1}
        made = [(*kind, count) for kind, (_, count) in zip(captures.kinds, captures.made, strict=True)]
        assert len(made) == len(set(made))  # nothing is captured twice, for whatever rows join


def test_what_changes_ends_the_call_that_draws(int8: tuple[CellDecoder, Tokenizer]) -> None:
    decoder, tokenizer = int8
    waiting = Scheduler(decoder, tokenizer, batch_size=5, max_waiting=9, prefixes=PrefixTable(0))  # no thread
    config = SamplingConfig(min_new_tokens=100, max_new_tokens=100)
    streams = [waiting.new_stream(Request("", config), [tokenizer.bos_id], name) for name in "ab"]

    def is_halted() -> bool:
        return bool(waiting._halt.flag.value)

    waiting.submit(streams[:1])
    assert is_halted()
    assert waiting._wait() == streams[:1]
    assert not is_halted()
    waiting._running[streams[0].running.index] = streams[0]
    assert waiting._seconds_to_draw() == 0.0  # the first token is delivered at once
    streams[0].started = True
    waiting._delivered_at = time.monotonic() + 99
    assert waiting._seconds_to_draw() > 90
    waiting.submit(streams[1:])
    assert is_halted()
    assert waiting._seconds_to_draw() < 1  # until the second one may join
    waiting._halt.set(False)
    waiting.cancel(streams)
    assert is_halted()
    waiting._halt.set(False)
    waiting.stop(9)
    assert is_halted()
