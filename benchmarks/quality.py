"""What the levers of a recipe are worth: `python -m benchmarks.quality levers --jobs 2`.

Every recipe is trained by textgen's own code over a fixed number of steps, one thread per run, from several seeds, and
scored in bits per byte on validation reviews. Runs with the same seed read the same text in the same order, so that
recipes are compared seed by seed. A finished run is a line of `benchmarks/results/quality.jsonl` and is not repeated.

`python -m benchmarks.quality guard` trains the small run of `make quality` and compares it with what is recorded.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.cells import CELLS, drop_embeddings, in_place_of_layers
from benchmarks.machine import RESULTS
from textgen.commands.parsing import parse_train_config
from textgen.config import DataConfig, ModelConfig, TrainConfig
from textgen.data.corpus import held_out_blocks, open_corpus
from textgen.data.store import prepare_store
from textgen.distributed import launch
from textgen.distributed.signals import StopSignals
from textgen.evaluation import score, split_documents
from textgen.model.lstm import LSTMLanguageModel, LSTMLayer
from textgen.settings import build_settings
from textgen.training.setup import build
from textgen.training.start import start_from_neighbours
from textgen.training.step import Learner, step_batches, train_step, zero_lanes

PRESETS = Path(__file__).parents[1] / "launch" / "presets"
CACHE = Path("~/.cache/textgen").expanduser()
QUICK: dict[str, Any] = {
    "data.source": "package", "tokenizer.vocab_size": 4000, "model.embedding_dim": 256, "model.num_layers": 1,
    "batch_size": 32, "seq_len": 32, "learning_rate": 0.01, "lr_schedule": "linear", "warmup_steps": 100,
    "max_grad_norm": 1.0,
}  # fmt: skip
SPREAD = 0.004
"""standard deviation of a seed, about: laws that miss runs by less are not told apart"""
REVIEWS = {0: 71_210, 1: 22_323, 3: 7_450, 10: 2_232}
"""that are trained on, by subset"""
TOKENS_A_REVIEW = 363
"""at `quick`'s 4,000 pieces"""
MOST_PASSES = 3.5
"""over the text in a run that laws are fitted to: beyond, models of this scale unlearn, of which laws know nothing"""
SMALL: dict[str, Any] = {"tokenizer.vocab_size": 500, "model.embedding_dim": 128, "model.hidden_size": 192}


@dataclass(frozen=True)
class Recipe:
    """Settings by dotted name, and what is taken away that is no setting."""

    settings: Mapping[str, Any]
    without: str | None = None
    instead: str | None = None
    """one of `benchmarks.cells` in place of the layers, or `embedding dropout`"""
    subset: int | None = None
    """train on every so many-th review only; 0 for all and the unlabelled ones beside them"""
    neighbours: bool = False
    """start the embedding from the neighbours of tokens, as every training does since 2026-11-30; without it at random,
    as the runs before"""
    documents: int | None = 250
    """evenly spaced validation reviews that are scored; None for all"""

    def but(self, without: str | None = None, /, **settings: Any) -> Recipe:
        """Return this recipe with other settings; a double underscore stands for a dot."""
        changed = {name.replace("__", "."): value for name, value in settings.items()}
        return replace(self, settings={**self.settings, **changed}, without=without or self.without)


# --- recipes ---------------------------------------------------------------------------------------------------------


