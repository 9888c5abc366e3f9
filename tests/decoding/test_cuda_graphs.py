"""Steps on buffers against a plain batch, and what the host does around them. No graph here, but the same functions."""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import pytest
import torch

from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding import cuda_graphs as graphs
from textgen.decoding.batch import Batch, RunningBatch, SingleSteps, token_logprobs
from textgen.decoding.cuda_graphs import Buffers, GraphRunner, steps_in_place
from textgen.decoding.decoders import CellDecoder, Decoder, DecoderState
from textgen.decoding.generation import generate_stream
from textgen.decoding.samples import Request, RunningSample, Sample
from textgen.kernels.capture import CudaCapture, Replay
from textgen.model.lstm import LSTMLanguageModel
from textgen.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["it was the best of times, it was the worst of times", "call me ishmael", "é è ü ß 漢字 🙂🙃 naïve café"]
MIXED = [
    SamplingConfig(seed=1),
    SamplingConfig(temperature=0.0),
    SamplingConfig(temperature=0.7, top_k=20, top_p=0.9),
    SamplingConfig(min_p=0.02, typical_p=0.95, repetition_penalty=1.3, logprobs=2),
    SamplingConfig(presence_penalty=0.5, frequency_penalty=0.2, no_repeat_ngram=2, banned_tokens=(40, 50)),
    SamplingConfig(forced_tokens=(60, 61), min_new_tokens=9, logprobs=0, seed=3),
    SamplingConfig(no_repeat_ngram=3, top_k=5, stop=("e", "🙂🙃")),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXTS, vocab_size=400, model_type="char"))


