"""Decoding from CUDA graphs against single steps: `make gpu` on a machine that has a GPU. Not measured so far."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.decoding.test_cuda_graphs import (
    MIXED,
    Captures,
    batch_of,
    build,
    draw_once,
    requests_for,
    samples,
    started,
)
from tests.decoding.test_fused import prompts_of
from textgen.config import SamplingConfig
from textgen.decoding import cuda_graphs as graphs
from textgen.decoding.batch import RunningBatch, SingleSteps
from textgen.decoding.cuda_graphs import Buffers, GraphRunner, StepCapture
from textgen.decoding.decoders import CellDecoder, Decoder, DecoderState
from textgen.decoding.fused import FusedDecoder, triton_kernels
from textgen.kernels.capture import Replay
from textgen.tokenizer import Tokenizer, train_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("settings_of_a_new_process"),
]

TEXTS = ["it was the best of times, it was the worst of times", "call me ishmael", "é è ü ß 漢字 🙂🙃 naïve café"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXTS, vocab_size=400, model_type="char"))


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> CellDecoder:
    return CellDecoder(build(tokenizer, ending=2.5).model.cuda())


@pytest.fixture(scope="module")
def endless(tokenizer: Tokenizer) -> CellDecoder:
    return CellDecoder(build(tokenizer, ending=-1000.0).model.cuda())


class Counted(StepCapture):
    """Captures graphs, and keeps count."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", torch.cuda.current_device()))
        self.made: list[tuple[int, int]] = []
        """rows and steps of each"""
        self.num_steps = 0
        """replayed"""

    def __call__(self, buffers: Buffers, count: int) -> Replay:
        run = super().__call__(buffers, count)
        self.made.append((len(buffers.tokens), count))

        def replay() -> None:
            self.num_steps += count
            run()

        return replay


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that this mode does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ten_thousand_tokens_from_graphs_are_those_of_single_steps(endless: CellDecoder, tokenizer: Tokenizer) -> None:
    config, capture = SamplingConfig(temperature=0.9, top_p=0.98), Counted()
    requests = requests_for([config], 8, [1250])
    wanted = samples(SingleSteps.of, endless, tokenizer, requests)
    assert sum(sample.num_tokens for sample in wanted.values()) == 10_000
    assert samples(GraphRunner(endless, capture=capture).batch_of, endless, tokenizer, requests) == wanted
    assert capture.num_steps > 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fused"])
def test_graphs_and_the_same_steps_without_them_draw_the_same(
    decoder: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """With every control, rows that end and rows that come; log-probabilities bit for bit.

    Without graphs as many steps are taken at a time, so that every step has as many rows.
    """
    if dtype == "fused":
        decoder = FusedDecoder(decoder.model, triton_kernels())
        decoder.try_kernels()
        assert decoder.description.endswith("fused kernels: layer, linear, output, pick, draw")
    else:
        decoder = CellDecoder(decoder.model, dtype)  # type: ignore[arg-type]
    requests = requests_for(MIXED, 24, [9, 30, 100, 64])
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {32: 0, 8: 0, 1: 0})
    plain = GraphRunner(decoder, capture=Captures())
    wanted = samples(plain.batch_of, decoder, tokenizer, requests, batch_size=5)
    capture = Counted()
    assert samples(GraphRunner(decoder, capture=capture).batch_of, decoder, tokenizer, requests, batch_size=5) == wanted
    assert {steps for _, steps in capture.made} == {32, 8, 1}


@torch.inference_mode()
def test_nothing_waits_for_the_device_but_the_reading_of_what_was_drawn(
    endless: CellDecoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {32: 0, 8: 0, 1: 0})
    capture = Counted()
    runner, made = GraphRunner(endless, capture=capture), 0
    for attempt in range(2):  # the second one replays alone
        batch: RunningBatch | None = started(runner, tokenizer, requests_for(MIXED[:-1], 6, [75]))
        with waiting_is_an_error():
            while batch is not None:
                draw_once(batch)
                batch = batch.without_ended()
        made = made if attempt else len(capture.made)
        assert len(capture.made) == made > 0
    plain = batch_of(endless, tokenizer, requests_for(MIXED[:-1], 6, [75]))
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        plain.advance()


