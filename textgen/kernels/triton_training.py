"""Triton kernels of a training step on a GPU: locked dropout, masks of weights, and cross-entropy with its gradient.

Each replaces dozens of torch's operators by one kernel. Their plain twins in model/lstm.py define the right results:
masks are equal in every bit, the cross-entropy up to rounding. Import this module through fused.py. Not measured on a
GPU so far; tests interpret the kernels, and `python -m benchmarks.kernels` compiles them.
"""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from textgen.kernels.triton_noise import mix

# Rows of a program of `_cross_entropy`. With more, there are fewer sums to write, but eight take twice the registers.
ROWS = 4
# Time steps of a program of `_drop`: a mask is hashed once for them.
TIME_STEPS = 16


# --- locked dropout --------------------------------------------------------------------------------------------------


class _Drop(torch.autograd.Function):
    """Multiply by a mask, there and back. The mask is hashed again for the gradient instead of being kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, lanes: Tensor, step: int | Tensor, seed: int, site: int, dropout: float
    ) -> Tensor:
        ctx.mask = lanes, step, seed, site, dropout  # type: ignore[attr-defined]
        return _dropped(x, lanes, step, seed, site, dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _dropped(grad, *ctx.mask), None, None, None, None, None  # type: ignore[attr-defined]


def drop(x: Tensor, lanes: Tensor, *, step: int | Tensor, seed: int, site: int, dropout: float) -> Tensor:
    """Return x times the mask of `LSTMLanguageModel._drop`, the plain twin, bit for bit.

    Args:
        x: (batch, time, size).
        lanes: (batch,) int64.
        step: of the optimizer; or an int64 scalar, which the gradient reads again.
        seed: of the masks.
        site: of the masks.
        dropout: the share that is dropped.
    """
    dropped: Tensor = _Drop.apply(x, lanes, step, seed, site, dropout)  # type: ignore[no-untyped-call]
    return dropped


def _dropped(x: Tensor, lanes: Tensor, step: int | Tensor, seed: int, site: int, dropout: float) -> Tensor:
    if x.stride(2) != 1:
        x = x.contiguous()
    y = torch.empty_like(x)  # in the order of x: cuDNN's output is time first in memory
    batch, time, size = x.shape
    grid = batch, triton.cdiv(size, 256), triton.cdiv(time, TIME_STEPS)
    kept = 1 / ctypes.c_float(1 - dropout).value  # float32 divided by float32, as in the twin
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _drop[grid](
            x, y, lanes.contiguous(), step, seed, site, dropout, kept, time, size, *x.stride()[:2], *y.stride()[:2],
            STEP_IS_TENSOR=isinstance(step, Tensor), BLOCK=256, TIME_STEPS=TIME_STEPS, enable_fp_fusion=True,
        )  # fmt: skip
    return y


# One program multiplies BLOCK units of one lane at TIME_STEPS steps: grid (batch, size / BLOCK, time / TIME_STEPS).
@triton.jit(do_not_specialize=["step", "seed", "site"])  # type: ignore[untyped-decorator, unused-ignore]
def _drop(  # type: ignore[no-untyped-def]
    x, y, lanes, step, seed, site, dropout, kept, time, size, x_lane, x_time, y_lane, y_time,
    STEP_IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr, TIME_STEPS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # 64 bits: products with strides may pass 2^31
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.load(lanes + row)
    bits = mix(mix(_site_bits(step, seed, site, STEP_IS_TENSOR) ^ _unsigned(lane)) ^ _unsigned(unit))
    uniform = ((bits >> 41).to(tl.float32) + 0.5) * 2.0**-23  # that of noise.uniform
    mask = tl.where(uniform >= dropout, kept, 0.0).to(x.dtype.element_ty).to(tl.float32)
    first = tl.program_id(2) * TIME_STEPS
    x += row * x_lane + unit
    y += row * y_lane + unit
    for t in range(first, tl.minimum(first + TIME_STEPS, time)):
        at = tl.cast(t, tl.int64)
        value = tl.load(x + at * x_time, unit < size).to(tl.float32)
        tl.store(y + at * y_time, value * mask, unit < size)


# --- masks of weights ------------------------------------------------------------------------------------------------


def weight_mask(size: int, *, step: int | Tensor, seed: int, site: int, dropped: int, device: torch.device) -> Tensor:
    """Return the mask of `LSTMLanguageModel.weight_mask`, the plain twin, bit for bit.

    Args:
        size: of the hidden state.
        step: of the optimizer, or an int64 scalar.
        seed: of the masks.
        site: of the masks.
        dropped: values of a byte, of 256, that drop a weight.
        device: of the result.

    Returns:
        float32 (4 * size, size).
    """
    mask = torch.empty(4 * size, size, device=device)
    with torch.cuda.device_of(mask):  # type: ignore[no-untyped-call]
        _weight_mask[(triton.cdiv(mask.numel(), 8 * 128),)](
            mask, step, seed, site, dropped, 256 / (256 - dropped), mask.numel(),
            STEP_IS_TENSOR=isinstance(step, Tensor), BLOCK=128, enable_fp_fusion=True,
        )  # fmt: skip
    return mask


# One program makes BLOCK hashes, of eight weights each: grid (4 * size * size / 8 / BLOCK,).
@triton.jit(do_not_specialize=["step", "seed", "site", "dropped"])  # type: ignore[untyped-decorator, unused-ignore]
def _weight_mask(  # type: ignore[no-untyped-def]
    mask, step, seed, site, dropped, kept, count, STEP_IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr  # noqa: N803
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = mix(_site_bits(step, seed, site, STEP_IS_TENSOR) ^ _unsigned(number))
    place = tl.arange(0, 8)[None, :]
    byte = ((bits[:, None] >> (8 * place).to(tl.uint64)) & 255).to(tl.int32)  # (BLOCK, 8), the lowest byte first
    weight = number[:, None] * 8 + place
    tl.store(mask + weight, tl.where(byte >= dropped, kept, 0.0), weight < count)


# --- hashes: those of noise.hash_bits ---------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _unsigned(value):  # type: ignore[no-untyped-def]
    return tl.cast(value, tl.int64).to(tl.uint64, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _site_bits(step, seed, site, STEP_IS_TENSOR: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    if STEP_IS_TENSOR:
        step = tl.load(step)
    return mix(mix(mix(_unsigned(seed)) ^ _unsigned(step)) ^ _unsigned(site))


# --- cross-entropy ---------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, bias: Tensor, targets: Tensor, grad_bias: Tensor | None) -> Tensor | None:
    """Do what `training.cross_entropy` does on a CPU, with its arguments; `cross_entropy_of_logits` is the plain twin.

    A target beyond the vocabulary has nan nats. The order of all sums depends on the number of rows alone.

    Returns:
        float32 (rows,). None if a tensor is no plain array, or a bias not float32; nothing is overwritten then.
    """
    (rows, size), floats = logits.shape, (bias,) if grad_bias is None else (bias, grad_bias)
    if (
        rows == 0
        or not logits.is_contiguous()
        or any(t.dtype != torch.float32 or not t.is_contiguous() for t in floats)
    ):
        return None
    nats = torch.empty(rows, device=logits.device)
    programs = triton.cdiv(rows, ROWS)
    sums = None if grad_bias is None else torch.empty(programs, size, device=logits.device)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        _cross_entropy[(programs,)](
            logits, bias, targets.contiguous(), nats, sums, rows, size, WITH_GRADIENT=sums is not None, ROWS=ROWS,
            BLOCK=min(triton.next_power_of_2(size), 512), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    if grad_bias is not None and sums is not None:
        grad_bias += sums.sum(0)
    return nats


# One program does ROWS rows: grid (rows / ROWS,). It reads their logits twice, BLOCK columns at a time: first for their
# maximum and the sum of their exponentials, then to overwrite them by their gradients, which it sums by columns.
# The second time they come from the GPU's cache: those of four rows of 8,192 are 64 KiB in bfloat16.
@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, bias, targets, nats, sums, rows, size,
    WITH_GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    rows -= program * ROWS  # that are left
    logits += program * ROWS * size
    target = tl.load(targets + program * ROWS + row, row < rows, -1)
    scored = tl.where(target >= 0, 1.0, 0.0)
    known = (target >= 0) & (target < size)
    target_logit = tl.load(logits + row * size + target, known, 0.0).to(tl.float32) + tl.load(bias + target, known, 0.0)
    column_of = target.to(tl.int32)
    tl.debug_barrier()  # read by all threads before any of them overwrites it
    start = (row * size)[:, None]  # (ROWS, 1)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, size, BLOCK):
        column = (first + tl.arange(0, BLOCK))[None, :]  # (1, BLOCK)
        inside = (row < rows)[:, None] & (column < size)
        exact = tl.load(logits + start + column, inside, float("-inf")).to(tl.float32) + tl.load(
            bias + column, column < size, 0.0
        )
        before = peak
        peak = tl.maximum(peak, tl.max(exact, 1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)  # -inf - -inf is nan, also if numbers are still to come
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(exact - shift[:, None]), 1)
    lost = (tl.log(total) + peak - target_logit) * scored
    tl.store(nats + program * ROWS + row, tl.where(target < size, lost, float("nan")), row < rows)
    if WITH_GRADIENT:
        inverse = 1 / total
        for first in range(0, size, BLOCK):
            column = (first + tl.arange(0, BLOCK))[None, :]
            inside = (row < rows)[:, None] & (column < size)
            exact = tl.load(logits + start + column, inside, float("-inf")).to(tl.float32) + tl.load(
                bias + column, column < size, 0.0
            )
            softmax = tl.exp(exact - peak[:, None]) * inverse[:, None]
            grad = (softmax - tl.where(column == column_of[:, None], 1.0, 0.0)) * scored[:, None]
            tl.store(logits + start + column, grad, inside)
            summed = tl.sum(tl.where(inside, grad, 0.0), 0)[None, :]
            tl.store(sums + program * size + column, summed, column < size)
