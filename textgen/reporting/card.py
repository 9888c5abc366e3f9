"""The model card: a run's figures, data, samples and settings as a README of the model."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from textgen.config import IMDB
from textgen.runs.directory import DATA_NAME
from textgen.runs.samples import SavedSample, read_samples
from textgen.settings import flatten

if TYPE_CHECKING:
    from textgen.model.lstm import LSTMLanguageModel


HUB = "hub:"
CARD_NAME = "README.md"

# Settings that name places on this machine or trackers; the card leaves them out.
PRIVATE = {
    "run_dir",
    "resume",
    "resume_override",
    "init_from",
    "profile",
    "dry_run",
    "data.files",
    "data.cache_dir",
    "data.store",
    "data.dataset",
    "tokenizer.path",
    "tracking.mode",
    "tracking.project",
    "tracking.backends",
    "tracking.group",
    "tracking.job_type",
    "tracking.upload_checkpoints",
}

SHOWN_LABELS = 50
MAX_HEADER_BYTES = 1 << 16  # of a card, whose header is a stranger's YAML

LIMITS = """The model has learnt only which tokens follow which. It knows no facts and follows no instructions. It makes
up names, events and judgements, also about real persons. It repeats errors, slurs and prejudice of its training text.
Its memory is a state of fixed size: of a long text it keeps the topic and loses the details."""


# --- the run of a checkpoint -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a model was trained, from its checkpoint and its run; empty for a published model."""

    trainer: Mapping[str, Any] = field(default_factory=dict)
    """the checkpoint's `trainer.json`"""
    data: Mapping[str, Any] = field(default_factory=dict)
    """the run's `data.json`"""
    validation: Mapping[str, float] = field(default_factory=dict)
    """the row of `metrics.jsonl` with the validation at the checkpoint's step"""
    documents: Mapping[str, int] = field(default_factory=dict)
    """number of documents that the validation scored, of each of several sources too; "" is all"""
    samples: Sequence[SavedSample] = ()
    """the samples of `samples.md` at the checkpoint's step"""

    def setting(self, name: str) -> Any:
        """Return a setting of the training by its dotted name; None if it is unknown."""
        return flatten(self.trainer.get("config", {})).get(name)


def read_provenance(directory: Path) -> Provenance:
    """Read trainer.json of a checkpoint, and the files of its run unless the checkpoint was moved out of the run."""
    from textgen.runs.checkpoint import TRAINER_NAME, read_json
    from textgen.runs.metrics_file import read_metrics

    if not (directory / TRAINER_NAME).exists():
        return Provenance()
    trainer = read_json(directory / TRAINER_NAME)
    progress, checkpoints = trainer["progression"], directory.resolve().parent
    if checkpoints.name != "checkpoints":
        return Provenance(trainer=trainer)
    run_dir = checkpoints.parent
    data = read_json(run_dir / DATA_NAME) if (run_dir / DATA_NAME).exists() else {}
    rows = [row for row in read_metrics(run_dir) if row["step"] == progress["step"] and "valid/loss" in row]
    limit = None if progress["finished"] else trainer["config"]["evaluate_documents"]  # the last validation scores all
    samples = [sample for sample in read_samples(run_dir) if sample.step == progress["step"]]
    return Provenance(
        trainer=trainer,
        data=data,
        validation=rows[-1] if rows else {},
        documents=_scored_documents(data, limit),
        samples=samples,
    )


def _scored_documents(data: Mapping[str, Any], limit: int | None) -> dict[str, int]:
    """Return the numbers of documents that a validation scores, of at most `limit` of each source."""
    sources = data.get("sources") or {"": data.get("splits", {})}
    scored = {
        name: min(splits["validation"]["documents"], limit or sys.maxsize)
        for name, splits in sources.items()
        if "validation" in splits
    }
    return scored | {"": sum(scored.values())} if scored else {}


def origin_of(directory: Path) -> dict[str, Any]:
    """Return license and data of a model: of the header of its card, or of the settings of its training.

    Returns:
        `license`, a text or None, and `datasets`, names on the hub; only values of these forms.
    """
    from textgen.runs.checkpoint import TRAINER_NAME, read_json

    if not (directory / TRAINER_NAME).exists():
        return _sound_origin(_read_header(directory / CARD_NAME))
    provenance = Provenance(trainer=read_json(directory / TRAINER_NAME))
    base = _base(provenance)
    try:
        dataset = _hub_dataset(provenance)
    except (AttributeError, TypeError):  # a stranger's settings
        dataset = None
    return {
        "license": base["license"],
        "datasets": list(dict.fromkeys([*([dataset] if dataset else []), *base["datasets"]])),
    }


def _read_header(path: Path) -> dict[str, Any]:
    """Return the YAML header of a card; empty if there is none, or it cannot be read."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_HEADER_BYTES).decode(errors="replace").replace("\r\n", "\n")
        header = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, yaml.YAMLError, ValueError, IndexError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _sound_origin(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return license and names of data that have the form of names on the hub; others are left out."""

    def is_name(value: object) -> bool:
        return isinstance(value, str) and re.fullmatch(r"[\w][\w./-]{0,99}", value, re.ASCII) is not None

    datasets, license = values.get("datasets"), values.get("license")
    named = datasets if isinstance(datasets, list) else [datasets]
    return {"license": license if is_name(license) else None, "datasets": [name for name in named if is_name(name)]}


