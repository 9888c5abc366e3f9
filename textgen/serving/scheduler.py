"""Continuous batching: samples of many clients join and leave one running batch, in a thread of its own.

An LSTM's state is of a fixed size, so that a row may come or go between any two tokens.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from textgen.config import SamplingConfig
from textgen.decoding.decoders import Decoder
from textgen.decoding.generation import Batch, Prefilled, Request, RunningSample, Sample, TokenLogprobs
from textgen.tokenizer import Tokenizer

log = logging.getLogger("textgen")

# Text is handed over, and new samples join, not at each step but after so many seconds for every sample that runs; only
# a sample's first token and its end are handed over at once. A piece costs 0.1 ms whatever its length (JSON, a write to
# a socket), a join lays the batch out anew: each is held to a share of the time, however many clients there are.
SECONDS_PER_PIECE = 0.001
SECONDS_PER_JOIN = 0.00025

# Tokens of prompts that are read between two steps, unless a single prompt has more: those that run wait meanwhile.
PROMPT_TOKENS_PER_STEP = 2048


class BusyError(Exception):
    """There are too many samples already."""


class ClosedError(BusyError):
    """No samples are taken any more."""


@dataclass(frozen=True)
class Piece:
    """What became of a sample since its last piece: text, tokens, its end."""

    text: str
    told: Sequence[tuple[int, TokenLogprobs]]
    """tokens with their log-probabilities, if asked for, and where their texts begin in the sample's"""
    sample: Sample | None = None
    """the whole sample, if it has ended"""
    error: str | None = None
    """why there will be no end"""


@dataclass(eq=False)
class Stream:
    """A sample that somebody waits for."""

    row: RunningSample
    owner: Any
    """the caller's, to know it again"""
    cancelled: bool = False
    begun: bool = False
    text: str = ""
    told: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    sample: Sample | None = None

    def push(self, token: int, told: TokenLogprobs | None) -> None:
        """Take a token that was drawn."""
        row = self.row
        place = len(row.text) + len(row.held)
        for event in row.push(token, told):
            if isinstance(event, str):
                self.text += event
            else:
                self.sample = event
        if told is not None and row.request.config.logprobs is not None:
            self.told.append((place, row.logprobs[-1]))

    def take(self) -> Piece:
        """Return what came since the last time."""
        piece = Piece(self.text, self.told, self.sample)
        self.text, self.told = "", []
        return piece


