"""The model card: a run's figures, data, samples and settings as a README of the model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from textgen.runs.directory import DATA_NAME
from textgen.runs.samples import SavedSample, read_samples
from textgen.settings import flatten

if TYPE_CHECKING:
    from textgen.model.lstm import LSTMLanguageModel


HUB = "hub:"
IMDB = "stanfordnlp/imdb"
CARD_NAME = "README.md"

# Settings that say where something lies on this machine, or what is told while training.
PRIVATE = {
    "run_dir", "resume", "resume_override", "dry_run", "data.files", "data.cache_dir", "data.store", "data.dataset",
    "tokenizer.path", "tracking.mode", "tracking.project", "tracking.backends", "tracking.group", "tracking.job_type",
    "tracking.upload_checkpoints",
}  # fmt: skip

LIMITS = """It has learnt which tokens follow which, and nothing else: it knows no facts, follows no instructions, and
makes up names, events and judgements, about real persons too. What its training text holds of errors, slurs and
prejudice comes back. Its memory is a state of fixed size: of long texts it keeps the drift, not the detail."""


# --- what a run tells of a checkpoint --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of how a model came about; of a published one, nothing."""

    trainer: Mapping[str, Any] = field(default_factory=dict)
    """of the checkpoint's `trainer.json`"""
    data: Mapping[str, Any] = field(default_factory=dict)
    """of the run's `data.json`"""
    validation: Mapping[str, float] = field(default_factory=dict)
    """row of `metrics.jsonl` with the validation at this checkpoint's step"""
    documents: int | None = None
    """that the validation scored"""
    samples: Sequence[SavedSample] = ()
    """of the run's `samples.md`, at this step"""

    def setting(self, name: str) -> Any:
        """Return a setting of the training by its dotted name."""
        return flatten(self.trainer.get("config", {})).get(name)


def read_record(directory: Path) -> Record:
    """Read what a checkpoint and the run around it tell; a checkpoint that was moved out of its run tells less."""
    from textgen.runs.checkpoint import TRAINER_NAME, read_json
    from textgen.runs.metrics_file import read_metrics

    if not (directory / TRAINER_NAME).exists():
        return Record()
    trainer = read_json(directory / TRAINER_NAME)
    now, checkpoints = trainer["progression"], directory.resolve().parent
    if checkpoints.name != "checkpoints":
        return Record(trainer=trainer)
    run_dir = checkpoints.parent
    data = read_json(run_dir / DATA_NAME) if (run_dir / DATA_NAME).exists() else {}
    rows = [row for row in read_metrics(run_dir) if row["step"] == now["step"] and "valid/loss" in row]
    documents = data.get("splits", {}).get("validation", {}).get("documents")
    if documents is not None and not now["finished"]:  # the last validation scores all
        documents = min(documents, trainer["config"]["evaluate_documents"] or documents)
    samples = [sample for sample in read_samples(run_dir) if sample.step == now["step"]]
    return Record(
        trainer=trainer, data=data, validation=rows[-1] if rows else {}, documents=documents,
        samples=samples,
    )  # fmt: skip


# --- the card --------------------------------------------------------------------------------------------------------


def build_card(
    model: LSTMLanguageModel,
    record: Record,
    *,
    name: str,
    where: str,
    int8_cost: float | None,
    license: str | None,
    languages: Sequence[str] | None,
) -> str:
    """Return a model card in Markdown, its header in the hub's YAML."""
    name = re.sub(r"[^\w .-]", "_", name)
    config = model.config
    layers = "one LSTM layer" if config.num_layers == 1 else f"{config.num_layers} LSTM layers"
    sections = [
        _header(record, name, license, languages),
        f"# {name}\n\n"
        f"An LSTM language model that continues text: {model.num_parameters:,} parameters, {layers} of "
        f"{config.hidden_size:,}, embeddings of {config.embedding_dim:,}, {model.vocab_size:,} tokens, trained with "
        f"textgen {version('textgen')}." + ("" if license else " No license was stated."),
        _figures(record, int8_cost), _data(record, model.text), _samples(record), _use(record, where),
        f"## Limits\n\n{LIMITS}", _settings(record),
    ]  # fmt: skip
    return "\n\n".join(filter(None, sections)) + "\n"


