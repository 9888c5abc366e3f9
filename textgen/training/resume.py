"""Saving the training state in a checkpoint, and resuming from it on any number of processes."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from textgen.config import TrainConfig
from textgen.distributed import launch
from textgen.errors import CheckpointError, DivergedError, in_backticks
from textgen.model.files import CONFIG_NAME, WEIGHTS_NAME, model_files, read_model, read_model_config
from textgen.model.lstm import LSTMLanguageModel, State
from textgen.runs.checkpoint import (
    MANIFEST_NAME,
    TRAINER_NAME,
    Manifest,
    checkpoint_path,
    checkpoints,
    find_checkpoint,
    newest_valid,
    read_json,
    remove_leftovers,
    set_aside,
    verify,
)
from textgen.runs.tensors import check_tensors, read_tensors
from textgen.settings import COMMAND_SETTINGS, complete_record, flatten
from textgen.tokenizer import MODEL_NAME
from textgen.training.setup import Training
from textgen.training.step import Learner, Progression, zero_lanes

log = logging.getLogger("textgen")

# Approximate size of a checkpoint's files other than tensors and tokenizer: JSON, headers.
SMALL_FILES_BYTES = 64 << 10

# Settings that may differ between a checkpoint and its resumption: they change what is logged or kept, but not the
# weights. `compare_settings` compares data and tokenizer by content.
HARMLESS = {
    "log_every", "keep_last", "save_every", "sample_prompts", "sample_temperatures", "sample_tokens", "tracking",
    "evaluate_every", "evaluate_documents", "gradient_accumulation_steps", "distributed_timeout", "stop_signal",
    "elastic", "deterministic", "cuda_graph", "checkpoint_copy",
}  # fmt: skip
# Dtypes of tensor files that may hold others than float32: an LSTM state has the dtype in which the LSTM computes.
DTYPES_OF = {"lanes": ("F32", "F16", "BF16")}


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint to resume from, and the content of its trainer.json."""

    directory: Path
    trainer: dict[str, Any]
    progression: Progression


