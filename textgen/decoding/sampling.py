"""From logits to a drawn token: pure filters, then the draw.

A filter takes logits (batch, vocab_size) and its setting: a number, or a tensor (batch, 1) with one value per row. It
returns new logits; -inf marks a token that must not be drawn.

`process_logits` applies the filters in the usual order (biases, penalties, bans, temperature, top-k, top-p, min-p,
typical, XTC), `draw` draws a token per row, and `record_tokens` stores the drawn tokens for the penalties of later
steps. The settings of all rows are tensors in one `SamplingState`, so that one operation serves the whole batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textgen.config import SAMPLER_PARTS, SamplingConfig
from textgen.kernels import decoding as decoding_kernels
from textgen.noise import exponential, hash_bits, item_bits, uniform

Number = float | Tensor

# Noise values that a CPU computes in one block. A larger block would leave the cache between the passes over it.
NOISE_BLOCK = 1 << 15

# Top-p on a CPU first sorts this many of the likeliest tokens: sorting the whole vocabulary costs more than the model.
PARTIAL_SORT = 256

# Tokens of prompt and text that `no_repeat_ngram` searches.
HISTORY = 1024

# Tokens of a repetition that DRY counts: the penalty of a longer one is beyond all logits anyway.
REPEAT_LENGTH = 32

# Coordinate of the noise that decides where XTC applies; the noise of a draw has none.
XTC_NOISE = 1


# --- filters ---------------------------------------------------------------------------------------------------------


def keep_top_k(logits: Tensor, k: int | Tensor, *, at_most: int | None = None) -> Tensor:
    """Set all but the k largest logits to -inf; logits equal to the k-th largest are kept.

    Source: Fan et al., "Hierarchical neural story generation" (2018), section 5.4.

    Args:
        logits: (batch, vocab_size).
        k: at least 1.
        at_most: upper bound of the values below vocab_size in a tensor `k`, so that fewer logits are sorted.
    """
    size = logits.shape[-1]
    if isinstance(k, Tensor):
        # one topk for all rows, then each row's threshold; a k of `size` or more keeps everything
        largest = logits.topk(min(at_most or size, size)).values
        threshold = largest.gather(-1, k.clamp(max=largest.shape[-1]) - 1)
        threshold = threshold.masked_fill(k >= size, -math.inf)
    else:
        threshold = logits.topk(min(k, size)).values[..., -1:]
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_top_p(logits: Tensor, p: Number) -> Tensor:
    """Keep the nucleus, the fewest tokens whose probabilities add up to p, and set the others to -inf.

    Tokens as likely as the least likely one of the nucleus are kept too.

    Source: Holtzman et al., "The curious case of neural text degeneration" (2020), section 3.1.
    """
    limit = torch.as_tensor(p, dtype=logits.dtype, device=logits.device)
    total = logits.logsumexp(-1, keepdim=True)
    partial = logits.device.type == "cpu" and logits.shape[-1] > PARTIAL_SORT
    ordered = logits.topk(PARTIAL_SORT).values if partial else logits.sort(descending=True).values
    sums = (ordered - total).exp().cumsum(-1)
    # in some row the likeliest tokens do not add up to p: sort everything
    if partial and bool((sums[..., -1:] < limit).any()):
        ordered = logits.sort(descending=True).values
        sums = (ordered - total).exp().cumsum(-1)
    # index of the token with which the sum reaches p: the number of sums that are below p
    last = (sums[..., :-1] < limit).sum(-1, keepdim=True)
    # p = 1 keeps everything: a rounded sum may reach 1 before the last tokens
    threshold = ordered.gather(-1, last).masked_fill(limit >= 1, -math.inf)
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_min_p(logits: Tensor, p: Number) -> Tensor:
    """Set tokens that are less likely than p times the likeliest token to -inf.

    Source: Nguyen et al., "Turning up the heat: min-p sampling for creative and coherent LLM outputs" (2024).
    """
    limit = torch.as_tensor(p, dtype=logits.dtype, device=logits.device)
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + limit.log(), -math.inf)


def keep_typical(logits: Tensor, mass: Number) -> Tensor:
    """Keep the tokens whose surprisal is nearest to the entropy: the fewest whose probabilities add up to `mass`.

    Tokens at the same distance as the last one are kept too.
    Source: Meister et al., "Locally typical sampling" (2023), section 4.
    """
    limit = torch.as_tensor(mass, dtype=logits.dtype, device=logits.device)
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities.masked_fill(probabilities == 0, 0)).sum(-1, keepdim=True)
    distance = (log_probabilities + entropy).abs()  # |surprisal - entropy|, (batch, vocab_size)
    ordered, order = distance.sort()
    ordered_probabilities = probabilities.gather(-1, order)
    # a token is kept if the sum before it is below `mass`; the first one is always kept
    kept = ordered_probabilities.cumsum(-1) - ordered_probabilities < limit
    last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
    threshold = ordered.gather(-1, last).masked_fill(limit >= 1, math.inf)
    return logits.masked_fill(distance > threshold, -math.inf)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Number) -> Tensor:
    """Make tokens of prompt and text less likely: divide their positive logits, multiply their negative ones.

    Source: Keskar et al., "CTRL" (2019), section 4.1. The paper divides all logits; that would make tokens with
    negative logits likelier, so common implementations multiply these.

    Args:
        logits: (batch, vocab_size).
        seen: bool (batch, vocab_size), tokens of prompt and text.
        penalty: 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_counts(logits: Tensor, counts: Tensor, *, presence: Number = 0.0, frequency: Number = 0.0) -> Tensor:
    """Subtract `presence` from the logits of tokens drawn before, and `frequency` once per time they were drawn.

    Source: the parameters of OpenAI's completions API. Tokens of the prompt do not count.

    Args:
        logits: (batch, vocab_size).
        counts: int (batch, vocab_size), how often each token was drawn.
        presence: subtracted once.
        frequency: subtracted for each time.
    """
    return logits - presence * (counts > 0) - frequency * counts


