"""Continuous batching: one thread decodes the samples of all clients, which join and leave one running batch.

The state of an LSTM has a fixed size, so a row can join or leave between any two tokens.
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
from typing import TYPE_CHECKING, Any

import torch

from textgen.decoding import cuda_graphs
from textgen.decoding.batch import Prefilled, RunningBatch, Scored, reads_alone
from textgen.decoding.decoders import PREFILL_WINDOW, Decoder
from textgen.decoding.samples import Request, RunningSample, Sample, TokenLogprobs, begin_id
from textgen.kernels.decoding import Halt
from textgen.serving.states import PrefixTable
from textgen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from textgen.serving.prompts import PromptReader

log = logging.getLogger("textgen")

# Text is delivered, and new samples join, at intervals of these seconds times the number of running samples; only the
# first token and the end of a sample are delivered at once. A delta costs 0.1 ms whatever its length (JSON, a write to
# a socket), and a join copies the batch's tensors: the intervals hold each to a fixed share of the time, however many
# clients there are.
SECONDS_PER_DELTA = 0.001
SECONDS_PER_JOIN = 0.00025

# Prompt tokens of samples that join between two steps: running samples wait for them. A longer prompt, and one that is
# scored, is read before its sample joins, a slot of a window's tokens at a time.
PROMPT_TOKENS_PER_STEP = 2048


class BusyError(Exception):
    """The queue is full."""


class ClosedError(BusyError):
    """The scheduler is shutting down."""


@dataclass(frozen=True)
class Delta:
    """The part of a sample since its previous delta."""

    text: str
    logprobs: Sequence[tuple[int, TokenLogprobs]]
    """for each token its offset in the sample's text, in characters; empty if the request wants no log-probabilities"""
    sample: Sample | None = None
    """the whole sample, once it has ended"""
    error: str | None = None
    """the reason why the sample will not end"""


@dataclass(eq=False)
class Stream:
    """A sample on its way to a client, with the text that is not delivered yet."""

    running: RunningSample
    owner: Any
    """identifies the sample for the caller"""
    readers: Sequence[PromptReader] = ()
    """read the prompt, if it is scored or long, and without its label too, if `label_scale` needs that; other samples
    of the prompt may have the same ones"""
    reads_only: bool = False
    """the sample ends when the prompt is read"""
    cancelled: bool = False
    started: bool = False
    """the first token is drawn"""
    text: str = ""
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    sample: Sample | None = None

    @property
    def next_reader(self) -> PromptReader | None:
        """The first reader that is not done; None if all are."""
        return next((reader for reader in self.readers if not reader.is_done), None)

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> None:
        """Add tokens that were drawn, see `RunningSample.push_all`."""
        running = self.running
        if logprobs is not None and running.request.config.logprobs is not None:
            for i in range(len(tokens)):  # each with its own place in the text
                self._push(tokens[i : i + 1], logprobs[i : i + 1])
        else:
            self._push(tokens, None)

    def _push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> None:
        running = self.running
        offset, num_logprobs = len(running.text) + len(running.held), len(running.logprobs)
        for event in running.push_all(tokens, logprobs):
            if isinstance(event, str):
                self.text += event
            else:
                self.sample = event
        # `running` has cut the alternatives, of which the batch returns as many as any sample wants.
        if len(running.logprobs) > num_logprobs:
            self.logprobs += [(offset, token) for token in running.logprobs[num_logprobs:]]

    def end_read(self) -> None:
        """End the sample without a token."""
        for event in self.running.cut():
            assert isinstance(event, Sample)  # nothing was held back
            self.sample = event

    def pop_delta(self) -> Delta:
        """Return the delta since the previous call."""
        delta = Delta(self.text, self.logprobs, self.sample)
        self.text, self.logprobs = "", []
        return delta


