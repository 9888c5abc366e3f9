"""From prompts to texts: samples run side by side in a batch, and a new sample takes the place of a finished one.

`generate_stream` is the loop. It turns each request into a `RunningSample`, which holds a text on the host, and puts
running samples into the rows of a `Batch`, which holds tokens and states on the device. `Batch.run_many` draws tokens
of each row, many in one call where compiled code can; they are pushed to their samples, which return the new pieces of
text, and at the end a `Sample`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from textgen.config import SamplingConfig
from textgen.decoding.decoders import CellDecoder, Decoder, DecoderState
from textgen.decoding.fused import FusedDecoder
from textgen.decoding.guides import (
    ChoiceGuide,
    Guide,
    encode_choices,
    join_masks,
    new_guide,
    require_guidable,
    score_choices,
)
from textgen.decoding.reading import ReadState
from textgen.decoding.sampling import (
    REPEAT_LENGTH,
    XTC_NOISE,
    SamplingState,
    draw,
    draw_item,
    draw_unmasked,
    is_compiled,
    join_sampling_states,
    new_sampling_state,
    process_logits,
    record_tokens,
    scale_label,
    select_sampling_state,
)
from textgen.decoding.steering import bias_of, breaks_of
from textgen.errors import TextgenError
from textgen.kernels.decoding import Halt
from textgen.model.lstm import LSTMLanguageModel
from textgen.noise import item_bits
from textgen.tokenizer import Tokenizer

# Samples that run at a time by default: enough to keep a CPU or GPU busy.
BATCH_SIZE = 64

# The newest running request is at most this far ahead of the oldest one. A caller that returns samples in order has to
# hold the samples that end before the oldest one, and this bounds their number.
MAX_AHEAD = 4096

# Free rows are refilled once they are 1/8 of the batch: new prompts are then read together, and adding rows copies the
# tensors of the whole batch.
REFILL_DIVISOR = 8

# Largest number of steps of a compiled call, and seconds after which it begins no further one, so that text streams.
MOST_STEPS = 32
MOST_SECONDS = 0.05

# On a CPU, decoder steps read prompts of up to this many tokens, several prompts at a time. The model reads 3 to 4
# times as many tokens in the same time, but only one prompt at a time, and packs its weights before each prompt, which
# takes as long as 60 tokens (2 x 512 and 2 x 1024, two cores, 2026-11-23).
SHORT_PROMPT = 128


@dataclass(frozen=True)
class Request:
    """A prompt to continue, the settings, and the number that gives each sample of a prompt its own noise."""

    prompt: str
    config: SamplingConfig
    number: int = 0
    ids: tuple[int, ...] | None = None
    """begin-of-text token and tokens of the prompt; None: as the tokenizer encodes it"""
    read: ReadState | None = None
    """a text that was read earlier; if the prompt's tokens begin with it, they are not read again"""
    label: str | None = None
    """of the text, for a model that was trained with labels; None for a text without one. Not beside `ids`, whose first
    one is the label's"""

    def __post_init__(self) -> None:
        if self.label is not None and self.ids is not None:
            raise ValueError(f"label {self.label!r} and `ids` both say how the text begins: give one")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities where a token was drawn, by the model alone: before penalties, temperature and filters.

    Forced tokens have none.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    """the likeliest tokens, in order of falling probability"""


