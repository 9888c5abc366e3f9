"""The command `sample`: continue prompts of the command line to standard output, or those of a file to another file.

Heavy packages are imported after flags and prompts have been checked.
"""

from __future__ import annotations

import dataclasses
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgen.commands.batch_output import open_output, origin_of
from textgen.commands.model_argument import add_model_arguments, open_decoder
from textgen.commands.parsing import Parser, fail
from textgen.commands.prompts import (
    Prompt,
    name_of,
    normalize_prompt,
    parse_batch,
    read_bytes,
    read_prompts,
    require_drawable,
    require_text,
    with_labels,
)
from textgen.commands.state_argument import add_state_arguments, keep_state, open_state, require_readable
from textgen.config import SamplingConfig
from textgen.console import Progress, escape_controls, setup_logging
from textgen.files import decode_text
from textgen.settings import build_settings

if TYPE_CHECKING:
    from textgen.decoding.decoders import Decoder
    from textgen.decoding.reading import ReadState
    from textgen.decoding.samples import Request, Sample
    from textgen.tokenizer import Tokenizer


log = logging.getLogger("textgen")

# Settings with lists: jsonargparse would read `--stop A B` as YAML, so they are flags with their own help.
LISTS = {
    "stop": "texts that end a sample and are not part of it; the first one to be complete counts",
    "logit_bias": "numbers from -100 to 100 that are added to the logits of tokens: `17=-100` for the token of an id, "
    "`good=2` for the token that the text begins with, alone or after a space",
    "dry_breakers": "texts whose tokens end a repetition for DRY; default: line break, colon, quotation mark, asterisk",
    "banned_tokens": "ids of tokens that are never drawn",
    "choices": "texts of which a sample is one, such as `good,bad`, drawn by the model's probability of each",
    "forced_tokens": "ids of tokens that every sample begins with",
}

# The settings of sampling in textgen 0.1, whose digest it left beside its files.
FIRST_SETTINGS = {
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "no_repeat_ngram", "banned_tokens", "forced_tokens", "min_new_tokens", "max_new_tokens",
    "stop", "logprobs", "seed",
}  # fmt: skip

Events = Iterator[tuple[int, "str | Sample"]]


