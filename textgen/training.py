"""Training: build or resume, then step, log, evaluate, save."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import Tensor, nn

from textgen import launch
from textgen.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoints,
    gather_lanes,
    load_optimizer,
    optimizer_tensors,
    own_lanes,
    prune,
    read_tensors,
    read_trainer,
    save_checkpoint,
)
from textgen.config import SamplingConfig, TrainConfig
from textgen.corpus import normalize
from textgen.data import Epoch, TokenStore, build_loader, prepare_store, windows_per_epoch
from textgen.evaluation import Score, score, split_documents
from textgen.generation import sample_all
from textgen.launch import LaunchError
from textgen.model import DropoutMasks, LSTMLanguageModel, State
from textgen.optim import build_optimizer, learning_rate
from textgen.report import draw_loss_curve
from textgen.tracking import Progress, Tracker, say

log = logging.getLogger("textgen")

# Settings that may differ between a checkpoint and its resumption: they change what is told or kept, not what is
# learnt. Data and tokenizer are compared by content (`compare_settings`).
HARMLESS = {
    "run_dir", "log_every", "keep_last", "resume", "resume_override", "dry_run", "sample_prompts",
    "sample_temperatures", "sample_tokens", "tracking", "evaluate_every",
    "evaluate_documents", "gradient_accumulation_steps",
}  # fmt: skip

# Share of `max_minutes` that is spent on timing steps, at most; they are not counted and leave no trace.
TIMING_SHARE = 0.05


class TrainingError(ValueError):
    """A training that cannot go on; the message is one line."""


@dataclass(kw_only=True)
class Progression:
    """The training state beside weights and optimizer: plain numbers, saved as JSON."""

    step: int = 0
    total_steps: int
    epoch_nats: float = 0.0
    epoch_tokens: int = 0
    best_loss: float = math.inf
    best_step: int | None = None
    evaluations_without_better: int = 0
    finished: bool = False


@dataclass(kw_only=True)
class Training:
    """What outlives a step."""

    config: TrainConfig
    accelerator: Accelerator
    store: TokenStore
    bare: LSTMLanguageModel
    model: nn.Module
    """`bare` as Accelerate prepared it"""
    optimizer: AcceleratedOptimizer
    progression: Progression
    average: LSTMLanguageModel | None = None
    """holds the averaged weights, where they are wanted"""
    lane_states: list[State] = field(default_factory=list)
    """LSTM state of this process's lanes, one entry per micro-batch"""
    wandb_id: str | None = None

    @property
    def best_weights(self) -> LSTMLanguageModel:
        """The model to score, sample and publish."""
        return self.average or self.bare