def build(tokenizer: Tokenizer, *, ending: float) -> CellDecoder:
    """Return a decoder; the larger `ending`, the sooner its texts end."""
    torch.manual_seed(4)
    model = LSTMLanguageModel(ModelConfig(embedding_dim=24, hidden_size=40, num_layers=2), tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.output.bias[tokenizer.eos_id] += ending
    return CellDecoder(model)


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> CellDecoder:
    return build(tokenizer, ending=2.5)


@pytest.fixture(scope="module")
def endless(tokenizer: Tokenizer) -> CellDecoder:
    return build(tokenizer, ending=-1000.0)


def requests_for(configs: list[SamplingConfig], count: int, lengths: list[int]) -> list[Request]:
    """Return requests with configs and lengths in turn."""
    requests = []
    for i in range(count):
        config, length = configs[i % len(configs)], lengths[i % len(lengths)]
        config = dataclasses.replace(config, max_new_tokens=max(length, config.min_new_tokens))
        requests.append(Request(f"it was {i}", config))
    return requests


def batch_of(decoder: Decoder, tokenizer: Tokenizer, requests: list[Request]) -> Batch:
    return Batch.of(decoder, tokenizer, [RunningSample.of(i, r, tokenizer) for i, r in enumerate(requests)])


def samples(
    batch_of: Callable[..., RunningBatch],
    decoder: Decoder,
    tokenizer: Tokenizer,
    requests: list[Request],
    *,
    batch_size: int = 64,
) -> dict[int, Sample]:
    events = generate_stream(decoder, tokenizer, requests, batch_size=batch_size, batch_of=batch_of)
    return {index: event for index, event in events if isinstance(event, Sample)}


class Captures:
    """Stands where graphs are captured: makes the plain function of a capture, and keeps count."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []
        """rows and steps of each"""
        self.kinds: list[tuple[int, tuple[object, ...]]] = []
        """rows and settings of each"""
        self.replays: list[int] = []
        """steps of each replay"""

    def __call__(self, buffers: Buffers, count: int) -> Replay:
        self.made.append((len(buffers.tokens), count))
        self.kinds.append((len(buffers.tokens), buffers.sampling.features))
        run = partial(steps_in_place, buffers, count)

        def replay() -> None:
            self.replays.append(count)
            run()

        return replay


@pytest.fixture
def captures() -> Captures:
    return Captures()


# --- steps on buffers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8, 32])
@pytest.mark.parametrize("slots", [[0], [2, 0, 3], [0, 1, 2, 3], [6, 1, 3, 0, 7, 5, 4]])
@torch.inference_mode()
def test_steps_in_place_are_those_of_a_batch(
    decoder: CellDecoder, tokenizer: Tokenizer, slots: list[int], count: int
) -> None:
    """Tokens, log-probabilities and what is left afterwards, of rows in any slots, beside slots that nobody uses."""
    requests = requests_for(MIXED, 7, [200])[-len(slots) :]
    plain, batch = batch_of(decoder, tokenizer, requests), batch_of(decoder, tokenizer, requests)
    buffers = Buffers.like(batch, 1 << (len(slots) - 1).bit_length())
    buffers.load(batch, slots)
    before = [part.data_ptr() for part in (buffers.tokens, *buffers.state, *buffers.sampling.tensors.values())]
    steps_in_place(buffers, count)
    running = [True] * len(slots)
    for i in range(count):
        tokens, told = plain.advance()
        drawn = buffers.drawn[i][slots].tolist()
        seen = token_logprobs(tokenizer, drawn, *(part[i, slots] for part in buffers.logprobs)) if told else None
        for place in range(len(slots)):
            if running[place]:
                assert drawn[place] == tokens[place]
                if told is not None and seen is not None:
                    assert seen[place].token == told[place].token
                    assert seen[place].logprob == pytest.approx(told[place].logprob, abs=1e-5)
                    assert [token for token, _ in seen[place].top] == [token for token, _ in told[place].top]
            else:
                assert drawn[place] == tokenizer.eos_id  # nothing but the end once a text has ended
            running[place] &= tokens[place] != tokenizer.eos_id
    assert before == [part.data_ptr() for part in (buffers.tokens, *buffers.state, *buffers.sampling.tensors.values())]
    going = torch.tensor(running)
    assert torch.equal(buffers.tokens[slots][going], plain.tokens[going])
    for mine, theirs in zip(buffers.state, plain.state, strict=True):
        torch.testing.assert_close(mine[slots][going], theirs[going])
    for name, value in plain.sampling.tensors.items():
        assert torch.equal(buffers.sampling.tensors[name][slots][going], value[going]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_steps_on_a_gpu_decide_nothing_by_data(
    decoder: CellDecoder, tokenizer: Tokenizer, dtype: Literal["float32", "bfloat16"]
) -> None:
    """With tensors that have no data, and take the paths of a GPU: whoever reads a value from them fails."""
    batch = batch_of(decoder, tokenizer, requests_for(MIXED, 7, [200]))
    batch.decoder = CellDecoder(copy.deepcopy(decoder.model).to("meta"), dtype)
    batch.tokens, batch.state = batch.tokens.to("meta"), [part.to("meta") for part in batch.state]
    batch.sampling.tensors = {name: value.to("meta") for name, value in batch.sampling.tensors.items()}
    buffers = Buffers.like(batch, 8)
    buffers.load(batch, range(7))
    steps_in_place(buffers, 2)
    with pytest.raises(RuntimeError):
        bool(buffers.drawn.any())


# --- the host's side -------------------------------------------------------------------------------------------------


def without_logprobs(samples: dict[int, Sample]) -> dict[int, Sample]:
    """Return samples to compare; a matrix product of other rows may round the log-probabilities otherwise."""
    return {i: dataclasses.replace(sample, logprobs=None) for i, sample in samples.items()}


def assert_same(seen: dict[int, Sample], wanted: dict[int, Sample]) -> None:
    assert without_logprobs(seen) == without_logprobs(wanted)
    for i, sample in wanted.items():
        for mine, theirs in zip(seen[i].logprobs or (), sample.logprobs or (), strict=True):
            assert mine.token == theirs.token
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


@pytest.mark.parametrize("patience", [{1: 0}, {8: 0, 1: 0}, {32: 0, 8: 0, 1: 0}, {32: 64, 8: 16, 1: 16}, {32: 10**9}])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_samples_are_those_of_single_steps(
    decoder: CellDecoder,
    tokenizer: Tokenizer,
    captures: Captures,
    monkeypatch: pytest.MonkeyPatch,
    patience: dict[int, int],
    batch_size: int,
) -> None:
    """Rows of all kinds, that end by themselves, by length or by a stop string in a replay, and rows that come."""
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", patience)
    requests = requests_for(MIXED, 24, [1, 7, 30, 100, 64])
    wanted = samples(SingleSteps.of, decoder, tokenizer, requests, batch_size=batch_size)
    runner = GraphRunner(decoder, capture=captures)
    assert_same(samples(runner.batch_of, decoder, tokenizer, requests, batch_size=batch_size), wanted)
    assert len(wanted) == 24
    assert {sample.finished for sample in wanted.values()} == {True, False}
    assert {steps for _, steps in captures.made} <= set(patience)
    assert all(rows & (rows - 1) == 0 for rows, _ in captures.made)  # powers of two
    if patience.get(1) == 0:
        assert set(captures.replays) == set(patience)


def started(
    runner: GraphRunner, tokenizer: Tokenizer, requests: list[Request], beside: RunningBatch | None = None
) -> RunningBatch:
    """Return the batch of a runner with further samples."""
    joining = [RunningSample.of(0, request, tokenizer) for request in requests]
    return runner.batch_of(runner.decoder, tokenizer, joining, beside=beside)


def draw_once(batch: RunningBatch, **settings: Any) -> list[int]:
    """Push what a call draws, and return the number of tokens of each sample."""
    tokens, logprobs = batch.advance_many(**settings)
    for row, sample in enumerate(batch.samples):
        list(sample.push_all(tokens[row], None if logprobs is None else logprobs[row]))
    return list(map(len, tokens))


def draw_all(batch: RunningBatch) -> None:
    running: RunningBatch | None = batch
    while running is not None:
        draw_once(running)
        running = running.without_ended()


def texts_alone(decoder: Decoder, tokenizer: Tokenizer, requests: list[Request]) -> list[str]:
    """Return the text of each request, drawn alone in single steps."""
    return [samples(SingleSteps.of, decoder, tokenizer, [request])[0].text for request in requests]


def test_rows_join_and_leave_without_a_capture(
    endless: CellDecoder, tokenizer: Tokenizer, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a launch is not read yet; a row that joins has no token of it, nor has the one that left the slot."""
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {8: 0})
    requests = [Request(f"it was {i}", SamplingConfig(max_new_tokens=96, seed=i)) for i in range(10)]
    wanted = texts_alone(endless, tokenizer, requests)
    runner = GraphRunner(endless, capture=captures)
    batch = started(runner, tokenizer, requests[:4])
    all_samples = list(batch.samples)
    assert draw_once(batch) == [8] * 4
    for request in requests[4:]:
        batch.samples[0].ended = True  # as of a client that is gone
        going = batch.without_ended()
        assert going is not None
        batch = started(runner, tokenizer, [request], going)
        all_samples.append(batch.samples[-1])
        assert draw_once(batch) == [8, 8, 8, 0]
        assert draw_once(batch) == [8, 8, 8, 8]
    assert captures.made == [(4, 8)]
    draw_all(batch)
    lengths = [sample.num_tokens for sample in all_samples]
    assert lengths == [8, 24, 40, 56, 56, 56, *[96] * 4]
    for sample, text in zip(all_samples, wanted, strict=True):
        assert text.startswith(sample.text)
    assert [sample.text for sample in all_samples[-4:]] == wanted[-4:]


