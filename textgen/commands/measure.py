"""The command `measure`: compare texts of a run, at several temperatures, with human ones.

Heavy packages are imported after the flags have been checked.
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
from textgen.commands.parsing import Parser, add_reading_flags, fail, reading_settings
from textgen.config import SPLITS, SamplingConfig
from textgen.console import Progress, setup_logging
from textgen.files import write_atomic
from textgen.reporting.report import MEASURES_FORMAT, MEASURES_NAME, leave_report

if TYPE_CHECKING:
    from textgen.data.store import TokenStore
    from textgen.decoding.decoders import Decoder
    from textgen.reporting.measures import Words
    from textgen.tokenizer import Tokenizer


log = logging.getLogger("textgen")

# Texts to draw at a temperature, at most, for each wanted text: some end before they have enough words.
MOST_DRAWS = 8


def measure_command(argv: Sequence[str]) -> None:
    """Draw texts, measure them and human ones, and write the figures into the run folder."""
    args = _parse(argv)
    setup_logging(main=True)
    opened, decoder = _open(args)
    started = time.monotonic()
    from textgen.data.texts import read_split, store_of
    from textgen.reporting.measures import words

    store, run_dir = store_of(opened.directory), Path(args.run)
    sets = [_human_texts(args, opened, store)]
    for temperature in sorted(set(args.temperatures)):
        drawn = list(_draw(args, decoder, opened.tokenizer, temperature))
        texts = _long(drawn, args.words)[: args.texts]
        sets.append(_Set(temperature, [len(text) for text in drawn], texts))
        if len(texts) < args.texts:
            log.warning(
                "temperature %g: %d of %d texts have %d words: only the length is measured",
                temperature,
                len(texts),
                len(drawn),
                args.words,
            )
    log.info("comparing with the training text")
    figures = _figures(sets, args.texts, map(words, read_split(store, "train")))
    record: dict[str, Any] = {
        "format": MEASURES_FORMAT,
        "checkpoint": opened.directory.name,
        "decoder": decoder.description,
        "data": args.data,
        "texts": args.texts,
        "words": args.words,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "human": figures[0],
        "generated": [
            {"temperature": one.temperature, "drawn": len(one.lengths), **figure}
            for one, figure in zip(sets[1:], figures[1:], strict=True)
        ],
        "seconds": round(time.monotonic() - started, 1),
    }
    write_atomic(run_dir / MEASURES_NAME, json.dumps(record, indent=2) + "\n")
    leave_report(run_dir)
    print(json.dumps(record) if args.json else _table(record))


@dataclasses.dataclass(frozen=True)
class _Set:
    """Texts to measure, all of one length, and the texts that they were chosen from."""

    temperature: float | None
    """None: human texts"""
    lengths: Sequence[int]
    """lengths in words of all texts"""
    texts: Sequence[Words]
    """the texts that have enough words, cut to `words` words"""


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="textgen measure",
        description="Compare generated texts with human ones: variety, repetition, copied text, length.",
    )
    add_model_arguments(
        parser, "run", help=f"run folder, where `{MEASURES_NAME}` and the report are written", decoder=True
    )
    parser.add_argument("--texts", type=int, default=1000, help="texts at each temperature, and human ones")
    parser.add_argument("--words", type=int, default=128, help="first words of each text that are measured")
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[0.5, 0.75, 1.0, 1.25, 1.5],
        help="temperatures of the texts",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=1024, help="tokens after which a text is cut, generated or human"
    )
    parser.add_argument("--data", default="validation", help="human texts: a file, folder or glob, or a split")
    add_reading_flags(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="texts that are drawn at a time")
    parser.add_argument("--seed", type=int, default=42, help="seed of the draws")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(list(argv))
    args.reading = reading_settings(args)
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
        fail(f"`{run_dir}` is not a run folder with checkpoints" if run_dir.exists() else f"`{run_dir}` does not exist")
    return open_decoder(run_dir, args.decoder, best=args.best)


def _human_texts(args: Any, opened: OpenModel, store: TokenStore) -> _Set:
    """Return the human texts to measure; fail if too few have enough words."""
    from textgen.data.texts import read_split, texts_to_score
    from textgen.reporting.measures import words

    if args.data in SPLITS:
        texts = list(read_split(store, args.data))
    else:
        texts = texts_to_score(
            opened.directory, args.data, args.reading, limit=None, normalization=opened.normalization
        )
    human = [words(_cut(text, opened.tokenizer, args.max_new_tokens)) for text in texts]
    chosen = _evenly(_long(human, args.words), args.texts)
    if len(chosen) < args.texts:
        fail(
            f"`{args.data}` has {len(chosen)} texts of {args.words} words, `texts` wants {args.texts}: "
            "lower `--texts` or `--words`"
        )
    return _Set(None, [len(text) for text in human], chosen)


def _figures(sets: Sequence[_Set], wanted: int, training: Iterator[Words]) -> list[dict[str, float]]:
    """Return the figures of each set: the mean length, and the other measures if it has the wanted number of texts."""
    from textgen.reporting.measures import copied_shares, diversity

    figures = []
    for one, shares in zip(sets, copied_shares([one.texts for one in sets], training), strict=True):
        measures = {"length": sum(one.lengths) / len(one.lengths)}
        if len(one.texts) == wanted:
            measures |= diversity(one.texts) | shares
        figures.append({name: round(value, 6) for name, value in measures.items() if math.isfinite(value)})
    return figures


def _cut(text: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """Cut a human text at the same number of tokens as a generated one."""
    return tokenizer.decode(tokenizer.encode(text)[:max_tokens])


def _long(texts: Sequence[Words], length: int) -> list[Words]:
    """Return the first `length` words of each text that has as many words."""
    return [text[:length] for text in texts if len(text) >= length]


def _evenly(texts: Sequence[Words], count: int) -> list[Words]:
    """Return `count` texts, evenly spaced, since neighbours may have the same subject; all texts if there are fewer."""
    return [texts[i * len(texts) // count] for i in range(count)] if len(texts) >= count else list(texts)


def _draw(args: Any, decoder: Decoder, tokenizer: Tokenizer, temperature: float) -> Iterator[Words]:
    """Yield the words of generated texts, in the order of their numbers, until enough of them are long enough.

    Every text before the last one is yielded, also a short one. The order of completion would prefer short texts.
    """
    from textgen.decoding.generation import generate_stream
    from textgen.decoding.samples import Request, Sample
    from textgen.reporting.measures import words

    config, limit = _sampling(args, temperature), args.texts * MOST_DRAWS
    requests = (Request("", config, number) for number in range(limit))
    ended: dict[int, Sample] = {}
    number_next = num_long = 0
    with Progress(f"temperature {temperature:g}: text", args.texts) as bar:
        for number, event in generate_stream(decoder, tokenizer, requests, batch_size=args.batch_size):
            if isinstance(event, Sample):
                ended[number] = event
            while number_next in ended:
                text = words(ended.pop(number_next).text)
                number_next, num_long = number_next + 1, num_long + (len(text) >= args.words)
                yield text
                bar.update(num_long)
                if num_long == args.texts:
                    return


def _table(record: dict[str, Any]) -> str:
    """Return a table with a line for each measure, a column for human texts and one for each temperature."""
    columns = [("human", record["human"]), *((f"{one['temperature']:g}", one) for one in record["generated"])]
    lines = [f"{'':14}" + "".join(f"{name:>9}" for name, _ in columns)]
    for name in record["human"]:
        values = [figures.get(name) for _, figures in columns]
        lines.append(f"{name:14}" + "".join(f"{'-' if v is None else format(v, '.4g'):>9}" for v in values))
    return "\n".join(lines)