def train(config: TrainConfig) -> None:
    """Train as the config says, or go on where the run's newest checkpoint stands. Collective.

    Raises:
        CorpusError, DataError, TokenizerError, LaunchError, CheckpointError, TrainingError: what is wrong, in a line.
    """
    accelerator = launch.start(
        config.mixed_precision,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    log.info("%s", launch.describe(accelerator))
    store = prepare_store(config.data, config.tokenizer)
    launch.assert_same(accelerator, store.training_key, "the training text")
    training = build(config, accelerator, store)
    if config.dry_run:
        describe_cost(training)
        accelerator.end_training()
        return
    resumed = resume(training)
    if resumed and training.progression.finished:
        say_main(accelerator, f"`{config.run_dir}` has finished at step {training.progression.step}: nothing to do")
        accelerator.end_training()
        return
    if resumed:
        log.info("resuming at step %d", training.progression.step)
    elif config.max_minutes is not None:
        training.progression.total_steps = min(training.progression.total_steps, fit_steps(training))
    if accelerator.is_main_process:
        write_run_files(training)
    settings = asdict(config) | {"parameters": training.bare.num_parameters}
    tracker = Tracker(
        accelerator, config.tracking, Path(config.run_dir), settings,
        wandb_id=training.wandb_id, first_step=training.progression.step,
    )  # fmt: skip
    training.wandb_id = tracker.wandb_id
    log.info("%s", describe_training(training))
    try:
        run_steps(training, tracker)
    finally:
        tracker.finish()
    accelerator.end_training()


def build(config: TrainConfig, accelerator: Accelerator, store: TokenStore) -> Training:
    """Build model, optimizer and the counting of steps."""
    set_seed(config.seed)
    text = {"tokenizer_sha256": store.tokenizer.sha256, "normalization": store.record["normalization"]}
    counts = store.unigram_counts
    bare = LSTMLanguageModel(config.model, len(counts), unigram_counts=counts, text=text)
    optimizer = build_optimizer(bare, config, accelerator.device)
    assert_precision(bare, accelerator)
    model, prepared = accelerator.prepare(bare, optimizer)
    average = None
    if config.ema_decay is not None:
        average = LSTMLanguageModel(config.model, len(counts), text=text).to(accelerator.device).requires_grad_(False)
        average.load_state_dict(bare.state_dict())
    if config.early_stopping_patience is not None and "validation" not in store.record["splits"]:
        raise TrainingError("`early_stopping_patience` needs a validation split, and the data has none")
    total = config.max_epochs * steps_per_epoch(config, store)
    return Training(
        config=config, accelerator=accelerator, store=store, bare=bare, model=model, optimizer=prepared,
        average=average, progression=Progression(total_steps=min(total, config.max_steps or total)),
    )  # fmt: skip


def assert_precision(model: LSTMLanguageModel, accelerator: Accelerator) -> None:
    """Raise LaunchError in the first forward pass if the LSTM does not compute in the dtype that was asked for."""
    wanted = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]

    def check(_module: nn.Module, _inputs: object, output: tuple[Tensor, State]) -> None:
        handle.remove()
        if output[0].dtype != wanted:
            raise LaunchError(f"the LSTM computes in {output[0].dtype}, wanted {wanted}")

    handle = model.layers[0].register_forward_hook(check)


def steps_per_epoch(config: TrainConfig, store: TokenStore) -> int:
    """Return the optimizer steps of one epoch; raise DataError where the text is too short for one."""
    return windows_per_epoch(store.split("train"), batch_size=config.batch_size, seq_len=config.seq_len)


# --- the loop --------------------------------------------------------------------------------------------------------


def run_steps(training: Training, tracker: Tracker) -> None:
    """Take all remaining steps: log, evaluate, sample and save by the way. Collective."""
    config, accelerator, now = training.config, training.accelerator, training.progression
    per_epoch = steps_per_epoch(config, training.store)
    step_tokens = config.batch_size * config.seq_len
    # nats per token to bits per byte; a tokenizer that loses text has none
    lossless = training.store.tokenizer.is_lossless
    bits_per_nat = 1 / math.log(2) / training.store.bytes_per_token("train") if lossless else None
    bar = Progress(total=now.total_steps, done=now.step, main=accelerator.is_main_process)
    nats, since, waited, mark = torch.zeros((), device=accelerator.device), 0, 0.0, time.perf_counter()
    stop = False
    for micro_batches, waiting in step_batches(training, now.total_steps):
        nats += train_step(training, micro_batches)
        now.step, since, waited = now.step + 1, since + 1, waited + waiting
        last = now.step == now.total_steps
        epoch_end = now.step % per_epoch == 0
        evaluating = last or now.step % (config.evaluate_every or per_epoch) == 0
        if now.step % config.log_every == 0 or evaluating or epoch_end:
            total = float(accelerator.reduce(nats, "sum"))
            if not math.isfinite(total):
                raise TrainingError(f"the loss turned to {total} by step {now.step}; the last checkpoint is untouched")
            loss, seconds = total / (since * step_tokens), time.perf_counter() - mark
            now.epoch_nats, now.epoch_tokens = now.epoch_nats + total, now.epoch_tokens + since * step_tokens
            values = {
                "tokens": now.step * step_tokens,
                "train/loss": loss,
                **({"train/bits_per_byte": loss * bits_per_nat} if bits_per_nat else {}),
                "train/learning_rate": learning_rate(now.step - 1, now.total_steps, config),
                "train/tokens_per_second": since * step_tokens / seconds,
                "train/data_share": waited / seconds,
            }
            tracker.log(now.step, values)
            bar.update(now.step, values)
            nats.zero_()
            since, waited = 0, 0.0
            mark = time.perf_counter()
        if epoch_end or last:
            average = now.epoch_nats / now.epoch_tokens
            say_main(
                accelerator,
                f"Epoch [{math.ceil(now.step / per_epoch)}/{math.ceil(now.total_steps / per_epoch)}], "
                f"Avg Loss: {average:.4f}" + (f" ({average * bits_per_nat:.4f} bits per byte)" if bits_per_nat else ""),
            )
        if epoch_end:
            now.epoch_nats, now.epoch_tokens = 0.0, 0
        if evaluating:
            stop = evaluate_and_save(training, tracker)
            mark = time.perf_counter()
        if stop:
            break
    bar.close()