def test_rows_that_join_between_replays_draw_their_texts_alone(
    endless: CellDecoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clients of a server come and go: nothing is captured for them."""
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {8: 0, 1: 0})
    requests = requests_for([SamplingConfig(), SamplingConfig(temperature=0.0)], 12, [64])
    wanted = samples(
        SingleSteps.of, endless, tokenizer, requests, batch_size=4
    )  # other numbers of rows round otherwise
    runner = GraphRunner(endless, capture=Counted())
    batch = started(runner, tokenizer, requests[:4])
    every = [*batch.samples]
    for request in requests[4:]:
        draw_once(batch)
        batch.samples[0].ended = True
        going = batch.without_ended()
        assert going is not None
        batch = started(runner, tokenizer, [request], going)
        every.append(batch.samples[-1])
    while not any(sample.ended for sample in batch.samples):
        draw_once(batch)
    assert runner.num_captured == 1
    for i, sample in enumerate(every):
        assert wanted[i].text.startswith(sample.text)


@torch.inference_mode()
def test_prompts_read_side_by_side_have_the_bits_of_each_alone(decoder: CellDecoder, tokenizer: Tokenizer) -> None:
    """By single steps, then by a graph."""
    fused = FusedDecoder(decoder.model, triton_kernels())
    fused.try_kernels()
    prompts = prompts_of([1, 2, 33, 128, *range(3, 30)], tokenizer.vocab_size)
    alone = {ids: fused.pieces.read([ids])[ids] for ids in prompts}
    for in_graphs in (False, True):
        fused.in_graphs = in_graphs
        for ids, state in fused.pieces.read(prompts).items():
            assert all(torch.equal(*pair) for pair in zip(state, alone[ids], strict=True))
    assert fused.pieces._replay is not None


def test_memory_does_not_grow_with_the_kinds_of_batches(
    endless: CellDecoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {8: 0})
    capture = Counted()
    runner = GraphRunner(endless, capture=capture, max_kept=3)
    reserved = []
    for length in range(1, 41):  # each one is a kind of its own
        config = SamplingConfig(no_repeat_ngram=length)
        samples(runner.batch_of, endless, tokenizer, requests_for([config], 16, [8]))
        reserved.append(torch.cuda.memory_reserved())
    assert len(capture.made) == 40
    assert reserved[-1] <= reserved[9] + (4 << 20)


class Waiting(CellDecoder):
    """Waits for the device at every step, which no graph can hold."""

    def step(self, tokens: torch.Tensor, state: DecoderState) -> tuple[torch.Tensor, DecoderState]:
        assert tokens.sum().item() >= 0
        return super().step(tokens, state)


class Careless(Counted):
    """Finds out in the midst of capturing."""

    def __init__(self) -> None:
        super().__init__()
        self._capture.warm_up = lambda work: None  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [Counted, Careless])
def test_a_decoder_that_waits_runs_step_by_step_and_harms_no_other(
    endless: CellDecoder,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Counted],
) -> None:
    requests = requests_for(MIXED[:-1], 8, [30])  # none has a stop string: every step has as many rows
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {8: 10**9})
    wanted = samples(GraphRunner(endless).batch_of, endless, tokenizer, requests)
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {8: 0, 1: 0})
    decoder, capture = Waiting(endless.model), kind()
    with caplog.at_level(logging.WARNING, "textgen"):
        assert samples(GraphRunner(decoder, capture=capture).batch_of, decoder, tokenizer, requests) == wanted
    assert len(caplog.messages) == 1
    assert capture.made == []
    torch.cuda.empty_cache()  # the allocator does not think that a capture goes on
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(1, device="cuda") < 1  # nor does the generator
    capture = Counted()
    assert samples(GraphRunner(endless, capture=capture).batch_of, endless, tokenizer, requests) == wanted
    assert capture.made != []


def test_a_seed_draws_the_same_text_in_every_batch_size_and_on_a_cpu(
    decoder: CellDecoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", {8: 0, 1: 0})
    requests = requests_for(MIXED[:3], 9, [60])
    on_cpu = build(tokenizer, ending=2.5)
    wanted = {i: sample.text for i, sample in samples(SingleSteps.of, on_cpu, tokenizer, requests).items()}
    for batch_size in (1, 2, 3, 9):
        drawn = samples(GraphRunner(decoder).batch_of, decoder, tokenizer, requests, batch_size=batch_size)
        assert {i: sample.text for i, sample in drawn.items()} == wanted
