"""Copies of checkpoints in a training (`checkpoint_copy`): fetched before the first step, finished after the last.

Only the main process sends. Machines may share a disk or not: a machine that lacks the checkpoint to continue from
fetches it by its first process.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from textgen.config import TrainConfig
from textgen.distributed import launch
from textgen.errors import CheckpointError, UnreadableError
from textgen.files import parse_json
from textgen.runs.checkpoint import (
    MANIFEST_NAME,
    TRAINER_NAME,
    checkpoint_path,
    find_checkpoint,
    newest_valid,
    prune,
    read_json,
    remove_leftovers,
    verify,
)
from textgen.runs.copies import (
    Copier,
    Copy,
    digest_of,
    fetch_copy,
    fetch_newest,
    fetch_run_files,
    find_copies,
    folder_of,
    read_manifest,
    read_small,
)
from textgen.runs.directory import RunDirectory
from textgen.storage.remote_folder import RemoteFolder, StorageError
from textgen.training.resume import find_difference
from textgen.training.setup import Training

log = logging.getLogger("textgen")

# A storage that does not answer does not keep a training waiting that has a checkpoint on its disk.
LOOK_SECONDS = 30.0

# Checkpoints of an older version have no id of their run. Then trainings that differ in these are not one training.
IDENTITY = ("data", "tokenizer", "origin")
IDENTITY_SETTINGS = ("model", "seed", "batch_size", "seq_len", "learning_rate", "init_from")


def bring_checkpoint(config: TrainConfig, accelerator: Accelerator, run: RunDirectory) -> Copier | None:
    """Fetch the newest checkpoint from `checkpoint_copy` if it is newer than those of the run's directory. Collective.

    Returns:
        What copies checkpoints, on the main process; None on others, and without `checkpoint_copy`.

    Raises:
        TextgenError: there is no checkpoint here and the copies cannot be listed or read, or they are of another
            training.
    """
    if config.checkpoint_copy is None:
        return None
    remote, run_dir, newest, copier = RemoteFolder(config.checkpoint_copy), run.path, -1, None
    if accelerator.is_main_process:
        copier = Copier(run_dir, remote, keep_last=config.keep_last, tell=run.write_copy, require=run.require_lock)

    def look() -> None:
        nonlocal newest
        assert copier is not None
        newest = _fetch_newer(config, accelerator, copier, run_dir)

    launch.wait_together(accelerator, None if copier is None else look)
    newest = launch.from_main(accelerator, newest)
    if run.is_shared or newest < 0:
        return copier
    # Machines with a disk each: those that lack the checkpoint fetch it. That of the main process may have no copy yet.
    digest = launch.from_main(accelerator, _digest(run_dir, newest))
    lacking = accelerator.is_local_main_process and _digest(run_dir, newest) != digest
    if launch.count_different(accelerator, lacking) == 1:
        return copier
    launch.wait_together(accelerator, None if copier is None else lambda: _copy_now(copier, run_dir, newest))
    wanted = Copy(newest, folder_of(newest, digest))
    launch.wait_together(accelerator, (lambda: fetch_copy(remote, wanted, run_dir)) if lacking else None)
    return copier


def _digest(run_dir: Path, step: int) -> int:
    """Return what the name of a checkpoint's copy has of its manifest; -1 if the checkpoint is not on this disk."""
    path = checkpoint_path(run_dir, step) / MANIFEST_NAME
    return digest_of(path.read_bytes()) if path.exists() else -1


def _fetch_newer(config: TrainConfig, accelerator: Accelerator, copier: Copier, run_dir: Path) -> int:
    """Fetch the newest copy if it is newer than what is here; return the newest valid step here, -1 for none."""
    remove_leftovers(run_dir)
    local, _ = newest_valid(run_dir)
    step, remote = -1 if local is None else verify(local, []).step, copier.remote
    patience = remote.patience
    if local is not None:
        remote.patience = min(patience, LOOK_SECONDS)
    try:
        copies = find_copies(remote)
        if copies and config.resume == "never":
            raise CheckpointError(
                f"`{remote}` holds copies of a training and `--resume never` would overwrite them: "
                "remove them or name another `--checkpoint_copy`"
            )
        _refuse_other(config, accelerator, copier, copies, local)
        fetched, copier.damaged = fetch_newest(remote, copies, run_dir, after=step)
        if fetched is not None:
            fetch_run_files(remote, run_dir)
            _fetch_best(copier, copies, run_dir, fetched)
            return fetched
    except (UnreadableError, StorageError) as error:
        if local is None:
            raise
        log.warning("%s; continuing from `%s`", error, local)
    finally:
        remote.patience = patience
    if local is None and copies:
        raise CheckpointError(
            f"no copy at `{remote}` is valid: remove them to start from step 0, or name another `--checkpoint_copy`"
        )
    return step


