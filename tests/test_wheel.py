"""The wheel, built from the sdist and installed alone: it is all that training and sampling need, and owns one name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import textgen
from tests.serving.servers import running
from textgen.commands.publish import publish_command

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"
MADE = {"build", "dist", "runs", "wandb"}
"""folders at the top of a checkout that git ignores; `textgen/runs` is a package"""

Run = Callable[..., str]

pytestmark = pytest.mark.slow


def left_out(folder: str, names: list[str]) -> set[str]:
    """Return what is not of the checkout, as `shutil.copytree` asks for it."""
    everywhere = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")(folder, names)
    return {*everywhere, *(MADE if Path(folder) == ROOT else ())}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist of the checkout, and the wheel from that, by the hooks that pip calls."""
    folder = tmp_path_factory.mktemp("built")
    checkout = shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=left_out)
    subprocess.run([sys.executable, "-c", BUILD, "sdist", str(folder)], cwd=checkout, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").iterdir()
    subprocess.run([sys.executable, "-c", BUILD, "wheel", str(folder)], cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment, far from the checkout.

    It holds the wheel and somebody else's package `tokenizer`; torch and the like are lent by this one.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home / "env", symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home / "env")}))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "tokenizer").mkdir()
    (site / "tokenizer" / "__init__.py").write_text("OWNER = 'somebody else'\n")
    python = str(home / "env" / "bin" / "python")
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    return home


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    """Return a function that runs a program of the new environment and returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(program: str, *argv: str) -> str:
        command = [str(home / "env" / "bin" / program), *argv]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_wheel_holds_every_file_of_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {
        str((Path(folder) / file).relative_to(ROOT))
        for folder, _, files in os.walk(ROOT / "textgen", followlinks=True)
        for file in files
        if not folder.endswith("__pycache__")
    }
    assert {name for name in names if name.startswith("textgen/")} == wanted
    assert {"textgen/presets/quick.yaml", "textgen/data/imdb_test_sha256.txt", "textgen/tokenizer/train.py"} <= wanted
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"textgen"}


def test_the_wheel_is_what_runs_and_leaves_another_tokenizer_alone(run: Run) -> None:
    program = (
        "import json, textgen.cli, textgen.decoding.generation, textgen.tokenizer, tokenizer;"
        "print(json.dumps([textgen.__file__, textgen.tokenizer.__file__, tokenizer.OWNER]))"
    )
    *files, owner = json.loads(run("python", "-c", program))
    assert [file.split("site-packages")[1] for file in files] == [
        "/textgen/__init__.py",
        "/textgen/tokenizer/__init__.py",
    ]
    assert not any(file.startswith(str(ROOT)) for file in files)
    assert owner == "somebody else"
    assert "  publish  " in run("textgen", "--help")
    assert "--vocab_size" in run("python", "-m", "textgen.tokenizer.train", "--help")


def test_every_preset_is_in_the_wheel_by_name(run: Run) -> None:
    names = [path.stem for path in (ROOT / "launch" / "presets").glob("*.yaml")]
    program = """
import sys
from textgen.commands.parsing import parse_train_config
for name in sys.argv[1:]:
    parse_train_config(["--config", name])
"""
    run("python", "-c", program, *names)
    assert len(names) >= 4


def test_the_wheel_samples_the_text_of_the_checkout(run: Run, tiny_run: Path, tmp_path: Path) -> None:
    publish_command([str(tiny_run), "--to", str(tmp_path / "reviews")])
    flags = [str(tmp_path / "reviews"), "--prompt", "The plot", "--min_new_tokens", "200", "--seed", "5"]
    here = subprocess.run(
        [sys.executable, "-m", "textgen", "sample", *flags], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert run("textgen", "sample", *flags) == here.stdout
    assert len(here.stdout) > 200


def test_python_of_the_wheel_trains_and_generates(run: Run, tiny_run: Path, tmp_path: Path) -> None:
    program = """
import sys, textgen
texts = [f"The plot was number {n}, and the {word} was dull." for n in range(100) for word in ("hero", "villain")]
small = {"batch_size": 4, "seq_len": 8, "max_steps": 2, "model": {"hidden_size": 32}, "tokenizer": {"vocab_size": 290}}
made = textgen.train(texts=texts, run_dir=sys.argv[2], tracking=False, data={"cache_dir": sys.argv[3]}, **small)
lm = textgen.load(sys.argv[1])
print(made.status["state"], textgen.__version__, *lm.generate("The plot", seed=5), sep="|", end="")
"""
    said = run("python", "-c", program, str(tiny_run), str(tmp_path / "run"), str(tmp_path / "cache"))
    assert said == "|".join(["finished", textgen.__version__, *textgen.load(tiny_run).generate("The plot", seed=5)])


def test_the_wheel_serves_its_page_and_the_text_of_the_checkout(home: Path, tiny_run: Path, tmp_path: Path) -> None:
    asked = {"prompt": "The plot", "seed": 5, "max_tokens": 50}
    with running(tiny_run, tmp_path / "here") as here:
        text = here.complete(**asked)["choices"][0]["text"]
    python = str(home / "env" / "bin" / "python")
    with running(tiny_run, tmp_path / "there", python=python, cwd=home) as there:
        assert there.complete(**asked)["choices"][0]["text"] == text
        served = {name: there.ask("GET", f"/{name}")[2] for name in ("", "page.js", "page.css")}
    page = ROOT / "textgen" / "serving" / "page"
    assert served == {"": (page / "index.html").read_bytes()} | {
        name: (page / name).read_bytes() for name in ("page.js", "page.css")
    }


def test_the_wheel_trains(run: Run, tiny_flags: list[str], tmp_path: Path) -> None:
    said = run("textgen", "train", *tiny_flags, "--run_dir", str(tmp_path / "run"))
    assert "step 4: valid loss" in said
    assert f"{tmp_path / 'run'}" in run("textgen", "compare", str(tmp_path / "run"))
