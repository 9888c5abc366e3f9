"""What only a CUDA device can show: `make gpu` on a machine that has one. Not measured so far."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from benchmarks.train import WAYS, Shape
from benchmarks.wavefront import WavefrontModel
from textgen.cli import train_main
from textgen.config import ModelConfig
from textgen.distributed.launch import has_persistent_kernel
from textgen.model.lstm import DropoutMasks, LSTMLanguageModel, summed_cross_entropy
from textgen.runs.checkpoint import checkpoints
from textgen.runs.metrics_file import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("settings_of_a_new_process"),
]


ROOT = Path(__file__).parents[2]
LAUNCH_SECONDS = 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_lstm_computes_in_the_dtype_of_autocast(dtype: torch.dtype) -> None:
    """`nn.LSTM` would compute in float16 whatever is asked for. Warnings, of weights not packed, are errors."""
    model = LSTMLanguageModel(ModelConfig(embedding_dim=64, hidden_size=128), 300).cuda()
    tokens = torch.randint(0, 300, (8, 17), device="cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        nats, state = model(tokens[:, :-1], model.zero_state(8), tokens[:, 1:])
    nats.backward()
    assert state[0].dtype == dtype
    assert nats.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_cuda_and_cpu_agree() -> None:
    torch.manual_seed(0)
    model = LSTMLanguageModel(ModelConfig(embedding_dim=64, hidden_size=128, layer_norm=True, residual=True), 300)
    tokens = torch.randint(0, 300, (8, 33))
    on_cpu, _ = model(tokens[:, :-1], model.zero_state(8), tokens[:, 1:])
    model.cuda()
    on_gpu, _ = model(tokens[:, :-1].cuda(), model.zero_state(8), tokens[:, 1:].cuda())
    assert on_gpu.item() == pytest.approx(on_cpu.item(), rel=1e-5)


@pytest.mark.filterwarnings("default")  # of kernels that have no deterministic twin
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_on_streams_compute_what_they_do_one_after_the_other(dtype: torch.dtype) -> None:
    """Many times over: a stream that did not wait would change bits now and then.

    In half precision pieces round otherwise than whole windows: norms' gradients were up to 4 % apart on a CPU.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    shape = ModelConfig(embedding_dim=128, hidden_size=256, num_layers=4, dropout=0.2, layer_norm=True, residual=True)
    model = WavefrontModel(shape, 300).cuda()
    tokens, masks = torch.randint(0, 300, (16, 97), device="cuda"), DropoutMasks(42, 7, torch.arange(16).cuda())
    found: list[list[torch.Tensor]] = []
    for num_pieces in [1] + 20 * [6]:
        model.num_pieces = num_pieces
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            nats, state = model(tokens[:, :-1], model.zero_state(16), tokens[:, 1:], masks=masks)
        nats.backward()
        found.append([nats, *state, *(p.grad for p in model.parameters() if p.grad is not None)])
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for one, other in zip(found[0], found[1], strict=True):
        assert (one.float() - other.float()).norm() <= tolerance * one.float().norm()
    for others in found[2:]:
        assert all(torch.equal(one, other) for one, other in zip(found[1], others, strict=True))


def test_summed_cross_entropy_matches_torch() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 32, device="cuda", requires_grad=True)
    weight, bias = torch.randn(500, 32, device="cuda"), torch.randn(500, device="cuda")
    targets = torch.randint(0, 500, (100,), device="cuda")
    ours = summed_cross_entropy(x, weight, bias, targets)
    theirs = torch.nn.functional.cross_entropy(x @ weight.T + bias, targets, reduction="sum")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    (a,), (b,) = torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_on_a_gpu_learns(tiny_flags: list[str], tmp_path: Path, precision: str) -> None:
    flags = ["--mixed_precision", precision, "--max_steps", "100", "--learning_rate", "0.02", "--log_every", "1"]
    train_main([*tiny_flags, "--run_dir", str(tmp_path / "run"), *flags])
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2