def _refuse_other(
    config: TrainConfig, accelerator: Accelerator, copier: Copier, copies: list[Copy], local: Path | None
) -> None:
    """Raise CheckpointError if the copies are of another training, which this one would delete."""
    for copy in copies:
        if (theirs := _read_trainer(copier, copy)) is not None:
            break
    else:
        return
    if local is not None:
        other = _is_other(read_json(local / TRAINER_NAME), theirs)
    else:
        start = None if config.resume in ("auto", "never") else find_checkpoint(config.resume)
        other = start is not None and theirs.get("origin") != str(start.resolve())
    if other:
        raise CheckpointError(
            f"`{copier.remote}` holds copies of another training up to step {copies[0].step}: "
            "name another `--checkpoint_copy`"
        )
    if local is None and not config.resume_override and (difference := find_difference(config, accelerator, theirs)):
        raise CheckpointError(
            f"{difference} as in `{copier.remote}/{copy.folder}`: another `--checkpoint_copy` starts a new run, "
            "`--resume_override` resumes regardless"
        )


def _read_trainer(copier: Copier, copy: Copy) -> dict[str, Any] | None:
    """Return trainer.json of a copy; None if it is damaged, which is found out and said when the copy is fetched."""
    try:
        content = read_small(copier.remote, copy, TRAINER_NAME)
        _, digest = read_manifest(copier.remote, copy)[0].files[TRAINER_NAME]
        return parse_json(content) if hashlib.sha256(content).hexdigest() == digest else None
    except UnreadableError:
        raise
    except (ValueError, KeyError):
        return None


def _is_other(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Return whether two trainer.json are of different runs.

    Without an id of the run: a run may get another W&B run, and other settings by `--resume_override`; hardly both.
    """
    if "run_id" in ours and "run_id" in theirs:
        return bool(ours["run_id"] != theirs["run_id"])

    def identity(trainer: dict[str, Any]) -> list[Any]:
        config = trainer.get("config")
        settings = config if isinstance(config, dict) else {}
        return [*(trainer.get(name) for name in IDENTITY), *(settings.get(name) for name in IDENTITY_SETTINGS)]

    return ours.get("wandb_id") != theirs.get("wandb_id") and identity(ours) != identity(theirs)


def _fetch_best(copier: Copier, copies: list[Copy], run_dir: Path, step: int) -> None:
    """Fetch the best checkpoint of the training too; log it if that fails."""
    best = _best_step(run_dir, step)
    for copy in copies:
        if copy.step == best and best != step and not checkpoint_path(run_dir, best).exists():
            try:
                fetch_copy(copier.remote, copy, run_dir)
            except CheckpointError as error:
                log.warning("the best checkpoint is not fetched: %s", error)


def _best_step(run_dir: Path, step: int) -> int | None:
    """Return the best step, as the checkpoint of a step has it."""
    progression = read_json(checkpoint_path(run_dir, step) / TRAINER_NAME).get("progression")
    best = progression.get("best_step") if isinstance(progression, dict) else None
    return best if isinstance(best, int) else None


def _copy_now(copier: Copier, run_dir: Path, step: int) -> None:
    """Copy a checkpoint of this machine for the others, and wait for it."""
    copier.offer(step, best_step=_best_step(run_dir, step))
    copier.finish(stopped=False)


def start_copying(training: Training) -> None:
    """Check that the address can be written, and copy the checkpoint that the training continues from. Collective.

    Raises:
        StorageError: the address cannot be written, and the training is new.
    """
    copier, progress = training.copier, training.learner.progression
    if training.learner.config.checkpoint_copy is None:
        return

    def check() -> None:
        assert copier is not None
        patience, copier.remote.patience = copier.remote.patience, LOOK_SECONDS
        try:
            copier.send_run_files()
        except StorageError as error:
            if progress.step == 0:
                raise
            log.warning("%s; the training continues", error)
        finally:
            copier.remote.patience = patience

    launch.wait_together(training.learner.accelerator, None if copier is None else check)
    if copier is not None and checkpoint_path(Path(training.learner.config.run_dir), progress.step).exists():
        copier.offer(progress.step, best_step=progress.best_step)


def finish_copying(training: Training, *, stopped: bool) -> None:
    """Wait until the last checkpoint is copied, or the storage has failed. Collective.

    Args:
        training: whose last checkpoint is on disk.
        stopped: whether a signal ended it.
    """
    copier, config = training.copier, training.learner.config
    if config.checkpoint_copy is None:
        return
    launch.wait_together(
        training.learner.accelerator, None if copier is None else lambda: copier.finish(stopped=stopped)
    )
    if copier is not None:  # what was kept while it was copied
        copier.require()
        prune(Path(config.run_dir), keep_last=config.keep_last, best_step=training.learner.progression.best_step)
