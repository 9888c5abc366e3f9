"""The command `textgen sample` beside a plain loop that prints its text: `python -m benchmarks.sample CHECKPOINT...`.

What a user waits for per token once the text runs: seconds of a long run of the whole command less those of a run of
one token, so start-up and reading of the model are not counted. A turn is a new process; turns are taken round by
round. The plain loop is nn.LSTM in float32, softmax, torch.multinomial, and the text of each token, printed at batch 1;
with oneDNN, as torch uses it by default, and without. `--before FOLDER` also measures the textgen of another checkout.
On a machine with other work, `--cpu_time` counts the processor time of one thread instead of seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTHS = {1: 6000, 32: 1000}  # tokens of a row
PLAIN_LENGTHS = {1: 400, 32: 100}


CLOCK = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter


def seconds_per_token(kind: str, checkpoint: str, rows: int) -> float:
    """Return seconds per drawn token in this process: of `textgen`, `plain`, or `plain, oneDNN off`."""
    lengths = LENGTHS if kind == "textgen" else PLAIN_LENGTHS
    measure = time_textgen if kind == "textgen" else time_plain
    measure(kind, checkpoint, rows, 40)  # warm
    once, whole = (measure(kind, checkpoint, rows, length) for length in (1, lengths[rows]))
    return (whole - once) / (lengths[rows] - 1) / rows


def time_textgen(kind: str, checkpoint: str, rows: int, length: int) -> float:
    from textgen.commands.sample import sample_command

    argv = [checkpoint, "--decoder", "int8", "--prompt", "The movie was", "--num_samples", str(rows)]
    argv += ["--min_new_tokens", str(length), "--max_new_tokens", str(length), "--batch_size", str(rows)]
    started = CLOCK()
    with open(os.devnull, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        sample_command(argv)
    return CLOCK() - started


def time_plain(kind: str, checkpoint: str, rows: int, length: int) -> float:
    import torch

    from benchmarks.decode import Plain
    from textgen.model.files import load_model

    started = CLOCK()
    model, tokenizer = load_model(checkpoint)
    plain = Plain(model).eval()
    tokens, state = torch.full((rows,), tokenizer.bos_id), model.zero_state(rows)
    texts = [tokenizer.stream() for _ in range(rows)]
    off = torch.backends.mkldnn.flags(enabled=False) if kind != "plain" else contextlib.nullcontext()
    with open(os.devnull, "w") as out, torch.inference_mode(), off:
        for _ in range(length):
            probabilities, state = plain(tokens, state)
            tokens = torch.multinomial(probabilities, 1)[:, 0]
            for text, token in zip(texts, tokens.tolist(), strict=True):
                piece = text.push(token)
                if rows == 1:
                    print(piece, end="", file=out, flush=True)
    return CLOCK() - started


def main() -> None:
    """Measure all variants in turns and print microseconds per token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--cpu_time", action="store_true")
    parser.add_argument("--before", type=Path, help="folder of another checkout")
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)  # kind, checkpoint, rows: what a turn's process does
    args = parser.parse_args()
    if args.turn is not None:
        kind, checkpoint, rows = args.turn
        print(seconds_per_token(kind, checkpoint, int(rows)))
        return
    figures: dict[str, Any] = {"clock": "processor time of one thread" if args.cpu_time else "seconds"}
    here = Path(__file__).parent.parent
    kinds = {"plain": here, "plain, oneDNN off": here, "textgen": here}
    kinds |= {} if args.before is None else {"before": args.before}
    for checkpoint in map(os.path.abspath, args.checkpoints):
        for rows in args.batch_sizes:
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(args.rounds):
                for kind, folder in kinds.items():
                    turn = ["textgen" if kind == "before" else kind, checkpoint, str(rows)]
                    command = [sys.executable, __file__, ".", "--turn", *turn]
                    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{here}"}
                    env |= {"OMP_NUM_THREADS": "1"} if args.cpu_time else {}
                    done = subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True)
                    times[kind].append(float(done.stdout))
            figures[f"{Path(checkpoint).name}, batch {rows}"] = report(times, f"{checkpoint}, batch {rows}")
    from benchmarks.machine import save

    save("sample", figures)


def report(times: dict[str, list[float]], title: str) -> dict[str, Any]:
    """Print and return microseconds per token and ratios to the plain loop, taken round by round."""
    figures = {}
    for kind, seconds in times.items():
        ratios = sorted(p / s for p, s in zip(times["plain"], seconds, strict=True))
        figures[kind] = {
            "us": round(statistics.median(seconds) * 1e6, 2), "lowest": round(min(seconds) * 1e6, 2),
            "highest": round(max(seconds) * 1e6, 2), "ratio": round(statistics.median(ratios), 2),
            "lowest_ratio": round(ratios[0], 2), "highest_ratio": round(ratios[-1], 2),
        }  # fmt: skip
        print(
            f"{title}: {kind:18} {figures[kind]['us']:9.2f} us per token ({figures[kind]['lowest']} to "
            f"{figures[kind]['highest']}), {figures[kind]['ratio']} x plain", flush=True,
        )  # fmt: skip
    return figures


if __name__ == "__main__":
    main()