def levers() -> dict[str, Recipe]:
    """Return a small `quick`, with as many tokens per parameter (336,000 and 1M), and its levers one by one."""
    base = Recipe({**QUICK, **SMALL, "max_steps": 1000})
    joined: dict[str, Any] = {"model__layer_norm": True, "model__residual": True}
    return {
        "baseline": base,
        "peak rate 3e-3": base.but(learning_rate=0.003),
        "constant rate": base.but(lr_schedule="constant"),
        "constant rate of 3e-3": base.but(lr_schedule="constant", learning_rate=0.003),
        "constant rate of 3e-3, average 0.999": base.but(lr_schedule="constant", learning_rate=0.003, ema_decay=0.999),
        "cosine decay": base.but(lr_schedule="cosine"),
        "no warm-up": base.but(warmup_steps=0),
        "no clipping": base.but(max_grad_norm=None),
        "clipping at 0.25": base.but(max_grad_norm=0.25),
        "betas (0.9, 0.99)": base.but(adam_betas=(0.9, 0.99)),
        "average, 0.999": base.but(ema_decay=0.999),
        "L2 penalty 1e-5": base.but(weight_decay=1e-5),
        "embedding from neighbours": replace(base, neighbours=True),
        "no unigram bias": base.but("unigram bias"),
        "recurrent weights not orthogonal": base.but("orthogonal weights"),
        "forget gate at 0": base.but("open forget gate"),
        "input weights five times as large": base.but("small input weights"),
        "state reset at each window": base.but("carried state"),
        "windows of 16": base.but(seq_len=16, max_steps=2000),
        "windows of 64": base.but(seq_len=64, max_steps=500),
        "16 lanes": base.but(batch_size=16, max_steps=2000),
        "64 lanes": base.but(batch_size=64, max_steps=500),
        "untied": base.but(model__tie_weights=False),
        "2 layers": base.but(model__num_layers=2),
        "2 layers, LayerNorm and residual": base.but(model__num_layers=2, **joined),
        "3 layers": base.but(model__num_layers=3),
        "3 layers, LayerNorm and residual": base.but(model__num_layers=3, **joined),
        "1 layer, LayerNorm": base.but(model__layer_norm=True),
        "a layer of 288": base.but(model__hidden_size=288),
        "a layer of 128": base.but(model__hidden_size=128),
        "a layer of 128, no projection": base.but(model__hidden_size=128, model__projection=False),
        "dropout 0.1": base.but(model__dropout=0.1),
        "weight drop 0.2": base.but(model__weight_drop=0.2),
    }


def depth() -> dict[str, Recipe]:
    """Return stacks of layers at the small model's shape, at a rate that all of them bear."""
    base = levers()["baseline"].but(learning_rate=0.003, max_steps=2000)
    recipes = {"1 layer": base, "1 layer, LayerNorm": base.but(model__layer_norm=True)}
    for layers in (2, 3):
        for what in ((), ("layer_norm",), ("residual",), ("layer_norm", "residual")):
            settings = {f"model__{name}": True for name in what}
            recipes[f"{layers} layers{''.join(f', {name}' for name in what)}"] = base.but(
                model__num_layers=layers, **settings
            )
    return recipes


def regularization() -> dict[str, Recipe]:
    """Return ten epochs over 1.2 tokens per parameter, as `default` takes over 0.9: where dropout is to pay."""
    shape = {"tokenizer.vocab_size": 500, "model.embedding_dim": 64, "model.hidden_size": 192}
    steps = {"learning_rate": 0.006, "max_epochs": 10, "ema_decay": 0.999}
    base = Recipe({**QUICK, **shape, **steps}, subset=40, documents=None)
    recipes = {"nothing left out": base}
    for dropout, weight_drop in ((0.1, 0), (0.2, 0), (0, 0.2), (0, 0.4), (0.1, 0.2), (0.2, 0.2)):
        shares = {"dropout": dropout, "weight_drop": weight_drop}
        name = ", ".join(f"{name} {share}" for name, share in shares.items() if share)
        recipes[name] = base.but(**{f"model__{name}": share for name, share in shares.items() if share})
    recipes["L2 penalty 1e-5"] = base.but(weight_decay=1e-5)
    return recipes


def cells() -> dict[str, Recipe]:
    """Return other cells in place of the layer, and wider layers that multiply as much or have as many weights."""
    base = levers()["baseline"]
    named = {
        "the same cell, as a loop": "loop",
        "Mogrifier, 5 rounds": "mogrifier",
        "LayerNorm in the cell": "normalized",
        "exponential input gate": "exponential",
        "a feed-forward after the layer": "feed-forward",
        "embedding dropout 0.1": "embedding dropout",
    }
    recipes = {"baseline": base} | {name: replace(base, instead=cell) for name, cell in named.items()}
    return recipes | {f"a layer of {units}": base.but(model__hidden_size=units) for units in (256, 288)}


def cells_longer() -> dict[str, Recipe]:
    """Return what gained most of `cells` over four times the text."""
    chosen = ("baseline", "Mogrifier, 5 rounds", "LayerNorm in the cell", "a layer of 256")
    recipes = cells()
    return {name: recipes[name].but(max_steps=4000) for name in chosen}