def step_batches(training: Training, until: int) -> Iterator[tuple[list[dict[str, Tensor]], float]]:
    """Yield each remaining step's micro-batches, dealt to this process by Accelerate, and the seconds waited for them.

    Sets the lanes' states to zero at the start of an epoch.
    """
    config, now = training.config, training.progression
    split = training.store.split("train")
    per_epoch = steps_per_epoch(config, training.store)
    micro = config.gradient_accumulation_steps
    while now.step < until:
        started = time.perf_counter()
        number, window = divmod(now.step, per_epoch)
        epoch = Epoch(split, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.seed, epoch=number)
        last = min(per_epoch, window + until - now.step)
        loader = training.accelerator.prepare(
            build_loader(epoch, micro_batches=micro, first_window=window, last_window=last)
        )
        if window == 0 or not training.lane_states:
            rows = config.batch_size // (micro * training.accelerator.num_processes)
            training.lane_states = [training.bare.zero_state(rows) for _ in range(micro)]
        batches = iter(loader)
        try:
            for _ in range(window, last):
                micro_batches = list(islice(batches, micro))
                yield micro_batches, time.perf_counter() - started
                started = time.perf_counter()
        finally:
            # Accelerate keeps every loader it has prepared, and with it the epoch's order of documents
            training.accelerator._dataloaders.remove(loader)


def train_step(training: Training, micro_batches: Sequence[dict[str, Tensor]], *, rate: float | None = None) -> Tensor:
    """Take one optimizer step. Collective.

    Each micro-batch's nats are summed and divided once by the step's tokens over all processes, so that neither the
    number of processes nor of micro-batches shows in the gradient.

    Args:
        training: weights, optimizer and lane states are changed in place.
        micro_batches: this process's rows of each.
        rate: overrides the learning rate of the step.

    Returns:
        Nats summed over this process's tokens, on the device: nothing waits for it.
    """
    config, accelerator, model = training.config, training.accelerator, training.model
    step = training.progression.step
    scale = accelerator.num_processes / (config.batch_size * config.seq_len)  # DDP averages over processes
    nats = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(micro_batches):
        masks = DropoutMasks(config.seed, step, batch["lanes"]) if config.model.dropout else None
        with accelerator.no_sync(model) if i + 1 < len(micro_batches) else nullcontext():
            part, (hidden, cell) = model(batch["tokens"], training.lane_states[i], batch["targets"], masks=masks)
            accelerator.backward(part * scale)
        training.lane_states[i] = hidden.detach(), cell.detach()
        nats += part.detach()
    if config.max_grad_norm is not None:
        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(step, training.progression.total_steps, config) if rate is None else rate
    training.optimizer.step()
    training.optimizer.zero_grad()
    if training.average is not None and rate is None:
        assert config.ema_decay is not None
        decay = min(config.ema_decay, (1 + step) / (10 + step))  # early weights are soon forgotten
        averaged: list[Tensor] = list(training.average.parameters())
        current: list[Tensor] = list(training.bare.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)
    return nats


