"""A training on several sources: scores of each, resumed bit for bit, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import textgen
from tests.training.test_resume import assert_same_end, flags_for
from textgen.cli import main, train_main
from textgen.commands.parsing import parse_train_config
from textgen.diagnosis.inputs import find_data
from textgen.errors import TextgenError
from textgen.runs.checkpoint import checkpoints
from textgen.runs.metrics_file import read_metrics
from textgen.training import loop as training

pytestmark = pytest.mark.usefixtures("any_precision")

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def sources_of(tiny_flags: list[str], labelled_reviews: Path, *weights: float) -> str:
    files = {"reviews": tiny_flags[3], "others": str(labelled_reviews)}
    parts = zip(files.items(), weights, strict=True)
    return json.dumps([{"name": name, "weight": weight, "files": [file]} for (name, file), weight in parts])


@pytest.fixture
def mixed_flags(tiny_flags: list[str], labelled_reviews: Path) -> list[str]:
    """Return the flags of a tiny training on two sources, of which a lane is shared: 5.6 and 2.4 lanes."""
    return [*tiny_flags[4:], "--data.sources", sources_of(tiny_flags, labelled_reviews, 0.7, 0.3)]


def test_each_source_is_scored_and_the_whole_by_weights(
    mixed_flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    train_main(flags_for(mixed_flags, tmp_path / "run", "--log_every", "1"))
    rows = read_metrics(tmp_path / "run")
    scored = next(row for row in rows if "valid/loss" in row)
    parts = [scored[f"valid/loss/{name}"] for name in ("reviews", "others")]
    assert scored["valid/loss"] == pytest.approx(0.7 * parts[0] + 0.3 * parts[1], rel=1e-6)
    assert scored["valid/bits_per_byte/reviews"] != scored["valid/bits_per_byte/others"]
    tokens = json.loads((tmp_path / "run" / "data.json").read_text())["sources"]
    assert scored["step"] == 4
    for name, width in (("reviews", 5.6), ("others", 2.4)):
        last = [row for row in rows if f"passes/{name}" in row][-1]
        assert last[f"passes/{name}"] == pytest.approx(4 * 16 * width / tokens[name]["train"]["tokens"], rel=0.05)
    printed = capsys.readouterr().out
    assert f"reviews {scored['valid/bits_per_byte/reviews']:.4f}, others" in printed

    main(["evaluate", str(tmp_path / "run"), "--json"])
    figures = json.loads(capsys.readouterr().out)
    for name in ("", "/reviews", "/others"):
        assert figures[f"bits_per_byte{name}"] == pytest.approx(scored[f"valid/bits_per_byte{name}"], rel=1e-4)
    assert figures["nats_per_token"] == pytest.approx(scored["valid/loss"], rel=1e-4)
    held_out = [splits["validation"] for splits in tokens.values()]
    for figure in ("documents", "tokens", "bytes"):  # as they are, not by weights
        assert figures[figure] == sum(size[figure] for size in held_out)
    assert figures["documents"] == 70


# Trains, notes every window, and kills itself in step 38.
KILLED = """
import os, signal, sys, zlib
from textgen.training import loop

original = loop.train_step

def step(learner, micro_batches, **options):
    if learner.progression.step == 37:
        learner.accelerator.wait_for_everyone()
        os.kill(os.getpid(), signal.SIGKILL)
    for batch in micro_batches:
        for lane, tokens in zip(batch["lanes"].tolist(), batch["tokens"]):
            print(learner.progression.step, lane, zlib.crc32(tokens.numpy().tobytes()), flush=True)
    return original(learner, micro_batches, **options)

