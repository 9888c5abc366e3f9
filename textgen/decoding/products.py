"""Matrix products of decoders in float32, bfloat16 and int8, on weights that are packed once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from textgen.hardware import processor_flags

Product = Callable[[Tensor], Tensor]
"""x @ weight.T + bias: (batch, inputs) to (batch, outputs), float32"""


class PackedProduct:
    """x @ weight.T + bias on a CPU: oneDNN, on weights in its own layout. F.linear would pack them at each call."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> None:
        self._dtype, self._bias = dtype, bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self._dtype), self._weight, None, "none", [], "")
        y = y.float()
        return y if self._bias is None else y.add_(self._bias)


class PlainProduct:
    """x @ weight.T + bias by F.linear, for devices that need no other layout of weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> None:
        self._weight, self._bias = weight.to(dtype).contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(self._weight.dtype), self._weight).float()
        return y if self._bias is None else y.add_(self._bias)


class Int8Product:
    """x @ weight.T + bias on a CPU in 8-bit integers with exact 32-bit sums.

    Weights have a scale per output. x is scaled by 127 if it is within -1..1, else by a factor per row. So a row's
    result does not depend on the other rows, nor on their number, as sums of integers do not depend on their order.

    The operator multiplies unsigned numbers, so it gets x + 128, and the offset subtracts the 128 again. This takes a
    third less time than the operator's own zero point.

    Args:
        weight: float32 (outputs, inputs).
        bias: float32 (outputs,).
        bounded: whether every x is within -1..1.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, bounded: bool) -> None:
        self._bounded, self._bias = bounded, bias
        self._weight = torch.empty(weight.shape, dtype=torch.int8)
        scale, sums = torch.empty(2, len(weight))
        # some rows at a time, which stay in the cache: 12 ms instead of 53 for 4096 x 2048 (one Zen 4 core, 2026-11-29)
        for rows in map(slice, range(0, len(weight), 64), range(64, len(weight) + 64, 64)):
            scale[rows] = (weight[rows].abs().amax(1) / 127).clamp(min=_TINY)
            rounded = (weight[rows] / scale[rows, None]).round_()
            sums[rows] = rounded.sum(1) * 128  # exact in float32: whole numbers below 2^24
            self._weight[rows] = rounded
        self.tensors = {"weight": self._weight, "scale": scale} | ({} if bias is None else {"bias": bias.clone()})
        """the tensors that define the product, by name"""
        self._scale = scale / 127 if bounded else scale
        self._sums, self._offset = sums, -sums * self._scale
        # with a scale per row the bias has to come after that scale
        if bounded and bias is not None:
            self._offset += bias

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return weight, scale, offset, and the bias that is added after the scale of a row."""
        return self._weight, self._scale, self._offset, None if self._bounded else self._bias

    @functools.cached_property
    def _product(self) -> _IntegerProduct:
        if multiplies_int8():
            return _product_in_int8(self._weight, self._sums)
        return _product_in_float64(self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self._bounded:
            return self._product((x * 127).round_(), self._scale, self._offset)
        row_scale = x.abs().amax(1, keepdim=True).div_(127).clamp_(min=_TINY)
        y = self._product((x / row_scale).round_(), self._scale, self._offset).mul_(row_scale)
        return y if self._bias is None else y.add_(self._bias)


_TINY = torch.finfo(torch.float32).tiny

# x (whole numbers -127 to 127), scale and offset (per output) to ((x + 128) @ weight.T) * scale + offset
_IntegerProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


def _product_in_int8(weight: Tensor, sums: Tensor) -> _IntegerProduct:
    """Return the product on the processor's int8 instructions; `sums` are 128 times the sum of each weight row."""
    packed, zeros = torch.ops.onednn.qlinear_prepack(weight, None), torch.zeros(len(weight), dtype=torch.int32)
    transposed, sums = weight.T, sums.to(torch.int32)

    def product(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        # one row: the operator below takes 17 us to set up. `_int_mm` multiplies signed numbers, so the sums are added.
        if len(x) == 1:
            return torch._int_mm(x.to(torch.int8), transposed).add_(sums).float().mul_(scale).add_(offset)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x.add_(128).to(torch.uint8), 1.0, 0, packed, scale, zeros, offset, 1.0, 0, torch.float32, "none", [], ""
        )
        return y

    return product


def _product_in_float64(weight: Tensor) -> _IntegerProduct:
    """Return the same product on any processor, bit for bit: float64 holds the sums exactly."""
    wide = weight.double()

    def product(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return F.linear(x.double() + 128, wide).float().mul_(scale).add_(offset)

    return product


@functools.cache
def multiplies_int8() -> bool:
    """Return whether this processor multiplies 8-bit integers fast and torch's operators for it are correct.

    The operators are internal to torch, so they are tested here on the largest possible sums. Without VNNI or AMX, the
    16-bit intermediate sums would overflow.
    """
    if not processor_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        return False
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    weight[::2] = -127
    inputs, ones = [torch.full((rows, 64), 127.0) for rows in (1, 2)], torch.ones(32)
    try:
        fast, exact = _product_in_int8(weight, weight.sum(1) * 128), _product_in_float64(weight)
        return all(torch.equal(fast(x.clone(), ones, ones), exact(x, ones, ones)) for x in inputs)
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def has_packed_product(dtype: torch.dtype) -> bool:
    """Return whether torch has the internal operators of `PackedProduct`, and they are correct."""
    x, weight = torch.ones(2, 32, dtype=dtype), torch.eye(32, dtype=dtype)
    try:
        return torch.equal(PackedProduct(weight, None, dtype=dtype)(x), x.float())
    except (AttributeError, RuntimeError):
        return False
