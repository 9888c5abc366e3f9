"""Triton kernels for a decoding step on a GPU; the functions and their results are those of `fused_decoding`.

A step is one kernel for each layer, one for the projection, one for the output layer with the draw of each block of
tokens, and one that compares the blocks and records the token. One program of a product computes a tile of rows times
outputs and reads its weights once. Sums run over the inputs in one order, whatever the number of rows.

Import this module only where Triton is installed. Its speed is not measured.
"""

# ruff: noqa: N803 - Triton's custom is to write constants of a kernel in capitals

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from textgen.kernels.fused_decoding import Logprobs, Picks, Rows, Weights
from textgen.kernels.triton_noise import mix
from textgen.noise import item_bits

# Tokens of the vocabulary that a program computes.
VOCABULARY_BLOCK = 64

# Triton's interpreter cuts float32 off to bfloat16 and multiplies its bits as integers, so it gets rounded float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _tile(rows: int, weights: Weights, *, columns: int = 32) -> dict[str, int]:
    """Return the sizes of a program's tile of rows, outputs and inputs, and how many warps and stages it takes.

    Few rows: many small programs, as reading the weights takes the time. Many rows: large tiles, as each program reads
    all inputs of its rows, which then takes the time. The sizes are guesses: for the 132 processors of an H200, and so
    that shared memory of 99 KB is enough, which all GPUs with bfloat16 have.

    Args:
        rows: of the batch.
        weights: of the product.
        columns: outputs of a tile of few rows.
    """
    if rows <= 16:
        block = min(weights.block, 8192 // columns // (1 if weights.norm is None else 2))
        return {"ROWS": 16, "COLUMNS": columns, "BLOCK": block, "num_warps": 4, "num_stages": 4}
    if rows <= 64:
        return {"ROWS": 64, "COLUMNS": 64, "BLOCK": 64, "num_warps": 8, "num_stages": 3}
    return {"ROWS": 128, "COLUMNS": 128, "BLOCK": 32, "num_warps": 8, "num_stages": 4}


def layer(
    x: Tensor | None, hidden: Tensor, cell: Tensor, weights: Weights, tokens: Tensor | None, *, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fused_decoding.layer`."""
    rows, size = hidden.shape
    new_hidden, new_cell = torch.empty_like(hidden), torch.empty_like(cell)
    out = torch.empty_like(hidden) if residual else new_hidden
    tile = _tile(rows, weights)
    _launch(
        _layer,
        (triton.cdiv(4 * size, tile["COLUMNS"]), triton.cdiv(rows, tile["ROWS"])),
        hidden if x is None else x,
        None if x is None else hidden,
        cell,
        *weights.tensors,
        tokens,
        new_hidden,
        new_cell,
        out,
        rows,
        SIZE=size,
        PADDED=weights.padded,
        RESIDUAL=residual,
        **tile,
    )
    return new_hidden, new_cell, out


def linear(x: Tensor, weights: Weights) -> Tensor:
    """See `fused_decoding.linear`."""
    rows, size = x.shape
    y = x.new_empty(rows, weights.outputs)
    tile = _tile(min(rows, 64), weights, columns=16)  # too few outputs for large tiles
    grid = triton.cdiv(weights.outputs, tile["COLUMNS"]), triton.cdiv(rows, tile["ROWS"])
    _launch(_linear, grid, x, *weights.tensors, y, rows, weights.outputs, SIZE=size, PADDED=weights.padded, **tile)
    return y


def output(
    x: Tensor, weights: Weights, settings: Rows | None, *, unk_id: int, eos_id: int, keep: bool, logprobs: bool
) -> tuple[Tensor | None, Picks | None, Tensor | None]:
    """See `fused_decoding.output`."""
    (rows, size), vocab_size = x.shape, weights.outputs
    num_blocks = triton.cdiv(vocab_size, VOCABULARY_BLOCK)
    logits = x.new_empty(rows, vocab_size) if keep else None
    picks = None if settings is None else _empty_picks(rows, num_blocks, x)
    sums = x.new_empty(2, rows, num_blocks) if logprobs else None
    tile = _tile(min(rows, 64), weights, columns=VOCABULARY_BLOCK)
    _launch(
        _output,
        (num_blocks, triton.cdiv(rows, tile["ROWS"])),
        x,
        *weights.tensors,
        logits,
        *_settings(settings),
        None if settings is None else item_bits(vocab_size, x.device),
        *(picks or (None, None, None)),
        *((None, None) if sums is None else sums),
        rows,
        vocab_size,
        unk_id,
        eos_id,
        SIZE=size,
        PADDED=weights.padded,
        **tile,
    )
    return logits, picks, sums


def pick(logits: Tensor, settings: Rows) -> Picks:
    """See `fused_decoding.pick`."""
    rows, vocab_size = logits.shape
    block = 1024
    num_blocks = triton.cdiv(vocab_size, block)
    picks = _empty_picks(rows, num_blocks, logits)
    _launch(
        _pick_rows,
        (num_blocks, rows),
        logits,
        settings.key,
        settings.step,
        settings.temperature,
        item_bits(vocab_size, logits.device),
        *picks,
        vocab_size,
        COLUMNS=block,
    )
    return picks


def draw(
    picks: Picks,
    settings: Rows,
    *,
    eos_id: int,
    ended: Tensor | None,
    out: Tensor,
    logits: Tensor | None = None,
    sums: Tensor | None = None,
) -> Logprobs | None:
    """See `fused_decoding.draw`."""
    rows, num_blocks = picks.value.shape
    of_drawn = total = None
    if sums is not None:
        of_drawn, total = sums.new_empty(2, rows).unbind()
    _launch(
        _draw,
        (rows,),
        *picks,
        settings.temperature,
        num_blocks,
        logits,
        *((None, None) if sums is None else sums),
        of_drawn,
        total,
        _bytes(ended),
        out,
        settings.step,
        _bytes(settings.seen),
        settings.counts,
        settings.history,
        settings.unlabelled,
        settings.vocab_size,
        eos_id,
        HISTORY=0 if settings.history is None else settings.history.shape[1],
        HISTORY_BLOCK=1 if settings.history is None else triton.next_power_of_2(settings.history.shape[1]),
        BLOCKS=triton.next_power_of_2(num_blocks),
    )
    return None if of_drawn is None or total is None else (of_drawn, total)


def _settings(settings: Rows | None) -> tuple[Tensor | None, ...]:
    """Return what the output layer's kernel needs of the rows, in its order."""
    if settings is None:
        return (None,) * 11
    return (
        settings.key,
        settings.step,
        settings.temperature,
        settings.bias,
        _bytes(settings.seen),
        settings.repetition_penalty,
        settings.counts,
        settings.presence_penalty,
        settings.frequency_penalty,
        _bytes(settings.banned),
        settings.min_new_tokens,
    )


def _empty_picks(rows: int, num_blocks: int, like: Tensor) -> Picks:
    value, shift = like.new_empty(2, rows, num_blocks).unbind()
    return Picks(value, like.new_empty((rows, num_blocks), dtype=torch.int32), shift)


def _bytes(flags: Tensor | None) -> Tensor | None:
    """Return booleans as bytes, without a copy."""
    return None if flags is None else flags.view(torch.uint8)


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: object, **constants: int | bool) -> None:
    """Run a kernel on the GPU of its first argument. On a CPU, Triton's interpreter runs it."""
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](first, *arguments, **constants, enable_fp_fusion=False)  # rounds as torch's operators do


# --- kernels ---------------------------------------------------------------------------------------------------------
# Arrays are row-major. A pointer that is None is left out when the kernel is compiled.


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _product(  # type: ignore[no-untyped-def]
    x, second, weight, scale, added, gamma, beta, eps, row, inside, column,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return normalised x, and `second` beside it, times the weights' rows `column`: float32 (ROWS, COLUMNS)."""
    at = row[:, None] * SIZE
    if gamma is not None:
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, PADDED, BLOCK):
            k = start + tl.arange(0, BLOCK)
            total += tl.sum(tl.load(x + at + k[None, :], inside[:, None] & (k < SIZE)[None, :], 0.0), 1)
        mean = total / SIZE
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, PADDED, BLOCK):
            k = start + tl.arange(0, BLOCK)
            valid = inside[:, None] & (k < SIZE)[None, :]
            distance = tl.where(valid, tl.load(x + at + k[None, :], valid, 0.0) - mean[:, None], 0.0)
            total += tl.sum(distance * distance, 1)
        factor = tl.rsqrt(total / SIZE + eps)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    WIDTH: tl.constexpr = PADDED if second is None else 2 * PADDED  # noqa: N806
    for start in range(0, WIDTH, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(weight + column[:, None] * WIDTH + k[None, :])  # (COLUMNS, BLOCK)
        source = x
        if second is not None:
            source = tl.where(start < PADDED, x, second)
            k = k - tl.where(start < PADDED, 0, PADDED)
        if SIZE == PADDED:
            part = tl.load(source + at + k[None, :], inside[:, None], 0.0)
        else:
            part = tl.load(source + at + k[None, :], inside[:, None] & (k < SIZE)[None, :], 0.0)
        if gamma is not None:
            g, b = tl.load(gamma + k, k < SIZE, 0.0), tl.load(beta + k, k < SIZE, 0.0)
            normed = (part - mean[:, None]) * factor[:, None] * g[None, :] + b[None, :]
            part = normed if second is None else tl.where(start < PADDED, normed, part)
        if INTERPRETED:
            total = tl.dot(_rounded(part), tl.trans(w.to(tl.float32)), total)
        else:
            total = tl.dot(part.to(tl.bfloat16), tl.trans(w.to(tl.bfloat16)), total)
    if scale is not None:
        total *= tl.load(scale + column)[None, :]
    return total


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rounded(x):  # type: ignore[no-untyped-def]
    """Return float32 with the values of bfloat16, rounded to nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["tokens"])  # type: ignore[untyped-decorator, unused-ignore]
def _layer(  # type: ignore[no-untyped-def]
    x, second, cell, weight, scale, added, gamma, beta, eps, tokens, new_hidden, new_cell, out, rows,
    SIZE: tl.constexpr, PADDED: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # four gates of a unit side by side
    inside = row < rows
    gates = _product(
        x, second, weight, scale, added, gamma, beta, eps, row, inside, column, SIZE, PADDED, ROWS, COLUMNS, BLOCK
    )
    if tokens is not None:
        of_token = tl.load(tokens + row, inside, 0) * (4 * SIZE)
        valid = inside[:, None] & (column < 4 * SIZE)[None, :]
        gates += tl.load(added + of_token[:, None] + column[None, :], valid, 0.0).to(tl.float32)
    else:
        gates += tl.load(added + column, column < 4 * SIZE, 0.0).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(gates, (ROWS, COLUMNS // 4, 2, 2)))
    i, o = tl.split(even)
    f, g = tl.split(odd)  # each (ROWS, COLUMNS / 4)
    unit = tl.program_id(0) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    at = row[:, None] * SIZE + unit[None, :]
    valid = inside[:, None] & (unit < SIZE)[None, :]
    c = tl.sigmoid(i) * _tanh(g) + tl.sigmoid(f) * tl.load(cell + at, valid, 0.0)
    h = tl.sigmoid(o) * _tanh(c)
    tl.store(new_cell + at, c, valid)
    tl.store(new_hidden + at, h, valid)
    if RESIDUAL:
        tl.store(out + at, h + tl.load(x + at, valid, 0.0), valid)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator, unused-ignore]
def _linear(  # type: ignore[no-untyped-def]
    x, weight, scale, added, gamma, beta, eps, y, rows, size,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    total = _product(
        x, None, weight, scale, added, gamma, beta, eps, row, inside, column, SIZE, PADDED, ROWS, COLUMNS, BLOCK
    )
    valid = inside[:, None] & (column < size)[None, :]
    total += tl.load(added + column, column < size, 0.0)[None, :]
    tl.store(y + row[:, None] * size + column[None, :], total, valid)


@triton.jit(do_not_specialize=["rows", "unk_id", "eos_id"])  # type: ignore[untyped-decorator, unused-ignore]
def _output(  # type: ignore[no-untyped-def]
    x, weight, scale, added, gamma, beta, eps, logits,
    keys, steps, temperature, bias, seen, repetition, counts, presence, frequency, banned, min_new_tokens, items,
    values, tokens, shifts, maxima, sums, rows, size, unk_id, eos_id,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    total = _product(
        x, None, weight, scale, added, gamma, beta, eps, row, inside, column, SIZE, PADDED, ROWS, COLUMNS, BLOCK
    )
    total += tl.load(added + column, column < size, 0.0)[None, :]
    at = row[:, None] * size + column[None, :]
    valid = inside[:, None] & (column < size)[None, :]
    block = row * tl.num_programs(0) + tl.program_id(0)
    if logits is not None:
        tl.store(logits + at, total, valid)
    if maxima is not None:  # parts of the softmax's sum
        masked = tl.where(valid, total, float("-inf"))
        largest = tl.max(masked, 1)
        share = tl.sum(tl.exp(masked - tl.where(largest == float("-inf"), 0.0, largest)[:, None]), 1)
        tl.store(maxima + block, largest, inside)
        tl.store(sums + block, share, inside)
    if values is not None:
        # as `batch.advance` and `sampling.process_logits`, in their order
        total = tl.where(valid & (column != unk_id)[None, :], total, float("-inf"))
        if bias is not None:
            total += tl.load(bias + at, valid, 0.0)
        if seen is not None:
            penalty = tl.load(repetition + row, inside, 1.0)[:, None] + tl.zeros_like(total)
            penalized = tl.where(total > 0, tl.div_rn(total, penalty), total * penalty)
            total = tl.where(tl.load(seen + at, valid, 0) != 0, penalized, total)
        if counts is not None:
            count = tl.load(counts + at, valid, 0)
            if presence is not None:
                total -= tl.where(count > 0, tl.load(presence + row, inside, 0.0)[:, None], 0.0)
            if frequency is not None:
                total -= tl.load(frequency + row, inside, 0.0)[:, None] * count.to(tl.float32)
        if banned is not None:
            total = tl.where(tl.load(banned + at, valid, 1) != 0, float("-inf"), total)
        if min_new_tokens is not None:
            early = tl.load(steps + row, inside, 0) < tl.load(min_new_tokens + row, inside, 0)
            total = tl.where(early[:, None] & (column == eos_id)[None, :], float("-inf"), total)
        _pick(
            total, row, inside, column, size, keys, steps, temperature, items,
            values + block, tokens + block, shifts + block, DIVIDE=True,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pick_rows(  # type: ignore[no-untyped-def]
    logits, keys, steps, temperature, items, values, tokens, shifts, size, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) + tl.arange(0, 1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    valid = (column < size)[None, :]
    block = row * tl.num_programs(0) + tl.program_id(0)
    total = tl.load(logits + row[:, None] * size + column[None, :], valid, float("-inf"))
    _pick(
        total, row, row >= 0, column, size, keys, steps, temperature, items,
        values + block, tokens + block, shifts + block, DIVIDE=False,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pick(  # type: ignore[no-untyped-def]
    logits, row, inside, column, size, keys, steps, temperature, items, values, tokens, shifts, DIVIDE: tl.constexpr,
):  # fmt: skip
    """Store each row's largest value of the block, its token, and what was subtracted before the division."""
    shift = tl.zeros(row.shape, tl.float32)
    heat = tl.full(row.shape, 1.0, tl.float32)
    if temperature is not None:
        heat = tl.load(temperature + row, inside, 1.0)
        if DIVIDE:
            shift = tl.max(logits, 1)
            distance = logits - tl.where(shift == float("-inf"), 0.0, shift)[:, None]
            divided = tl.div_rn(distance, tl.where(heat > 0, heat, 1.0)[:, None] + tl.zeros_like(logits))
            logits = tl.where(((heat == 1) | (heat == 0))[:, None], logits, divided)
    if keys is not None:
        key = mix(mix(tl.load(keys + row, inside, 0).to(tl.uint64)) ^ tl.load(steps + row, inside, 0).to(tl.uint64))
        bits = (
            key.to(tl.uint32)[:, None] ^ tl.load(items + column, column < size, 0).to(tl.uint32, bitcast=True)[None, :]
        )
        logits -= tl.where((heat == 0)[:, None], 0.0, tl.log(_exponential(bits)))
    value, index = tl.max(logits, 1, return_indices=True, return_indices_tie_break_left=True)
    tl.store(values, value, inside)
    tl.store(tokens, tl.min(column, 0) + index, inside)
    tl.store(shifts, shift, inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _exponential(bits):  # type: ignore[no-untyped-def]
    """Return the noise of `noise.exponential`; bits are those of a key and an item, uint32."""
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    u = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 2.0**-31
    u = tl.minimum(u, 1 - 2.0**-24)
    rest = 1 - u
    # -log1p(-u) without log1p: the quotient corrects for the digits of a small u that `1 - u` rounded away
    return tl.where(rest == 1, u, tl.log(rest) * (u / tl.where(rest == 1, 1.0, rest - 1)))


# One program per row. No argument decides by its alignment: a graph gives each step another place for its tokens.
@triton.jit(do_not_specialize=["num_blocks", "eos_id"], do_not_specialize_on_alignment=["out"])  # type: ignore[untyped-decorator, unused-ignore]
def _draw(  # type: ignore[no-untyped-def]
    values, tokens, shifts, temperature, num_blocks, logits, maxima, sums, of_drawn, totals,
    ended, out, steps, seen, counts, history, unlabelled, size, eos_id,
    HISTORY: tl.constexpr, HISTORY_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    valid = block < num_blocks
    at = row * num_blocks + block
    value = tl.load(values + at, valid, float("-inf"))
    token = tl.load(tokens + at, valid, size)
    if temperature is not None:
        heat = tl.load(temperature + row)
        shift = tl.load(shifts + at, valid, float("-inf"))
        largest = tl.max(shift, 0)
        below = tl.where(shift == float("-inf"), 0.0, shift - tl.where(largest == float("-inf"), 0.0, largest))
        below = tl.div_rn(below, tl.zeros_like(below) + tl.where(heat > 0, heat, 1.0))
        value = tl.where((heat == 1) | (heat == 0), value, value + below)
    # the first of equal values, as torch's argmax
    drawn = tl.min(tl.where(valid & (value == tl.max(value, 0)), token, size), 0)
    drawn = tl.minimum(drawn, size - 1).to(tl.int64)  # NaN equals no value: any token, but none outside the arrays
    if ended is not None:
        drawn = tl.where(tl.load(ended + row) != 0, eos_id, drawn)
        tl.store(ended + row, (drawn == eos_id).to(tl.uint8))
    tl.store(out + row, drawn)
    if sums is not None:
        largest = tl.load(maxima + at, valid, float("-inf"))
        top = tl.max(largest, 0)
        total = top + tl.log(tl.sum(tl.load(sums + at, valid, 0.0) * tl.exp(largest - top), 0))
        tl.store(totals + row, total)
        tl.store(of_drawn + row, tl.load(logits + row * size + drawn) - total)
    # what later steps need
    tl.store(steps + row, tl.load(steps + row) + 1)
    if unlabelled is not None:
        tl.store(unlabelled + row, drawn)
    if seen is not None:
        tl.store(seen + row * size + drawn, tl.full((), 1, tl.uint8))
    if counts is not None:
        tl.store(counts + row * size + drawn, tl.load(counts + row * size + drawn) + 1)
    if history is not None:
        place = tl.arange(0, HISTORY_BLOCK)
        moved = tl.load(history + row * HISTORY + place + 1, place + 1 < HISTORY, 0)
        tl.debug_barrier()  # all is read before anything is written
        tl.store(history + row * HISTORY + place, tl.where(place == HISTORY - 1, drawn, moved), place < HISTORY)
