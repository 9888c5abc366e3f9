"""What messages and documents tell a user to install: never `textgen` from an index, where it is another project."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from textgen.errors import TextgenError
from textgen.packages import HOME, foreign_version, how_to_install, require_packages

# `pip install textgen`, `pip install -U "textgen[serve]"`, `uvx textgen`, `textgen[serve]`; not a path or a folder.
FROM_AN_INDEX = re.compile(
    r"(pipx?3?|uv|conda|poetry)( \w+)* (install|add|run)( +-\S+| +[\w.,-]+)* +['\"]?textgen\b(?![/.])"
    r"|uvx +textgen|(?<![\w/.])textgen\[\w+\]",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install textgen", True),
        ("python -m pip install -U 'textgen[serve]'", True),
        ("uv pip install torch textgen", True),
        ("needs textgen[serve]", True),
        ("pip install -e '.[serve]'", False),
        ("pip install -e . (textgen)", False),
        ("pip install dist/textgen-0.1.0-py3-none-any.whl", False),
    ],
)
def test_the_search_finds_what_pip_would_take_from_an_index(text: str, found: bool) -> None:
    assert bool(FROM_AN_INDEX.search(text)) == found


def test_no_text_installs_textgen_from_an_index() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HOME, capture_output=True, check=True).stdout
    files = [HOME / name for name in listed.decode().split("\0") if name and (HOME / name).is_file()]
    assert len(files) > 200
    found = [
        f"{path}:{number}: {line}"
        for path in files
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if FROM_AN_INDEX.search(line)
    ]
    assert found == []


def test_a_checkout_installs_by_the_extra_and_a_wheel_by_names_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert how_to_install("uvicorn", extra="serve") == f"run `pip install -e '.[serve]'` in `{HOME}`"
    assert how_to_install("torch") == f"run `pip install -e .` in `{HOME}`"
    assert how_to_install("uvicorn", "wandb-workspaces", "torch", extra="serve", home=tmp_path) == (
        "run `pip install 'uvicorn<0.55,>=0.54' 'wandb-workspaces<0.5,>=0.4.13' 'torch<2.14,>=2.11'`"
    )

    def nothing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", nothing)
    assert how_to_install("uvicorn", home=tmp_path) == "run `pip install 'uvicorn'`"


def test_every_extra_that_a_message_names_has_its_packages() -> None:
    extras = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    calls = []
    for source in (HOME / "textgen").rglob("*.py"):
        calls += re.findall(r'require_packages\("[^"]+", (.*), extra="(\w+)"\)', source.read_text(encoding="utf-8"))
    # serve, export, dashboard, tune, guide, remote; the trackers' extras have the names of their packages
    assert len(calls) == 6
    calls += [(f'"{name}"', name) for name in ("tensorboard", "trackio")]
    for packages, extra in calls:
        listed = [re.split(r"[<>=]", requirement)[0] for requirement in extras[extra]]
        assert sorted(re.findall(r'"([^"]+)"', packages)) == sorted(listed)


def test_a_missing_package_is_named_with_its_command() -> None:
    require_packages("a command", "sentencepiece", extra=None)
    with pytest.raises(TextgenError) as refused:
        require_packages("a command", "no-such-package", "sentencepiece", extra=None)
    assert str(refused.value) == f"a command needs `no-such-package`: run `pip install -e .` in `{HOME}`"


@pytest.mark.parametrize(
    ("module", "version"), [("textgen.cli:main", None), ("textgen.main:run", "1.1.2")], ids=["ours", "another's"]
)
def test_another_projects_textgen_is_noticed(
    module: str, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "textgen-1.1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: textgen\nVersion: 1.1.2\n")
    (folder / "entry_points.txt").write_text(f"[console_scripts]\ntextgen = {module}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert foreign_version() == version
