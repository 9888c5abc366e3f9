"""What could stand in place of textgen's layers, as loops over time in Python, to see what a model would learn by it.

None of it is fast, and none of it is in textgen: what is worth a kernel has to show it here first
(docs/decisions/0014-a-recipe-is-measured.md). `benchmarks.quality` trains with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textgen.model import lstm as model
from textgen.model.lstm import LSTMLayer, State
from textgen.noise import uniform
from textgen.training.step import Learner

EMBEDDING_DROPOUT = 0.1
_EMBEDDING_SITE = 1000  # the model draws its own masks at smaller ones


class Loop(LSTMLayer):
    """The cell of textgen's layer, one time step after another, in float32."""

    def forward(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """See `LSTMLayer.forward`."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        weight_hh = self.weight_hh if mask is None else self.weight_hh * mask
        with torch.autocast("cpu", enabled=False):
            hidden, cell = state[0][0].float(), state[1][0].float()  # (batch, hidden_size)
            self.begin(hidden, cell)
            outputs = []
            for now in x.float().unbind(1):
                hidden, cell = self.step(now, hidden, cell, weight_hh)
                outputs.append(hidden)
        return torch.stack(outputs, 1).to(dtype), (hidden[None].to(dtype), cell[None].to(dtype))

    def begin(self, hidden: Tensor, cell: Tensor) -> None:
        """Prepare for a window."""

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor, weight_hh: Tensor) -> State:
        """Return the state after x (batch, input_size)."""
        return self.apply_gates(F.linear(x, self.weight_ih, self.bias) + hidden @ weight_hh.T, cell)

    def apply_gates(self, gates: Tensor, cell: Tensor) -> State:
        """Return the state after gates (batch, 4 * hidden_size)."""
        let_in, forget, fresh, out = gates.chunk(4, 1)
        cell = forget.sigmoid() * cell + let_in.sigmoid() * fresh.tanh()
        return out.sigmoid() * self.seen(cell).tanh(), cell

    def seen(self, cell: Tensor) -> Tensor:
        """Return what the output sees of the cell."""
        return cell


class Mogrifier(Loop):
    """Input and last output scale each other, five rounds of it, before the cell (Melis et al. 2020, section 2)."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.to_input = nn.Parameter(torch.zeros(3, input_size, hidden_size))  # zeros scale by one
        self.to_hidden = nn.Parameter(torch.zeros(2, hidden_size, input_size))

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor, weight_hh: Tensor) -> State:
        """See `Loop.step`."""
        for i in range(3):
            x = 2 * F.linear(hidden, self.to_input[i]).sigmoid() * x
            if i < 2:
                hidden = 2 * F.linear(x, self.to_hidden[i]).sigmoid() * hidden
        return super().step(x, hidden, cell, weight_hh)


class Normalized(Loop):
    """LayerNorm of both products and of the cell (Ba et al. 2016, supplementary material)."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.of_input, self.of_hidden = (nn.LayerNorm(4 * hidden_size, bias=False) for _ in range(2))
        self.of_cell = nn.LayerNorm(hidden_size)

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor, weight_hh: Tensor) -> State:
        """See `Loop.step`."""
        gates = self.of_input(x @ self.weight_ih.T) + self.of_hidden(hidden @ weight_hh.T) + self.bias
        return self.apply_gates(gates, cell)

    def seen(self, cell: Tensor) -> Tensor:
        """See `Loop.seen`."""
        normalized: Tensor = self.of_cell(cell)
        return normalized


class Exponential(Loop):
    """An exponential input gate, a normalizer, and a stabilizer of both (Beck et al. 2024, section 2.2)."""

    normalizer: Tensor
    stabilizer: Tensor

    def begin(self, hidden: Tensor, cell: Tensor) -> None:
        """Go on with the normalizer and stabilizer of the window before, unless texts begin.

        In scoring the first rows go on while the others have ended.
        """
        rows = len(cell)
        if cell.any():
            self.normalizer, self.stabilizer = self.normalizer.detach()[:rows], self.stabilizer.detach()[:rows]
        else:
            self.normalizer, self.stabilizer = torch.zeros_like(cell), torch.zeros_like(cell)

    def apply_gates(self, gates: Tensor, cell: Tensor) -> State:
        """See `Loop.apply_gates`."""
        let_in, forget, fresh, out = gates.chunk(4, 1)
        kept = F.logsigmoid(forget) + self.stabilizer
        self.stabilizer = torch.maximum(kept, let_in)
        remembered, taken = (kept - self.stabilizer).exp(), (let_in - self.stabilizer).exp()
        cell = remembered * cell + taken * fresh.tanh()
        self.normalizer = remembered * self.normalizer + taken
        return out.sigmoid() * cell / self.normalizer, cell


class FeedForward(LSTMLayer):
    """textgen's own layer, and behind it a feed-forward of twice its width with LayerNorm and a residual connection."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.up, self.down = nn.Linear(hidden_size, 2 * hidden_size), nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, x: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """See `LSTMLayer.forward`."""
        x, state = super().forward(x, state, mask)
        return x + self.down(self.up(self.norm(x)).relu()), state


CELLS: dict[str, type[LSTMLayer]] = {
    "loop": Loop, "mogrifier": Mogrifier, "normalized": Normalized, "exponential": Exponential,
    "feed-forward": FeedForward,
}  # fmt: skip


@contextmanager
def in_place_of_layers(name: str) -> Iterator[None]:
    """Have models that are built meanwhile take a cell of `CELLS` for their layers."""
    usual, model.LSTMLayer = model.LSTMLayer, CELLS[name]  # type: ignore[misc]
    try:
        yield
    finally:
        model.LSTMLayer = usual  # type: ignore[misc]


def drop_embeddings(learner: Learner) -> None:
    """Leave tokens out of a whole step, by a hash of seed, step and token (Merity et al. 2018, section 4.3)."""

    def drop(_module: nn.Module, inputs: tuple[Tensor], rows: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return rows
        kept = uniform(learner.config.seed, learner.progression.step, _EMBEDDING_SITE, inputs[0]) >= EMBEDDING_DROPOUT
        return rows * (kept / (1 - EMBEDDING_DROPOUT))[..., None]

    learner.unwrapped_model.embedding.register_forward_hook(drop)
