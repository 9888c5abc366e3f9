"""A model's files: reads them, writes them, fetches them from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from textgen.config import ModelConfig
from textgen.console import has_terminal
from textgen.errors import CheckpointError, TextgenError, first_line
from textgen.files import JSON_BYTES, parse_json
from textgen.model.lstm import LSTMLanguageModel
from textgen.runs.checkpoint import find_checkpoint
from textgen.runs.tensors import read_header, read_tensors, serialize
from textgen.tokenizer import MODEL_NAME, Tokenizer

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MODEL_FILES = (CONFIG_NAME, WEIGHTS_NAME, MODEL_NAME)
_FORMAT = "textgen.lstm.1"

HUB_SECONDS = 3  # limit for the hub's first answer


def model_files(model: LSTMLanguageModel) -> dict[str, bytes]:
    """Return the files beside the weights in a model's directory: content by name."""
    config = {"format": _FORMAT, "vocab_size": model.vocab_size, "text": model.text, **asdict(model.config)}
    config |= {"labels": list(model.labels)} if model.labels else {}
    return {CONFIG_NAME: json.dumps(config, indent=2).encode() + b"\n"}


def save_model(model: LSTMLanguageModel, directory: str | Path) -> None:
    """Write `config.json` and `model.safetensors` into a directory, which is made if it is missing."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in model_files(model).items():
        (directory / name).write_bytes(content)
    with (directory / WEIGHTS_NAME).open("wb") as file:
        for piece in serialize({name: value.cpu().contiguous() for name, value in model.state_tensors().items()}):
            file.write(piece)


def weights_sha256(directory: Path) -> str:
    """Return the sha256 of a model's weights: what was made from them, such as figures, is valid for these only."""
    with (directory / WEIGHTS_NAME).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_model(name: str | Path) -> LSTMLanguageModel:
    """Read a model from a directory, or from a repository of the Hugging Face hub.

    Raises:
        TextgenError: the model is not found, or its files do not fit together.
    """
    directory = resolve_model_directory(name)
    config, vocab_size, text, labels = read_model_config(directory)
    try:
        if 3 * config.num_layers > len(read_header(directory / WEIGHTS_NAME)):
            raise TextgenError(f"`{directory / WEIGHTS_NAME}` has too few tensors for {config.num_layers} layers")
        with torch.device("meta"):  # config.json alone, which may be wrong, must not allocate memory
            model = LSTMLanguageModel(config, vocab_size, text=text, labels=labels)
        tensors = read_tensors(directory / WEIGHTS_NAME, model.state_shapes())
        model.load_state_dict(tensors, strict=False, assign=True)
        if config.tie_weights:
            model.output.weight = model.embedding.weight
    except TextgenError:
        raise
    except Exception as error:  # torch raises several classes
        raise TextgenError(f"`{directory}` holds no readable model: {first_line(error)}") from error
    return model


def read_model_config(directory: Path) -> tuple[ModelConfig, int, dict[str, str], list[str]]:
    """Return what config.json says of a model: shape, number of tokens, how text became tokens, and the labels.

    Raises:
        TextgenError: the file cannot be read, or is not one of textgen.
    """
    try:
        with (directory / CONFIG_NAME).open("rb") as file:
            values = parse_json(file.read(JSON_BYTES + 1))
        if values.pop("format", None) != _FORMAT:
            raise TextgenError(f"`{directory / CONFIG_NAME}` is not a textgen model: `format` is not {_FORMAT}")
        vocab_size, text, labels = values.pop("vocab_size"), values.pop("text", {}), values.pop("labels", [])
        # Models from before the setting `projection` had a projection if the sizes differ.
        values.setdefault("projection", values["embedding_dim"] != values["hidden_size"])
        _check_types(values, vocab_size, text)
        check_labels(labels)
        return ModelConfig(**values), vocab_size, text, labels
    except TextgenError:
        raise
    except Exception as error:  # JSON and dataclasses each raise their own
        raise TextgenError(f"`{directory}` holds no readable model: {first_line(error)}") from error


