"""The commands of the README and the guides are commands."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shlex
import shutil
from glob import glob
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.faults.report import DOCUMENT, rendered
from textgen.cli import main
from textgen.commands.parsing import parse_train_config
from textgen.commands.tune import build_tune_parser, split_flags

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "train_distributed.py", *(
    str(path.relative_to(ROOT))
    for folder in ("how-to", "tutorial")
    for path in sorted((ROOT / "docs" / folder).glob("*.md"))
)]  # fmt: skip
COMMANDS = [
    (document, line.split("  #")[0].strip())
    for document in DOCUMENTS
    for line in (ROOT / document).read_text().splitlines()
    # a server does not end, and a search takes minutes
    if re.search(r"(python|launch .*) train_distributed\.py|^textgen (?!serve |tune )\w", line)
]
VERBS = [(document, command) for document, command in COMMANDS if re.match("textgen (?!prepare|train)", command)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 8


@pytest.mark.parametrize(
    "command", [c for _, c in COMMANDS if re.search(r"train_distributed\.py|^textgen (prepare|train) ", c)]
)
def test_readme_training_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    page = (ROOT / "docs" / "how-to" / "mixtures.md").read_text()
    (tmp_path / "mixed.yaml").write_text(re.findall(r"```yaml\n# mixed.yaml\n(.*?)```", page, re.DOTALL)[0])
    flags = (
        re.split(r"train_distributed\.py|textgen prepare|textgen train", command)[1].split("`")[0].split(", then")[0]
    )
    flags = flags.replace("--shards", "--data.shards")  # as `textgen prepare` does
    parse_train_config(shlex.split(flags.replace("...", "launch/presets/quick.yaml")))


def test_readme_search_parses() -> None:
    (command,) = re.findall(r"^textgen tune (.*)", (ROOT / "docs/how-to/tune.md").read_text(), re.MULTILINE)
    parser = build_tune_parser()
    own, others = split_flags(shlex.split(command), parser)
    assert parser.parse_args(own).minutes == 10
    assert parse_train_config(others).run_dir == "runs/books"


@pytest.mark.parametrize("document", sorted({document for document, _ in VERBS}))
def test_verbs_of_a_document_run(
    document: str,
    tiny_run: Path,
    labelled_run: Path,
    reviews_file: Path,
    labelled_reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All commands of a page but trainings, one after the other, as a reader types them."""
    (tmp_path / "reviews.jsonl").write_text(reviews_file.read_text().replace('"text"', '"review"'))
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "label"])
        table.writeheader()
        table.writerows(json.loads(line) for line in labelled_reviews.read_text().splitlines()[:40])
    (tmp_path / "flags.txt").write_text("--learning_rate 0.001\n--learning_rate 0.002\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "i love"}\n{"prompt": "", "seed": 7}\n')
    (tmp_path / "long.txt").write_text("A long text, and more of it. " * 9)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "runs" / "sweep-1234").mkdir(parents=True)
    for run in ("quick", "books", "first", "profiled", "python", "sweep-1234/1", "sweep-1234/2"):
        shutil.copytree(tiny_run, tmp_path / "runs" / run)  # an export leaves something in it
    (tmp_path / "runs" / "profiled" / "profile").mkdir()
    trace = b'{"traceEvents": [], "textgen": {"first": 20, "last": 23}}'
    (tmp_path / "runs" / "profiled" / "profile" / "process-0-of-1.json.gz").write_bytes(gzip.compress(trace))
    shutil.copytree(labelled_run, tmp_path / "runs" / "reviews")
    monkeypatch.chdir(tmp_path)
    for command in (command for of_document, command in VERBS if of_document == document):
        words = [match for word in shlex.split(command) for match in sorted(glob(word)) or [word]]
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the command before
        if words[1] == "submit" and "--dry_run" not in words:
            words.insert(2, "--dry_run")
        main(words[1:])


@pytest.mark.parametrize("document", ["README.md", "docs/how-to/python.md"])
def test_python_of_a_document_runs(
    document: str,
    reviews_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All blocks of a page, one after the other, with two steps in place of two minutes."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    program = "".join(blocks)
    assert program.count("max_minutes=2") == 1
    (tmp_path / "reviews").mkdir()
    shutil.copy(reviews_file, tmp_path / "reviews")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    exec(program.replace("max_minutes=2", 'max_minutes=None, max_steps=2, tokenizer={"vocab_size": 400}'), {})
    assert len(capsys.readouterr().out) > 2


def test_tables_of_faults_are_what_was_measured() -> None:
    """`python -m tests.faults.report` puts them there; nobody types a figure."""
    text = DOCUMENT.read_text()
    assert rendered(text) == text
    assert "-->\n<!-- /" not in text, "a table is missing"
