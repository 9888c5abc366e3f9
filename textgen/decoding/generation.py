"""Prompts to text: samples run in a batch, each in a row of its own; a finished row is given to the next sample."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from textgen.config import SamplingConfig
from textgen.decoding.decoders import CellDecoder, Decoder, DecoderState
from textgen.decoding.sampling import Controls, control, controls_of, draw, join_controls, note, select_controls
from textgen.model.lstm import LSTMLanguageModel
from textgen.tokenizer import Tokenizer

# Samples that run at a time, unless the caller says so: enough to keep a processor or GPU busy.
BATCH_SIZE = 64

# How far the newest request that runs may be ahead of the oldest one: who wants samples in order holds no more.
AHEAD = 4096

# Rows are refilled once one in so many is free: new prompts are read together, and the batch is laid out anew for all.
REFILL = 8

# Prompts up to this length are read by steps on a CPU. The model reads 3 to 4 times as many tokens in that time, but a
# single prompt at a time, before which it lays its weights out anew, and that takes as long as 60 tokens (2 x 512 and
# 2 x 1024, two cores, 2026-11-23).
SHORT_PROMPT = 128


@dataclass(frozen=True)
class Request:
    """What to continue and how; `number` tells the samples of a prompt apart in the noise."""

    prompt: str
    config: SamplingConfig
    number: int = 0


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at a token drawn, by the model alone: before temperature and filters. Forced ones have none."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    """the likeliest tokens, the likeliest first"""


@dataclass(frozen=True)
class Sample:
    """A finished continuation: of which prompt, which of its samples, the text after the prompt, its tokens."""

    prompt: str
    number: int
    text: str
    num_tokens: int
    finished: bool
    """the model ended the text itself"""
    stop: str | None = None
    """the string of `stop` that ended it, which is not in the text"""
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token drawn, its end included; needs `logprobs`."""
        assert self.logprobs is not None
        return math.fsum(told.logprob for told in self.logprobs) / max(len(self.logprobs), 1)


def generate(
    model: LSTMLanguageModel | Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    num_samples: int = 1,
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[int, str | Sample]]:
    """Continue every prompt `num_samples` times.

    Sample j of a prompt draws noise that the seed, the prompt and j decide: the same whatever stands beside it.

    Yields:
        (row, piece of text) as it is drawn, whole characters only, and once per row (row, Sample) when it ends.
        Row is prompt index x `num_samples` + j.
    """
    requests = (Request(prompt, config, j) for prompt in prompts for j in range(num_samples))
    return serve(model, tokenizer, requests, batch_size=batch_size)


def sample_all(
    model: LSTMLanguageModel | Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    num_samples: int = 1,
) -> list[Sample]:
    """Return the finished samples of `generate`, in the order of prompts."""
    events = generate(model, tokenizer, prompts, config, num_samples=num_samples)
    ended = {row: event for row, event in events if isinstance(event, Sample)}
    return [ended[row] for row in sorted(ended)]


