"""The verb `measure`: texts of a run at several temperatures, measured beside human ones.

What is heavy is imported once the flags are known to be right.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgen.commands.model_argument import OpenModel, add_model_arguments, open_decoder
from textgen.commands.parsing import Parser, fail
from textgen.config import SamplingConfig
from textgen.console import Progress, setup_logging
from textgen.files import write_atomic
from textgen.reporting.report import MEASURES_FORMAT, MEASURES_NAME, leave_report

if TYPE_CHECKING:
    from textgen.decoding.decoders import Decoder
    from textgen.reporting.measures import Text
    from textgen.tokenizer import Tokenizer


log = logging.getLogger("textgen")

# Texts drawn at a temperature, at most, for each one that is wanted: some end too soon to be measured.
PATIENCE = 8


def measure_command(argv: Sequence[str]) -> None:
    """Draw texts, measure them and human ones, and leave the figures beside the run."""
    args = _parse(argv)
    setup_logging(main=True)
    opened, decoder = _open(args)
    run_dir, directory, tokenizer = Path(args.run), opened.directory, opened.tokenizer
    started = time.monotonic()
    from textgen.data.texts import SPLITS, read_split, store_of, texts_to_score
    from textgen.reporting.measures import copied_shares, diversity, words

    store = store_of(directory)
    if args.data in SPLITS:
        texts = list(read_split(store, args.data))
    else:
        texts = texts_to_score(directory, args.data, args.text_column, limit=None, normalization=opened.normalization)
    human = [words(_cut(text, tokenizer, args.max_new_tokens)) for text in texts]
    sets = [_Set("human", [len(text) for text in human], _evenly(_long(human, args.words), args.texts))]
    if len(sets[0].texts) < args.texts:
        fail(
            f"`{args.data}` has {len(sets[0].texts)} texts of {args.words} words, `texts` wants {args.texts}: "
            "lower `--texts` or `--words`"
        )
    for temperature in sorted(set(args.temperatures)):
        drawn = list(_draw(args, decoder, tokenizer, temperature))
        sets.append(_Set(temperature, [len(text) for text in drawn], _long(drawn, args.words)[: args.texts]))
        if len(sets[-1].texts) < args.texts:
            log.warning(
                "temperature %g: %d of %d texts have %d words: only the length is measured",
                temperature, len(sets[-1].texts), len(drawn), args.words,
            )  # fmt: skip
    log.info("comparing with the training text")
    copied = copied_shares([one.texts for one in sets], map(words, read_split(store, "train")))
    figures = []
    for one, shares in zip(sets, copied, strict=True):
        whole = diversity(one.texts) | shares if len(one.texts) == args.texts else {}
        mean = sum(one.lengths) / len(one.lengths)
        told = {"length": mean, **whole}
        figures.append({name: round(value, 6) for name, value in told.items() if math.isfinite(value)})
    record: dict[str, Any] = {
        "format": MEASURES_FORMAT, "checkpoint": directory.name, "decoder": decoder.description, "data": args.data,
        "texts": args.texts, "words": args.words, "max_new_tokens": args.max_new_tokens, "seed": args.seed,
        "human": figures[0],
        "generated": [
            {"temperature": one.name, "drawn": len(one.lengths), **figure}
            for one, figure in zip(sets[1:], figures[1:], strict=True)
        ],
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    write_atomic(run_dir / MEASURES_NAME, json.dumps(record, indent=2) + "\n")
    leave_report(run_dir)
    print(json.dumps(record) if args.json else _table(record))


@dataclasses.dataclass(frozen=True)
class _Set:
    """Texts to measure, each of as many words, and the lengths in words of all that they were chosen from."""

    name: object
    lengths: Sequence[int]
    texts: Sequence[Text]


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="textgen measure",
        description="Measure generated texts beside human ones: variety, repetition, what is copied, length.",
    )
    add_model_arguments(
        parser, "run", help=f"run folder, where `{MEASURES_NAME}` and the report are left", decoder=True
    )
    parser.add_argument("--texts", type=int, default=1000, help="texts at each temperature, and human ones")
    parser.add_argument("--words", type=int, default=128, help="words of each that are measured: its first ones")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.5, 0.75, 1.0, 1.25, 1.5], help="of the texts"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=1024, help="where texts are cut, human ones too, before words are counted"
    )
    parser.add_argument("--data", default="validation", help="human texts: a file, folder or glob, or a split")
    parser.add_argument("--text_column", default="text", help="column of the text in csv, jsonl and parquet files")
    parser.add_argument("--batch_size", type=int, default=64, help="texts that are drawn at a time")
    parser.add_argument("--seed", type=int, default=42, help="decides the draws")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(list(argv))
    for name, least in (("texts", 2), ("words", 4), ("batch_size", 1)):
        if args[name] < least:
            parser.error(f"`{name}` must be at least {least}: {args[name]}")
    for temperature in args.temperatures:
        _sampling(args, temperature, parser)
    return args


def _sampling(args: Any, temperature: float, parser: Parser | None = None) -> SamplingConfig:
    try:
        return SamplingConfig(temperature=temperature, max_new_tokens=args.max_new_tokens, seed=args.seed)
    except ValueError as error:
        if parser is None:
            raise
        parser.error(str(error).replace("`temperature`", "`temperatures`"))


def _open(args: Any) -> tuple[OpenModel, Decoder]:
    from textgen.runs.checkpoint import checkpoints

    run_dir = Path(args.run)
    if not checkpoints(run_dir):
        fail(f"`{run_dir}` is no run folder with checkpoints" if run_dir.exists() else f"`{run_dir}` does not exist")
    return open_decoder(run_dir, args.decoder, best=args.best)


def _cut(text: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """Cut a human text where a generated one would have been."""
    return tokenizer.decode(tokenizer.encode(text)[:max_tokens])


def _long(texts: Sequence[Text], length: int) -> list[Text]:
    """Return the first `length` words of the texts that have them."""
    return [text[:length] for text in texts if len(text) >= length]


def _evenly(texts: Sequence[Text], count: int) -> list[Text]:
    """Return `count` of the texts, evenly spaced: neighbours may speak of the same."""
    return [texts[i * len(texts) // count] for i in range(count)] if len(texts) >= count else list(texts)


def _draw(args: Any, decoder: Decoder, tokenizer: Tokenizer, temperature: float) -> Iterator[Text]:
    """Yield the words of texts from their very beginning, in the order of their numbers, until enough are long enough.

    All that come before the last one are taken, however short: those that end first are the short ones.
    """
    from textgen.decoding.cuda_graphs import GraphRunner
    from textgen.decoding.generation import Request, Sample, generate_stream
    from textgen.reporting.measures import words

    config, limit = _sampling(args, temperature), args.texts * PATIENCE
    requests = (Request("", config, number) for number in range(limit))
    run = GraphRunner(decoder) if decoder.in_graphs else None
    ended: dict[int, Sample] = {}
    place = long = 0
    with Progress(f"temperature {temperature:g}: text", args.texts) as bar:
        for number, event in generate_stream(decoder, tokenizer, requests, batch_size=args.batch_size, run=run):
            if isinstance(event, Sample):
                ended[number] = event
            while place in ended:
                text = words(ended.pop(place).text)
                place, long = place + 1, long + (len(text) >= args.words)
                yield text
                bar.update(long)
                if long == args.texts:
                    return


def _table(record: dict[str, Any]) -> str:
    """Return a line for each measure: human texts, then each temperature."""
    columns = [("human", record["human"]), *((f"{one['temperature']:g}", one) for one in record["generated"])]
    lines = [f"{'':14}" + "".join(f"{name:>9}" for name, _ in columns)]
    for name in record["human"]:
        values = [figures.get(name) for _, figures in columns]
        lines.append(f"{name:14}" + "".join(f"{'-' if v is None else format(v, '.4g'):>9}" for v in values))
    return "\n".join(lines)