def scaling() -> dict[str, Recipe]:
    """Return `quick` at several sizes, lengths and amounts of text; a law fitted to them is held against `held_out`."""
    grid = [(h, s, 1) for h in (128, 256, 512) for s in (1000, 2000, 4000, 8000)]
    grid += [(h, s, 3) for h in (128, 512) for s in (4000, 8000)]
    grid += [(h, s, 10) for h in (128, 512) for s in (2000, 4000, 8000)]
    return dict(_scaled(*each) for each in grid)


def held_out() -> dict[str, Recipe]:
    """Return larger runs, which a law from `scaling` has to predict."""
    return dict(_scaled(*each) for each in ((768, 8000, 1), (512, 16000, 0)))


def _scaled(units: int, steps: int, subset: int) -> tuple[str, Recipe]:
    """Return `quick` on a part of the text; recurrent weights are dropped where it is read three times or more."""
    settings = {**QUICK, "learning_rate": 0.006, "model.hidden_size": units, "max_steps": steps}
    if steps * 1024 >= 3 * TOKENS_A_REVIEW * REVIEWS[subset]:
        settings["model.weight_drop"] = 0.2
    text = f", {REVIEWS[subset]:,} reviews" if subset != 1 else ""
    return f"{units} units, {steps} steps{text}", Recipe(settings, subset=None if subset == 1 else subset)


GROUPS: dict[str, Callable[[], dict[str, Recipe]]] = {
    "levers": levers, "depth": depth, "regularization": regularization, "cells": cells, "cells_longer": cells_longer,
    "scaling": scaling, "held_out": held_out,
}  # fmt: skip


# --- one run ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def take_away(learner: Learner, what: str) -> None:
    """Undo a part of how a model begins."""
    layers = [layer for layer in learner.unwrapped_model.layers if isinstance(layer, LSTMLayer)]
    if what == "unigram bias":
        learner.unwrapped_model.output.bias.zero_()
    elif what == "orthogonal weights":
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight_hh)
    elif what == "small input weights":
        for layer in layers:
            layer.weight_ih.mul_(5)
    elif what == "open forget gate":
        for layer in layers:
            layer.bias.zero_()
    else:
        assert what == "carried state"


