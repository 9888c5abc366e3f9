"""The first run on a GPU: what works there, what is equal, and how fast it is (docs/how-to/first-gpu.md).

    python -m benchmarks.first_gpu pack                what the machine with the GPU lacks, to .gpu/
    python -m benchmarks.first_gpu run FOLDER          all stages, nine minutes; results are in FOLDER as they come
    python -m benchmarks.first_gpu run FOLDER --dry    without a GPU: what a CPU can do of it, tiny
    python -m benchmarks.first_gpu report FOLDER       the tables of a run, from its files

Each stage is a process group with a time limit, so that a hung kernel costs its stage alone. `run` needs no package
itself; its stages need torch, accelerate, safetensors, sentencepiece, numpy and pytest, and take what else is in .gpu/.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACK = ROOT / ".gpu"
STORE = "store.tar.xz"
SITE = "site"

# Packages that parse the flags; the others that textgen needs come with torch and accelerate, or are not used here.
PACKED = ("jsonargparse", "docstring-parser")
PACKED_MOST = 10 << 20  # bytes

MINUTES = 9.0
STAGES_FILE, PROBES_FILE, MADE_UP, IMDB = "stages.json", "probes.jsonl", "made-up.jsonl", "imdb"

# A dry run is no measurement, and may have a busy machine: its limits are so many times as long.
DRY_PATIENCE = 10

STOPPED = threading.Event()
"""set by a signal to this script"""

# Seconds from SIGTERM to SIGKILL, and from there until a process that a driver holds is left behind.
PATIENCE = 3.0

# The tests of a training by words of their names, in several processes: a test that hangs takes the later ones of its
# process with it. All others are `training-values`. Layers side by side come last of all.
TRAINING_FILE = "tests/training/test_gpu.py"
TRAINING_TESTS = {
    "graphs": ("cuda_graphs", "scaled_gradients"),
    "resume": ("bitwise", "not_finite", "auto_takes"),
    "devices": ("continues",),
    "launches": ("launched", "hidden", "each_gpu"),
}
STREAM_TESTS = ("streams", "ways")

# Marks for pytest without the plugins, and the strictness, of pyproject.toml.
PYTEST_SETTINGS = "[pytest]\nmarkers =\n    gpu: needs a CUDA device\n    serial: runs alone\n    slow: takes minutes\n"


@dataclass(frozen=True)
class Stage:
    """A process of the run: what it is for, how long it may take, and its arguments after `python`."""

    name: str
    about: str
    seconds: int
    argv: tuple[str, ...]
    """empty: it cannot be done here"""


def stages(folder: Path, work: Path, *, dry: bool) -> list[Stage]:
    """Return all stages, the most telling first.

    Args:
        folder: of the results.
        work: folder of what is too large for them: the text, and checkpoints.
        dry: what a CPU can do of each, tiny.
    """
    probes = ("-m", "benchmarks.gpu_probes", str(folder / PROBES_FILE), *(["--dry"] if dry else []))
    kernels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_triton*.py"))
    kernels = [path for path in kernels if "compiled" not in path]  # compiled where there is no GPU

    def tests(*files: str, words: str = "") -> tuple[str, ...]:
        # Arguments of pyproject.toml would ask for plugins that are missing. Warnings are no errors here.
        argv = ("-c", str(folder / "pytest.ini"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "--color=no")
        return ("-m", "pytest", *argv, "-v", "--tb=short", *files, *(["-k", words] if words else []))

    elsewhere = " or ".join((*itertools.chain(*TRAINING_TESTS.values()), *STREAM_TESTS))
    chosen = {"values": f"not ({elsewhere})"} | {name: " or ".join(words) for name, words in TRAINING_TESTS.items()}
    training = {
        name: Stage(f"training-{name}", f"tests of a training: {name}", 60, tests(TRAINING_FILE, words=words))
        for name, words in chosen.items()
    }
    decode: tuple[str, ...] = ("--rounds", "5", "--batch_sizes", "1", "8", "64")
    compiled = ("-m", "benchmarks.decode", "--rounds", "3", "--batch_sizes", "1", "--compile")
    serve: tuple[str, ...] = ("--rounds", "2")
    train: tuple[str, ...] = ("--shapes", "default", "--rounds", "3", "--minutes", "1.4", "--ways")
    train += ("textgen", "textgen, graph", "accelerate loop")  # streams may hang
    imdb: tuple[str, ...] = ("--config", "default", "--cuda_graph", "--mixed_precision", "bf16", "--max_minutes", "0.4")
    if dry:
        decode = ("--rounds", "1", "--batch_sizes", "2", "--shape", "300", "16", "32", "2")
        serve = ("--rounds", "1", "--clients", "1", "3", "--tokens", "90", "--shape", "300", "16", "32", "2")
        train = ("--shapes", "quick", "--rounds", "1", "--steps", "1", "--ways", "textgen")
        imdb = ("--model.embedding_dim", "16", "--model.hidden_size", "32", "--batch_size", "8", "--seq_len", "16")
        imdb += ("--max_steps", "5", "--tokenizer.vocab_size", "300")
    data = text_flags(work, dry=dry)
    imdb += (*data, "--run_dir", str(work / IMDB), "--tracking.mode", "disabled", "--evaluate_documents", "200")
    return [
        Stage("machine", "device, driver and versions", 20, ("-m", "benchmarks.gpu_probes", "--machine", str(folder))),
        Stage("probes", "facts that the rest depends on, one by one", 60, probes),
        Stage("decoding", "CUDA graphs of decoding draw the same", 60, tests("tests/decoding/test_gpu_decoding.py")),
        training["values"],
        training["graphs"],
        training["resume"],
        Stage("kernels", "Triton's kernels are their twins", 90, tests(*kernels) if kernels and not dry else ()),
        Stage("decode", "speed of decoding", 60, ("-m", "benchmarks.decode", *decode)),
        Stage("serve", "the server's rows in graphs", 40, ("-m", "benchmarks.serve_graphs", *serve)),
        Stage("train", "speed of training", 100, ("-m", "benchmarks.train", *train)),
        Stage("imdb", "a training on IMDB", 60, ("train_distributed.py", *imdb) if data else ()),
        training["devices"],
        training["launches"],
        Stage("compile", "decoding beside torch.compile", 60, () if dry else compiled),
        Stage(
            "streams", "layers side by side, which may hang", 30, tests(TRAINING_FILE, words=" or ".join(STREAM_TESTS))
        ),
    ]


def text_flags(work: Path, *, dry: bool) -> tuple[str, ...]:
    """Return the flags that name the text of a training: the packed store, else in a dry run a made-up text."""
    if (PACK / STORE).is_file():
        return ("--data.store", str(work / "store"))
    files = ("--data.files", str(work / MADE_UP), "--data.cache_dir", str(work / "cache"))
    return ("--data.source", "files", *files) if dry else ()


def write_text(work: Path) -> None:
    """Unpack the store, or write a made-up text, where `text_flags` says that it is."""
    if (PACK / STORE).is_file():
        with tarfile.open(PACK / STORE) as archive:
            archive.extractall(work, filter="data")
        return
    draw, words = random.Random(0), ("good", "bad", "odd", "slow", "long", "sharp", "a film", "and")
    texts = (f"No. {i}: {' '.join(draw.choices(words, k=30))}." for i in range(200))
    (work / MADE_UP).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def keep_run(work: Path, folder: Path) -> None:
    """Copy the files of the training on IMDB to the results, without its checkpoints."""
    for file in (work / IMDB).glob("[!.]*.*"):
        (folder / IMDB).mkdir(exist_ok=True)
        shutil.copy(file, folder / IMDB)


# --- the run ---------------------------------------------------------------------------------------------------------


def run(folder: Path, *, dry: bool, only: Sequence[str], minutes: float) -> bool:
    """Run the stages and return whether all of them went well. `stages.json` is written again after each.

    Stages of an earlier run in the same folder keep their results, unless they are run again.
    """
    until = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pytest.ini").write_text(PYTEST_SETTINGS)
    path, environment, went_well = folder / STAGES_FILE, stage_environment(folder), True
    results = read(path)
    with tempfile.TemporaryDirectory(prefix="first-gpu-", ignore_cleanup_errors=True) as name:
        work = Path(name)
        write_text(work)
        for stage in stages(folder, work, dry=dry):
            if only and stage.name not in (*only, "machine"):
                continue
            left = until - time.monotonic()
            result: dict[str, Any] = {"about": stage.about, "state": "running", "dry": dry}
            results[stage.name] = result
            if not stage.argv:
                result["state"] = "left out: not possible here"
            elif left < 10:
                result["state"] = "left out: no time left"
            else:
                write(path, results)  # a machine that is taken away leaves what was running
                print(f"{stage.name}: {stage.about} ...", flush=True)
                started = time.monotonic()
                seconds = min(stage.seconds * (DRY_PATIENCE if dry else 1), left)
                state = run_stage(stage, folder / f"{stage.name}.log", environment, seconds=seconds)
                result |= {"state": state, "seconds": round(time.monotonic() - started, 1)}
                keep_run(work, folder)
            write(path, results)
            went_well &= result["state"] == "ok" or not stage.argv
            print(f"{stage.name}: {result['state']}, {result.get('seconds', 0)} s", flush=True)
            if stage.name == "machine":
                if result["state"] != "ok":
                    print((folder / "machine.log").read_text()[-400:].strip(), file=sys.stderr)
                    break  # without torch nothing runs
                if not dry and read(folder / "machine.json")["gpu"] is None:
                    print("error: torch finds no CUDA device here: give --dry for what a CPU can do", file=sys.stderr)
                    raise SystemExit(2)
    return went_well


def stage_environment(folder: Path) -> dict[str, str]:
    """Return the environment of all stages: packed packages, no network, results in the folder."""
    path = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(PACK / SITE)]
    kept = {name: value for name, value in os.environ.items() if name not in ("TEXTGEN_NO_SKIPS", "PYTEST_ADDOPTS")}
    return kept | {
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # read when a process first multiplies, before `--deterministic`
        "BENCHMARK_RESULTS": str(folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_stage(stage: Stage, log: Path, environment: dict[str, str], *, seconds: float) -> str:
    """Run a stage with its output in a file; return `ok`, its exit code, or that its time was over."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *stage.argv], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        until = time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < until and not STOPPED.is_set():
                time.sleep(0.1)
        finally:  # also what a stage leaves running
            code = process.returncode
            end_group(process)
    if STOPPED.is_set():
        raise SystemExit(143)
    if code is None:
        return f"killed after {seconds:.0f} s"
    return "ok" if code == 0 else f"exit code {code}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it started: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def write(path: Path, value: Any) -> None:
    """Write JSON in one step, so that a reader never finds half of it."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=2) + "\n")
    new.replace(path)


# --- what travels ----------------------------------------------------------------------------------------------------


def pack(folder: Path, settings: Sequence[str]) -> None:
    """Write the packages that the other machine lacks, and an encoded text, to a folder.

    Args:
        folder: for example `.gpu`.
        settings: flags of `textgen prepare`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / SITE, ignore_errors=True)
    shutil.rmtree(folder / "store", ignore_errors=True)
    for name in PACKED:
        for file in importlib.metadata.files(name) or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                target = folder / SITE / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), target)
    argv = [sys.executable, "-m", "textgen", "prepare", *settings]
    store = subprocess.run(argv, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    with tarfile.open(folder / STORE, "w:xz", preset=9) as archive:
        archive.add(store, "store")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    if size > PACKED_MOST:
        raise SystemExit(f"error: `{folder}` has {size} bytes, at most {PACKED_MOST} may travel")


# --- the report ------------------------------------------------------------------------------------------------------


def report(folder: Path) -> str:
    """Return the tables of a run as Markdown, made of what its stages left."""
    machine, results = read(folder / "machine.json"), read(folder / STAGES_FILE)
    parts = [machine_line(machine, results)]
    rows = [[name, r["about"], r["state"], str(r.get("seconds", ""))] for name, r in results.items()]
    parts.append(table(["stage", "what for", "result", "seconds"], rows))
    if tests := list(test_rows(folder, results)):
        parts.append(table(["tests of", "passed", "failed", "skipped", "not finished", "names"], tests))
    if (folder / PROBES_FILE).is_file():
        lines = [json.loads(line) for line in (folder / PROBES_FILE).read_text().splitlines()]
        parts.append(table(["probe", "found"], [[line["probe"], short(line["found"])] for line in lines]))
    for name in ("decode_cuda.json", "decode.json"):
        if steps := read(folder / name).get("figures", {}).get("steps"):
            variants = list(dict.fromkeys(variant for its in steps.values() for variant in its))
            cells = [[rows, *(us(its.get(variant)) for variant in variants)] for rows, its in steps.items()]
            chosen = read(folder / name)["figures"].get("chosen")
            parts.append(f"Microseconds of a decoding step, median of rounds{f' ({chosen})' if chosen else ''}:")
            parts.append(table(["rows", *variants], cells))
    if clients := read(folder / "serve_graphs.json").get("figures", {}).get("clients"):
        ways = {f"{count} clients, {way}": values for count, its in clients.items() for way, values in its.items()}
        parts.append("The server's decoding thread, without HTTP:")
        parts.append(speed_table(ways))
        prompts = read(folder / "serve_graphs.json")["figures"]["prompts_ms"]
        told = "; ".join(f"{count}: {short(its)}" for count, its in prompts.items())
        parts.append(f"Milliseconds in which prompts of 100 tokens are read, by their number: {told}.")
    for name in ("train_cuda.json", "train.json"):
        for title, entry in read(folder / name).get("figures", {}).items():
            if isinstance(entry, dict) and "speed" in entry:
                parts.append(f"Training at `{title}`:")
                parts.append(speed_table(entry["speed"]))
        if note := read(folder / name).get("figures", {}).get("note"):
            parts.append(note)
    if (folder / IMDB / "metrics.jsonl").is_file():
        parts.append(imdb_line(folder / IMDB / "metrics.jsonl"))
    return "\n\n".join(parts) + "\n"


def read(path: Path) -> dict[str, Any]:
    """Return the JSON of a file; {} if it is not there."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def machine_line(machine: dict[str, Any], results: dict[str, Any]) -> str:
    """Return what the run was made on, as a sentence."""
    dry = any(result.get("dry") for result in results.values())
    where = machine.get("gpu") or f"no GPU, {machine.get('processor') or 'unknown'}"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("driver", "torch", "cudnn", "triton", "commit")
                         if machine.get(name))  # fmt: skip
    return f"{'A dry run, which says nothing of a GPU' if dry else 'Measured'}: {where}; {versions}."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def test_rows(folder: Path, results: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a row for each stage of tests: counts, and the names of those that failed or did not finish.

    pytest prints a test's name when it begins and the outcome behind it, so a log that ends early tells which one hung.
    """
    for name in results:
        log = folder / f"{name}.log"
        text = log.read_text(errors="replace") if log.is_file() else ""
        outcomes: dict[str, str] = {}
        line = r"^(tests/\S+\.py::.+?) *(?:(PASSED|FAILED|SKIPPED|ERROR)\b.*)?$"
        for match in re.finditer(line, text, re.MULTILINE):
            outcomes[match[1]] = match[2] or outcomes.get(match[1], "")
        if outcomes:
            counts = [list(outcomes.values()).count(word) for word in ("PASSED", "SKIPPED")]
            failed = [test for test, word in outcomes.items() if word in ("FAILED", "ERROR")]
            hung = [test for test, word in outcomes.items() if not word]
            names = ", ".join(f"`{test.rpartition('::')[2]}`" for test in (*failed, *hung))
            yield [name, str(counts[0]), str(len(failed)), str(counts[1]), str(len(hung)), names]


def short(found: Any, most: int = 200) -> str:
    """Return a probe's answer as a short text."""
    text = json.dumps(found) if not isinstance(found, str) else found
    return text if len(text) <= most else text[: most - 3] + "..."


def us(values: dict[str, float] | None) -> str:
    """Return the microseconds of a variant's step, and how many times the plain loop it is."""
    if values is None:
        return ""
    ratio = f" ({values['ratio']:g}x)" if values.get("ratio", 1) != 1 else ""
    return f"{values['ms'] * 1e3:.4g}{ratio}"


def speed_table(speed: dict[str, dict[str, float]]) -> str:
    """Return the table of the ways to train at a shape."""
    names = list(
        dict.fromkeys(name for values in speed.values() for name in values if name not in ("lowest", "highest"))
    )
    rows = [[way, *(f"{values[name]:,}" if name in values else "" for name in names)] for way, values in speed.items()]
    return table(["way", *(name.replace("_", " ") for name in names)], rows)


def imdb_line(metrics: Path) -> str:
    """Return speed and last score of the training on IMDB."""
    last: dict[str, Any] = {}
    for line in metrics.read_text().splitlines():
        with contextlib.suppress(ValueError):  # a killed training may leave half a line
            last |= json.loads(line)
    wanted = ("step", "train/loss", "valid/bits_per_byte", "train/tokens_per_second", "memory/peak_gib")
    return "IMDB: " + ", ".join(
        f"{name} {last[name]:,.6g}" for name in wanted if isinstance(last.get(name), int | float)
    )


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run, pack or report, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    known = [stage.name for stage in stages(Path(), Path(), dry=False)]
    running = commands.add_parser("run", help="run the stages")
    running.add_argument("folder", type=Path, help="of the results")
    running.add_argument("--dry", action="store_true", help="what a CPU can do of each stage, tiny")
    running.add_argument("--only", nargs="+", default=[], metavar="STAGE", choices=known, help=", ".join(known))
    running.add_argument("--minutes", type=float, default=MINUTES, help=f"for all stages (default: {MINUTES:g})")
    packing = commands.add_parser("pack", help="pack what the other machine lacks")
    packing.add_argument("--to", type=Path, default=PACK, help=f"default: {PACK.name}")
    reporting = commands.add_parser("report", help="print the tables of a run")
    reporting.add_argument("folder", type=Path, help="of the results")
    args, more = parser.parse_known_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # an exception could come while a stage is started, and lose it
        signal.signal(number, lambda *_: STOPPED.set())
    if more and args.command != "pack":
        parser.error(f"unknown: {' '.join(more)}")
    if args.command == "pack":
        pack(args.to.resolve(), more or ["--config", "default", "--data.train_on", "train"])
    elif args.command == "report":
        if not (args.folder / STAGES_FILE).is_file():
            parser.error(f"`{args.folder}` has no {STAGES_FILE}")
        print(report(args.folder), end="")
    elif not run(args.folder.resolve(), dry=args.dry, only=args.only, minutes=args.minutes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
