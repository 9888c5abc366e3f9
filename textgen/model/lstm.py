"""LSTMLanguageModel: one forward pass for training, scoring and single decoding steps.

The file goes from parts to whole: the loss, one LSTM layer, the model. To see the model first, start at its class.
Tensors are batch first; *lane* is a row of the token stream, *window* the time steps of one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from textgen.config import ModelConfig
from textgen.errors import TextgenError, in_backticks
from textgen.kernels import fused
from textgen.kernels import training as training_kernels
from textgen.noise import hash_bits, uniform

# (hidden, cell), each (num_layers, batch, hidden_size)
State = tuple[Tensor, Tensor]

# Number of logits in memory at a time, by device type. A step of 128 x 64 tokens over a vocabulary of 8,192 has 2^26
# logits, three times over with softmax and gradient. On a CPU a chunk fits the caches; on a GPU it only has to be
# large enough to keep the device busy.
LOGITS_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}
_OTHER_LOGITS_CHUNK = 1 << 24

# The coordinate of `noise.hash_bits` that separates weight drop's masks from dropout's. Weight drop counts down from
# here, one per layer. Dropout counts up from 0: the embedding's output, then each layer's output.
_WEIGHT_SITE = -2

NAMED_LABELS = 20  # in an error


@dataclass(frozen=True)
class DropoutMasks:
    """What identifies the masks of a step. Masks are hashes of it, so no random generator's state has to be saved."""

    seed: int
    step: int | Tensor  # a CUDA graph replays many steps, and reads the step from an int64 scalar
    lanes: Tensor  # (batch,) int64, global lane of each row


