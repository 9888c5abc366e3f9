"""What a start imports: nothing that takes seconds and is not used, and for `--help` nothing that Windows lacks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from textgen.cli import COMMANDS

ROOT = Path(__file__).parents[1]

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


# Hides the modules that Windows lacks, then runs the commands of its arguments, each after the word `then`.
ON_WINDOWS = """
import itertools, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "termios", "pwd", "grp"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hidden())
import textgen
from textgen.cli import main
for separator, command in itertools.groupby(sys.argv[1:], lambda word: word == "then"):
    if not separator:
        try:
            main(list(command))
        except SystemExit as end:
            print("exit code", end.code)
"""


def on_windows(*commands: Sequence[str]) -> tuple[str, str]:
    """Run commands in one process without the modules that Windows lacks; return what it prints, and its log."""
    words = [word for command in commands for word in ["then", *command]]
    done = subprocess.run([sys.executable, "-c", ON_WINDOWS, *words], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(), done.stderr.decode()


def test_help_needs_no_module_that_windows_lacks() -> None:
    said, log = on_windows(["--help"], *([command, "--help"] for command in COMMANDS))
    assert said.count("usage: textgen") == 1 + len(COMMANDS)
    assert said.count("exit code 0") == len(COMMANDS)
    assert log == ""


def test_a_command_that_needs_one_is_refused_in_a_line(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text('{"prompt": "a"}')
    batch = ["--batch_file", str(tmp_path / "prompts"), "--out", str(tmp_path / "samples")]
    said, log = on_windows(["compare", str(tiny_run)], ["sample", str(tiny_run), *batch], ["train", "--dry_run"])
    assert str(tiny_run) in said  # compare needs none
    assert said.count("exit code 2") == 2
    assert log.count("error: this command needs Linux or macOS: Python has no module `") == 2
    assert "Traceback" not in log
    assert not (tmp_path / "samples").exists()
