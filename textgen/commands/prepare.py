"""The command `prepare`: encode the text of a training ahead of time."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from textgen.commands.parsing import given_run_dir, parse_train_config, take_base
from textgen.console import start_log


def prepare_command(argv: Sequence[str]) -> None:
    """Encode the text of a training ahead of time and print the path of the token store.

    `--shards` is short for `--data.shards`.
    """
    argv = [re.sub(r"^--shards(?=$|=)", "--data.shards", word) for word in argv]
    config = parse_train_config(argv, prog="textgen prepare")
    start_log()
    if given_run_dir(argv) is None:  # the default folder may hold another run
        config = replace(config, run_dir=os.devnull)
    config = take_base(config, argv)
    from textgen.data.store import prepare_store

    print(prepare_store(config.data, config.tokenizer).location)