def sample_command(argv: Sequence[str]) -> None:
    """Continue prompts; only text or JSON goes to standard output."""
    args, config = _parse(argv)
    raw = b""
    if args.batch_file is not None:
        raw = read_bytes(args.batch_file)
        prompts = parse_batch(raw, name_of(args.batch_file), config)
    else:
        prompts = read_prompts(args.prompt or (), args.prompt_file, config)
    if args.state is None:
        require_text(prompts)
    require_readable(args, prompts)

    from textgen.decoding.samples import begin_id, require_label

    setup_logging(main=True)
    opened, decoder = open_decoder(args.checkpoint, args.decoder, best=args.best)
    require_drawable(config, opened.tokenizer)
    prompts = with_labels(prompts, args.label, opened.model)
    require_readable(args, prompts)
    read = open_state(args.state, opened, decoder)
    before = "" if read is None else read.text
    if args["save_state"] is not None:
        read = keep_state(args["save_state"], prompts[0], read, opened, decoder)
    prompts = [normalize_prompt(prompt, opened.normalization, opened.tokenizer, before=before) for prompt in prompts]
    for prompt in prompts:
        begin = begin_id(opened.model, opened.tokenizer, prompt.label) if read is None else read.ids[0]
        require_label(prompt.config, begin, opened.tokenizer)
    num_samples: int = args.num_samples

    def beginning(index: int) -> str:
        return prompts[index // num_samples].text

    with first_interrupt() as interrupted:
        sampler = _Sampler(args, decoder, opened.tokenizer, prompts, interrupted, read)
        if args.batch_file is not None:
            settings = [_settings_record(config), args.num_samples, args.best_of, args.decoder]
            settings += [hashlib.sha256(before.encode()).hexdigest()] if before else []
            settings += [args.label] if args.label else []
            if read is not None and read.ids[0] != opened.tokenizer.bos_id:  # the label of the state's text
                settings.append({"begin": read.ids[0]})
            origin = origin_of(raw, settings, opened.directory)
            if len({(prompt.whole, prompt.config) for prompt in prompts}) < len(prompts):
                # An earlier version drew equal samples for equal prompts: its files must not be continued.
                origin["numbering"] = "counts equal prompts"
            _write_batch(sampler, Path(args.out), origin)
        elif args.json:
            for records in sampler.records():
                print("\n".join(_json_line(record) for record in records), flush=True)
        elif args.best_of is not None:
            stream_samples(_as_events(map(sampler.best, sampler.groups())), beginning)
        else:
            stream_samples(sampler.events(), beginning)
        if interrupted():
            raise KeyboardInterrupt


def _parse(argv: Sequence[str]) -> tuple[Any, SamplingConfig]:
    parser = _new_parser()
    args = parser.parse_args(list(argv))
    config = _config(args, parser)
    args.label = [decode_text(os.fsencode(label), "`--label`") for label in args.label or ()]
    _check(args, config, parser)
    return args, config


def _new_parser() -> Parser:
    parser = Parser(
        prog="textgen sample",
        description="Continue prompts with a trained model. A list is written `--stop A B` or `--stop A --stop B`.",
    )
    add_model_arguments(parser, decoder=True)
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue; can be given several times; '' starts a new text. Without a prompt, standard input is "
        "read unless it is a terminal",
    )
    parser.add_argument(
        "--label",
        nargs="+",
        action="extend",
        metavar="LABEL",
        help="label of the texts, of a model with labels; several labels continue each prompt with each of them",
    )
    parser.add_argument(
        "--prompt_file", help="file with a prompt; a last line break is not part of it; - is standard input"
    )
    parser.add_argument(
        "--batch_file",
        help="file of many prompts, one JSON object per line: `prompt`, and optionally `id` and any settings; "
        "- is standard input",
    )
    parser.add_argument(
        "--out",
        help="file for the samples of `--batch_file`, one JSON object per line, in order. Samples of an earlier run "
        "with the same prompts, settings and model are kept, and the run continues after them",
    )
    parser.add_argument("--num_samples", type=int, default=1, help="samples of each prompt")
    parser.add_argument(
        "--best_of",
        type=int | None,
        default=None,
        help="draw this many samples of each prompt and keep the `num_samples` with the largest mean log-probability",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="samples that are drawn at a time")
    add_state_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per sample")
    parser.add_class_arguments(SamplingConfig, None, fail_untyped=True, skip={*LISTS, "regex"})
    # as a typed setting, `null` would be no regex
    parser.add_argument("--regex", help="the whole sample matches this regex, unless it is cut at `max_new_tokens`")
    for name, text in LISTS.items():
        parser.add_argument(f"--{name}", nargs="+", action="extend", metavar="ITEM", help=text)
    return parser


def _config(args: Any, parser: Parser) -> SamplingConfig:
    """Return the sampling settings of the command line."""
    values = {f.name: args[f.name] for f in dataclasses.fields(SamplingConfig)}
    if args.regex is not None:
        values["regex"] = decode_text(os.fsencode(args.regex), "`--regex`")
    values["stop"] = [decode_text(os.fsencode(stop), "`--stop`") for stop in args.stop or ()]
    for name in ("banned_tokens", "forced_tokens"):
        values[name] = [int(item) if re.fullmatch(r"-?\d{1,18}", item) else item for item in args[name] or ()]
    if values.pop("dry_breakers") is not None:
        values["dry_breakers"] = [decode_text(os.fsencode(text), "`--dry_breakers`") for text in args.dry_breakers]
    choices = [decode_text(os.fsencode(item), "`--choices`") for item in args.choices or ()]
    values["choices"] = [choice for item in choices for choice in item.split(",")]
    values["logit_bias"] = [_parse_bias(item, parser) for item in args.logit_bias or ()]
    try:
        return build_settings(SamplingConfig, values)
    except ValueError as error:
        parser.error(str(error))


