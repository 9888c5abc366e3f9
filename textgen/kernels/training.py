"""Compiled code for training on a CPU: an LSTM layer over a window, and cross-entropy with its gradient (training.cpp).

Both round no more often than torch's operators do under autocast: within a window the LSTM's cells stay in float32, and
gates are rounded only in the copy that is kept for the backward pass. Cross-entropy is for all processors with AVX512,
the LSTM for those that multiply bfloat16 by it. Every function returns None on other processors and without a compiler;
the caller then uses torch's operators.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from textgen.hardware import processor_flags
from textgen.kernels import amx
from textgen.kernels.compile import library

State = tuple[Tensor, Tensor]


@functools.cache
def compiled_code() -> ctypes.CDLL | None:
    """Return the compiled code; None on processors without registers of 512 bits, and without a compiler."""
    return library("training.cpp") if "avx512f" in processor_flags() else None


def compiled_lstm() -> ctypes.CDLL | None:
    """Return the compiled code if it computes LSTM layers here; None if torch does."""
    code = compiled_code() if suits_lstm() else None
    return code if hasattr(code, "textgen_lstm_forward") else None  # the compiler may be older than the processor


@functools.cache
def suits_lstm() -> bool:
    """Return whether compiled LSTM layers are for this processor: it has AVX512-BF16.

    With AMX torch's own code is faster than this code without: it is used if a user asks for AMX here.
    """
    return "avx512_bf16" in processor_flags() and (not has_amx() or amx.is_wanted())


def has_amx() -> bool:
    """Return whether this processor multiplies bfloat16 by AMX."""
    return "amx_bf16" in processor_flags()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _is_float32_array(tensor: Tensor) -> bool:
    """Return whether compiled code can read the tensor as a plain array of float32."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


# --- the LSTM --------------------------------------------------------------------------------------------------------