def evaluate_and_save(training: Training, tracker: Tracker) -> bool:
    """Score the validation split, write a checkpoint, sample; return whether training should stop. Collective.

    Raises:
        TrainingError: a weight is not finite.
    """
    config, accelerator, now = training.config, training.accelerator, training.progression
    if not all(bool(parameter.isfinite().all()) for parameter in training.bare.parameters()):
        raise TrainingError(f"the weights turned to nan or inf by step {now.step}; the last checkpoint is untouched")
    score = evaluate(training, config.evaluate_documents)
    now.evaluations_without_better += 1
    patience = config.early_stopping_patience
    stop = False
    if score is not None:
        if score.nats_per_token < now.best_loss:
            now.best_loss, now.best_step, now.evaluations_without_better = score.nats_per_token, now.step, 0
        stop = patience is not None and now.evaluations_without_better >= patience
        if (stop or now.step == now.total_steps) and config.evaluate_documents is not None:
            score = evaluate(training, None) or score  # the figure to report; the best one is chosen by like measures
        lossless = training.store.tokenizer.is_lossless
        values = {"valid/loss": score.nats_per_token}
        tracker.log(now.step, values | ({"valid/bits_per_byte": score.bits_per_byte} if lossless else {}))
        say_main(
            accelerator,
            f"step {now.step}: valid loss {score.nats_per_token:.4f}"
            + (f", {score.bits_per_byte:.4f} bits per byte" if lossless else "")
            + f" ({score.documents} documents, {score.seconds:.0f} s)",
        )
    if stop:
        say_main(accelerator, f"stopping early: no better validation loss in {patience} evaluations")
    now.finished = stop or now.step == now.total_steps
    save(training)
    if accelerator.is_main_process:
        write_samples(training)
        try:
            draw_loss_curve({"": Path(config.run_dir)}, Path(config.run_dir) / "loss.png")
        except Exception as error:  # a picture is no reason to end a training
            log.warning("no loss.png: %s", error)
    return stop


def evaluate(training: Training, limit: int | None) -> Score | None:
    """Score the validation split, if there is one. Collective."""
    if "validation" not in training.store.record["splits"]:
        return None
    documents, num_bytes = split_documents(training.store.split("validation"), limit)
    bos_id = training.store.tokenizer.bos_id
    return score(training.accelerator, training.best_weights, documents, num_bytes, bos_id=bos_id, progress=True)


def write_samples(training: Training) -> None:
    """Append samples at every temperature to samples.md."""
    config, model = training.config, training.best_weights
    if not config.sample_prompts:
        return
    model.eval()
    prompts = [normalize(prompt, model.text["normalization"]) for prompt in config.sample_prompts]
    lines = [f"## step {training.progression.step}\n"]
    for temperature in config.sample_temperatures:
        sampling = SamplingConfig(temperature=temperature, max_new_tokens=config.sample_tokens, seed=config.seed)
        for sample in sample_all(model, training.store.tokenizer, prompts, sampling):
            lines.append(f"- temperature {temperature}: **{sample.prompt}**{sample.text}")
    with open(Path(config.run_dir) / "samples.md", "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")
    model.train()


# --- saving and resuming ---------------------------------------------------------------------------------------------


