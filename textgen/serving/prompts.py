"""Prompts: from a request's texts or token ids to what the model reads, and the scores of their tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from textgen.data.corpus import normalize
from textgen.decoding.decoders import PREFILL_WINDOW, Decoder, DecoderState, decoder_state
from textgen.decoding.reading import ReadState
from textgen.decoding.scoring import Window, read_windows
from textgen.serving.protocol import CompletionRequest, Limits
from textgen.serving.responses import ApiError
from textgen.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt of a request."""

    text: str
    """normalized, and without boundaries of documents"""
    tokens: list[int]
    """as the request gives them: with begin-of-text only if the request names it"""
    echo: str
    """returned before the sample, if the request asks for it"""
    begin: int
    """the first input: begin-of-text, or that of the request's label"""
    given: str = ""
    """the text before normalization, after that of `state_id`; empty if the request gives ids"""

    def ids(self, bos_id: int) -> list[int]:
        """Return what the model reads: the first input, once, in place of begin-of-text."""
        return [self.begin, *(self.tokens[1:] if self.tokens[:1] == [bos_id] else self.tokens)]


def read_prompts(
    request: CompletionRequest,
    tokenizer: Tokenizer,
    normalization: str,
    limits: Limits,
    *,
    begin: int,
    before: str = "",
) -> list[Prompt]:
    """Return a request's prompts, which begin with the input `begin`.

    Args:
        request: the request.
        tokenizer: the model's.
        normalization: of the model's training text.
        limits: of a request.
        begin: the first input of every prompt.
        before: the text of `state_id`, which every prompt continues.

    Raises:
        ApiError: a prompt has too many tokens, or an id is not in the vocabulary.
    """
    is_list = isinstance(request.prompt, list) and isinstance(request.prompt[0], str | list)
    prompts: list[Prompt] = []
    for i, given in enumerate(request.prompts):
        name = f"prompt[{i}]" if is_list else "prompt"
        if isinstance(given, str):
            normalized = normalize(before + given, normalization)
            tokens, text, echo = tokenizer.encode(normalized), normalized, given
            if request.scores_prompts:
                tokens = encode_document(tokenizer, normalized)
                text = normalized.removeprefix(tokenizer.eos_token).removesuffix(tokenizer.eos_token)
        else:
            require_ids(given, tokenizer, name)
            tokens, text = given, tokenizer.decode(given)
            echo = text
        if request.scores_prompts:
            echo = tokenizer.decode(tokens)  # what the tokens' offsets count
        num_given = len(tokens) - (tokens[:1] == [tokenizer.bos_id])  # begin-of-text is read in any case
        if num_given > limits.max_prompt_tokens:
            whole = " with the text of `state_id`" if before else ""
            message = f"`{name}` has {num_given} tokens{whole}; at most {limits.max_prompt_tokens}"
            raise too_long(f"{message}, by the server's flag `--max_prompt_tokens`", name)
        raw = before + given if isinstance(given, str) else ""
        prompts.append(Prompt(text, tokens, echo if request.echo else "", begin, raw))
    n = request.n or 1
    total = n * sum(len(prompt.tokens) for prompt in prompts)
    if request.scores_prompts and total > limits.max_scored_tokens:
        times = f", `n` {n} times" if n > 1 else ""  # the scores are in every choice
        message = (
            f"`prompt` has {total} tokens in all{times}; at most {limits.max_scored_tokens} with `echo` and `logprobs`"
        )
        raise too_long(f"{message}, 16 times the server's flag `--max_prompt_tokens`", "prompt")
    return prompts


def too_long(message: str, name: str) -> ApiError:
    """Return the error of a prompt with too many tokens."""
    return ApiError(400, message, code="context_length_exceeded", param=name)


def require_ids(tokens: Sequence[int], tokenizer: Tokenizer, name: str) -> None:
    """Raise ApiError if an id is not in the vocabulary."""
    if tokens and max(tokens) >= tokenizer.vocab_size:
        i = next(i for i, token in enumerate(tokens) if token >= tokenizer.vocab_size)
        message = f"`{name}[{i}]` must be below the vocabulary's size {tokenizer.vocab_size}: {tokens[i]}"
        raise ApiError(400, message[:200], param=f"{name}[{i}]")


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text whose `</s>` at its beginning and end, if it has them, are boundaries of documents.

    Elsewhere `</s>` is text, and so it is everywhere in a prompt that is only continued.
    """
    mark = tokenizer.eos_token
    first = text.startswith(mark)
    text = text.removeprefix(mark)
    last = text.endswith(mark)
    boundary = [tokenizer.eos_id]
    return boundary * first + tokenizer.encode(text.removesuffix(mark)) + boundary * last


def decode_document(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Return the text of tokens with `</s>` for each boundary of documents."""
    mark = tokenizer.eos_token.encode()
    parts = (mark if token == tokenizer.eos_id else tokenizer.token_bytes(token) for token in tokens)
    return b"".join(parts).decode(errors="replace")


