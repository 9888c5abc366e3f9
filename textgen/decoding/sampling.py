"""Pure filters on logits, then a draw.

Filters take logits (batch, vocab_size) and what they go by, a number or a tensor (batch, 1) with a value for each row;
they return new logits in which -inf marks what is not to be drawn. They work in the order that is the field's custom:
penalties, bans, temperature, top-k, top-p, min-p, typical.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textgen.config import SamplingConfig
from textgen.kernels import decoding as decoding_kernels
from textgen.noise import exponential, hash_bits, item_bits

Number = float | Tensor

# Numbers of noise that a processor makes at a time: more would leave its cache between the passes over them.
DRAWN_AT_A_TIME = 1 << 15

# How many of the likeliest tokens are sorted first on a CPU, where sorting them all costs more than the model.
LIKELIEST = 256


def keep_top_k(logits: Tensor, k: int | Tensor, *, at_most: int | None = None) -> Tensor:
    """Set all but the k largest to -inf; equals of the k-th stay.

    Source: Fan et al., "Hierarchical neural story generation" (2018), section 5.4.

    Args:
        logits: (batch, vocab_size).
        k: at least 1.
        at_most: no k is larger.
    """
    size = logits.shape[-1]
    if isinstance(k, Tensor):
        largest = logits.topk(min(at_most or size, size)).values
        threshold = largest.gather(-1, k.clamp(max=largest.shape[-1]) - 1)
        threshold = threshold.masked_fill(k >= size, -math.inf)
    else:
        threshold = logits.topk(min(k, size)).values[..., -1:]
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_top_p(logits: Tensor, p: Number) -> Tensor:
    """Set all but the nucleus to -inf: the fewest tokens whose probabilities reach p; equals of the last stay.

    Source: Holtzman et al., "The curious case of neural text degeneration" (2020), section 3.1.
    """
    limit = torch.as_tensor(p, dtype=logits.dtype, device=logits.device)
    total = logits.logsumexp(-1, keepdim=True)
    few = logits.device.type == "cpu" and logits.shape[-1] > LIKELIEST
    ordered = logits.topk(LIKELIEST).values if few else logits.sort(descending=True).values
    sums = (ordered - total).exp().cumsum(-1)
    if few and bool((sums[..., -1:] < limit).any()):
        ordered = logits.sort(descending=True).values
        sums = (ordered - total).exp().cumsum(-1)
    last = (sums[..., :-1] < limit).sum(-1, keepdim=True)  # those whose sum does not reach p let one more in
    # a rounded sum may reach 1 before its last tokens
    threshold = ordered.gather(-1, last).masked_fill(limit >= 1, -math.inf)
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_min_p(logits: Tensor, p: Number) -> Tensor:
    """Set to -inf what is less likely than p times the likeliest token.

    Source: Nguyen et al., "Turning up the heat: min-p sampling for creative and coherent LLM outputs" (2024).
    """
    limit = torch.as_tensor(p, dtype=logits.dtype, device=logits.device)
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + limit.log(), -math.inf)


def keep_typical(logits: Tensor, mass: Number) -> Tensor:
    """Keep the tokens whose surprisal is nearest to the entropy, the fewest whose probabilities reach `mass`.

    Equals of the last stay. Source: Meister et al., "Locally typical sampling" (2023), section 4.
    """
    limit = torch.as_tensor(mass, dtype=logits.dtype, device=logits.device)
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities.masked_fill(probabilities == 0, 0)).sum(-1, keepdim=True)
    distance = (log_probabilities + entropy).abs()
    ordered, order = distance.sort()
    share = probabilities.gather(-1, order)
    inside = share.cumsum(-1) - share < limit
    last = inside.sum(-1, keepdim=True).clamp(min=1) - 1
    threshold = ordered.gather(-1, last).masked_fill(limit >= 1, math.inf)
    return logits.masked_fill(distance > threshold, -math.inf)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Number) -> Tensor:
    """Divide positive and multiply negative logits of tokens that stand in prompt or text.

    Source: Keskar et al., "CTRL" (2019), section 4.1, with the case of negative logits as users came to write it.

    Args:
        logits: (batch, vocab_size).
        seen: bool (batch, vocab_size).
        penalty: 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_counts(logits: Tensor, counts: Tensor, *, presence: Number = 0.0, frequency: Number = 0.0) -> Tensor:
    """Subtract `presence` from tokens drawn before and `frequency` for each time; counts (batch, vocab_size).

    Source: the parameters of OpenAI's completions API. The prompt does not count.
    """
    return logits - presence * (counts > 0) - frequency * counts


