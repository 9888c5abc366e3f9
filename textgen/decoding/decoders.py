"""Decoders: one step of a trained model, as fast as the device reads its weights.

A decoder reads one token per row and returns logits for the next. The model's own `forward` defines what is right. The
cell decoder computes the same from weights in another layout: a table holds what the first LSTM layer makes of each
token's embedding, and each layer is one matrix product on weights that are packed once instead of at every call.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from textgen.decoding.products import Product, _Int8Product, _PackedProduct, _packs, _PlainProduct
from textgen.kernels import decoding as decoding_kernels
from textgen.model.lstm import LSTMLanguageModel, LSTMLayer

log = logging.getLogger("textgen")

CellDtype = Literal["float32", "bfloat16", "int8"]

# What a decoder carries from token to token: tensors whose first dimension is the batch.
DecoderState = list[Tensor]


# A prompt is read in windows of this many tokens, so that one of any length takes no more memory.
PREFILL_WINDOW = 512


# --- decoders --------------------------------------------------------------------------------------------------------


class Decoder:
    """Reads tokens, one per row and step. This one is the model as it stands: slow, and right by definition."""

    name = "plain"
    in_graphs = False
    """many steps at a time are to be replayed from CUDA graphs"""

    def __init__(self, model: LSTMLanguageModel, *, why: str = "") -> None:
        self.model, self._why = model, why
        self.vocab_size = model.vocab_size
        self.device = model.embedding.weight.device

    @property
    def description(self) -> str:
        """Return name, device, and why it was chosen, in a line."""
        where = f"{self.device.type}, in graphs" if self.in_graphs else self.device.type
        return f"{self.name} decoder on {where}" + (f": {self._why}" if self._why else "")

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> DecoderState:
        """Return the state (1, ...) after all tokens but the last one of a prompt, which `step` is to read."""
        model = self.model
        ids, state = torch.tensor([tokens[:-1]], dtype=torch.int64, device=self.device), model.zero_state(1)
        for start in range(0, ids.shape[1], PREFILL_WINDOW):
            window = ids[:, start : start + PREFILL_WINDOW]
            _, state = model(window, state, torch.full_like(window, -1))  # targets that score nothing: no logits
        return [part[i] for i in range(model.config.num_layers) for part in state]

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row.

        Args:
            tokens: (batch,) int64.
            state: hidden and cell of each layer in turn, each (batch, hidden_size).

        Returns:
            Logits (batch, vocab_size), float32, and the new state.
        """
        logits, (hidden, cell) = self.model(tokens[:, None], (torch.stack(state[::2]), torch.stack(state[1::2])))
        return logits[:, 0], [part[i] for i in range(len(hidden)) for part in (hidden, cell)]


