"""Decoders: one step of a trained model, as fast as the device can read its weights.

A decoder reads one token per row and returns the logits of the next token. `Decoder` calls the model's own `forward`,
which defines the correct result. `CellDecoder` computes the same from rearranged weights: a table holds the first LSTM
layer's input product of every token, and each layer is one matrix product on weights that are packed once, not at every
call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from textgen.decoding.products import Int8Product, PackedProduct, PlainProduct, Product, has_packed_product
from textgen.kernels import decoding as decoding_kernels
from textgen.model.lstm import LSTMLanguageModel, LSTMLayer, State

if TYPE_CHECKING:
    from textgen.decoding.pieces import PieceReader
    from textgen.decoding.reading import ReadState

CellDtype = Literal["float32", "bfloat16", "int8"]

# The state that a decoder carries from token to token: tensors whose first dimension is the batch.
DecoderState = list[Tensor]


# A prompt is read in windows of this many tokens, so that the memory it takes does not grow with its length.
PREFILL_WINDOW = 512


# --- decoders --------------------------------------------------------------------------------------------------------


class Decoder:
    """Reads tokens, one per row and step. This class calls the model itself: slow, and correct by definition.

    Args:
        model: on the device on which it is to decode.
        why: reason of the choice, for the description.
    """

    name = "plain"
    in_graphs = False
    """whether batches should run in CUDA graphs, see `cuda_graphs.GraphRunner`"""
    kernel: decoding_kernels.Int8Step | None = None
    """the same step in compiled code; None if there is none for this model, device or processor"""
    pieces: PieceReader | None = None
    """reads short prompts side by side on a GPU; None if the model or single steps read them"""

    def __init__(self, model: LSTMLanguageModel, *, why: str = "") -> None:
        self.model, self._why = model, why
        self.vocab_size = model.vocab_size
        self.device = model.embedding.weight.device

    @property
    def fused(self) -> tuple[str, ...]:
        """Names of the operations that fused kernels compute, see `fused.FusedDecoder`."""
        return ()

    @property
    def description(self) -> str:
        """Return name, device and reason of the choice as one line."""
        device = f"{self.device.type}, in graphs" if self.in_graphs else self.device.type
        return f"{self.name} decoder on {device}" + (f": {self._why}" if self._why else "")

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], *, read: ReadState | None = None) -> DecoderState:
        """Return the state (1, ...) after all tokens of a prompt but the last one, which the first `step` reads.

        Args:
            tokens: of the prompt.
            read: a state after some first tokens of the prompt, which are not read again.
        """
        model, num_read = self.model, read.num_read if read is not None else 0
        ids = torch.tensor([tokens[:-1]], dtype=torch.int64, device=self.device)
        state = model_state(model, read.state if read is not None else [])
        for start in range(num_read, ids.shape[1], PREFILL_WINDOW):
            window = ids[:, start : start + PREFILL_WINDOW]
            # targets of -1 are not scored, so the model computes no logits
            _, state = model(window, state, torch.full_like(window, -1))
        return decoder_state(state)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row.

        Args:
            tokens: (batch,) int64; a label is one too, see `LSTMLanguageModel.label_id`.
            state: hidden state and cell of the first layer, then of the second and so on, each (batch, hidden_size).

        Returns:
            Logits (batch, vocab_size), float32, and the new state.
        """
        logits, new_state = self.model(tokens[:, None], model_state(self.model, state))
        return logits[:, 0], decoder_state(new_state)

    def read(self, tokens: Tensor, state: DecoderState) -> DecoderState:
        """Return the new state of `step` alone."""
        return self.step(tokens, state)[1]


def model_state(model: LSTMLanguageModel, state: DecoderState) -> State:
    """Return a decoder's state as the model's: hidden and cell, each (num_layers, batch, hidden_size).

    An empty state is that of one row at its first token.
    """
    return (torch.stack(state[::2]), torch.stack(state[1::2])) if state else model.zero_state(1)