def ban_repeated_ngrams(logits: Tensor, history: Tensor, n: int) -> Tensor:
    """Set to -inf the tokens that would complete an n-gram a second time.

    Source: Paulus et al., "A deep reinforced model for abstractive summarization" (2018), section 2.5.

    Args:
        logits: (batch, vocab_size).
        history: int64 (batch, length), prompt and text up to now, the newest last; -1 where there is nothing.
        n: 1 bans every token that was there.
    """
    if history.shape[1] < n:
        return logits
    windows = history.unfold(1, n, 1)  # (batch, length - n + 1, n)
    latest = history[:, history.shape[1] - n + 1 :]  # (batch, n - 1)
    repeats = (windows[:, :, :-1] == latest[:, None]).all(-1) & (windows >= 0).all(-1)
    banned = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    banned.scatter_add_(1, windows[:, :, -1].clamp(min=0), repeats.int())
    return logits.masked_fill(banned > 0, -math.inf)


def divide_by_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """Divide by the temperature, from the likeliest at 0: a tiny one sends the others to -inf, not all to inf.

    Args:
        logits: (batch, vocab_size).
        temperature: (batch, 1); 1 leaves a row's bits as they are, and 0, which `draw` knows, its differences.
    """
    divided = decoding_kernels.divide_by_temperature(logits, temperature)
    if divided is not None:
        return divided
    divided = (logits - logits.amax(-1, keepdim=True)) / torch.where(temperature > 0, temperature, 1.0)
    return torch.where(temperature == 1, logits, divided)


# --- what decides the draws of a batch -------------------------------------------------------------------------------

# Tokens that `no_repeat_ngram` looks back on.
HISTORY = 1024


@dataclass
class Controls:
    """What decides the draws of a batch's rows: tensors (batch, ...) by name, those that some row wants.

    `key` is the hash of a row's seed and sample, `step` how many tokens it has drawn; the others are named as the
    settings, or hold what these go by: `banned`, `seen`, `counts`, `history`.
    """

    rows: dict[str, Tensor]
    greedy: bool = False
    """no row draws: the likeliest token is taken"""
    largest_k: int = 0
    """no row's `top_k` is larger"""
    ngrams: tuple[int, ...] = ()
    """different values of `no_repeat_ngram`"""
    logprobs: int | None = None
    """the largest number of alternatives that a row wants to be told"""

    @property
    def features(self) -> tuple[object, ...]:
        """What a captured graph depends on, beside tensors."""
        return (*sorted(self.rows), self.greedy, self.largest_k, self.ngrams, self.logprobs)


def controls_of(
    config: SamplingConfig, prompt: Sequence[int], sample: int, *, vocab_size: int, device: torch.device
) -> Controls:
    """Return the controls of one sample, a batch of one row.

    Args:
        config: its settings.
        prompt: its tokens, without the one that begins a text: it is the one that ends it, which is not said yet.
        sample: its number in the noise.
        vocab_size: number of tokens.
        device: where the tensors lie.
    """
    neutral = _neutral(vocab_size, device)
    rows = {"key": hash_bits(config.seed, torch.tensor([sample])).to(device), "step": neutral["step"]}
    for setting in dataclasses.fields(SamplingConfig):
        value = getattr(config, setting.name)
        if setting.name in neutral and value is not None and value != setting.default:
            row = neutral[setting.name]
            largest = torch.finfo(row.dtype).max if row.is_floating_point() else torch.iinfo(row.dtype).max
            rows[setting.name] = torch.full_like(row, min(value, largest))
    if config.temperature < torch.finfo(torch.float32).tiny:  # which the division would take for 0
        rows["temperature"] = torch.zeros_like(neutral["temperature"])
    tokens = torch.tensor(prompt, dtype=torch.int64, device=device)
    if "repetition_penalty" in rows:
        rows["seen"] = neutral["seen"].index_fill(1, tokens, True)
    if "presence_penalty" in rows or "frequency_penalty" in rows:
        rows["counts"] = neutral["counts"]
    if "no_repeat_ngram" in rows:
        rows["history"] = torch.cat([neutral["history"][0], tokens])[None, -HISTORY:]
    if config.banned_tokens:
        banned = torch.tensor(config.banned_tokens, dtype=torch.int64, device=device)
        rows["banned"] = neutral["banned"].index_fill(1, banned, True)
    ngrams = () if config.no_repeat_ngram is None else (config.no_repeat_ngram,)
    return Controls(rows, config.temperature == 0, config.top_k or 0, ngrams, config.logprobs)


def join_controls(parts: Sequence[Controls], vocab_size: int) -> Controls:
    """Return several batches' controls as one's; a row that lacks a control gets the value that changes nothing."""
    device = parts[0].rows["key"].device
    neutral = _neutral(vocab_size, device)

    def of(part: Controls, name: str) -> Tensor:
        return part.rows[name] if name in part.rows else neutral[name].repeat_interleave(len(part.rows["key"]), 0)

    return Controls(
        {name: torch.cat([of(part, name) for part in parts]) for name in sorted({n for p in parts for n in p.rows})},
        all(part.greedy for part in parts),
        max(part.largest_k for part in parts),
        tuple(sorted({n for part in parts for n in part.ngrams})),
        max((part.logprobs for part in parts if part.logprobs is not None), default=None),
    )


def select_controls(controls: Controls, places: Tensor) -> Controls:
    """Return the controls of some rows only; places (rows,) int64."""
    return dataclasses.replace(controls, rows={name: value[places] for name, value in controls.rows.items()})


