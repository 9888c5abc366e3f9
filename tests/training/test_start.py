"""`--init_from`: a new training starts from the weights, the shape and the tokenizer of another model."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tests.training.test_resume import assert_same_end, flags_for
from textgen.cli import main, train_main
from textgen.commands.parsing import parse_train_config, take_base
from textgen.config import TokenizerConfig, TrainConfig
from textgen.data.store import TokenStore
from textgen.data.texts import store_of
from textgen.errors import TextgenError
from textgen.model.files import load_model
from textgen.reporting.card import origin_of
from textgen.runs.checkpoint import checkpoints
from textgen.runs.metrics_file import read_metrics

pytestmark = pytest.mark.usefixtures("any_precision")

Capture = pytest.CaptureFixture[str]
Log = pytest.LogCaptureFixture
StopAt = Callable[[int | None], None]


@pytest.fixture(scope="module")
def plain_flags(tiny_flags: list[str]) -> list[str]:
    """Return flags of a tiny training without those that a base decides."""
    at = tiny_flags.index("--tokenizer.vocab_size")
    return [*tiny_flags[:at], *tiny_flags[at + 6 :]]


def trainer_of(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoints(run_dir)[0][1] / "trainer.json").read_text())
    return content


def hashes_of(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(flags: list[str], capsys: Capture) -> str:
    with pytest.raises(SystemExit) as ended:
        train_main(flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error.removeprefix("error: ")


def test_a_training_starts_from_the_weights_of_its_base(
    plain_flags: list[str], tiny_run: Path, tmp_path: Path, capsys: Capture, caplog: Log
) -> None:
    """Scored before the first step as `textgen evaluate` scores the base, which stays as it was."""
    before = hashes_of(tiny_run)
    main(["evaluate", str(tiny_run), "--json"])
    wanted = json.loads(capsys.readouterr().out)["bits_per_byte"]
    caplog.clear()
    train_main(flags_for(plain_flags, tmp_path / "run", "--init_from", str(tiny_run), "--ema_decay", "0.9"))
    assert f"starting from `{tiny_run}` step 4: 340 of 340 pieces kept" in caplog.messages
    first = next(row for row in read_metrics(tmp_path / "run") if "valid/loss" in row)
    assert (first["step"], first["valid/bits_per_byte"]) == (0, pytest.approx(wanted, abs=1e-4))
    assert hashes_of(tiny_run) == before

    base = checkpoints(tiny_run)[0][1]
    for name in ("model", "weights"):  # the averaged weights and the others
        ours = load_file(tmp_path / "run" / "checkpoints" / "step-000000" / f"{name}.safetensors")
        theirs = load_file(base / "model.safetensors")
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert trainer_of(tmp_path / "run")["base"] == {
        "source": str(tiny_run), "directory": str(base), "step": 4, "pieces_kept": 340, "license": None, "datasets": [],
        "sha256": before[str(base / "model.safetensors")],
    }  # fmt: skip
    assert trainer_of(tmp_path / "run")["progression"]["step"] == 4


def test_a_stopped_training_never_looks_at_its_base_again(
    plain_flags: list[str], tiny_run: Path, tmp_path: Path, stop_at: StopAt, capsys: Capture
) -> None:
    base = shutil.copytree(tiny_run, tmp_path / "base")
    flags = ["--init_from", str(base), "--evaluate_every", "2", "--max_steps", "5"]
    train_main(flags_for(plain_flags, tmp_path / "whole", *flags))
    stop_at(1)
    with pytest.raises(SystemExit) as stopped:
        train_main(flags_for(plain_flags, tmp_path / "parts", *flags))
    assert stopped.value.code == 128 + signal.SIGTERM
    stop_at(None)
    shutil.rmtree(base)
    train_main(flags_for(plain_flags, tmp_path / "parts", *flags))
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert trainer_of(tmp_path / "parts")["base"] == trainer_of(tmp_path / "whole")["base"]
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "parts"), "--json"])  # its text is encoded by its own copy of the tokenizer
    row = [row for row in read_metrics(tmp_path / "parts") if "valid/loss" in row][-1]
    assert json.loads(capsys.readouterr().out)["nats_per_token"] == pytest.approx(row["valid/loss"], abs=1e-4)


def test_labels_are_kept_by_name(labelled_flags: list[str], tmp_path: Path, caplog: Log) -> None:
    """Of a base with the labels bad, good: a training with good, new, and one without labels."""
    train_main(flags_for(labelled_flags, tmp_path / "base", "--max_steps", "2"))
    rows = [json.loads(line) for line in Path(labelled_flags[3]).read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    for row in rows:
        row["label"] = {"bad": "new"}.get(row["label"], row["label"])
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    at = labelled_flags.index("--tokenizer.vocab_size")
    flags = ["--data.source", "files", "--data.files", str(other), *labelled_flags[4:at], *labelled_flags[at + 6 :]]
    model, tokenizer = load_model(tmp_path / "base")
    base = model.state_tensors()
    assert model.labels == ("bad", "good")
    for name, more, message in (
        ("with", [], "labels: 1 of 2 kept; the base has 2"),
        ("without", ["--data.label_column", "null"], "labels: 0 of 0 kept; the base has 2"),
    ):
        caplog.clear()
        train_main(flags_for(flags, tmp_path / name, "--init_from", str(tmp_path / "base"), *more))
        assert message in caplog.messages
        first = load_file(tmp_path / name / "checkpoints" / "step-000000" / "model.safetensors")
        assert ("label_embedding.weight" in first) == (name == "with")
        if name == "with":  # good, new
            assert torch.equal(first["label_embedding.weight"][0], base["label_embedding.weight"][1])
            assert torch.equal(first["label_embedding.weight"][1], base["embedding.weight"][tokenizer.eos_id])


def test_the_shape_is_the_base_s(
    plain_flags: list[str], tiny_run: Path, tmp_path: Path, capsys: Capture, caplog: Log
) -> None:
    """Values of a config file that differ are left out and named; a flag that differs is refused with both values."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "learning_rate: 0.02\nmodel:\n  num_layers: 2\n  hidden_size: 64\ntokenizer:\n  vocab_size: 400\n"
    )
    flags = [*flags_for(plain_flags, tmp_path / "run", "--init_from", str(tiny_run), "--config", str(config))]
    line = refusal([*flags, "--model.hidden_size", "48"], capsys)
    assert line == (
        f"`model.hidden_size` 48 differs from 32 of `{tiny_run}`, whose shape a training with `init_from` has: "
        "leave it out"
    )
    assert not (tmp_path / "run").exists()
    train_main([*flags, "--model.dropout", "0.1", "--model.embedding_dim", "16"])
    assert (
        f"`{tiny_run}` decides shape and tokenizer, so these settings are not used: `model.hidden_size` 64, "
        "`tokenizer.vocab_size` 400"
    ) in caplog.messages
    model, tokenizer = load_model(tmp_path / "run")
    assert (model.config.hidden_size, model.config.dropout, tokenizer.vocab_size) == (32, 0.1, 340)
    assert trainer_of(tmp_path / "run")["config"]["learning_rate"] == 0.02


