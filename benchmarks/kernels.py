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

# Triton reads it when it is imported: an interpreted kernel cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from textgen.kernels import triton_kernels, triton_training

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
        options={"num_warps": variant.num_warps, "enable_fp_fusion": True},
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
    """Return the kernels of triton_kernels.py."""
    made = []
    for product in ("*fp32", "*bf16"):
        for added, table in (("*fp32", True), ("*bf16", True), ("*fp32", False)):
            tensors = {"product": product, "added": added, "cell": "*fp32", "new_hidden": "*fp32", "new_cell": "*fp32"}
            constants: dict[str, object] = {"TABLE": table, "BLOCK": 256}
            if table:
                tensors["tokens"] = "*i64"
            else:
                constants["tokens"] = None
            made.append(Variant(triton_kernels._cell, tensors | {"size": "i32"}, constants))
    for heated in (True, False):
        tensors = {"logits": "*fp32", "keys": "*i64", "items": "*i32", "drawn": "*i64", "size": "i32"}
        constants = {"HEATED": heated, "BLOCK": 1024}
        if heated:
            tensors["temperature"] = "*fp32"
        else:
            constants["temperature"] = None
        made.append(Variant(triton_kernels._draw, tensors, constants))
    return made


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