def subset_of_reviews(every: int, unlabelled: Path | None = None) -> DataConfig:
    """Write every so many-th packaged review into files, once, and return where: validation is the same for all.

    Args:
        every: 1 in how many; 0 for all, with the unlabelled reviews beside them.
        unlabelled: a parquet file of those, needed when the files are written.
    """
    home = CACHE / "quality" / f"every-{every}"
    if not (home / "valid").exists():
        texts = list(open_corpus(DataConfig(source="package")).splits["train"]())
        validation = {i for block in held_out_blocks(len(texts), 0.1, 4) for i in block}
        chosen = {
            "train": [text for i, text in enumerate(texts) if i % max(every, 1) == 0 and i not in validation],
            "valid": [texts[i] for i in sorted(validation)[::10]],
        }
        if every == 0:
            if unlabelled is None:
                raise SystemExit("error: --unlabelled is needed: a parquet file of IMDB's unlabelled reviews")
            (home / "unsupervised").mkdir(parents=True, exist_ok=True)
            shutil.copy(unlabelled, home / "unsupervised")
        for part, reviews in chosen.items():
            (home / part).mkdir(parents=True, exist_ok=True)
            (home / part / "reviews.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in reviews))
    splits = "train+unsupervised" if every == 0 else "train"
    return build_settings(DataConfig, {"source": "files", "files": [str(home)], "train_on": splits})


def settings_of(recipe: Recipe, seed: int) -> TrainConfig:
    """Return a recipe's settings with a seed."""
    nested: dict[str, Any] = {"seed": seed}
    for name, value in recipe.settings.items():
        part, _, rest = name.rpartition(".")
        (nested.setdefault(part, {}) if part else nested)[rest] = value
    if recipe.subset is not None:
        nested["data"] = subset_of_reviews(recipe.subset)
    return build_settings(TrainConfig, nested)


def train(
    config: TrainConfig,
    *,
    without: str | None = None,
    instead: str | None = None,
    neighbours: bool = False,
    documents: int | None = None,
) -> dict[str, Any]:
    """Train and score by textgen's own parts.

    Args:
        config: the settings.
        without: what is taken away that is no setting.
        instead: what stands in place of the layers; see `Recipe`.
        neighbours: whether the embedding starts from the neighbours of tokens.
        documents: validation reviews to score, evenly spaced; None for all.

    Returns:
        bits_per_byte on validation, and what the run took; `curve` holds the training loss in nats per token, averaged
        over each tenth of the steps.
    """
    started = time.perf_counter()
    accelerator = launch.start(config.mixed_precision)
    store = prepare_store(config.data, config.tokenizer, progress=False)
    with in_place_of_layers(instead) if instead in CELLS else nullcontext():
        training = build(config, accelerator, store, StopSignals())
    learner = training.learner
    if neighbours:
        start_from_neighbours(training)
    if without is not None:
        take_away(learner, without)
    if instead == "embedding dropout":
        drop_embeddings(learner)
    steps = learner.progression.total_steps
    tenths = torch.zeros(10, dtype=torch.float64)
    for micro_batches, _ in step_batches(learner, training.loader, steps):
        if without == "carried state":
            learner.lane_states = zero_lanes(learner)
        tenths[10 * learner.progression.step // steps] += float(train_step(learner, micro_batches))
        learner.progression.step += 1
    counts = torch.bincount(torch.arange(steps) * 10 // steps, minlength=10) * config.batch_size * config.seq_len
    trained = time.perf_counter() - started
    text = store.split("train")
    chosen, num_bytes = split_documents(store.split("validation"), documents)
    scored = score(accelerator, learner.eval_model, chosen, num_bytes, bos_id=store.tokenizer.bos_id)
    accelerator.free_memory()
    return {
        "bits_per_byte": scored.bits_per_byte, "curve": (tenths / counts).tolist(), "documents": scored.documents,
        "parameters": learner.unwrapped_model.num_parameters, "tokens": steps * config.batch_size * config.seq_len,
        "train_tokens": text.num_tokens, "train_bytes": int(text.num_bytes.sum(dtype=int)), "seconds": trained,
    }  # fmt: skip


def run(name: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train a recipe from a seed in this process, on one thread."""
    torch.set_num_threads(1)
    figures = train(
        settings_of(recipe, seed),
        without=recipe.without,
        instead=recipe.instead,
        neighbours=recipe.neighbours,
        documents=recipe.documents,
    )
    return {"recipe": name, **identity(recipe, seed), **figures}


def identity(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Return what makes a run the same as another one, as JSON gives it back."""
    told = {"seed": seed, "settings": dict(recipe.settings), "without": recipe.without, "subset": recipe.subset}
    told |= {"instead": recipe.instead, "scored": recipe.documents, "neighbours": recipe.neighbours}
    return dict(json.loads(json.dumps(told)))


# --- many runs -------------------------------------------------------------------------------------------------------


def run_all(
    recipes: Mapping[str, Recipe], seeds: Sequence[int], path: Path, *, jobs: int, unlabelled: Path | None = None
) -> None:
    """Take all runs that are not in the file yet, some at a time; all recipes from one seed before the next."""
    finished = [identity_of(row) for row in read(path)]
    wanted = [(name, recipe, seed) for seed in seeds for name, recipe in recipes.items()]
    wanted = [each for each in wanted if identity(each[1], each[2]) not in finished]
    for every in {recipe.subset for _, recipe, _ in wanted if recipe.subset is not None}:
        subset_of_reviews(every, unlabelled)  # once, not by each process
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, *each) for each in wanted]):
            row = future.result()
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            took = f"{row['bits_per_byte']:.4f} ({row['seconds']:.0f} s)"
            print(f"{row['recipe']}, seed {row['seed']}: {took}", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished runs of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def identity_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a finished run."""
    names = ("seed", "settings", "without", "instead", "subset", "scored")
    return {name: row.get(name) for name in names} | {"neighbours": row.get("neighbours", False)}


@dataclass(frozen=True)
class Recorded:
    """Bits per byte of several seeds."""

    mean: float
    spread: float
    """standard deviation of a seed"""

    def holds(self, bits: Sequence[float]) -> bool:
        """Tell whether the mean of some seeds lies within four standard deviations of such a mean."""
        return abs(statistics.fmean(bits) - self.mean) <= 4 * self.spread / math.sqrt(len(bits))


GUARD = Recipe(
    {**QUICK, "tokenizer.vocab_size": 500, "model.embedding_dim": 64, "model.hidden_size": 128, "seq_len": 8,
     "learning_rate": 0.01, "max_steps": 2500},
    subset=10,
    neighbours=True,
    documents=None,
)  # fmt: skip

RECORDED = Recorded(2.1849, 0.0040)
"""of seeds 1 to 5 (docs/evidence/experiments.md, 2026-11-30), whose spread was 0.0031; before, with random embeddings,
2.2045 and 0.0040"""


def guard(recipe: Recipe = GUARD, seeds: Sequence[int] = (1, 2)) -> list[float]:
    """Return bits per byte of a recipe, a process for each seed."""
    assert recipe.subset is not None
    subset_of_reviews(recipe.subset)  # once, not by each process
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(run, ["guard"] * len(seeds), [recipe] * len(seeds), seeds))
    return [row["bits_per_byte"] for row in rows]


def table(recipes: Mapping[str, Recipe], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table: mean, spread over seeds, and the mean difference to the first recipe seed by seed."""
    found: dict[str, dict[int, float]] = {}
    for name, recipe in recipes.items():
        same = identity(recipe, 0)
        alike = [row for row in rows if {**identity_of(row), "seed": 0} == same]
        found[name] = {row["seed"]: row["bits_per_byte"] for row in alike}
    baseline = next(iter(found.values()))
    yield "| recipe | seeds | bits per byte | standard deviation | difference, seed by seed |"
    yield "|---|---|---|---|---|"
    for name, by_seed in found.items():
        if by_seed:
            differences = [value - baseline[seed] for seed, value in by_seed.items() if seed in baseline]
            values = list(by_seed.values())
            mean = f"{statistics.fmean(values):.4f}"
            yield f"| {name} | {len(values)} | {mean} | {spread(values)} | {mean_of(differences)} |"


class Point(NamedTuple):
    """A run, as laws see it."""

    parameters: float
    """beside embedding and output layer"""
    read: float
    """bytes of text trained on, each time it is read counted"""
    unique: float
    """bytes of text there are"""
    bits: float
    """per byte of validation text"""


@dataclass(frozen=True)
class Law:
    """bits per byte = floor + of_size / parameters^size_exponent + of_text / text^text_exponent.

    The form is that of Hoffmann et al. 2022, section 3.3. Text that is read again is worth less each time
    (Muennighoff et al. 2023, section 3.1): u bytes that are read again r times count as
    u + u * patience * (1 - exp(-r / patience)).
    """

    floor: float
    of_size: float
    size_exponent: float
    of_text: float
    text_exponent: float
    patience: float

    def __call__(self, parameters: float, read: float, unique: float) -> float:
        """Predict bits per byte."""
        of_size = self.of_size * math.pow(parameters, -self.size_exponent)
        of_text = self.of_text * math.pow(worth(read, unique, self.patience), -self.text_exponent)
        return self.floor + of_size + of_text


def worth(read: float, unique: float, patience: float) -> float:
    """Return how many bytes of new text those that were read are worth."""
    if read <= unique:
        return read
    return unique - unique * patience * math.expm1((1 - read / unique) / patience)


def fit(points: Sequence[Point]) -> list[tuple[float, Law]]:
    """Fit laws to runs.

    Returns:
        Root mean square error and law for all exponents and patiences whose factors come out positive, the best first:
        all that fit about as well tell how far a prediction can be trusted.
    """
    parameters = np.array([point.parameters for point in points])
    bits = np.array([point.bits for point in points])
    laws = []
    for patience in (2.0, 4.0, 8.0, 16.0, 32.0):
        text = np.array([worth(point.read, point.unique, patience) for point in points])
        for a, b in product(np.arange(0.05, 1.55, 0.05).tolist(), repeat=2):
            columns = np.stack([np.ones(len(bits)), parameters**-a, text**-b], 1)
            scale = columns.max(0)
            factors = np.linalg.lstsq(columns / scale, bits, rcond=None)[0] / scale
            if (factors >= 0).all():
                error = float(np.sqrt(np.mean((columns @ factors - bits) ** 2)))
                floor, of_size, of_text = factors.tolist()
                laws.append((error, Law(floor, of_size, a, of_text, b, patience)))
    return sorted(laws, key=lambda law: law[0])


def points_of(recipes: Mapping[str, Recipe], rows: Sequence[Mapping[str, Any]]) -> dict[str, Point]:
    """Return what is there of some runs, averaged over seeds."""
    points = {}
    for name, recipe in recipes.items():
        found = [row for row in rows if {**identity_of(row), "seed": 0} == identity(recipe, 0)]
        if found:
            bits = statistics.fmean(row["bits_per_byte"] for row in found)
            unique = float(found[0]["train_bytes"])
            read = unique * found[0]["tokens"] / found[0]["train_tokens"]
            model = settings_of(replace(recipe, subset=None), 0).model  # whose text need not be here
            points[name] = Point(beside_embedding(model), read, unique, bits)
    return points


def describe_scaling(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what a law fitted to `scaling` says of larger runs and of `default`, and one fitted to all of them."""
    seen = points_of(scaling(), rows)
    if len(seen) < len(scaling()):
        yield "no law: not all of the smaller runs are there"
        return
    larger = points_of(held_out(), rows)
    default = parse_train_config(["--config", str(PRESETS / "default.yaml")])
    text = REVIEWS[0] / REVIEWS[1] * seen["512 units, 8000 steps"].unique
    target = {"default.yaml": Point(beside_embedding(default.model), 10 * text, text, math.nan)}
    yield from _predictions(list(seen.values()), {**larger, **target})
    if larger:
        yield from _predictions([*seen.values(), *larger.values()], target)


def _predictions(fitted: Sequence[Point], wanted: Mapping[str, Point]) -> Iterator[str]:
    """Yield the law that fits best, and what it and those that fit about as well predict."""
    usable = [point for point in fitted if point.read < MOST_PASSES * point.unique]
    laws = fit(usable)
    bearable = max(SPREAD, 2 * laws[0][0])
    alike = [law for error, law in laws if error <= bearable]
    error = f"root mean square error {laws[0][0]:.4f} of {len(usable)} runs"
    yield f"{laws[0][1]}, {error}; {len(alike)} laws within {bearable:.4f}"
    for name, point in wanted.items():
        told = [law(point.parameters, point.read, point.unique) for law in alike]
        met = "" if math.isnan(point.bits) else f", seen {point.bits:.4f}"
        yield f"{name}: predicted {told[0]:.4f} ({min(told):.4f} to {max(told):.4f}){met}"


def beside_embedding(model: ModelConfig) -> float:
    """Return the number of parameters beside embedding and output layer."""
    with torch.device("meta"):
        language_model = LSTMLanguageModel(model, 2)
    parts = (language_model.layers, language_model.norms, language_model.projection)
    return float(sum(p.numel() for part in parts for p in part.parameters()))


def spread(values: Sequence[float]) -> str:
    """Return the standard deviation as text."""
    return f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"


def mean_of(values: Sequence[float]) -> str:
    """Return a mean with its standard error as text."""
    if not any(values):
        return "-"
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.4f}{error}"


def main(argv: Sequence[str] | None = None) -> None:
    """Take the runs of a group that are missing, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=[*GROUPS, "guard"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], metavar="RECIPE", help="recipes, beside the first one")
    parser.add_argument("--file", type=Path, default=RESULTS / "quality.jsonl")
    parser.add_argument("--unlabelled", type=Path, help="parquet file of IMDB's unlabelled reviews, for held_out")
    asked = parser.parse_args(argv)
    if asked.group == "guard":
        bits = guard()
        print(f"bits per byte {bits}, recorded {RECORDED}")
        raise SystemExit(not RECORDED.holds(bits))
    recipes = GROUPS[asked.group]()
    if unknown := [name for name in asked.only if name not in recipes]:
        parser.error(f"no recipe `{unknown[0]}` in {asked.group}; it has {', '.join(recipes)}")
    first = next(iter(recipes))
    recipes = {name: recipe for name, recipe in recipes.items() if not asked.only or name in [first, *asked.only]}
    run_all(recipes, range(1, asked.seeds + 1), asked.file, jobs=asked.jobs, unlabelled=asked.unlabelled)
    print("\n".join(table(recipes, read(asked.file))))
    if asked.group in ("scaling", "held_out"):
        print("\n".join(describe_scaling(read(asked.file))))


if __name__ == "__main__":
    main()
