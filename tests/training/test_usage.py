"""What a training makes of its machines, against figures counted by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.forking import free_port, server
from textgen.config import ModelConfig
from textgen.hardware import known_peak, peak_flops
from textgen.model.lstm import LSTMLanguageModel
from textgen.runs.metrics_file import is_machine_metric, read_metrics
from textgen.training.metrics import flops_per_token, measure_machines

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("shape", "weights"),
    [
        # two layers: 4 x 32 gates of (16 + 32) and of (32 + 32), a projection of 32 to 16, an output of 16 to 340
        ({"tie_weights": True}, 128 * 48 + 128 * 64 + 32 * 16 + 16 * 340),
        ({"tie_weights": False}, 128 * 48 + 128 * 64 + 32 * 340),
        ({"tie_weights": False, "num_layers": 1, "layer_norm": True}, 128 * 48 + 32 * 340),
    ],
)
def test_operations_are_six_for_each_weight_of_a_product(shape: dict[str, bool | int], weights: int) -> None:
    config = ModelConfig(embedding_dim=16, hidden_size=32, **shape)  # type: ignore[arg-type]
    assert flops_per_token(LSTMLanguageModel(config, 340)) == 6 * weights


def test_operations_of_products_are_those_that_torch_counts() -> None:
    """Of the output layer and the projection; torch's counter knows no LSTM."""
    from torch.utils.flop_counter import FlopCounterMode

    model = LSTMLanguageModel(ModelConfig(embedding_dim=16, hidden_size=32, num_layers=1), 340)
    tokens = torch.zeros((2, 5), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        nats, _ = model(tokens, model.zero_state(2), tokens)
        nats.backward()
    layer = 6 * 128 * 48
    assert counter.get_total_flops() == pytest.approx((flops_per_token(model) - layer) * 10)


@pytest.mark.parametrize(
    ("gpu", "half", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989e12), ("NVIDIA H100 PCIe", True, 756e12), ("NVIDIA H200", False, 67e12),
        ("NVIDIA A100-SXM4-80GB", True, 312e12), ("NVIDIA A100 80GB PCIe", False, 19.5e12), ("Tesla T4", True, 65e12),
        ("NVIDIA L4", True, 121e12), ("NVIDIA L40S", True, 362e12), ("Tesla V100-SXM2-16GB", False, 15.7e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", True, None), ("NVIDIA A10G", True, None), ("Some GPU", True, None),
    ],
)  # fmt: skip
def test_a_peak_is_that_of_the_data_sheet_or_not_known(gpu: str, half: bool, peak: float | None) -> None:
    assert known_peak(gpu, half=half) == peak


def test_memory_is_the_most_that_was_held() -> None:
    """In a process of its own: this one may have held more before."""
    measure = """
import torch
from textgen.training.metrics import peak_memory
device, figures = torch.device("cpu"), []
figures.append(peak_memory(device))
block = torch.ones(50 << 20)
figures.append(peak_memory(device))
del block
print(*figures, peak_memory(device))
"""
    told = subprocess.run([sys.executable, "-c", measure], check=True, capture_output=True, text=True).stdout
    before, held, after = map(int, told.split())
    assert 150 << 20 < held - before < 260 << 20  # 200 MiB
    assert after > held - (8 << 20)  # the kernel counts in batches


def test_nothing_is_guessed_of_a_processors_peak() -> None:
    accelerator = Accelerator(cpu=True)
    assert peak_flops(accelerator.device, half=False) is None
    values = measure_machines(accelerator)
    assert values.keys() == {"memory/peak_gib", "machine/0/cpu_share", "machine/0/memory_share"}
    assert all(0 <= value <= 1 for name, value in values.items() if "machine" in name)


def test_every_machine_is_told_of(tiny_flags: list[str], tmp_path: Path) -> None:
    """Two processes, started as those of two machines."""
    port, processes = str(free_port()), []
    for rank in ("0", "1"):
        told = {
            "RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": rank,
            "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        command = ["train_distributed.py", *tiny_flags, "--run_dir", str(tmp_path / "run"), "--log_every", "2"]
        said = tmp_path / f"{rank}.txt"
        processes.append(server().start(command, output=said, error=said, env=os.environ | told))
    assert [process.wait() for process in processes] == [0, 0]
    (first, *_) = read_metrics(tmp_path / "run")
    assert {"machine/0/cpu_share", "machine/1/cpu_share", "machine/1/memory_share"} <= first.keys()
    assert first["train/tokens_per_second_per_process"] == first["train/tokens_per_second"] / 2
    shares = [first[f"train/{what}_share"] for what in ("data", "evaluate", "save")]
    assert 0 <= min(shares) <= sum(shares) < 1
    plain = {"step", "tokens", "epoch", "train/loss", "train/bits_per_byte", "train/perplexity", "train/learning_rate",
             "train/gradient_norm"}  # fmt: skip
    assert {name for name in first if not is_machine_metric(name)} == plain
