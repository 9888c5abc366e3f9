"""The training state as a checkpoint, and back: on any number of processes."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from textgen.config import TrainConfig
from textgen.distributed import launch
from textgen.errors import CheckpointError, TextgenError
from textgen.model.files import CONFIG_NAME, WEIGHTS_NAME, model_files, read_model
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
    verify,
)
from textgen.runs.tensors import check_tensors, read_tensors
from textgen.settings import COMMAND_SETTINGS, flatten
from textgen.tokenizer import MODEL_NAME
from textgen.training.budget import fit_steps
from textgen.training.step import Progression, Training, zero_lanes

log = logging.getLogger("textgen")

# About what a checkpoint takes beside its tensors and the tokenizer: JSON, headers.
SMALL_FILES_BYTES = 64 << 10

# Settings that may differ between a checkpoint and its resumption: they change what is told or kept, not what is
# learnt. Data and tokenizer are compared by content (`compare_settings`).
HARMLESS = {
    "log_every", "keep_last", "save_every", "sample_prompts", "sample_temperatures", "sample_tokens", "tracking",
    "evaluate_every", "evaluate_documents", "gradient_accumulation_steps", "distributed_timeout", "stop_signal",
    "deterministic", "cuda_graph",
}  # fmt: skip
# A tensor file's dtypes where they are not float32 alone: LSTM states are of what the LSTM computes in.
DTYPES_OF = {"lanes": ("F32", "F16", "BF16")}


def state_shapes(model: LSTMLanguageModel, *, batch_size: int, averaged: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of all tensors of a checkpoint, by file name without ending and by tensor name."""
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
    """Return about how much disk a checkpoint of such tensors takes, without the tokenizer."""
    return 4 * sum(math.prod(shape) for group in shapes.values() for shape in group.values()) + SMALL_FILES_BYTES


def checkpoints_at_a_time(config: TrainConfig, *, total_steps: int, per_epoch: int) -> int:
    """Return how many checkpoints a training has on disk at most: those kept, the best, and one being written."""
    every = config.evaluate_every or per_epoch
    return min(config.keep_last + 2, math.ceil(total_steps / min(every, config.save_every or every)))


def save(training: Training) -> float:
    """Have a checkpoint of this step written; return the seconds that the main process paused for it. Collective.

    LSTM states and sums of nats are gathered; the main process copies the state and writes it in the background.

    Raises:
        OSError: an earlier one could not be written.
        TextgenError: the weights are not finite.
    """
    started = time.perf_counter()
    accelerator, progress = training.accelerator, training.progression
    if not torch.nn.utils.get_total_norm(training.unwrapped_model.parameters()).isfinite():
        raise TextgenError(f"the weights turned to nan or infinity by step {progress.step}; they are not saved")
    lanes = gather_lanes(accelerator, training.lane_states)
    progress.unlogged_nats = float(accelerator.reduce(training.nats, "sum"))
    if training.saver is None:
        return 0.0
    model = training.eval_model
    tensors = {
        "model": model.state_tensors(),
        "optimizer": optimizer_tensors(training.unwrapped_model, training.optimizer),
        "lanes": lanes,
    }
    if training.average is not None:
        tensors["weights"] = training.unwrapped_model.state_tensors()
    trainer = {
        "progression": asdict(progress),
        "config": asdict(training.config),
        "mixed_precision": accelerator.mixed_precision,
        "data": training.store.training_key,
        "tokenizer": training.store.tokenizer.sha256,
        "processes": accelerator.num_processes,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "wandb_id": training.wandb_id,
        "origin": training.origin,
    }
    files = model_files(model) | {
        MODEL_NAME: training.store.tokenizer.model_proto,
        TRAINER_NAME: json.dumps(trainer, indent=2).encode() + b"\n",
    }
    return training.saver.save(progress.step, tensors, files, best_step=progress.best_step, since=started)