@dataclass(frozen=True)
class Sample:
    """A finished continuation of a prompt."""

    prompt: str
    number: int
    """which sample of the prompt"""
    text: str
    """without the prompt"""
    num_tokens: int
    finished: bool
    """whether the model drew the end of the text"""
    stop: str | None = None
    """the string of `stop` that ended the text, which does not contain it"""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    reason: str = "length"
    """why the text ends: `end` (the model drew it), `stop`, `choice`, `length` (`max_new_tokens`, or an interrupt), and
    if no token could be drawn `nothing_allowed`, or `regex_limit` for a regex that takes too many states"""
    choices: tuple[tuple[str, float], ...] | None = None
    """the texts of `choices` with their probabilities, which add up to 1"""

    @property
    def mean_logprob(self) -> float:
        """Return the log-probability per drawn token, end of text included; needs `logprobs`."""
        assert self.logprobs is not None
        return math.fsum(token.logprob for token in self.logprobs) / max(len(self.logprobs), 1)


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

    The noise of a sample depends on the seed, the prompt and the number of `number_requests` alone, so its text does
    not depend on the samples of other prompts.

    Yields:
        (index, piece of text) as it is drawn, whole characters only, and once per sample (index, Sample) when it ends.
        Sample i of a prompt has the index prompt index x `num_samples` + i.
    """
    requests = number_requests(((prompt, config) for prompt in prompts), num_samples)
    return generate_stream(model, tokenizer, requests, batch_size=batch_size)


def number_requests(
    prompts: Iterable[tuple[str, SamplingConfig] | tuple[str, SamplingConfig, str | None]],
    num_samples: int,
    *,
    read: ReadState | None = None,
) -> Iterator[Request]:
    """Yield the requests for `num_samples` samples of each prompt of a list, in order.

    Sample i of a prompt has the number `num_samples` x (earlier entries that are equal) + i. So a prompt that is in
    the list k times has k different texts: those of one entry with k times `num_samples`.

    Args:
        prompts: texts and settings, and a label if the text has one.
        num_samples: of each prompt.
        read: a text that was read earlier, with which the prompts begin.
    """
    earlier: Counter[tuple[str, SamplingConfig, str | None]] = Counter()
    for prompt, config, *rest in prompts:
        label = rest[0] if rest else None
        first = num_samples * earlier[prompt, config, label]
        earlier[prompt, config, label] += 1
        for i in range(num_samples):
            yield Request(prompt, config, first + i, read=read, label=label)


def sample_all(
    model: LSTMLanguageModel | Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    num_samples: int = 1,
) -> list[Sample]:
    """Return the finished samples of `generate`, in the order of the prompts."""
    events = generate(model, tokenizer, prompts, config, num_samples=num_samples)
    ended = {index: event for index, event in events if isinstance(event, Sample)}
    return [ended[index] for index in sorted(ended)]


def generate_stream(
    model: LSTMLanguageModel | Decoder,
    tokenizer: Tokenizer,
    requests: Iterable[Request],
    *,
    batch_size: int = BATCH_SIZE,
    interrupted: Callable[[], bool] = lambda: False,
    run: Callable[[Batch], Iterator[Step]] | None = None,
) -> Iterator[tuple[int, str | Sample]]:
    """Continue requests, `batch_size` of them at a time; the next requests start when rows are free.

    Args:
        model: the model, or a decoder of it.
        tokenizer: the model's.
        requests: read one by one, at most `MAX_AHEAD` beyond the oldest one that runs.
        batch_size: number of rows.
        interrupted: called before tokens are drawn. Once it returns true, running samples end as they are and no
            request starts.
        run: draws the tokens of a batch, as `Batch.run` does. `cuda_graphs.GraphRunner` does the same with CUDA graphs.
            Default: `Batch.run_many`.

    Yields:
        (index of the request, piece of text) as it is drawn, and once per request (index, Sample) when it ends.

    Raises:
        ValueError: a request is impossible, see `require_drawable` and `begin_id`.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    waiting, num_started, prefilled, scored = iter(requests), 0, Prefilled(), Scored()
    batch: Batch | None = None
    stopped = interrupted()
    while not stopped:
        # take requests for the free rows, unless few are free or the oldest sample is too far behind
        running = batch.samples if batch is not None else []
        oldest = min((sample.index for sample in running), default=num_started)
        room = min(batch_size - len(running), oldest + MAX_AHEAD - num_started)
        room = room if room >= batch_size // REFILL_DIVISOR else 0
        arrived = [
            RunningSample.of(
                num_started + i,
                request,
                tokenizer,
                begin=None if request.label is None else begin_id(decoder.model, tokenizer, request.label),
            )
            for i, request in enumerate(islice(waiting, room))
        ]
        num_started += len(arrived)

        # forced tokens come first, and may already end a sample; the others join the batch
        for sample in arrived:
            for event in sample.begin():
                yield sample.index, event
        if joining := [sample for sample in arrived if not sample.ended]:
            batch = Batch.of(decoder, tokenizer, joining, beside=batch, prefilled=prefilled, scored=scored)
        if batch is None:
            if not arrived:  # no request is left
                return
            stopped = interrupted()
            continue

        # draw until some sample has ended, then drop the ended samples
        for tokens, logprobs in batch.run_many() if run is None else map(_as_steps, run(batch)):
            for row, sample in enumerate(batch.samples):
                if not sample.ended:  # a CUDA graph may draw tokens after the end
                    for event in sample.push_all(tokens[row], logprobs[row] if logprobs is not None else None):
                        yield sample.index, event
            if stopped := interrupted():
                break
        batch = batch.without_ended()
    for sample in batch.samples if batch is not None else []:
        for event in sample.cut():
            yield sample.index, event


