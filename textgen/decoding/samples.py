"""A request, the sample that runs, and the sample that is finished: text and tokens on the host, no tensors.

A `RunningSample` gets the tokens that are drawn for it. It returns new pieces of text, finds where the text ends, and
at the end returns a `Sample`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from textgen.config import SamplingConfig
from textgen.decoding.guides import encode_choices, new_guide, require_guidable
from textgen.decoding.reading import ReadState
from textgen.decoding.steering import bias_of
from textgen.errors import TextgenError
from textgen.model.lstm import LSTMLanguageModel
from textgen.tokenizer import Tokenizer


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

    def push_all(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> Iterator[str | Sample]:
        """Push drawn tokens until the sample ends; those after its end are dropped.

        Args:
            tokens: any number.
            logprobs: of each token, if they have any.
        """
        config, eos_id = self.request.config, self.tokenizer.eos_id
        if tokens and self.guide is None and not config.stop and config.logprobs is None:
            # Only the last of these tokens can end the text, so the others are decoded at once.
            tokens, logprobs = tokens[: config.max_new_tokens - self.num_tokens], None
            length = tokens.index(eos_id) + 1 if eos_id in tokens else len(tokens)
            self.held += "".join(map(self._stream.push, tokens[: length - 1]))
            self.num_tokens += length - 1
            tokens = tokens[length - 1 : length]
        for i, token in enumerate(tokens):
            if not self.ended:
                yield from self.push(token, None if logprobs is None else logprobs[i])

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


def sample_number(prompt: str, j: int) -> int:
    """Return the number of sample j of a prompt in the noise: a hash of the prompt gives each prompt its own noise."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big") + j