def _check_types(settings: Mapping[str, Any], vocab_size: object, text: object) -> None:
    """Raise ValueError if a value of config.json has another type than its setting. To Python, true would be a 1."""
    kinds = typing.get_type_hints(ModelConfig)
    for name, value in {**settings, "vocab_size": vocab_size}.items():
        kind = kinds.get(name, int if name == "vocab_size" else type(value))  # ModelConfig refuses other names
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"`{name}` is {value!r:.40}, wanted {kind.__name__}")
    if not isinstance(text, dict) or not all(isinstance(value, str) for value in text.values()):
        raise ValueError("`text` does not hold texts")


def check_labels(labels: object) -> None:
    """Raise ValueError if the labels of a stranger's file are not a list of different lines of text."""
    if not isinstance(labels, list) or not all(isinstance(x, str) and x and x.isprintable() for x in labels):
        raise ValueError(f"`labels` is {labels!r:.40}, wanted a list of names")
    if len(set(labels)) < len(labels):
        raise ValueError("`labels` holds a name twice")


def resolve_model_directory(name: str | Path) -> Path:
    """Return the directory of a model: `name` if it is one, else a snapshot fetched from the hub.

    Args:
        name: a directory, or a repository `OWNER/NAME`; `hub:OWNER/NAME` is never a directory.

    Raises:
        TextgenError: `name` is neither a directory with a config nor a repository that can be reached.
    """
    path, repository = Path(name), str(name).removeprefix("hub:")
    if repository == str(name):
        if (path / CONFIG_NAME).is_file():
            return path
        if path.exists() or repository.count("/") != 1 or repository.startswith((".", "/", "~")):
            raise TextgenError(f"`{name}` has no `{CONFIG_NAME}`: not a checkpoint directory")
    from huggingface_hub import HfApi, snapshot_download

    draw_bars_in_terminals_only()
    unreached = None
    # `snapshot_download` waits forever for a hub that does not answer, so the hub is asked with a time limit first. If
    # it does not answer, a snapshot that was fetched before is used.
    try:
        HfApi().model_info(repository, timeout=HUB_SECONDS)
    except Exception as error:
        unreached = error
    try:
        # decoder.json tells which decoder to choose, the card what the model was trained on
        files = [*MODEL_FILES, "decoder.json", "README.md"]
        offline = unreached is not None
        return Path(
            snapshot_download(repository, allow_patterns=files, etag_timeout=HUB_SECONDS, local_files_only=offline)
        )
    except Exception as error:
        raise TextgenError(
            f"`{name}` is not a directory and cannot be read from the hub: {first_line(unreached or error)}"
        ) from error


def draw_bars_in_terminals_only() -> None:
    """Turn off the progress bars of the hub's client unless stderr is a terminal that textgen may use."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not has_terminal():
        disable_progress_bars()


def load_model(
    name: str | Path, device: torch.device | str = "cpu", *, best: bool = False
) -> tuple[LSTMLanguageModel, Tokenizer]:
    """Read model and tokenizer of a checkpoint directory, of a run's newest or best checkpoint, or of a hub repository.

    Raises:
        CheckpointError, TextgenError, TokenizerError: it cannot be read, or the tokenizer is not the model's.
    """
    directory = find_checkpoint(name, best=best, files=MODEL_FILES) or resolve_model_directory(name)
    return read_model_and_tokenizer(directory, device)


def read_model_and_tokenizer(
    directory: Path, device: torch.device | str = "cpu"
) -> tuple[LSTMLanguageModel, Tokenizer]:
    """Read model and tokenizer of a directory whose files the caller has verified.

    Raises:
        CheckpointError, TextgenError, TokenizerError: they cannot be read, or the tokenizer is not the model's.
    """
    model = read_model(directory)
    if not (directory / MODEL_NAME).is_file():
        raise CheckpointError(f"`{directory}` has no `{MODEL_NAME}`")
    tokenizer = Tokenizer.from_file(directory / MODEL_NAME)
    if tokenizer.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"`{directory / MODEL_NAME}` has {tokenizer.vocab_size} tokens, the model beside it {model.vocab_size}"
        )
    if model.text.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise CheckpointError(
            f"`{directory / MODEL_NAME}` is not the tokenizer of the model beside it: sha256 {tokenizer.sha256}, "
            f"wanted {model.text['tokenizer_sha256']}"
        )
    return model.to(device).eval(), tokenizer
