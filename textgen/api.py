"""The names that `import textgen` offers: train, load, generate, score. They return values and print nothing.

The same settings and seed give the same losses and texts as on the command line. Every error that a user can fix is a
TextgenError with one line. The log goes to the logger `textgen`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from textgen.classification.classifier import new_classifier
from textgen.classification.decision import Classification
from textgen.classification.head import read_head
from textgen.commands.model_argument import OpenModel, open_decoder
from textgen.commands.parsing import names_in, read_config_file
from textgen.config import SamplingConfig, TrainConfig
from textgen.console import as_library
from textgen.data.corpus import normalize
from textgen.data.memory import corpus_of_dataset, corpus_of_texts
from textgen.data.store import prepare_store
from textgen.decoding.generation import BATCH_SIZE, generate_stream, number_requests
from textgen.decoding.reading import ReadState, read_prompt
from textgen.decoding.samples import Request, Sample, TokenLogprobs, begin_id, require_drawable, require_label
from textgen.decoding.scoring import TextScore, score_stream
from textgen.decoding.state_files import read_state
from textgen.decoding.steering import normalize_settings
from textgen.distributed.process import process_as_before
from textgen.distributed.signals import Interrupted
from textgen.distributed.world import slurm_variables
from textgen.errors import TextgenError, in_backticks, is_lack_of_memory, user_error
from textgen.model.files import weights_sha256
from textgen.reporting.compare import read_settings
from textgen.reporting.report import report_summary
from textgen.runs.checkpoint import TRAINER_NAME, checkpoints, find_checkpoint, read_json
from textgen.runs.directory import SETTINGS_NAME, STATUS_NAME, read_status
from textgen.runs.metrics_file import METRICS_NAME, read_metrics
from textgen.settings import build_settings, flatten, settings_of, unknown_setting

if TYPE_CHECKING:
    import pandas

    from textgen.decoding.decoders import Decoder

__all__ = [
    "Classification", "LanguageModel", "Metrics", "ReadState", "Run", "Sample", "TextScore", "TokenLogprobs", "load",
    "train",
]  # fmt: skip

# Without it Python would print warnings of a program that configures no logging.
logging.getLogger("textgen").addHandler(logging.NullHandler())


@contextmanager
def _user_errors() -> Iterator[None]:
    """Raise every error that the user can fix as a TextgenError; do not change errors of the program.

    Nor of memory: programs that try again with smaller batches know them by their class.
    """
    try:
        yield
    except TextgenError:
        raise
    except Exception as error:
        if (line := user_error(error)) is None or is_lack_of_memory(error):
            raise
        raise TextgenError(line) from error


def _plain(value: Any) -> Any:
    """Return a setting as JSON would hold it: paths as texts, numbers of numpy as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    config: str | os.PathLike[str] | TrainConfig | None = None,
    *,
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    texts: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    dataset: Any = None,
    tracking: Literal[False] | Mapping[str, Any] | None = None,
    progress: bool = False,
    on_row: Callable[[dict[str, float]], None] | None = None,
    **settings: Any,
) -> Run:
    """Train in this process and return the run. If `run_dir` holds a training, continue it from its newest checkpoint.

    Ctrl-C, or a notebook's stop button, saves a checkpoint and returns the run; a second one raises KeyboardInterrupt
    at once. Before the first step there is nothing to save, and the first one raises KeyboardInterrupt. Another signal
    that stops a training saves, and then has its usual effect on the process.

    A training changes the environment, the random generators, torch's switches, the signal handlers and Accelerate's
    state; `train` restores them before it returns. One change remains: on Linux, the process keeps freed memory.

    Args:
        config: a preset such as `quick`, a YAML file, or all settings; the default settings without it.
        files: txt, jsonl, csv or parquet files, folders or globs. At most one of `files`, `texts` and `dataset` is
            given; without them, the settings of data name the source.
        texts: documents in memory, or lists of them by split (`train`, `validation`, `test`).
        dataset: a `datasets.Dataset` with the column `data.text_column`, or a `datasets.DatasetDict`.
        tracking: False for no tracker, or settings of tracking.
        progress: show the log on standard error, and progress in a terminal, as the command line does.
        on_row: called with each row of metrics.jsonl; an exception in it ends the training.
        **settings: the command line's flags: `learning_rate=0.002`, groups as `model={"hidden_size": 256}` or
            `**{"model.hidden_size": 256}`. They override `config`.

    Raises:
        TextgenError: a setting, the data or a checkpoint cannot be used.
    """
    with _user_errors():
        _refuse_processes()
        made = _settings_of_training(config, files=files, tracking=tracking, settings=settings)
        _require_one_source(settings, files=files, texts=texts, dataset=dataset)
        if on_row is not None and not callable(on_row):
            raise TextgenError(f"`on_row` must be a function of a row: {str(on_row)[:40]}")
        stopped = None
        with process_as_before(), as_library(progress=progress):
            made = _from_base(made, config, settings)
            if texts is not None or dataset is not None:
                made = _with_store(made, texts, dataset)
            name = None if config is None or isinstance(config, TrainConfig) else os.fspath(config)
            try:
                from textgen.training.loop import train as train_run  # imports Accelerate, as only this needs

                train_run(made, config_file=name or "from Python", on_row=on_row, owns_process=False)
            except Interrupted as interrupted:
                stopped = interrupted
    if stopped is not None and stopped.number != signal.SIGINT:
        signal.raise_signal(stopped.number)
    if stopped is not None and not stopped.saved:
        raise KeyboardInterrupt
    return Run(made.run_dir)


