"""What a start imports, by `-X importtime`: nothing that takes seconds and is not used."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

COMPILER = ("torch._dynamo", "torch._inductor")
SLOW = (*COMPILER, "wandb", "datasets", "pandas", "matplotlib")
STARTS = {
    "import textgen": (["-c", "import textgen"], ("torch", "numpy", "jsonargparse", *SLOW)),
    "textgen --help": (["-m", "textgen", "--help"], ("torch", "numpy", *SLOW)),
    "textgen serve --help": (
        ["-m", "textgen", "serve", "--help"],
        ("torch", "numpy", "uvicorn", "starlette", "pydantic", *SLOW),
    ),
    "textgen sample": (["-m", "textgen", "sample", "RUN", "--prompt", "I", "--max_new_tokens", "1"], SLOW),
}


def imported(*argv: str) -> dict[str, int]:
    """Return the microseconds that each module itself took to import."""
    done = subprocess.run([sys.executable, "-X", "importtime", *argv], check=True, capture_output=True, text=True)
    return {name: int(own) for own, name in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", done.stderr, re.M)}


@pytest.mark.parametrize("start", STARTS)
def test_a_start_imports_nothing_slow_that_it_does_not_use(start: str, tiny_run: Path) -> None:
    """`sample` counts up to the end of its first token."""
    argv, unused = STARTS[start]
    assert all(find_spec(name) for name in unused), "what is looked for has another name"
    modules = imported(*(str(tiny_run) if word == "RUN" else word for word in argv))
    assert "textgen" in modules
    found = [name for name in modules if any(name == other or name.startswith(f"{other}.") for other in unused)]
    assert found == []
    torch = sum(own for name, own in modules.items() if name.partition(".")[0] in ("torch", "torchgen", "numpy"))
    print(f"{start}: {sum(modules.values()) / 1e6:.2f} s of imports, {torch / 1e6:.2f} s of them torch and numpy")