class CellDecoder(Decoder):
    """Steps of one LSTM cell per layer, on packed weights.

    Args:
        model: whose weights are taken; changes to it afterwards do not show.
        dtype: what the matrix products read. bfloat16 adds up in float32; int8 weights are scaled per output, what they
            multiply by a constant or per row, so that a row does not depend on the others. State and everything else
            is float32, but for the table, which is bfloat16 unless all is float32.
        why: it was chosen.
    """

    def __init__(self, model: LSTMLanguageModel, dtype: CellDtype = "float32", *, why: str = "") -> None:
        super().__init__(model, why=why)
        self.name = dtype
        config, normed = model.config, len(model.norms) > 0
        packed = self.device.type == "cpu" and dtype != "int8" and _packs(_DTYPES[dtype])
        kind = _PackedProduct if packed else _PlainProduct

        def within_one(num_layers: int) -> bool:
            """Tell whether what so many layers return lies within -1..1, as hidden states do; norms and sums do not."""
            return not normed and (num_layers == 1 or not config.residual)

        def pack(weight: Tensor, bias: Tensor | None = None, *, bounded: bool) -> Product:
            if dtype == "int8":
                return _Int8Product(weight, bias, bounded=bounded)
            return kind(weight, bias, dtype=_DTYPES[dtype])

        with torch.no_grad():
            layers = [layer for layer in model.layers if isinstance(layer, LSTMLayer)]
            first = layers[0]
            table_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
            self._table = F.linear(*_table_parts(model, first, table_dtype))  # (vocab_size, 4 x hidden_size)
            # Of each layer what it makes of its own hidden state, or of that after what lies below; and of what lies
            # below, where that has a scale of its own.
            self._cells: list[Product] = [pack(_gates_last(first.weight_hh), bounded=True)]
            self._below: list[Product | None] = [None]
            for i, layer in enumerate(layers[1:], 1):
                joined = dtype != "int8" or within_one(i)
                weight = torch.cat([layer.weight_ih, layer.weight_hh], 1) if joined else layer.weight_hh
                self._cells.append(pack(_gates_last(weight), _gates_last(layer.bias), bounded=True))
                self._below.append(None if joined else pack(_gates_last(layer.weight_ih), bounded=False))
            projection, bounded = model.projection, within_one(config.num_layers)
            self._projection: Product | None = None
            if isinstance(projection, torch.nn.Linear):
                self._projection, bounded = pack(projection.weight, projection.bias, bounded=bounded), False
            self._output = pack(model.output.weight, model.output.bias, bounded=bounded)

    @functools.cached_property
    def _kernel(self) -> decoding_kernels.Int8Step | None:
        """The same step in compiled code, where that is to be had."""
        config = self.model.config
        plain = len(self.model.norms) == 0 and (config.num_layers == 1 or not config.residual)
        # torch rounds the last elements of an array that is no multiple of 32 by another `exp`
        whole = config.hidden_size % 32 == 0 and config.embedding_dim % 32 == 0
        if (
            self.name != "int8"
            or self.device.type != "cpu"
            or not (plain and whole and decoding_kernels.has_int8_step())
        ):
            return None
        products = [cast(_Int8Product, p) for p in (*self._cells, self._projection, self._output) if p is not None]
        return decoding_kernels.Int8Step(self._table, [product.parts for product in products], config.num_layers)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row, as `Decoder.step` says."""
        return self._by_operators(tokens, state) if self._kernel is None else self._kernel(tokens, state)

    def _by_operators(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        config, norms, out = self.model.config, self.model.norms, []
        tanh = _tanh if self.name == "int8" else torch.tanh
        size, x = config.hidden_size, state[0]
        for i, cell in enumerate(self._cells):
            hidden, memory = state[2 * i : 2 * i + 2]
            before = x
            if i == 0:
                gates = cell(hidden).add_(self._table.index_select(0, tokens))  # (batch, 4 x hidden_size)
            else:
                below, alone = (norms[i - 1](x) if len(norms) else x), self._below[i]
                gates = cell(torch.cat([below, hidden], 1)) if alone is None else cell(hidden).add_(alone(below))
            opened = gates[:, : 3 * size].sigmoid_()  # input, forget, output
            memory = (opened[:, size : 2 * size] * memory).addcmul_(opened[:, :size], tanh(gates[:, 3 * size :]))
            x = hidden = opened[:, 2 * size :] * tanh(memory)
            if i > 0 and config.residual:
                x = x + before
            out += [hidden, memory]
        if len(norms):
            x = norms[-1](x)
        if self._projection is not None:
            x = self._projection(x)
        return self._output(x), out

    def int8_tensors(self) -> dict[str, Tensor]:
        """Return what an int8 decoder is made of, by name; rows of cells are input, forget, output, cell."""
        first = self.model.layers[0]
        assert isinstance(first, LSTMLayer)
        embedding, weight, bias = _table_parts(self.model, first, torch.bfloat16)
        tensors = {"embedding": embedding, "table.weight": weight, "table.bias": bias}
        tensors |= {f"norms.{name}": value for name, value in self.model.norms.named_parameters()}
        products = {f"cells.{i}": cell for i, cell in enumerate(self._cells)}
        products |= {f"below.{i}": below for i, below in enumerate(self._below) if below is not None}
        products |= {"output": self._output} | ({} if self._projection is None else {"projection": self._projection})
        for name, product in products.items():
            assert isinstance(product, _Int8Product)
            tensors |= {f"{name}.{part}": value for part, value in product.tensors.items()}
        return {name: value.detach() for name, value in tensors.items()}


def _tanh(x: Tensor) -> Tensor:
    """Return tanh(x) but for 2^-23, which int8 does not see. torch's own is its BLAS's, which may round as it likes."""
    return (x * 2).sigmoid_().mul_(2).sub_(1)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _table_parts(model: LSTMLanguageModel, first: LSTMLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return embedding, weight and bias that make the table: what the first layer sees in each token."""
    weight, bias = _gates_last(first.weight_ih), _gates_last(first.bias)
    return model.embedding.weight.to(dtype), weight.to(dtype), bias.to(dtype)


def _gates_last(weight: Tensor) -> Tensor:
    """Return rows in the order input, forget, output, cell: torch's has the cell third."""
    i, f, g, o = weight.chunk(4)
    return torch.cat([i, f, o, g])
