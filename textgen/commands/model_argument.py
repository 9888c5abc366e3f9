"""The flags that choose a checkpoint, and the model that they open.

torch is imported when a model is opened, not before: `--help` and wrong flags are answered without it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from textgen.commands.parsing import Parser
from textgen.config import DecoderName
from textgen.hardware import wants_mps

if TYPE_CHECKING:
    from accelerate import Accelerator

    from textgen.decoding.decoders import Decoder
    from textgen.model.lstm import LSTMLanguageModel
    from textgen.tokenizer import Tokenizer

log = logging.getLogger("textgen")


@dataclass(frozen=True)
class OpenModel:
    """A model in memory, and the files that it was read from."""

    model: LSTMLanguageModel
    tokenizer: Tokenizer
    directory: Path
    """the directory of the model's files"""
    checkpoint: Path | None
    """the same directory if it is a checkpoint of a training; None if it is a published model"""

    @property
    def normalization(self) -> str:
        """Return the normalization of the text that the model was trained on, as `DataConfig` names it."""
        return self.model.text.get("normalization", "none")


def add_model_arguments(
    parser: Parser,
    name: str = "checkpoint",
    *,
    help: str = "checkpoint, run folder or hub repository",
    decoder: bool = False,
) -> None:
    """Add the flags that choose a checkpoint, and `--decoder` if wanted."""
    parser.add_argument(name, help=help)
    parser.add_argument("--best", action="store_true", help="of a run, the best checkpoint instead of the newest")
    if decoder:
        parser.add_argument(
            "--decoder",
            type=DecoderName,
            default="auto",
            help="how the model's steps are computed; auto: the fastest way; on a CPU int8 if the end of the training, "
            "or `textgen export`, measured that it costs at most 0.002 bits per byte",
        )


def open_model(name: str | Path, *, best: bool, accelerator: Accelerator | None = None) -> OpenModel:
    """Find a checkpoint, verify its files, and read model and tokenizer. Collective if `accelerator` is given.

    Args:
        name: a checkpoint, a run folder or a hub repository.
        best: of a run, the best checkpoint instead of the newest.
        accelerator: the processes that open the model together; it goes to their device. None: this process opens it
            alone, on the GPU if there is one.

    Raises:
        CheckpointError, TextgenError, TokenizerError: the model cannot be read, or processes found different ones.
    """
    import torch

    from textgen.model.files import MODEL_FILES, read_model_and_tokenizer, resolve_model_directory
    from textgen.runs.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(name, best=best, files=MODEL_FILES)
    if accelerator is None:
        device = torch.device("mps" if wants_mps() else "cuda" if torch.cuda.is_available() else "cpu")
    else:
        from textgen.distributed.launch import assert_same  # imports accelerate, which not every command needs

        # A training that goes on may write a checkpoint while processes look for the newest one.
        assert_same(accelerator, checkpoint, "the checkpoint")
        device = accelerator.device
    directory = checkpoint or resolve_model_directory(name)
    model, tokenizer = read_model_and_tokenizer(directory, device)
    return OpenModel(model, tokenizer, directory, checkpoint)


def open_decoder(name: str | Path, decoder: str, *, best: bool) -> tuple[OpenModel, Decoder]:
    """Open a model as `open_model` does and choose its decoder; log the choice.

    Args:
        name: a checkpoint, a run folder or a hub repository.
        decoder: one of `DecoderName`.
        best: of a run, the best checkpoint instead of the newest.

    Raises:
        CheckpointError, TextgenError, TokenizerError: the model cannot be read, or the decoder does not run here.
    """
    from textgen.decoding.choose import choose_decoder

    opened = open_model(name, best=best)
    chosen = choose_decoder(opened.model, decoder, directory=opened.directory)
    log.info("%s", chosen.description)
    return opened, chosen