def _check(args: Any, config: SamplingConfig, parser: Parser) -> None:
    """End the command if flags do not go together."""
    for name, least in (("num_samples", args["save_state"] is None), ("batch_size", 1)):
        if args[name] < least:
            parser.error(f"`{name}` must be at least {least:d}: {args[name]}")
    if args.best_of is not None and args.best_of < args.num_samples:
        parser.error(f"`best_of` must be at least `num_samples` {args.num_samples}: {args.best_of}")
    if args.best_of is not None and args.num_samples == 0:
        parser.error("`best_of` cannot be combined with `num_samples` 0")
    if (args.batch_file is None) != (args.out is None):
        given, missing = ("out", "batch_file") if args.batch_file is None else ("batch_file", "out")
        parser.error(f"`{given}` needs `{missing}`")
    if args.batch_file is not None and (args.prompt is not None or args.prompt_file is not None):
        parser.error("`batch_file` cannot be combined with `prompt` or `prompt_file`")
    if config.logprobs is not None and not args.json and args.out is None:
        parser.error("`logprobs` needs `json` or `out`")


def _settings_record(config: SamplingConfig) -> dict[str, Any]:
    """Return the settings that decide the samples of a file.

    Settings that the first version did not have are recorded only if they differ from their defaults, so that a later
    version continues the file.
    """
    values, defaults = dataclasses.asdict(config), dataclasses.asdict(SamplingConfig())
    return {name: value for name, value in values.items() if name in FIRST_SETTINGS or value != defaults[name]}


def _parse_bias(item: str, parser: Parser) -> tuple[str, float]:
    """Return the token and the number of an item of `--logit_bias`."""
    token, _, number = decode_text(os.fsencode(item), "`--logit_bias`").rpartition("=")
    try:
        bias = float(number)
    except ValueError:
        token = ""
    if not token:
        parser.error(f"`logit_bias` must be a token, `=` and a number, such as `17=-100` or `good=2`: {item[:40]}")
    return token, bias


