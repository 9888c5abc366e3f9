"""Links in every Markdown file lead somewhere; the reference is what the command line says; the site has all pages."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from docs.write_reference import PAGES as REFERENCE
from docs.write_site import PAGES as OUTSIDE
from docs.write_site import adapt, notebook_page, write_pages
from textgen.serving.protocol import CompletionRequest

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
PAGES = LISTED or [str(path.relative_to(ROOT)) for path in ROOT.glob("[!.]*/**/*.md")]


def without_code(text: str) -> str:
    """Return Markdown without fenced blocks and code spans: what looks like a link or a heading there is none."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^( *)(```+).*?^\1\2", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """Return the anchors that a forge gives to the headings of a page."""
    blocks = re.sub(r"^( *)(```+).*?^\1\2", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*?) *$", blocks, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "docs/first.ipynb"])
def test_links_lead_somewhere(page: str) -> None:
    wrong = []
    text = notebook_page(ROOT / page) if page.endswith(".ipynb") else (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        place, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (ROOT / page).parent / place if place else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_is_what_the_command_line_says(name: str) -> None:
    written = (ROOT / "docs" / "reference" / name).read_text()
    assert written == REFERENCE[name](), "run `python -m docs.write_reference`"


def names_in(page: str) -> set[str]:
    """Return all that a page of the reference has in backticks."""
    return set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "reference" / page).read_text()))


def test_metrics_page_has_every_metric_of_a_run(tiny_run: Path) -> None:
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    found = {re.sub(r"machine/\d+/", "machine/N/", name) for row in rows for name in row}
    assert "train/loss" in found
    assert sorted(found - names_in("metrics.md")) == []


def test_files_page_has_every_file_of_a_run(tiny_run: Path) -> None:
    (checkpoint, *_) = (tiny_run / "checkpoints").iterdir()
    found = {path.name for folder in (tiny_run, checkpoint) for path in folder.iterdir() if path.is_file()}
    assert "manifest.json" in found
    assert sorted(found - names_in("run-directory.md")) == []


def test_http_page_has_every_field_of_a_completion() -> None:
    fields = set(CompletionRequest.__annotations__)  # without those that are refused
    assert "prompt" in fields
    assert sorted(fields - names_in("http-api.md")) == []


def test_links_between_pages_stay_and_other_files_become_text() -> None:
    text = "[a](track.md#metrics) [b](../../launch/README.md) [c](../../textgen/config.py) ![d](../images/quick.png)"
    assert adapt(text, source="docs/how-to/serve.md") == (
        "[a](track.md#metrics) [b](../launch.md) c ![d](../images/quick.png)"
    )
    assert (
        adapt("[e](docs/explanation/architecture.md)", source="CONTRIBUTING.md") == "[e](explanation/architecture.md)"
    )
    assert adapt("[f](../first.ipynb)", source="docs/how-to/python.md") == "[f](../first.md)"


def test_the_page_of_a_notebook_has_its_outputs(tmp_path: Path) -> None:
    page = notebook_page(ROOT / "docs" / "first.ipynb", tmp_path)
    assert page.startswith("# A first model in a notebook\n")
    assert "```python\nimport matplotlib.pyplot as plt\n\nimport textgen\n```" in page
    assert re.search(r"```\nfinished at step \d+\n```", page)
    pictures = sorted(path.name for path in tmp_path.iterdir())
    assert pictures == sorted(re.findall(rf"\({tmp_path.name}/(.*?\.png)\)", page))
    assert len(pictures) == 2
    assert (tmp_path / pictures[0]).read_bytes().startswith(b"\x89PNG")


def test_navigation_has_every_page(tmp_path: Path) -> None:
    write_pages(tmp_path)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")}
    assert set(OUTSIDE.values()) <= pages

    def listed(entry: object) -> list[str]:
        if isinstance(entry, dict):
            entry = list(entry.values())
        return [entry] if isinstance(entry, str) else [page for part in entry for page in listed(part)]  # type: ignore

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    records = {page for page in pages if page.startswith("decisions/0")}
    assert sorted(listed(navigation)) == sorted(pages - records)


def test_every_decision_is_in_the_table_with_its_title() -> None:
    folder = ROOT / "docs" / "decisions"
    table = (folder / "index.md").read_text()
    for record in sorted(folder.glob("0*.md")):
        number, title = re.match(r"# (\d+)\. (.*)", record.read_text()).groups()  # type: ignore[union-attr]
        assert int(number) == int(record.name[:4])
        assert f"| {number} | [{title}]({record.name}) |" in table
