"""C++ for training on a CPU: an LSTM over a window, and the softmax of logits with its slopes (training.cpp).

Both round no more than torch's operators do under autocast: within a window an LSTM's cells stay in float32, and gates
are rounded only to be kept for the backward pass. Where there is no compiler, or another processor, torch's are used.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from textgen.hardware import processor_flags
from textgen.kernels.compile import library

State = tuple[Tensor, Tensor]


@functools.cache
def _code() -> ctypes.CDLL | None:
    """Return the compiled code on processors that it is fast on: those with AMX have something better in torch."""
    if "avx512_bf16" not in processor_flags() or "amx_bf16" in processor_flags():
        return None
    return library("training.cpp")


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _is_exact(tensor: Tensor) -> bool:
    """Tell whether compiled code can take the values for an array of float32."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


# --- the LSTM --------------------------------------------------------------------------------------------------------


class _Window(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("lanes", "steps", "inputs", "units")),
        *((name, ctypes.c_void_p) for name in ("weight_ih", "weight_hh", "bias", "seen", "outputs", "gates", "cells")),
        *((name, ctypes.c_void_p) for name in ("cell", "slopes", "slope_hidden", "slope_cell", "slope_bias", "packed")),
        ("threads", ctypes.c_int64),
    ]  # fmt: skip