def state_shapes(model: LSTMLanguageModel, *, batch_size: int, averaged: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of all tensors of a checkpoint, by file name without suffix and by tensor name."""
    lanes = (model.config.num_layers, batch_size, model.config.hidden_size)
    moments = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "model": model.state_shapes(),
        "optimizer": {
            f"{slot}.{name}": () if slot == "step" else shape
            for slot in ("exp_avg", "exp_avg_sq", "step")
            for name, shape in moments.items()
        },
        "lanes": {"hidden": lanes, "cell": lanes},
    }
    return shapes | ({"weights": model.state_shapes()} if averaged else {})


def checkpoint_bytes(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> int:
    """Return the approximate bytes of a checkpoint on disk, without the tokenizer."""
    return 4 * sum(math.prod(shape) for group in shapes.values() for shape in group.values()) + SMALL_FILES_BYTES


def checkpoints_at_a_time(config: TrainConfig, *, total_steps: int, per_epoch: int) -> int:
    """Return the largest number of checkpoints on disk: those kept, the best, one being written, one being copied."""
    every = config.evaluate_every or per_epoch
    saves = math.ceil(total_steps / min(every, config.save_every or every))
    kept = config.keep_last + 2 + (config.checkpoint_copy is not None)  # one that is being copied
    return min(kept, saves + (config.init_from is not None))  # a base is saved before the first step


def save(training: Training) -> float:
    """Start writing a checkpoint of this step. Collective.

    LSTM states and sums of nats are gathered from all processes. The main process copies the state and writes it in the
    background.

    Returns:
        Seconds that the main process paused the training; 0 on the others.

    Raises:
        OSError: an earlier checkpoint could not be written.
        DivergedError: the weights are not finite.
    """
    started = time.perf_counter()
    learner = training.learner
    accelerator, progress = learner.accelerator, learner.progression
    if not torch.nn.utils.get_total_norm(learner.unwrapped_model.parameters()).isfinite():
        raise DivergedError(f"the weights turned to nan or infinity by step {progress.step}; they are not saved")
    lanes = gather_lanes(accelerator, learner.lane_states)
    progress.unlogged_nats = float(accelerator.reduce(training.nats, "sum"))
    if training.saver is None:
        return 0.0
    tensors = {
        "model": learner.eval_model.state_tensors(),
        "optimizer": optimizer_tensors(learner.unwrapped_model, learner.optimizer),
        "lanes": lanes,
    }
    if learner.average is not None:  # then `model` holds the averaged weights
        tensors["weights"] = learner.unwrapped_model.state_tensors()
    files = model_files(learner.eval_model) | {
        MODEL_NAME: training.store.tokenizer.model_proto,
        TRAINER_NAME: json.dumps(_describe(training), indent=2).encode() + b"\n",
    }
    return training.saver.save(progress.step, tensors, files, best_step=progress.best_step, since=started)


def _describe(training: Training) -> dict[str, Any]:
    """Return the content of trainer.json: the training state that is not a tensor, and the settings."""
    learner = training.learner
    scaler = learner.accelerator.scaler
    return {
        "progression": asdict(learner.progression),
        "config": asdict(learner.config),
        "mixed_precision": learner.accelerator.mixed_precision,
        "data": training.store.training_key,
        "order": training.store.order,
        "tokenizer": training.store.tokenizer.sha256,
        "processes": learner.accelerator.num_processes,
        "scaler": scaler.state_dict() if scaler else None,
        "run_id": training.run_id,
        "wandb_id": training.wandb_id,
        "origin": training.origin,
        **({} if training.base is None else {"base": training.base}),
    }


def keep_reading_rules(config: TrainConfig) -> TrainConfig:
    """Return the settings with the reading rules of the run that they continue, so that its text stays the same."""
    directories = [path for _, path in checkpoints(Path(config.run_dir))]
    if config.resume != "auto" and not config.resume_override:
        directories += [path for _, path in checkpoints(Path(config.resume))] + [Path(config.resume)]
    for directory in directories if config.resume != "never" and config.data.reading_rules != 1 else []:
        try:
            rules = complete_record(read_json(directory / TRAINER_NAME)["config"])["data"]["reading_rules"]
        except (ValueError, KeyError, TypeError):
            continue  # `find_resume_point` says what is wrong
        if rules == 1:
            log.info("`%s` was started with `--data.reading_rules 1` and keeps it", directory)
            return replace(config, data=replace(config.data, reading_rules=1))
        break
    return config


def find_resume_point(training: Training) -> ResumePoint | None:
    """Return the checkpoint that `resume` names, verified; None to start from step 0. Collective.

    Raises:
        CheckpointError: the checkpoint cannot be used, a setting that changes the result differs from the checkpoint's,
            or the run has newer checkpoints.
    """
    directory = choose(training)
    # With a copy, machines may have a disk each, and the checkpoint under another path.
    by_content = training.learner.config.checkpoint_copy is not None and directory is not None
    same = (directory / MANIFEST_NAME).read_bytes() if by_content and directory is not None else directory
    launch.assert_same(training.learner.accelerator, same, "the checkpoint to resume from")
    if directory is None:
        return None
    manifest = verify(directory)
    trainer, progression = read_trainer(directory, manifest)
    compare_settings(training, trainer, directory)
    return ResumePoint(directory, trainer, progression)


def load_training(training: Training, point: ResumePoint) -> None:
    """Set the whole training state from a checkpoint, but not the number of steps to take.

    Raises:
        CheckpointError: the checkpoint has other tensors than this training.
    """
    learner = training.learner
    config, progress = learner.config, replace(point.progression)
    if point.directory.resolve().parent == checkpoint_path(Path(config.run_dir), 0).resolve().parent:
        training.wandb_id, training.origin = point.trainer["wandb_id"], point.trainer["origin"]
        training.run_id = point.trainer.get("run_id", training.run_id)  # an older version wrote none
    else:  # a checkpoint of another run, whose tracker and best checkpoint stay its own
        training.origin = str(point.directory.resolve())
        progress.best_loss = progress.best_step = None
    if point.trainer["config"].get("evaluate_documents") != config.evaluate_documents:
        progress.best_loss = progress.best_step = None  # losses of other documents cannot be compared
    training.base = point.trainer.get("base")
    learner.progression = progress
    load_tensors(learner, point)
    # The sum over all processes was saved. One process continues it.
    training.nats.fill_(progress.unlogged_nats if learner.accelerator.is_main_process else 0.0)


def load_tensors(learner: Learner, point: ResumePoint) -> None:
    """Set weights, averages, optimizer, LSTM states and GradScaler from a verified checkpoint.

    Raises:
        CheckpointError: the checkpoint has other tensors than this training.
    """
    config, accelerator, directory = learner.config, learner.accelerator, point.directory
    saved = point.trainer["config"]
    shapes = state_shapes(learner.unwrapped_model, batch_size=config.batch_size, averaged=learner.average is not None)
    averaged = saved.get("ema_decay") is not None  # then model.safetensors holds the average
    weights = directory / ("weights.safetensors" if averaged else "model.safetensors")
    learner.unwrapped_model.load_state_dict(read_tensors(weights, shapes["model"]), strict=False)
    if learner.average is not None:
        average = read_tensors(directory / "model.safetensors", shapes["model"])
        learner.average.load_state_dict(average, strict=False)
    optimizer = read_tensors(directory / "optimizer.safetensors", shapes["optimizer"])
    load_optimizer(learner.unwrapped_model, learner.optimizer, optimizer)
    if saved.get("batch_size") == config.batch_size:
        lanes = read_tensors(directory / "lanes.safetensors", shapes["lanes"], dtypes=DTYPES_OF["lanes"])
        state = lanes["hidden"], lanes["cell"]
        learner.lane_states = own_lanes(accelerator, state, config.gradient_accumulation_steps)
    else:  # only with `resume_override`: the lanes are other stretches of text
        learner.lane_states = zero_lanes(learner)
    if accelerator.scaler and point.trainer.get("scaler"):
        try:
            accelerator.scaler.load_state_dict(point.trainer["scaler"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"`{directory / TRAINER_NAME}`: `scaler` is not one: {error}") from error


def choose(training: Training) -> Path | None:
    """Return the checkpoint that `resume` names; None to start from step 0. Collective.

    The main process renames invalid checkpoints first. The other processes look after that.
    """
    config, main = training.learner.config, training.learner.accelerator.is_main_process
    run_dir = Path(config.run_dir)
    if config.resume == "never":
        if checkpoints(run_dir):
            raise CheckpointError(
                f"`{config.run_dir}` holds a training and `--resume never` would overwrite it: "
                "remove it or name another `--run_dir`"
            )
        return None
    if config.resume != "auto" and (directory := _choose_named(config.resume, run_dir)) is not None:
        return directory
    chosen = _newest_after_cleaning(run_dir) if main else None
    # Others do not look for the newest one: a disk of another machine may have a newer one of an earlier start.
    step = launch.from_main(training.learner.accelerator, -1 if chosen is None else verify(chosen, []).step)
    return None if step < 0 else checkpoint_path(run_dir, step)


def _choose_named(name: str, run_dir: Path) -> Path | None:
    """Return the checkpoint of that name; None if the run started from it and has newer ones."""
    directory = find_checkpoint(name)
    if directory is None:
        raise CheckpointError(f"`{name}` is neither a checkpoint nor a run with one")
    newest, path = next(iter(checkpoints(run_dir)), (0, None))
    if path is None or newest <= verify(directory, []).step:
        return directory
    if read_json(path / TRAINER_NAME).get("origin") != str(directory.resolve()):
        raise CheckpointError(
            f"`{run_dir}` holds checkpoints up to step {newest}, newer than `{directory}`: "
            "remove them or name another `--run_dir`"
        )
    log.info("`%s` started from `%s`, and resumes from its own checkpoints", run_dir, directory)
    return None


def _newest_after_cleaning(run_dir: Path) -> Path | None:
    """Remove leftovers, rename invalid checkpoints to `*.invalid`, and return the newest valid one."""
    remove_leftovers(run_dir)
    chosen, problems = newest_valid(run_dir)
    if problems and chosen is None:
        raise CheckpointError(
            f"no checkpoint of `{run_dir}` is valid: {'; '.join(map(str, problems))}; "
            "remove them to start from step 0, or name another `--run_dir`"
        )
    if problems:
        log.warning(
            "INVALID CHECKPOINTS: %s; set aside as `*.invalid`, continuing from `%s`",
            "; ".join(map(str, problems)),
            chosen,
        )
        for _, path in checkpoints(run_dir)[: len(problems)]:
            set_aside(path)
    return chosen


def read_trainer(directory: Path, manifest: Manifest) -> tuple[dict[str, Any], Progression]:
    """Return the content of trainer.json and the progression in it, compared with the manifest.

    Raises:
        CheckpointError: trainer.json is of another version or step, or the manifest lacks a file of the checkpoint.
            `verify` does not check a file that the manifest lacks.
    """
    path = directory / TRAINER_NAME
    trainer = read_json(path)
    kinds = {
        "config": dict, "mixed_precision": str, "data": str, "scaler": dict | None, "wandb_id": str | None,
        "origin": str | None,
    }  # fmt: skip
    sound = all(name in trainer and isinstance(trainer[name], kind) for name, kind in kinds.items())
    if not sound or not isinstance(trainer.get("base", {}), dict) or not isinstance(trainer.get("run_id", ""), str):
        raise CheckpointError(f"`{path}` is of another version of textgen: it lacks settings")
    wanted = {CONFIG_NAME, WEIGHTS_NAME, "optimizer.safetensors", "lanes.safetensors", MODEL_NAME, TRAINER_NAME}
    if trainer["config"].get("ema_decay") is not None:
        wanted.add("weights.safetensors")
    if wrong := sorted(manifest.files.keys() ^ wanted):
        lacks = "has no" if wrong[0] in wanted else "should have no"
        raise CheckpointError(f"`{directory}` {lacks} `{wrong[0]}` in its `{MANIFEST_NAME}`")
    progression = _read_progression(trainer.get("progression"), path)
    if progression.step != manifest.step:
        raise CheckpointError(f"`{path}` is of step {progression.step}, the manifest of step {manifest.step}")
    return trainer, progression


def _read_progression(values: object, path: Path) -> Progression:
    kinds = typing.get_type_hints(Progression)
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        raise CheckpointError(f"`{path}` is of another version of textgen: its progression has other fields")
    for name, value in values.items():
        allowed = typing.get_args(kinds[name]) or (kinds[name],)
        if type(value) not in allowed or (value is not None and not -1 < value < 1 << 63):
            raise CheckpointError(f"`{path}`: `{name}` is {value!r:.40}")
    return Progression(**values)


def _flat(config: TrainConfig) -> dict[str, Any]:
    """Return settings by dotted name, with the values that JSON gives back: lists for tuples."""
    return flatten(json.loads(json.dumps(asdict(config))))


def compare_settings(training: Training, trainer: dict[str, Any], directory: Path) -> None:
    """Log the settings that differ from the checkpoint's.

    Raises:
        CheckpointError: one of them changes the result, or the labels are others.
    """
    config = training.learner.config
    differing_labels = _compare_labels(training, directory)
    saved, current, harmless = _settings(config, training.learner.accelerator, trainer)
    if saved["data.source"] == current["data.source"] == "memory":  # the store's name is a hash of the texts
        saved["data.store"] = current["data.store"]
    if trainer.get("tokenizer") == training.store.tokenizer.sha256:  # that of a base has another path after a resume
        saved |= {name: value for name, value in current.items() if name.startswith("tokenizer.")}
    if trainer["data"] == training.store.training_key:
        harmless = harmless | {"data", "tokenizer"}  # the tokens are the same
    elif all(current[name] == saved[name] for name in current if name.startswith(("data.", "tokenizer."))):
        saved["training text"], current["training text"] = trainer["data"], training.store.training_key
    # a checkpoint of a version that knew no shards has no `order`
    saved["order of documents"] = trainer.get("order", "documents")
    current["order of documents"] = training.store.order
    saved["weights of data.sources"], current["weights of data.sources"] = _weights(saved), _weights(current)
    overridden = False
    for name in current:
        if current[name] == saved[name] or name in COMMAND_SETTINGS:
            continue
        message = f"`{name}` is {current[name]}, `{directory}` was made with {saved[name]}"
        if name.split(".")[0] not in harmless:
            if not config.resume_override:
                from_weights = "" if name.startswith("model.") else f", with `--init_from {directory}` from its weights"
                regardless = "" if differing_labels else "`--resume_override` resumes regardless, "
                run_dir = "`--run_dir`" + (" and `--checkpoint_copy`" if config.checkpoint_copy else "")
                raise CheckpointError(f"{message}: {regardless}another {run_dir} starts a new run{from_weights}")
            overridden = True
        log.info("%s", message)
    if overridden:
        log.warning(
            "resuming regardless keeps step, schedule, optimizer and LSTM states of `%s`: `--init_from` with another "
            "`--run_dir` takes its weights alone",
            directory,
        )


def find_difference(config: TrainConfig, accelerator: Accelerator, trainer: Mapping[str, Any]) -> str | None:
    """Return the first setting by which a run of these settings would have another result than a checkpoint.

    Data and tokenizer are not compared, which `compare_settings` does by content, once the data are there.

    Args:
        config: the settings.
        accelerator: with their precision.
        trainer: trainer.json of the checkpoint, which may be a stranger's.
    """
    if not (isinstance(trainer.get("config"), dict) and isinstance(trainer.get("mixed_precision"), str)):
        return None  # `read_trainer` says what is wrong
    saved, current, harmless = _settings(config, accelerator, trainer)
    for name, value in current.items():
        group = name.split(".")[0]
        if value != saved[name] and not (group in harmless | {"data", "tokenizer"} or name in COMMAND_SETTINGS):
            return f"`{name}` is {value}, wanted {saved[name]}"
    return None


def _settings(
    config: TrainConfig, accelerator: Accelerator, trainer: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """Return a checkpoint's settings and these, by dotted name, and those (or their groups) that may differ."""
    # defaults are for settings that the checkpoint's version did not have
    saved, current = _flat(TrainConfig()) | flatten(complete_record(trainer["config"])), _flat(config)
    saved["mixed_precision"], current["mixed_precision"] = trainer["mixed_precision"], accelerator.mixed_precision
    # A resume does not look at the base: its name may be left out, or written in another way.
    if config.init_from is None or _is_same_place(config.init_from, saved["init_from"]):
        saved["init_from"] = config.init_from
    harmless = set(HARMLESS)
    if config.early_stopping_patience is not None:
        harmless -= {"evaluate_every", "evaluate_documents"}  # they decide when the training stops
    if config.lr_schedule == "constant":
        harmless |= {"max_steps", "max_epochs", "max_minutes"}  # no step depends on how many there will be
    return saved, current, harmless


def _weights(flat: Mapping[str, Any]) -> dict[str, float]:
    """Return the weights of several sources, which are no part of the training text, in settings by dotted name."""
    return {source["name"]: source["weight"] for source in flat["data.sources"]}


def _compare_labels(training: Training, directory: Path) -> list[str]:
    """Return the labels that only one of checkpoint and training has.

    Raises:
        CheckpointError: there are some, and `resume_override` would give their rows to others by their place.
    """
    labels, own = read_model_config(directory)[3], training.learner.unwrapped_model.labels
    differing = sorted(set(labels) ^ set(own))
    if differing and training.learner.config.resume_override:
        raise CheckpointError(
            f"`{directory}` has {len(labels)} labels and this training {len(own)}, and only one of them has "
            f"{in_backticks(differing[:10])}: leave `resume_override` out, and give `--init_from {directory}` and "
            "another `--run_dir` to start a new training from its weights"
        )
    return differing


def _is_same_place(name: str, other: object) -> bool:
    """Return whether two names are of one folder, or the same one of the hub."""
    return isinstance(other, str) and os.path.abspath(name) == os.path.abspath(other)


def describe_checkpoint(directory: Path) -> dict[str, Any]:
    """Check every byte and every tensor's shape of a checkpoint, and return its content as plain values.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    manifest = verify(directory)
    trainer, progress = read_trainer(directory, manifest)
    averaged, batch_size = "weights.safetensors" in manifest.files, trainer["config"].get("batch_size")
    model = read_model(directory)
    shapes = state_shapes(model, batch_size=batch_size, averaged=averaged)
    for name, group in shapes.items():
        check_tensors(directory / f"{name}.safetensors", group, dtypes=DTYPES_OF.get(name, ("F32",)))
    return {
        "checkpoint": str(directory), "valid": True, "step": progress.step, "total_steps": progress.total_steps,
        "finished": progress.finished, "best_step": progress.best_step, "best_loss": progress.best_loss,
        "parameters": model.num_parameters, "tensors": sum(map(len, shapes.values())),
        "bytes": sum(size for size, _ in manifest.files.values()), "files": " ".join(sorted(manifest.files)),
        "processes": trainer.get("processes"), "mixed_precision": trainer.get("mixed_precision"),
        "data": trainer.get("data"), "tokenizer": trainer.get("tokenizer"), "wandb_id": trainer.get("wandb_id"),
    }  # fmt: skip


# --- tensors of the state --------------------------------------------------------------------------------------------


def gather_lanes(accelerator: Accelerator, lane_states: Sequence[State]) -> dict[str, Tensor]:
    """Gather the LSTM states of all lanes from all processes. Collective.

    Returns:
        `hidden` and `cell`, (num_layers, batch_size, hidden_size) in the order of global lanes.
    """
    gathered: dict[str, list[Tensor]] = {"hidden": [], "cell": []}
    for hidden, cell in lane_states:
        for name, value in (("hidden", hidden), ("cell", cell)):
            # Accelerate gathers along the first dimension, in the order of processes, which is that of the lanes.
            everyone = accelerator.gather(value.transpose(0, 1).contiguous())
            gathered[name].append(everyone.transpose(0, 1))
    return {name: torch.cat(parts, 1) for name, parts in gathered.items()}


def own_lanes(accelerator: Accelerator, state: State, micro_batches: int) -> list[State]:
    """Return this process's part of the states of all lanes, per micro-batch: the inverse of `gather_lanes`."""
    parts = []
    for i in range(micro_batches):
        hidden, cell = (
            s.chunk(micro_batches, 1)[i].chunk(accelerator.num_processes, 1)[accelerator.process_index] for s in state
        )
        parts.append((hidden.to(accelerator.device), cell.to(accelerator.device)))
    return parts


def optimizer_tensors(model: LSTMLanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as `slot.parameter name` -> tensor."""
    return {
        f"{slot}.{name}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(model: LSTMLanguageModel, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Set the optimizer's state from tensors as `optimizer_tensors` returns them, for the same parameters."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        slot, _, name = key.partition(".")
        slots.setdefault(name, {})[slot] = tensor
    state = {i: slots[name] for i, (name, _) in enumerate(model.named_parameters())}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