def ban_repeated_ngrams(logits: Tensor, history: Tensor, n: int) -> Tensor:
    """Set tokens that would complete an n-gram a second time to -inf.

    Source: Paulus et al., "A deep reinforced model for abstractive summarization" (2018), section 2.5.

    Args:
        logits: (batch, vocab_size).
        history: int64 (batch, length), tokens of prompt and text, the newest last; -1 marks an empty place.
        n: length of the n-grams; 1 bans every token of the history.
    """
    if history.shape[1] < n:
        return logits
    windows = history.unfold(1, n, 1)  # (batch, length - n + 1, n)
    latest = history[:, history.shape[1] - n + 1 :]  # (batch, n - 1)
    # n-grams of the history whose first n - 1 tokens are the latest ones, and that hold no empty place
    repeats = (windows[:, :, :-1] == latest[:, None]).all(-1) & (windows >= 0).all(-1)
    # added up, not written: a token may end several windows, of which only some repeat the latest tokens
    banned = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    banned.scatter_add_(1, windows[:, :, -1].clamp(min=0), repeats.int())
    return logits.masked_fill(banned > 0, -math.inf)


def penalize_repeats(
    logits: Tensor, history: Tensor, breaks: Tensor, *, multiplier: Tensor, base: Tensor, allowed_length: Tensor
) -> Tensor:
    """Make tokens less likely that would go on with a repetition (DRY), the more the longer the repetition is.

    Source: p-e-w, "DRY: a modern repetition penalty" (oobabooga/text-generation-webui#5677), with the settings of
    llama.cpp (ggml-org/llama.cpp#9702). Repetitions of more than `REPEAT_LENGTH` tokens count as that long.

    Args:
        logits: (batch, vocab_size).
        history: int64 (batch, length), tokens of prompt and text, the newest last; -1 marks an empty place.
        breaks: bool (batch, vocab_size), tokens that are part of no repetition.
        multiplier: (batch, 1). The penalty after n repeated tokens is multiplier * base^(n - allowed_length).
        base: (batch, 1), at least 1.
        allowed_length: int64 (batch, 1); shorter repetitions have no penalty.
    """
    # compiled code on a CPU; None where it cannot be used
    settings = {"multiplier": multiplier, "base": base, "allowed_length": allowed_length}
    penalized = decoding_kernels.penalize_repeats(logits, history, breaks, **settings, at_most=REPEAT_LENGTH)
    if penalized is not None:
        return penalized
    counted = history.masked_fill(breaks.gather(1, history.clamp(min=0)), -1)
    before = counted[:, :-1].unfold(1, REPEAT_LENGTH, 1)  # (batch, places, REPEAT_LENGTH): tokens before each place
    repeated = (before == counted[:, None, -REPEAT_LENGTH:]) & (before >= 0)
    lengths = repeated.flip(-1).long().cumprod(-1).sum(-1)  # (batch, places)
    # powers by products: `pow` may round an element in another way in another batch
    powers = torch.cat([torch.ones_like(base), base.expand(-1, REPEAT_LENGTH)], 1).cumprod(1)
    penalties = multiplier * powers.gather(1, (lengths - allowed_length).clamp(min=0)) * (lengths >= allowed_length)
    after = history[:, REPEAT_LENGTH:].clamp(min=0)  # the token at each place
    return logits - torch.zeros_like(logits).scatter_reduce_(1, after, penalties, "amax")


