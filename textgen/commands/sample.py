"""The verb `sample`: continue prompts of the command line to standard output, or those of a file to another file.

What is heavy is imported once flags and prompts are known to be right.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from textgen.commands.model_argument import add_model_arguments, open_decoder
from textgen.commands.parsing import Parser, fail
from textgen.config import SamplingConfig
from textgen.console import Progress, setup_logging
from textgen.settings import build_settings, in_words, unknown_setting

if TYPE_CHECKING:
    from textgen.decoding.decoders import Decoder
    from textgen.decoding.generation import Request, Sample
    from textgen.tokenizer import Tokenizer


log = logging.getLogger("textgen")

LISTS = {
    "stop": "texts that end a sample and are not part of it; the one that is complete first counts",
    "banned_tokens": "ids of tokens that are never drawn",
    "forced_tokens": "ids of tokens that every sample begins with",
}

Events = Iterator[tuple[int, "str | Sample"]]


@dataclass(frozen=True)
class Prompt:
    """A prompt with its settings."""

    text: str
    config: SamplingConfig
    where: str
    """its name in errors"""
    id: str | int | None = None


def sample_command(argv: Sequence[str]) -> None:
    """Continue prompts; only text, or JSON, goes to standard output."""
    args, config = _parse(argv)
    raw, prompts = b"", []
    if args.batch_file is not None:
        raw = _read_bytes(args.batch_file)
        prompts = _batch_prompts(raw, _name(args.batch_file), config)
    else:
        prompts = [Prompt(text, config, where) for text, where in _single_prompts(args)]
    for prompt in prompts:
        if prompt.text and not prompt.text.strip():
            fail(f"{prompt.where} is only spaces; an empty prompt starts a text")

    setup_logging(main=True)
    opened, decoder = open_decoder(args.checkpoint, args.decoder, best=args.best)
    tokenizer = opened.tokenizer
    _require_drawable(config, tokenizer)
    prompts = [_as_read(prompt, opened.normalization, tokenizer) for prompt in prompts]
    with _first_interrupt() as interrupted:
        sampler = _Sampler(args, decoder, tokenizer, prompts, interrupted)
        if args.batch_file is not None:
            _write_batch(sampler, Path(args.out), _origin(args, config, raw, opened.directory))
        elif args.json:
            for records in sampler.records():
                print("\n".join(_json_line(record) for record in records), flush=True)
        elif args.best_of is not None:
            kept = enumerate(sample for group in sampler.groups() for sample in sampler.best(group))
            _stream(
                ((row, event) for row, sample in kept for event in (sample.text, sample)), prompts, args.num_samples
            )
        else:
            _stream(sampler.events(), prompts, args.num_samples)
        if interrupted():
            raise KeyboardInterrupt


# --- flags and prompts -----------------------------------------------------------------------------------------------


def _parse(argv: Sequence[str]) -> tuple[Any, SamplingConfig]:
    parser = Parser(
        prog="textgen sample",
        description="Continue prompts with a trained model. A list is written `--stop A B` or `--stop A --stop B`.",
    )
    add_model_arguments(parser, decoder=True)
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue; may be given several times; '' starts a review. Without any, standard input is read, "
        "unless it is a terminal",
    )
    parser.add_argument(
        "--prompt_file", help="file whose text, but for a last line break, is a prompt; - is standard input"
    )
    parser.add_argument(
        "--batch_file",
        help="file of many prompts, one JSON object per line: `prompt`, and if wanted `id` and any settings; "
        "- is standard input",
    )
    parser.add_argument(
        "--out",
        help="file for the samples of `--batch_file`, one JSON object per line, in order; what it holds of an earlier "
        "run with the same prompts, settings and model is kept and continued",
    )
    parser.add_argument("--num_samples", type=int, default=1, help="samples of each prompt")
    parser.add_argument(
        "--best_of",
        type=int | None,
        default=None,
        help="draw so many samples of each prompt and keep the `num_samples` with the largest mean log-probability",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="samples that run at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object per sample")
    parser.add_class_arguments(SamplingConfig, None, fail_untyped=True, skip=set(LISTS))
    for name, text in LISTS.items():
        parser.add_argument(f"--{name}", nargs="+", action="extend", metavar="ITEM", help=text)
    args = parser.parse_args(list(argv))

    values = {f.name: args[f.name] for f in dataclasses.fields(SamplingConfig)}
    values["stop"] = [_decode(os.fsencode(stop), "`--stop`") for stop in args.stop or ()]
    for name in ("banned_tokens", "forced_tokens"):
        values[name] = [int(item) if re.fullmatch(r"-?\d{1,18}", item) else item for item in args[name] or ()]
    try:
        config = build_settings(SamplingConfig, values)
    except ValueError as error:
        parser.error(str(error))
    for name in ("num_samples", "batch_size"):
        if args[name] < 1:
            parser.error(f"`{name}` must be at least 1: {args[name]}")
    if args.best_of is not None and args.best_of < args.num_samples:
        parser.error(f"`best_of` must be at least `num_samples` {args.num_samples}: {args.best_of}")
    if (args.batch_file is None) != (args.out is None):
        given, missing = ("out", "batch_file") if args.batch_file is None else ("batch_file", "out")
        parser.error(f"`{given}` needs `{missing}`")
    if args.batch_file is not None and (args.prompt is not None or args.prompt_file is not None):
        parser.error("`batch_file` goes with neither `prompt` nor `prompt_file`")
    if config.logprobs is not None and not args.json and args.out is None:
        parser.error("`logprobs` needs `json` or `out`")
    return args, config


def _single_prompts(args: Any) -> list[tuple[str, str]]:
    """Return prompts of flags and standard input, and what they are called."""
    prompts = [(_decode(os.fsencode(prompt), "`--prompt`"), "`--prompt`") for prompt in args.prompt or []]
    path = args.prompt_file
    if path is None and not prompts:
        if sys.stdin is None or sys.stdin.isatty():  # None: it is closed
            return [("", "`--prompt`")]
        path = "-"
    if path is not None:  # without the line break that editors and `echo` end it with
        text = _decode(_read_bytes(path), _name(path)).removesuffix("\n").removesuffix("\r")
        prompts.append((text, _name(path)))
    return prompts


def _batch_prompts(raw: bytes, name: str, defaults: SamplingConfig) -> list[Prompt]:
    """Return the prompts of a batch file; fail at the first line that is wrong."""
    lines = raw.removesuffix(b"\n").split(b"\n") if raw else []
    if not lines:
        fail(f"{name} holds no prompts")
    return [_batch_prompt(line, f"{name} line {number}", defaults) for number, line in enumerate(lines, 1)]


def _batch_prompt(line: bytes, where: str, defaults: SamplingConfig) -> Prompt:
    text = _decode(line, where)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        fail(f"{where} is not JSON: {text[:40]}")
    if not isinstance(values, dict):
        fail(f'{where} is not an object such as {{"prompt": "..."}}: {text[:40]}')
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        fail(f"{where} holds a lone surrogate")
    if "prompt" not in values:
        fail(f"{where} has no `prompt`")
    prompt, id_ = values.pop("prompt"), values.pop("id", None)
    if not isinstance(prompt, str):
        fail(f"{where}: `prompt` must be {in_words(str)}: {json.dumps(prompt)[:40]}")
    if id_ is not None and type(id_) not in (str, int):
        fail(f"{where}: `id` must be {in_words(str | int)}: {json.dumps(id_)[:40]}")
    known = [f.name for f in dataclasses.fields(SamplingConfig)]
    if unknown := [name for name in values if name not in known]:
        fail(f"{where}: {unknown_setting(unknown[0], ['prompt', 'id', *known])}")
    try:
        config = build_settings(SamplingConfig, dataclasses.asdict(defaults) | values) if values else defaults
    except ValueError as error:
        fail(f"{where}: {error}")
    return Prompt(prompt, config, where, id_)


def _as_read(prompt: Prompt, normalization: str, tokenizer: Tokenizer) -> Prompt:
    """Return a prompt as the model reads text, its stop strings too."""
    from textgen.data.corpus import normalize

    _require_drawable(prompt.config, tokenizer, f"{prompt.where}: ")
    stops = tuple(normalize(stop, normalization) for stop in prompt.config.stop)
    config = dataclasses.replace(prompt.config, stop=stops) if stops else prompt.config
    return dataclasses.replace(prompt, text=normalize(prompt.text, normalization), config=config)


def _require_drawable(config: SamplingConfig, tokenizer: Tokenizer, where: str = "") -> None:
    from textgen.decoding.generation import require_drawable

    try:
        require_drawable(config, tokenizer)
    except ValueError as error:
        fail(f"{where}{error}")


def _name(path: str) -> str:
    return "standard input" if path == "-" else f"`{path}`"


def _read_bytes(path: str) -> bytes:
    if path == "-" and sys.stdin is None:
        fail("standard input is closed")
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        fail(f"{_name(path)} cannot be read: {error.strerror}")


def _decode(raw: bytes, where: str) -> str:
    """Return UTF-8 bytes as text, whatever the locale."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        fail(f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}")