class _LSTM(torch.autograd.Function):
    """One layer over a window. Only slopes are made of what the forward pass keeps, and in its place."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        hidden: Tensor,
        cell: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (lanes, steps, inputs), units = x.shape, weight_hh.shape[1]
        make = functools.partial(torch.empty, dtype=torch.bfloat16, device="cpu")
        seen = make(lanes, steps, inputs + units)
        seen[:, :, :inputs], seen[:, 0, inputs:] = x, hidden[0]
        after = cell[0].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        y, packed = make(lanes, steps, units), make(weight_ih.numel() + weight_hh.numel())
        gates, cells = (make(lanes, steps, 4 * units), make(lanes, steps, units)) if with_gradient else (None, None)
        _run(
            "textgen_lstm_forward", x.shape, weight_ih=weight_ih, weight_hh=weight_hh, bias=bias, seen=seen, outputs=y,
            gates=gates, cells=cells, cell=after, packed=packed,
        )  # fmt: skip
        if gates is not None and cells is not None:
            ctx.save_for_backward(seen, gates, cells, cell, weight_ih, weight_hh)
            ctx.x_dtype, ctx.used = x.dtype, False  # type: ignore[attr-defined]
        return y, y[None, :, -1].clone(), after[None].to(torch.bfloat16)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_hidden: Tensor, grad_cell: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used:  # type: ignore[attr-defined]
            raise RuntimeError("the gradient of this LSTM can be taken once: what it needs is overwritten")
        ctx.used = True  # type: ignore[attr-defined]
        seen, gates, cells, cell, weight_ih, weight_hh = ctx.saved_tensors  # type: ignore[attr-defined]
        (lanes, steps, _), inputs = seen.shape, weight_ih.shape[1]
        grad_before = grad_cell[0].to(torch.float32, copy=True).contiguous()
        slope_hidden = grad_hidden[0].float().contiguous()
        grad_bias = torch.zeros_like(weight_hh[:, 0], memory_format=torch.contiguous_format)
        packed = torch.empty_like(weight_hh, dtype=torch.bfloat16)
        _run(
            "textgen_lstm_backward", (lanes, steps, inputs), weight_hh=weight_hh, gates=gates, cells=cells,
            cell=cell[0].float().contiguous(), slopes=grad_y.to(torch.bfloat16).contiguous(), slope_hidden=slope_hidden,
            slope_cell=grad_before, slope_bias=grad_bias, packed=packed,
        )  # fmt: skip
        slopes = gates.flatten(0, 1)  # (lanes * steps, 4 * units)
        grad_weight = slopes.T @ seen.flatten(0, 1)  # (4 * units, inputs + units)
        grad_x = (slopes @ weight_ih.to(torch.bfloat16)).view(lanes, steps, inputs)
        grad_state: State | tuple[None, None] = None, None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:  # type: ignore[attr-defined]
            grad_state = (
                (gates[:, 0] @ weight_hh.to(torch.bfloat16))[None].to(cell.dtype),
                grad_before[None].to(cell.dtype),
            )
        weights = grad_weight[:, :inputs].float(), grad_weight[:, inputs:].float()
        return grad_x.to(ctx.x_dtype), *grad_state, *weights, grad_bias, None  # type: ignore[attr-defined]


def _run(name: str, shape: tuple[int, ...] | torch.Size, **tensors: Tensor | None) -> None:
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    weight_hh, code = tensors["weight_hh"], _code()
    assert code is not None
    assert weight_hh is not None
    lanes, steps, inputs = shape
    places = {field: _at(tensor) for field, tensor in tensors.items()}
    window = _Window(lanes, steps, inputs, weight_hh.shape[1], threads=torch.get_num_threads(), **places)
    getattr(code, name)(ctypes.byref(window))


def lstm(x: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> tuple[Tensor, State] | None:
    """Run one LSTM layer over a window, in bfloat16.

    Args:
        x: (batch, time, input_size).
        state: hidden and cell, each (1, batch, hidden_size).
        weight_ih: float32 (4 x hidden_size, input_size), gates in torch's order: input, forget, cell, output.
        weight_hh: float32 (4 x hidden_size, hidden_size).
        bias: float32 (4 x hidden_size,).

    Returns:
        bfloat16 (batch, time, hidden_size) and the new state; None where this is not to be had: on other processors,
        without a compiler, for sizes that do not fill registers, and for single steps, which do not repay the packing
        of the weights.
    """
    weights, (lanes, steps, inputs), units = (weight_ih, weight_hh, bias), x.shape, weight_hh.shape[1]
    if lanes == 0 or steps < 2 or inputs % 16 or units % 64 or not all(map(_is_exact, weights)) or _code() is None:
        return None
    y, hidden, cell = _LSTM.apply(x, *state, *weights, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return y, (hidden, cell)


# --- the softmax -----------------------------------------------------------------------------------------------------


def softmax(logits: Tensor, bias: Tensor, targets: Tensor, grad_bias: Tensor | None) -> Tensor | None:
    """Return the nats of each row and turn its logits into their slope, in place.

    Args:
        logits: float32 or bfloat16 (rows, vocab_size), without the bias; overwritten.
        bias: float32 (vocab_size,).
        targets: (rows,) int64; -1 is not scored and has no slope.
        grad_bias: float32 (vocab_size,), the slopes are added to it; None where none are wanted.

    Returns:
        float32 (rows,); None where this is not to be had, and nothing has changed.
    """
    name = {torch.float32: "textgen_softmax_float32", torch.bfloat16: "textgen_softmax_bfloat16"}.get(logits.dtype)
    rows, size = logits.shape
    code = _code() if logits.device.type == "cpu" and logits.is_contiguous() else None
    if code is None or name is None or targets.dtype != torch.int64 or targets.shape != (rows,) or rows == 0:
        return None
    if any(t is not None and (t.shape != (size,) or not _is_exact(t)) for t in (bias, grad_bias)):
        return None
    if int(targets.max()) >= size:
        raise IndexError(f"targets must be below the vocabulary's size {len(bias)}: {int(targets.max())}")
    targets, nats, whole = targets.contiguous(), torch.empty_like(logits[:, 0], dtype=torch.float32), ctypes.c_int64
    places = [None if t is None else ctypes.c_void_p(_at(t)) for t in (logits, bias, targets, nats, grad_bias)]
    getattr(code, name)(*places[:3], whole(rows), whole(size), *places[3:], whole(torch.get_num_threads()))
    return nats