def resume(training: Training) -> bool:
    """Load the checkpoint that `resume` names, if any; return whether there was one. Collective.

    Raises:
        CheckpointError: it cannot be used, settings that change the result differ, or the run holds newer ones.
    """
    config, accelerator = training.config, training.accelerator
    directory = choose(training)
    launch.assert_same(accelerator, directory, "the checkpoint to resume from")
    if directory is None:
        return False
    manifest = verify(directory)
    trainer, saved = read_trainer(directory, manifest)
    compare_settings(training, trainer, directory)
    if directory.resolve().parent == checkpoint_path(Path(config.run_dir), 0).resolve().parent:
        training.wandb_id, training.origin = trainer["wandb_id"], trainer["origin"]
    else:  # a branch: what it did before belongs to the other run
        training.origin = str(directory.resolve())
        saved.best_loss = saved.best_step = None
    if trainer["config"].get("evaluate_documents") != config.evaluate_documents:
        saved.best_loss = saved.best_step = None  # it would be compared with unlike measures
    total = training.progression.total_steps
    if config.max_minutes is not None:
        same = trainer["config"].get("max_minutes") == config.max_minutes
        total = min(total, saved.total_steps if same else fit_steps(training))
    if total != saved.total_steps:
        saved.total_steps, saved.finished = total, saved.step >= total
    training.progression = saved
    load_training(training, trainer, directory)
    training.nats.fill_(saved.unlogged_nats if accelerator.is_main_process else 0.0)
    return True


