"""The command `classify`: the label of each text, and how often it is right; trains a head too."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from textgen.commands.model_argument import OpenModel, add_model_arguments, open_model
from textgen.commands.parsing import Parser, add_reading_flags, fail, reading_settings
from textgen.config import DataConfig
from textgen.console import escape_controls, setup_logging
from textgen.errors import TextgenError
from textgen.files import decode_text, write_atomic

if TYPE_CHECKING:
    from textgen.classification.classifier import Classifier
    from textgen.classification.decision import Classification
    from textgen.classification.figures import Figures
    from textgen.classification.head import Head

log = logging.getLogger("textgen")

DATA = "a file, folder or glob, or a split of the training's data: train, validation, test"


def classify_command(argv: Sequence[str]) -> None:
    """Find the labels of texts; print them, or figures if the true ones are known."""
    args = _parse(argv)
    setup_logging(main=True)
    opened = open_model(args.run, best=args.best)
    if args.train is not None:
        _train_head(opened, args)
    if args.text is None and args.data is None:
        return
    classifier = _classifier(opened, args)
    texts = args.text or _read(opened, args.data, args, limit=args.limit)
    found, _ = classifier.classify(texts, batch_size=args.batch_size, progress=True)
    figures = _figures(classifier, texts, found) if args.data is not None else None
    true = [_label_of(text) for text in texts] if figures is not None else None
    if args.out is not None:
        _write(Path(args.out), found, true)
    if args.json:
        print(_as_json(classifier, found, true, figures, with_texts=args.out is None))
    elif figures is not None:
        print("\n".join(figures.as_lines()))
    elif args.out is None:
        print("\n".join(map(_as_line, found)))


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="textgen classify",
        description="Find the label of texts: the one under which a text takes the fewest bits, or that of a head.",
    )
    add_model_arguments(parser, "run")
    parser.add_argument("--text", action="append", help="text to classify; can be given several times")
    parser.add_argument("--data", default=None, help=f"texts to classify: {DATA}")
    add_reading_flags(parser, labels=True)
    parser.add_argument(
        "--limit",
        type=int | None,
        default=None,
        help="classify the first N documents of `data` only; of a split, N of each source",
    )
    parser.add_argument("--head", default=None, help="folder of a head, which judges in place of the bits")
    parser.add_argument("--train", default=None, help=f"train the head of `head` on texts with labels: {DATA}")
    parser.add_argument("--seed", type=int, default=0, help="with `train`: seed of weights, dropout and order")
    parser.add_argument(
        "--priors",
        type=Literal["uniform", "training"],
        default="uniform",
        help="probabilities of labels before a text is read: equal ones, or the shares of the training's documents",
    )
    parser.add_argument(
        "--temperature",
        type=float | None,
        default=None,
        help="divides the scores, which are too sure; default 1, or that of the head. See `calibrate`",
    )
    parser.add_argument(
        "--calibrate",
        default=None,
        help=f"fit the temperature on these texts with labels, which are not those of `data`: {DATA}",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="texts that are read side by side")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: figures, and the texts without `out`"
    )
    parser.add_argument("--out", default=None, help="write a row for each text to a file that ends in .csv or .jsonl")
    args = parser.parse_args(list(argv))
    _check(parser, args)
    return args


def _check(parser: Parser, args: Any) -> None:
    """Fail at flags that do not go together."""
    if args.text is None and args.data is None and args.train is None:
        parser.error("give texts by `text` or `data`, or a head's by `train`")
    if args.text is not None and args.data is not None:
        parser.error("`text` and `data` are both given: choose one")
    if args.train is not None and args.head is None:
        parser.error("`train` needs `head`, the folder that the head is written to")
    if args.temperature is not None and args.calibrate is not None:
        parser.error("`temperature` and `calibrate` are both given: choose one")
    if args.calibrate is not None and args.calibrate == args.data:
        parser.error(f"`calibrate` and `data` are the same texts: the probabilities would flatter: {args.data}")
    if args.out is not None and os.path.splitext(args.out)[1] not in (".csv", ".jsonl"):
        parser.error(f"`out` must end in .csv or .jsonl: {args.out}")
    for name, least in (("limit", 1), ("batch_size", 1), ("seed", 0)):
        if args[name] is not None and args[name] < least:
            parser.error(f"`{name}` must be at least {least}: {args[name]}")
    for name, beside in _unused(args).items():
        if args[name] != parser.get_default(name):
            parser.error(f"`{name}` has no effect {beside}")
    args.text = args.text and [decode_text(os.fsencode(text), "`--text`") for text in args.text]
    if args.text is not None and not all(text.strip() for text in args.text):
        parser.error("`text` must hold more than spaces")
    named = [data for data in (args.data, args.train, args.calibrate) if data is not None]
    args.reading = reading_settings(args, *named)
    if not named and (
        changed := [name for name, value in vars(DataConfig()).items() if args.get(name, value) != value]
    ):
        parser.error(f"`{changed[0]}` {args[changed[0]]} is for files, and no file is given")


def _unused(args: Any) -> dict[str, str]:
    """Return the names of the flags that have no effect, with the flag that is there or missing."""
    if args.text is None and args.data is None:
        flags = ("limit", "priors", "temperature", "calibrate", "json", "out")
        return dict.fromkeys(flags, "with `train` alone")
    unused = {"limit": "without `data`"} if args.data is None else {}
    return unused | ({"seed": "without `train`"} if args.train is None else {})


def _read(
    opened: OpenModel, data: str, args: Any, *, limit: int | None = None, normalization: str = "none"
) -> list[str]:
    """Return texts with their labels; a classifier normalizes them itself."""
    from textgen.data.texts import texts_to_score

    return texts_to_score(opened.checkpoint, data, args.reading, limit=limit, normalization=normalization)


def _classifier(opened: OpenModel, args: Any) -> Classifier:
    from textgen.classification.classifier import new_classifier, training_shares
    from textgen.data.texts import store_of

    priors = None
    if args.priors == "training":
        if opened.checkpoint is None:
            raise TextgenError("`--priors training`: the model has no record of its training text")
        priors = training_shares(store_of(opened.checkpoint))
    classifier = new_classifier(
        opened.model,
        opened.tokenizer,
        name=args.run,
        head=_read_head(opened, args.head),
        priors=priors,
        temperature=args.temperature,
    )
    if args.calibrate is not None:
        classifier = classifier.calibrated(
            _read(opened, args.calibrate, args), batch_size=args.batch_size, progress=True
        )
        log.info("`--temperature %.4g` fits `%s`", classifier.temperature, args.calibrate)
    return classifier


def _read_head(opened: OpenModel, directory: str | None) -> Head | None:
    from textgen.classification.head import read_head
    from textgen.model.files import weights_sha256

    if directory is None:
        return None
    return read_head(Path(directory), opened.model, weights_sha256=weights_sha256(opened.directory))


def _train_head(opened: OpenModel, args: Any) -> None:
    """Train a head on texts with labels, and write it to its folder, which must be free."""
    from textgen.classification.classifier import true_labels
    from textgen.classification.head import HEAD_NAME, save_head, train_head
    from textgen.data.labels import natural_key
    from textgen.data.store import encode_documents
    from textgen.model.files import weights_sha256

    directory = Path(args.head)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise TextgenError(f"`{directory}` is not empty: name another folder for the head, or leave out `--train`")
    texts = _read(opened, args.train, args, normalization=opened.normalization)
    found = {label for text in texts if (label := _label_of(text)) is not None}
    labels = opened.model.labels or sorted(found, key=natural_key)
    places, true = true_labels(texts, labels)
    if others := len(texts) - len(places):
        log.info("%d of %d texts have no label of the model and are not used", others, len(texts))
    if len(set(true.tolist())) < 2:
        raise TextgenError(f"the texts of `{args.train}` have one label, `{labels[true[0]]}`: a head needs two")
    documents = encode_documents(opened.tokenizer, [texts[place] for place in places])
    origin = {"weights_sha256": weights_sha256(opened.directory), "texts": len(documents), "data": args.train}
    head = train_head(
        opened.model,
        documents,
        true,
        labels,
        opened.tokenizer.bos_id,
        origin=origin | {"seed": args.seed},
        seed=args.seed,
        batch_size=args.batch_size,
        progress=True,
    )
    try:
        save_head(head, directory)
    except OSError as error:
        fail(f"`{directory}` cannot be written: {error.strerror}")
    log.info("wrote `%s`", directory / HEAD_NAME)


def _figures(classifier: Classifier, texts: Sequence[str], found: Sequence[Classification]) -> Figures | None:
    """Return the figures of the texts with labels; None if no text has one."""
    import numpy as np

    from textgen.classification.classifier import true_labels
    from textgen.classification.figures import compute_figures

    if not any(_label_of(text) for text in texts):
        return None
    places, true = true_labels(texts, classifier.labels)
    if others := len(texts) - len(places):
        log.info("%d of %d texts have no label of the model, and no figure counts them", others, len(texts))
    rows = [[found[place].probabilities[label] for label in classifier.labels] for place in places]
    return compute_figures(classifier.labels, np.array(rows), true)


def _label_of(text: str) -> str | None:
    from textgen.data.labels import label_of

    return label_of(text)


# --- output ----------------------------------------------------------------------------------------------------------


def _as_line(found: Classification) -> str:
    text = escape_controls(" ".join(found.text[:300].split()))
    shown = text if len(text) <= 60 else text[:59] + "…"
    return f"{found.label}\t{found.probability:.4f}\t{found.margin:.1f} bits\t{shown}"


def _records(found: Sequence[Classification], true: Sequence[str | None] | None) -> list[dict[str, Any]]:
    """Return a JSON object for each text; `true` is in it if labels are known."""
    return [
        {"text": str(one.text)} | ({} if true is None else {"true": true[i]}) | one.as_json()
        for i, one in enumerate(found)
    ]


def _as_json(
    classifier: Classifier,
    found: Sequence[Classification],
    true: Sequence[str | None] | None,
    figures: Figures | None,
    *,
    with_texts: bool,
) -> str:
    answer: dict[str, Any] = {
        "by": "bits" if classifier.head is None else "head",
        "temperature": classifier.temperature,
        "priors": dict(zip(classifier.labels, classifier.priors, strict=True)),
        "figures": None if figures is None else figures.as_json(),
    }
    if with_texts:
        answer["texts"] = _records(found, true)
    return json.dumps(answer, ensure_ascii=False)


def _write(path: Path, found: Sequence[Classification], true: Sequence[str | None] | None) -> None:
    """Write a row for each text: JSON lines, or csv with a column for each label's probability."""
    records = _records(found, true)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        flat = [
            {name: value for name, value in record.items() if name not in ("probabilities", "bits")}
            | {f"p({label})": value for label, value in record["probabilities"].items()}
            for record in records
        ]
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
        text = file.getvalue()
    try:
        write_atomic(path, text)
    except OSError as error:
        fail(f"`{path}` cannot be written: {error.strerror}")
