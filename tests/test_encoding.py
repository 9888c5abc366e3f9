"""Text is UTF-8 in every locale: what commands print, the arguments that they get, and the files that they open."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from textgen.cli import main

ROOT = Path(__file__).parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LATIN_1 = {"PYTHONIOENCODING": "latin-1"}

Done = subprocess.CompletedProcess[bytes]


def textgen(*argv: str | bytes, environment: dict[str, str]) -> Done:
    command = [sys.executable, "-m", "textgen", *argv]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, timeout=120)


def test_samples_are_utf8_in_a_stream_of_latin_1(tiny_run: Path) -> None:
    flags = ["--prompt", "“naïve” 好", "--max_new_tokens", "3"]
    done = textgen("sample", str(tiny_run), *flags, environment=LATIN_1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("“naïve” 好")


# Runs the commands of its arguments, each after the word `then`, in an interpreter of a locale that is not UTF-8.
PROGRAM = """
import itertools, sys
from textgen.cli import main
from textgen.console import use_utf8
use_utf8()
for separator, command in itertools.groupby(sys.argv[1:], lambda word: word == "then"):
    if not separator:
        main(list(command))
"""


def test_commands_open_no_file_in_the_encoding_of_the_locale_and_print_names_byte_by_byte(
    tiny_flags: list[str], reviews_file: Path, tmp_path: Path
) -> None:
    """The folder of the run has a name that is not UTF-8, which every command prints."""
    run_dir, page = os.fsencode(tmp_path) + b"/run-\xe9", str(tmp_path / "page.html")
    commands: list[list[str | bytes]] = [
        ["train", *tiny_flags, "--run_dir", run_dir, "--max_steps", "2", "--sample_prompts", "“é”"],
        ["sample", run_dir, "--prompt", "“é”", "--max_new_tokens", "2", "--json"],
        ["evaluate", run_dir, "--data", str(reviews_file), "--limit", "2"],
        ["export", run_dir, "--data", str(reviews_file), "--limit", "2"],
        ["compare", run_dir],
        ["verify", run_dir],
        ["report", run_dir, "--out", page],
        ["publish", run_dir, "--to", str(tmp_path / "published-é")],
        ["prepare", *tiny_flags, "--data.cache_dir", run_dir + b"-cache"],
        ["doctor", *tiny_flags, "--run_dir", run_dir],
        ["dashboard", "--print", "--project", "é"],
        ["submit", "--dry_run", "--gpus_per_node", "0", "--", *tiny_flags, "--sample_prompts", "“é”"],
    ]
    python = [sys.executable, "-X", "warn_default_encoding", "-W", "always::EncodingWarning", "-c", PROGRAM]
    words = [word for command in commands for word in ["then", *command]]
    done = subprocess.run([*python, *words], env=os.environ | ASCII, cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    warnings = [line for line in done.stderr.decode().splitlines() if "EncodingWarning" in line]
    assert [line for line in warnings if "site-packages" not in line] == []
    assert done.stdout.count(run_dir) >= 4  # export, compare, prepare, doctor
    assert "“é”".encode() in done.stdout
    assert "“é”" in (tmp_path / os.fsdecode(run_dir) / "samples.md").read_text(encoding="utf-8")


def test_logs_escape_what_their_stream_cannot_hold() -> None:
    done = textgen("train", "--config", "“é.yaml", environment=LATIN_1)
    assert done.returncode == 2
    assert done.stderr == b"error: `\\u201c\xe9.yaml` cannot be read: No such file or directory\n"


def test_json_and_names_of_files_are_utf8_in_an_ascii_locale(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "“prompt”").write_text("“é”\n", encoding="utf-8")
    flags = ["--prompt_file", str(tmp_path / "“prompt”"), "--json", "--max_new_tokens", "2"]
    done = textgen("sample", str(tiny_run), *flags, environment=ASCII)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "“é”"
    assert "“é”".encode() in done.stdout


# --- names that are not UTF-8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--sample_prompts", b"a\xe9"], "`--sample_prompts` is not UTF-8: byte 0xe9 at position 1"),
        (["train", "--data.files", b"\xe9.txt"], "`--data.files` is not UTF-8: byte 0xe9 at position 0"),
        (["publish", "runs/quick", "--to", b"\xe9"], "`--to` is not UTF-8: byte 0xe9 at position 0"),
        (["sample", "runs/quick", "--prompt", b"\xe9"], "`--prompt` is not UTF-8: byte 0xe9 at position 0"),
    ],
)
def test_arguments_that_are_not_utf8_are_refused_where_text_is_wanted(
    command: list[str | bytes], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([os.fsdecode(word) for word in command])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


# --- source ----------------------------------------------------------------------------------------------------------


def calls_without_encoding(path: Path) -> Iterator[str]:
    """Yield the calls of a source file that open text in the encoding of the locale."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else None
        words = {value.value for value in [*node.args, *given.values()] if isinstance(value, ast.Constant)}
        modes = {word for word in words if isinstance(word, str) and set(word) <= set("rwaxbt+")}
        opens = name == "open" and owner not in ("os", "TokenStore", "self._backend")
        text = name in ("read_text", "write_text") or (opens and not any("b" in mode for mode in modes))
        text |= owner == "subprocess" and bool(given.keys() & {"text", "universal_newlines"})
        if text and "encoding" not in given:
            yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_no_source_opens_text_without_its_encoding() -> None:
    folders = (ROOT / "textgen", ROOT / "tokenizer")
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(sources) > 80
    assert [call for source in sources for call in calls_without_encoding(source)] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("open(path)", True),
        ("path.open('a')", True),
        ("path.read_text()", True),
        ("subprocess.run(command, text=True)", True),
        ("open(path, 'rb')", False),
        ("path.read_text(encoding='utf-8')", False),
        ("subprocess.run(command)", False),
    ],
)
def test_the_search_finds_text_without_its_encoding(source: str, found: bool, tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text(source)
    assert bool(list(calls_without_encoding(tmp_path / "source.py"))) == found