@torch.inference_mode()
def serve(
    model: LSTMLanguageModel | Decoder,
    tokenizer: Tokenizer,
    requests: Iterable[Request],
    *,
    batch_size: int = BATCH_SIZE,
    interrupted: Callable[[], bool] = lambda: False,
    run: Callable[[Batch], Iterator[Step]] | None = None,
) -> Iterator[tuple[int, str | Sample]]:
    """Continue requests, `batch_size` of them at a time; the next ones are taken up when rows are free.

    Args:
        model: or a decoder of it.
        tokenizer: the model's.
        requests: taken one by one, at most `AHEAD` beyond the oldest that runs.
        batch_size: rows.
        interrupted: asked before every token; once it says so, what runs ends as it is and nothing is begun.
        run: draws the tokens of a batch as `Batch.run` does, the default; `GraphRunner` of `cuda_graphs` does so with
            CUDA graphs.

    Yields:
        (index of the request, piece of text) as it is drawn, and once per request (index, Sample) when it ends.

    Raises:
        ValueError: a request cannot be met, see `require_drawable`.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    waiting, begun, prefilled = iter(requests), 0, Prefilled()
    batch: Batch | None = None
    stopped = interrupted()
    while not stopped:
        running = batch.rows if batch is not None else []
        room = min(batch_size - len(running), min((row.index for row in running), default=begun) + AHEAD - begun)
        room = room if room >= batch_size // REFILL else 0
        arrived = [Row.of(begun + i, request, tokenizer) for i, request in enumerate(islice(waiting, room))]
        begun += len(arrived)
        for row in arrived:
            for event in row.begin():
                yield row.index, event
        if going := [row for row in arrived if not row.ended]:
            batch = Batch.of(decoder, tokenizer, going, beside=batch, prefilled=prefilled)
        if batch is None:
            if not arrived:
                return
            stopped = interrupted()
            continue
        for tokens, told in (run or Batch.run)(batch):
            for place, row in enumerate(batch.rows):
                if not row.ended:  # a graph draws some tokens more
                    for event in row.push(tokens[place], told[place] if told is not None else None):
                        yield row.index, event
            if stopped := interrupted():
                break
        batch = batch.without_ended()
    for row in batch.rows if batch is not None else []:
        for event in row.cut():
            yield row.index, event


def require_drawable(config: SamplingConfig, tokenizer: Tokenizer) -> None:
    """Check a config's tokens against the tokenizer.

    Raises:
        ValueError: one is none of its tokens, or none is left to draw.
    """
    for name in ("banned_tokens", "forced_tokens"):
        if wrong := [token for token in getattr(config, name) if token >= tokenizer.vocab_size]:
            raise ValueError(f"`{name}` must be below the vocabulary's size {tokenizer.vocab_size}: {wrong[0]}")
    never = {*config.banned_tokens, tokenizer.unk_id} | ({tokenizer.eos_id} if config.min_new_tokens else set())
    if config.banned_tokens and len(never) == tokenizer.vocab_size:
        raise ValueError("`banned_tokens` leave nothing to draw")


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Row:
    """What the host knows of a running sample."""

    index: int
    request: Request
    tokenizer: Tokenizer
    prompt: list[int]
    """tokens, the end-of-text token before them; forced tokens are no part of it"""
    text: str = ""
    held: str = ""
    """text that may turn out to begin a stop string"""
    num_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        self._stream = self.tokenizer.stream()

    @classmethod
    def of(cls, index: int, request: Request, tokenizer: Tokenizer) -> Row:
        require_drawable(request.config, tokenizer)
        prompt = [tokenizer.bos_id, *tokenizer.encode(request.prompt)]
        return cls(index=index, request=request, tokenizer=tokenizer, prompt=prompt)

    def begin(self) -> Iterator[str | Sample]:
        """Take the forced tokens for drawn."""
        for token in self.request.config.forced_tokens:
            if not self.ended:
                yield from self.push(token, None)

    def push(self, token: int, told: TokenLogprobs | None) -> Iterator[str | Sample]:
        """Take a token that was drawn; yield the text that is certain now, and the sample if it has ended."""
        config = self.request.config
        finished = token == self.tokenizer.eos_id
        if told is not None and config.logprobs is not None:
            self.logprobs.append(TokenLogprobs(told.token, told.logprob, told.top[: config.logprobs]))
        self.num_tokens += not finished
        last = finished or self.num_tokens >= config.max_new_tokens
        self.held += ("" if finished else self._stream.push(token)) + (self._stream.flush() if last else "")
        piece, self.held, stop = _cut_at_stop(self.held, config.stop)
        if last or stop is not None:
            yield from self._end(piece, finished, stop)
        elif piece:
            self.text += piece
            yield piece

    def cut(self) -> Iterator[str | Sample]:
        """End the sample as it is: whole characters, and what was held back."""
        return self._end("", finished=False, stop=None)

    def _end(self, piece: str, finished: bool, stop: str | None) -> Iterator[str | Sample]:
        self.ended = True
        piece += self.held
        self.text += piece
        if piece:
            yield piece
        told = tuple(self.logprobs) if self.request.config.logprobs is not None else None
        yield Sample(self.request.prompt, self.request.number, self.text, self.num_tokens, finished, stop, told)


def _cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, str | None]:
    """Return the text that is certain, what may begin a stop string, and the stop string that the text holds.

    Of several the one that is complete first counts, of those the longest: so it is the same wherever tokens end.
    """
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if found:
        end, _, stop = min(found)
        return text[: end - len(stop)], "", stop
    for start in range(max(len(text) - max(map(len, stops), default=0) + 1, 0), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:], None
    return text, "", None


def _sample_number(prompt: str, j: int) -> int:
    """Return the number that sample j of a prompt has in the noise: other prompts draw other noise."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big") + j


# --- the batch -------------------------------------------------------------------------------------------------------

# A step's tokens, one per row, and what is told of them where a row wants it.
Step = tuple[list[int], list[TokenLogprobs] | None]

# States after prompts by their tokens.
Prefilled = dict[tuple[int, ...], DecoderState]


