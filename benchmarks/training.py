"""Training speed beside a plain PyTorch loop: `python -m benchmarks.training`.

Both train the same shape on the same tokens; rounds are interleaved, so that a busy machine slows both. The plain
loop is what one would write by hand: nn.LSTM, a Linear on all outputs, F.cross_entropy, Adam, in float32 and under bf16
autocast.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import save
from textgen.config import ModelConfig
from textgen.model import LSTMLanguageModel

SHAPES = {"quick": (4000, 256, 512, 1, 32, 32), "bare defaults": (8192, 256, 512, 2, 128, 64)}
ROUNDS = 7


class Plain(nn.Module):
    """The textbook model."""

    def __init__(self, vocab_size: int, embedding_dim: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.lstm = nn.LSTM(embedding_dim, hidden_size, num_layers, batch_first=True)
        self.projection = nn.Linear(hidden_size, embedding_dim)
        self.output = nn.Linear(embedding_dim, vocab_size)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss."""
        x, _ = self.lstm(self.embedding(tokens))
        return F.cross_entropy(self.output(self.projection(x)).flatten(0, 1), targets.flatten())


def step_of(shape: tuple[int, ...], *, plain: bool, bf16: bool, device: torch.device) -> Callable[[], None]:
    """Return a function that takes one optimizer step."""
    vocab_size, embedding_dim, hidden_size, num_layers, batch, time_steps = shape
    tokens = torch.randint(0, vocab_size, (batch, time_steps + 1), device=device)
    model: nn.Module
    if plain:
        model = Plain(vocab_size, embedding_dim, hidden_size, num_layers).to(device)
    else:
        config = ModelConfig(embedding_dim=embedding_dim, hidden_size=hidden_size, num_layers=num_layers)
        model = LSTMLanguageModel(config, vocab_size).to(device)
    optimizer = torch.optim.Adam(model.parameters(), fused=not plain)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if isinstance(model, LSTMLanguageModel):
                loss = model(tokens[:, :-1], model.zero_state(batch), tokens[:, 1:])[0] / (batch * time_steps)
            else:
                loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    return step


def main() -> None:
    """Measure all variants in turns and print tokens per second."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {}
    for name, shape in SHAPES.items():
        variants = {
            f"{'plain' if plain else 'textgen'} {'bf16' if bf16 else 'fp32'}": step_of(
                shape, plain=plain, bf16=bf16, device=device
            )
            for plain in (True, False)
            for bf16 in (False, True)
        }
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(ROUNDS):
            for variant, step in variants.items():
                started = time.perf_counter()
                step()
                seconds[variant].append(time.perf_counter() - started)
        for variant, times in seconds.items():
            rates = sorted(shape[4] * shape[5] / t for t in times[1:])
            median = statistics.median(rates)
            figures[f"{name}: {variant}"] = {
                "tokens_per_second": round(median), "lowest": round(rates[0]),
                "highest": round(rates[-1]),
            }  # fmt: skip
            print(f"{name:14} {variant:13} {median:10,.0f} tokens/s ({rates[0]:,.0f} to {rates[-1]:,.0f})")
    save("training", figures)


if __name__ == "__main__":
    main()