def save(training: Training) -> None:
    """Write a checkpoint of this step. Collective: LSTM states are gathered."""
    config, accelerator, now = training.config, training.accelerator, training.progression
    lanes = gather_lanes(accelerator, training.lane_states)
    if accelerator.is_main_process:
        tensors = {"lanes": lanes, "optimizer": optimizer_tensors(training.bare, training.optimizer)}
        if training.average is not None:
            tensors["weights"] = training.bare.state_tensors()
        trainer = {
            "progression": asdict(now),
            "config": asdict(config),
            "mixed_precision": accelerator.mixed_precision,
            "data": training.store.training_key,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "wandb_id": training.wandb_id,
        }
        save_checkpoint(
            checkpoint_path(Path(config.run_dir), now.step), model=training.best_weights,
            tokenizer=training.store.tokenizer, trainer=trainer, tensors=tensors,
        )  # fmt: skip
        prune(Path(config.run_dir), keep_last=config.keep_last, best_step=now.best_step)
    accelerator.wait_for_everyone()


def resume(training: Training) -> bool:
    """Load the checkpoint that `resume` names, if any; return whether there was one.

    Raises:
        CheckpointError: it cannot be read, or settings that change the result differ.
    """
    config, accelerator = training.config, training.accelerator
    newest = next(checkpoints(Path(config.run_dir)), None)
    if config.resume == "never":
        if newest is not None:
            raise CheckpointError(
                f"`{config.run_dir}` holds a training and `--resume never` would overwrite it: "
                "remove it or name another `--run_dir`"
            )
        return False
    if config.resume == "auto":
        if newest is None:
            return False
        directory = newest[1]
    else:
        directory = Path(config.resume)
    trainer = read_trainer(directory)
    compare_settings(training, trainer, directory)
    try:
        then = Progression(**trainer["progression"])
        training.wandb_id = trainer["wandb_id"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"`{directory}` is of another version of textgen: {error}") from error
    if newest is not None and newest[0] > then.step:
        raise CheckpointError(
            f"`{config.run_dir}` holds checkpoints up to step {newest[0]}, newer than `{directory}`: "
            "remove them or name another `--run_dir`"
        )
    total = training.progression.total_steps
    if config.max_minutes is not None:
        same = trainer["config"].get("max_minutes") == config.max_minutes
        total = min(total, then.total_steps if same else fit_steps(training))
    if total != then.total_steps:
        then.total_steps, then.finished = total, then.step >= total
    training.progression = then
    weights = "weights" if (directory / "weights.safetensors").exists() else "model"  # not averaged, averaged
    training.bare.load_tensors(read_tensors(directory, weights))
    if training.average is not None:
        training.average.load_tensors(read_tensors(directory, "model"))
    load_optimizer(training.bare, training.optimizer, read_tensors(directory, "optimizer"))
    lanes = read_tensors(directory, "lanes")
    state = lanes["hidden"], lanes["cell"]
    if len(state[0][0]) == config.batch_size:  # else `resume_override` starts the lanes from zero
        training.lane_states = own_lanes(accelerator, state, config.gradient_accumulation_steps)
    if accelerator.scaler and trainer["scaler"]:
        accelerator.scaler.load_state_dict(trainer["scaler"])
    return True


def compare_settings(training: Training, trainer: dict[str, Any], directory: Path) -> None:
    """Raise CheckpointError where a setting that changes the result is not the checkpoint's; note the other ones."""
    config = training.config
    defaults = _dotted(json.loads(json.dumps(asdict(TrainConfig()))))  # of settings younger than the checkpoint
    then, now = defaults | _dotted(trainer["config"]), _dotted(json.loads(json.dumps(asdict(config))))
    then["mixed_precision"], now["mixed_precision"] = trainer["mixed_precision"], training.accelerator.mixed_precision
    harmless = HARMLESS
    if config.lr_schedule == "constant":
        harmless = harmless | {"max_steps", "max_epochs", "max_minutes"}  # no step depends on how many there will be
    if trainer["data"] == training.store.training_key:
        harmless = harmless | {"data", "tokenizer"}  # however they were asked for, the tokens are the same
    elif all(now[name] == then[name] for name in now if name.startswith(("data.", "tokenizer."))):
        then["training text"], now["training text"] = trainer["data"], training.store.training_key
    for name in now:
        if now[name] == then[name]:
            continue
        message = f"`{name}` is {now[name]}, `{directory}` was made with {then[name]}"
        if name.split(".")[0] not in harmless and not config.resume_override:
            raise CheckpointError(
                f"{message}: `--resume_override` goes on all the same, another `--run_dir` starts anew"
            )
        if name not in HARMLESS:
            log.info("%s", message)


