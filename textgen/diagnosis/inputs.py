"""Checks of a training's inputs and of its tracking: text, tokenizer, W&B. They use no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textgen.config import TrainConfig
from textgen.diagnosis.process_group import ProcessGroup
from textgen.diagnosis.results import Check
from textgen.errors import TextgenError, first_line
from textgen.tracking.wandb import has_wandb_key
from textgen.tracking.wandb_settings import find_mode

if TYPE_CHECKING:
    from textgen.data.store import TokenStore


def find_data(config: TrainConfig) -> tuple[Check, TokenStore | None]:
    """Find the training's token store, or else its text, without a network unless the store is at an address.

    Returns:
        The check, and the store; None if the store does not exist yet.
    """
    try:
        description, store = find_store(config)
    except Exception as error:  # files, packages and their readers raise many classes
        problem, offline, _ = first_line(error).partition(", and HF_HUB_OFFLINE is set")
        advice = (
            "run `textgen prepare` on a machine with a network" if offline else "a training cannot start without it"
        )
        return Check("data", "warn" if offline else "fail", {}, f"{problem}; {advice}"), None
    if store is None:
        advice = "not encoded yet: run `textgen prepare` with the same flags, which saves the job that time"
        return Check("data", "warn", {"source": description}, advice), None
    train = store.record["splits"]["train"]
    value = {
        "source": description,
        "store": store.location,
        "vocab_size": store.record["vocab_size"],
        "train_tokens": train["tokens"],
        "key": store.training_key[:8],
    }
    return Check("data", "ok", value), store


def find_store(config: TrainConfig) -> tuple[str, TokenStore | None]:
    """Return a description of the text, and its token store; None if `prepare_store` has not made the store.

    Raises:
        TextgenError, TokenizerError: the text, the tokenizer or the named store does not exist, or the store has other
            sources.
    """
    # Imported here, so that a missing package (sentencepiece, pyarrow) fails this check and not the whole command.
    from textgen.data.mixture import open_sources
    from textgen.data.store import find_prepared, open_store
    from textgen.training.resume import keep_reading_rules

    config = keep_reading_rules(config)
    if config.data.store is not None:
        store = open_store(config.data)
        return str(store.record["source"]), store
    corpus = open_sources(config.data)
    return corpus.description, find_prepared(config.data, config.tokenizer, corpus)


def check_data(group: ProcessGroup, found: Check, store: TokenStore | None) -> Check:
    """Compare the training text between all processes. Collective.

    Args:
        group: the processes.
        found: this process's check, from `find_data`.
        store: this process's token store, from `find_data`.
    """
    keys = set(group.gather(store.training_key if store else None)) - {None}
    if len(keys) > 1:
        advice = "the training text is not the same on all processes: give one `--data.store` that all share"
        return Check("data", "fail", found.value, advice)
    return found


def check_wandb(config: TrainConfig) -> Check:
    """Report the mode of W&B and whether there is an API key; the key itself is never printed."""
    try:
        mode, key = find_mode(config.tracking).value, has_wandb_key()
    except TextgenError as error:
        return Check("wandb", "fail", {}, str(error))
    if mode == "auto":
        mode = "online" if key else "offline"
    value = {"mode": mode, "key": "present" if key else "none"}
    if mode == "online" and not key:
        advice = "no API key: run `wandb login`, or set WANDB_API_KEY in the job's environment"
        return Check("wandb", "warn", value, advice)
    return Check("wandb", "ok", value)
