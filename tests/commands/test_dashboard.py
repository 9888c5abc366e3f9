"""The W&B dashboard as code: panels of what runs write, and what W&B is sent, told by a stand-in for its server."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tracking.wandb_server import wandb_server
from textgen.cli import main
from textgen.commands.dashboard import SECTIONS
from textgen.packages import HOME
from textgen.runs.metrics_file import read_metrics

# of wandb-workspaces itself
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")

ELSEWHERE = {"train/flops_share", "train/skipped_steps", "train/exchange_share"}
"""metrics that a run of one process need not write on a processor: peak may be unknown, no float16, no other process"""
OF_SOURCES = {"valid/bits_per_byte/reviews"}
"""metrics of a training on several sources"""


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No W&B key is to be found."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


def sections(specification: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the panels of each section, as W&B reads them."""
    bank = specification["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in bank}


def test_panels_name_metrics_that_a_run_writes(tiny_run: Path) -> None:
    written = {name for row in read_metrics(tiny_run) for name in row}
    for panel in (panel for panels in SECTIONS.values() for panel in panels):
        for name in (*panel.metrics, panel.x):
            found = [metric for metric in written | ELSEWHERE | OF_SOURCES if re.fullmatch(name, metric)]
            assert found, f"`{panel.title}` shows `{name}`, which nobody writes"


@pytest.mark.usefixtures("no_key")
def test_print_tells_the_panels_in_the_order_of_the_questions(capsys: pytest.CaptureFixture[str]) -> None:
    main(["dashboard", "--print"])
    printed = sections(json.loads(capsys.readouterr().out)["spec"])
    assert list(printed) == [*SECTIONS, "What does it write?", "Which settings matter?"]
    first = printed["Is it learning?"][0]
    assert first["viewType"] == "Run History Line Plot"
    assert first["config"]["metrics"] == ["train/bits_per_byte", "valid/bits_per_byte"]
    assert first["config"]["xAxis"] == "step"
    assert '"val": "samples"' in json.dumps(printed["What does it write?"])
    assert printed["Which settings matter?"][0]["config"]["targetKey"] == "valid/bits_per_byte"


def test_one_command_creates_the_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with wandb_server() as server:
        for name, value in server.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        main(["dashboard", "--project", "reviews"])
        assert capsys.readouterr().out == f"http://127.0.0.1:{server.server_port}/somebody/reviews?nw=abc\n"
    (sent,) = [variables for operation, variables in server.asked if operation == "UpsertView2"]
    assert (sent["entityName"], sent["projectName"], sent["type"]) == ("somebody", "reviews", "project-view")
    assert len(sections(json.loads(sent["spec"]))) == len(SECTIONS) + 2


@pytest.mark.usefixtures("no_key")
def test_without_a_key_a_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["dashboard"])
    assert capsys.readouterr().err == (
        "error: no W&B key, neither from `wandb login` nor in WANDB_API_KEY; `--print` needs no key\n"
    )


def test_what_w_and_b_refuses_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with wandb_server() as server:
        server.refused["UpsertView2"] = "permission denied"
        for name, value in server.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match="2"):
            main(["dashboard", "--entity", "others"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: W&B refused the dashboard: ")
    assert "permission denied" in last


def test_a_missing_package_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit, match="2"):
        main(["dashboard", "--print"])
    assert capsys.readouterr().err == (
        f"error: `textgen dashboard` needs `wandb-workspaces`: run `pip install -e '.[dashboard]'` in `{HOME}`\n"
    )