def _refuse_processes() -> None:
    """Raise TextgenError if a launcher has started several processes, of which this is one."""
    world = os.environ | slurm_variables(os.environ)
    if world.get("WORLD_SIZE", "1") != "1":
        raise TextgenError(
            f"`textgen.train` trains in one process, and a launcher started {world['WORLD_SIZE']}: launch "
            "`train_distributed.py`, or `--module textgen train`"
        )


def _settings_of_training(
    config: str | os.PathLike[str] | TrainConfig | None, *, files: Any, tracking: Any, settings: Mapping[str, Any]
) -> TrainConfig:
    """Return the settings of a training from the arguments of `train`.

    Raises:
        TextgenError: a setting is unknown or wrong.
    """
    base = TrainConfig() if config is None else config
    if isinstance(base, str | os.PathLike):
        base = read_config_file(os.fspath(base))
    if not isinstance(base, TrainConfig):
        raise TextgenError(f"`config` must be a preset, a YAML file or a TrainConfig: {str(base)[:40]}")
    if tracking is False:
        tracking = {"mode": "disabled"}
    elif tracking is not None and not isinstance(tracking, Mapping):
        raise TextgenError(f"`tracking` must be false or settings of tracking: {str(tracking)[:40]}")
    given: dict[str, Any] = {}
    for name, value in _plain({"tracking": tracking or {}, **settings}).items():
        part = flatten({name: value})
        if twice := sorted(given.keys() & part.keys()):
            raise TextgenError(f"`{twice[0]}` is given twice")
        given |= part
    known = settings_of(TrainConfig)
    groups = {name.partition(".")[0] for name in known}
    if unknown := [name for name in given if name not in known]:
        raise TextgenError(unknown_setting(unknown[0], [*known, *groups]))
    if files is not None:
        named = [files] if isinstance(files, str | os.PathLike) else list(files)
        given = _source("files", files=_plain(named)) | given
    nested: dict[str, Any] = {}
    for name, value in (flatten(dataclasses.asdict(base)) | given).items():
        group, _, field = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[field] = value
    try:
        made = build_settings(TrainConfig, nested)
    except ValueError as error:
        raise TextgenError(str(error)) from None
    if made.dry_run:
        raise TextgenError("`dry_run` prints the cost of a training: use the command line")
    return made


def _from_base(
    made: TrainConfig, config: str | os.PathLike[str] | TrainConfig | None, settings: Mapping[str, Any]
) -> TrainConfig:
    """Return the settings of a training with the shape and the tokenizer of the model that `init_from` names."""
    if made.init_from is None:
        return made
    from textgen.training.start import settings_from_base  # imports Accelerate, as only a training needs

    if isinstance(config, str | os.PathLike):
        names = names_in(os.fspath(config))
    else:
        usual = flatten(dataclasses.asdict(TrainConfig()))
        all_settings = flatten(dataclasses.asdict(config or TrainConfig()))
        names = [name for name, value in all_settings.items() if value != usual[name]]
    return settings_from_base(made, given=flatten(_plain(settings)).keys(), from_files=names)


