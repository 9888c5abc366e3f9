"""W&B's own switches and settings win over our defaults, and flags win over both (law 7)."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forking import server
from tests.tracking.test_wandb import assert_each_row_once, inspect_folder
from tests.tracking.wandb_server import KEY, WandbServer, wandb_server
from textgen.cli import main, train_main
from textgen.config import TrackingConfig
from textgen.errors import TextgenError
from textgen.tracking.wandb_settings import find_mode, find_setting

Train = Callable[..., tuple[int, str]]

# Prints whether wandb was imported. The end of the training waits as long as a busy machine takes.
SCRIPT = """
import sys
from textgen.cli import train_main
from textgen.tracking import wandb
wandb.FINISH_SECONDS = 120
try:
    train_main()
finally:
    print(f"imported: {'wandb' in sys.modules}")
"""


@pytest.fixture(autouse=True)
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's own W&B is seen; a folder of the test is the working directory."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def asked() -> Iterator[WandbServer]:
    """Yield a W&B server."""
    with wandb_server() as one:
        yield one


@pytest.fixture
def train(tiny_flags: list[str], tmp_path: Path) -> Train:
    """Return a function that trains in the working directory, and returns the exit code and the log."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def run(*more: str, **environment: str) -> tuple[int, str]:
        said = tmp_path / "said"
        said.write_text("")
        flags = [*tiny_flags, "--run_dir", "run", "--tracking.mode", "auto", "--log_every", "1", *more]
        process = server().start(
            [str(script), *flags], output=said, error=said, env=os.environ | environment, cwd=Path.cwd()
        )
        return process.wait(), said.read_text()

    return run


def write_settings(path: Path, **settings: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[default]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"WANDB_MODE": "disabled"}, "WANDB_MODE"),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "WANDB_DISABLED"),
    ],
)
def test_wandb_that_is_switched_off_is_never_asked(
    train: Train, asked: WandbServer, tmp_path: Path, environment: dict[str, str], place: str
) -> None:
    code, log = train(**asked.environment(tmp_path), **environment)
    assert code == 0, log
    assert (asked.requests, log.count("W&B")) == (0, 1)
    assert f"W&B is switched off by {place}\n" in log
    assert "imported: False" in log
    assert not Path("run/wandb").exists()


@pytest.mark.slow
def test_wandbs_own_commands_switch_it_off_and_offline(train: Train, asked: WandbServer, tmp_path: Path) -> None:
    environment = asked.environment(tmp_path)
    for command, line in (("disabled", "W&B is switched off by `mode` in"), ("offline", "W&B is offline:")):
        subprocess.run(
            [sys.executable, "-m", "wandb", command], check=True, capture_output=True, env=os.environ | environment
        )
        asked.requests = 0
        code, log = train("--run_dir", command, **environment)
        assert (code, asked.requests) == (0, 0), log
        assert line in log
        assert Path(command, "wandb").exists() == (command == "offline")


def test_wandbs_settings_win_over_our_defaults_and_flags_over_both(train: Train) -> None:
    """The files are in WANDB_DIR, and a start without it finds them."""
    write_settings(Path("wandb/settings"), project="of the file", run_job_type="probe", entity="nobody")
    own = {
        "WANDB_MODE": "dryrun", "WANDB_ENTITY": "team", "WANDB_NAME": "fourth try", "WANDB_TAGS": "a,b",
        "WANDB_NOTES": "why", "WANDB_RUN_GROUP": "group", "WANDB_RUN_ID": "run.1", "WANDB_CONSOLE": "wrap",
    }  # fmt: skip
    code, log = train(**own, WANDB_DIR="my disk")
    assert code == 0, log
    records = inspect_folder(Path("my disk/wandb"))
    (run,) = records["run"]
    names = ("project", "entity", "display_name", "tags", "notes", "run_group", "job_type", "run_id")
    assert [run[name] for name in names] == [
        "of the file", "team", "fourth try", ["a", "b"], "why", "group", "probe", "run.1",
    ]  # fmt: skip
    assert records["output_raw"], "of WANDB_CONSOLE"
    assert not list(Path("run/wandb").glob("offline-run-*"))

    flags = ("--tracking.project", "flag", "--tracking.group", "another", "--tracking.job_type", "job")
    off = own | {"WANDB_MODE": "disabled"}
    code, log = train("--max_steps", "6", "--tracking.mode", "offline", *flags, **off)
    assert code == 0, log
    (run,) = inspect_folder(Path("run/wandb"))["run"]
    assert [run[name] for name in ("project", "run_group", "job_type", "run_id")] == ["flag", "another", "job", "run.1"]
    both = Path("both")
    both.mkdir()
    for folder in (Path("my disk/wandb"), Path("run/wandb")):
        for part in folder.glob("offline-run-*"):
            (both / f"{folder.parts[0]}-{part.name}").symlink_to(part.resolve())
    assert_each_row_once(Path("run"), inspect_folder(both))
    assert synced(log, Path.cwd()) == [
        str(part) for folder in ("my disk/wandb", "run/wandb") for part in Path(folder).glob("offline-run-*-run.1")
    ]


