"""Settings: defaults, files, flags, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from textgen.commands.parsing import config_file, parse_train_config
from textgen.config import DataConfig, ModelConfig, TokenizerConfig, TrackingConfig, TrainConfig
from textgen.settings import build_settings, settings_of

ROOT = Path(__file__).parents[1]

# Every option, by policy: one more is one more for every reader of `--help`, so it is added here too, on purpose.
OPTIONS = """
run_dir batch_size seq_len max_epochs max_steps max_minutes learning_rate seed gradient_accumulation_steps
mixed_precision lr_schedule warmup_steps max_grad_norm weight_decay adam_betas ema_decay log_every evaluate_every
evaluate_documents early_stopping_patience save_every sample_prompts sample_temperatures sample_tokens keep_last
checkpoint_copy resume resume_override init_from stop_signal gradient_compression distributed_timeout elastic
deterministic cuda_graph profile
dry_run
data.source data.dataset data.dataset_config data.files data.text_column data.label_column data.label_folders
data.txt_documents data.encoding data.on_error data.max_document_bytes data.csv_delimiter data.csv_quoting
data.csv_escape data.train_on data.validation_fraction data.validation_blocks data.reading_rules data.normalization
data.cache_dir data.store data.store_cache_gib data.shards data.streaming data.sources
tokenizer.vocab_size tokenizer.model_type tokenizer.path
model.embedding_dim model.hidden_size model.num_layers model.dropout model.weight_drop
model.tie_weights model.projection model.layer_norm model.residual
tracking.backends tracking.mode tracking.project tracking.group tracking.job_type tracking.upload_checkpoints
""".split()  # noqa: SIM905

POSITIVE = """
batch_size seq_len max_epochs max_steps max_minutes learning_rate gradient_accumulation_steps max_grad_norm log_every
evaluate_every evaluate_documents early_stopping_patience sample_tokens keep_last save_every distributed_timeout
data.validation_blocks
model.embedding_dim model.hidden_size model.num_layers tokenizer.vocab_size
""".split()  # noqa: SIM905
NOT_NEGATIVE = """
warmup_steps weight_decay seed ema_decay data.validation_fraction model.dropout
model.weight_drop
""".split()  # noqa: SIM905
LISTS = ["adam_betas", "sample_temperatures"]


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which a command line is refused."""
    with pytest.raises(SystemExit) as refused:
        parse_train_config(argv)
    out, err = capsys.readouterr()
    assert (refused.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_bare_defaults_are_the_origins() -> None:
    config = parse_train_config([])
    assert config == TrainConfig()
    assert config.batch_size == 128
    assert config.max_epochs == 10
    assert config.learning_rate == 0.001
    assert config.seed == 42
    assert config.adam_betas == (0.9, 0.999)
    assert config.lr_schedule == "constant"
    assert config.gradient_accumulation_steps == 1
    assert (config.warmup_steps, config.weight_decay, config.model.dropout) == (0, 0.0, 0.0)
    off = (config.max_grad_norm, config.ema_decay, config.max_steps, config.max_minutes, config.early_stopping_patience)
    assert off == (None,) * 5


def test_a_tied_output_without_projection_needs_equal_sizes() -> None:
    assert not ModelConfig(embedding_dim=64, hidden_size=64, projection=False).projection
    assert not ModelConfig(embedding_dim=64, hidden_size=96, projection=False, tie_weights=False).projection
    with pytest.raises(ValueError, match="needs `embedding_dim` 64 to equal `hidden_size` 96"):
        ModelConfig(embedding_dim=64, hidden_size=96, projection=False)


def test_options_are_these_and_no_others() -> None:
    assert list(settings_of(TrainConfig)) == OPTIONS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": []}, "`data` must be"),
        ({"data": {"cache_dir": 5}}, "`data.cache_dir` must be a text: 5"),
        ({"data": {"files": [5]}}, "`data.files` must be a list of texts: [5]"),
        ({"data": {"validation_blocks": 1.5}}, "`data.validation_blocks` must be an integer: 1.5"),
        ({"data": {"normalization": "x"}}, "`data.normalization` must be one of `none`, `lowercase`: x"),
        ({"batch_size": True}, "`batch_size` must be an integer: True"),
        ({"max_steps": "4"}, "`max_steps` must be an integer or null: 4"),
    ],
)
def test_settings_of_a_checkpoint_have_their_types(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_settings(TrainConfig, settings)


def test_every_option_has_a_help_text() -> None:
    for settings in (TrainConfig, DataConfig, TokenizerConfig, ModelConfig, TrackingConfig):
        code = (ROOT / "textgen" / "config.py").read_text()
        for field in dataclasses.fields(settings):
            if field.name not in ("data", "tokenizer", "model", "tracking"):
                owner = next(k for k in settings.__mro__ if field.name in vars(k)["__annotations__"])
                source = re.split(rf"class {owner.__name__}\b", code, maxsplit=1)[1]
                after = source.split(f"\n    {field.name}: ", 1)[1].split("\n    def ")[0]
                # the value may span lines; the first thing at its own depth is the text
                assert next(line for line in after.splitlines()[1:] if line[4:5] not in (" ", ")")).startswith(
                    '    """'
                )


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("batch_size: 32\nseq_len: 16\nmodel:\n  hidden_size: 64\n")
    for argv in (
        ["--config", str(file), "--seq_len", "8", "--model.num_layers=1"],
        ["--seq_len", "8", "--model.num_layers=1", f"--config={file}"],  # the order does not matter
    ):
        config = parse_train_config(argv)
        assert (config.batch_size, config.seq_len, config.max_epochs) == (32, 8, 10)
        assert (config.model.hidden_size, config.model.num_layers, config.model.embedding_dim) == (64, 1, 256)


def test_second_file_overrides_the_first(tmp_path: Path) -> None:
    for name, size in (("a", 32), ("b", 64)):
        (tmp_path / f"{name}.yaml").write_text(f"batch_size: {size}\nmodel: {{{'layer_norm: true' * (name == 'a')}}}\n")
    config = parse_train_config(["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
    assert (config.batch_size, config.model.layer_norm) == (64, True)


def test_last_of_a_flag_given_twice_counts() -> None:
    config = parse_train_config(["--seed", "1", "--seed", "2", "--sample_prompts", "a", "b", "--sample_prompts", "c"])
    assert (config.seed, config.sample_prompts) == (2, ("c",))


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert parse_train_config(["--config", str(tmp_path / "a.yaml")]) == TrainConfig()


def test_yaml_reads_1e_4_as_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-4\n")
    assert parse_train_config(["--config", str(tmp_path / "a.yaml")]).learning_rate == 1e-4
    assert parse_train_config(["--learning_rate", "1e-4"]).learning_rate == 1e-4


@pytest.mark.parametrize("path", sorted(ROOT.glob("launch/presets/*.yaml")), ids=lambda path: path.name)
def test_shipped_preset_is_parsed(path: Path) -> None:
    config = parse_train_config(["--config", str(path)])
    wanted = yaml.safe_load(path.read_text())
    assert config.run_dir == wanted["run_dir"]
    assert config != TrainConfig(run_dir=config.run_dir)


def test_preset_is_named_wherever_one_stands_unless_a_file_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = parse_train_config(["--config", str(ROOT / "launch/presets/quick.yaml")])
    assert parse_train_config(["--config", "quick"]) == wanted
    assert config_file(["--config", "quick"]) == "quick"
    (tmp_path / "quick").write_text("batch_size: 64\n")
    assert parse_train_config(["--config", "quick"]).batch_size == 64


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("accelerate_config.yaml"), *ROOT.glob("launch/configs/*.yaml")]), ids=lambda p: p.name
)
def test_shipped_accelerate_config_holds_hardware_only(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(path))  # raises where a key is unknown
    assert yaml.safe_load(path.read_text()).keys() & set(OPTIONS) <= {"mixed_precision"}