def _require_one_source(settings: Mapping[str, Any], **sources: object) -> None:
    """Raise TextgenError if arguments of `train` name several sources of documents."""
    given = [name for name, value in sources.items() if value is not None]
    if given:
        given += sorted(flatten(_plain(settings)).keys() & {*_source(""), "data.sources"})
    if len(given) > 1:
        raise TextgenError(f"{in_backticks(given)}: give one of them")


def _source(source: str, *, files: Sequence[str] = (), store: str | None = None) -> dict[str, Any]:
    """Return the settings that decide where documents come from, by dotted name."""
    values = {"source": source, "files": files, "store": store, "dataset": None, "dataset_config": None}
    return {f"data.{name}": value for name, value in values.items()}


def _with_store(config: TrainConfig, texts: Any, dataset: Any) -> TrainConfig:
    """Return the settings of a training on texts in memory: on their token store, which is made if it is missing."""
    if config.data.sources:
        raise TextgenError("`data.sources` names the texts of this training: leave `texts` and `dataset` out")
    place = {name.partition(".")[2]: value for name, value in _source("memory").items()}
    data = dataclasses.replace(config.data, **place | {"files": ()})
    corpus = corpus_of_texts(texts, data) if texts is not None else corpus_of_dataset(dataset, data)
    store = prepare_store(data, config.tokenizer, corpus=corpus)
    return dataclasses.replace(config, data=dataclasses.replace(data, store=str(store.directory)))


# --- what a training left --------------------------------------------------------------------------------------------


