"""Compile the Triton kernels for GPUs that are not here: `python -m benchmarks.kernels` prints registers and spills.

Needs no GPU, only Triton, which brings NVIDIA's assembler. The figures are those of the installed version of Triton.
They say nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Triton reads it when it is imported: an interpreted kernel cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from textgen.config import ModelConfig, SamplingConfig
from textgen.decoding.fused import FusedDecoder
from textgen.decoding.sampling import join_sampling_states, new_sampling_state
from textgen.kernels import triton_decoding, triton_training
from textgen.model.lstm import LSTMLanguageModel

CAPABILITIES = (80, 90)
"""A100; H100 and H200"""


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its arguments, as one launch has them."""

    function: triton.JITFunction
    tensors: Mapping[str, str]
    """Triton's type of each argument that is no constant: `*fp32` for a tensor, `i32` for a number"""
    constants: Mapping[str, object]
    """arguments that are known when the kernel is compiled; None for a tensor that is left out"""
    num_warps: int = 4
    multiples: tuple[str, ...] = ()
    """numbers that are multiples of 16, for which Triton compiles wider loads; tensors begin at such addresses"""
    num_stages: int = 3
    fuses: bool = True
    """whether products and sums are fused, which rounds once less"""


@dataclass(frozen=True)
class Use:
    """What a compiled kernel uses."""

    kernel: str
    types: str
    capability: int
    warps: int
    """per program"""
    registers: int
    """per thread, of 255"""
    spilled: int
    """bytes per thread that found no register and are in local memory"""
    shared: int
    """bytes of shared memory per block"""


def compiled(variant: Variant, capability: int) -> Use:
    """Compile a kernel down to the machine code of a GPU and return what it uses."""
    names = variant.function.arg_names
    signature = {name: variant.tensors.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if variant.tensors.get(name, "").startswith("*") or name in variant.multiples
    }
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(fn=variant.function, signature=signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": variant.fuses,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        argv = [str(tool), "-res-usage", file.name]
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    assert found is not None, said
    registers, stack, local = map(int, found.groups())
    types = ", ".join(f"{kind}{' x 16' * (name in variant.multiples)}" for name, kind in variant.tensors.items())
    uses = variant.num_warps, registers, stack + local, kernel.metadata.shared
    return Use(variant.function.__name__, types, capability, *uses)


def variants() -> list[Variant]:
    """Return every kernel with the types that trainings and decoders launch it with."""
    return [*decoding_variants(), *training_variants()]


def training_variants() -> list[Variant]:
    """Return the kernels of triton_training.py: each dtype as a usual training has it, and some odd ones."""
    made = []
    multiples: tuple[str, ...]
    strides = ("size", "x_lane", "x_time", "y_lane", "y_time")
    # with a CUDA graph the step is a tensor
    for dtype, step, multiples in (
        ("*fp32", "i32", strides), ("*bf16", "i32", strides), ("*fp16", "i32", strides), ("*bf16", "*i64", ()),
    ):  # fmt: skip
        types = {"x": dtype, "y": dtype, "lanes": "*i64", "step": step, "seed": "i64", "site": "i32"}
        types |= {"dropout": "fp32", "kept": "fp32", "time": "i32"} | dict.fromkeys(strides, "i32")
        constants: dict[str, object] = {"STEP_IS_TENSOR": step == "*i64", "BLOCK": 256, "TIME_STEPS": 16}
        made.append(Variant(triton_training._drop, types, constants, multiples=multiples))
    for step in ("i32", "*i64"):
        types = {"mask": "*fp32", "step": step, "seed": "i64", "site": "i32", "dropped": "i32", "kept": "fp32"}
        constants = {"STEP_IS_TENSOR": step == "*i64", "BLOCK": 128}
        made.append(Variant(triton_training._weight_mask, types | {"count": "i32"}, constants))
    for dtype, gradient, multiples in (
        ("*fp32", True, ("size",)), ("*bf16", True, ("size",)), ("*fp16", True, ("size",)), ("*bf16", True, ()),
        ("*bf16", False, ("size",)),
    ):  # fmt: skip
        types = {"logits": dtype, "bias": "*fp32", "targets": "*i64", "nats": "*fp32", "rows": "i32", "size": "i32"}
        constants = {"WITH_GRADIENT": gradient, "ROWS": triton_training.ROWS, "BLOCK": 512}
        types, constants = (types | {"sums": "*fp32"}, constants) if gradient else (types, constants | {"sums": None})
        made.append(Variant(triton_training._cross_entropy, types, constants, multiples=multiples))
    return made


def decoding_variants() -> list[Variant]:
    """Return the kernels of triton_decoding.py as decoders of one row and of 512 rows launch them."""
    made: list[Variant] = []

    def record(function: triton.JITFunction, grid: tuple[int, ...], *arguments: object, **constants: Any) -> None:
        """Stand in for `triton_decoding._launch`."""
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        types: dict[str, str] = {}
        for name, value in zip(function.arg_names, arguments, strict=False):
            if value is None:
                constants[name] = None
            elif isinstance(value, torch.Tensor):
                types[name] = f"*{_TYPES[value.dtype]}"
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
        variant = Variant(function, types, constants, **options, fuses=False)
        if variant not in made:
            made.append(variant)

    plain = ModelConfig(embedding_dim=512, hidden_size=1024, num_layers=2)
    normed = ModelConfig(embedding_dim=512, hidden_size=1024, num_layers=2, layer_norm=True, residual=True)
    few = SamplingConfig(temperature=0.8)
    everything = SamplingConfig(
        temperature=0.8, repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.2, min_new_tokens=9,
        banned_tokens=(30,), logprobs=0,
    )  # fmt: skip
    filtered = SamplingConfig(min_p=0.1, dry_multiplier=0.8)
    with patch.object(triton_decoding, "_launch", record), torch.device("meta"), torch.inference_mode():
        for shape, rows, configs in (
            (plain, 1, (few, everything, filtered)),
            (normed, 1, (few,)),
            (plain, 512, (few,)),
        ):
            decoder = FusedDecoder(LSTMLanguageModel(shape, 8192), triton_decoding)
            for config in configs:
                row = new_sampling_state(config, (), 0, vocab_size=8192, device=decoder.device)
                tokens, state = torch.zeros(rows, dtype=torch.int64), [torch.zeros(rows, 1024)] * 4
                ended = torch.zeros(rows, dtype=torch.bool)
                sampling = join_sampling_states([row] * rows, 8192)
                decoder.advance(tokens, state, sampling, unk_id=0, eos_id=2, ended=ended)
    return made


# Triton's names of types
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.int8: "i8",
    torch.uint8: "u8",
}  # fmt: skip


def main() -> None:
    """Compile all kernels and print what they use, as a table or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    as_json = parser.parse_args().json
    if not as_json:
        print(f"Triton {triton.__version__}\n\n| kernel | types | GPU | warps | registers | spilled | shared |")
        print("|---|---|---|---|---|---|---|")
    for variant in variants():
        for capability in CAPABILITIES:
            use = compiled(variant, capability)
            if as_json:
                print(json.dumps(asdict(use)))
            else:
                print(
                    f"| `{use.kernel}` | {use.types.replace('*', '')} | sm_{use.capability} | {use.warps} "
                    f"| {use.registers} | {use.spilled} | {use.shared} |"
                )


if __name__ == "__main__":
    main()