def _neutral(vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """Return one row of everything that controls may hold, with the value that changes nothing."""

    def row(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((1, *shape), value, dtype=dtype, device=device)

    return {
        "step": row(0, dtype=torch.int64),
        "temperature": row(1, 1), "top_k": row(vocab_size, 1, dtype=torch.int64), "top_p": row(1, 1),
        "min_p": row(0, 1), "typical_p": row(1, 1), "repetition_penalty": row(1, 1), "presence_penalty": row(0, 1),
        "frequency_penalty": row(0, 1), "no_repeat_ngram": row(0, 1, dtype=torch.int64),
        "min_new_tokens": row(0, 1, dtype=torch.int64),
        "banned": row(False, vocab_size, dtype=torch.bool), "seen": row(False, vocab_size, dtype=torch.bool),
        "counts": row(0, vocab_size, dtype=torch.int32), "history": row(-1, HISTORY, dtype=torch.int64),
    }  # fmt: skip


def control(logits: Tensor, controls: Controls, *, eos_id: int) -> Tensor:
    """Return logits (batch, vocab_size) as each row's controls want them, divided by its temperature."""
    rows = controls.rows
    if "seen" in rows:
        logits = penalize_repetition(logits, rows["seen"], rows["repetition_penalty"])
    if "counts" in rows:
        presence, frequency = (rows.get(f"{name}_penalty", 0.0) for name in ("presence", "frequency"))
        logits = penalize_counts(logits, rows["counts"], presence=presence, frequency=frequency)
    if "banned" in rows:
        logits = logits.masked_fill(rows["banned"], -math.inf)
    if "min_new_tokens" in rows or controls.ngrams:
        ending = torch.arange(logits.shape[-1], device=logits.device) == eos_id  # (vocab_size,)
    if "min_new_tokens" in rows:
        logits = logits.masked_fill((rows["step"][:, None] < rows["min_new_tokens"]) & ending, -math.inf)
    for n in controls.ngrams:
        logits = torch.where(rows["no_repeat_ngram"] == n, ban_repeated_ngrams(logits, rows["history"], n), logits)
    if controls.ngrams:  # they may leave nothing to say: the text ends
        logits = logits.masked_fill((logits.amax(-1, keepdim=True) == -math.inf) & ending, 0.0)
    if "temperature" in rows:
        logits = divide_by_temperature(logits, rows["temperature"])
    if "top_k" in rows:
        logits = keep_top_k(logits, rows["top_k"], at_most=controls.largest_k)
    if "top_p" in rows:
        logits = keep_top_p(logits, rows["top_p"])
    if "min_p" in rows:
        logits = keep_min_p(logits, rows["min_p"])
    if "typical_p" in rows:
        logits = keep_typical(logits, rows["typical_p"])
    return logits


def draw(logits: Tensor, controls: Controls) -> Tensor:
    """Draw one token per row from logits (batch, vocab_size) that `control` returned; int64 (batch,).

    The draw is the argmax of probabilities over exponential noise, in logarithms (the Gumbel-max trick). The noise is
    a hash of (seed, sample, step, token): a row's draw depends on nothing but its own logits and numbers, not on the
    batch, the device or a generator. On a CPU compiled code draws what is beyond the doubt of rounding.
    """
    if controls.greedy:
        return logits.argmax(-1)
    rows = controls.rows
    drawn = decoding_kernels.draw(
        logits, item_bits(logits.shape[-1], logits.device), rows["key"], rows["step"], rows.get("temperature")
    )
    if drawn is None:
        return _draw(logits, rows)
    tokens, num_doubtful = drawn
    if num_doubtful:
        doubtful = (tokens < 0).nonzero()[:, 0]
        tokens[doubtful] = _draw(logits[doubtful], select_controls(controls, doubtful).rows)
    return tokens


def _draw(logits: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """Draw by torch's operators, which define the draw."""
    keys = hash_bits(rows["key"], rows["step"])
    # a processor draws as many rows at a time as its cache holds, a GPU all of them
    height = max(DRAWN_AT_A_TIME // logits.shape[-1], 1) if logits.device.type == "cpu" else len(logits)
    tokens = []
    for start in range(0, len(logits), height):
        block = slice(start, start + height)
        noise = exponential(keys[block], logits.shape[-1]).log_()  # (rows, vocab_size)
        if "temperature" in rows:
            noise = noise.where(rows["temperature"][block] > 0, 0.0)
        tokens.append(torch.sub(logits[block], noise, out=noise).argmax(-1))
    return torch.cat(tokens)


def note(controls: Controls, tokens: Tensor) -> None:
    """Note the tokens (batch,) that were drawn, in place, for the draws to come."""
    rows = controls.rows
    rows["step"] += 1
    if "seen" in rows:
        rows["seen"].scatter_(1, tokens[:, None], True)
    if "counts" in rows:
        rows["counts"].scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.int32))
    if "history" in rows:
        rows["history"].copy_(torch.cat([rows["history"][:, 1:], tokens[:, None]], 1))
