"""Speed of guided and biased samples beside plain ones: processor time of one thread, interleaved.

    OMP_NUM_THREADS=1 python -m benchmarks.steer runs/quick

Prints for each decoder and batch the tokens per second of processor time (median of the rounds, lowest, highest) and
the median share of the plain speed in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from textgen.commands.model_argument import open_decoder
from textgen.config import SamplingConfig
from textgen.decoding.decoders import Decoder
from textgen.decoding.generation import Request, Sample, generate_stream
from textgen.tokenizer import Tokenizer

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    r"--regex [\s\S]*": {"regex": r"[\s\S]*"},
    r"--regex ( \w+[,.!?]?)*": {"regex": r"( \w+[,.!?]?)*"},
    r"--regex ( [a-z]{1,12}){40,140}\.": {"regex": r"( [a-z]{1,12}){40,140}\."},
    "--logit_bias good=1": {"logit_bias": (("good", 1.0),)},
    "--dry_multiplier 0.8": {"dry_multiplier": 0.8},
    "--xtc_probability 0.5": {"xtc_probability": 0.5},
}


def tokens_per_second(decoder: Decoder, tokenizer: Tokenizer, way: dict[str, Any], *, batch: int, seed: int) -> float:
    """Return the tokens of samples per second of processor time."""
    config = SamplingConfig(max_new_tokens=100, seed=seed, **way)
    requests = [Request("i thought", config, number) for number in range(max(batch, 2))]
    started = time.process_time()
    events = generate_stream(decoder, tokenizer, requests, batch_size=batch)
    count = sum(event.num_tokens for _, event in events if isinstance(event, Sample))
    return count / (time.process_time() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for name in ("bfloat16", "int8"):
        opened, decoder = open_decoder(args.checkpoint, name, best=False)
        for batch in (1, 64):
            speeds: dict[str, list[float]] = {way: [] for way in WAYS}
            for seed in range(args.rounds + 1):
                for way, settings in WAYS.items():
                    speeds[way].append(tokens_per_second(decoder, opened.tokenizer, settings, batch=batch, seed=seed))
            for way, values in speeds.items():
                shares = [value / plain for value, plain in zip(values[1:], speeds["plain"][1:], strict=True)]
                low, middle, high = min(values[1:]), statistics.median(values[1:]), max(values[1:])
                share = statistics.median(shares)
                print(
                    f"{name} batch {batch} `{way}`: {middle:,.0f} ({low:,.0f} to {high:,.0f}), {share:.2f}", flush=True
                )


if __name__ == "__main__":
    main()
