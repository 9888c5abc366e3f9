"""The command `prepare`: encode the text of a training ahead of time."""

from __future__ import annotations

from collections.abc import Sequence

from textgen.commands.parsing import parse_train_config, take_base
from textgen.console import start_log


def prepare_command(argv: Sequence[str]) -> None:
    """Encode the text of a training ahead of time and print the path of the token store."""
    config = parse_train_config(argv, prog="textgen prepare")
    start_log()
    config = take_base(config, argv)
    from textgen.data.store import prepare_store

    print(prepare_store(config.data, config.tokenizer).directory)