def begin_id(model: LSTMLanguageModel, tokenizer: Tokenizer, label: str | None) -> int:
    """Return the first input of a text: that of its label, or the begin-of-text token without one.

    Raises:
        TextgenError: the model does not know the label.
    """
    return tokenizer.bos_id if label is None else model.label_id(label)


def require_label(config: SamplingConfig, begin: int, tokenizer: Tokenizer) -> None:
    """Raise TextgenError if settings scale a label, and the first input of the text is none."""
    if config.label_scale != 1 and begin < tokenizer.vocab_size:
        raise TextgenError(f"`label_scale` {config.label_scale:g} needs a `label`")


def require_drawable(config: SamplingConfig, tokenizer: Tokenizer) -> None:
    """Check the tokens of a config against the tokenizer.

    Raises:
        ValueError: a token is not in the vocabulary, or every token is banned; a regex or a choice cannot be used.
    """
    bias_of(config, tokenizer)
    require_guidable(config, tokenizer)
    for name in ("banned_tokens", "forced_tokens"):
        if wrong := [token for token in getattr(config, name) if token >= tokenizer.vocab_size]:
            raise ValueError(f"`{name}` must be below the vocabulary's size {tokenizer.vocab_size}: {wrong[0]}")
    never = {*config.banned_tokens, tokenizer.unk_id} | ({tokenizer.eos_id} if config.min_new_tokens else set())
    if config.banned_tokens and len(never) == tokenizer.vocab_size:
        raise ValueError("`banned_tokens` leaves no token to draw")


# --- a sample on the host --------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class RunningSample:
    """A sample that is not finished: its request and its text so far."""

    index: int
    """of the request"""
    request: Request
    tokenizer: Tokenizer
    prompt_ids: list[int]
    """first input and tokens of the prompt, without forced tokens"""
    text: str = ""
    """the text that was yielded"""
    held: str = ""
    """text that may be the beginning of a stop string, not yielded yet"""
    num_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ended: bool = False
    choices: tuple[tuple[str, float], ...] | None = None
    """as in `Sample`"""

    def __post_init__(self) -> None:
        self._stream = self.tokenizer.stream()
        self.guide = new_guide(self.request.config, self.tokenizer)

    @classmethod
    def of(cls, index: int, request: Request, tokenizer: Tokenizer, *, begin: int | None = None) -> RunningSample:
        """Start a request.

        Args:
            index: of the request.
            request: the prompt and its settings.
            tokenizer: the model's.
            begin: first input, see `begin_id`; default that of `request.read`, else the begin-of-text token.

        Raises:
            ValueError: the request is impossible, see `require_drawable`.
        """
        require_drawable(request.config, tokenizer)
        if begin is None:
            begin = tokenizer.bos_id if request.read is None else request.read.ids[0]
        prompt_ids = list(request.ids or (begin, *tokenizer.encode(request.prompt)))
        require_label(request.config, prompt_ids[0], tokenizer)
        return cls(index=index, request=request, tokenizer=tokenizer, prompt_ids=prompt_ids)

    @property
    def num_read(self) -> int:
        """Number of tokens that are read before the first one is drawn."""
        choices = encode_choices(self.request.config.choices, self.tokenizer)
        times = 1 if self.request.config.label_scale == 1 else 2  # `label_scale` reads the prompt without the label too
        return times * len(self.prompt_ids) + sum(map(len, choices))

    def begin(self) -> Iterator[str | Sample]:
        """Push the forced tokens, as if they had been drawn."""
        for token in self.request.config.forced_tokens:
            if not self.ended:
                yield from self.push(token, None)

    def push_all(self, tokens: Sequence[int], logprobs: TokenLogprobs | None) -> Iterator[str | Sample]:
        """Push drawn tokens until the sample ends; those after its end are dropped.

        Args:
            tokens: one or more.
            logprobs: of the token, if it is the only one and has any.
        """
        config, eos_id = self.request.config, self.tokenizer.eos_id
        if self.guide is None and not config.stop and config.logprobs is None:
            # Only the last of these tokens can end the text, so the others are decoded at once.
            tokens = tokens[: config.max_new_tokens - self.num_tokens]
            length = tokens.index(eos_id) + 1 if eos_id in tokens else len(tokens)
            self.held += "".join(map(self._stream.push, tokens[: length - 1]))
            self.num_tokens += length - 1
            tokens = tokens[length - 1 : length]
        for token in tokens:
            if not self.ended:
                yield from self.push(token, logprobs)

    def push(self, token: int, logprobs: TokenLogprobs | None) -> Iterator[str | Sample]:
        """Append a drawn token; yield the text that cannot change any more, and the `Sample` if it has ended."""
        config, guide, is_eos = self.request.config, self.guide, token == self.tokenizer.eos_id
        reason = "end" if is_eos else "length"
        if guide is not None and not is_eos:
            guide.push(token)
            reason = "choice" if guide.is_final else "length"
        elif guide is not None and not (guide.is_complete and self.num_tokens >= config.min_new_tokens):
            reason, logprobs = guide.block, None  # the model did not draw this token: none was allowed
        if logprobs is not None and config.logprobs is not None:
            # the batch computes as many alternatives as its most demanding row asks for
            self.logprobs.append(TokenLogprobs(logprobs.token, logprobs.logprob, logprobs.top[: config.logprobs]))
        self.num_tokens += not is_eos
        last = reason != "length" or self.num_tokens >= config.max_new_tokens
        # The stream returns whole characters; `flush` returns U+FFFD if one is unfinished, which no regex matches.
        self.held += "" if is_eos else self._stream.push(token)
        self.held += self._stream.flush() if last and guide is None else ""
        piece, self.held, stop = _cut_at_stop(self.held, config.stop)
        if last or stop is not None:
            yield from self._end(piece, reason if stop is None else "stop", stop)
        elif piece:
            self.text += piece
            yield piece

    def cut(self) -> Iterator[str | Sample]:
        """End the sample before its time: yield the text that was held back, whole characters only."""
        return self._end("", "length")

    def _end(self, piece: str, reason: str, stop: str | None = None) -> Iterator[str | Sample]:
        self.ended = True
        piece += self.held
        self.text += piece
        if piece:
            yield piece
        logprobs = tuple(self.logprobs) if self.request.config.logprobs is not None else None
        prompt, number = self.request.prompt, self.request.number
        ended = (self.num_tokens, reason == "end", stop, logprobs, reason, self.choices)
        yield Sample(prompt, number, self.text, *ended)