def test_more_rows_than_slots_move_to_more_once(
    endless: CellDecoder, tokenizer: Tokenizer, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {8: 0})
    requests = [Request(f"it was {i}", SamplingConfig(max_new_tokens=64, seed=i)) for i in range(9)]
    wanted = texts_alone(endless, tokenizer, requests)
    runner = GraphRunner(endless, capture=captures)
    batch = started(runner, tokenizer, requests[:1])
    for request in requests[1:]:
        draw_once(batch)
        batch = started(runner, tokenizer, [request], batch)
    all_samples = list(batch.samples)
    draw_all(batch)
    assert [sample.text for sample in all_samples] == wanted
    assert captures.made[:5] == [(1, 8), (2, 8), (4, 8), (8, 8), (16, 8)]
    assert len(captures.made) == len(set(captures.made)) == 5  # those of fewer slots are there already


def test_settings_of_all_kinds_need_few_graphs(
    endless: CellDecoder, tokenizer: Tokenizer, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kind for temperatures, one for all that kernels know, one for each set of the others."""
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {1: 0})
    groups: list[list[dict[str, Any]]] = [
        [{}, {"temperature": 0.0}, {"temperature": 0.3}],
        [{"repetition_penalty": 1.1}, {"banned_tokens": (40,)}, {"logit_bias": (("e", 1.0),), "temperature": 0.5}],
        [{"presence_penalty": 0.3, "min_new_tokens": 4}, {"frequency_penalty": 0.1, "temperature": 0.0}],
        [{"top_k": 3}, {"top_k": 50}],
        [{"top_p": 0.5, "temperature": 0.7}, {"top_p": 0.9, "temperature": 1.2}],
        [{"logprobs": 1}, {"logprobs": 5, "temperature": 0.7}],
    ]
    settings = [each for group in groups for each in group]
    requests = [Request(f"it {i}", SamplingConfig(max_new_tokens=12, **each)) for i, each in enumerate(settings)]
    wanted = texts_alone(endless, tokenizer, requests)
    runner = GraphRunner(endless, capture=captures)
    batch = started(runner, tokenizer, requests[::2])
    draw_once(batch)
    batch = started(runner, tokenizer, requests[1::2], batch)
    all_samples = list(batch.samples)
    draw_all(batch)
    assert [sample.text for sample in all_samples] == [*wanted[::2], *wanted[1::2]]
    kinds = {features for _, features in captures.kinds}
    assert len(kinds) == len(groups) - 1  # the second and the third are one


def test_rows_that_fit_no_group_run_step_by_step(
    decoder: CellDecoder, tokenizer: Tokenizer, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows beyond the slots, kinds beyond the groups, and rows that a regex guides, beside rows in graphs."""
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {8: 0, 1: 0})
    monkeypatch.setattr(graphs, "MAX_ROWS", 4)
    monkeypatch.setattr(graphs, "MAX_KINDS", 2)
    guided = SamplingConfig(regex="[a-z ]{1,30}", top_k=5)
    requests = requests_for([SamplingConfig(), *MIXED, guided], 30, [20, 40, 33])
    wanted = samples(SingleSteps.of, decoder, tokenizer, requests)
    runner = GraphRunner(decoder, capture=captures)
    assert_same(samples(runner.batch_of, decoder, tokenizer, requests), wanted)
    assert max(rows for rows, _ in captures.made) == 4