# --- sampling --------------------------------------------------------------------------------------------------------


class _Sampler:
    """Draws the samples of prompts, `best_of` of each or `num_samples`."""

    def __init__(
        self,
        args: Any,
        decoder: Decoder,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        interrupted: Callable[[], bool],
    ) -> None:
        self.prompts, self._args, self._decoder, self._tokenizer = prompts, args, decoder, tokenizer
        self.interrupted = interrupted
        self._drawn = args.best_of or args.num_samples
        self._group = args.best_of or 1  # samples that are ranked together
        self.num_kept = len(prompts) * args.num_samples

    def events(self, skip: int = 0) -> Events:
        """Yield the events of all samples but the first `skip`; an interrupt ends the samples as they are."""
        from textgen.decoding.cuda_graphs import GraphRunner
        from textgen.decoding.generation import generate_stream

        return generate_stream(
            self._decoder, self._tokenizer, itertools.islice(self._requests(), skip, None),
            batch_size=self._args.batch_size, interrupted=self.interrupted,
            run=GraphRunner(self._decoder) if self._decoder.in_graphs else None,
        )  # fmt: skip

    def _requests(self) -> Iterator[Request]:
        from textgen.decoding.generation import Request

        for prompt in self.prompts:
            config = prompt.config
            if self._args.best_of is not None and config.logprobs is None:
                config = dataclasses.replace(config, logprobs=0)
            for number in range(self._drawn):
                yield Request(prompt.text, config, number)

    def groups(self, skip: int = 0) -> Iterator[list[Sample]]:
        """Yield samples in order, those that are ranked together in a list, but for the first `skip` lists.

        An interrupt leaves out what has not ended. Samples that end before earlier ones wait here: `serve` bounds them.
        """
        ended: dict[int, Sample] = {}
        first = 0
        for row, event in self.events(skip * self._group):
            if self.interrupted():
                return
            if isinstance(event, str):
                continue
            ended[row] = event
            while all(place in ended for place in range(first, first + self._group)):
                yield [ended.pop(place) for place in range(first, first + self._group)]
                first += self._group

    def best(self, group: list[Sample]) -> list[Sample]:
        """Return the samples of a list that are kept."""
        if self._args.best_of is None:
            return group
        return sorted(group, key=lambda sample: -sample.mean_logprob)[: self._args.num_samples]

    def records(self, skip: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Yield `groups` as JSON objects."""
        for place, group in enumerate(self.groups(skip), skip):
            prompt = self.prompts[place * self._group // self._drawn]
            yield [self._record(sample, prompt) for sample in self.best(group)]

    def place(self, num_kept: int) -> tuple[int, int]:
        """Return in which group, and where among those kept of it, the sample after the first `num_kept` stands."""
        return divmod(num_kept, 1 if self._args.best_of is None else self._args.num_samples)

    def _record(self, sample: Sample, prompt: Prompt) -> dict[str, Any]:
        record: dict[str, Any] = {} if prompt.id is None else {"id": prompt.id}
        record |= {name: getattr(sample, name) for name in ("prompt", "number", "text", "num_tokens", "finished")}
        if prompt.config.stop:
            record["stop"] = sample.stop
        if sample.logprobs is not None:
            record["mean_logprob"] = round(sample.mean_logprob, 6)
        if prompt.config.logprobs is not None and sample.logprobs is not None:
            record["logprobs"] = [
                {"token": told.token, "logprob": _rounded(told.logprob), "top": [[t, _rounded(v)] for t, v in told.top]}
                for told in sample.logprobs
            ]
        return record


def _rounded(logprob: float) -> float | None:
    """Return a log-probability for JSON, which knows no infinity."""
    return round(logprob, 6) if logprob > float("-inf") else None


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _stream(events: Events, prompts: Sequence[Prompt], num_samples: int) -> None:
    """Print samples in order, the first unfinished one as it is drawn; a blank line stands between two."""
    waiting: dict[int, str] = {}
    ended: set[int] = set()
    current = 0
    for row, event in events:
        waiting.setdefault(row, ("\n" if row else "") + prompts[row // num_samples].text)
        if isinstance(event, str):
            waiting[row] += event
        else:
            ended.add(row)
        while current in waiting:
            print(waiting[current], end="", flush=True)
            waiting[current] = ""
            if current not in ended:
                break
            print(flush=True)
            del waiting[current]
            current += 1


@contextmanager
def _first_interrupt() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C, so that nothing is torn in the middle; the second one ends the process as usual.

    Yields:
        Tells whether it came.
    """
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, before)

    if before is not signal.default_int_handler:  # ignored, as in the background
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