def load_training(training: Training, trainer: dict[str, Any], directory: Path) -> None:
    """Set weights, averages, optimizer, LSTM states and GradScaler from a verified checkpoint.

    Raises:
        CheckpointError: it holds other tensors than this training.
    """
    config, accelerator = training.config, training.accelerator
    shapes = state_shapes(training.unwrapped_model, batch_size=config.batch_size, averaged=training.average is not None)
    averaged = trainer["config"].get("ema_decay") is not None  # then model.safetensors holds the average
    weights = directory / ("weights.safetensors" if averaged else "model.safetensors")
    training.unwrapped_model.load_state_dict(read_tensors(weights, shapes["model"]), strict=False)
    if training.average is not None:
        average = read_tensors(directory / "model.safetensors", shapes["model"])
        training.average.load_state_dict(average, strict=False)
    optimizer = read_tensors(directory / "optimizer.safetensors", shapes["optimizer"])
    load_optimizer(training.unwrapped_model, training.optimizer, optimizer)
    if trainer["config"].get("batch_size") == config.batch_size:
        lanes = read_tensors(directory / "lanes.safetensors", shapes["lanes"], dtypes=DTYPES_OF["lanes"])
        state = lanes["hidden"], lanes["cell"]
        training.lane_states = own_lanes(accelerator, state, config.gradient_accumulation_steps)
    else:  # `resume_override`
        training.lane_states = zero_lanes(training)
    if accelerator.scaler and trainer.get("scaler"):
        try:
            accelerator.scaler.load_state_dict(trainer["scaler"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"`{directory / TRAINER_NAME}`: `scaler` is not one: {error}") from error


def choose(training: Training) -> Path | None:
    """Return the checkpoint that `resume` names; None to start anew. The main process puts invalid ones out of the way.

    Collective: the others look once it has done so.
    """
    config, main = training.config, training.accelerator.is_main_process
    run_dir = Path(config.run_dir)
    if config.resume == "never":
        if checkpoints(run_dir):
            raise CheckpointError(
                f"`{config.run_dir}` holds a training and `--resume never` would overwrite it: "
                "remove it or name another `--run_dir`"
            )
        return None
    if config.resume != "auto":
        directory = find_checkpoint(config.resume)
        if directory is None:
            raise CheckpointError(f"`{config.resume}` is no checkpoint, and no run that has one")
        newest, path = next(iter(checkpoints(run_dir)), (0, None))
        if path is None or newest <= verify(directory, []).step:
            return directory
        if read_json(path / TRAINER_NAME).get("origin") != str(directory.resolve()):
            raise CheckpointError(
                f"`{config.run_dir}` holds checkpoints up to step {newest}, newer than `{directory}`: "
                "remove them or name another `--run_dir`"
            )
        log.info("`%s` began with `%s`, and goes on from its own checkpoints", run_dir, directory)
    chosen = None
    if main:
        remove_leftovers(run_dir)
        chosen, problems = newest_valid(run_dir)
        if problems and chosen is None:
            raise CheckpointError(
                f"no checkpoint of `{run_dir}` is valid: {'; '.join(map(str, problems))}; "
                "remove them to start anew, or name another `--run_dir`"
            )
        if problems:
            log.warning(
                "INVALID CHECKPOINTS: %s; set aside as `*.invalid`, going on from `%s`",
                "; ".join(map(str, problems)), chosen,
            )  # fmt: skip
            for _, path in checkpoints(run_dir)[: len(problems)]:
                invalid = path.with_name(f"{path.name}.invalid")
                shutil.rmtree(invalid, ignore_errors=True)  # of an earlier damage to this step
                path.rename(invalid)
    training.accelerator.wait_for_everyone()
    return chosen if main else next((path for _, path in checkpoints(run_dir)), None)


def read_trainer(directory: Path, manifest: Manifest) -> tuple[dict[str, Any], Progression]:
    """Return what trainer.json says, and the training's progression in it, having held them against the manifest.

    Raises:
        CheckpointError: it is of another version or step, or the manifest lacks a file that it tells of: `verify` would
            not have looked at that one.
    """
    path = directory / TRAINER_NAME
    trainer = read_json(path)
    kinds = {
        "config": dict, "mixed_precision": str, "data": str, "scaler": dict | None, "wandb_id": str | None,
        "origin": str | None,
    }  # fmt: skip
    if not all(name in trainer and isinstance(trainer[name], kind) for name, kind in kinds.items()):
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
        raise CheckpointError(f"`{path}` is of another version of textgen: it tells other numbers")
    for name, value in values.items():
        allowed = typing.get_args(kinds[name]) or (kinds[name],)
        if type(value) not in allowed or (value is not None and not -1 < value < 1 << 63):
            raise CheckpointError(f"`{path}`: `{name}` is {value!r:.40}")
    return Progression(**values)


def compare_settings(training: Training, trainer: dict[str, Any], directory: Path) -> None:
    """Raise CheckpointError where a setting that changes the result is not the checkpoint's; note the other ones."""
    config = training.config
    defaults = flatten(json.loads(json.dumps(asdict(TrainConfig()))))  # of settings younger than the checkpoint
    saved, current = defaults | flatten(trainer["config"]), flatten(json.loads(json.dumps(asdict(config))))
    saved["mixed_precision"], current["mixed_precision"] = (
        trainer["mixed_precision"],
        training.accelerator.mixed_precision,
    )
    harmless = HARMLESS
    if config.early_stopping_patience is not None:
        harmless = harmless - {"evaluate_every", "evaluate_documents"}  # they decide when to stop
    if config.lr_schedule == "constant":
        harmless = harmless | {"max_steps", "max_epochs", "max_minutes"}  # no step depends on how many there will be
    if trainer["data"] == training.store.training_key:
        harmless = harmless | {"data", "tokenizer"}  # however they were asked for, the tokens are the same
    elif all(current[name] == saved[name] for name in current if name.startswith(("data.", "tokenizer."))):
        saved["training text"], current["training text"] = trainer["data"], training.store.training_key
    for name in current:
        if current[name] == saved[name] or name in COMMAND_SETTINGS:
            continue
        message = f"`{name}` is {current[name]}, `{directory}` was made with {saved[name]}"
        if name.split(".")[0] not in harmless and not config.resume_override:
            raise CheckpointError(
                f"{message}: `--resume_override` goes on all the same, another `--run_dir` starts anew"
            )
        log.info("%s", message)


def describe_checkpoint(directory: Path) -> dict[str, Any]:
    """Check every byte and every tensor's shape of a checkpoint and return what it holds, in plain values.

    Raises:
        CheckpointError: what is wrong.
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


# --- tensors of the state, whole and in parts -------------------------------------------------------------------------


def gather_lanes(accelerator: Accelerator, lane_states: Sequence[State]) -> dict[str, Tensor]:
    """Gather the LSTM states of all lanes, from each process's part of each micro-batch. Collective.

    Returns:
        `hidden` and `cell`, (num_layers, batch_size, hidden_size) in the order of global lanes.
    """
    gathered: dict[str, list[Tensor]] = {"hidden": [], "cell": []}
    for hidden, cell in lane_states:
        for name, value in (("hidden", hidden), ("cell", cell)):
            # Accelerate gathers along the first dimension, in the order of processes: that of the lanes
            everyone = accelerator.gather(value.transpose(0, 1).contiguous())
            gathered[name].append(everyone.transpose(0, 1))
    return {name: torch.cat(parts, 1) for name, parts in gathered.items()}


def own_lanes(accelerator: Accelerator, state: State, micro_batches: int) -> list[State]:
    """Return this process's part of the states of all lanes, per micro-batch: what `gather_lanes` was given."""
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
    """Set the optimizer's state from what `optimizer_tensors` returned for a model of these parameters."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        slot, _, name = key.partition(".")
        slots.setdefault(name, {})[slot] = tensor
    state = {i: slots[name] for i, (name, _) in enumerate(model.named_parameters())}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