def test_a_step_is_launched_alone_where_text_is_due(
    endless: CellDecoder, tokenizer: Tokenizer, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {32: 0, 8: 0, 1: 0})
    runner = GraphRunner(endless, capture=captures)
    batch = started(runner, tokenizer, [Request("it", SamplingConfig(max_new_tokens=500))])
    assert draw_once(batch, seconds=0.0) == [1]
    assert captures.replays == [1, 1]
    assert draw_once(batch, seconds=0.01) == [1]
    assert captures.replays == [1, 1, 32]
    assert draw_once(batch, seconds=0.0) == [32]
    assert captures.replays == [1, 1, 32, 1]


def test_short_texts_wait_for_no_capture(endless: CellDecoder, tokenizer: Tokenizer, captures: Captures) -> None:
    runner = GraphRunner(endless, capture=captures)
    for _ in range(2):
        samples(runner.batch_of, endless, tokenizer, [Request("it", SamplingConfig(max_new_tokens=8))])
    assert captures.made == []
    samples(runner.batch_of, endless, tokenizer, [Request("it", SamplingConfig(max_new_tokens=31))])
    assert captures.made == [(1, 8), (1, 1)]  # 16 steps were drawn before: 24 and 7 are left
    samples(runner.batch_of, endless, tokenizer, [Request("it", SamplingConfig(max_new_tokens=200))])
    assert captures.made == [(1, 8), (1, 1), (1, 32)]
    assert captures.replays[-1] == 8


def test_texts_that_end_by_length_are_not_overrun(
    endless: CellDecoder, tokenizer: Tokenizer, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {32: 0, 8: 0, 1: 0})
    runner = GraphRunner(endless, capture=captures)
    samples(runner.batch_of, endless, tokenizer, [Request("it", SamplingConfig(max_new_tokens=75))])
    assert captures.replays == [32, 32, 8, 1, 1, 1]
    # of many rows an eighth may be
    captures.replays.clear()
    requests = [Request(f"it {i}", SamplingConfig(max_new_tokens=40 if i else 9)) for i in range(8)]
    samples(runner.batch_of, endless, tokenizer, requests)
    assert captures.replays == [32, 8]


