"""The verbs as a user calls them: what they print, where, and what they leave."""

from __future__ import annotations

import atexit
import gc
import json
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.forking import server
from textgen.cli import COMMANDS, main, train_main
from textgen.config import TrainConfig
from textgen.data.store import TokenStore
from textgen.settings import settings_of

ROOT = Path(__file__).parents[1]
TEXTGEN = [sys.executable, "-m", "textgen"]

Capture = pytest.CaptureFixture[str]

FIGURES = [
    "bits_per_byte", "nats_per_token", "perplexity", "word_perplexity", "tokens", "bytes", "documents", "seconds",
]  # fmt: skip


# --- evaluate, prepare -----------------------------------------------------------------------------------------------


def test_evaluate_json_prints_these_keys_and_nothing_else(tiny_run: Path, reviews_file: Path, capsys: Capture) -> None:
    main(["evaluate", str(tiny_run), "--data", str(reviews_file), "--limit", "7", "--json"])
    figures = json.loads(capsys.readouterr().out)  # one value: anything beside it would not be JSON
    assert list(figures) == FIGURES
    texts = [json.loads(line)["text"] for line in reviews_file.read_text().splitlines()[:7]]
    assert figures["documents"] == 7
    assert figures["bytes"] == sum(len(text.encode()) for text in texts)
    assert figures["bits_per_byte"] > 0


def test_evaluate_of_the_validation_split_is_the_last_evaluation_of_the_training(
    tiny_run: Path, capsys: Capture
) -> None:
    main(["evaluate", str(tiny_run), "--json"])
    figures = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    logged = [row["valid/bits_per_byte"] for row in rows if "valid/bits_per_byte" in row][-1]
    assert figures["documents"] == 30
    assert figures["bits_per_byte"] == pytest.approx(logged, rel=1e-6)


