"""What a processor is fast in, which kernels a GPU would run, and the precision that is chosen by it: rules alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from textgen import hardware
from textgen.cli import main, train_main
from textgen.config import Precision
from textgen.distributed import launch
from textgen.distributed.launch import resolve_precision
from textgen.distributed.world import World
from textgen.errors import TextgenError
from textgen.hardware import prefers_float16
from textgen.runs.metrics_file import read_metrics

H100 = {"capability": (9, 0), "multiprocessors": 132}
V100 = {"capability": (7, 0), "multiprocessors": 80}
FITS: dict[str, Any] = {"input_sizes": (512, 1024), "hidden_size": 1024, "rows": 128, "seq_len": 64, **H100}


def asked(**changes: Any) -> bool:
    """Return the answer for a layer that has the kernel, with some changes."""
    given = FITS | changes
    return prefers_float16(given.pop("input_sizes"), given.pop("hidden_size"), **given)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 256, "input_sizes": (128, 256)},
        {"rows": 8},
        {"rows": 24, "seq_len": 1},
        {"capability": (8, 0), "multiprocessors": 108},  # A100
        {"capability": (8, 9), "multiprocessors": 128},  # RTX 4090
        {"capability": (10, 0), "multiprocessors": 148},  # B200
        V100,
        {**V100, "rows": 96, "seq_len": 20},
        {**V100, "rows": 32, "seq_len": 10},
    ],
)
def test_float16_is_preferred_where_cudnn_has_a_persistent_kernel_for_it_alone(changes: dict[str, Any]) -> None:
    assert asked(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 1152, "input_sizes": (512, 1152)},
        {"hidden_size": 1000, "input_sizes": (512, 1000)},
        {"hidden_size": 128, "input_sizes": (128,)},  # persistent in bfloat16 too
        {"input_sizes": (500, 1024)},
        {"rows": 136},
        {"rows": 100},
        {"rows": 256},
        {"capability": (8, 6), "multiprocessors": 84},  # A40
        {"capability": (8, 0), "multiprocessors": 56},  # A30
        {"multiprocessors": 66},  # half an H100, by MIG
        {"capability": (7, 5), "multiprocessors": 72},  # T4 and its like
        {"capability": (6, 0), "multiprocessors": 56},
        {**V100, "rows": 80},
        {**V100, "rows": 128, "seq_len": 39},
        {**V100, "rows": 24},
    ],
)
def test_float16_is_not_preferred_where_one_condition_of_that_kernel_fails(changes: dict[str, Any]) -> None:
    assert not asked(**changes)


# --- the precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [None, "no", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("persistent", "bfloat16", "float16", "wanted"),
    [
        (True, True, True, "fp16"),
        (True, False, True, "fp16"),
        (False, True, True, "bf16"),
        (False, False, True, "fp16"),
        (False, False, False, "no"),
    ],
)
def test_auto_on_a_gpu_goes_by_its_kernels_whatever_accelerate_says(
    monkeypatch: pytest.MonkeyPatch,
    environment: str | None,
    persistent: bool,
    bfloat16: bool,
    float16: bool,
    wanted: str,
) -> None:
    monkeypatch.setattr(launch, "has_bfloat16", lambda use_cpu: bfloat16)
    monkeypatch.setattr(launch, "has_float16", lambda: float16)
    assert resolve_precision("auto", environment, use_cpu=False, persistent=persistent) == wanted
    for flag in ("no", "bf16", "fp16"):
        assert resolve_precision(flag, environment, use_cpu=False, persistent=persistent) == flag  # type: ignore[arg-type]
    left_out = environment or ("bf16" if bfloat16 else "no")
    assert resolve_precision(None, environment, use_cpu=False, persistent=persistent) == left_out


@pytest.mark.parametrize("environment", [None, "no", "bf16"])
@pytest.mark.parametrize("bfloat16", [True, False])
def test_auto_on_a_cpu_is_the_same_as_leaving_it_out(
    monkeypatch: pytest.MonkeyPatch, environment: str | None, bfloat16: bool
) -> None:
    monkeypatch.setattr(launch, "has_bfloat16", lambda use_cpu: bfloat16)
    flags: tuple[Precision | None, ...] = (None, "auto")
    left_out, auto = (resolve_precision(flag, environment, use_cpu=True) for flag in flags)
    assert auto == left_out


def test_a_training_and_an_evaluation_take_auto(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint tells what was taken, and the training goes on where that is named."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    flags = [*tiny_flags, "--run_dir", str(tmp_path / "run")]
    train_main([*flags, "--mixed_precision", "auto", "--max_steps", "2"])
    trainer = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "trainer.json").read_text())
    assert trainer["mixed_precision"] == "no"
    train_main([*flags, "--mixed_precision", "no", "--max_steps", "3"])
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run"), "--mixed_precision", "auto", "--limit", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["documents"] == 2


@pytest.mark.parametrize(
    ("vendor", "flags", "wanted"),
    [
        ("AuthenticAMD", {"avx512f", "avx512_bf16"}, True),  # Zen 4 and 5
        ("AuthenticAMD", {"avx512f", "avx512_bf16", "avx512_fp16"}, True),
        ("GenuineIntel", {"avx512f", "avx512_bf16"}, True),  # Cooper Lake
        ("GenuineIntel", {"avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16"}, True),  # Sapphire Rapids
        ("GenuineIntel", {"avx512f", "avx512_bf16", "avx512_fp16"}, False),  # the same where AMX is hidden
        ("GenuineIntel", {"avx2"}, False),
        ("", set(), False),
    ],
)
def test_bfloat16_is_taken_where_it_is_faster(
    vendor: str, flags: set[str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(hardware, "processor_vendor", lambda: vendor)
    assert hardware.has_bfloat16(use_cpu=True) == wanted


CPUINFO = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R): a model with a colon
flags\t\t: fpu avx2 avx512f
power management:

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R): a model with a colon
flags\t\t: fpu avx2
power management:
"""