# --- a file of prompts to a file of samples --------------------------------------------------------------------------


def _origin(args: Any, config: SamplingConfig, raw: bytes, directory: Path) -> dict[str, str]:
    """Return digests of all that decides the samples."""
    from textgen.model.files import CONFIG_NAME, WEIGHTS_NAME
    from textgen.tokenizer import MODEL_NAME

    settings = [dataclasses.asdict(config), args.num_samples, args.best_of, args.decoder]
    weights = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME, MODEL_NAME):
        with (directory / name).open("rb") as file:
            weights.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "prompts": hashlib.sha256(raw).hexdigest(),
        "settings": hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }


def _write_batch(sampler: _Sampler, path: Path, origin: dict[str, str]) -> None:
    """Append to a file what it lacks of the samples, each as soon as those before it are there."""
    with _open_output(path, origin) as (append, done):
        if done > sampler.num_kept:
            fail(f"`{path}` has {done} lines, the prompts have {sampler.num_kept} samples")
        if done:
            log.info("`%s` holds %d of %d samples", path, done, sampler.num_kept)
        skip, written = sampler.place(done)
        with Progress("sample", sampler.num_kept, done=done) as bar:
            for records in sampler.records(skip):
                lines = [_json_line(record) + "\n" for record in records[written:]]
                written = 0  # of a list that was written in part
                append("".join(lines).encode())
                done += len(lines)
                bar.update(done)