@dataclass
class Batch:
    """Rows that are decoded together: for each the token to read next, the state before it, and its controls."""

    decoder: Decoder
    tokenizer: Tokenizer
    rows: list[Row]
    tokens: Tensor
    state: DecoderState
    controls: Controls

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        tokenizer: Tokenizer,
        rows: list[Row],
        *,
        beside: Batch | None = None,
        prefilled: Prefilled | None = None,
    ) -> Batch:
        """Read the prompts of new rows and put them after those that run.

        `prefilled` is left with the last prompt alone: the next rows are often further samples of it.
        """
        parts = [] if beside is None else [beside]
        states: Prefilled = {} if prefilled is None else prefilled
        prompts = [(*row.prompt, *row.request.config.forced_tokens) for row in rows]
        states |= _prefill(decoder, [ids for ids in dict.fromkeys(prompts) if ids not in states])
        for row, ids in zip(rows, prompts, strict=True):
            config, forced = row.request.config, row.request.config.forced_tokens
            number = _sample_number(row.request.prompt, row.request.number)
            controls = controls_of(
                config, row.prompt[1:], number, vocab_size=decoder.vocab_size, device=decoder.device
            )  # fmt: skip
            for token in forced:
                note(controls, torch.tensor([token], device=decoder.device))
            tokens = torch.tensor(ids[-1:], device=decoder.device)
            parts.append(cls(decoder, tokenizer, [row], tokens, states[ids], controls))
        for ids in states.keys() - prompts[-1:]:
            del states[ids]
        return cls(
            decoder, tokenizer,
            [row for part in parts for row in part.rows],
            torch.cat([part.tokens for part in parts]),
            [torch.cat(tensors) for tensors in zip(*(part.state for part in parts), strict=True)],
            join_controls([part.controls for part in parts], decoder.vocab_size),
        )  # fmt: skip

    def run(self) -> Iterator[Step]:
        """Draw tokens, step by step, until a row has ended; a step is pushed to the rows before the next is taken."""
        while not any(row.ended for row in self.rows):
            yield self.advance()

    def advance(self) -> Step:
        """Draw the next token of every row; and tell log-probabilities where a row wants them."""
        self.tokens, self.state, told = advance(
            self.decoder, self.tokens, self.state, self.controls, unk_id=self.tokenizer.unk_id,
            eos_id=self.tokenizer.eos_id,
        )  # fmt: skip
        tokens = self.tokens.tolist()
        return tokens, None if told is None else self.in_words(tokens, *told)

    def in_words(self, tokens: list[int], drawn: Tensor, values: Tensor, ids: Tensor) -> list[TokenLogprobs]:
        """Return what `advance` tells of a step's tokens, with texts for ids."""

        def word(token: int) -> str:
            return self.tokenizer.token_bytes(token).decode(errors="backslashreplace")

        tops = [
            tuple((word(i), v) for i, v in zip(row_ids, row_values, strict=True))
            for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        return [
            TokenLogprobs(word(token), value, top)
            for token, value, top in zip(tokens, drawn.tolist(), tops, strict=True)
        ]

    def without_ended(self) -> Batch | None:
        """Return the batch of the rows that go on; None if none does."""
        going = [place for place, row in enumerate(self.rows) if not row.ended]
        if len(going) == len(self.rows):
            return self
        if not going:
            return None
        places = torch.tensor(going, device=self.tokens.device)
        return Batch(
            self.decoder, self.tokenizer, [self.rows[place] for place in going], self.tokens[places],
            [part[places] for part in self.state], select_controls(self.controls, places),
        )  # fmt: skip


def _prefill(decoder: Decoder, prompts: Sequence[tuple[int, ...]]) -> Prefilled:
    """Return the states (1, ...) after all tokens but the last of each prompt.

    How a prompt is read depends on its length alone, not on what it arrives with: steps may round more than the model.
    """
    stepped = isinstance(decoder, CellDecoder) and decoder.device.type == "cpu"
    longest_first = sorted(prompts, key=len, reverse=True)
    num_alone = sum(len(ids) > SHORT_PROMPT for ids in prompts) if stepped else len(prompts)
    alone = {ids: decoder.prefill(ids) for ids in longest_first[:num_alone]}
    return alone | _side_by_side(decoder, longest_first[num_alone:])


def _side_by_side(decoder: Decoder, prompts: Sequence[tuple[int, ...]]) -> Prefilled:
    """Read prompts, the longest first, by steps; each leaves the batch where it ends."""
    states: Prefilled = {}
    state = [torch.cat(parts) for parts in zip(*(decoder.prefill(ids[:1]) for ids in prompts), strict=True)]
    for place in range(len(prompts[0]) if prompts else 0):
        going = sum(len(ids) - 1 > place for ids in prompts)
        for row in range(going, len(prompts) - len(states)):
            states[prompts[row]] = [part[row : row + 1] for part in state]
        if going:
            tokens = torch.tensor([ids[place] for ids in prompts[:going]])
            _, state = decoder.step(tokens, [part[:going] for part in state])
    return states


def advance(
    decoder: Decoder, tokens: Tensor, state: DecoderState, controls: Controls, *, unk_id: int, eos_id: int
) -> tuple[Tensor, DecoderState, tuple[Tensor, Tensor, Tensor] | None]:
    """Read one token per row and draw the next; nothing waits for the device.

    Args:
        decoder: which reads.
        tokens: (batch,) int64.
        state: of the decoder.
        controls: of the rows; what was drawn is noted in them, in place.
        unk_id: never drawn: text never holds it, and it would show as U+FFFD.
        eos_id: the token that ends a text.

    Returns:
        Tokens (batch,), the new state, and where a row wants them log-probabilities: of the tokens drawn (batch,), of
        the likeliest ones (batch, n), and these.
    """
    logits, state = decoder.step(tokens, state)
    told = logits.log_softmax(-1) if controls.logprobs is not None else None  # before anything is changed
    logits.select(1, unk_id).fill_(-math.inf)
    drawn = draw(control(logits, controls, eos_id=eos_id), controls)
    note(controls, drawn)
    if told is None or controls.logprobs is None:
        return drawn, state, None
    values, ids = told.topk(min(controls.logprobs, told.shape[-1]))
    return drawn, state, (told.gather(1, drawn[:, None])[:, 0], values, ids)