class Scheduler:
    """Draws the tokens of all samples, step by step.

    Args:
        decoder: of the model.
        tokenizer: the model's.
        batch_size: samples that run at a time.
        max_waiting: samples that may wait for a place.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        max_waiting: int,
    ) -> None:
        self.tokenizer, self.max_waiting, self.num_tokens = tokenizer, max_waiting, 0
        self._decoder, self._batch_size = decoder, batch_size
        self._changed = threading.Condition()  # guards the next two
        self._waiting: deque[Stream] = deque()
        self._last_second: float | None = None
        # of the decoding thread alone
        self._batch: Batch | None = None
        self._running: dict[int, Stream] = {}
        self._prefilled: Prefilled = {}
        self._delivered = self._joined = 0.0
        self._indices = itertools.count()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    @property
    def num_running(self) -> int:
        """Return how many samples run."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Return how many samples wait for a place."""
        return len(self._waiting)

    def start(self, deliver: Callable[[list[tuple[Stream, Piece]]], object]) -> None:
        """Start the decoding thread, which calls `deliver`: it must neither wait nor fail."""
        self._deliver = deliver
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Take nothing more; end what is left after so many seconds."""
        with self._changed:
            self._last_second = time.monotonic() + seconds
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait until the decoding thread has ended."""
        self._thread.join(seconds)

    def stream(self, prompt: str, tokens: list[int], config: SamplingConfig, number: int, owner: Any) -> Stream:
        """Return a sample to submit; `tokens` are the prompt's."""
        request = Request(prompt, config, number)
        ids = [self.tokenizer.bos_id, *tokens]
        row = RunningSample(index=next(self._indices), request=request, tokenizer=self.tokenizer, prompt_ids=ids)
        return Stream(row, owner)

    def submit(self, streams: Sequence[Stream]) -> None:
        """Queue samples, all or none.

        Raises:
            BusyError: there is no room for them.
        """
        with self._changed:
            if self._last_second is not None:
                raise ClosedError("the server is shutting down")
            if len(self._waiting) + len(streams) > self.max_waiting:
                raise BusyError(f"{len(self._waiting)} samples wait already, at most {self.max_waiting} may")
            self._waiting.extend(streams)
            self._changed.notify()

    def cancel(self, streams: Sequence[Stream]) -> None:
        """Free the places of samples that nobody waits for any more; ended ones are no matter."""
        for stream in streams:
            stream.cancelled = True
        with self._changed:
            self._waiting = deque(stream for stream in self._waiting if not stream.cancelled)

    # --- in the decoding thread --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        while (arrived := self._next()) is not None:
            try:
                self._step(arrived)
            except Exception as error:  # of one step: the next samples may fare better
                # no message, which may hold text
                log.error(
                    "a step failed: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
                )
                self._fail(arrived, "the model failed")

    def _next(self) -> list[Stream] | None:
        """Wait for something to do; return the samples that join, or None once all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._batch or self._waiting or self._last_second is not None)
            if self._last_second is not None:
                over = time.monotonic() >= self._last_second
                if over or not (self._batch or self._waiting):
                    self._fail(list(self._waiting), "the server is shutting down")
                    self._waiting.clear()
                    return None
            arrived: list[Stream] = []
            if not self._is_due(self._joined, SECONDS_PER_JOIN):
                return arrived
            tokens = 0
            while self._waiting and len(self._running) + len(arrived) < self._batch_size:
                tokens += len(self._waiting[0].row.prompt_ids)
                if arrived and tokens > PROMPT_TOKENS_PER_STEP:
                    break
                arrived.append(self._waiting.popleft())
            self._joined = time.monotonic()
            return arrived

    def _is_due(self, last: float, seconds: float) -> bool:
        """Tell whether so many seconds have passed for every sample that runs."""
        return time.monotonic() - last >= seconds * len(self._running)

    def _step(self, arrived: list[Stream]) -> None:
        """Let samples join, draw a token of each, let those that have ended go."""
        if arrived:
            rows = [stream.row for stream in arrived]
            self._batch = Batch.of(
                self._decoder, self.tokenizer, rows, beside=self._batch, prefilled=self._prefilled
            )  # fmt: skip
            self._running |= {stream.row.index: stream for stream in arrived}
        batch = self._batch
        assert batch is not None
        tokens, told = batch.advance()
        streams = [self._running[row.index] for row in batch.samples]
        urgent = []
        for place, stream in enumerate(streams):
            if stream.cancelled:
                stream.row.ended = True
            else:
                stream.push(tokens[place], None if told is None else told[place])
                if stream.row.ended or not stream.begun:
                    urgent.append(stream)
                stream.begun = True
            if stream.row.ended:
                del self._running[stream.row.index]
        self.num_tokens += len(tokens)
        self._batch = batch.without_ended()
        if self._is_due(self._delivered, SECONDS_PER_PIECE):
            self._delivered, urgent = time.monotonic(), streams
        self._hand_over(urgent)

    def _hand_over(self, streams: Sequence[Stream]) -> None:
        pieces = [(stream, stream.take()) for stream in streams if not stream.cancelled]
        if pieces:
            self._deliver(pieces)

    def _fail(self, arrived: Sequence[Stream], why: str) -> None:
        """End everything without an end."""
        self._hand_over(list(self._running.values()))
        failed = {id(stream): stream for stream in (*self._running.values(), *arrived)}.values()
        self._deliver([(stream, Piece("", (), error=why)) for stream in failed])
        self._running.clear()
        self._batch, self._prefilled = None, {}