def _header(record: Record, name: str, license: str | None, languages: Sequence[str] | None) -> str:
    """Return the YAML that the hub reads, from the hub's own client."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset, bits = _hub_dataset(record), record.validation.get("valid/bits_per_byte")
    languages = languages or (["en"] if dataset == IMDB else None)
    result = EvalResult(
        task_type="text-generation", dataset_type=dataset or "text",
        dataset_name="held-out documents of the training text",
        metric_type="bits_per_byte", metric_name="bits per byte", metric_value=bits,
    )  # fmt: skip
    header = ModelCardData(
        language=list(languages) if languages else None, license=license, library_name="textgen",
        pipeline_tag="text-generation", tags=["lstm", "language-model"], datasets=[dataset] if dataset else None,
        metrics=["bits_per_byte"] if bits is not None else None, model_name=name,
        eval_results=[result] if bits is not None else None,
    )  # fmt: skip
    return f"---\n{header.to_yaml()}\n---"


def _hub_dataset(record: Record) -> str | None:
    """Return the hub's name of the training data, if it has one."""
    dataset = record.setting("data.dataset")
    if record.setting("data.source") not in ("imdb", "package", "hub"):
        return None
    if dataset is None:
        return IMDB  # the package holds its train split, row by row
    return str(dataset) if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", dataset) and not Path(dataset).exists() else None


def _figures(record: Record, int8_cost: float | None) -> str:
    rows, validation = [], record.validation
    scored = "" if record.documents is None else f", {record.documents:,} held-out documents"
    if "valid/bits_per_byte" in validation:
        rows.append(("bits per byte", f"{validation['valid/bits_per_byte']:.4f}{scored}"))
    if "valid/loss" in validation:
        rows.append(("nats per token", f"{validation['valid/loss']:.4f}{scored}"))
    if int8_cost is not None:
        rows.append(("8-bit weights (`decoder.safetensors`)", f"{int8_cost:+.5f} bits per byte"))
    if record.trainer:
        step, total = (record.trainer["progression"][key] for key in ("step", "total_steps"))
        steps = f"{step:,} steps" if step == total else f"{step:,} of {total:,} steps"
        tokens = step * record.setting("batch_size") * record.setting("seq_len")
        rows.append(("training", f"{steps}, {tokens:,} tokens, precision {record.trainer['mixed_precision']}"))
    if not rows:
        return ""
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return (
        f"## Figures\n\n| what | value |\n|---|---|\n{table}\n\nBits per byte are counted over whole held-out "
        "documents, their ends included, over their UTF-8 bytes; lower is better."
    )


def _data(record: Record, text: Mapping[str, str]) -> str:
    if not record.data:
        return ""
    in_a_folder = record.setting("data.dataset") is not None and _hub_dataset(record) is None
    source = "a dataset in a folder" if in_a_folder else record.data["source"]  # which names the folder
    rows = "\n".join(
        f"| {name} | {size['documents']:,} | {size['tokens']:,} | {size['bytes']:,} |"
        for name, size in record.data["splits"].items()
    )
    dropped = ", ".join(
        f"{count:,} {reason.removeprefix('dropped_').replace('_', ' ')}"
        for reason, count in record.data["counts"].items()
        if reason.startswith("dropped_") and count
    )
    return "\n\n".join(
        [
            f"## Data\n\nTrained on {source}.",
            f"| split | documents | tokens | bytes |\n|---|---|---|---|\n{rows}",
            *([f"Documents left out: {dropped}."] if dropped else []),
            *(["All text was lower-cased."] if text.get("normalization") == "lowercase" else []),
        ]
    )


def _samples(record: Record) -> str:
    """Return what the training drew at this step, fenced: generated text is never Markdown or HTML."""
    if not record.samples:
        return ""
    text = "".join(f"[temperature {sample.temperature}] {sample.prompt}{sample.text}" for sample in record.samples)
    return f"## Samples\n\nAs they came, seed {record.setting('seed')}.\n\n{_fenced(text.strip(), 'text')}"


def _use(record: Record, where: str) -> str:
    prompt = next(iter(record.setting("sample_prompts") or ()), "")
    command = ["textgen", "sample", where, "--prompt", prompt, "--temperature", "0.8"]
    python = f"from textgen.model.files import load_model\n\nmodel, tokenizer = load_model({json.dumps(where)})"
    return "\n\n".join(["## Use", _fenced(shlex.join(command), "sh"), _fenced(python, "python")])


def _settings(record: Record) -> str:
    """Return what `--config` would take, but for what is private."""
    if not record.trainer:
        return ""
    told: dict[str, Any] = {}
    for name, value in record.trainer["config"].items():
        if isinstance(value, Mapping):
            value = {key: each for key, each in value.items() if f"{name}.{key}" not in PRIVATE}
        if name not in PRIVATE and value != {}:
            told[name] = value
    told["mixed_precision"] = record.trainer["mixed_precision"]  # config has null where hardware decided
    return f"## Settings\n\n{_fenced(yaml.safe_dump(told, sort_keys=False, allow_unicode=True).strip(), 'yaml')}"


def _fenced(text: str, language: str) -> str:
    """Return a block of code that ends where it should, whatever it holds."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"
