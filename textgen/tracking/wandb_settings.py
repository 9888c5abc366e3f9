"""W&B's own settings, read without importing wandb: a training reads them before it decides to start W&B.

wandb has the same order: environment variables, then `settings` in `wandb/` or `.wandb/` of the working directory
(written by `wandb disabled` and `wandb offline`), then `~/.config/wandb/settings` (written by `wandb login`).
"""

from __future__ import annotations

import configparser
import os
from pathlib import Path
from typing import NamedTuple

from textgen.config import TrackingConfig
from textgen.distributed.world import env_flag
from textgen.errors import TextgenError

# Settings whose variable has another name than WANDB_ and the setting's name.
VARIABLES = {"run_name": "WANDB_NAME", "run_job_type": "WANDB_JOB_TYPE"}
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


class Setting(NamedTuple):
    """A value that the user has given to W&B, and where it is set."""

    value: str
    place: str


def find_setting(name: str) -> Setting | None:
    """Return a setting by wandb's name for it; None if it is not set.

    An empty variable counts as not set, except WANDB_MODE, which wandb would refuse.
    """
    private = f"WANDB__{name[2:].upper()}" if name.startswith("x_") else f"WANDB_{name.upper()}"
    variable = VARIABLES.get(name, private)
    if (value := os.environ.get(variable)) or (name == "mode" and value is not None):
        return Setting(value, variable)
    folder = ".wandb" if Path(".wandb").exists() else "wandb"
    config_dir = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    for path in (Path(folder, "settings"), config_dir / "settings"):
        parser = configparser.ConfigParser()
        try:
            parser.read(path, encoding="utf-8")
            value = parser.get("default", name, fallback=None)
        except (OSError, UnicodeDecodeError, configparser.Error):  # wandb leaves out a file that it cannot read
            continue
        if value is not None:
            return Setting(value, f"`{name}` in `{path}`")
    return None


def setting_value(name: str) -> str | None:
    """Return the value of a setting by wandb's name for it; None if it is not set."""
    setting = find_setting(name)
    return setting.value if setting else None


def find_mode(config: TrackingConfig) -> Setting:
    """Return the mode of W&B, and where it is set: auto, online, offline or disabled.

    `tracking.mode` wins over W&B's settings, unless it is auto.

    Raises:
        TextgenError: W&B's setting is not a mode of a training.
    """
    if config.mode != "auto":
        return Setting(config.mode, "tracking.mode")
    if env_flag(os.environ, "WANDB_DISABLED"):  # the switch of Hugging Face's Trainer
        return Setting("disabled", "WANDB_DISABLED")
    setting = find_setting("mode")
    if setting is None:
        return Setting("auto", "tracking.mode")
    if setting.value not in MODES:
        raise TextgenError(f"{setting.place} is {setting.value!r}, not one of {', '.join(MODES)}")
    return Setting(MODES[setting.value], setting.place)
