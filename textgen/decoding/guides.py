"""Texts that must match a regex, or be one of a list: the tokens that may come next.

A `Guide` belongs to one sample. Before each step it says which tokens may be drawn, and then gets the drawn one. Masks
work on the bytes of tokens, so a match may be spelled by any tokens.
"""

from __future__ import annotations

import functools
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from textgen.config import SamplingConfig
from textgen.decoding.decoders import Decoder, DecoderState
from textgen.packages import require_packages
from textgen.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

# Positions of a regex, with its repetitions written out: an automaton has about as many states for a plain regex.
MAX_POSITIONS = 2000

# A regex is tried on random texts before it is used, with the small limits. llguidance builds states only as texts
# reach them, so texts can always be unlucky; a regex that passes with the small limits hardly reaches the large ones.
NUM_TRIALS, TRIAL_TOKENS, TRIAL_SECONDS = 8, 64, 2.0
TRIAL_STATES, TRIAL_FUEL = 10_000, 100_000  # fuel: expressions that a step may build, about a millisecond
MAX_STATES, MAX_FUEL = 50_000, 1_000_000  # of about 500 bytes


# Messages for regexes that were refused, so that nobody has them tried again and again; the oldest first.
_refused: dict[tuple[str, Tokenizer], str] = {}
MAX_REFUSED = 64

# Parts of a regex: escapes and classes of characters, the beginnings of groups, repetitions, single characters.
REGEX_PARTS = re.compile(
    r"\\[pPx]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])+\]|\(\?(?:P?<\w+>|[a-zA-Z-]*[:)])|\{(\d+),?(\d*)\}|.", re.DOTALL
)


# Tokens of a vocabulary, a bit for each: uint8 (bytes,), in whole groups of 32 bits, the lowest bits first.
Mask = NDArray[np.uint8]


# Groups of tokens that llguidance allows at once where all texts of a group are allowed. With these a mask of
# `( [a-z]{1,12}){40,140}` takes 22 microseconds, with llguidance's own, which are made for JSON, 139 (4,000 tokens, one
# Zen 5 core, 2026-11-29).
SLICES = ["[a-z]{1,4}", " [a-z]{0,4}", "[a-z]{1,12}", " [a-z]{0,12}"]


class Guide(Protocol):
    """The tokens that may come next in one text."""

    def allowed(self) -> Mask:
        """Return the tokens that may come next; end-of-text is one of them if the text may end here."""

    def allows(self, token: int) -> bool:
        """Return whether a token may come next; False also if only `allowed` can say."""

    def push(self, token: int) -> None:
        """Add a token to the text; it is allowed."""

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""

    @property
    def is_final(self) -> bool:
        """Whether the text ends here, without an end-of-text token."""

    @property
    def block(self) -> str:
        """The reason why no token is allowed, if none is."""


def join_masks(guides: Sequence[Guide | None], vocab_size: int) -> Mask:
    """Return the tokens that may come next in each text, (texts, bytes): all without a guide."""
    masks = [_free_mask(vocab_size) if guide is None else guide.allowed() for guide in guides]
    return np.stack(masks) if len(masks) > 1 else masks[0][None]


def unpack(mask: Mask, vocab_size: int) -> NDArray[np.bool_]:
    """Return a mask with an element for each token."""
    return np.unpackbits(mask, count=vocab_size, bitorder="little").view(np.bool_)


@functools.cache
def _free_mask(vocab_size: int) -> Mask:
    return np.invert(_new_mask(vocab_size))