loop.train_step = step
from textgen.cli import train_main
train_main(sys.argv[1:])
"""


def test_a_training_that_was_killed_and_stopped_reads_each_window_once_and_ends_bit_for_bit(
    mixed_flags: list[str],
    tmp_path: Path,
    stop_at: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of these steps is in the middle of a pass of the sources. They begin passes at other steps of their own."""
    flags = ["--max_steps", "60", "--save_every", "16", "--model.dropout", "0.2", "--ema_decay", "0.9"]
    read: Counter[tuple[int, int, int]] = Counter()
    original = training.train_step

    def step(learner: training.Learner, micro_batches: Any, **options: Any) -> torch.Tensor:
        for batch in micro_batches:
            for lane, tokens in zip(batch["lanes"].tolist(), batch["tokens"], strict=True):
                read[learner.progression.step, lane, zlib.crc32(tokens.numpy().tobytes())] += 1
        return original(learner, micro_batches, **options)

    monkeypatch.setattr(training, "train_step", step)
    train_main(flags_for(mixed_flags, tmp_path / "whole", *flags))
    wanted = Counter(read)
    assert set(wanted.values()) == {1}
    assert len(wanted) == 60 * 8

    parts = flags_for(mixed_flags, tmp_path / "parts", *flags)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, *parts]
    killed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    noted = [tuple(map(int, line.split())) for line in killed.stdout.splitlines() if line[:1].isdigit()]
    saved = checkpoints(tmp_path / "parts")[0][0]
    assert saved in (16, 32)  # a save may be under way when the process is killed
    read = Counter({(a, b, c): 1 for a, b, c in noted if a < saved})
    stop_at(51)
    with pytest.raises(SystemExit) as stopped:
        train_main(parts)
    assert stopped.value.code == 128 + signal.SIGTERM
    stop_at(None)
    train_main(parts)
    assert read == wanted
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_other_weights_are_another_training_on_the_same_store(
    mixed_flags: list[str], tiny_flags: list[str], labelled_reviews: Path, tmp_path: Path, capsys: Capture
) -> None:
    train_main(flags_for(mixed_flags, tmp_path / "run", "--max_steps", "2"))
    capsys.readouterr()
    others = [*mixed_flags[:-1], sources_of(tiny_flags, labelled_reviews, 0.6, 0.4)]
    with pytest.raises(SystemExit) as refused:
        train_main(flags_for(others, tmp_path / "run"))
    assert refused.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: `weights of data.sources` is {'reviews': 0.6, 'others': 0.4}, `")
    assert "was made with {'reviews': 0.7, 'others': 0.3}: " in said
    started = ["--init_from", str(tmp_path / "run"), "--max_steps", "2"]
    at = others.index("--tokenizer.vocab_size")
    train_main(flags_for(others[:at] + others[at + 6 :], tmp_path / "from", *started))
    rows = read_metrics(tmp_path / "from")
    assert [row["step"] for row in rows if "valid/loss/others" in row] == [0, 2]


def test_python_takes_sources_as_a_list_of_mappings(mixed_flags: list[str], tmp_path: Path) -> None:
    train_main(flags_for(mixed_flags, tmp_path / "flags"))
    config = parse_train_config(flags_for(mixed_flags, tmp_path / "python"))
    sources = json.loads(mixed_flags[-1])
    run = textgen.train(replace(config, data=replace(config.data, sources=())), data={"sources": sources})
    assert_same_end(tmp_path / "flags", run.path)
    with pytest.raises(TextgenError, match=r"^`texts`, `data.sources`: give one of them$"):
        textgen.train(texts=["a"], data={"sources": sources}, run_dir=str(tmp_path / "none"))
    with pytest.raises(TextgenError, match=r"^`data.sources` names the texts of this training"):
        textgen.train(config, texts=["a"], run_dir=str(tmp_path / "none"))


def test_prepare_doctor_reports_and_cards_take_several_sources(
    mixed_flags: list[str], tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    config = yaml.safe_dump({"data": {"sources": json.loads(mixed_flags[-1])}})
    (tmp_path / "mixed.yaml").write_text(config)
    given = [*mixed_flags[:-2], "--config", str(tmp_path / "mixed.yaml")]
    main(["prepare", *given])
    prepared = Path(capsys.readouterr().out.strip())
    _, store = find_data(parse_train_config(given))
    assert store is not None
    assert store.directory == prepared
    train_main(flags_for(given, tmp_path / "run"))
    assert any("; shares of the tokens: reviews 0.7, 0.0" in line for line in caplog.messages)
    again = parse_train_config(["--config", str(tmp_path / "run" / "config.yaml")])
    assert again == parse_train_config(flags_for(given, tmp_path / "run"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Bits per byte of others" in page
    assert "IMDB" not in page
    main(["publish", str(tmp_path / "run"), "--to", str(tmp_path / "model")])
    card = (tmp_path / "model" / "README.md").read_text()
    assert "2 sources, by share of the tokens that were read: reviews 70.0%, others 30.0%" in card
    assert "| train of others |" in card
    assert "bits per byte, others" in card
    assert "reviews.jsonl" not in card
    assert "stanfordnlp" not in card


def test_micro_batches_and_stores_by_name_have_the_same_losses(mixed_flags: list[str], tmp_path: Path) -> None:
    train_main(flags_for(mixed_flags, tmp_path / "one", "--log_every", "1"))
    store = json.loads((tmp_path / "one" / "data.json").read_text())["key"][:16]
    cache = Path(mixed_flags[mixed_flags.index("--data.cache_dir") + 1])
    flags = ["--data.store", str(cache / store), "--gradient_accumulation_steps", "4", "--log_every", "1"]
    train_main(flags_for(mixed_flags, tmp_path / "four", *flags))
    one, four = ([r["train/loss"] for r in read_metrics(tmp_path / n) if "train/loss" in r] for n in ("one", "four"))
    assert len(one) == 4
    assert four == pytest.approx(one, rel=1e-5)