def exclude_top_choices(logits: Tensor, threshold: Tensor, applies: Tensor) -> Tensor:
    """Set all tokens of at least a probability but the least likely of them to -inf (XTC), so that texts vary more.

    Source: p-e-w, "Exclude Top Choices" (oobabooga/text-generation-webui#6335), as in llama.cpp
    (ggml-org/llama.cpp#9742).

    Args:
        logits: (batch, vocab_size).
        threshold: (batch, 1), a probability.
        applies: bool (batch, 1), rows in which it applies.
    """
    # compiled code on a CPU; None where it cannot be used
    kept = decoding_kernels.exclude_top_choices(logits, threshold, applies)
    if kept is not None:
        return kept
    above = (logits.softmax(-1) >= threshold) & (logits > -math.inf)
    least = logits.masked_fill(~above, math.inf).amin(-1, keepdim=True)
    return logits.masked_fill(applies & above & (logits > least), -math.inf)


def keep_allowed(logits: Tensor, masks: Tensor, *, eos_id: int) -> Tensor:
    """Set tokens that a guide does not allow to -inf. A row without an allowed token keeps end-of-text alone.

    Args:
        logits: (batch, vocab_size).
        masks: uint8 (batch, bytes), a bit for each token, the lowest first; see `guides.Mask`.
        eos_id: the token that ends a text.
    """
    # compiled code on a CPU; None where it cannot be used
    kept = decoding_kernels.keep_allowed(logits, masks, eos_id)
    if kept is not None:
        return kept
    shifts = torch.arange(8, dtype=torch.uint8, device=masks.device)
    allowed = (masks[:, :, None] >> shifts & 1).flatten(1)[:, : logits.shape[1]].bool()
    kept = torch.where(allowed, logits, -math.inf)
    is_eos = torch.arange(logits.shape[1], device=logits.device) == eos_id
    return kept.masked_fill(is_eos & (masks == 0).all(1, keepdim=True), 0.0)


def divide_by_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """Divide the logits by the temperature.

    The largest logit of a row is subtracted first: with a tiny temperature the others become -inf, not all of them inf.

    Args:
        logits: (batch, vocab_size).
        temperature: (batch, 1). A row of 1 is returned bit for bit. A row of 0 is only shifted: `draw` takes its
            likeliest token.
    """
    # compiled code on a CPU; None where it cannot be used
    divided = decoding_kernels.divide_by_temperature(logits, temperature)
    if divided is not None:
        return divided
    divided = (logits - logits.amax(-1, keepdim=True)) / torch.where(temperature > 0, temperature, 1.0)
    return torch.where(temperature == 1, logits, divided)


# Settings of `SamplingConfig` that compiled steps do not know: torch or the host takes each step of these texts.
NOT_COMPILED = (
    "typical_p", "no_repeat_ngram", "regex", "choices",
)  # fmt: skip


def is_compiled(config: SamplingConfig) -> bool:
    """Return whether compiled code can draw many tokens of a text in one call, see `kernels.decoding.Int8Step`."""
    if config.label_scale != 1 and config.repetition_penalty != 1:  # see `scale_label`
        return False
    return all(getattr(config, name) == SamplingConfig.__dataclass_fields__[name].default for name in NOT_COMPILED)


# --- the settings of a batch -----------------------------------------------------------------------------------------