def test_lists_are_written_on_the_command_line() -> None:
    config = parse_train_config(
        ["--data.source", "files", "--data.files", "a.txt", "[b]*.csv", "--sample_temperatures", "0.5", "1",
         "--sample_prompts", "12", "nan", "a: b", "--adam_betas", "0.8", "0.9"]
    )  # fmt: skip
    assert config.data.files == ("a.txt", "[b]*.csv")
    assert config.sample_temperatures == (0.5, 1.0)
    assert config.sample_prompts == ("12", "nan", "a: b")
    assert config.adam_betas == (0.8, 0.9)
    assert parse_train_config(["--sample_temperatures"]).sample_temperatures == ()
    assert parse_train_config(["--sample_temperatures=[0.5, 1]"]).sample_temperatures == (0.5, 1.0)


def test_switch_needs_no_value() -> None:
    assert parse_train_config(["--dry_run", "--model.layer_norm", "--seed", "1"]).dry_run
    assert not parse_train_config(["--model.tie_weights", "false"]).model.tie_weights
    assert not parse_train_config(["--dry_run=false"]).dry_run


@pytest.mark.parametrize("value", ["nan", ".nan", ".inf", "-1"])
@pytest.mark.parametrize("name", [*POSITIVE, *NOT_NEGATIVE, *LISTS])
def test_number_out_of_range_is_refused_by_name(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = [value, value] if name in LISTS else [value]
    error = refusal([f"--{name}", *values], capsys)
    assert f"`{name}` must be" in error
    assert value.strip(".") in error.lower()


@pytest.mark.parametrize("name", POSITIVE)
def test_zero_is_refused_where_it_means_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"`{name}` must be" in refusal([f"--{name}", "0"], capsys)


FRACTIONS = {"max_minutes", "learning_rate", "max_grad_norm", "distributed_timeout"}


@pytest.mark.parametrize("name", sorted(set(POSITIVE) - FRACTIONS))
def test_fraction_is_refused_where_a_whole_number_is_wanted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"`{name}` must be an integer" in refusal([f"--{name}", "2.5"], capsys)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("learning_rate: .nan", "`learning_rate` must be a finite number above 0: nan"),
        ("learning_rate: null", "`learning_rate` must be a number: null"),
        ("learning_rate: [1]", "`learning_rate` must be a number: [1]"),
        ("max_steps: 2.5", "`max_steps` must be an integer or null: 2.5"),
        ("model: {dropout: 1}", "`model.dropout` must be at least 0 and below 1: 1.0"),
        ("lr_schedule: cosin", "`lr_schedule` must be one of `constant`, `cosine`, `linear`: cosin"),
        (
            "mixed_precision: no",
            "`mixed_precision` must be one of `no`, `bf16`, `fp16`, `auto` or null: False (YAML reads",
        ),
        ("data: {source: files, files: a.txt}", "`data.files` must be a list of texts: a.txt"),
        ("data: {source: files}", "`data.source` is files but `data.files` is empty"),
        ("run_dir: ''", "`run_dir` must name a folder"),
        ("run_dir: s3://bucket/run", "`run_dir` must be a folder; `checkpoint_copy` may be an address"),
        ("seed: 4294967296", "`seed` must be at least 0 and below 2^32: 4294967296"),
        ("model: 3", "`model` in `FILE` must be a group of settings: 3"),
        ("model:", "`model` in `FILE` must be a group of settings: null"),
        ("model: {hiden_size: 3}", "unknown setting `model.hiden_size` in `FILE`; the nearest is `model.hidden_size`"),
        ("tokeniser: {vocab_size: 300}", "unknown setting `tokeniser` in `FILE`; the nearest is `tokenizer`"),
        ("batch_size: [", "`FILE` line 1 is not YAML: "),
        ("- batch_size", "`FILE` is not a mapping of settings"),
    ],
)
def test_bad_value_in_a_file_is_refused_in_one_line(
    text: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert wanted.replace("FILE", str(file)) in refusal(["--config", str(file)], capsys)


def test_resolved_config_of_a_run_is_parsed_to_the_same_config(tiny_run: Path, tiny_flags: list[str]) -> None:
    assert parse_train_config(["--config", str(tiny_run / "config.yaml")]) == parse_train_config(
        [*tiny_flags, "--run_dir", str(tiny_run)]
    )
