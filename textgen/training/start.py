"""The weights that a new training starts from: with `--init_from` those of another model, its base.

Without a base they are random, but the embedding starts from the training text (see model/neighbours.py).

Of a base, config.json, model.safetensors and tokenizer.model are read, the header of its card, and of a checkpoint its
manifest and settings. A run that has a checkpoint continues from it and never looks at the base again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast

from textgen.config import TokenizerConfig, TrainConfig
from textgen.distributed import launch
from textgen.errors import TextgenError
from textgen.model.files import (
    CONFIG_NAME,
    MODEL_FILES,
    WEIGHTS_NAME,
    read_model_and_tokenizer,
    read_model_config,
    resolve_model_directory,
    weights_sha256,
)
from textgen.model.lstm import LSTMLanguageModel
from textgen.model.neighbours import NUM_TOKENS, embed_by_neighbours
from textgen.reporting.card import origin_of
from textgen.runs.checkpoint import MANIFEST_NAME, TRAINER_NAME, checkpoints, find_checkpoint, read_json, verify
from textgen.settings import build_settings, complete_record, flatten
from textgen.tokenizer import MODEL_NAME, Tokenizer
from textgen.training.setup import Training
from textgen.training.step import zero_lanes

log = logging.getLogger("textgen")

# The settings of a model that decide which weights it has. The others, such as dropout, are the new training's.
SHAPE = ("embedding_dim", "hidden_size", "num_layers", "tie_weights", "projection", "layer_norm", "residual")


# --- settings --------------------------------------------------------------------------------------------------------


def settings_from_base(config: TrainConfig, *, given: Collection[str], from_files: Collection[str]) -> TrainConfig:
    """Return the settings of a training with the base's shape, tokenizer and normalization.

    If `run_dir` has a checkpoint, they are the checkpoint's, and the base is not read: it may be gone.

    Args:
        config: all settings.
        given: names of the settings that the user gave one by one. If they include one of the tokenizer, the training
            has another tokenizer than the base.
        from_files: names of the settings in config files; a value that the base does not have is left out and logged.

    Raises:
        TextgenError: the base cannot be read, or a setting in `given` wants another shape.
    """
    if config.init_from is None:
        return config
    where, wanted = config.init_from, _settings_of_run(Path(config.run_dir))
    if wanted is None:
        wanted = _settings_of_base(config.init_from)
    elif wanted:
        where = config.run_dir
    own_tokenizer = config.data.store is not None or any(name.startswith("tokenizer.") for name in given)
    if own_tokenizer:
        wanted = {name: value for name, value in wanted.items() if not name.startswith("tokenizer.")}
    if config.data.store is not None or "data.normalization" in given:
        wanted.pop("data.normalization", None)
    current = flatten(asdict(config))
    differing = {name: value for name, value in wanted.items() if current[name] != value}
    for name, value in differing.items():
        if name in given:
            raise TextgenError(
                f"`{name}` {current[name]} differs from {value} of `{where}`, whose shape a training with `init_from` "
                "has: leave it out"
            )
    if unused := [f"`{name}` {current[name]}" for name in differing if name in from_files]:
        log.info("`%s` decides shape and tokenizer, so these settings are not used: %s", where, ", ".join(unused))
    return _replace(config, differing, where)


def _settings_of_base(name: str) -> dict[str, Any]:
    """Return the settings that a base decides, by dotted name."""
    directory = find_checkpoint(name, files=(CONFIG_NAME, MODEL_NAME)) or resolve_model_directory(name)
    model, vocab_size, text, _ = read_model_config(directory)
    return (
        {f"model.{field}": getattr(model, field) for field in SHAPE}
        | flatten({"tokenizer": asdict(TokenizerConfig())})
        | {"tokenizer.path": str(directory), "tokenizer.vocab_size": vocab_size}
        | {"data.normalization": text.get("normalization", "none")}
    )


def _settings_of_run(run_dir: Path) -> dict[str, Any] | None:
    """Return the settings that a run's base has decided, by dotted name; None if the run has no checkpoint.

    They are empty if the run has no base, or no checkpoint can be read: `find_resume_point` says what is wrong.
    """
    directories = [path for _, path in checkpoints(run_dir)]
    for directory in directories:
        try:
            recorded = complete_record(read_json(directory / TRAINER_NAME)["config"])
            if recorded["init_from"] is None:
                break
            settings = {f"model.{field}": recorded["model"][field] for field in SHAPE}
            settings |= flatten({"tokenizer": recorded["tokenizer"]})
            if settings["tokenizer.path"] is not None:  # the base's, which may be gone
                settings["tokenizer.path"] = str(directory)
            return settings | {"data.normalization": recorded["data"]["normalization"]}
        except (ValueError, KeyError, TypeError):
            continue
    return {} if directories else None


def _replace(config: TrainConfig, values: dict[str, Any], where: str) -> TrainConfig:
    """Return the settings with other values, by dotted name.

    Raises:
        TextgenError: a value of the file in `where` is not allowed.
    """
    nested = asdict(config)
    for name, value in values.items():
        group, _, field = name.partition(".")
        nested[group][field] = value
    try:
        return build_settings(TrainConfig, nested)
    except ValueError as error:
        raise TextgenError(f"`{where}`: {error}") from error


# --- weights ---------------------------------------------------------------------------------------------------------


def start_from_base(training: Training) -> None:
    """Set the weights of a new training from its base, and note in `training.base` which they are. Collective.

    Raises:
        TextgenError: the base cannot be read, has another shape, or weights that are not finite; or processes found
            different ones.
    """
    learner, tokenizer = training.learner, training.store.tokenizer
    name, model = learner.config.init_from, learner.unwrapped_model
    assert name is not None
    directory = find_checkpoint(name, files=MODEL_FILES) or resolve_model_directory(name)
    base, base_tokenizer = read_model_and_tokenizer(directory)
    for field in SHAPE:
        if (seen := getattr(base.config, field)) != (wanted := getattr(model.config, field)):
            raise TextgenError(f"`{name}` has `model.{field}` {seen}, the training {wanted}")
    if not torch.nn.utils.get_total_norm(base.parameters()).isfinite():
        raise TextgenError(f"`{directory / WEIGHTS_NAME}` has weights that are not finite")
    digest = weights_sha256(directory)
    step = verify(directory, []).step if (directory / MANIFEST_NAME).exists() else None
    kept = copy_weights(base, base_tokenizer, model, tokenizer)
    if learner.average is not None:
        learner.average.load_state_dict(model.state_dict())
    learner.lane_states = zero_lanes(learner)
    launch.assert_same(learner.accelerator, (step, digest), "the weights to start from")
    training.base = {
        "source": name, "directory": str(directory), "step": step, "sha256": digest, "pieces_kept": kept,
        **origin_of(directory),
    }  # fmt: skip
    at = "" if step is None else f" step {step}"
    log.info("starting from `%s`%s: %s of %s pieces kept", name, at, f"{kept:,}", f"{tokenizer.vocab_size:,}")


@torch.no_grad()
def start_from_neighbours(training: Training) -> None:
    """Set the embedding of a new training from the neighbours of its tokens in the text. Collective.

    The main process computes it, in one thread: its bits do not depend on the number of processes.

    Raises:
        TextgenError: a shard of the text is missing or damaged.
    """
    learner = training.learner
    model, weight = learner.unwrapped_model, learner.unwrapped_model.embedding.weight
    if learner.accelerator.is_main_process:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        rows, known = embed_by_neighbours(
            training.loader.sample(NUM_TOKENS),
            vocab_size=model.vocab_size,
            embedding_dim=model.config.embedding_dim,
            generator=torch.Generator().manual_seed(learner.config.seed),
        )
        torch.set_num_threads(threads)
        if model.labels:
            known[training.store.tokenizer.eos_id] = False  # `remember_labels` has set it
        weight[known.to(weight.device)] = rows[known].to(weight.device)
    broadcast(weight)
    if learner.average is not None:
        learner.average.load_state_dict(model.state_dict())


@torch.no_grad()
def copy_weights(
    base: LSTMLanguageModel, base_tokenizer: Tokenizer, model: LSTMLanguageModel, tokenizer: Tokenizer
) -> int:
    """Copy the weights of a model into another one of the same shape, whose tokenizer may be another.

    With another tokenizer, the row of a piece that the base has is copied. The row of another piece is the mean of the
    rows of the pieces into which the base's tokenizer cuts it. The output bias stays: that of the new text's counts.

    Args:
        base: the model to copy from.
        base_tokenizer: of `base`.
        model: the model with its initial weights; they are replaced.
        tokenizer: of `model`.

    Returns:
        The number of pieces of `tokenizer` that the base has too.
    """
    weights = base.state_tensors()
    kept = tokenizer.vocab_size
    if tokenizer.sha256 != base_tokenizer.sha256:
        sources = piece_sources(base_tokenizer, tokenizer)
        for name in {"embedding.weight", "output.weight"} & weights.keys():
            weights[name] = torch.stack([weights[name][ids].mean(0) for ids in sources])
        weights["output.bias"] = model.output.bias
        kept = len(set(base_tokenizer.pieces) & set(tokenizer.pieces))
    weights.pop("label_embedding.weight", None)
    model.load_state_dict(weights, strict=False)
    _copy_labels(base, model, end=tokenizer.eos_id)
    return kept


def _copy_labels(base: LSTMLanguageModel, model: LSTMLanguageModel, *, end: int) -> None:
    """Copy the embeddings of the labels that both have. A new label gets that of end-of-text, whose place it takes."""
    known = {} if base.label_embedding is None else dict(zip(base.labels, base.label_embedding.weight, strict=True))
    if model.label_embedding is not None:
        other = model.embedding.weight[end].cpu()
        model.label_embedding.weight.copy_(torch.stack([known.get(label, other) for label in model.labels]))
    if model.labels or base.labels:
        kept = len(known.keys() & set(model.labels))
        log.info("labels: %d of %d kept; the base has %d", kept, model.num_labels, len(base.labels))


def piece_sources(base: Tokenizer, tokenizer: Tokenizer) -> list[list[int]]:
    """Return for each piece the ids of a base's pieces that it is made of: one id if the base has the same piece."""
    known = {piece: i for i, piece in enumerate(base.pieces)}
    texts = (tokenizer.token_bytes(i).decode(errors="replace") for i in range(tokenizer.vocab_size))
    return [
        [known[piece]] if piece in known else base.encode(text) or [base.unk_id]
        for piece, text in zip(tokenizer.pieces, texts, strict=True)
    ]