def test_evaluate_prints_every_figure_on_a_line_of_its_own(tiny_run: Path, capsys: Capture) -> None:
    main(["evaluate", str(tiny_run), "--limit", "2", "--batch_size", "1"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == FIGURES


def test_prepare_prints_a_store_and_training_uses_it(tiny_flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    main(["prepare", *tiny_flags, "--data.cache_dir", str(tmp_path / "cache"), "--tokenizer.vocab_size", "330"])
    printed = capsys.readouterr().out
    store = TokenStore.open(printed.removesuffix("\n"))
    assert store.directory.parent == tmp_path / "cache"
    assert store.tokenizer.vocab_size == 330
    store.directory.rename(tmp_path / "moved")
    run_dir, cache = tmp_path / "run", tmp_path / "unused"
    train_main(
        [*tiny_flags, "--run_dir", str(run_dir), "--data.cache_dir", str(cache),
         "--data.store", str(tmp_path / "moved"), "--data.source", "imdb", "--data.files"]
    )  # fmt: skip
    assert json.loads((run_dir / "data.json").read_text()) == store.record
    assert not cache.exists()


# --- training --------------------------------------------------------------------------------------------------------


def test_dry_run_tells_the_cost_and_leaves_nothing(tiny_flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    train_main([*tiny_flags, "--run_dir", str(tmp_path / "run"), "--dry_run", "--max_steps", "1000"])
    out = capsys.readouterr().out
    for told in (
        " parameters",
        " training tokens",
        "1,000 steps of ",
        " hours",
        " GiB of peak memory",
        "only the token store was written",
    ):
        assert told in out
    assert not (tmp_path / "run").exists()


def test_finished_training_says_so_and_exits_with_0(tiny_run: Path, tiny_flags: list[str], capsys: Capture) -> None:
    before = (tiny_run / "metrics.jsonl").read_bytes()
    train_main([*tiny_flags, "--run_dir", str(tiny_run)])
    assert "has finished at step 4" in capsys.readouterr().out
    assert (tiny_run / "metrics.jsonl").read_bytes() == before


def test_interrupt_is_one_line_and_exit_code_130(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--run_dir", str(tmp_path / "run"), "--max_steps", "1000000", "--max_epochs", "1000000"]
    out, err = tmp_path / "out", tmp_path / "err"
    process = server().start(["train_distributed.py", *flags, "--evaluate_every", "50"], output=out, error=err)
    deadline = time.monotonic() + 60
    while not (out.exists() and "step 50: valid loss" in out.read_text()):
        assert time.monotonic() < deadline, err.read_text()
        assert process.poll() is None, err.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert err.read_text().splitlines()[-1] == "interrupted"
    assert "Traceback" not in err.read_text()


# --- help and speed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [*COMMANDS, None])
def test_help_of_every_verb_is_printed_and_exits_with_0(verb: str | None, capsys: Capture) -> None:
    if verb is None:
        main(["--help"])
    else:
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: textgen {verb or ''}")
    assert err == ""


def test_version_is_that_of_the_package_and_needs_no_torch(capsys: Capture) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"textgen {version('textgen')}\n"
    assert answers_without_torch("cli.main(['--version'])")


def help_of_training(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        train_main(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_of_training_names_values_and_defaults(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    out = " ".join(help_of_training(monkeypatch, capsys).split())
    for text in (
        "--batch_size N lanes of the global batch, whatever the number of processes (default: 128)",
        "--max_grad_norm X largest norm of the gradient; larger gradients are scaled down to it (default: null)",
        "--lr_schedule {constant,cosine,linear}",
        "--mixed_precision {no,bf16,fp16,auto}",
        "default: one evaluation per epoch --",
        "--dry_run [true|false]",
        "--data.files ITEM ...",
    ):
        assert text in out


def test_short_help_ends_a_list(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        train_main(["--data.files", "a.txt", "-h"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_help_of_training_begins_with_a_screen_of_basics(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    groups = help_of_training(monkeypatch, capsys).split("\n\n")
    basics = next(group for group in groups if group.startswith("the basics:"))
    assert groups.index(basics) == 2  # after usage and description
    assert len(basics.splitlines()) <= 24


def test_help_of_training_has_every_setting_once(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    out = help_of_training(monkeypatch, capsys)
    flags = re.findall(r"^  --([\w.]+)", out, re.MULTILINE)
    assert sorted(flags) == sorted([*settings_of(TrainConfig), "config", "print_config"])


def answers_without_torch(call: str) -> bool:
    """Tell whether a call of textgen.cli that ends with SystemExit leaves torch unimported, in a new process."""
    code = f"""
import contextlib, sys
from textgen import cli
with contextlib.suppress(SystemExit):
    {call}
sys.exit("torch" in sys.modules)"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_help_and_wrong_flags_are_answered_without_waiting_for_torch() -> None:
    for call in (
        "cli.main(['--help'])",
        "cli.train_main(['--lerning_rate', '1'])",
        "cli.train_main(['--help'])",
        "cli.main(['evaluate', 'x', '--limt', '1'])",
    ):
        assert answers_without_torch(call), call


def test_help_of_sample_is_printed_without_waiting_for_torch() -> None:
    assert answers_without_torch("cli.main(['sample', '--help'])")


def test_wrong_flag_is_answered_without_an_import_of_torch() -> None:
    """In 0.17 s, where torch alone takes 1.5 (2 cores, 2026-11-23)."""
    command = [sys.executable, "-X", "importtime", "-m", "textgen", "prepare", "--sede", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "textgen.cli" in imported
    assert "torch" not in imported


# --- garbage ---------------------------------------------------------------------------------------------------------

AT_EXIT = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_threshold()[0], gc.get_freeze_count() > 0))  # after the handlers of `main`
from textgen.cli import main
main()
"""


@pytest.mark.parametrize("verb", ["sample", "train"])
def test_a_command_ends_without_a_search_for_garbage(verb: str) -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT, verb, "--unknown"], capture_output=True, text=True)
    assert done.returncode == 2
    threshold, frozen = done.stdout.split()
    assert frozen == "True"
    assert (threshold == "10000") == (verb == "sample")


def test_a_caller_of_main_keeps_its_collector(capsys: Capture) -> None:
    def collector() -> tuple[object, ...]:
        return gc.get_threshold(), gc.get_freeze_count(), atexit._ncallbacks()

    before = collector()
    with pytest.raises(SystemExit):
        main(["sample", "--unknown"])
    assert collector() == before