def _dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under the names of their flags."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


# --- what a training costs -------------------------------------------------------------------------------------------


def time_steps(training: Training, *, budget_seconds: float, at_least: int = 2, at_most: int = 200) -> float:
    """Return the median seconds of a few steps that leave no trace: learning rate 0, Adam's state cleared after."""
    seconds: list[float] = []
    scaler = training.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else {}
    started = time.perf_counter()
    for micro_batches, _ in step_batches(training, training.progression.step + at_most):
        before = time.perf_counter()
        nats = train_step(training, micro_batches, rate=0.0)
        nats.item()  # wait for the device
        seconds.append(time.perf_counter() - before)
        spent = time.perf_counter() - started > budget_seconds
        enough = (spent and len(seconds) >= at_least) or len(seconds) == at_most
        if float(training.accelerator.reduce(torch.tensor(float(enough), device=nats.device), "sum")) > 0:
            break
    training.optimizer.state.clear()
    training.lane_states = []
    if scaler is not None:
        scaler.load_state_dict(scale)
    return sorted(seconds[1:] or seconds)[len(seconds[1:]) // 2]  # the first one warms up


def fit_steps(training: Training) -> int:
    """Return how many steps fit into `max_minutes`: timed once, decided by the main process. Collective."""
    config, accelerator = training.config, training.accelerator
    assert config.max_minutes is not None
    budget = config.max_minutes * 60
    seconds = time_steps(training, budget_seconds=budget * TIMING_SHARE)
    decided = torch.tensor(max(int(budget / seconds), 1), device=accelerator.device)
    if not accelerator.is_main_process:
        decided.zero_()
    steps = int(accelerator.reduce(decided, "sum"))
    log.info("%d steps of %.3f s fit into %g minutes", steps, seconds, config.max_minutes)
    return steps


def describe_training(training: Training) -> str:
    """Return what is about to be trained, in a line."""
    config, store, now = training.config, training.store, training.progression
    return (
        f"{training.bare.num_parameters:,} parameters, {store.split('train').num_tokens:,} training tokens of "
        f"{store.bytes_per_token('train'):.2f} bytes, {config.batch_size} x {config.seq_len} tokens per step, "
        f"steps {now.step} to {now.total_steps}, {steps_per_epoch(config, store)} per epoch"
    )


def describe_cost(training: Training) -> None:
    """Print what the training would cost, from two steps. Collective."""
    seconds = time_steps(training, budget_seconds=0.0)
    accelerator, steps = training.accelerator, training.progression.total_steps
    if accelerator.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        import resource

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if training.config.max_minutes is not None:
        steps = min(steps, max(int(training.config.max_minutes * 60 / seconds), 1))
    say_main(
        accelerator,
        f"dry run: {describe_training(training)}\n"
        f"{steps:,} steps of {seconds:.3f} s: {steps * seconds / 3600:.2f} hours, "
        f"{memory / 2**30:.2f} GiB of memory at its peak so far per process; nothing was written but the token store",
    )


def write_run_files(training: Training) -> None:
    """Write config.yaml of the run, before its first step."""
    run_dir = Path(training.config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(training.config)))  # tuples become lists, as the parser wants them
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    (run_dir / "data.json").write_text(json.dumps(training.store.record, indent=2) + "\n")


def say_main(accelerator: Accelerator, message: str) -> None:
    """Print a result once."""
    if accelerator.is_main_process:
        say(message)
