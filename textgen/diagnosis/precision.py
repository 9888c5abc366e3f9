"""The dtypes in which an LSTM trains on this device, and their speed."""

from __future__ import annotations

import os

import torch

from textgen.config import ModelConfig, TrainConfig
from textgen.diagnosis.results import Check
from textgen.diagnosis.timing import median_seconds
from textgen.distributed import launch
from textgen.hardware import has_bfloat16
from textgen.model.lstm import LSTMLanguageModel

MATRIX_SIZE = {"cpu": 256, "cuda": 4096}
"""rows and columns of the product that is timed, by type of device"""


def check_precision(config: TrainConfig, device: torch.device, joined_in: str | None = None) -> Check:
    """Train one step of a tiny LSTM in each dtype, and time a matrix product relative to float32.

    Args:
        config: of the training.
        device: of this process.
        joined_in: the precision that the processes chose; None if they did not join.
    """
    use_cpu = device.type == "cpu"
    environment = os.environ.get("ACCELERATE_MIXED_PRECISION")
    chosen = joined_in or launch.resolve_precision(config.mixed_precision, environment, use_cpu=use_cpu)
    value: dict[str, str | int | float] = {"training": chosen}
    seconds = _product_seconds(torch.float32, device)
    for dtype in launch.LSTM_DTYPES.values():
        speed = 1.0 if dtype == torch.float32 else seconds / _product_seconds(dtype, device)
        value[_name(dtype)] = round(speed, 2) if _trains_in(dtype, device) else "does not train"
    if not use_cpu:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        value["tf32"] = round(seconds / _product_seconds(torch.float32, device), 2)
        torch.set_float32_matmul_precision(before)
    if isinstance(value[_name(launch.LSTM_DTYPES[chosen])], str):
        return Check(
            "precision", "fail", value, f"LSTMs do not train in {chosen} on this device: use `--mixed_precision no`"
        )
    if chosen == "bf16" and not has_bfloat16(use_cpu=use_cpu):
        return Check("precision", "warn", value, "bf16 is slow on this hardware: use `--mixed_precision no`")
    return Check("precision", "ok", value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _trains_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether an LSTM's forward and backward pass work in a dtype and give finite gradients."""
    model = LSTMLanguageModel(ModelConfig(embedding_dim=32, hidden_size=32, num_layers=1), 64).to(device)
    tokens = torch.arange(64, device=device).reshape(4, 16)
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            nats, (hidden, _) = model(tokens, model.zero_state(4), tokens)
        nats.backward()
    except RuntimeError:
        return False
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    return finite and hidden.dtype == dtype


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Return the duration of a square matrix product."""
    size = MATRIX_SIZE[device.type]
    a = torch.ones((size, size), dtype=dtype, device=device)
    return median_seconds(lambda: a @ a, device, rounds=9)
