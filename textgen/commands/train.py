"""The command `train`: parse the settings, then train."""

from __future__ import annotations

from collections.abc import Sequence

from textgen.commands.parsing import config_file, parse_train_config
from textgen.console import start_log


def train_command(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Train as flags and config file say."""
    config = parse_train_config(argv, prog=prog)
    start_log()
    from textgen.training.loop import train

    train(config, config_file=config_file(argv))