class Scheduler:
    """Draws the tokens of all samples, step by step, in a thread.

    Args:
        decoder: the model's decoder.
        tokenizer: the model's tokenizer.
        batch_size: maximum number of running samples.
        max_waiting: maximum number of samples in the queue.
        prefixes: states of the beginnings of prompts; the decoding thread alone reads and changes it.
        batch_of: reads prompts and makes a batch, as `Batch.of` does; default: that of `cuda_graphs.batch_of`.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        max_waiting: int,
        prefixes: PrefixTable,
        batch_of: Callable[..., RunningBatch] | None = None,
    ) -> None:
        self.tokenizer, self.max_waiting, self.prefixes = tokenizer, max_waiting, prefixes
        self.num_tokens = self.num_read_tokens = self.num_reused_tokens = 0
        self.decoder, self._batch_size = decoder, batch_size
        self.labels = decoder.model.labels
        # Any thread may read or change these two while it holds the condition.
        self._changed = threading.Condition()
        self._waiting: deque[Stream] = deque()
        self._deadline: float | None = None
        # Set when something has to be done before the next token is drawn.
        self._halt = Halt()
        # Only the decoding thread uses these.
        self._batch_of = cuda_graphs.batch_of(decoder) if batch_of is None else batch_of
        self._batch: RunningBatch | None = None
        self._running: dict[int, Stream] = {}
        self._reading: deque[Stream] = deque()  # each reads a window in its turn
        self._read: list[Stream] = []  # join as soon as they may
        self._slot_at = self._slot_seconds = 0.0
        self._prefilled: Prefilled = {}
        self._scored: Scored = {}
        self._delivered_at = self._joined_at = 0.0
        self._indices = itertools.count()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    @property
    def num_running(self) -> int:
        """Number of samples in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Number of samples in the queue, and of those whose prompts are read."""
        return len(self._waiting) + len(self._reading) + len(self._read)

    def start(self, on_deltas: Callable[[list[tuple[Stream, Delta]]], object]) -> None:
        """Start the decoding thread. It calls `on_deltas`, which must neither block nor raise."""
        self._on_deltas = on_deltas
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Refuse new samples, and after `seconds` fail those that have not ended."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._halt.set(True)
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait at most `seconds` for the decoding thread to end."""
        self._thread.join(seconds)

    def begin_id(self, label: str | None) -> int:
        """Return the first input of a text with a label; raise TextgenError if the model does not know it."""
        return begin_id(self.decoder.model, self.tokenizer, label)

    def new_stream(
        self,
        request: Request,
        ids: list[int],
        owner: Any,
        *,
        readers: Sequence[PromptReader] = (),
        reads_only: bool = False,
    ) -> Stream:
        """Return a sample for `submit`.

        Args:
            request: its prompt is normalized.
            ids: the first input and the prompt's tokens.
            owner: identifies the sample for the caller.
            readers: of a prompt that is scored or longer than a window.
            reads_only: whether the sample ends when the prompt is read.
        """
        running = RunningSample(index=next(self._indices), request=request, tokenizer=self.tokenizer, prompt_ids=ids)
        return Stream(running, owner, readers, reads_only)

    def submit(self, streams: Sequence[Stream]) -> None:
        """Queue all samples or, if an error is raised, none.

        Raises:
            ClosedError: the scheduler is shutting down.
            BusyError: the queue has too little room.
        """
        with self._changed:
            if self._deadline is not None:
                raise ClosedError("the server is shutting down")
            if len(self._waiting) + len(streams) > self.max_waiting:
                raise BusyError(f"{len(self._waiting)} samples are waiting, at most {self.max_waiting} may wait")
            self._waiting.extend(streams)
            self._halt.set(True)
            self._changed.notify()

    def cancel(self, streams: Sequence[Stream]) -> None:
        """Remove samples from the queue and, at the next step, from the batch. Ended samples are ignored."""
        for stream in streams:
            stream.cancelled = True
        with self._changed:
            self._waiting = deque(stream for stream in self._waiting if not stream.cancelled)
            self._halt.set(True)

    # --- in the decoding thread --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        while (joining := self._wait()) is not None:
            try:
                self._step(joining)
            except Exception as error:  # fail the samples of this step; the thread must survive for the next ones
                # Log no message: it may contain a client's text.
                log.error(
                    "a step failed: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
                )
                self._fail(joining, "the model failed")

    def _wait(self) -> list[Stream] | None:
        """Wait for work. Return the samples that join the batch now; None to end the thread."""
        with self._changed:
            while not (has_work := self._batch or self._waiting or self._reading or self._read):
                if self._deadline is not None:
                    break
                self._changed.wait()
            self._halt.set(False)
            if self._deadline is not None and (not has_work or time.monotonic() >= self._deadline):
                self._fail(list(self._waiting), "the server is shutting down")
                self._waiting.clear()
                return None
            if not (self._waiting or self._read) or not self._is_due(self._joined_at, SECONDS_PER_JOIN):
                return []
            joining, self._read, num_tokens = self._read, [], 0
            while self._waiting and len(self._running) + len(self._reading) + len(joining) < self._batch_size:
                first = self._waiting[0]
                if not first.readers and not first.reads_only:
                    num_tokens += first.running.num_read
                    if joining and num_tokens > PROMPT_TOKENS_PER_STEP:
                        break
                    joining.append(first)
                else:
                    self._reading.append(first)
                self._waiting.popleft()
            self._joined_at = time.monotonic()
            return joining

    def _is_due(self, last: float, seconds: float) -> bool:
        """Return whether `seconds` times the number of running samples have passed since `last`."""
        return time.monotonic() - last >= seconds * len(self._running)

    def _step(self, joining: list[Stream]) -> None:
        """Read prompts, add samples to the batch, draw one or more tokens of each, remove those that have ended."""
        if self._reading and (self._batch is None or time.monotonic() - self._slot_at >= self._slot_seconds):
            self._read_slot()
        if joining:
            # Of these prompts the decoder would read the same windows.
            readers = [reader for stream in joining for reader in stream.readers]
            self._prefilled |= {r.ids: r.state for r in readers if r.state and reads_alone(self.decoder, r.ids)}
            self._batch = self._batch_of(
                self.decoder,
                self.tokenizer,
                [stream.running for stream in joining],
                beside=self._batch,
                prefilled=self._prefilled,
                scored=self._scored,
            )
            self._running |= {stream.running.index: stream for stream in joining}
        batch = self._batch
        if batch is None:
            return
        tokens, logprobs = batch.advance_many(seconds=self._seconds_to_draw(), most_ended=1, halt=self._halt)
        streams = [self._running[sample.index] for sample in batch.samples]
        urgent = []
        for place, stream in enumerate(streams):
            if stream.cancelled:
                stream.running.ended = True
            else:
                before = stream.running.num_tokens
                stream.push(tokens[place], None if logprobs is None else logprobs[place])
                self.num_tokens += stream.running.num_tokens - before
                if tokens[place] and (stream.running.ended or not stream.started):
                    urgent.append(stream)
                stream.started |= len(tokens[place]) > 0
            if stream.running.ended:
                del self._running[stream.running.index]
        self._batch = batch.without_ended()
        if self._is_due(self._delivered_at, SECONDS_PER_DELTA):
            self._delivered_at, urgent = time.monotonic(), streams
        self._deliver(urgent)

    def _seconds_to_draw(self) -> float:
        """Return for how long one call may draw: until text is due, or a sample may join, or a slot is."""
        count = len(self._running)
        if not all(stream.started for stream in self._running.values()):
            return 0.0  # a first token is delivered at once
        due = [self._delivered_at + SECONDS_PER_DELTA * count]
        if self._read or (self._waiting and count + len(self._reading) < self._batch_size):
            due.append(self._joined_at + SECONDS_PER_JOIN * count)
        if self._reading:
            due.append(self._slot_at + self._slot_seconds)
        return min(due) - time.monotonic()

    def _read_slot(self) -> None:
        """Read a window's tokens of prompts, each in its turn.

        Running samples then have as much time before the next slot as this one took.
        """
        started, num_tokens = time.monotonic(), 0
        ended: list[Stream] = []
        for _ in range(len(self._reading)):
            stream = self._reading[0]
            reader = None if stream.cancelled else stream.next_reader
            if reader is not None:
                if (known := self.prefixes.find(reader.keys, reader.num_windows)) is not None:
                    reader.skip(*known)
                if not reader.is_done:
                    if num_tokens and num_tokens + reader.next_size > PREFILL_WINDOW:
                        break
                    num_tokens += reader.next_size
                    reader.read(self.decoder)  # if this fails, the stream is among those that fail
                    if reader.border is not None and 0 < reader.border[0] <= len(reader.keys):
                        self.prefixes.put(reader.keys[reader.border[0] - 1], reader.border[1])
            self._reading.popleft()
            if stream.cancelled:
                continue
            self.num_reused_tokens += sum(reader.pop_reused() for reader in stream.readers)
            if stream.next_reader is not None:
                self._reading.append(stream)
            elif stream.reads_only:
                stream.end_read()
                ended.append(stream)
            else:
                self._read.append(stream)
        self.num_read_tokens += num_tokens
        self._slot_at = time.monotonic()
        self._slot_seconds = self._slot_at - started
        self._deliver(ended)

    def _deliver(self, streams: Sequence[Stream]) -> None:
        deltas = [(stream, stream.pop_delta()) for stream in streams if not stream.cancelled]
        if deltas:
            self._on_deltas(deltas)

    def _fail(self, joining: Sequence[Stream], reason: str) -> None:
        """Fail all running and joining samples, after their last text is delivered."""
        self._deliver(list(self._running.values()))
        # A joining sample may be running already: each fails once.
        streams = (*self._running.values(), *joining, *self._reading, *self._read)
        failed = {id(stream): stream for stream in streams}.values()
        self._on_deltas([(stream, Delta("", (), error=reason)) for stream in failed])
        self._running.clear()
        self._reading.clear()
        self._batch, self._prefilled, self._scored, self._read = None, {}, {}, []
