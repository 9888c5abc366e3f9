"""Checkpoints: a directory written aside and renamed, safetensors and JSON only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from textgen.model import LSTMLanguageModel, State, resolve_model_directory
from tokenizer import MODEL_NAME, Tokenizer

TRAINER_NAME = "trainer.json"
_PREFIX = "step-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line."""


def save_checkpoint(
    directory: Path,
    *,
    model: LSTMLanguageModel,
    tokenizer: Tokenizer,
    trainer: dict[str, Any],
    tensors: dict[str, dict[str, Tensor]],
) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        directory: its place, `.../checkpoints/step-000500`.
        model: the weights to sample with.
        tokenizer: goes into the directory, so that it is enough to sample and score.
        trainer: JSON values of the training state.
        tensors: file name without ending -> tensors by name.
    """
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside)
        tokenizer.save(aside / MODEL_NAME)
        for name, group in tensors.items():
            group = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in group.items()}
            (aside / f"{name}.safetensors").write_bytes(save(group))
        (aside / TRAINER_NAME).write_text(json.dumps(trainer, indent=2) + "\n")
        for path in aside.iterdir():
            _sync(path)
        _sync(aside)
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
        _sync(directory.parent)
    except OSError as error:  # a full disk does not say where
        raise OSError(error.errno, error.strerror, str(directory)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"{_PREFIX}{step:06d}"


def checkpoints(run_dir: Path) -> Iterator[tuple[int, Path]]:
    """Yield (step, directory) of a run's whole checkpoints, newest first."""
    found = [
        (int(path.name.removeprefix(_PREFIX)), path)
        for path in (run_dir / "checkpoints").glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdigit() and (path / TRAINER_NAME).is_file()
    ]
    yield from sorted(found, reverse=True)


def prune(run_dir: Path, *, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and that of `best_step`."""
    for place, (step, path) in enumerate(checkpoints(run_dir)):
        if place >= keep_last and step != best_step:
            shutil.rmtree(path)


def read_trainer(directory: Path) -> dict[str, Any]:
    """Read the JSON part of a checkpoint.

    Raises:
        CheckpointError: it is missing or is no JSON object.
    """
    try:
        trainer = json.loads((directory / TRAINER_NAME).read_text())
        if not isinstance(trainer, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{directory}` is not a training checkpoint: no readable `{TRAINER_NAME}`") from error
    return trainer


def read_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """Read one of a checkpoint's tensor files onto the CPU.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = directory / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"`{path}` cannot be read: {error}") from error


def load_model(name: str | Path, device: torch.device | str = "cpu") -> tuple[LSTMLanguageModel, Tokenizer]:
    """Read model and tokenizer of a checkpoint directory, a run's newest checkpoint, or a hub repository.

    Raises:
        CheckpointError, ModelFileError, TokenizerError: it cannot be read, or the tokenizer is not the model's.
    """
    newest = next((path for _, path in checkpoints(Path(name))), None)
    directory = newest or resolve_model_directory(name)
    model = LSTMLanguageModel.from_pretrained(directory)
    if not (directory / MODEL_NAME).is_file():
        raise CheckpointError(f"`{directory}` has no `{MODEL_NAME}`")
    tokenizer = Tokenizer.from_file(directory / MODEL_NAME)
    if model.text.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise CheckpointError(
            f"`{directory / MODEL_NAME}` is not the tokenizer of the model beside it: sha256 {tokenizer.sha256}, "
            f"wanted {model.text['tokenizer_sha256']}"
        )
    return model.to(device).eval(), tokenizer


# --- training state to tensors and back ------------------------------------------------------------------------------


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
    """Set the optimizer's state from what `optimizer_tensors` returned.

    Raises:
        CheckpointError: it is the state of other parameters.
    """
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        slot, _, name = key.partition(".")
        slots.setdefault(name, {})[slot] = tensor
    names = [name for name, _ in model.named_parameters()]
    if slots.keys() != set(names):
        raise CheckpointError(f"optimizer state is of other parameters: {sorted(slots.keys() ^ set(names))}")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: slots[n] for i, n in enumerate(names)}, "param_groups": groups})
