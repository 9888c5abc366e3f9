"""Samples that are decoded side by side: the rows of a `Batch`, with their tokens and states on the device.

`Batch.of` reads the prompts of new samples and appends them to a running batch. `Batch.advance_many` draws tokens of
each row, many in one call where compiled code can. `advance` is one step on tensors alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from textgen.decoding.decoders import CellDecoder, Decoder, DecoderState
from textgen.decoding.fused import FusedDecoder
from textgen.decoding.guides import ChoiceGuide, Guide, encode_choices, join_masks, score_choices
from textgen.decoding.reading import ReadState
from textgen.decoding.samples import RunningSample, TokenLogprobs, sample_number
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
from textgen.kernels.decoding import Drawn, Halt
from textgen.noise import item_bits
from textgen.tokenizer import Tokenizer

# Free rows are refilled once they are 1/8 of the batch: new prompts are then read together, and adding rows copies the
# tensors of the whole batch.
REFILL_DIVISOR = 8

# Largest number of steps of a compiled call, and seconds after which it begins no further one, so that text streams.
MOST_STEPS = 32
MOST_SECONDS = 0.05

# Decoder steps read prompts of up to this many tokens, several prompts at a time: on a CPU, and by fused kernels on a
# GPU, where the number is a guess. On a CPU the model reads 3 to 4 times as many tokens in the same time, but only one
# prompt at a time, and packs its weights before each prompt, which takes as long as 60 tokens (2 x 512 and 2 x 1024,
# two cores, 2026-11-23).
SHORT_PROMPT = 128

# The tokens of a step, one per row, and their log-probabilities; None if no row asks for them.
Step = tuple[list[int], list[TokenLogprobs] | None]

# The tokens of some steps, any number of each row, and the log-probabilities of each row's tokens; None for a row, or
# for all, where nobody asks for them.
Steps = tuple[Sequence[Sequence[int]], Sequence[Sequence[TokenLogprobs] | None] | None]

# Decoder states after prompts, by the prompts' tokens.
Prefilled = dict[tuple[int, ...], DecoderState]

# Scores of `choices` after prompts, by the prompts' tokens and the choices.
Scored = dict[tuple[tuple[int, ...], tuple[str, ...]], list[float]]


class RunningBatch(Protocol):
    """What draws the tokens of samples side by side: a `Batch`, or `cuda_graphs.GraphBatch`."""

    @property
    def samples(self) -> Sequence[RunningSample]:
        """The samples, one per row."""

    def advance_many(
        self, *, seconds: float = MOST_SECONDS, most_ended: int | None = None, halt: Halt | None = None
    ) -> Steps:
        """Draw tokens of every row, see `Batch.advance_many`."""

    def without_ended(self) -> RunningBatch | None:
        """Return the batch of the samples that have not ended; None if all have."""


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
        """Read the prompts of new samples and append them to a running batch; arguments are those of `each_of`."""
        new = cls.each_of(decoder, tokenizer, samples, prefilled=prefilled, scored=scored)
        return cls.joined(new if beside is None else [beside, *new])

    @classmethod
    @torch.inference_mode()
    def each_of(
        cls,
        decoder: Decoder,
        tokenizer: Tokenizer,
        samples: list[RunningSample],
        *,
        prefilled: Prefilled | None = None,
        scored: Scored | None = None,
    ) -> list[Batch]:
        """Read the prompts of new samples and return a batch of one row for each.

        Args:
            decoder: reads the prompts.
            tokenizer: the model's.
            samples: the new ones.
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
        parts = []
        _draw_choices(decoder, samples, [(ids, states[ids]) for ids in prompts], {} if scored is None else scored)
        for sample, ids, plain in zip(samples, prompts, unlabelled, strict=True):
            one = cls._of_one(decoder, tokenizer, sample, ids[-1], states[ids])
            if plain is not None:
                one.sampling.tensors["unlabelled"] = torch.tensor(plain[-1:], device=decoder.device)
                one.sampling.tensors |= {f"unlabelled.{i}": part for i, part in enumerate(states[plain])}
            parts.append(one)
        for ids in states.keys() - prompts[-1:]:
            del states[ids]
        return parts

    @classmethod
    @torch.inference_mode()
    def joined(cls, parts: Sequence[Batch]) -> Batch:
        """Return one batch with the rows of several."""
        decoder = parts[0].decoder
        return cls(
            decoder,
            parts[0].tokenizer,
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
            sample_number(request.prompt, request.number),
            vocab_size=decoder.vocab_size,
            device=device,
            bias=bias_of(request.config, tokenizer),
            breaks=breaks_of(request.config.dry_breakers, tokenizer) if request.config.dry_multiplier else (),
        )
        for forced in request.config.forced_tokens:  # they count as drawn
            record_tokens(sampling, torch.tensor([forced], device=device))
        return cls(decoder, tokenizer, [sample], torch.tensor([token], device=device), state, sampling)

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
            return as_steps(self.advance())
        if num_many == len(many):
            return self._draw_many(seconds, most_ended, halt)
        # Rows that need the host draw one token; the others have as much time for theirs. So neither wait long.
        self._select(sorted(range(len(many)), key=lambda row: not many[row]))
        compiled, others = self._part(0, num_many), self._part(num_many, len(many))
        started = time.perf_counter()
        one, of_one = as_steps(others.advance())
        tokens, of_many = compiled._draw_many(min(seconds, time.perf_counter() - started), most_ended, halt)
        self.tokens = torch.cat([compiled.tokens, others.tokens])
        self.state = [torch.cat(parts) for parts in zip(compiled.state, others.state, strict=True)]
        return [*tokens, *one], [*(of_many or [None] * num_many), *(of_one or [None] * len(one))]

    def _draw_many(self, seconds: float, most_ended: int, halt: Halt) -> Steps:
        """Draw tokens of every row in one compiled call."""
        kernel, sampling, eos_id = self.decoder.kernel, self.sampling, self.tokenizer.eos_id
        assert kernel is not None
        drawn = kernel.draw_many(
            self.tokens,
            self.state,
            sampling.tensors,
            [sample.request.config.max_new_tokens - sample.num_tokens for sample in self.samples],
            [row for row, sample in enumerate(self.samples) if sample.request.config.logprobs is not None],
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
        return tokens, self._logprobs_of(drawn) if sampling.logprobs is not None else None

    def _logprobs_of(self, drawn: Drawn) -> list[list[TokenLogprobs] | None]:
        """Return the log-probabilities of each row's tokens; None for a row that does not ask for them."""
        assert self.sampling.logprobs is not None
        logprobs: list[list[TokenLogprobs] | None] = [None] * len(self.samples)
        for place, row in enumerate(drawn.kept_rows):
            tokens = drawn.tokens[:, row]
            values = likeliest(drawn.kept[:, place].log_softmax(-1), tokens, self.sampling.logprobs)
            logprobs[row] = token_logprobs(self.tokenizer, tokens.tolist(), *values)
        return logprobs

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
        return tokens, None if logprobs is None else token_logprobs(self.tokenizer, tokens, *logprobs)

    @property
    def is_guided(self) -> bool:
        """Whether the host has to choose the tokens that some row may draw, before each step."""
        return any(sample.guide is not None for sample in self.samples)

    @torch.inference_mode()
    def without_ended(self) -> Batch | None:
        """Return the batch of the samples that have not ended; None if all have."""
        running = [row for row, sample in enumerate(self.samples) if not sample.ended]
        if not running:
            return None
        self._select(running)
        return self


def token_logprobs(
    tokenizer: Tokenizer, tokens: list[int], drawn: Tensor, values: Tensor, ids: Tensor
) -> list[TokenLogprobs]:
    """Return the log-probabilities of a step as values on the host, with the texts of tokens for their ids.

    Args:
        tokenizer: the model's.
        tokens: the drawn tokens, one per row.
        drawn: their log-probabilities (rows,).
        values: the largest log-probabilities (rows, n), in falling order.
        ids: the tokens of `values`.
    """
    text_of = tokenizer.token_text
    tops = [
        tuple((text_of(i), v) for i, v in zip(row_ids, row_values, strict=True))
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return [
        TokenLogprobs(text_of(token), value, top)
        for token, value, top in zip(tokens, drawn.tolist(), tops, strict=True)
    ]


def as_steps(step: Step) -> Steps:
    tokens, logprobs = step
    return [[token] for token in tokens], None if logprobs is None else [[each] for each in logprobs]


class SingleSteps(Batch):
    """A batch that draws one token of each row at a time: it says what other batches have to draw."""

    def advance_many(self, *, seconds: float = 0.0, most_ended: int | None = None, halt: Halt | None = None) -> Steps:
        """Draw the next token of every row."""
        return as_steps(self.advance())


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
        drawn = draw_item(scores, request.config, sample_number(request.prompt, request.number))
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
    together = longest_first[num_alone:]
    if decoder.pieces is not None:
        return alone | decoder.pieces.read(together)
    return alone | _prefill_together(decoder, together)


def reads_alone(decoder: Decoder, ids: Sequence[int]) -> bool:
    """Return whether the model reads a prompt, in windows; False if decoder steps read it, beside other prompts."""
    by_steps = isinstance(decoder, CellDecoder) and decoder.device.type == "cpu"
    return len(ids) > SHORT_PROMPT or not (by_steps or decoder.pieces is not None)


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
    return drawn, state, likeliest(logprobs, drawn, sampling.logprobs)


def likeliest(logprobs: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities of tokens (rows,), the largest ones, and their tokens, both (rows, count).

    Args:
        logprobs: of all tokens, (rows, vocab_size).
        tokens: int64 (rows,).
        count: at most the size of the vocabulary is returned.
    """
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]))
    return logprobs.gather(1, tokens[:, None])[:, 0], values, ids


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
    return scale_label(logits, unlabelled, tensors["label_scale"], tensors.get("repetition_penalty"))