@dataclass
class SamplingState:
    """Settings and history of a batch's rows, by which their next tokens are drawn.

    `tensors` holds one value per row, (batch, ...), by name, and only what some row needs:

    - `key`: int64, hash of the row's seed and sample number, the source of its noise
    - `step`: int64, number of tokens drawn
    - settings of `SamplingConfig` by their names, (batch, 1)
    - `bias`: float32 (batch, vocab_size), added to the logits
    - `banned`, `seen`, `breaks`: bool (batch, vocab_size), banned tokens, tokens of prompt and text, and tokens that
      are part of no repetition
    - `counts`: int32 (batch, vocab_size), how often each token was drawn
    - `history`: int64 (batch, `HISTORY`), the latest tokens of prompt and text, -1 before them
    - `unlabelled`: int64 (batch,), the token that a step reads next without the label, for `label_scale`; and
      `unlabelled.0`, `unlabelled.1`, ...: the decoder's state before it, each (batch, hidden_size)
    """

    tensors: dict[str, Tensor]
    greedy: bool = False
    """whether every row takes its likeliest token"""
    largest_k: int = 0
    """upper bound of the rows' `top_k`"""
    ngrams: tuple[int, ...] = ()
    """different values of `no_repeat_ngram`"""
    logprobs: int | None = None
    """largest number of alternatives whose log-probabilities a row asks for; None if no row asks for any"""

    @property
    def features(self) -> tuple[object, ...]:
        """Return everything but the tensors' values that decides which operations a step runs: a graph's key."""
        return (*sorted(self.tensors), self.greedy, self.largest_k, self.ngrams, self.logprobs)


def new_sampling_state(
    config: SamplingConfig,
    prompt: Sequence[int],
    sample: int,
    *,
    vocab_size: int,
    device: torch.device,
    bias: Mapping[int, float] | None = None,
    breaks: Sequence[int] = (),
) -> SamplingState:
    """Return the state of one new sample, a batch of one row.

    Args:
        config: its settings.
        prompt: its tokens, without the begin-of-text token. That is the same token as end-of-text, which must not count
            as seen.
        sample: its number in the noise.
        vocab_size: number of tokens.
        device: of the tensors.
        bias: by token, see `steering.bias_of`.
        breaks: tokens that end a repetition, see `steering.breaks_of`.
    """
    neutral = _neutral_tensors(vocab_size, device)
    tensors = {"key": hash_bits(config.seed, torch.tensor([sample])).to(device), "step": neutral["step"].clone()}
    # settings that differ from their defaults; a number too large for its tensor has the effect of the largest one
    for setting in dataclasses.fields(SamplingConfig):
        value = getattr(config, setting.name)
        if setting.name in neutral and value is not None and value != setting.default:
            row = neutral[setting.name]
            largest = torch.finfo(row.dtype).max if row.is_floating_point() else torch.iinfo(row.dtype).max
            tensors[setting.name] = torch.full_like(row, min(value, largest))
    # a denormal temperature: the division would take it for 0
    if config.temperature < torch.finfo(torch.float32).tiny:
        tensors["temperature"] = torch.zeros_like(neutral["temperature"])
    for name, parts in SAMPLER_PARTS.items():
        for part in parts if name in tensors else ():
            if part in neutral:
                tensors[part] = torch.full_like(neutral[part], getattr(config, part))
    # what penalties and bans remember
    tokens = torch.tensor(prompt, dtype=torch.int64, device=device)
    if "repetition_penalty" in tensors:
        tensors["seen"] = neutral["seen"].index_fill(1, tokens, True)
    if "presence_penalty" in tensors or "frequency_penalty" in tensors:
        tensors["counts"] = neutral["counts"].clone()
    if "no_repeat_ngram" in tensors or "dry_multiplier" in tensors:
        tensors["history"] = torch.cat([neutral["history"][0], tokens])[None, -HISTORY:]
    if "dry_multiplier" in tensors:
        ids = torch.tensor(breaks, dtype=torch.int64, device=device)
        tensors["breaks"] = neutral["breaks"].index_fill(1, ids, True)
    if bias:
        tensors["bias"] = neutral["bias"].clone()
        tensors["bias"][:, list(bias)] = torch.tensor(list(bias.values()), device=device)
    if config.banned_tokens:
        banned = torch.tensor(config.banned_tokens, dtype=torch.int64, device=device)
        tensors["banned"] = neutral["banned"].index_fill(1, banned, True)
    ngrams = () if config.no_repeat_ngram is None else (config.no_repeat_ngram,)
    return SamplingState(tensors, config.temperature == 0, config.top_k or 0, ngrams, config.logprobs)


