"""Distributed training of LSTM language models, and sampling from them.

`train` and `load` are where to begin. The names of `__all__` are imported when they are first used, so `import textgen`
takes no time and needs no torch.
"""

import os

TYPE_CHECKING = False  # not that of `typing`, which takes longer to import than all of this
if TYPE_CHECKING:
    from textgen.api import Classification, LanguageModel, ReadState, Run, Sample, TextScore, TokenLogprobs, load, train
    from textgen.config import DataConfig, ModelConfig, SamplingConfig, TokenizerConfig, TrackingConfig, TrainConfig
    from textgen.errors import TextgenError

    __version__: str

__all__ = [
    "Classification",
    "DataConfig",
    "LanguageModel",
    "ModelConfig",
    "ReadState",
    "Run",
    "Sample",
    "SamplingConfig",
    "TextScore",
    "TextgenError",
    "TokenLogprobs",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainConfig",
    "__version__",
    "load",
    "train",
]

# GNU OpenMP reads it when torch is loaded. By default a thread that waits spins for milliseconds; on a machine with
# anything else to do both threads then wait for a core. Measured on two cores with the quick preset, in tokens/s, quiet
# and beside one busy process: by default 30,000 and 1,000; with this count 30,000 and 13,000; with
# OMP_WAIT_POLICY=PASSIVE 17,000 and 18,000 (2026-11-23).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _import(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("textgen")
    if name not in __all__:
        raise AttributeError(f"module `textgen` has no attribute `{name}`")
    from importlib import import_module

    module = "config" if name.endswith("Config") else "errors" if name.endswith("Error") else "api"
    return getattr(import_module(f"textgen.{module}"), name)


if not TYPE_CHECKING:  # a type checker would take every name for one of textgen

    def __getattr__(name: str) -> object:
        value = globals()[name] = _import(name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