@contextmanager
def _open_output(path: Path, origin: dict[str, str]) -> Iterator[tuple[Callable[[bytes], None], int]]:
    """Hold the file of samples; what an end in the middle of a line left of it is cut off.

    A file beside it says what the samples are of.

    Yields:
        A function that appends, and the number of lines.
    """
    from textgen.files import write_atomic

    beside = path.with_name(f"{path.name}.origin.json")

    def failed(error: OSError) -> NoReturn:
        fail(f"`{path}` cannot be written: {error.strerror}")

    if path.exists() and not path.is_file():
        fail(f"`{path}` is not a file")
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        failed(error)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"`{path}` is being written by another process")
        if file.seek(0, os.SEEK_END):
            try:
                before = json.loads(beside.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                fail(f"`{path}` holds something, and no `{beside.name}` beside it says what: name another file")
            known = before if isinstance(before, dict) else {}
            if other := [name for name in origin if known.get(name) != origin[name]]:
                fail(f"`{path}` was begun with other {' and '.join(other)}: name another file")
        else:
            write_atomic(beside, json.dumps(origin) + "\n")

        file.seek(0)
        count = end = place = 0
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            end = place + block.rfind(b"\n") + 1 if b"\n" in block else end
            place += len(block)
        if end < place:
            file.truncate(end)

        def append(data: bytes) -> None:
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError as error:
                failed(error)

        yield append, count
        os.fsync(file)