def _base_of(provenance: Provenance) -> dict[str, Any]:
    """Return what trainer.json says of the model whose weights the training started from; empty if nothing."""
    base = provenance.trainer.get("base")
    return base if isinstance(base, dict) else {}


def _base(provenance: Provenance) -> dict[str, Any]:
    """Return license and data of the base."""
    return _sound_origin(_base_of(provenance))


# --- the card --------------------------------------------------------------------------------------------------------


def build_card(
    model: LSTMLanguageModel,
    provenance: Provenance,
    *,
    name: str,
    where: str,
    int8_cost: float | None,
    license: str | None,
    languages: Sequence[str] | None,
) -> str:
    """Return a model card in Markdown with the hub's YAML header.

    Args:
        model: the published model.
        provenance: how it was trained.
        name: the model's name.
        where: the name by which `textgen sample` opens the model.
        int8_cost: bits per byte that the int8 decoder loses; None if that is not measured.
        license: the hub's name of a license.
        languages: the hub's names of languages.
    """
    name = re.sub(r"[^\w .-]", "_", name)
    license = license or _base(provenance)["license"]
    config = model.config
    layers = "one LSTM layer" if config.num_layers == 1 else f"{config.num_layers} LSTM layers"
    introduction = (
        f"# {name}\n\nAn LSTM language model that continues text: {model.num_parameters:,} parameters, {layers} of "
        f"{config.hidden_size:,}, embeddings of {config.embedding_dim:,}, {model.vocab_size:,} tokens, trained with "
        f"textgen {version('textgen')}." + ("" if license else " No license was stated.")
    )
    sections = [
        _header(provenance, name, license, languages),
        introduction,
        _figures(provenance, int8_cost),
        _data(provenance, model.text),
        _labels(model.labels),
        _base_section(provenance),
        _samples(provenance),
        _use(provenance, where),
        f"## Limits\n\n{LIMITS}",
        _settings(provenance),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _header(provenance: Provenance, name: str, license: str | None, languages: Sequence[str] | None) -> str:
    """Return the YAML header, made by the hub's client."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset, base = _hub_dataset(provenance), _base(provenance)
    datasets = list(dict.fromkeys([*([dataset] if dataset else []), *base["datasets"]]))
    bits = provenance.validation.get("valid/bits_per_byte")
    languages = languages or (["en"] if dataset == IMDB else None)
    result = EvalResult(
        task_type="text-generation",
        dataset_type=dataset or "text",
        dataset_name="held-out documents of the training text",
        metric_type="bits_per_byte",
        metric_name="bits per byte",
        metric_value=bits,
    )
    header = ModelCardData(
        language=list(languages) if languages else None,
        license=license,
        library_name="textgen",
        pipeline_tag="text-generation",
        tags=["lstm", "language-model"],
        datasets=datasets or None,
        base_model=_base_repository(provenance),
        metrics=["bits_per_byte"] if bits is not None else None,
        model_name=name,
        eval_results=[result] if bits is not None else None,
    )
    return f"---\n{header.to_yaml()}\n---"


def _hub_dataset(provenance: Provenance) -> str | None:
    """Return the hub's name of the training data; None if the hub does not have the data."""
    dataset = provenance.setting("data.dataset")
    if provenance.setting("data.sources") or provenance.setting("data.source") not in ("imdb", "package", "hub"):
        return None
    if dataset is None:
        return IMDB  # the package holds its train split, row by row
    return str(dataset) if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", dataset) and not Path(dataset).exists() else None


def _figures(provenance: Provenance, int8_cost: float | None) -> str:
    rows, validation = [], provenance.validation
    scored = {source: f", {count:,} held-out documents" for source, count in provenance.documents.items()}
    if "valid/bits_per_byte" in validation:
        rows.append(("bits per byte", f"{validation['valid/bits_per_byte']:.4f}{scored.get('', '')}"))
    for name, value in validation.items():
        if name.startswith("valid/bits_per_byte/"):
            source = name.removeprefix("valid/bits_per_byte/")
            rows.append((f"bits per byte, {source}", f"{value:.4f}{scored.get(source, '')}"))
    if "valid/loss" in validation:
        rows.append(("nats per token", f"{validation['valid/loss']:.4f}{scored.get('', '')}"))
    if int8_cost is not None:
        rows.append(("int8 decoder", f"{int8_cost:+.5f} bits per byte"))
    if provenance.trainer:
        step, total = (provenance.trainer["progression"][key] for key in ("step", "total_steps"))
        steps = f"{step:,} steps" if step == total else f"{step:,} of {total:,} steps"
        tokens = step * provenance.setting("batch_size") * provenance.setting("seq_len")
        rows.append(("training", f"{steps}, {tokens:,} tokens, precision {provenance.trainer['mixed_precision']}"))
    if not rows:
        return ""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"## Figures\n\n| figure | value |\n|---|---|\n{table}\n\nBits per byte: the loss over whole held-out "
        "documents, their ends included, per byte of their UTF-8 text. Lower is better."
    )