def test_auto_takes_fp16_where_the_persistent_kernel_runs_and_it_does(tiny_flags: list[str], tmp_path: Path) -> None:
    """By the names of the kernels that torch's profiler sees; where the rule says no, there are none of that name."""
    from torch.profiler import ProfilerActivity, profile

    found = {}
    for rows in (128, 136):
        config = ModelConfig(embedding_dim=256, hidden_size=1024, num_layers=2)
        wanted = has_persistent_kernel(config, rows=rows, seq_len=64)
        model, tokens = LSTMLanguageModel(config, 300).cuda(), torch.randint(0, 300, (rows, 65), device="cuda")
        for _ in range(2):
            with profile(activities=[ProfilerActivity.CUDA]) as profiler, torch.autocast("cuda", torch.float16):
                model(tokens[:, :-1], model.zero_state(rows), tokens[:, 1:])[0].backward()
        found[rows] = wanted, any("persist" in event.key.lower() for event in profiler.key_averages())
    assert all(ours == theirs for ours, theirs in found.values()), found
    flags = ["--mixed_precision", "auto", "--model.hidden_size", "256", "--model.embedding_dim", "128"]
    train_main([*tiny_flags, "--run_dir", str(tmp_path / "run"), *flags])
    precision = json.loads((checkpoints(tmp_path / "run")[0][1] / "trainer.json").read_text())["mixed_precision"]
    shape = ModelConfig(embedding_dim=128, hidden_size=256)
    assert precision == ("fp16" if has_persistent_kernel(shape, rows=8, seq_len=16) else "bf16")


@pytest.mark.filterwarnings("default")  # of kernels that have no deterministic twin
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_resume_on_a_gpu_is_bitwise_with_deterministic_kernels(
    tiny_flags: list[str], tmp_path: Path, precision: str
) -> None:
    """Checkpoints through pinned memory; GradScaler's state with float16."""
    flags = ["--mixed_precision", precision, "--deterministic", "--save_every", "4", "--log_every", "3"]
    train_main([*tiny_flags, "--run_dir", str(tmp_path / "whole"), *flags, "--max_steps", "30"])
    for steps in ("10", "30"):
        train_main([*tiny_flags, "--run_dir", str(tmp_path / "parts"), *flags, "--max_steps", steps])
    ours, theirs = (
        load_file(checkpoints(tmp_path / run)[0][1] / "optimizer.safetensors") for run in ("parts", "whole")
    )
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_continues_on_a_gpu_and_back_on_a_cpu(tiny_flags: list[str], tmp_path: Path) -> None:
    """Weights, Adam's state and lane states go over: losses are those of a run on the CPU alone."""

    def train(run: str, steps: int, *, on_cpu: bool) -> None:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train_distributed.py"), *tiny_flags, "--run_dir", str(tmp_path / run),
             "--max_steps", str(steps), "--log_every", "1", "--learning_rate", "0.01"],
            env=os.environ | ({"ACCELERATE_USE_CPU": "true"} if on_cpu else {}), capture_output=True, text=True,
            timeout=LAUNCH_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"1 process on 1 machine, {'cpu' if on_cpu else 'cuda'} (" in done.stderr

    train("whole", 12, on_cpu=True)
    for steps in (4, 8, 12):
        train("parts", steps, on_cpu=steps != 8)
    losses = [
        [row["train/loss"] for row in read_metrics(tmp_path / run) if "train/loss" in row] for run in ("whole", "parts")
    ]
    assert len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


GRAPHED = [
    "--model.dropout", "0.2", "--model.weight_drop", "0.3", "--model.layer_norm", "--model.residual",
    "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5", "--ema_decay", "0.9", "--lr_schedule", "cosine",
    "--seq_len", "64", "--batch_size", "16", "--evaluate_every", "7", "--log_every", "1", "--max_steps", "40",
    "--deterministic",
]  # fmt: skip