def test_a_base_that_cannot_be_used_is_refused(
    plain_flags: list[str], tiny_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    flags = flags_for(plain_flags, tmp_path / "run")
    line = refusal([*flags, "--init_from", str(tiny_run), "--resume", str(tiny_run)], capsys)
    assert line == (
        "`init_from` starts a new training and `resume` continues one: "
        f"give `init_from` {tiny_run} or `resume` {tiny_run}"
    )
    (tmp_path / "empty").mkdir()
    line = refusal([*flags, "--init_from", str(tmp_path / "empty")], capsys)
    assert line == f"`{tmp_path / 'empty'}` has no `config.json`: not a checkpoint directory"

    published = tmp_path / "published"
    main(["publish", str(tiny_run), "--to", str(published)])
    weights = load_file(published / "model.safetensors")
    weights["output.bias"][3] = torch.nan
    save_file(weights, published / "model.safetensors")
    line = refusal([*flags, "--init_from", str(published)], capsys)
    assert line == f"`{published / 'model.safetensors'}` has weights that are not finite"
    config = json.loads((published / "config.json").read_text())
    config["text"]["normalization"] = "rot13"
    (published / "config.json").write_text(json.dumps(config))
    line = refusal([*flags, "--init_from", str(published)], capsys)
    assert line == f"`{published}`: `data.normalization` must be one of `none`, `lowercase`: rot13"
    (published / "config.json").write_text(json.dumps(config | {"text": {}, "vocab_size": 0}))
    line = refusal([*flags, "--init_from", str(published)], capsys)
    assert line == f"`{published}`: `tokenizer.vocab_size` must be a finite number above 0: 0"
    assert not (tmp_path / "run").exists()


def test_messages_name_init_from_where_resume_is_a_trap(
    tiny_flags: list[str], tiny_run: Path, tmp_path: Path, reviews_file: Path, capsys: Capture, caplog: Log
) -> None:
    """A finished run, a text that has grown, and a resume that keeps the old schedule."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    train_main(flags_for(tiny_flags, run))
    hint = f"`--init_from {run}` with another `--run_dir` starts a new training from its weights"
    assert capsys.readouterr().out.splitlines()[-1] == f"`{run}` has finished at step 4: nothing to do; {hint}"
    grown = tmp_path / "more.jsonl"
    grown.write_text(reviews_file.read_text() + '{"text": "One more of them."}\n')
    flags = [*flags_for(tiny_flags, run, "--data.files", str(reviews_file), str(grown), "--max_steps", "5")]
    line = refusal(flags, capsys)
    newest = run / "checkpoints" / "step-000004"
    assert line.endswith(f"another `--run_dir` starts a new run, with `--init_from {newest}` from its weights")
    train_main([*flags, "--resume_override"])
    assert (
        f"resuming regardless keeps step, schedule, optimizer and LSTM states of `{newest}`: `--init_from` with "
        "another `--run_dir` takes its weights alone"
    ) in caplog.messages


@pytest.mark.parametrize(("vocab_size", "model_type"), [("400", "unigram"), ("340", "bpe")])
def test_rows_go_to_the_same_pieces_of_another_tokenizer(
    plain_flags: list[str],
    tiny_run: Path,
    tmp_path: Path,
    stop_at: StopAt,
    caplog: Log,
    vocab_size: str,
    model_type: str,
) -> None:
    """A tokenizer of more pieces, and one of as many other ones. A new piece has the mean row of its parts."""
    base = shutil.copytree(tiny_run, tmp_path / "base")
    own = ["--tokenizer.vocab_size", vocab_size, "--tokenizer.model_type", model_type]
    flags = flags_for(plain_flags, tmp_path / "run", *own, "--init_from", str(base))
    stop_at(1)
    with pytest.raises(SystemExit):
        train_main(flags)
    old, old_tokenizer = load_model(base)
    new, tokenizer = load_model(tmp_path / "run" / "checkpoints" / "step-000000")
    ids = {piece: i for i, piece in enumerate(old_tokenizer.pieces)}
    kept = [piece for piece in tokenizer.pieces if piece in ids]
    assert 256 < len(kept) < tokenizer.vocab_size
    assert f"starting from `{base}` step 4: {len(kept)} of {vocab_size} pieces kept" in caplog.messages
    for i, piece in enumerate(tokenizer.pieces):
        parts = [ids[piece]] if piece in ids else old_tokenizer.encode(tokenizer.token_bytes(i).decode())
        assert torch.allclose(new.embedding.weight[i], old.embedding.weight[parts].mean(0))
    counts = store_of(tmp_path / "run" / "checkpoints" / "step-000000").unigram_counts + 1
    assert torch.allclose(new.output.bias, (counts / counts.sum()).log())
    ours, theirs = new.state_tensors(), old.state_tensors()
    others = ours.keys() - {"embedding.weight", "output.bias"}
    assert [name for name in others if not torch.equal(ours[name], theirs[name])] == []
    stop_at(None)
    shutil.rmtree(base)
    train_main(flags)
    assert trainer_of(tmp_path / "run")["progression"]["finished"]


def test_license_and_data_of_a_base_go_into_the_new_card(
    plain_flags: list[str], tiny_run: Path, tmp_path: Path
) -> None:
    """Only names of the hub's form: a card is a stranger's YAML."""
    base, card = tmp_path / "base", tmp_path / "base" / "README.md"
    main(["publish", str(tiny_run), "--to", str(base), "--license", "mit"])
    header = "---\nlicense: mit\ndatasets: [them/films, 'a\\n# b', 3]\nlibrary_name: !!python/name:os.system\n---\n"
    for text, license, datasets in [
        (header.replace("!!python/name:os.system", "textgen"), "mit", ["them/films"]),
        (header, None, []),  # no header that the safe loader reads
    ]:
        card.write_text(text, newline="\r\n")  # as an editor on Windows saves it
        run = tmp_path / f"run-{license}"
        train_main(flags_for(plain_flags, run, "--init_from", str(base), "--max_steps", "1"))
        recorded = trainer_of(run)["base"]
        assert (recorded["license"], recorded["datasets"]) == (license, datasets)
        main(["publish", str(run), "--to", str(tmp_path / f"published-{license}")])
        written = (tmp_path / f"published-{license}" / "README.md").read_text()
        made = ModelCard(written)
        assert (made.data.license, made.data.datasets or []) == (license, datasets)
        assert recorded["sha256"] in written
        assert str(base) not in written
    train_main(flags_for(plain_flags, tmp_path / "third", "--init_from", str(tmp_path / "run-mit"), "--max_steps", "1"))
    assert trainer_of(tmp_path / "third")["base"]["datasets"] == ["them/films"]


@pytest.mark.parametrize(
    "trainer",
    [{}, {"config": 1}, {"config": {"data": {"source": "hub", "dataset": 3}}}, {"config": {"data": [1]}, "base": [1]},
     {"base": {"license": ["mit"], "datasets": {"a/b": 1}}}],
)  # fmt: skip
def test_settings_of_a_strangers_checkpoint_say_nothing_that_is_no_name(trainer: object, tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text(json.dumps(trainer))
    assert origin_of(tmp_path) == {"license": None, "datasets": []}


def test_a_section_in_one_flag_is_held_to_the_base_s_shape(
    plain_flags: list[str], tiny_run: Path, tmp_path: Path
) -> None:
    def take(*flags: str) -> TrainConfig:
        argv = flags_for(plain_flags, tmp_path / "run", "--init_from", str(tiny_run), *flags)
        return take_base(parse_train_config(argv), argv)

    (tmp_path / "model.yaml").write_text("hidden_size: 48\n")
    for value in ('{"hidden_size": 48}', str(tmp_path / "model.yaml")):
        for flags in (["--model", value], [f"--model={value}"]):
            with pytest.raises(TextgenError, match=r"^`model.hidden_size` 48 differs from 32 of"):
                take(*flags)
    assert take("--model", '{"dropout": 0.25}').model.dropout == 0.25
    assert take("--tokenizer", '{"vocab_size": 400}').tokenizer == TokenizerConfig(vocab_size=400)


def test_a_base_may_be_named_in_another_way_when_its_run_resumes(
    plain_flags: list[str], tiny_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    flags = flags_for(plain_flags, tmp_path / "run")
    train_main([*flags, "--init_from", str(tiny_run)])
    capsys.readouterr()
    train_main([*flags, "--init_from", f"{tiny_run}/"])
    assert "has finished at step 4: nothing to do" in capsys.readouterr().out
    line = refusal([*flags, "--init_from", str(tmp_path / "other")], capsys)
    assert line.startswith(f"`init_from` is {tmp_path / 'other'}, `")


def test_text_is_prepared_for_a_base(
    plain_flags: list[str], tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Also if the folder that runs go to by default holds another run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, TrainConfig().run_dir)
    main(["prepare", *plain_flags, "--init_from", str(tiny_run)])
    store = TokenStore.open(capsys.readouterr().out.strip())
    assert store.tokenizer.sha256 == load_model(tiny_run)[1].sha256