# --- the loss --------------------------------------------------------------------------------------------------------


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy of a linear layer, computed in chunks of rows so that all logits never exist at once.

    The forward pass also computes the gradients, while a chunk's logits are in memory; the backward pass only scales
    them. This takes three matrix products per chunk, as the plain way does. Recomputing the logits in the backward
    pass would take a fourth (docs/decisions/0004).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> Tensor:
        low_x, low_weight = x.to(dtype), weight.to(dtype)
        grad_x = torch.empty_like(low_x) if with_gradient else None
        grad_weight = torch.zeros_like(weight) if with_gradient else None
        grad_bias = torch.zeros_like(bias) if with_gradient else None
        total = torch.zeros((), device=x.device)
        rows = max(LOGITS_CHUNK.get(x.device.type, _OTHER_LOGITS_CHUNK) // len(weight), 1)
        if rows > 64:  # products of 524 rows took 6 % longer than those of 512 (bfloat16, Zen 4, 2026-11-29)
            rows -= rows % 64
        for start in range(0, len(x), rows):
            part = low_x[start : start + rows]  # (rows, size)
            logits = part @ low_weight.T  # (rows, vocab_size)
            nats, grad_logits = cross_entropy_of_logits(logits, bias, targets[start : start + rows], grad_bias)
            total += nats
            if grad_x is not None and grad_weight is not None:
                torch.mm(grad_logits, low_weight, out=grad_x[start : start + rows])
                grad_weight += grad_logits.T @ part  # (vocab_size, size)
            del logits, grad_logits  # else they live until the next chunk has its own
        if grad_x is not None and grad_weight is not None and grad_bias is not None:
            ctx.save_for_backward(grad_x, grad_weight, grad_bias)
            ctx.x_dtype = x.dtype  # type: ignore[attr-defined]
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_x = (grad_x.float() * grad).to(ctx.x_dtype)  # type: ignore[attr-defined]
        return grad_x, grad_weight * grad, grad_bias * grad, None, None, None


def cross_entropy_of_logits(
    logits: Tensor, bias: Tensor, targets: Tensor, grad_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of some rows, in nats, and the gradient of their logits.

    With z = logits + bias and target t, nats = log(sum_j exp(z_j)) - z_t, hence d nats / d z_j = softmax(z)_j - [j = t]
    (Bishop 2006, "Pattern Recognition and Machine Learning", section 4.3.4). Both stay as they are if the largest z is
    subtracted first, which keeps exp from overflowing.

    Args:
        logits: (rows, vocab_size), without the bias; may be overwritten.
        bias: (vocab_size,).
        targets: (rows,) int64; -1 is not scored and has no gradient.
        grad_bias: (vocab_size,), the gradients are added to it; None if no gradient is needed.

    Returns:
        A scalar; and (rows, vocab_size) in the dtype of the logits, without meaning if grad_bias is None.
    """
    kernels = fused.kernels(logits.device) or training_kernels
    nats: Tensor | None = kernels.cross_entropy(logits, bias, targets, grad_bias)  # compiled code, if there is some
    if nats is not None:
        return nats.sum(), logits  # the compiled code has overwritten the logits by their gradient
    exact = logits.float().add_(bias)  # (rows, vocab_size)
    scored = targets[:, None] >= 0  # (rows, 1)
    columns = targets[:, None].clamp(min=0)  # (rows, 1)
    target_logits, peaks = exact.gather(1, columns), exact.amax(1, keepdim=True)  # (rows, 1)
    softmax = exact.sub_(peaks).exp_()  # in place; the division by its sums comes later
    sums = softmax.sum(1, keepdim=True)  # (rows, 1)
    total = ((sums.log() + peaks - target_logits) * scored).sum()
    if grad_bias is None:
        return total, logits
    minus_one = softmax.new_full((1, 1), -1.0).expand_as(columns)
    grad_logits = softmax.div_(sums).scatter_add_(1, columns, minus_one).mul_(scored)
    grad_bias += grad_logits.sum(0)
    return total, grad_logits.to(logits.dtype)


def summed_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of a linear output layer without holding all its logits.

    Args:
        x: (rows, size).
        weight: (vocab_size, size).
        bias: (vocab_size,).
        targets: (rows,) int64; -1 is not scored.

    Returns:
        Nats, a float32 scalar. Matrix products run in autocast's dtype if it is on; everything else is float32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        nats: Tensor = _SummedCrossEntropy.apply(x, weight, bias, targets, dtype, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return nats


# --- one layer -------------------------------------------------------------------------------------------------------


class LSTMLayer(nn.Module):
    """One LSTM layer over torch's fused kernel, with float32 weights that are cast at each call.

    `nn.LSTM` is not used: autocast on CUDA runs it in float16 whatever dtype was asked for, and its
    `flatten_parameters` makes all its tensors views of one storage, which safetensors would store once
    (docs/decisions/0002). torch's second bias only adds to the first, so there is one.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        # rows in torch's order of gates: input, forget, cell, output
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))

    def forward(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Run over a window.

        Args:
            x: (batch, time, input_size).
            state: hidden and cell, each (1, batch, hidden_size).
            mask: (4 * hidden_size, hidden_size), multiplies the recurrent weights.

        Returns:
            (batch, time, hidden_size) and the new state, in autocast's dtype if it is on, else the weights'.

        Raises:
            ValueError: shapes do not fit; torch's kernel would read beyond the tensors.
        """
        state_shape = 1, len(x), self.weight_hh.shape[1]
        if x.shape[2] != self.weight_ih.shape[1] or any(part.shape != state_shape for part in state):
            raise ValueError(f"x of {tuple(x.shape)} and a state of {tuple(state[0].shape)} do not fit the layer")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight_ih.dtype
        weight_hh = self.weight_hh if mask is None else self.weight_hh * mask
        if dtype == torch.bfloat16:
            compiled = training_kernels.lstm(x, state, self.weight_ih, weight_hh, self.bias)
            if compiled is not None:  # a CPU that has faster code than torch's
                return compiled
        weights = self._cast_weights(dtype, weight_hh)
        with torch.autocast(device, enabled=False):
            y, hidden, cell = torch.lstm(
                x.to(dtype),
                [part.to(dtype) for part in state],
                weights,
                has_biases=True,
                num_layers=1,
                dropout=0.0,
                train=self.training,
                bidirectional=False,
                batch_first=True,
            )
        return y, (hidden, cell)

    def _cast_weights(self, dtype: torch.dtype, weight_hh: Tensor) -> list[Tensor]:
        """Return weights and two biases in `dtype`; on CUDA as views of one buffer, as cuDNN needs them."""
        weights = [self.weight_ih, weight_hh, self.bias, torch.zeros_like(self.bias)]
        if self.weight_ih.device.type != "cuda":
            return [w.to(dtype) for w in weights]
        flat = torch.cat([w.flatten().to(dtype) for w in weights])
        parts = torch.split(flat, [w.numel() for w in weights])
        return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]


# --- the model -------------------------------------------------------------------------------------------------------


class LSTMLanguageModel(nn.Module):
    """Embedding, stacked LSTM layers, projection and output layer.

    Args:
        config: the shape.
        vocab_size: number of tokens.
        unigram_counts: (vocab_size,), how often each token occurs in the training text. The output bias starts at the
            tokens' log frequency, which saves the first hundred or so steps.
        text: how text became tokens, kept in config.json: `tokenizer_sha256`, `normalization`.
        labels: names of the labels that documents may begin with. Label k is the input `vocab_size` + k; the output
            layer has tokens alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        unigram_counts: Tensor | None = None,
        text: Mapping[str, str] | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.text, self.labels = config, vocab_size, dict(text or {}), tuple(labels)
        self._label_ids = {label: vocab_size + place for place, label in enumerate(self.labels)}
        # On the meta device nn.Embedding gets an empty weight. If it drew one there, torch would import its compiler,
        # which takes longer than the rest of loading a model.
        shape = vocab_size, config.embedding_dim
        self.embedding = nn.Embedding(*shape, _weight=torch.empty(shape) if torch.empty(0).is_meta else None)
        # No weight is drawn here, so that labels change no other weight of the same seed.
        shape = len(labels), config.embedding_dim
        self.label_embedding = nn.Embedding(*shape, _weight=torch.empty(shape)) if labels else None
        sizes = [config.embedding_dim] + [config.hidden_size] * config.num_layers
        self.layers = nn.ModuleList(LSTMLayer(a, b) for a, b in pairwise(sizes))
        num_norms = config.num_layers if config.layer_norm else 0
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size) for _ in range(num_norms))
        # A tied output layer is the embedding matrix: hidden_size has to be projected to embedding_dim.
        self.projection: nn.Module = nn.Identity()
        if config.tie_weights and config.projection:
            self.projection = nn.Linear(config.hidden_size, config.embedding_dim)
        output_size = config.embedding_dim if config.tie_weights else config.hidden_size
        self.output = nn.Linear(output_size, vocab_size)
        if config.tie_weights:
            self.output.weight = self.embedding.weight
        self.initialize(unigram_counts)

    @torch.no_grad()
    def initialize(self, unigram_counts: Tensor | None = None) -> None:
        """Draw initial weights from torch's default generator; on the meta device do nothing."""
        if self.output.bias.is_meta:
            return
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_dim**-0.5)
        for layer in self.layers:
            assert isinstance(layer, LSTMLayer)
            nn.init.xavier_uniform_(layer.weight_ih)
            for gate in layer.weight_hh.chunk(4):
                nn.init.orthogonal_(gate)
            layer.bias.chunk(4)[1].fill_(1.0)  # forget gate open (Jozefowicz et al. 2015, section 2.2)
        if not self.config.tie_weights:
            nn.init.normal_(self.output.weight, std=self.config.hidden_size**-0.5)
        self.output.bias.zero_()
        if unigram_counts is not None:
            counts = unigram_counts.float() + 1  # add-one smoothing: a token that never occurs has a finite bias
            self.output.bias.copy_((counts / counts.sum()).log())
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.weight, std=self.config.embedding_dim**-0.5)

    @torch.no_grad()
    def remember_labels(self, end: int) -> None:
        """Let some cells of the first layer keep the label of a text from its first input to its last.

        Gradients reach back to the start of a window only, and an LSTM forgets within tens of tokens at first. So a
        training hardly learns to keep a label. Here an eighth of the cells starts behind closed gates, which one
        direction of the embedding opens. Labels and the end-of-text point there, other tokens do not. Each of them
        writes its random code, and replaces that of the text before. What the codes mean is learned, and all these
        weights are trained like others. Gates that keep a value are those of Hochreiter and Schmidhuber 1997 ("Long
        Short-Term Memory", section 4).

        Draws from torch's default generator.

        Args:
            end: id of the end-of-text token, the first input of a text without a label.
        """
        assert self.label_embedding is not None
        layer, rows = self.layers[0], self.label_embedding.weight
        assert isinstance(layer, LSTMLayer)
        size, opening = layer.weight_hh.shape[1], torch.randn(rows.shape[1])
        cells = max(size // 8, 1)
        opening /= opening.norm()
        codes = torch.randn(cells, rows.shape[1])
        codes -= (codes @ opening)[:, None] * opening
        # Gates are sigmoids: -8 is closed and -8 + 2 * 8 is open. The forget gate is open while a cell is kept.
        for gate, weight_ih, bias in ((0, 2 * opening, -8.0), (1, -2 * opening, 8.0), (2, codes, 0.0)):
            own = slice(gate * size, gate * size + cells)
            layer.weight_ih[own], layer.weight_hh[own], layer.bias[own] = weight_ih, 0.0, bias
        rows *= 3  # clear codes
        for weight in (rows, self.embedding.weight[end]):
            weight -= (weight @ opening)[..., None] * opening
            weight += 8 * opening

    @property
    def num_parameters(self) -> int:
        """Number of trained values; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_labels(self) -> int:
        """Number of labels; their inputs follow the tokens' ids."""
        return len(self.labels)

    def label_id(self, label: str) -> int:
        """Return the input that a document with this label begins with.

        Raises:
            TextgenError: the model does not know the label.
        """
        if not self.labels:
            raise TextgenError(f"label {label!r}: the model was trained without labels")
        if label not in self._label_ids:
            more = f" and {self.num_labels - NAMED_LABELS} more" if self.num_labels > NAMED_LABELS else ""
            raise TextgenError(f"no label {label!r}; the model has {in_backticks(self.labels[:NAMED_LABELS])}{more}")
        return self._label_ids[label]

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the embeddings of inputs, tokens and labels: (batch, time) to (batch, time, embedding_dim)."""
        if self.label_embedding is None:
            embedded: Tensor = self.embedding(inputs)
            return embedded
        is_label = inputs >= self.vocab_size
        of_labels = self.label_embedding((inputs - self.vocab_size).clamp(min=0))
        return torch.where(is_label[..., None], of_labels, self.embedding(inputs.masked_fill(is_label, 0)))

    def input_weight(self) -> Tensor:
        """Return the embeddings of all inputs, tokens before labels: (vocab_size + num_labels, embedding_dim)."""
        weight = self.embedding.weight
        return weight if self.label_embedding is None else torch.cat([weight, self.label_embedding.weight])

    def zero_state(self, batch_size: int) -> State:
        """Return the state before any text: two float32 zeros (num_layers, batch_size, hidden_size)."""
        shape = (self.config.num_layers, batch_size, self.config.hidden_size)
        zeros = torch.zeros(shape, device=self.embedding.weight.device)
        return zeros, zeros.clone()

    def forward(
        self, tokens: Tensor, state: State, targets: Tensor | None = None, *, masks: DropoutMasks | None = None
    ) -> tuple[Tensor, State]:
        """Read a window of tokens.

        Args:
            tokens: (batch, time) int64, below `vocab_size` + `num_labels`.
            state: hidden and cell, each (num_layers, batch, hidden_size), as an earlier call returned them.
            targets: (batch, time) int64, the token after each; -1 is not scored.
            masks: coordinates of the masks for `dropout` and `weight_drop`; None turns both off.

        Returns:
            Without targets the logits (batch, time, vocab_size), with them the nats summed over all targets, a
            scalar; both float32. And the new state, in the dtype that the LSTM computed in.
        """
        x = self._drop(self.embed(tokens), masks, 0)  # (batch, time, embedding_dim)
        states = [(state[0][i : i + 1], state[1][i : i + 1]) for i in range(len(self.layers))]
        x, states = self.run_layers(x, states, masks)  # (batch, time, hidden_size)
        state = torch.cat([hidden for hidden, _ in states]), torch.cat([cell for _, cell in states])
        if self.norms:
            x = self.norms[-1](x)
        x = self.projection(x)  # (batch, time, embedding_dim if weights are tied, else hidden_size)
        if targets is None:
            return self.output(x).float(), state  # (batch, time, vocab_size)
        x = x.flatten(0, 1)  # (batch * time, size)
        return summed_cross_entropy(x, self.output.weight, self.output.bias, targets.flatten()), state

    def run_layers(self, x: Tensor, states: list[State], masks: DropoutMasks | None) -> tuple[Tensor, list[State]]:
        """Run the layers one after the other. A subclass may run them in another order.

        Args:
            x: (batch, time, embedding_dim).
            states: of each layer, hidden and cell, each (1, batch, hidden_size).
            masks: as in `forward`.

        Returns:
            (batch, time, hidden_size) and the new states.
        """
        states = list(states)
        for i in range(len(self.layers)):
            x, states[i] = self.run_layer(i, x, states[i], masks, self.weight_mask(masks, i))
        return x, states

    def run_layer(
        self, i: int, x: Tensor, state: State, masks: DropoutMasks | None, weight_mask: Tensor | None
    ) -> tuple[Tensor, State]:
        """Run layer i with its norm, residual sum and dropout; return (batch, time, hidden_size) and its state."""
        before = x
        if i > 0 and self.norms:
            x = self.norms[i - 1](x)
        x, state = self.layers[i](x, state, weight_mask)
        if i > 0 and self.config.residual:
            x = x + before
        return self._drop(x, masks, i + 1), state

    def weight_mask(self, masks: DropoutMasks | None, layer: int) -> Tensor | None:
        """Return the mask that multiplies a layer's recurrent weights, one per step; None if no weight is dropped.

        Weight drop is that of Merity et al. 2018 ("Regularizing and Optimizing LSTM Language Models", section 2). One
        byte of a 64-bit hash decides on each weight: one hash per weight would take longer than the layer.

        Returns:
            (4 * hidden_size, hidden_size): 0, or the reciprocal of the kept share.
        """
        dropped = min(round(256 * self.config.weight_drop), 255)  # of the 256 values of a byte
        if masks is None or dropped == 0:
            return None
        size, site, device = self.config.hidden_size, _WEIGHT_SITE - layer, masks.lanes.device
        if (kernels := fused.kernels(device)) is not None:
            mask: Tensor = kernels.weight_mask(
                size, step=masks.step, seed=masks.seed, site=site, dropped=dropped, device=device
            )
            return mask
        count = 4 * size * size
        hashes = torch.arange(-(-count // 8), device=device)  # eight weights each
        random_bytes = hash_bits(masks.seed, masks.step, site, hashes).view(torch.uint8)[:count]
        return ((random_bytes >= dropped) * (256 / (256 - dropped))).view(4 * size, size)

    def _drop(self, x: Tensor, masks: DropoutMasks | None, site: int) -> Tensor:
        """Apply locked dropout to x (batch, time, size): a lane drops the same units at all time steps of a window.

        Gal and Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks".
        """
        if masks is None or self.config.dropout == 0:
            return x
        if (kernels := fused.kernels(x.device)) is not None:
            dropped: Tensor = kernels.drop(
                x, masks.lanes, step=masks.step, seed=masks.seed, site=site, dropout=self.config.dropout
            )
            return dropped
        lanes, units = masks.lanes[:, None], torch.arange(x.shape[2], device=x.device)
        kept = uniform(masks.seed, masks.step, site, lanes, units) >= self.config.dropout  # (batch, size)
        return x * (kept / (1 - self.config.dropout)).to(x.dtype)[:, None]

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a file by name: the weights themselves, without a tied output matrix."""
        skip = {"output.weight"} if self.config.tie_weights else set()
        return {name: value.detach() for name, value in self.state_dict().items() if name not in skip}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `state_tensors`."""
        return {name: tuple(value.shape) for name, value in self.state_tensors().items()}
