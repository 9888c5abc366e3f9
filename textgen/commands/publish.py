"""The command `publish`: a model and its card as a folder, or on the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from textgen.commands.model_argument import add_model_arguments
from textgen.commands.parsing import Parser, fail
from textgen.console import setup_logging
from textgen.errors import one_line
from textgen.files import decode_text
from textgen.reporting.card import CARD_NAME, HUB, build_card, read_provenance

log = logging.getLogger("textgen")

# Time limit for the hub's first answer. Later requests have the limits of the hub's client.
REACH_SECONDS = 10.0


def publish_command(argv: Sequence[str]) -> None:
    """Write or upload a model and print its folder or address."""
    parser = Parser(
        prog="textgen publish",
        description="Publish a model with a card of its figures. The hub's token is read from `hf auth login`.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--to", required=True, metavar="DIR|hub:OWNER/NAME", help="new folder, or repository of the hub"
    )
    parser.add_argument(
        "--license", default=None, help="license on the card, in the hub's spelling, such as apache-2.0"
    )
    parser.add_argument(
        "--language",
        nargs="+",
        default=None,
        help="languages on the card, such as `en`; default: `en` for IMDB, else none",
    )
    parser.add_argument("--public", action="store_true", help="make the repository public; default: private")
    args = parser.parse_args(list(argv))
    setup_logging(main=True)
    if args.to.startswith(HUB):
        _to_hub(args, args.to.removeprefix(HUB))
    else:
        decode_text(os.fsencode(args.to), "`--to`")  # the card names the folder
        _to_directory(args, Path(os.path.abspath(args.to)))


def _to_directory(args: Any, path: Path) -> None:
    """Write a folder; after an error there is no folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        fail(f"`{args.to}` is not an empty folder: name a new one")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _aside(path.parent, path.name) as aside:
        write_publication(args, aside, name=path.name, where=path.name)
        aside.rename(path)
    print(path)


def _to_hub(args: Any, name: str) -> None:
    """Upload to the hub in one commit."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        fail(f"`--to {HUB}` wants an owner and a name, as `{HUB}me/reviews`: {args.to}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from textgen.model.files import draw_bars_in_terminals_only

    draw_bars_in_terminals_only()
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        write_publication(args, Path(folder), name=name.partition("/")[2], where=args.to)
        try:
            with suppress(RepositoryNotFoundError):  # a new repository is created below
                if (private := api.model_info(name, timeout=REACH_SECONDS).private) == args.public:
                    fail(f"`{name}` is {'private' if private else 'public'} on the hub, `--public` is {args.public}")
            url = api.create_repo(name, private=not args.public, exist_ok=True)
            # The same commit deletes the decoder and the tokenizer of an earlier model.
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message="Publish a model",
                delete_patterns=["decoder.*", "tokenizer*.json"],
            )
        except Exception as error:  # of the client, of its transport, or of the system
            fail(f"`{name}` cannot be published on {api.endpoint}: {one_line(error)}")
    print(url)


@contextmanager
def _aside(parent: Path, name: str) -> Iterator[Path]:
    """Make a temporary folder beside the wanted one, and remove it at the end unless it has been renamed."""
    aside = parent / f".{name}.{os.getpid()}.tmp"
    try:
        aside.mkdir()
        yield aside
    except OSError as error:  # an error of a copy names the source first; a full disk may name no file
        where = error.filename2 or error.filename or parent / name
        raise OSError(error.errno, error.strerror, str(where)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_publication(args: Any, out: Path, *, name: str, where: str) -> None:
    """Write all files of a publication into an empty folder.

    Args:
        args: the flags.
        out: the folder.
        name: the model's name on the card.
        where: the name by which `textgen sample` opens the published model.

    Raises:
        CheckpointError, TextgenError, TokenizerError: the checkpoint is not whole, or not valid.
        OSError: a file cannot be written.
    """
    from textgen.decoding.export import copy_decoder
    from textgen.model.files import MODEL_FILES, read_model_and_tokenizer, resolve_model_directory
    from textgen.runs.checkpoint import find_checkpoint
    from textgen.tokenizer.hugging_face import TOKENIZER_FILES, hugging_face_files

    checkpoint = find_checkpoint(args.checkpoint, best=args.best, files=None)
    directory = checkpoint or resolve_model_directory(args.checkpoint)
    for file in MODEL_FILES:
        shutil.copyfile(directory / file, out / file)
    model, tokenizer = read_model_and_tokenizer(out)  # the copy, so that an unreadable model is not published
    if tokenizer.is_lossless:
        for file, content in hugging_face_files(tokenizer).items():
            (out / file).write_text(content, encoding="utf-8")
    else:
        log.info("no `%s`: Hugging Face's library has no equal of a word tokenizer", TOKENIZER_FILES[0])
    cost = copy_decoder(directory, out)
    card = build_card(
        model,
        read_provenance(directory),
        name=name,
        where=where,
        int8_cost=cost,
        license=args.license,
        languages=args.language,
    )
    (out / CARD_NAME).write_text(card, encoding="utf-8")