def synced(log: str, cwd: Path) -> list[str]:
    """Return the arguments that a shell passes to `wandb` by the line that the training logs."""
    stub = cwd / "bin" / "wandb"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    (line,) = [line for line in log.splitlines() if "W&B is offline:" in line]
    command = line.split("`")[3]
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    shown = subprocess.run(
        command, shell=True, cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    verb, *folders = shown.stdout.splitlines()
    assert verb == "sync"
    return folders


def test_a_setting_is_found_where_wandb_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_setting("project") is None
    write_settings(tmp_path / "home/.config/wandb/settings", project="global", base_url="https://own.example")
    assert find_setting("project") == ("global", f"`project` in `{tmp_path}/home/.config/wandb/settings`")
    write_settings(Path("wandb/settings"), project="local")
    assert find_setting("project") == ("local", "`project` in `wandb/settings`")
    assert find_setting("base_url") is not None
    monkeypatch.setenv("WANDB_PROJECT", "")  # as if it were not set
    assert find_setting("project") == ("local", "`project` in `wandb/settings`")
    monkeypatch.setenv("WANDB_PROJECT", "variable")
    assert find_setting("project") == ("variable", "WANDB_PROJECT")
    Path("wandb/settings").write_bytes(b"\xff no settings")
    monkeypatch.delenv("WANDB_PROJECT")
    assert find_setting("project") == ("global", f"`project` in `{tmp_path}/home/.config/wandb/settings`")


@pytest.mark.parametrize(
    ("mode", "variable", "wanted"),
    [
        ("auto", None, "auto"), ("auto", "run", "online"), ("auto", "offline", "offline"),
        ("online", "disabled", "online"), ("disabled", "online", "disabled"), ("offline", "no mode", "offline"),
    ],
)  # fmt: skip
def test_the_mode_is_the_flags_then_wandbs(
    monkeypatch: pytest.MonkeyPatch, mode: str, variable: str | None, wanted: str
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert find_mode(TrackingConfig(mode=mode)).value == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["shared", "disable", ""])
def test_a_mode_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(
        TextgenError, match=f"WANDB_MODE is '{mode}', not one of online, run, offline, dryrun, disabled"
    ):
        find_mode(TrackingConfig())


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("WANDB_MODE", "of", "WANDB_MODE is 'of', not one of online, run, offline, dryrun, disabled"),
        (
            "WANDB_RUN_ID", "my run",
            "WANDB_RUN_ID is 'my run', not 1 to 64 letters, digits, underscores, hyphens and periods",
        ),
    ],
)  # fmt: skip
def test_a_setting_of_wandb_that_cannot_be_used_is_one_line(
    tiny_flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    line: str,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as refused:
        train_main([*tiny_flags, "--run_dir", "run", "--tracking.mode", "auto"])
    assert refused.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {line}\n")
    assert not Path("run").exists()


def test_the_dashboard_is_not_asked_of_a_wandb_that_is_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: WandbServer, tmp_path: Path
) -> None:
    for name, value in (asked.environment(tmp_path) | {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        main(["dashboard"])
    assert capsys.readouterr().err == "error: W&B is switched off by WANDB_MODE; `--print` needs no W&B\n"
    assert asked.requests == 0