class _Sampler:
    """Draws the samples of prompts in groups: `best_of` samples of a prompt, of which some are kept, or one sample."""

    def __init__(
        self,
        args: Any,
        decoder: Decoder,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        interrupted: Callable[[], bool],
        read: ReadState | None,
    ) -> None:
        self._read = read
        self._prompts, self._decoder, self._tokenizer = prompts, decoder, tokenizer
        self._batch_size, self._best_of, self._num_samples = args.batch_size, args.best_of, args.num_samples
        self._interrupted = interrupted
        self._drawn = args.best_of or args.num_samples  # samples of each prompt
        self._group_size = args.best_of or 1
        self.num_kept = len(prompts) * args.num_samples

    def events(self, skip: int = 0) -> Events:
        """Yield the events of all samples but the first `skip`; an interrupt ends the samples as they are."""
        from textgen.decoding.generation import generate_stream

        return generate_stream(
            self._decoder,
            self._tokenizer,
            itertools.islice(self._requests(), skip, None),
            batch_size=self._batch_size,
            interrupted=self._interrupted,
        )

    def _requests(self) -> Iterator[Request]:
        from textgen.decoding.generation import number_requests

        def config_of(prompt: Prompt) -> SamplingConfig:
            if self._best_of is not None and prompt.config.logprobs is None:
                return dataclasses.replace(prompt.config, logprobs=0)  # `best` compares log-probabilities
            return prompt.config

        # All prompts are numbered, also those whose samples an earlier run has drawn: the numbers count equal prompts.
        entries = ((prompt.whole, config_of(prompt), prompt.label) for prompt in self._prompts)
        return number_requests(entries, self._drawn, read=self._read)

    def groups(self, skip: int = 0) -> Iterator[list[Sample]]:
        """Yield the samples of each group, in order, except the first `skip` groups.

        After an interrupt no group is yielded. Samples that end before earlier ones are held here; `generate_stream`
        bounds their number.
        """
        ended: dict[int, Sample] = {}
        first = 0
        for index, event in self.events(skip * self._group_size):
            if self._interrupted():
                return
            if isinstance(event, str):
                continue
            ended[index] = event
            while all(i in ended for i in range(first, first + self._group_size)):
                yield [ended.pop(i) for i in range(first, first + self._group_size)]
                first += self._group_size

    def best(self, group: list[Sample]) -> list[Sample]:
        """Return the samples of a group that are kept, the likeliest first."""
        if self._best_of is None:
            return group
        return sorted(group, key=lambda sample: -sample.mean_logprob)[: self._num_samples]

    def records(self, skip: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Yield the kept samples of each group as JSON objects, except the first `skip` groups."""
        for index, group in enumerate(self.groups(skip), skip):
            prompt = self._prompts[index * self._group_size // self._drawn]
            yield [_record(sample, prompt) for sample in self.best(group)]

    def position(self, num_kept: int) -> tuple[int, int]:
        """Return the position after `num_kept` kept samples: whole groups, and kept samples of the next group."""
        return divmod(num_kept, 1 if self._best_of is None else self._num_samples)


# --- output ----------------------------------------------------------------------------------------------------------


def _record(sample: Sample, prompt: Prompt) -> dict[str, Any]:
    """Return a sample as a JSON object."""
    record: dict[str, Any] = {} if prompt.id is None else {"id": prompt.id}
    record |= {} if prompt.label is None else {"label": prompt.label}
    record["prompt"] = prompt.text  # without the text of `--state`
    record |= {name: getattr(sample, name) for name in ("number", "text", "num_tokens", "finished")}
    if prompt.config.stop:
        record["stop"] = sample.stop
    if prompt.config.regex is not None or prompt.config.choices:
        record["reason"] = sample.reason
    if sample.choices is not None:
        record["choices"] = {choice: round(probability, 6) for choice, probability in sample.choices}
    if sample.logprobs is not None:
        record["mean_logprob"] = round(sample.mean_logprob, 6)
    if prompt.config.logprobs is not None and sample.logprobs is not None:
        record["logprobs"] = [
            {
                "token": drawn.token,
                "logprob": _rounded(drawn.logprob),
                "top": [[token, _rounded(logprob)] for token, logprob in drawn.top],
            }
            for drawn in sample.logprobs
        ]
    return record


def _rounded(logprob: float) -> float | None:
    """Return a log-probability for JSON; None for minus infinity, which JSON does not have."""
    return round(logprob, 6) if logprob > float("-inf") else None


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _as_events(groups: Iterator[list[Sample]]) -> Events:
    """Yield finished samples as events: the whole text, then the sample."""
    for index, sample in enumerate(itertools.chain.from_iterable(groups)):
        yield index, sample.text
        yield index, sample


def stream_samples(events: Events, beginning: Callable[[int], str]) -> None:
    """Print samples in order, the first unfinished one while it is drawn, with a blank line between two samples.

    A terminal shows control characters by their codes.

    Args:
        events: the samples.
        beginning: returns what is printed before the sample of an index.
    """
    shown = escape_controls if sys.stdout.isatty() else str
    waiting: dict[int, str] = {}
    ended: set[int] = set()
    current = 0
    for index, event in events:
        waiting.setdefault(index, ("\n" if index else "") + beginning(index))
        if isinstance(event, str):
            waiting[index] += event
        else:
            ended.add(index)
        while current in waiting:
            print(shown(waiting[current]), end="", flush=True)
            waiting[current] = ""
            if current not in ended:
                break
            print(flush=True)
            del waiting[current]
            current += 1


def _write_batch(sampler: _Sampler, path: Path, origin: dict[str, str]) -> None:
    """Append the missing samples to a file, each one as soon as all earlier ones are written."""
    with open_output(path, origin) as (append, done):
        if done > sampler.num_kept:
            fail(f"`{path}` has {done} lines, the prompts have {sampler.num_kept} samples")
        if done:
            log.info("`%s` holds %d of %d samples", path, done, sampler.num_kept)
        skip, written = sampler.position(done)
        with Progress("sample", sampler.num_kept, done=done) as bar:
            for records in sampler.records(skip):
                lines = [_json_line(record) + "\n" for record in records[written:]]
                written = 0  # only the first group can be partly written
                append("".join(lines).encode())
                done += len(lines)
                bar.update(done)


@contextmanager
def first_interrupt() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C, so that no sample is cut in the middle; a second Ctrl-C ends the process as usual.

    Yields:
        A function that returns whether Ctrl-C was pressed.
    """
    received: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    if before is not signal.default_int_handler:  # a shell ignores the signal for a process in the background
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)