def test_a_replay_is_read_while_the_next_one_runs(
    endless: CellDecoder, tokenizer: Tokenizer, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {8: 0})
    batch = started(
        GraphRunner(endless, capture=captures), tokenizer, [Request("it", SamplingConfig(max_new_tokens=80))]
    )
    launched = []
    while not batch.samples[0].ended:
        assert draw_once(batch) == [8]
        launched.append(len(captures.replays))
    assert launched == [min(i + 2, 10) for i in range(10)]


def test_a_token_is_told_before_the_next_one_is_drawn_without_a_graph(
    endless: CellDecoder, tokenizer: Tokenizer, captures: Captures
) -> None:
    read = 0

    class Counting(CellDecoder):
        def step(self, tokens: torch.Tensor, state: DecoderState) -> tuple[torch.Tensor, DecoderState]:
            nonlocal read
            read += 1
            return super().step(tokens, state)

    runner = GraphRunner(Counting(endless.model), capture=captures)
    batch = started(runner, tokenizer, [Request("it", SamplingConfig(max_new_tokens=10))])
    read = 0
    for told in range(1, 11):
        assert draw_once(batch) == [1]
        assert read == told


def test_buffers_used_longest_ago_are_dropped(
    endless: CellDecoder, tokenizer: Tokenizer, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {8: 0})
    runner = GraphRunner(endless, capture=captures, max_kept=2)

    def run(count: int) -> None:
        samples(runner.batch_of, endless, tokenizer, requests_for([SamplingConfig()], count, [8]))

    for count in (1, 2, 1, 4, 1):
        run(count)
    assert captures.made == [(1, 8), (2, 8), (4, 8)]
    run(2)
    assert captures.made == [(1, 8), (2, 8), (4, 8), (2, 8)]
    monkeypatch.setattr(graphs, "MAX_KEPT_BYTES", 0)  # those in use are kept
    run(2)
    run(1)
    run(2)
    assert captures.made[4:] == [(1, 8), (2, 8)]