class PromptReader:
    """Reads a prompt window by window, so that running samples wait for one window only; it may score the tokens.

    Args:
        prompt: the prompt.
        bos_id: the token that every text begins with.
        num_top: number of likeliest tokens to report at each place; None to score nothing.
        keys: of the prompt's prefixes in the table of prefixes, which are not read again if they are known.
        read: the state after some first tokens; ignored if it is that of another text.
    """

    def __init__(
        self,
        prompt: Prompt,
        bos_id: int,
        num_top: int | None,
        *,
        keys: Sequence[bytes] = (),
        read: ReadState | None = None,
    ) -> None:
        self.ids, self.keys = tuple(prompt.ids(bos_id)), keys
        self.state: DecoderState | None = None
        """after all tokens but the last one, once they are read"""
        self.border: tuple[int, DecoderState] | None = None
        """the number of whole windows that are read, and the state after them; None before the first one"""
        self._tokens, self._num_top = prompt.tokens, num_top
        self._windows: Iterator[Window] | None = None
        self._scored: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._num_read = 0
        self._num_reused = 0
        if read is not None and read.begins(self.ids):
            self.skip(read.num_read // PREFILL_WINDOW, read.state)

    @property
    def is_done(self) -> bool:
        """Whether all tokens are read but the last one, which the first step reads."""
        return self._num_read >= len(self.ids) - 1

    @property
    def next_size(self) -> int:
        """Number of tokens that `read` reads next."""
        return min(len(self.ids) - 1 - self._num_read, PREFILL_WINDOW)

    @property
    def num_windows(self) -> int:
        """Number of windows that are read, the last one may be shorter."""
        return -(-self._num_read // PREFILL_WINDOW)

    def skip(self, num_windows: int, state: DecoderState) -> None:
        """Go on after a number of whole windows, whose state is known."""
        self._num_reused += num_windows * PREFILL_WINDOW - self._num_read
        self._windows = None
        self._pass(num_windows * PREFILL_WINDOW, state)

    def pop_reused(self) -> int:
        """Return the number of tokens that were skipped since the previous call."""
        count, self._num_reused = self._num_reused, 0
        return count

    def read(self, decoder: Decoder) -> None:
        """Read a window."""
        if self._windows is None:
            # The first token of the prompt has no score, as with OpenAI.
            given = len(self.ids) if self._num_top is None else len(self.ids) - max(len(self._tokens) - 1, 0)
            read = self.read_state(decoder)
            self._windows = read_windows(decoder, self.ids, given=given, num_top=self._num_top, read=read)
        window = next(self._windows)
        if self._num_top is not None:
            scores = window.logprobs, window.ranks.int(), window.top_logprobs, window.top_ids.int()
            self._scored.append(scores)
        self._pass(self._num_read + self.next_size, decoder_state(window.state))

    def read_state(self, decoder: Decoder) -> ReadState | None:
        """Return the state after the whole windows that are read; None before the first one."""
        if self.border is None:
            return None
        num_read = self.border[0] * PREFILL_WINDOW
        return ReadState(text="", ids=self.ids[:num_read], num_read=num_read, state=self.border[1], decoder=decoder)

    def _pass(self, num_read: int, state: DecoderState) -> None:
        """Note the state after some first tokens."""
        self._num_read = num_read
        if num_read % PREFILL_WINDOW == 0:
            self.border = num_read // PREFILL_WINDOW, state
        if self.is_done:
            self.state, self._windows = state, None

    def logprobs(self, tokenizer: Tokenizer) -> Iterator[dict[str, list[Any]]]:
        """Yield the scores of all windows in the form of `Logprobs`, with offsets from the prompt's first character."""
        texts = [tokenizer.token_text(token) for token in self._tokens]
        offsets = _offsets(tokenizer, self._tokens)
        names, none = ("tokens", "token_logprobs", "token_ranks", "top_logprobs", "text_offset"), [None][: len(texts)]
        yield dict(zip(names, (texts[:1], none, none, none, offsets[:1]), strict=True))
        start = 1
        for values, ranks, top_values, top_ids in self._scored:
            end = start + len(values)
            tops = [
                {tokenizer.token_text(i): for_json(value) for i, value in zip(ids, top, strict=True)}
                for ids, top in zip(top_ids.tolist(), top_values.tolist(), strict=True)
            ]
            rounded = [for_json(value) for value in values.tolist()]
            for text, value, top in zip(texts[start:end], rounded, tops, strict=True):
                top[text] = value
            yield dict(zip(names, (texts[start:end], rounded, ranks.tolist(), tops, offsets[start:end]), strict=True))
            start = end


def _offsets(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Return the place of each token in the text, in characters: that of the first one that the token completes."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offsets, length = [], 0
    for token in tokens:
        offsets.append(length)
        length += len(decoder.decode(tokenizer.token_bytes(token)))
    return offsets


def for_json(logprob: float) -> float:
    """Return a log-probability with six decimals, -9999 for minus infinity: JSON has no infinity."""
    return round(max(logprob, -9999.0), 6)
