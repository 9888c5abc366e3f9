"""One decoding step as an ONNX file, and a decoder that runs this file with onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textgen.decoding.decoders import Decoder, DecoderState
from textgen.model.lstm import LSTMLanguageModel, LSTMLayer


class _Step(nn.Module):
    """A step of the model in plain operators, one matrix product per layer: faster than ONNX's LSTM operator."""

    def __init__(self, model: LSTMLanguageModel) -> None:
        super().__init__()
        self.model = model
        layers = [layer for layer in model.layers if isinstance(layer, LSTMLayer)]
        self.weights = nn.ParameterList(torch.cat([layer.weight_ih, layer.weight_hh], 1) for layer in layers)

    def forward(self, tokens: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, hidden states and cells; arguments as in `write_onnx`."""
        model, x = self.model, self.model.embed(tokens)  # (batch, embedding_dim)
        states = []
        for index, (weight, layer) in enumerate(zip(self.weights, model.layers, strict=True)):
            residual, bias = x, layer.bias
            assert isinstance(bias, Tensor)
            if index > 0 and len(model.norms):
                x = model.norms[index - 1](x)
            gates = F.linear(torch.cat([x, hidden[index]], 1), weight, bias)
            i, f, g, o = gates.chunk(4, 1)
            new_cell = f.sigmoid() * cell[index] + i.sigmoid() * g.tanh()
            x = o.sigmoid() * new_cell.tanh()
            states.append((x, new_cell))
            if index > 0 and model.config.residual:
                x = x + residual
        if len(model.norms):
            x = model.norms[-1](x)
        return (
            model.output(model.projection(x)),
            torch.stack([new_hidden for new_hidden, _ in states]),
            torch.stack([new_cell for _, new_cell in states]),
        )


def write_onnx(model: LSTMLanguageModel, path: Path) -> None:
    """Write one decoding step of a model as an ONNX file.

    Its inputs are `tokens` (batch,), of which the first may be a label, and `hidden` and `cell` (num_layers, batch,
    hidden_size); its outputs are `logits` (batch, vocab_size), `new_hidden` and `new_cell`.
    """
    hidden, cell = model.zero_state(2)
    batch = torch.export.Dim("batch", min=1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # its log is not for users
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # torch warns about its own code
        program = torch.onnx.export(
            _Step(model).eval(),
            (torch.zeros(2, dtype=torch.int64), hidden, cell),
            input_names=["tokens", "hidden", "cell"],
            output_names=["logits", "new_hidden", "new_cell"],
            dynamic_shapes=({0: batch}, {1: batch}, {1: batch}),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        # written beside the file and renamed: `path` never holds half a file
        aside = path.with_name(f".{path.name}.tmp")
        program.save(aside, external_data=False)
    aside.replace(path)


class OnnxDecoder(Decoder):
    """Decodes with a file of `write_onnx`. The model itself reads the prompts.

    Args:
        model: the model of the file.
        path: the file.
        threads: number of onnxruntime's threads; default torch's number.
    """

    name = "onnxruntime"

    def __init__(self, model: LSTMLanguageModel, path: Path, *, threads: int | None = None) -> None:
        import onnxruntime

        super().__init__(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # if its threads spin while torch's threads draw, a step takes 3.9 ms, not 0.5
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token per row; arguments and results are those of `Decoder.step`."""
        inputs = {"tokens": tokens, "hidden": torch.stack(state[::2]), "cell": torch.stack(state[1::2])}
        results = self._session.run(None, {name: value.numpy() for name, value in inputs.items()})
        logits, hidden, cell = (torch.from_numpy(result) for result in results)
        return logits, [part[i] for i in range(len(hidden)) for part in (hidden, cell)]
