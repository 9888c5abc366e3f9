"""Speed of guided and biased samples beside plain ones: processor time of one thread, interleaved.

    OMP_NUM_THREADS=1 python -m benchmarks.steer runs/quick

Prints for each decoder and batch the tokens per second of processor time (median of the rounds, lowest, highest), and
the median shares of two plain speeds in the same round: of single steps, as steered samples take them, and of many
tokens in one call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.machine import save
from textgen.commands.model_argument import open_decoder
from textgen.config import SamplingConfig
from textgen.decoding.batch import SingleSteps
from textgen.decoding.decoders import Decoder
from textgen.decoding.generation import generate_stream
from textgen.decoding.samples import Request, Sample
from textgen.tokenizer import Tokenizer

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, single steps": {},
    r"--regex [\s\S]*": {"regex": r"[\s\S]*"},
    r"--regex ( \w+[,.!?]?)*": {"regex": r"( \w+[,.!?]?)*"},
    r"--regex ( [a-z]{1,12}){40,140}\.": {"regex": r"( [a-z]{1,12}){40,140}\."},
    "--logit_bias good=1": {"logit_bias": (("good", 1.0),)},
    "--dry_multiplier 0.8": {"dry_multiplier": 0.8},
    "--xtc_probability 0.5": {"xtc_probability": 0.5},
}


def tokens_per_second(decoder: Decoder, tokenizer: Tokenizer, way: str, *, batch: int, seed: int) -> float:
    """Return the tokens of samples per second of processor time."""
    config = SamplingConfig(max_new_tokens=100, seed=seed, **WAYS[way])
    requests = [Request("i thought", config, number) for number in range(max(batch, 2))]
    started = time.process_time()
    batch_of = SingleSteps.of if way == "plain, single steps" else None
    events = generate_stream(decoder, tokenizer, requests, batch_size=batch, batch_of=batch_of)
    count = sum(event.num_tokens for _, event in events if isinstance(event, Sample))
    return count / (time.process_time() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name in ("bfloat16", "int8"):
        opened, decoder = open_decoder(args.checkpoint, name, best=False)
        for batch in (1, 64):
            speeds: dict[str, list[float]] = {way: [] for way in WAYS}
            for seed in range(args.rounds + 1):
                for way in WAYS:
                    speeds[way].append(tokens_per_second(decoder, opened.tokenizer, way, batch=batch, seed=seed))
            for way, values in speeds.items():
                values = values[1:]  # the first round warms up
                shares = [
                    statistics.median(value / plain for value, plain in zip(values, speeds[to][1:], strict=True))
                    for to in ("plain, single steps", "plain")
                ]
                results.append({
                    "decoder": name, "batch": batch, "way": way, "tokens_per_second": [round(v) for v in values],
                    "of_single_steps": round(shares[0], 2), "of_plain": round(shares[1], 2),
                })  # fmt: skip
                speed = f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
                print(f"{name} batch {batch} `{way}`: {speed}, {shares[0]:.2f}, {shares[1]:.2f}", flush=True)
    save("steer", {"settings": {"rounds": args.rounds}, "results": results})


if __name__ == "__main__":
    main()