def decoder_state(state: State) -> DecoderState:
    """Return a model's state as a decoder's, see `Decoder.step`."""
    return [part[i] for i in range(len(state[0])) for part in state]


class CellDecoder(Decoder):
    """Computes one LSTM cell per layer and step, on packed weights.

    Args:
        model: must not change afterwards: some weights are copied, others are shared.
        dtype: of the matrix products. bfloat16 products have float32 sums. int8 weights have a scale per output; the
            inputs of an int8 product have a constant scale or one per row, so that a row does not depend on the others.
            State and everything else are float32, but the table is bfloat16 unless `dtype` is float32.
        why: reason of the choice, for the description.
    """

    def __init__(self, model: LSTMLanguageModel, dtype: CellDtype = "float32", *, why: str = "") -> None:
        super().__init__(model, why=why)
        self.name = dtype
        config, has_norms = model.config, len(model.norms) > 0
        packs = self.device.type == "cpu" and dtype != "int8" and has_packed_product(_DTYPES[dtype])
        float_product = PackedProduct if packs else PlainProduct

        def is_bounded(num_layers: int) -> bool:
            """Return whether the output of the first `num_layers` layers is within -1..1.

            Hidden states do. Norms and residual sums do not.
            """
            return not has_norms and (num_layers == 1 or not config.residual)

        def pack(weight: Tensor, bias: Tensor | None = None, *, bounded: bool) -> Product:
            if dtype == "int8":
                return Int8Product(weight, bias, bounded=bounded)
            return float_product(weight, bias, dtype=_DTYPES[dtype])

        with torch.no_grad():
            layers = [layer for layer in model.layers if isinstance(layer, LSTMLayer)]
            # First layer: the gates of a token are its row of the table plus the product on the hidden state. The
            # table holds input product and bias of every token of the vocabulary, and of every label.
            first = layers[0]
            table_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
            self._table = F.linear(*table_parts(model, first, table_dtype))  # (inputs, 4 x hidden_size)
            self._recurrent: list[Product] = [pack(gates_last(first.weight_hh), bounded=True)]
            self._inputs: list[Product | None] = [None]
            # Later layers: one product on the layer's input and hidden state side by side. In int8 an input that is not
            # bounded needs a separate scale, so it gets a separate product.
            for i, layer in enumerate(layers[1:], 1):
                joined = dtype != "int8" or is_bounded(i)
                weight = gates_last(layer.weight_ih, layer.weight_hh) if joined else gates_last(layer.weight_hh)
                self._recurrent.append(pack(weight, gates_last(layer.bias), bounded=True))
                self._inputs.append(None if joined else pack(gates_last(layer.weight_ih), bounded=False))
            # Projection, if the model has one, then the output layer. The result of a projection is not bounded.
            projection, bounded = model.projection, is_bounded(config.num_layers)
            self._projection: Product | None = None
            if isinstance(projection, torch.nn.Linear):
                self._projection, bounded = pack(projection.weight, projection.bias, bounded=bounded), False
            self._output = pack(model.output.weight, model.output.bias, bounded=bounded)

    @functools.cached_property
    def kernel(self) -> decoding_kernels.Int8Step | None:  # type: ignore[override]
        """Return the same step in compiled code; None if there is none for this model, device or processor."""
        config = self.model.config
        bounded = len(self.model.norms) == 0 and (config.num_layers == 1 or not config.residual)
        # torch computes the last elements of an array whose length is no multiple of 32 with another `exp`
        whole = config.hidden_size % 32 == 0 and config.embedding_dim % 32 == 0
        usable = self.name == "int8" and self.device.type == "cpu" and bounded and whole
        if not (usable and decoding_kernels.has_int8_step()):
            return None
        products = [cast(Int8Product, p) for p in (*self._recurrent, self._projection, self._output) if p is not None]
        return decoding_kernels.Int8Step(
            self._table, [product.parts for product in products], config.num_layers, vocab_size=self.vocab_size
        )

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row; arguments and results are those of `Decoder.step`."""
        return self._step_by_operators(tokens, state) if self.kernel is None else self.kernel(tokens, state)

    def _step_by_operators(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row with torch's operators."""
        config, norms, new_state = self.model.config, self.model.norms, []
        tanh = _tanh if self.name == "int8" else torch.tanh
        size, x = config.hidden_size, state[0]
        for i, recurrent in enumerate(self._recurrent):
            hidden, cell = state[2 * i : 2 * i + 2]
            residual = x
            # the gates in the order input, forget, output, cell: (batch, 4 x hidden_size)
            if i == 0:
                gates = recurrent(hidden).add_(self._table.index_select(0, tokens))
            else:
                x, input_product = (norms[i - 1](x) if len(norms) else x), self._inputs[i]
                if input_product is None:
                    gates = recurrent(torch.cat([x, hidden], 1))
                else:
                    gates = recurrent(hidden).add_(input_product(x))
            # one sigmoid for the first three gates, in place
            ifo = gates[:, : 3 * size].sigmoid_()
            cell = (ifo[:, size : 2 * size] * cell).addcmul_(ifo[:, :size], tanh(gates[:, 3 * size :]))
            x = hidden = ifo[:, 2 * size :] * tanh(cell)
            if i > 0 and config.residual:
                x = x + residual
            new_state += [hidden, cell]
        if len(norms):
            x = norms[-1](x)
        if self._projection is not None:
            x = self._projection(x)
        return self._output(x), new_state

    def int8_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that define an int8 decoder, by name: the content of `decoder.safetensors`.

        Rows of `cells` and `below` are in the order input, forget, output, cell.
        """
        first = self.model.layers[0]
        assert isinstance(first, LSTMLayer)
        embedding, weight, bias = table_parts(self.model, first, torch.bfloat16)
        tensors = {"embedding": embedding, "table.weight": weight, "table.bias": bias}
        tensors |= {f"norms.{name}": value for name, value in self.model.norms.named_parameters()}
        products = {f"cells.{i}": product for i, product in enumerate(self._recurrent)}
        products |= {f"below.{i}": product for i, product in enumerate(self._inputs) if product is not None}
        products |= {"output": self._output} | ({} if self._projection is None else {"projection": self._projection})
        for name, product in products.items():
            assert isinstance(product, Int8Product)
            tensors |= {f"{name}.{part}": value for part, value in product.tensors.items()}
        return {name: value.detach() for name, value in tensors.items()}


def _tanh(x: Tensor) -> Tensor:
    """Return tanh(x) with an error of up to 2^-23, which int8 does not notice.

    torch.tanh calls torch's BLAS library, which does not fix how it rounds.
    """
    return (x * 2).sigmoid_().mul_(2).sub_(1)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def table_parts(model: LSTMLanguageModel, first: LSTMLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return embedding, weight and bias whose product is the table: the first layer's input product of each token."""
    weight, bias = gates_last(first.weight_ih), gates_last(first.bias)
    return model.input_weight().to(dtype), weight.to(dtype), bias.to(dtype)


def gates_last(*weights: Tensor) -> Tensor:
    """Return weights (4 x hidden_size, ...) side by side, with rows in the order input, forget, output, cell.

    torch's order is input, forget, cell, output. Every weight is copied once, as copies take much of a short command.
    """
    first, chunks = weights[0], [weight.detach().chunk(4) for weight in weights]
    width = [sum(weight.shape[1] for weight in weights)] if first.dim() > 1 else []
    joined = first.new_empty(len(first), *width)
    for out, gate in zip(joined.chunk(4), (0, 1, 3, 2), strict=True):
        torch.cat([parts[gate] for parts in chunks], -1, out=out)
    return joined