def _cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, str | None]:
    """Split a text at a stop string.

    Of several stop strings, the one that is complete first counts; of those that are complete at the same character,
    the longest. So the result does not depend on the borders between tokens.

    Returns:
        The text that cannot change any more, the rest that may be the beginning of a stop string, and the stop string
        found; None if there is none.
    """
    if not stops:
        return text, "", None
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if found:
        end, _, stop = min(found)
        return text[: end - len(stop)], "", stop
    # hold back the longest end of the text that some stop string begins with
    for start in range(max(len(text) - max(map(len, stops)) + 1, 0), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:], None
    return text, "", None


def _sample_number(prompt: str, j: int) -> int:
    """Return the number of sample j of a prompt in the noise: a hash of the prompt gives each prompt its own noise."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big") + j


# --- the batch on the device -----------------------------------------------------------------------------------------

# The tokens of a step, one per row, and their log-probabilities; None if no row asks for them.
Step = tuple[list[int], list[TokenLogprobs] | None]

# The tokens of some steps, one or more of each row, and the log-probabilities of a row's only token; None if no row
# asks for them.
Steps = tuple[Sequence[Sequence[int]], Sequence[TokenLogprobs | None] | None]

# Decoder states after prompts, by the prompts' tokens.
Prefilled = dict[tuple[int, ...], DecoderState]

# Scores of `choices` after prompts, by the prompts' tokens and the choices.
Scored = dict[tuple[tuple[int, ...], tuple[str, ...]], list[float]]


@dataclass
class Batch:
    """Samples that are decoded together, one per row."""

    decoder: Decoder
    tokenizer: Tokenizer
    samples: list[RunningSample]
    tokens: Tensor
    """the token of each row that the next step reads, (rows,) int64"""
    state: DecoderState
    """before that token"""
    sampling: SamplingState

    @classmethod
    @torch.inference_mode()
    def of(
        cls,
        decoder: Decoder,
        tokenizer: Tokenizer,
        samples: list[RunningSample],
        *,
        beside: Batch | None = None,
        prefilled: Prefilled | None = None,
        scored: Scored | None = None,
    ) -> Batch:
        """Read the prompts of new samples and append them to a running batch.

        Args:
            decoder: reads the prompts.
            tokenizer: the model's.
            samples: the new ones.
            beside: the running batch, if there is one.
            prefilled: states of prompts that were read before. Changed in place: only the last prompt's state is kept,
                as the next samples often continue the same prompt.
            scored: scores of choices that were computed before. Changed in place, as `prefilled` is.
        """
        states: Prefilled = {} if prefilled is None else prefilled
        prompts = [(*sample.prompt_ids, *sample.request.config.forced_tokens) for sample in samples]
        read = {
            ids: sample.request.read
            for ids, sample in zip(prompts, samples, strict=True)
            if sample.request.read is not None and sample.request.read.begins(ids)
        }
        # what is read a second time, without the label
        unlabelled = [
            (tokenizer.bos_id, *ids[1:]) if sample.request.config.label_scale != 1 else None
            for ids, sample in zip(prompts, samples, strict=True)
        ]
        wanted = dict.fromkeys([*prompts, *(ids for ids in unlabelled if ids is not None)])
        states |= _prefill(decoder, [ids for ids in wanted if ids not in states], read)
        # a batch of one row for each new sample, then one batch of all
        parts = [] if beside is None else [beside]
        _draw_choices(decoder, samples, [(ids, states[ids]) for ids in prompts], {} if scored is None else scored)
        for sample, ids, plain in zip(samples, prompts, unlabelled, strict=True):
            one = cls._of_one(decoder, tokenizer, sample, ids[-1], states[ids])
            if plain is not None:
                one.sampling.tensors["unlabelled"] = torch.tensor(plain[-1:], device=decoder.device)
                one.sampling.tensors |= {f"unlabelled.{i}": part for i, part in enumerate(states[plain])}
            parts.append(one)
        for ids in states.keys() - prompts[-1:]:
            del states[ids]
        return cls(
            decoder,
            tokenizer,
            [sample for part in parts for sample in part.samples],
            torch.cat([part.tokens for part in parts]),
            [torch.cat(tensors) for tensors in zip(*(part.state for part in parts), strict=True)],
            join_sampling_states([part.sampling for part in parts], decoder.vocab_size),
        )

    @classmethod
    def _of_one(
        cls, decoder: Decoder, tokenizer: Tokenizer, sample: RunningSample, token: int, state: DecoderState
    ) -> Batch:
        """Return the batch of one sample that reads `token` next, in the given state."""
        request, device = sample.request, decoder.device
        sampling = new_sampling_state(
            request.config,
            sample.prompt_ids[1:],
            _sample_number(request.prompt, request.number),
            vocab_size=decoder.vocab_size,
            device=device,
            bias=bias_of(request.config, tokenizer),
            breaks=breaks_of(request.config.dry_breakers, tokenizer) if request.config.dry_multiplier else (),
        )
        for forced in request.config.forced_tokens:  # they count as drawn
            record_tokens(sampling, torch.tensor([forced], device=device))
        return cls(decoder, tokenizer, [sample], torch.tensor([token], device=device), state, sampling)

    def run(self) -> Iterator[Step]:
        """Draw tokens, step by step, until a sample has ended.

        The caller pushes each step's tokens to the samples before it takes the next step.
        """
        while not any(sample.ended for sample in self.samples):
            yield self.advance()

    def run_many(self) -> Iterator[Steps]:
        """Draw what `run` draws, many tokens of a row at a time where compiled code can."""
        while not any(sample.ended for sample in self.samples):
            yield self.advance_many()

    @torch.inference_mode()
    def advance_many(
        self, *, seconds: float = MOST_SECONDS, most_ended: int | None = None, halt: Halt | None = None
    ) -> Steps:
        """Draw one or more tokens of every row: up to `MOST_STEPS` in one compiled call, one where that is impossible.

        The order of the rows may change before tokens are drawn. Tokens after the end of a text are to be dropped.

        Args:
            seconds: the call ends after the step in which they have passed.
            most_ended: the call ends when so many rows have ended; default: an eighth of them.
            halt: ends the call after a step.
        """
        kernel = self.decoder.kernel
        many = [kernel is not None and is_compiled(sample.request.config) for sample in self.samples]
        num_many, halt = sum(many), halt or Halt()
        most_ended = most_ended or max(len(many) // REFILL_DIVISOR, 1)
        if num_many == 0:
            return _as_steps(self.advance())
        if num_many == len(many):
            return self._draw_many(seconds, most_ended, halt), None
        # Rows that need the host draw one token; the others have as much time for theirs. So neither wait long.
        self._select(sorted(range(len(many)), key=lambda row: not many[row]))
        compiled, others = self._part(0, num_many), self._part(num_many, len(many))
        started = time.perf_counter()
        one, logprobs = _as_steps(others.advance())
        tokens = compiled._draw_many(min(seconds, time.perf_counter() - started), most_ended, halt)
        self.tokens = torch.cat([compiled.tokens, others.tokens])
        self.state = [torch.cat(parts) for parts in zip(compiled.state, others.state, strict=True)]
        return [*tokens, *one], None if logprobs is None else [*[None] * num_many, *logprobs]

    def _draw_many(self, seconds: float, most_ended: int, halt: Halt) -> list[list[int]]:
        """Draw tokens of every row in one compiled call, and return them, (rows, steps)."""
        kernel, sampling, eos_id = self.decoder.kernel, self.sampling, self.tokenizer.eos_id
        assert kernel is not None
        drawn = kernel.draw_many(
            self.tokens,
            self.state,
            sampling.tensors,
            [sample.request.config.max_new_tokens - sample.num_tokens for sample in self.samples],
            items=item_bits(self.decoder.vocab_size, self.tokens.device),
            unk_id=self.tokenizer.unk_id,
            eos_id=eos_id,
            repeat_length=REPEAT_LENGTH,
            xtc_noise=XTC_NOISE,
            most_steps=MOST_STEPS,
            most_ended=most_ended,
            seconds=seconds,
            halt=halt,
        )
        self.tokens, self.state = drawn.tokens[-1], drawn.state
        if drawn.doubtful is not None:  # rounding may decide about a token, so torch draws it
            rows = (self.tokens < 0).nonzero()[:, 0]
            doubtful = select_sampling_state(sampling, rows)
            self.tokens[rows] = draw(process_logits(drawn.doubtful[rows], doubtful, eos_id=eos_id), doubtful)
            record_tokens(sampling, self.tokens)
        tokens: list[list[int]] = drawn.tokens.T.tolist()
        return tokens

    def _part(self, first: int, end: int) -> Batch:
        """Return the batch of some rows, whose settings and history are views of this batch's."""
        rows = slice(first, end)
        tensors = {name: value[rows] for name, value in self.sampling.tensors.items()}
        parts = [part[rows] for part in self.state]
        sampling = replace(self.sampling, tensors=tensors)
        return Batch(self.decoder, self.tokenizer, self.samples[rows], self.tokens[rows], parts, sampling)

    def _select(self, rows: list[int]) -> None:
        """Keep some rows, in the given order."""
        if rows == list(range(len(self.samples))):
            return
        places = torch.tensor(rows, device=self.tokens.device)
        self.samples = [self.samples[row] for row in rows]
        self.tokens, self.state = self.tokens[places], [part[places] for part in self.state]
        self.sampling = select_sampling_state(self.sampling, places)

    @torch.inference_mode()
    def advance(self) -> Step:
        """Draw the next token of every row."""
        guides = [sample.guide for sample in self.samples]
        self.tokens, self.state, logprobs = advance(
            self.decoder,
            self.tokens,
            self.state,
            self.sampling,
            unk_id=self.tokenizer.unk_id,
            eos_id=self.tokenizer.eos_id,
            guides=guides if any(guides) else None,
        )
        tokens: list[int] = self.tokens.tolist()
        return tokens, None if logprobs is None else self.token_logprobs(tokens, *logprobs)

    @property
    def is_guided(self) -> bool:
        """Whether the host has to choose the tokens that some row may draw, before each step."""
        return any(sample.guide is not None for sample in self.samples)

    def token_logprobs(self, tokens: list[int], drawn: Tensor, values: Tensor, ids: Tensor) -> list[TokenLogprobs]:
        """Return the log-probabilities of a step as values on the host, with the texts of tokens for their ids.

        Args:
            tokens: the drawn tokens, one per row.
            drawn: their log-probabilities (rows,).
            values: the largest log-probabilities (rows, n), in falling order.
            ids: the tokens of `values`.
        """
        text_of = self.tokenizer.token_text
        tops = [
            tuple((text_of(i), v) for i, v in zip(row_ids, row_values, strict=True))
            for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        return [
            TokenLogprobs(text_of(token), value, top)
            for token, value, top in zip(tokens, drawn.tolist(), tops, strict=True)
        ]

    @torch.inference_mode()
    def without_ended(self) -> Batch | None:
        """Return the batch of the samples that have not ended; None if all have."""
        running = [row for row, sample in enumerate(self.samples) if not sample.ended]
        if not running:
            return None
        self._select(running)
        return self


def _as_steps(step: Step) -> Steps:
    tokens, logprobs = step
    return [[token] for token in tokens], logprobs


def _draw_choices(
    decoder: Decoder,
    samples: Sequence[RunningSample],
    prompts: Sequence[tuple[tuple[int, ...], DecoderState]],
    scored: Scored,
) -> None:
    """Draw the choices of new samples, in place; their guides lead through the tokens of the choices.

    Args:
        decoder: reads the choices.
        samples: new ones; those without `choices` do not change.
        prompts: of each sample the tokens, and the state after all but the last.
        scored: scores that are known. Changed in place: only those of the last sample are kept.
    """
    for sample, (ids, state) in zip(samples, prompts, strict=True):
        request = sample.request
        if not (choices := request.config.choices):
            continue
        tokens = encode_choices(choices, sample.tokenizer)
        if (ids, choices) not in scored:
            scored[ids, choices] = score_choices(decoder, ids[-1], state, tokens)
        scores = torch.tensor(scored[ids, choices], dtype=torch.float64)
        sample.choices = tuple(zip(choices, scores.softmax(-1).tolist(), strict=True))
        drawn = draw_item(scores, request.config, _sample_number(request.prompt, request.number))
        sample.guide = ChoiceGuide(tokens[drawn], decoder.vocab_size)
    last = prompts[-1][0], samples[-1].request.config.choices
    for key in scored.keys() - {last}:
        del scored[key]


def _prefill(
    decoder: Decoder, prompts: Sequence[tuple[int, ...]], read: Mapping[tuple[int, ...], ReadState] | None = None
) -> Prefilled:
    """Return the states (1, ...) after all tokens but the last of each prompt.

    A prompt's length alone decides whether the model or decoder steps read it, not the prompts that arrive with it:
    steps may round differently, and a sample's text must not depend on the others.

    Args:
        decoder: reads the prompts.
        prompts: their tokens.
        read: by prompt, a state after its first tokens, which the model does not read again.
    """
    longest_first = sorted(prompts, key=len, reverse=True)
    num_alone = sum(reads_alone(decoder, ids) for ids in prompts)
    first, read = longest_first[:num_alone], read or {}
    alone = {ids: decoder.prefill(ids, read=read[ids]) if ids in read else decoder.prefill(ids) for ids in first}
    return alone | _prefill_together(decoder, longest_first[num_alone:])


def reads_alone(decoder: Decoder, ids: Sequence[int]) -> bool:
    """Return whether the model reads a prompt, in windows; False if decoder steps read it, beside other prompts."""
    by_steps = isinstance(decoder, CellDecoder) and decoder.device.type == "cpu"
    return len(ids) > SHORT_PROMPT or not by_steps


def _prefill_together(decoder: Decoder, prompts: Sequence[tuple[int, ...]]) -> Prefilled:
    """Read prompts, sorted from the longest to the shortest, by decoder steps; a finished prompt leaves the batch."""
    states: Prefilled = {}
    state = [torch.cat(parts) for parts in zip(*(decoder.prefill(ids[:1]) for ids in prompts), strict=True)]
    for position in range(len(prompts[0]) if prompts else 0):
        # the first `num_running` prompts have a token to read here; the rows after them are finished
        num_running = sum(len(ids) - 1 > position for ids in prompts)
        for row in range(num_running, len(prompts) - len(states)):
            states[prompts[row]] = [part[row : row + 1] for part in state]
        if num_running:
            tokens = torch.tensor([ids[position] for ids in prompts[:num_running]])
            _, state = decoder.step(tokens, [part[:num_running] for part in state])
    return states


def advance(
    decoder: Decoder,
    tokens: Tensor,
    state: DecoderState,
    sampling: SamplingState,
    *,
    unk_id: int,
    eos_id: int,
    guides: Sequence[Guide | None] | None = None,
    ended: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, DecoderState, tuple[Tensor, Tensor, Tensor] | None]:
    """Read one token per row and draw the next one. The host does not wait for the device, unless a row has a guide.

    Args:
        decoder: reads the tokens.
        tokens: (batch,) int64.
        state: of the decoder.
        sampling: of the rows; the drawn tokens are recorded in it, in place.
        unk_id: the unknown token, which is never drawn: no text contains it, and it would show as U+FFFD.
        eos_id: the token that ends a text.
        guides: of the rows; None if no row has one.
        ended: bool (batch,), rows that draw `eos_id` from now on, changed in place; None if no row is kept after its
            end.
        out: (batch,) int64, gets the drawn tokens; default a new tensor.

    Returns:
        Drawn tokens (batch,), the new state, and log-probabilities: of the drawn tokens (batch,), the n largest
        (batch, n) and their tokens (batch, n). None if no row asks for log-probabilities.
    """
    scale = partial(_scale_label, decoder, sampling=sampling) if "unlabelled" in sampling.tensors else None
    if isinstance(decoder, FusedDecoder) and guides is None:
        return decoder.advance(
            tokens, state, sampling, unk_id=unk_id, eos_id=eos_id, ended=ended, out=out, scale_label=scale
        )
    logits, state = decoder.step(tokens, state)
    # of the model alone, so before anything changes the logits
    logprobs = logits.log_softmax(-1) if sampling.logprobs is not None else None
    if scale is not None:
        logits = scale(logits)
    logits.select(1, unk_id).fill_(-math.inf)
    if guides is None:
        drawn = draw(process_logits(logits, sampling, eos_id=eos_id), sampling)
    else:
        drawn = _draw_guided(logits, sampling, guides, eos_id)
    if ended is not None:
        drawn = drawn.masked_fill(ended, eos_id)
        ended.logical_or_(drawn == eos_id)
    drawn = drawn if out is None else out.copy_(drawn)
    record_tokens(sampling, drawn)
    if logprobs is None or sampling.logprobs is None:
        return drawn, state, None
    values, ids = logprobs.topk(min(sampling.logprobs, logprobs.shape[-1]))
    return drawn, state, (logprobs.gather(1, drawn[:, None])[:, 0], values, ids)


def _draw_guided(logits: Tensor, sampling: SamplingState, guides: Sequence[Guide | None], eos_id: int) -> Tensor:
    """Draw a token of each row, int64 (batch,), that its guide allows.

    A mask takes longer than a draw. So all rows draw without masks first, and those whose token is not allowed draw
    with masks then. The tokens are the same, see `draw_unmasked`.
    """
    drawn = draw_unmasked(logits, sampling, eos_id=eos_id)
    rows = range(len(guides)) if drawn is None else _refused_rows(drawn, guides)
    if drawn is not None and not rows:
        return drawn
    masks = torch.from_numpy(join_masks([guides[row] for row in rows], logits.shape[1])).to(logits.device)
    if len(rows) == len(guides):
        return draw(process_logits(logits, sampling, eos_id=eos_id, masks=masks), sampling)
    assert drawn is not None
    places = torch.tensor(rows, device=logits.device)
    part = select_sampling_state(sampling, places)
    drawn[places] = draw(process_logits(logits[places], part, eos_id=eos_id, masks=masks), part)
    return drawn


def _refused_rows(drawn: Tensor, guides: Sequence[Guide | None]) -> list[int]:
    """Return the rows whose token is unsure or not allowed."""
    return [
        row
        for row, (token, guide) in enumerate(zip(drawn.tolist(), guides, strict=True))
        if token < 0 or (guide is not None and not guide.allows(token))
    ]


def _scale_label(decoder: Decoder, logits: Tensor, sampling: SamplingState) -> Tensor:
    """Read the tokens without the label too, in place, and return the logits of `scale_label`."""
    tensors = sampling.tensors
    parts = [tensors[f"unlabelled.{i}"] for i in range(2 * decoder.model.config.num_layers)]
    unlabelled, after = decoder.step(tensors["unlabelled"], parts)
    for part, new in zip(parts, after, strict=True):
        part.copy_(new)
    return scale_label(logits, unlabelled, tensors["label_scale"])