@pytest.mark.filterwarnings("default")  # of kernels that have no deterministic twin
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_training_from_cuda_graphs_is_the_one_without(
    tiny_flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    """Weights, averages, Adam's state, lane states and losses, over an epoch's end."""
    flags = [*tiny_flags, *GRAPHED, "--mixed_precision", precision]
    train_main([*flags, "--run_dir", str(tmp_path / "plain")])
    train_main([*flags, "--run_dir", str(tmp_path / "graphs"), "--cuda_graph"])
    assert not [message for message in caplog.messages if "captured" in message]
    losses = [[row.get("train/loss") for row in read_metrics(tmp_path / run)] for run in ("plain", "graphs")]
    assert losses[0] == losses[1]
    for file in ("model", "weights", "optimizer", "lanes"):
        ours, theirs = (
            load_file(checkpoints(tmp_path / run)[0][1] / f"{file}.safetensors") for run in ("graphs", "plain")
        )
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == [], file


def test_a_training_from_cuda_graphs_does_not_pile_up_memory(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--mixed_precision", "bf16", "--cuda_graph", "--log_every", "1", "--max_minutes", "0.1"]
    train_main([*tiny_flags, "--run_dir", str(tmp_path / "run"), *flags, "--max_steps", "100"])
    peaks = [row["memory/peak_gib"] for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert peaks[-1] == peaks[len(peaks) // 2]


def test_a_cuda_graph_of_scaled_gradients_is_refused(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train_main([*tiny_flags, "--run_dir", str(tmp_path / "run"), "--cuda_graph", "--mixed_precision", "fp16"])
    assert stop.value.code == 2
    assert "`cuda_graph` does not work with mixed_precision fp16" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["textgen, graph", "textgen, side by side", "textgen, graph, side by side"])
def test_ways_that_are_measured_on_a_gpu_learn_alike(way: str) -> None:
    """A graph that holds several streams, too; each takes steps until well after the capture."""
    shape = Shape(vocab_size=300, embedding_dim=128, hidden_size=256, num_layers=3, batch_size=16, seq_len=64)
    losses = []
    for name in ("textgen", way):
        torch.manual_seed(0)
        losses.append(WAYS[name](shape, "bf16")(20))
        AcceleratorState._reset_state(True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_nothing_is_updated_on_a_gpu_once_a_loss_is_not_finite(tiny_flags: list[str], tmp_path: Path) -> None:
    """The host learns of it a step late; the device must not wait for that."""
    flags = ["--mixed_precision", "no", "--learning_rate", "1e38", "--max_steps", "20", "--log_every", "50"]
    with pytest.raises(SystemExit) as stop:
        train_main([*tiny_flags, "--run_dir", str(tmp_path / "run"), *flags, "--evaluate_every", "1000"])
    assert stop.value.code == 2
    assert (tmp_path / "run" / "nonfinite.json").exists()
    assert checkpoints(tmp_path / "run") == []


# --- launches --------------------------------------------------------------------------------------------------------


def launch(flags: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *options]
    return subprocess.run(
        [*command, str(ROOT / "train_distributed.py"), *flags], capture_output=True, text=True, check=False,
        timeout=LAUNCH_SECONDS,
    )  # fmt: skip


@pytest.mark.parametrize("config", ["accelerate_config.yaml", "launch/configs/single_gpu.yaml"])
def test_one_process_is_launched_on_the_gpu(tiny_flags: list[str], tmp_path: Path, config: str) -> None:
    done = launch([*tiny_flags, "--run_dir", str(tmp_path / "run")], "--config_file", str(ROOT / config))
    assert done.returncode == 0, done.stderr
    assert "1 process on 1 machine, cuda (" in done.stderr


def test_one_process_for_each_gpu_is_the_most(tiny_flags: list[str], tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    config = ["--config_file", str(ROOT / "accelerate_config.yaml"), "--num_processes"]
    flags = [*tiny_flags, "--batch_size", str(count * (count + 1))]
    done = launch([*flags, "--run_dir", str(tmp_path / "more")], *config, str(count + 1))
    assert f"error: {count + 1} processes on this machine, but {count} GPUs" in done.stderr
    assert not (tmp_path / "more").exists()
    done = launch([*flags, "--run_dir", str(tmp_path / "all")], *config, str(count))
    assert done.returncode == 0, done.stderr
    assert f"{count} process{'es' if count > 1 else ''} on 1 machine" in done.stderr


def test_gpu_that_is_hidden_by_hand_is_not_missed(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    flags = [*tiny_flags, "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_distributed.py"), *flags], capture_output=True, text=True, check=False,
        timeout=LAUNCH_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 process on 1 machine, cpu (" in done.stderr