class Metrics(list[dict[str, float]]):
    """Rows of metrics.jsonl, oldest first: `step`, and figures by name, such as `train/loss` in nats per token."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a table with a column for each figure; NaN where a row lacks it.

        Raises:
            TextgenError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise TextgenError("`to_pandas` needs pandas: pip install pandas") from None
        return pandas.DataFrame(self)


class Run(os.PathLike[str]):
    """The files of a training in its run folder. Every property reads the files at each use.

    Args:
        path: the folder.

    Raises:
        TextgenError: the folder is not a run folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not any((self.path / name).exists() for name in (SETTINGS_NAME, METRICS_NAME, STATUS_NAME)):
            problem = "is not a run folder" if self.path.exists() else "does not exist"
            raise TextgenError(f"`{self.path}` {problem}")

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def metrics(self) -> Metrics:
        """All rows of metrics.jsonl."""
        return Metrics(read_metrics(self.path))

    @property
    def status(self) -> dict[str, Any]:
        """Content of status.json: `state`, `step`, `total_steps`, `reason`; empty if it is missing or damaged."""
        return read_status(self.path)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by dotted name.

        Raises:
            TextgenError: config.yaml is missing or damaged.
        """
        try:
            return read_settings(self.path / SETTINGS_NAME)
        except (OSError, ValueError) as error:
            raise TextgenError(f"`{self.path}` has no readable `{SETTINGS_NAME}`: {error}") from error

    @property
    def newest(self) -> Path | None:
        """Directory of the newest valid checkpoint; None before the first one.

        Raises:
            TextgenError: no checkpoint is valid.
        """
        with _user_errors():
            return find_checkpoint(self.path) if checkpoints(self.path) else None

    @property
    def best(self) -> Path | None:
        """Directory of the checkpoint with the lowest validation loss; None if nothing was validated.

        Raises:
            TextgenError: no checkpoint is valid, or the best one is not.
        """
        newest = self.newest
        with _user_errors():
            if newest is None or read_json(newest / TRAINER_NAME)["progression"]["best_step"] is None:
                return None
            return find_checkpoint(self.path, best=True)

    def load(self, *, best: bool = False) -> LanguageModel:
        """Open the model of the newest checkpoint, or of the best one; see `load`."""
        return load(self.path, best=best)

    def __repr__(self) -> str:
        status = self.status
        step, total = status.get("step"), status.get("total_steps")
        place = "" if step is None else f", step {step}" + (f" of {total}" if total else "")
        return f"<textgen.Run {str(self.path)!r}: {status.get('state') or 'state unknown'}{place}>"

    def _repr_html_(self) -> str:
        return report_summary(self.path)


# --- using a model ---------------------------------------------------------------------------------------------------


def load(name: str | os.PathLike[str], *, best: bool = False, decoder: str = "auto") -> LanguageModel:
    """Open a trained model, on the GPU if there is one.

    Args:
        name: a run folder or a `Run`, a checkpoint, a published model, or `hub:OWNER/NAME`.
        best: of a run, the best checkpoint instead of the newest.
        decoder: computes the steps, as the command line's `--decoder`: `auto` is the fastest that loses little, `plain`
            is the model itself in float32.

    Raises:
        TextgenError: the model is not found, is damaged, or the decoder does not run here.
    """
    if not isinstance(name, str | os.PathLike):
        raise TextgenError(f"`name` must be a run, a checkpoint or a published model: {str(name)[:40]}")
    with _user_errors(), as_library(progress=False):
        return LanguageModel(*open_decoder(os.fspath(name), decoder, best=best))


class LanguageModel:
    """A trained model with its tokenizer, as `load` returns it. Texts and settings in, texts and figures out."""

    def __init__(self, opened: OpenModel, decoder: Decoder) -> None:
        self._tokenizer, self._normalization = opened.tokenizer, opened.normalization
        self._decoder = decoder
        self.path = opened.directory
        """directory of the model's files"""

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that the model was trained with; () without labels."""
        return self._decoder.model.labels

    def __repr__(self) -> str:
        return (
            f"<textgen.LanguageModel {str(self.path)!r}: {self._decoder.model.num_parameters:,} parameters, "
            f"{self._tokenizer.vocab_size:,} tokens, {self._decoder.description}>"
        )

    @overload
    def generate(
        self,
        prompt: str | Sequence[str] = ...,
        *,
        n: int = ...,
        config: SamplingConfig | None = ...,
        state: ReadState | None = ...,
        label: str | None = ...,
        details: Literal[False] = ...,
        **settings: Any,
    ) -> list[str]: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[str] = ...,
        *,
        n: int = ...,
        config: SamplingConfig | None = ...,
        state: ReadState | None = ...,
        label: str | None = ...,
        details: Literal[True],
        **settings: Any,
    ) -> list[Sample]: ...
    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        n: int = 1,
        config: SamplingConfig | None = None,
        state: ReadState | None = None,
        label: str | None = None,
        details: bool = False,
        **settings: Any,
    ) -> list[str] | list[Sample]:
        """Continue a prompt, or several. The texts are those of `textgen sample` with the same settings.

        Args:
            prompt: text to continue; an empty one starts a text. Several prompts are drawn side by side.
            n: samples of each prompt.
            config: the settings of sampling.
            state: text before the prompt, from `read` or `load_state`.
            label: of the texts, one of `labels`; not with `state`, whose text has its label.
            details: return `Sample` objects: the text, its number of tokens, how it ended, log-probabilities.
            **settings: fields of `SamplingConfig` by name, which override `config`: `temperature=0.8`.

        Returns:
            The continuations, without their prompts: `n` of the first prompt, then `n` of the second.

        Raises:
            TextgenError: a setting is unknown or wrong, a prompt is not text, or the state is of another model.
        """
        if not isinstance(prompt, Iterable):
            raise TextgenError(f"`prompt` must be a text or a list of texts: {str(prompt)[:40]}")
        prompts, n = [prompt] if isinstance(prompt, str) else list(prompt), _plain(n)
        if type(n) is not int or n < 1:
            raise TextgenError(f"`n` must be an integer of at least 1: {n}")
        requests = self._requests(prompts, n, config, state, label, settings)
        with _user_errors():
            samples = {index: event for index, event in self._events(requests) if isinstance(event, Sample)}
        ordered = [samples[index] for index in range(len(requests))]
        return ordered if details else [sample.text for sample in ordered]

    def stream(
        self,
        prompt: str = "",
        *,
        config: SamplingConfig | None = None,
        state: ReadState | None = None,
        label: str | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Return the pieces of one continuation as they are drawn; joined they are the text of `generate`.

        Args and errors are those of `generate`. A piece is whole characters and never empty.
        """
        # wrong input fails here, not at the first piece
        requests = self._requests([prompt], 1, config, state, label, settings)
        return (event for _, event in self._events(requests) if isinstance(event, str))

    def read(self, text: str, *, state: ReadState | None = None, label: str | None = None) -> ReadState:
        """Read a text once, for many continuations and scores.

        `generate(b, state=read(a))` is, bit for bit, `generate(a + b)`, wherever the text is cut. `state.save(path)`
        keeps the state in a file.

        Args:
            text: at least one character that is not a space.
            state: the text before it, from an earlier `read`.
            label: of the whole text, one of `labels`; not with `state`.

        Raises:
            TextgenError: the text is empty or not text, the state is of another model, or the label is unknown.
        """
        begin = self._begin(label, state)
        if not self._text(text, "`text`", after=state) or not text:
            raise TextgenError("`text` is empty: there is nothing to read")
        return read_prompt(
            self._decoder, self._tokenizer, text, normalization=self._normalization, after=state, begin=begin
        )

    def load_state(self, path: str | os.PathLike[str]) -> ReadState:
        """Read a state from the file that its `save` has written, in this process or in another one.

        Raises:
            TextgenError: the file cannot be read, is damaged, or is of another model, tokenizer or device.
        """
        if not isinstance(path, str | os.PathLike):
            raise TextgenError(f"`path` must be the path of a file: {str(path)[:40]}")
        with _user_errors():
            return read_state(Path(path), self._decoder, self._tokenizer, normalization=self._normalization)

    @overload
    def score(
        self,
        text: str,
        *,
        state: ReadState | None = ...,
        label: str | None = ...,
        end: bool = ...,
        alternatives: int | None = ...,
    ) -> TextScore: ...
    @overload
    def score(
        self,
        text: list[str] | tuple[str, ...],
        *,
        state: ReadState | None = ...,
        label: str | None = ...,
        end: bool = ...,
        alternatives: int | None = ...,
    ) -> list[TextScore]: ...
    def score(
        self,
        text: str | list[str] | tuple[str, ...],
        *,
        state: ReadState | None = None,
        label: str | None = None,
        end: bool = True,
        alternatives: int | None = None,
    ) -> TextScore | list[TextScore]:
        """Return the log-probability of each token of a text, and its bits per byte; of a list of texts, a list.

        The model itself computes them in float32, whatever the decoder, as `textgen evaluate` does. Texts of a list
        are read side by side, which is faster and changes a score by rounding only.

        Args:
            text: at least one character that is not a space.
            state: the text before it, from `read`; it is not scored.
            label: of the text, one of `labels`; not with `state`.
            end: score the end of the text too, as a whole document; False for a part of a document.
            alternatives: also report the rank of each token, and this many of the likeliest tokens at its place.

        Raises:
            TextgenError: a text is empty or not text, the state is of another model, or the tokenizer loses text.
        """
        begin = self._begin(label, state)
        alternatives = _plain(alternatives)
        if alternatives is not None and (type(alternatives) is not int or alternatives < 0):
            raise TextgenError(f"`alternatives` must be an integer of at least 0, or None: {str(alternatives)[:40]}")
        if not isinstance(text, str | list | tuple):
            raise TextgenError(f"`text` must be a text or a list of texts: {str(text)[:40]}")
        texts = [self._text(one, "`text`") for one in ([text] if isinstance(text, str) else text)]
        if "" in texts:
            raise TextgenError("`text` is empty: there is nothing to score")
        if not self._tokenizer.is_lossless:
            raise TextgenError(f"`{self.path}` has a word tokenizer, which loses text: it has no bits per byte")
        scores = score_stream(
            self._decoder,
            self._tokenizer,
            texts,
            batch_size=BATCH_SIZE,
            end=end,
            read=state,
            num_top=alternatives,
            begin=begin,
        )
        return next(scores) if isinstance(text, str) else list(scores)

    @overload
    def classify(  # type: ignore[overload-overlap]  # a str is a sequence of texts too
        self,
        text: str,
        *,
        head: str | os.PathLike[str] | None = ...,
        priors: Mapping[str, float] | None = ...,
        temperature: float | None = ...,
    ) -> Classification: ...
    @overload
    def classify(
        self,
        text: Sequence[str],
        *,
        head: str | os.PathLike[str] | None = ...,
        priors: Mapping[str, float] | None = ...,
        temperature: float | None = ...,
    ) -> list[Classification]: ...
    def classify(
        self,
        text: str | Sequence[str],
        *,
        head: str | os.PathLike[str] | None = None,
        priors: Mapping[str, float] | None = None,
        temperature: float | None = None,
    ) -> Classification | list[Classification]:
        """Find the label of a text, or of several: the one under which a text takes the fewest bits.

        Args:
            text: whole texts, as the model was trained on; at least one character each that is not a space.
            head: folder of a head of this model, from `textgen classify --train`, which judges instead.
            priors: weight of each label before a text is read; equal ones by default.
            temperature: divides the scores, which are too sure of long texts; default 1, or that of the head. `textgen
                classify --calibrate` finds it.

        Raises:
            TextgenError: the model has no labels, a text is empty or not text, or the head is of another model.
        """
        if not isinstance(text, Iterable):
            raise TextgenError(f"`text` must be a text or a list of texts: {str(text)[:40]}")
        texts = [text] if isinstance(text, str) else list(text)
        for one in texts:
            if not self._text(one, "`text`"):
                raise TextgenError("`text` is empty: there is nothing to classify")
        model = self._decoder.model
        with _user_errors():
            own = None if head is None else read_head(Path(head), model, weights_sha256=weights_sha256(self.path))
            classifier = new_classifier(
                model, self._tokenizer, name=str(self.path), head=own, priors=priors, temperature=temperature
            )
            found, _ = classifier.classify(texts)
        return found[0] if isinstance(text, str) else found

    def _events(self, requests: Sequence[Request]) -> Iterator[tuple[int, str | Sample]]:
        return generate_stream(self._decoder, self._tokenizer, requests, batch_size=BATCH_SIZE)

    def _requests(
        self,
        prompts: Sequence[str],
        n: int,
        config: SamplingConfig | None,
        state: ReadState | None,
        label: str | None,
        settings: Mapping[str, Any],
    ) -> list[Request]:
        """Return the requests of samples, checked."""
        begin = self._begin(label, state)
        known = [field.name for field in dataclasses.fields(SamplingConfig)]
        if unknown := [name for name in settings if name not in known]:
            raise TextgenError(unknown_setting(unknown[0], known))
        if config is not None and not isinstance(config, SamplingConfig):
            raise TextgenError(f"`config` must be a SamplingConfig: {str(config)[:40]}")
        try:
            made = build_settings(SamplingConfig, dataclasses.asdict(config or SamplingConfig()) | _plain(settings))
            made = normalize_settings(made, self._normalization)
            require_drawable(made, self._tokenizer)
            require_label(made, begin, self._tokenizer)
        except ValueError as error:
            raise TextgenError(str(error)) from None
        texts = [
            self._text(prompt, "`prompt`", hint="; an empty prompt starts a text", after=state) for prompt in prompts
        ]
        return list(number_requests(((text, made, label) for text in texts), n, read=state))

    def _text(self, text: object, name: str, *, hint: str = "", after: ReadState | None = None) -> str:
        """Return a user's text, after that of a state, normalized like the training text.

        Raises:
            TextgenError: the value is not text, or the whole is only spaces.
        """
        if not isinstance(text, str):
            raise TextgenError(f"{name} must be a text: {str(text)[:40]}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise TextgenError(f"{name} holds a lone surrogate, which is not valid text") from None
        text = text if after is None else after.text + text
        if text.isspace():  # the tokenizer reads it as an empty one
            raise TextgenError(f"{name} is only spaces{hint}")
        return normalize(text, self._normalization)

    def _begin(self, label: object, state: ReadState | None) -> int:
        """Return the first input of a text; refuse a label beside a state, and a state of another model."""
        if label is not None and not isinstance(label, str):
            raise TextgenError(f"`label` must be a text: {str(label)[:40]}")
        begin = begin_id(self._decoder.model, self._tokenizer, label)
        if state is None:
            return begin
        if label is not None:
            raise TextgenError(f"`label` {label} comes before the text of `state`: give it to the `read` of that text")
        if not isinstance(state, ReadState):
            raise TextgenError(f"`state` must be a result of `read`: {str(state)[:40]}")
        if state.decoder is not self._decoder:
            raise TextgenError("`state` is of another model: call this model's `read`")
        return state.ids[0]