def _data(provenance: Provenance, text: Mapping[str, str]) -> str:
    if not provenance.data:
        return ""
    in_a_folder = provenance.setting("data.dataset") is not None and _hub_dataset(provenance) is None
    source = "a dataset in a folder" if in_a_folder else provenance.data["source"]  # this source names the folder
    if provenance.setting("data.source") == "memory":
        source = "texts of a Python program"
    sizes = dict(provenance.data["splits"])
    if sources := provenance.setting("data.sources"):
        total = sum(its["weight"] for its in sources)
        shares = (f"{its['name']} {its['weight'] / total:.1%}" for its in sources)
        source = f"{len(sources)} sources, by share of the tokens that were read: {', '.join(shares)}"
        parts = provenance.data["sources"].items()
        sizes |= {f"{split} of {name}": size for name, splits in parts for split, size in splits.items()}
    rows = "\n".join(
        f"| {name} | {size['documents']:,} | {size['tokens']:,} | {size['bytes']:,} |" for name, size in sizes.items()
    )
    dropped = ", ".join(
        f"{count:,} {reason.removeprefix('dropped_').replace('_', ' ')}"
        for reason, count in provenance.data["counts"].items()
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


def _base_repository(provenance: Provenance) -> str | None:
    """Return the hub's name of the base; None if there is no base, or it is on this machine."""
    source = str(_base_of(provenance).get("source"))
    return source.removeprefix(HUB) if re.fullmatch(rf"{HUB}\w[\w.-]*/\w[\w.-]*", source, re.ASCII) else None


def _base_section(provenance: Provenance) -> str:
    """Return what the training started from; a base on this machine has no name for others."""
    if not (base := _base_of(provenance)):
        return ""
    repository, origin = _base_repository(provenance), _base(provenance)
    named = f"`{repository}` of the Hugging Face hub" if repository else "another model"
    step = f", its step {base['step']:,}" if isinstance(base.get("step"), int) else ""
    trained = f" It was trained on {', '.join(origin['datasets'])}." if origin["datasets"] else ""
    licensed = f" Its license is {origin['license']}." if origin["license"] else ""
    digest = re.sub(r"[^0-9a-f]", "", str(base.get("sha256")))[:64]
    return (
        f"## Base\n\nThe training started from the weights of {named}{step}.{trained}{licensed} "
        f"sha256 of the weights: `{digest}`."
    )


def _labels(labels: Sequence[str]) -> str:
    """Return the names of a model's labels in a code block, so that a name is never Markdown or HTML."""
    if not labels:
        return ""
    more = f" The first {SHOWN_LABELS} are shown." if len(labels) > SHOWN_LABELS else ""
    text = f"A text may begin with one of {len(labels):,} labels, or without one. The figures are without.{more}"
    names = "\n".join(labels[:SHOWN_LABELS])
    return f"## Labels\n\n{text}\n\n{_fenced(names, 'text')}"


def _samples(provenance: Provenance) -> str:
    """Return the samples of this step in a code block, so that generated text is never Markdown or HTML."""
    if not provenance.samples:
        return ""
    text = "".join(f"[temperature {sample.temperature}] {sample.prompt}{sample.text}" for sample in provenance.samples)
    return f"## Samples\n\nNot selected, seed {provenance.setting('seed')}.\n\n{_fenced(text.strip(), 'text')}"


def _use(provenance: Provenance, where: str) -> str:
    prompt = next(iter(provenance.setting("sample_prompts") or ()), "")
    command = ["textgen", "sample", where, "--prompt", prompt, "--temperature", "0.8"]
    python = f"from textgen.model.files import load_model\n\nmodel, tokenizer = load_model({json.dumps(where)})"
    return "\n\n".join(["## Use", _fenced(shlex.join(command), "sh"), _fenced(python, "python")])


def _settings(provenance: Provenance) -> str:
    """Return the settings as a file for `--config`, without the private ones."""
    if not provenance.trainer:
        return ""
    settings: dict[str, Any] = {}
    for name, value in provenance.trainer["config"].items():
        if isinstance(value, Mapping):
            value = _public(name, value)
        if name not in PRIVATE and value != {}:
            settings[name] = value
    settings["mixed_precision"] = provenance.trainer["mixed_precision"]  # config has null if the hardware decided
    return f"## Settings\n\n{_fenced(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(), 'yaml')}"


def _public(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group of settings without the private ones, also of each of several sources."""
    values = {key: each for key, each in values.items() if f"{group}.{key}" not in PRIVATE}
    if sources := values.get("sources"):
        values["sources"] = [_public(group, source) for source in sources]
    return values


def _fenced(text: str, language: str) -> str:
    """Return a code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"