def join_sampling_states(parts: Sequence[SamplingState], vocab_size: int) -> SamplingState:
    """Return one state with the rows of several; a row without a tensor gets the value that changes nothing."""
    neutral = _neutral_tensors(vocab_size, parts[0].tensors["key"].device)

    def rows(part: SamplingState, name: str) -> Tensor:
        if name in part.tensors:
            return part.tensors[name]
        row = neutral.get(name)
        if row is None:  # a state without the label
            row = torch.zeros_like(next(other.tensors[name][:1] for other in parts if name in other.tensors))
        return row.repeat_interleave(len(part.tensors["key"]), 0)

    names = sorted({name for part in parts for name in part.tensors})
    return SamplingState(
        {name: torch.cat([rows(part, name) for part in parts]) for name in names},
        all(part.greedy for part in parts),
        max(part.largest_k for part in parts),
        tuple(sorted({n for part in parts for n in part.ngrams})),
        max((part.logprobs for part in parts if part.logprobs is not None), default=None),
    )


def select_sampling_state(state: SamplingState, places: Tensor) -> SamplingState:
    """Return the state of some rows; `places` (rows,) int64 are their indices."""
    return dataclasses.replace(state, tensors={name: value[places] for name, value in state.tensors.items()})


def widen_sampling_state(state: SamplingState, names: Iterable[str], vocab_size: int) -> SamplingState:
    """Return the state with further tensors, whose values change nothing."""
    keys = state.tensors["key"]
    neutral = _neutral_tensors(vocab_size, keys.device)
    added = {name: neutral[name].repeat_interleave(len(keys), 0) for name in names if name not in state.tensors}
    return dataclasses.replace(state, tensors=state.tensors | added)


