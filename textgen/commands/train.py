"""The command `train`: parse the settings, then train."""

from __future__ import annotations

from collections.abc import Sequence

from textgen.commands.parsing import config_file, parse_train_config, take_base
from textgen.console import start_log


def train_command(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Train with the settings of flags and config files.

    Args:
        argv: the flags; None for those of this process.
        prog: the name of the program in `--help`.
    """
    config = parse_train_config(argv, prog=prog)
    start_log()
    config = take_base(config, argv)
    from textgen.training.loop import train

    train(config, config_file=config_file(argv))