def test_a_field_has_each_of_its_values_once_in_the_order_of_the_processors(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    fields = hardware.read_cpuinfo(path)
    assert fields["processor"] == ["0", "1"]
    assert fields["model name"] == ["Intel(R) Xeon(R): a model with a colon"]
    assert fields["flags"] == ["fpu avx2 avx512f", "fpu avx2"]
    assert fields["power management"] == [""]
    assert hardware.read_cpuinfo(tmp_path / "missing") == {}


def test_flags_vendor_and_model_are_those_of_the_first_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"vendor_id": ["GenuineIntel"], "model name": ["Xeon"], "flags": ["fpu avx2 avx512f", "fpu avx2"]}
    monkeypatch.setattr(hardware, "read_cpuinfo", lambda: fields)
    assert hardware.processor_flags() == {"fpu", "avx2", "avx512f"}
    assert (hardware.processor_vendor(), hardware.processor_model()) == ("GenuineIntel", "Xeon")
    # code that is compiled for one processor must not be taken for that of another one
    before = hardware.processor_identity()
    fields["flags"] = ["fpu avx2", "fpu avx2"]
    assert hardware.processor_identity() != before


# --- Apple's GPU: rules alone, as nobody has one here ----------------------------------------------------------------


def test_apples_gpu_is_used_only_if_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert launch._choose_device(World(processes=1, machines=1, local_processes=1)) != "mps"
    monkeypatch.setenv("TEXTGEN_DEVICE", "mps")
    assert launch._choose_device(World(processes=1, machines=1, local_processes=1)) == "mps"
    with pytest.raises(TextgenError, match=r"^`TEXTGEN_DEVICE` mps is for one process, and there are 2$"):
        launch._choose_device(World(processes=2, machines=1, local_processes=2))
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for device, line in (
        ("mps", "`TEXTGEN_DEVICE` is mps, and torch finds no GPU of Apple here"),
        ("tpu", "`TEXTGEN_DEVICE` must be `mps`, Apple's GPU, or not set: tpu"),
    ):
        monkeypatch.setenv("TEXTGEN_DEVICE", device)
        for command in (
            ["sample", str(tiny_run), "--prompt", "a"],
            ["evaluate", str(tiny_run), "--data", "validation"],
        ):
            with pytest.raises(SystemExit):
                main(command)
            assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"


def test_apples_gpu_computes_in_float32() -> None:
    assert launch._precision_of_mps(None, None) == launch._precision_of_mps("auto", "no") == "no"
    for flag, environment in (("bf16", None), (None, "bf16")):
        with pytest.raises(TextgenError, match=r"^mixed_precision bf16 is not for `TEXTGEN_DEVICE` mps: leave it out$"):
            launch._precision_of_mps(flag, environment)  # type: ignore[arg-type]


def test_losses_summed_without_float64_are_the_same_up_to_rounding(
    monkeypatch: pytest.MonkeyPatch, tiny_flags: list[str], tiny_run: Path, tmp_path: Path
) -> None:
    assert hardware.sum_dtype(torch.device("mps")) == torch.float32
    assert hardware.sum_dtype(torch.device("cpu")) == torch.float64
    for module in ("training.setup", "training.loop", "evaluation"):
        monkeypatch.setattr(f"textgen.{module}.sum_dtype", lambda _: torch.float32)
    train_main([*tiny_flags, "--run_dir", str(tmp_path)])
    wanted, found = (
        [row[name] for row in read_metrics(run) for name in ("train/loss", "valid/loss") if name in row]
        for run in (tiny_run, tmp_path)
    )
    assert found == pytest.approx(wanted, rel=1e-6)