@functools.lru_cache(maxsize=4)
def _neutral_tensors(vocab_size: int, device: torch.device) -> Mapping[str, Tensor]:
    """Return one row of every tensor that a state may hold, with the values that change nothing; do not change them."""

    def row(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((1, *shape), value, dtype=dtype, device=device)

    return {
        "step": row(0, dtype=torch.int64),
        "temperature": row(1, 1),
        "top_k": row(vocab_size, 1, dtype=torch.int64),
        "top_p": row(1, 1),
        "min_p": row(0, 1),
        "typical_p": row(1, 1),
        "repetition_penalty": row(1, 1),
        "presence_penalty": row(0, 1),
        "frequency_penalty": row(0, 1),
        "no_repeat_ngram": row(0, 1, dtype=torch.int64),
        "min_new_tokens": row(0, 1, dtype=torch.int64),
        "xtc_probability": row(0, 1),
        "xtc_threshold": row(0, 1),
        "dry_multiplier": row(0, 1),
        "dry_base": row(1, 1),
        "dry_allowed_length": row(1, 1, dtype=torch.int64),
        "breaks": row(False, vocab_size, dtype=torch.bool),
        "label_scale": row(1, 1),
        "unlabelled": row(0, dtype=torch.int64),
        "bias": row(0, vocab_size),
        "banned": row(False, vocab_size, dtype=torch.bool),
        "seen": row(False, vocab_size, dtype=torch.bool),
        "counts": row(0, vocab_size, dtype=torch.int32),
        "history": row(-1, HISTORY, dtype=torch.int64),
    }


# --- a step: process, draw, record -----------------------------------------------------------------------------------


def scale_label(logits: Tensor, unlabelled: Tensor, scale: Tensor, repetition_penalty: Tensor | None = None) -> Tensor:
    """Return logits whose difference from those without the label is multiplied (classifier-free guidance).

    Sanchez et al. 2023, "Stay on topic with Classifier-Free Guidance", equation 7, whose log-probabilities differ from
    logits by a constant of each row. A probability depends on it only by way of `penalize_repetition`, which looks at
    signs: rows with such a penalty get log-probabilities. Rows of scale 1 stay bit for bit.

    Args:
        logits: (batch, vocab_size), after the label.
        unlabelled: (batch, vocab_size), without it.
        scale: (batch, 1).
        repetition_penalty: (batch, 1); None if no row has one.
    """
    if repetition_penalty is not None:
        penalized = (repetition_penalty != 1) & (scale != 1)
        logits, unlabelled = (torch.where(penalized, part.log_softmax(-1), part) for part in (logits, unlabelled))
    return torch.where(scale == 1, logits, unlabelled + scale * (logits - unlabelled))


def process_logits(logits: Tensor, state: SamplingState, *, eos_id: int, masks: Tensor | None = None) -> Tensor:
    """Return logits (batch, vocab_size) after each row's biases, penalties, bans, temperature and filters.

    Args:
        logits: (batch, vocab_size), of the model.
        state: of the rows.
        eos_id: the token that ends a text.
        masks: of the tokens that the rows' guides allow, see `keep_allowed`. None if no row has a guide.
    """
    tensors = state.tensors
    if "bias" in tensors:
        logits = logits + tensors["bias"]
    # penalties
    if "seen" in tensors:
        logits = penalize_repetition(logits, tensors["seen"], tensors["repetition_penalty"])
    if "counts" in tensors:
        presence, frequency = (tensors.get(f"{name}_penalty", 0.0) for name in ("presence", "frequency"))
        logits = penalize_counts(logits, tensors["counts"], presence=presence, frequency=frequency)
    if "dry_multiplier" in tensors:
        logits = penalize_repeats(
            logits,
            tensors["history"],
            tensors["breaks"],
            multiplier=tensors["dry_multiplier"],
            base=tensors["dry_base"],
            allowed_length=tensors["dry_allowed_length"],
        )
    # bans
    if "banned" in tensors:
        logits = logits.masked_fill(tensors["banned"], -math.inf)
    if masks is not None:
        logits = keep_allowed(logits, masks, eos_id=eos_id)
    if "min_new_tokens" in tensors or "banned" in tensors or state.ngrams:
        is_eos = torch.arange(logits.shape[-1], device=logits.device) == eos_id  # (vocab_size,)
    if "min_new_tokens" in tensors:
        logits = logits.masked_fill((tensors["step"][:, None] < tensors["min_new_tokens"]) & is_eos, -math.inf)
    for n in state.ngrams:
        unrepeated = ban_repeated_ngrams(logits, tensors["history"], n)
        logits = torch.where(tensors["no_repeat_ngram"] == n, unrepeated, logits)
    bans = state.ngrams or (masks is not None and ("min_new_tokens" in tensors or "banned" in tensors))
    if bans:  # if the bans leave no token, the text ends
        logits = logits.masked_fill((logits.amax(-1, keepdim=True) == -math.inf) & is_eos, 0.0)
    # temperature and filters
    if "temperature" in tensors:
        logits = divide_by_temperature(logits, tensors["temperature"])
    if "top_k" in tensors:
        logits = keep_top_k(logits, tensors["top_k"], at_most=state.largest_k)
    if "top_p" in tensors:
        logits = keep_top_p(logits, tensors["top_p"])
    if "min_p" in tensors:
        logits = keep_min_p(logits, tensors["min_p"])
    if "typical_p" in tensors:
        logits = keep_typical(logits, tensors["typical_p"])
    if "xtc_probability" in tensors:
        chance = decoding_kernels.uniform(tensors["key"], tensors["step"], XTC_NOISE)
        if chance is None:  # compiled code cannot be used
            chance = uniform(tensors["key"], tensors["step"], XTC_NOISE)
        logits = exclude_top_choices(logits, tensors["xtc_threshold"], chance[:, None] < tensors["xtc_probability"])
    return logits


def draw(logits: Tensor, state: SamplingState) -> Tensor:
    """Draw one token per row; int64 (batch,).

    The drawn token is the argmax of the probabilities divided by exponential noise, computed in logarithms (the
    Gumbel-max trick). The noise is a hash of (seed, sample, step, token). So the draw of a row depends on its own
    logits, seed, sample number and step alone: not on the rest of the batch, the device or a random generator's state.

    Args:
        logits: (batch, vocab_size), as `process_logits` returns them.
        state: of the rows.
    """
    if state.greedy:
        return logits.argmax(-1)
    drawn = _draw_compiled(logits, state.tensors)
    if drawn is None:  # compiled code cannot be used
        return _draw(logits, state.tensors)
    # Compiled code marks a row with -1 if rounding could decide between its two best tokens. torch draws these rows.
    tokens, num_doubtful = drawn
    if num_doubtful:
        doubtful = (tokens < 0).nonzero()[:, 0]
        tokens[doubtful] = _draw(logits[doubtful], select_sampling_state(state, doubtful).tensors)
    return tokens


# Filters that count on the tokens which a mask leaves.
FILTERS = ("top_k", "top_p", "min_p", "typical_p", "xtc_probability")


def draw_unmasked(logits: Tensor, state: SamplingState, *, eos_id: int) -> Tensor | None:
    """Draw one token per row without a mask. A mask that allows a row's token would not change it.

    The draw takes the token with the largest sum of logit and noise. If a mask allows it, it is also the largest of the
    allowed ones. Only the division by the temperature rounds in another way, by at most 45 * 2^-22 for values that can
    win; compiled code leaves a margin of 2^-13 between the two best.

    Args:
        logits: (batch, vocab_size), of the model.
        state: of the rows.
        eos_id: the token that ends a text.

    Returns:
        int64 (batch,), -1 where rounding could decide; None if there is no compiled code, or filters follow the mask.
    """
    if any(name in state.tensors for name in FILTERS):
        return None
    if not state.greedy and not decoding_kernels.can_read(logits, state.tensors.get("temperature")):
        return None
    processed = process_logits(logits, state, eos_id=eos_id)
    if state.greedy:
        return processed.argmax(-1)
    drawn = _draw_compiled(processed, state.tensors)
    return None if drawn is None else drawn[0]


def _draw_compiled(logits: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, int] | None:
    """Return tokens, -1 where rounding could decide, and the number of these; None if there is no compiled code."""
    items = item_bits(logits.shape[-1], logits.device)
    return decoding_kernels.draw(logits, items, tensors["key"], tensors["step"], tensors.get("temperature"))


def _draw(logits: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Draw with torch's operators, which define the correct draw."""
    keys = hash_bits(tensors["key"], tensors["step"])
    # on a CPU as many rows at a time as fit the cache, on a GPU all rows
    block_rows = max(NOISE_BLOCK // logits.shape[-1], 1) if logits.device.type == "cpu" else len(logits)
    tokens = []
    for start in range(0, len(logits), block_rows):
        block = slice(start, start + block_rows)
        noise = exponential(keys[block], logits.shape[-1]).log_()  # (rows, vocab_size)
        if "temperature" in tensors:  # at temperature 0 no noise: the argmax is the likeliest token
            noise = noise.where(tensors["temperature"][block] > 0, 0.0)
        tokens.append(torch.sub(logits[block], noise, out=noise).argmax(-1))
    return torch.cat(tokens)


def draw_item(scores: Tensor, config: SamplingConfig, sample: int) -> int:
    """Draw one of a few items by their probabilities at a sample's temperature.

    Args:
        scores: float64 (items,), logarithms of the probabilities, up to a constant.
        config: of the sample.
        sample: its number in the noise.
    """
    logits = (scores - scores.amax()).float()[None]  # (1, items)
    state = new_sampling_state(
        SamplingConfig(temperature=config.temperature, seed=config.seed),
        (),
        sample,
        vocab_size=len(scores),
        device=scores.device,
    )
    return int(draw(process_logits(logits, state, eos_id=0), state))


def record_tokens(state: SamplingState, tokens: Tensor) -> None:
    """Record drawn tokens (batch,) in the state, in place, for penalties and bans of later steps."""
    tensors = state.tensors
    tensors["step"] += 1
    if "unlabelled" in tensors:
        tensors["unlabelled"].copy_(tokens)
    if "seen" in tensors:
        tensors["seen"].scatter_(1, tokens[:, None], True)
    if "counts" in tensors:
        tensors["counts"].scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.int32))
    if "history" in tensors:
        tensors["history"].copy_(torch.cat([tensors["history"][:, 1:], tokens[:, None]], 1))
