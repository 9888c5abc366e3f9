"""The architecture page, the README and the docstrings of packages name what is there, and nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "textgen"
PACKAGES = sorted(path.parent for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "tokenizer")
DOCUMENT = ROOT / "docs" / "explanation" / "architecture.md"


def test_there_are_packages() -> None:
    assert len(PACKAGES) > 8


def test_architecture_has_a_row_for_every_room() -> None:
    rooms = [f"`textgen/{path.name}/`" for path in PACKAGES]
    rooms += [f"`textgen/{path.name}`" for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    rows = re.findall(r"^\| (`\S+`) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert sorted([*rooms, "`tokenizer/`"]) == sorted(rows)


def test_the_drawing_names_every_room() -> None:
    drawing = DOCUMENT.read_text().split("```")[1]
    names = [f"{path.name}/" for path in PACKAGES]
    names += [path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    assert [name for name in names if name not in drawing] == []


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "launch/README.md", "docs/explanation/architecture.md"]
)
def test_files_that_a_document_names_exist(document: str) -> None:
    named = re.findall(
        r"`((?:textgen|tokenizer|launch|tests|benchmarks|docs)/[\w./-]*)`", (ROOT / document).read_text()
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_the_docstring_of_a_package_names_its_modules(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    modules = sorted(path.stem for path in package.glob("*.py") if path.stem != "__init__")
    assert sorted(re.findall(r"^- `(\w+)`: ", docstring, re.MULTILINE)) == modules