def test_what_cannot_be_captured_runs_step_by_step(
    decoder: CellDecoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning, and no capture of that kind is tried again, not even after its buffers were dropped."""
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {8: 0, 1: 0})
    tried = []

    def capture(buffers: Buffers, count: int) -> Replay:
        tried.append((len(buffers.tokens), buffers.sampling.features))
        raise RuntimeError("called a synchronizing operation\nand more lines")

    requests = requests_for(MIXED, 24, [1, 7, 30, 100, 64])
    wanted = samples(SingleSteps.of, decoder, tokenizer, requests, batch_size=3)
    runner = GraphRunner(decoder, capture=capture, max_kept=1)
    with caplog.at_level(logging.WARNING, "textgen"):
        for _ in range(2):
            assert_same(samples(runner.batch_of, decoder, tokenizer, requests, batch_size=3), wanted)
    assert len(tried) == len(set(tried)) > 1
    assert caplog.messages == [
        "steps that cannot be captured in a CUDA graph run one by one: called a synchronizing operation"
    ]


def test_a_runner_runs_one_batch_at_a_time(
    endless: CellDecoder, decoder: CellDecoder, tokenizer: Tokenizer, captures: Captures
) -> None:
    """The latest one; an earlier one, which was given up, must not change its buffers."""
    runner = GraphRunner(endless, capture=captures)
    requests = [Request("it", SamplingConfig(max_new_tokens=40))]
    with pytest.raises(RuntimeError, match="with its own decoder"):
        runner.batch_of(decoder, tokenizer, [])
    first = started(runner, tokenizer, requests)
    draw_once(first)
    draw_once(second := started(runner, tokenizer, requests))
    assert second.samples[0].text == first.samples[0].text
    with pytest.raises(RuntimeError, match="one batch at a time"):
        first.advance_many()
    with pytest.raises(RuntimeError, match="one batch at a time"):
        started(runner, tokenizer, requests, first)


# --- capturing -------------------------------------------------------------------------------------------------------


def fail(reason: str) -> None:
    raise RuntimeError(reason)


def test_reason_of_a_failed_capture_is_its_first_error() -> None:
    def capture() -> None:
        try:
            try:
                fail("the step waits for the device\nand more lines")
            finally:
                fail("the capture was invalidated")
        except RuntimeError:
            fail("the pool cannot be ended")

    with pytest.raises(RuntimeError, match="the pool cannot be ended") as caught:
        capture()
    assert graphs.reason_of(caught.value) == "the step waits for the device"
    assert graphs.reason_of(RuntimeError()) == "RuntimeError"


class FakeCuda:
    """Keeps the rules of torch 2.11's CUDA graphs that `CudaCapture` has met, with no device."""

    def __init__(self) -> None:
        self.num_pools = 0
        self.alive: Counter[int] = Counter()
        """graphs of each pool that are alive"""
        self.used: set[int] = set()
        self.recording: set[int] = set()
        """pools that the allocator of pinned memory records into"""
        self.refuse_begin = False
        self.generator_is_capturing = False
        self.seed: torch.Tensor | None = None
        """of the generator, for all graphs that are alive"""

    def graph_pool_handle(self) -> int:
        self.num_pools += 1
        return self.num_pools

    def build_graph(self) -> FakeGraph:
        return FakeGraph(self)


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.pool, self.handled = cuda, 0, sys.exc_info()[1]

    def capture_begin(self, *, pool: int, capture_error_mode: str) -> None:
        if pool in self.cuda.used and not self.cuda.alive[pool]:
            fail("use_count > 0 INTERNAL ASSERT FAILED")
        if pool in self.cuda.recording:
            fail("already recording to this pool")
        self.cuda.recording.add(pool)
        if self.cuda.refuse_begin:
            fail("capture_begin is refused")
        if not self.cuda.alive.total():
            self.cuda.seed = torch.zeros(1)
        assert self.cuda.seed is not None
        self.cuda.seed.fill_(1)
        self.cuda.generator_is_capturing = True
        self.cuda.used.add(pool)
        self.cuda.alive[pool] += 1
        self.pool = pool

    def capture_end(self) -> None:
        if sys.exc_info()[1] is not self.handled:  # the capture was invalidated
            fail("the capture was invalidated")
        self.cuda.recording.discard(self.pool)
        self.cuda.generator_is_capturing = False

    def replay(self) -> None:
        pass

    def __del__(self) -> None:
        if self.pool:
            self.cuda.alive[self.pool] -= 1


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.build_graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", fake.graph_pool_handle)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)
    return fake


def test_captures_share_a_pool_after_all_their_graphs_were_dropped(fake_cuda: FakeCuda) -> None:
    capture = CudaCapture(torch.device("cpu"))
    for _ in range(3):
        capture.record(lambda: None)()  # the replay is dropped at once, as that of a slot used long ago
    assert fake_cuda.num_pools == 1


@pytest.mark.parametrize("where", ["in the work", "in its beginning"])
def test_capture_works_after_one_that_failed(fake_cuda: FakeCuda, where: str) -> None:
    capture = CudaCapture(torch.device("cpu"))
    kept = capture.record(lambda: None)
    fake_cuda.refuse_begin = where == "in its beginning"
    with pytest.raises(RuntimeError) as caught:
        capture.record(lambda: fail("the work waits"))
    assert graphs.reason_of(caught.value) == (
        "capture_begin is refused" if where == "in its beginning" else "the work waits"
    )
    fake_cuda.refuse_begin = False
    assert not fake_cuda.generator_is_capturing
    num_pools = fake_cuda.num_pools
    for _ in range(3):
        capture.record(lambda: None)()
    assert fake_cuda.num_pools == num_pools
    kept()


def test_training_step_is_captured_beside_graphs_of_decoding(fake_cuda: FakeCuda) -> None:
    """The generator's tensors, made for the first graph, are changed for every other one."""
    with torch.inference_mode():
        of_decoding = CudaCapture(torch.device("cpu")).record(lambda: None)
    CudaCapture(torch.device("cpu")).record(lambda: None)()
    of_decoding()
