"""The command `textgen sample`: `python -m benchmarks.sample CHECKPOINT...`, per token or, with `--whole`, as a whole.

Per token, beside a plain loop that prints its text: seconds of a long run of the whole command less those of a run of
one token, so start-up and reading of the model are not counted. The plain loop is nn.LSTM in float32, softmax,
torch.multinomial, and the text of each token, printed at batch 1; with oneDNN, as torch uses it by default, and
without. On a machine with other work, `--cpu_time` counts the processor time of one thread instead of seconds.

`--whole` measures commands as users run them, with the decoder that `auto` chooses: seconds to the first text and to
the end, and processor time of all threads. The import of torch alone is a turn too; what the first token takes beyond
it is the difference between two turns of a round. Bytecode is cached, as on a user's machine.

A turn is a new process; turns are taken round by round. `--before FOLDER` also measures textgen of another checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LENGTHS = {1: 6000, 32: 1000}  # tokens of a row
PLAIN_LENGTHS = {1: 400, 32: 100}
PROMPT = "The movie was"
KINDS = ("plain", "plain, oneDNN off", "textgen", "before")
CLOCKS = {"seconds": time.perf_counter, "processor time of one thread": time.process_time}
HERE = Path(__file__).parent.parent


# --- per token -------------------------------------------------------------------------------------------------------


def seconds_per_token(kind: str, checkpoint: str, rows: int, clock: Callable[[], float]) -> float:
    """Return seconds per drawn token in this process: of `textgen`, `plain`, or `plain, oneDNN off`."""
    lengths = LENGTHS if kind == "textgen" else PLAIN_LENGTHS
    draw = draw_by_textgen if kind == "textgen" else draw_plainly

    def measure(length: int) -> float:
        started = clock()
        draw(kind, checkpoint, rows, length)
        return clock() - started

    measure(40)  # warm
    once, whole = measure(1), measure(lengths[rows])
    return (whole - once) / (lengths[rows] - 1) / rows


def draw_by_textgen(kind: str, checkpoint: str, rows: int, length: int) -> None:
    from textgen.commands.sample import sample_command

    argv = [checkpoint, "--decoder", "int8", "--prompt", PROMPT, "--num_samples", str(rows)]
    argv += ["--min_new_tokens", str(length), "--max_new_tokens", str(length), "--batch_size", str(rows)]
    with open(os.devnull, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        sample_command(argv)


def draw_plainly(kind: str, checkpoint: str, rows: int, length: int) -> None:
    import torch

    from benchmarks.decode import Plain
    from textgen.model.files import load_model

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


def measure_tokens(checkpoint: str, folders: Mapping[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """Measure seconds per token in turns; return figures by batch size, threads and kind."""
    figures, clock = {}, "processor time of one thread" if args.cpu_time else "seconds"
    for rows in args.batch_sizes:
        for threads in [1] if args.cpu_time else args.threads:
            times: dict[str, list[float]] = {kind: [] for kind in args.kinds if kind in folders}
            for _ in range(args.rounds):
                for kind in times:
                    turn = ["textgen" if kind == "before" else kind, checkpoint, str(rows), clock]
                    command = [sys.executable, __file__, ".", "--turn", *turn]
                    env = environment(folders[kind], threads)
                    done = subprocess.run(
                        command, cwd=folders[kind], env=env, check=True, capture_output=True, text=True
                    )
                    times[kind].append(float(done.stdout))
            title = f"{Path(checkpoint).name}, batch {rows}" + (f", {threads} threads" if threads else "")
            figures[title] = {"clock": clock, **report_tokens(times, title)}
    return figures


def report_tokens(times: dict[str, list[float]], title: str) -> dict[str, Any]:
    """Print and return microseconds per token, and ratios to the plain loop, if it was measured, round by round."""
    figures = {}
    for kind, seconds in times.items():
        figures[kind] = {name: round(value * 1e6, 2) for name, value in spread(seconds).items()}
        text = f"{figures[kind]['median']:9.2f} us per token ({figures[kind]['lowest']} to {figures[kind]['highest']})"
        if "plain" in times:
            ratios = spread([p / s for p, s in zip(times["plain"], seconds, strict=True)])
            figures[kind] |= {f"{name}_ratio": round(value, 2) for name, value in ratios.items()}
            text += f", {ratios['median']:.2f} x plain"
        print(f"{title}: {kind:18} {text}", flush=True)
    return figures


# --- whole commands --------------------------------------------------------------------------------------------------


def whole_commands(checkpoint: str, folder: Path, num_prompts: int) -> dict[str, list[str]]:
    """Return the commands of `--whole` by name.

    Args:
        checkpoint: the model.
        folder: gets a file of prompts, of which all differ.
        num_prompts: their number.
    """
    python, sample = sys.executable, [sys.executable, "-m", "textgen", "sample", checkpoint]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{PROMPT} {i}"}) + "\n" for i in range(num_prompts)))

    def drawing(length: int) -> list[str]:
        return ["--min_new_tokens", str(length), "--max_new_tokens", str(length)]

    return {
        "import torch": [python, "-c", "import torch; print(1)"],
        "one token": [*sample, "--prompt", PROMPT, *drawing(1)],
        "500 tokens": [*sample, "--prompt", PROMPT, *drawing(500)],
        "32 texts": [*sample, "--prompt", PROMPT, "--num_samples", "32", *drawing(200)],
        "prompts": [*sample, "--batch_file", str(prompts), "--out", str(folder / "samples.jsonl"), *drawing(20)],
    }


def time_command(command: list[str], folder: Path, threads: int | None) -> dict[str, float]:
    """Run a command; return seconds to its first byte of output, to its end, and of processor time.

    Args:
        command: writes to standard output.
        folder: of the checkout that it uses.
        threads: of torch; None for the default.

    Raises:
        RuntimeError: it fails.
    """
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=environment(folder, threads), stdout=subprocess.PIPE, stderr=errors
        )
        assert process.stdout is not None
        with process.stdout as out:
            out.read(1)
            first = time.perf_counter() - started
            out.read()
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # `wait4` has taken it from Popen
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {errors.read().decode(errors='replace')[-2000:]}")
    return {"first": first, "end": ended, "processor": usage.ru_utime + usage.ru_stime}


def measure_whole(checkpoint: str, folders: Mapping[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """Measure whole commands in turns; return figures by number of threads, case, and checkout."""
    figures: dict[str, Any] = {}
    checkouts = {kind: folder for kind, folder in folders.items() if kind in ("textgen", "before")}
    with tempfile.TemporaryDirectory() as name:
        commands = whole_commands(checkpoint, Path(name), args.prompts)
        turns = [("import torch", "textgen"), *((case, kind) for case in args.cases for kind in checkouts)]
        for threads in args.threads:
            times: dict[tuple[str, str], list[dict[str, float]]] = {turn: [] for turn in turns}
            for folder in checkouts.values():  # the rounds then find bytecode and compiled code
                time_command(commands["one token"], folder, threads)
            for _ in range(args.rounds):
                for case, kind in turns:
                    (Path(name) / "samples.jsonl").unlink(missing_ok=True)
                    times[case, kind].append(time_command(commands[case], checkouts[kind], threads))
            title = f"{Path(checkpoint).name}, whole" + (f", {threads} threads" if threads else "")
            figures[title] = report_whole(times, title)
    return figures


def report_whole(times: Mapping[tuple[str, str], list[dict[str, float]]], title: str) -> dict[str, Any]:
    """Print and return the spread of seconds by case, checkout and what was measured."""
    figures: dict[str, Any] = {}
    for (case, kind), turns in times.items():
        parts = {name: [turn[name] for turn in turns] for name in turns[0]}
        if case == "one token":
            imports = [turn["first"] for turn in times["import torch", "textgen"]]
            parts["first, beyond torch"] = [a - b for a, b in zip(parts["first"], imports, strict=True)]
        for name, seconds in parts.items():
            figure = {key: round(value, 3) for key, value in spread(seconds).items()}
            figures.setdefault(case, {}).setdefault(kind, {})[name] = figure
            print(
                f"{title}: {case:12} {kind:8} {name:24} {figure['median']:7.3f} s "
                f"({figure['lowest']:.3f} to {figure['highest']:.3f})",
                flush=True,
            )
    return figures


# --- both ------------------------------------------------------------------------------------------------------------


def environment(folder: Path, threads: int | None) -> dict[str, str]:
    """Return the environment of a turn that uses the checkout in `folder`."""
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{HERE}"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # else every turn would compile textgen's modules
    return env | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def main() -> None:
    """Measure in turns, print the figures, and write them beside those of other models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[None], help="numbers of threads; default: torch's")
    parser.add_argument("--before", type=Path, help="folder of another checkout")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="of a measurement per token")
    parser.add_argument("--cpu_time", action="store_true")
    parser.add_argument("--whole", action="store_true", help="measure whole commands")
    cases = ("one token", "500 tokens", "32 texts", "prompts")
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases, help="of `--whole`")
    parser.add_argument("--prompts", type=int, default=10_000, help="of the case `prompts`, of 20 tokens each")
    parser.add_argument("--name", help="of the results; default: sample, or sample_whole")
    parser.add_argument("--turn", nargs=4, help=argparse.SUPPRESS)  # kind, checkpoint, rows, clock: of a turn's process
    args = parser.parse_args()
    if args.turn is not None:
        kind, checkpoint, rows, clock = args.turn
        print(seconds_per_token(kind, checkpoint, int(rows), CLOCKS[clock]))
        return
    folders = {"plain": HERE, "plain, oneDNN off": HERE, "textgen": HERE}
    folders |= {} if args.before is None else {"before": args.before.resolve()}
    from benchmarks.machine import save

    for checkpoint in map(os.path.abspath, args.checkpoints):
        measure = measure_whole if args.whole else measure_tokens
        save(args.name or ("sample_whole" if args.whole else "sample"), measure(checkpoint, folders, args), beside=True)


if __name__ == "__main__":
    main()