def _new_mask(vocab_size: int) -> Mask:
    return np.zeros(-(-vocab_size // 32) * 4, dtype=np.uint8)


# --- regexes ---------------------------------------------------------------------------------------------------------


class RegexGuide:
    """Leads a text to a match of a regex.

    Args:
        matcher: at the beginning of the text. Copies of a matcher share the states that were built.
        vocab_size: number of tokens.
        renew: returns a matcher without states, for a text that comes when other texts have built too many.
    """

    is_final = False

    def __init__(
        self, matcher: llguidance.LLMatcher, vocab_size: int, renew: Callable[[], llguidance.LLMatcher] | None = None
    ) -> None:
        self._matcher, self._renew, self._mask = matcher, renew, _new_mask(vocab_size)
        self._address, self._tokens = self._mask.ctypes.data, list[int]()

    def allowed(self) -> Mask:
        """Return the tokens that may come next; the next call changes the array."""
        self._matcher.unsafe_compute_mask_ptr(self._address, len(self._mask))
        if self._matcher.is_error() and self._renew is not None:
            self._matcher, self._renew = self._renew(), None
            self._matcher.consume_tokens(self._tokens)
            return self.allowed()
        if self._matcher.is_error():
            self._mask[:] = 0
        return self._mask

    def allows(self, token: int) -> bool:
        """Return whether a token surely may come next: much faster than `allowed`."""
        matcher = self._matcher
        # Where only one text can follow, `allowed` has the tokens that the tokenizer spells it with, and no others.
        return not matcher.is_error() and matcher.validate_tokens([token]) == 1 and not matcher.compute_ff_bytes()

    def push(self, token: int) -> None:
        """Add a token to the text."""
        self._tokens.append(token)
        self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether the text matches."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    @property
    def block(self) -> str:
        """The reason why no token is allowed, if none is."""
        return "regex_limit" if self._matcher.is_error() else "nothing_allowed"


def new_guide(config: SamplingConfig, tokenizer: Tokenizer) -> Guide | None:
    """Return the guide of a new text; None if nothing is wanted of it, or its choice is not drawn yet.

    Raises:
        ValueError: see `compile_regex`.
    """
    if config.regex is None:
        return None
    compiled = compile_regex(config.regex, tokenizer)
    return RegexGuide(compiled.matcher.deep_copy(), tokenizer.vocab_size, compiled.renew)


def require_guidable(config: SamplingConfig, tokenizer: Tokenizer) -> None:
    """Check `regex` and `choices` against the tokenizer.

    Raises:
        ValueError: see `compile_regex` and `encode_choices`, or forced tokens do not match.
    """
    if config.regex is not None:
        guide = RegexGuide(compile_regex(config.regex, tokenizer).matcher.deep_copy(), tokenizer.vocab_size)
        for token in config.forced_tokens:
            if not unpack(guide.allowed(), tokenizer.vocab_size)[token]:
                raise ValueError(f"`forced_tokens` must begin a match of `regex`: {token}")
            guide.push(token)
    encode_choices(config.choices, tokenizer)


@dataclass
class CompiledRegex:
    """A regex for many texts."""

    new_matcher: Callable[[], llguidance.LLMatcher]
    matcher: llguidance.LLMatcher
    """at the beginning of a text, for copies"""

    def renew(self) -> llguidance.LLMatcher:
        """Forget the states that were built. Return a matcher for one text, which shares none."""
        self.matcher = self.new_matcher()
        return self.new_matcher()


@functools.lru_cache(maxsize=16)
def compile_regex(regex: str, tokenizer: Tokenizer) -> CompiledRegex:
    """Return a regex for many texts.

    The regex is in the syntax of Rust's crate `regex`, without look-around, word boundaries and back references.

    Raises:
        ValueError: the regex is wrong, matches no text, or is too large; or the tokenizer loses text.
    """
    require_packages("`regex`", "llguidance", extra="guide")
    import llguidance

    if not tokenizer.is_lossless:
        raise ValueError("`regex` needs a tokenizer that loses no text, and this is a word tokenizer")
    if (refused := _refused.get((regex, tokenizer))) is not None:
        raise ValueError(refused)

    def new_matcher(states: int, fuel: int) -> llguidance.LLMatcher:
        limits = llguidance.LLParserLimits(max_lexer_states=states, step_lexer_fuel=fuel, initial_lexer_fuel=fuel)
        grammar = llguidance.LLMatcher.grammar_from_regex(regex)
        return llguidance.LLMatcher(_guided_tokenizer(tokenizer), grammar, log_level=0, limits=limits)

    try:
        matcher = new_matcher(TRIAL_STATES, TRIAL_FUEL)
        if error := matcher.get_error():
            raise ValueError(f"`regex` cannot be used: {_first_cause(error)}")
        if (size := count_positions(regex)) > MAX_POSITIONS:
            raise ValueError(f"`regex` is too large: {size} positions with its repetitions, at most {MAX_POSITIONS}")
        _try_out(matcher, tokenizer)
    except ValueError as error:
        while len(_refused) >= MAX_REFUSED:
            _refused.pop(next(iter(_refused)), None)
        _refused[regex, tokenizer] = str(error)
        raise
    return CompiledRegex(functools.partial(new_matcher, MAX_STATES, MAX_FUEL), new_matcher(MAX_STATES, MAX_FUEL))


def _first_cause(error: str) -> str:
    """Return the one line of llguidance's error that names the cause."""
    causes = [line.removeprefix("error: ") for line in error.splitlines() if line.startswith("error: ")]
    return (causes or [error.splitlines()[0].partition("(in regex): ")[2] or error.splitlines()[0]])[0][:200]


def _try_out(matcher: llguidance.LLMatcher, tokenizer: Tokenizer) -> None:
    """Write random texts that match a regex, always the same ones.

    Raises:
        ValueError: the regex matches no text, or a text takes too many states.
    """
    started = time.thread_time()  # the same regexes pass on a busy machine
    for trial in range(NUM_TRIALS):
        guide, chance = RegexGuide(matcher.deep_copy(), tokenizer.vocab_size), random.Random(trial)
        for position in range(TRIAL_TOKENS):
            tokens = np.flatnonzero(unpack(guide.allowed(), tokenizer.vocab_size))
            if position == 0 and not len(tokens):
                raise ValueError("`regex` matches no text")
            if guide.block == "regex_limit":
                raise ValueError(f"`regex` is too large: texts that match it take more than {TRIAL_STATES} states")
            if time.thread_time() - started > TRIAL_SECONDS:
                raise ValueError(f"`regex` is too large: a few texts that match it take more than {TRIAL_SECONDS:g} s")
            tokens = tokens[tokens != tokenizer.eos_id]
            if not len(tokens):
                break
            guide.push(int(tokens[chance.randrange(len(tokens))]))


def count_positions(regex: str) -> int:
    """Return the number of characters and classes of a valid regex, with its repetitions written out."""
    sizes, last = [0], 0  # of the open groups, and of the item that a repetition would repeat
    for found in REGEX_PARTS.finditer(regex):
        text = found[0]
        if text[0] == "(" and not text.endswith(")"):
            sizes.append(0)
            last = 0
        elif text == ")":
            last = sizes.pop() if len(sizes) > 1 else 0
            sizes[-1] += last
        elif found[1] is not None:
            times = max(int(found[1][:9]), int(found[2][:9] or 1))
            sizes[-1] += last * (times - 1)
            last *= times
        elif text not in ("|", "*", "+", "?", "^", "$") and text[:2] != "(?":
            last = 1
            sizes[-1] += 1
    return sum(sizes)


@functools.lru_cache(maxsize=4)
def _guided_tokenizer(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    """Return the tokens' bytes as llguidance wants them. End-of-text and the unknown token are no text."""
    import llguidance

    class _Vocabulary:
        eos_token_id = bos_token_id = tokenizer.eos_id
        special_token_ids = (tokenizer.eos_id, tokenizer.unk_id)
        tokens = [
            f"<{i}>".encode() if i in (tokenizer.eos_id, tokenizer.unk_id) else tokenizer.token_bytes(i)
            for i in range(tokenizer.vocab_size)
        ]

        def __call__(self, text: bytes) -> list[int]:
            return tokenizer.encode(text.decode())

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary()), slices=SLICES)


# --- choices ---------------------------------------------------------------------------------------------------------

# Choices are scored in one go, a step per token of the longest one, and the server's running samples wait for them.
MAX_CHOICE_TOKENS = 256


class ChoiceGuide:
    """Leads a text through the given tokens to its end."""

    is_complete = False
    block = "nothing_allowed"

    def __init__(self, tokens: Sequence[int], vocab_size: int) -> None:
        self._tokens, self._position, self._vocab_size = tokens, 0, vocab_size

    def allowed(self) -> Mask:
        """Return the one token that comes next."""
        mask, token = _new_mask(self._vocab_size), self._tokens[self._position]
        mask[token // 8] = 1 << token % 8
        return mask

    def allows(self, token: int) -> bool:
        """Return whether a token is the one that comes next."""
        return token == self._tokens[self._position]

    def push(self, token: int) -> None:
        """Add a token to the text."""
        self._position += 1

    @property
    def is_final(self) -> bool:
        """Whether the choice is spelled."""
        return self._position == len(self._tokens)


@functools.lru_cache(maxsize=32)
def encode_choices(choices: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each choice, encoded apart: no token spans the end of the prompt.

    Raises:
        ValueError: the tokenizer loses text, or a choice has no tokens or more than `MAX_CHOICE_TOKENS`.
    """
    if choices and not tokenizer.is_lossless:
        raise ValueError("`choices` needs a tokenizer that loses no text, and this is a word tokenizer")
    encoded = tuple(tuple(tokenizer.encode(choice)) for choice in choices)
    if () in encoded:
        raise ValueError(f"`choices` must not be spaces alone: {choices[encoded.index(())]!r}")
    for choice, tokens in zip(choices, encoded, strict=True):
        if len(tokens) > MAX_CHOICE_TOKENS:
            raise ValueError(
                f"`choices` must be texts of at most {MAX_CHOICE_TOKENS} tokens: {len(tokens)} for {choice[:40]!r}"
            )
    return encoded


def score_choices(decoder: Decoder, token: int, state: DecoderState, choices: Sequence[Sequence[int]]) -> list[float]:
    """Return the log-probability that the text goes on with each choice, by the model alone.

    Args:
        decoder: reads the choices side by side.
        token: last one of the prompt.
        state: (1, ...) before it.
        choices: their tokens.

    Returns:
        One number for each choice.
    """
    order = sorted(range(len(choices)), key=lambda i: -len(choices[i]))  # the longest first
    scores = torch.zeros(len(choices), dtype=torch.float64)
    tokens = torch.tensor([token], device=decoder.device)
    for position in range(len(choices[order[0]])):
        running = [i for i in order if len(choices[i]) > position]  # the first rows; the others are finished
        logits, state = decoder.step(tokens, [part[: len(tokens)] for part in state])
        logprobs = logits.log_softmax(-1)
        if position == 0:
            logprobs, state = (logprobs.repeat(len(order), 1), [part.repeat(len(order), 1) for part in state])
        tokens = torch.tensor([choices[i][position] for i in running], device=decoder.device)
        scores[running] += logprobs.gather(1, tokens[:, None])[:, 0].double().cpu()
        tokens = tokens[: sum(len(choices[i]) > position + 1 for i in running)]  # the rows that go on
    scored: list[float] = scores.tolist()
    return scored