class _WindowArguments(ctypes.Structure):
    """The C++ structure of the same name, which documents shapes; fields must be in the same order."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lanes", "steps", "input_size", "hidden_size")),
        *((name, ctypes.c_void_p) for name in ("weight_ih", "weight_hh", "bias")),
        *((name, ctypes.c_void_p) for name in ("inputs", "outputs", "gates", "cells", "cell")),
        *((name, ctypes.c_void_p) for name in ("grad_outputs", "grad_hidden", "grad_cell", "grad_bias")),
        *((name, ctypes.c_void_p) for name in ("packed", "tiles")),
        ("threads", ctypes.c_int64),
    )


class LSTMFunction(torch.autograd.Function):
    """One layer over a window, whose backward pass overwrites the kept gates by their gradients."""

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
        by_amx: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (lanes, steps, input_size), hidden_size = x.shape, weight_hh.shape[1]
        empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="cpu")
        # A step multiplies its input and the previous hidden state, side by side, with both weights at once. The code
        # writes hidden states of all steps but the first.
        inputs = empty(lanes, steps, input_size + hidden_size)
        inputs[:, :, :input_size], inputs[:, 0, input_size:] = x, hidden[0]
        last_cell = cell[0].to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # updated in place
        y, packed = empty(lanes, steps, hidden_size), empty(weight_ih.numel() + weight_hh.numel())
        gates = empty(lanes, steps, 4 * hidden_size) if with_gradient else None
        cells = empty(lanes, steps, hidden_size) if with_gradient else None
        _call(
            "textgen_lstm_forward",
            x.shape,
            weight_ih=weight_ih,
            weight_hh=weight_hh,
            bias=bias,
            inputs=inputs,
            outputs=y,
            gates=gates,
            cells=cells,
            cell=last_cell,
            packed=packed,
            tiles=empty(lanes, input_size + hidden_size) if by_amx else None,
        )
        if gates is not None and cells is not None:
            ctx.save_for_backward(inputs, gates, cells, cell, weight_ih, weight_hh)
            ctx.x_dtype, ctx.by_amx, ctx.used = x.dtype, by_amx, False  # type: ignore[attr-defined]
        return y, y[None, :, -1].clone(), last_cell[None].to(torch.bfloat16)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_hidden: Tensor, grad_cell: Tensor) -> tuple[Tensor | None, ...]:
        # Backpropagation through time (Werbos 1990). The C++ goes through the steps from last to first and finds the
        # gradients of the gates before their sigmoid or tanh. Those of weights and inputs are then two large products.
        if ctx.used:  # type: ignore[attr-defined]
            raise RuntimeError("the gradient of this LSTM can be taken once: its inputs are overwritten")
        ctx.used = True  # type: ignore[attr-defined]
        inputs, gates, cells, cell, weight_ih, weight_hh = ctx.saved_tensors  # type: ignore[attr-defined]
        (lanes, steps, _), input_size = inputs.shape, weight_ih.shape[1]
        grad_first_cell = grad_cell[0].to(torch.float32, copy=True).contiguous()  # updated in place, step by step
        grad_bias = torch.zeros_like(weight_hh[:, 0], memory_format=torch.contiguous_format)
        _call(
            "textgen_lstm_backward",
            (lanes, steps, input_size),
            weight_hh=weight_hh,
            gates=gates,
            cells=cells,
            cell=cell[0].float().contiguous(),
            grad_outputs=grad_y.to(torch.bfloat16).contiguous(),
            grad_hidden=grad_hidden[0].float().contiguous(),
            grad_cell=grad_first_cell,
            grad_bias=grad_bias,
            packed=torch.empty_like(weight_hh, dtype=torch.bfloat16),
            tiles=torch.empty_like(gates[:, 0]) if ctx.by_amx else None,  # type: ignore[attr-defined]
        )
        grad_gates = gates.flatten(0, 1)  # overwritten by the call; (lanes * steps, 4 * hidden_size)
        grad_weight = grad_gates.T @ inputs.flatten(0, 1)  # (4 * hidden_size, input_size + hidden_size)
        grad_x = (grad_gates @ weight_ih.to(torch.bfloat16)).view(lanes, steps, input_size)
        grad_state: State | tuple[None, None] = None, None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:  # type: ignore[attr-defined]
            grad_first_hidden = gates[:, 0] @ weight_hh.to(torch.bfloat16)  # (lanes, hidden_size)
            grad_state = grad_first_hidden[None].to(cell.dtype), grad_first_cell[None].to(cell.dtype)
        grad_weights = grad_weight[:, :input_size].float(), grad_weight[:, input_size:].float()
        return grad_x.to(ctx.x_dtype), *grad_state, *grad_weights, grad_bias, None, None  # type: ignore[attr-defined]


def _call(name: str, shape: tuple[int, ...] | torch.Size, **tensors: Tensor | None) -> None:
    """Call a function of the compiled code.

    Args:
        name: of the function.
        shape: lanes, steps and input_size.
        tensors: by field of `_WindowArguments`, contiguous; None is a null pointer.
    """
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    weight_hh, code = tensors["weight_hh"], compiled_lstm()
    assert code is not None
    assert weight_hh is not None
    lanes, steps, input_size = shape
    addresses = {field: _address(tensor) for field, tensor in tensors.items()}
    threads = torch.get_num_threads()
    arguments = _WindowArguments(lanes, steps, input_size, weight_hh.shape[1], threads=threads, **addresses)
    getattr(code, name)(ctypes.byref(arguments))


def lstm(x: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> tuple[Tensor, State] | None:
    """Run one LSTM layer over a window, in bfloat16.

    Args:
        x: (batch, time, input_size).
        state: hidden and cell, each (1, batch, hidden_size).
        weight_ih: float32 (4 * hidden_size, input_size), gates in torch's order: input, forget, cell, output.
        weight_hh: float32 (4 * hidden_size, hidden_size).
        bias: float32 (4 * hidden_size,).

    Returns:
        bfloat16 (batch, time, hidden_size) and the new state. None if there is no compiled code, if sizes do not fill
        registers, and for single steps, where packing the weights would take longer than it saves. On processors with
        AMX also None without a gradient, and where AMX is not measured as faster.
    """
    weights, (lanes, steps, input_size), hidden_size = (weight_ih, weight_hh, bias), x.shape, weight_hh.shape[1]
    if lanes == 0 or steps < 2 or input_size % 16 or hidden_size % 64 or not all(map(_is_float32_array, weights)):
        return None
    code, with_gradient = compiled_lstm(), torch.is_grad_enabled()
    if code is None:
        return None
    if by_amx := has_amx():
        shape = amx.LayerShape(lanes, steps, input_size, hidden_size, torch.get_num_threads())
        if not with_gradient or input_size % 32 or not amx.is_faster(shape, Path(code._name)):
            return None
    y, hidden, cell = LSTMFunction.apply(x, *state, *weights, with_gradient, by_amx)  # type: ignore[no-untyped-call]
    return y, (hidden, cell)


# --- cross-entropy ---------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, bias: Tensor, targets: Tensor, grad_bias: Tensor | None) -> Tensor | None:
    """Return the cross-entropy of each row in nats, and overwrite its logits by their gradient, softmax - one-hot.

    Args:
        logits: float32 or bfloat16 (rows, vocab_size), without the bias; overwritten.
        bias: float32 (vocab_size,).
        targets: (rows,) int64; -1 is not scored and has no gradient.
        grad_bias: float32 (vocab_size,), the gradients are added to it; None if no gradient is needed.

    Returns:
        float32 (rows,). None if there is no compiled code for these tensors; nothing is overwritten then.
    """
    name = {torch.float32: "textgen_cross_entropy_float32", torch.bfloat16: "textgen_cross_entropy_bfloat16"}.get(
        logits.dtype
    )
    rows, size = logits.shape
    code = compiled_code() if logits.device.type == "cpu" and logits.is_contiguous() else None
    if code is None or name is None or targets.dtype != torch.int64 or targets.shape != (rows,) or rows == 0:
        return None
    if any(t is not None and (t.shape != (size,) or not _is_float32_array(t)) for t in (bias, grad_bias)):
        return None
    if int(targets.max()) >= size:
        raise IndexError(f"targets must be below the vocabulary's size {len(bias)}: {int(targets.max())}")
    targets, nats = targets.contiguous(), torch.empty_like(logits[:, 0], dtype=torch.float32)
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    getattr(code, name)(
        pointer(_address(logits)),
        pointer(_address(bias)),
        pointer(_address(targets)),
        int64(rows),
        int64(size),
        pointer(_address(nats)),
        pointer(_address(grad_bias)),
        int64(torch.get_num_threads()),
    )
    return nats
