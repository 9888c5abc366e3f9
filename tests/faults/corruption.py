"""Damages a checkpoint at random and tries to load it, in every way that textgen loads checkpoints.

`python -m tests.faults.corruption --count 10000`: each damage is followed by `resume` of that checkpoint, `load_model`
of it, and `load_model` of a run that has an older one. Each must refuse it by an error of textgen's own, or load what
was saved, bit by bit; the run's must fall back to the older checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.faults.report import write_result
from tests.forking import run_script
from textgen.commands.parsing import parse_train_config
from textgen.data.store import prepare_store
from textgen.distributed import launch
from textgen.distributed.signals import StopSignals
from textgen.errors import CheckpointError, TextgenError
from textgen.model.files import load_model
from textgen.runs.checkpoint import MANIFEST_NAME, checkpoint_path, find_checkpoint
from textgen.tokenizer import TokenizerError
from textgen.training.resume import find_resume_point, load_training, optimizer_tensors
from textgen.training.setup import build

ROOT = Path(__file__).parents[2]
REFUSALS = (CheckpointError, TextgenError, TokenizerError)

# Two checkpoints, and averaged weights: `weights.safetensors` beside `model.safetensors`, of the same size.
FLAGS = ["--save_every", "2", "--max_steps", "4", "--ema_decay", "0.5", "--evaluate_documents", "4"]
OLDER, NEWER = 2, 4


@dataclass(frozen=True)
class Checkpoints:
    """What is damaged, and what strange files come from."""

    newer: Path
    """the one that is damaged"""
    older: Path
    """of the same training, a few steps before"""
    foreign: Path
    """of another training, at the same step"""


@dataclass(frozen=True)
class Place:
    """A copy of a run, to be damaged: its newer checkpoint, and the draws."""

    directory: Path
    checkpoints: Checkpoints
    draw: random.Random

    def file(self, *, manifest: bool = True) -> Path:
        """Return a file of the checkpoint, drawn by chance; figures of int8, which lie beside it, are none."""
        files = json.loads((self.directory / MANIFEST_NAME).read_text())["files"]
        return self.directory / self.draw.choice(sorted([*files, MANIFEST_NAME] if manifest else files))


# --- damages ---------------------------------------------------------------------------------------------------------


def flip_bits(place: Place) -> None:
    path = place.file()
    data = bytearray(path.read_bytes())
    for _ in range(place.draw.choice([1, 1, 1, 2, 8])):
        data[place.draw.randrange(len(data))] ^= 1 << place.draw.randrange(8)
    path.write_bytes(data)


def truncate(place: Place) -> None:
    path = place.file()
    size = path.stat().st_size
    os.truncate(path, place.draw.choice([size - 1, size // 2, place.draw.randrange(size)]))


def append_bytes(place: Place) -> None:
    extra = place.draw.randbytes(place.draw.randint(1, 5000))
    with place.file().open("ab") as file:
        file.write(place.draw.choice([extra, bytes(len(extra)), b"\n" * len(extra), b"}"]))


def cut_out_bytes(place: Place) -> None:
    path = place.file()
    data = path.read_bytes()
    start = place.draw.randrange(len(data))
    path.write_bytes(data[:start] + data[start + place.draw.randint(1, 64) :])


def put_in_bytes(place: Place) -> None:
    path = place.file()
    data = path.read_bytes()
    start = place.draw.randrange(len(data))
    path.write_bytes(data[:start] + place.draw.randbytes(place.draw.randint(1, 64)) + data[start:])


def zero_block(place: Place) -> None:
    path = place.file()
    data = bytearray(path.read_bytes())
    start = place.draw.randrange(len(data))
    length = min(place.draw.choice([1, 8, 512, 4096]), len(data) - start)
    data[start : start + length] = bytes(length)
    path.write_bytes(data)


def empty(place: Place) -> None:
    place.file().write_bytes(b"")


def remove(place: Place) -> None:
    place.file().unlink()


def swap_two_files(place: Place) -> None:
    one, other = place.file(), place.file()
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def take_a_file_of_the_older_checkpoint(place: Place) -> None:
    path = place.file()
    shutil.copyfile(place.checkpoints.older / path.name, path)


def take_a_file_of_another_training(place: Place) -> None:
    path = place.file()
    shutil.copyfile(place.checkpoints.foreign / path.name, path)


def take_all_but_the_manifest_of_another_training(place: Place) -> None:
    for path in place.checkpoints.foreign.iterdir():
        if path.name != MANIFEST_NAME:
            shutil.copyfile(path, place.directory / path.name)


def take_the_manifest_of_another_training_and_some_files(place: Place) -> None:
    kept = {"model.safetensors", place.file(manifest=False).name}
    for path in place.checkpoints.foreign.iterdir():
        if path.name not in kept:
            shutil.copyfile(path, place.directory / path.name)


def take_the_whole_older_checkpoint(place: Place) -> None:
    for path in place.checkpoints.older.iterdir():
        shutil.copyfile(path, place.directory / path.name)


def make_a_directory_of_a_file(place: Place) -> None:
    path = place.file()
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    if place.draw.random() < 0.5:
        (path / path.name).write_bytes(content)


def make_a_symlink_loop_of_a_file(place: Place) -> None:
    path = place.file()
    path.unlink()
    if place.draw.random() < 0.5:
        path.symlink_to(path.name)
    else:
        path.symlink_to(f"{path.name}.other")
        path.with_name(f"{path.name}.other").symlink_to(path.name)


def make_a_dangling_symlink_of_a_file(place: Place) -> None:
    path = place.file()
    path.unlink()
    path.symlink_to("nowhere")


def rename_a_file(place: Place) -> None:
    path = place.file()
    path.rename(path.with_name(place.draw.choice([f"{path.name}.bak", path.name.upper(), f"x{path.name}"])))


def add_foreign_files(place: Place) -> None:
    for name in place.draw.sample(["notes.txt", "model.bin", "optimizer.pt", "rng_0.pkl", "extra.json", "lock"], 2):
        (place.directory / name).write_bytes(place.draw.randbytes(100))


def rename_the_directory(place: Place) -> None:
    step = place.draw.choice([5, 3, 0, 40, 123456789])
    place.directory.rename(checkpoint_path(place.directory.parents[1], step))


def edit_the_manifest(place: Place) -> None:
    path, draw = place.directory / MANIFEST_NAME, place.draw
    manifest = json.loads(path.read_text())
    files = manifest["files"]
    one, other = draw.sample(sorted(files), 2)
    strange: list[Any] = [-1, 0, 1 << 70, 1.5, True, None, "", "9", [], {}, "\0", "../" * 3]
    edits: list[Callable[[], object]] = [
        lambda: files.pop(one),
        lambda: files.clear(),
        lambda: files.update({one: files[other]}),
        lambda: files.update({one: files[other], other: files[one]}),
        lambda: files.update({f"{one[:-1]}": files.pop(one)}),
        lambda: files.update({f"../{NEWER}/{one}": files.pop(one)}),
        lambda: files.update({"extra.json": files[one]}),
        lambda: files.update({"lanes_.safetensors": dict(files[one])}),
        lambda: files[one].update(bytes=files[one]["bytes"] + draw.choice([-1, 1, 8])),
        lambda: files[one].update(bytes=draw.choice(strange)),
        lambda: files[one].update(sha256=draw.choice(strange)),
        lambda: files[one].update(sha256=files[one]["sha256"].upper()),
        lambda: files[one].update(sha256=files[one]["sha256"][:-1] + "g"),
        lambda: files.update({one: draw.choice(strange)}),
        lambda: manifest.update(files=draw.choice(strange)),
        lambda: manifest.update(step=draw.choice([*strange, 3, 5, 4.0])),
        lambda: manifest.update(format=draw.choice([*strange, "textgen.checkpoint.2"])),
        lambda: manifest.pop(draw.choice(sorted(manifest))),
        lambda: manifest.update(note="harmless"),
    ]
    draw.choice(edits)()
    path.write_text(json.dumps(manifest, indent=draw.choice([None, 2])))


def lay_the_manifest_out_anew(place: Place) -> None:
    path, draw = place.directory / MANIFEST_NAME, place.draw
    manifest = json.loads(path.read_text())
    if draw.random() < 0.5:
        manifest["files"] = dict(draw.sample(sorted(manifest["files"].items()), len(manifest["files"])))
    text = json.dumps(manifest, indent=draw.choice([None, 1, 4, "\t"]), sort_keys=draw.random() < 0.5)
    path.write_text(draw.choice(["", "\n", "  "]) + text + draw.choice(["", "\n", "\r\n \t"]))


def leave_a_file_out_of_the_manifest_and_damage_it(place: Place) -> None:
    path = place.file(manifest=False)
    manifest = json.loads((place.directory / MANIFEST_NAME).read_text())
    del manifest["files"][path.name]
    (place.directory / MANIFEST_NAME).write_text(json.dumps(manifest))
    data = bytearray(path.read_bytes())
    data[-place.draw.randint(1, min(len(data), 2000))] ^= 1 << place.draw.randrange(8)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Place], None]] = {
    "bits flipped": flip_bits,
    "truncated": truncate,
    "bytes appended": append_bytes,
    "bytes cut out": cut_out_bytes,
    "bytes put in": put_in_bytes,
    "block zeroed": zero_block,
    "file emptied": empty,
    "file missing": remove,
    "file renamed": rename_a_file,
    "two files swapped": swap_two_files,
    "file of an older checkpoint": take_a_file_of_the_older_checkpoint,
    "file of another training": take_a_file_of_another_training,
    "all files of another training, but not its manifest": take_all_but_the_manifest_of_another_training,
    "manifest of another training, and some of its files": take_the_manifest_of_another_training_and_some_files,
    "older checkpoint under this name": take_the_whole_older_checkpoint,
    "directory in place of a file": make_a_directory_of_a_file,
    "symlink loop": make_a_symlink_loop_of_a_file,
    "dangling symlink": make_a_dangling_symlink_of_a_file,
    "directory renamed": rename_the_directory,
    "manifest edited": edit_the_manifest,
    "file damaged and out of the manifest": leave_a_file_out_of_the_manifest_and_damage_it,
    "manifest laid out anew": lay_the_manifest_out_anew,
    "foreign files added": add_foreign_files,
}


# --- loading ---------------------------------------------------------------------------------------------------------


def bits_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return tensors as something that compares bit by bit, nan included."""
    flat = {name: value.detach().contiguous().flatten().view(torch.uint8) for name, value in tensors.items()}
    return {name: (value.dtype, value.shape, flat[name].numpy().tobytes()) for name, value in tensors.items()}


class Loader:
    """Loads checkpoints as a training and as `load_model` do, and returns what came of it.

    Args:
        flags: of the training that made the checkpoints.
        home: an empty directory.
    """

    def __init__(self, flags: Sequence[str], home: Path) -> None:
        config = parse_train_config([*flags, "--run_dir", str(home / "nothing")])
        accelerator = launch.start("no")
        self.training = build(config, accelerator, prepare_store(config.data, config.tokenizer), StopSignals())

    def resume(self, directory: Path) -> dict[str, Any]:
        """Return the state of a training that resumed; every value of it was another one before."""
        training, learner = self.training, self.training.learner
        learner.config = replace(learner.config, resume=str(directory))
        assert learner.average is not None
        with torch.no_grad():
            for parameter in [*learner.unwrapped_model.parameters(), *learner.average.parameters()]:
                parameter.fill_(0.125)
        learner.optimizer.state.clear()
        learner.lane_states, training.wandb_id = [], "none"
        point = find_resume_point(training)
        assert point is not None
        load_training(training, point)
        return {
            "weights": bits_of(learner.unwrapped_model.state_dict()),
            "average": bits_of(learner.average.state_dict()),
            "optimizer": bits_of(optimizer_tensors(learner.unwrapped_model, learner.optimizer)),
            "lanes": [bits_of(dict(enumerate(state))) for state in learner.lane_states],  # type: ignore[arg-type]
            "progression": asdict(learner.progression),
            "nats": float(training.nats),
            "wandb_id": training.wandb_id,
        }

    @staticmethod
    def load_model(name: Path) -> dict[str, Any]:
        """Return what `load_model` reads."""
        model, tokenizer = load_model(name)
        return {
            "weights": bits_of(model.state_dict()),
            "config": (asdict(model.config), model.vocab_size, model.text),
            "tokenizer": tokenizer.model_proto,
        }


WAYS = ("resume", "load_model", "load_model of the run")
REFUSED, RIGHT, WRONG, OTHER = "refused", "loaded right", "loaded WRONG", "other exception"


def try_damages(
    checkpoints: Checkpoints, flags: Sequence[str], home: Path, *, count: int, seed: int
) -> tuple[dict[str, dict[str, Counter[str]]], list[str]]:
    """Damage a checkpoint `count` times, each time anew, and load it in all ways.

    Returns:
        How often each way ended how, by kind of damage; and a line for each end that should not be.
    """
    loader = Loader(flags, home)
    # of a run, the newest valid checkpoint counts
    intact: dict[str, list[dict[str, Any]]] = {
        "resume": [loader.resume(checkpoints.newer)],
        "load_model": [loader.load_model(checkpoints.newer)],
        "load_model of the run": [loader.load_model(checkpoints.newer), loader.load_model(checkpoints.older)],
    }
    ended: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    wrong: list[str] = []
    kinds = list(DAMAGES)
    run = home / "damaged"
    for number in range(count):
        kind, draw = kinds[number % len(kinds)], random.Random(f"{seed} {number}")
        shutil.rmtree(run, ignore_errors=True)
        for source in (checkpoints.newer, checkpoints.older):
            shutil.copytree(source, run / "checkpoints" / source.name)
        older = run / "checkpoints" / checkpoints.older.name
        DAMAGES[kind](Place(run / "checkpoints" / checkpoints.newer.name, checkpoints, draw))
        directory = next(path for path in (run / "checkpoints").iterdir() if path != older)
        ways: list[Callable[[], dict[str, Any]]] = [
            lambda directory=directory: loader.resume(directory),
            lambda directory=directory: loader.load_model(directory),
            lambda: loader.load_model(run),
        ]
        for way, load in zip(WAYS, ways, strict=True):
            try:
                end = RIGHT if load() in intact[way] else WRONG
            except REFUSALS as error:
                end = REFUSED if len(str(error).splitlines()) == 1 else "refused in several lines"
            except Exception as error:
                end = OTHER
                wrong.append(f"{kind} {number}, {way}: {type(error).__name__} {error}")
            else:
                if end == WRONG:
                    wrong.append(f"{kind} {number}, {way}: loaded something else")
            ended[kind][way][end] += 1
    return ended, wrong


def train(folder: Path, flags: Sequence[str]) -> Checkpoints:
    """Train twice, with another seed the second time."""
    for name, seed in (("run", "42"), ("foreign", "7")):
        run_script("train_distributed.py", *flags, "--seed", seed, "--run_dir", str(folder / name))
    newest, foreign = find_checkpoint(folder / "run"), find_checkpoint(folder / "foreign")
    assert newest == checkpoint_path(folder / "run", NEWER)
    assert foreign == checkpoint_path(folder / "foreign", NEWER)
    return Checkpoints(newer=newest, older=checkpoint_path(folder / "run", OLDER), foreign=foreign)


def tiny_flags(folder: Path) -> list[str]:
    """Write a few reviews and return flags of a training on them that takes a second."""
    from tests.faults.kills import write_reviews

    return [
        "--data.source", "files", "--data.files", str(write_reviews(folder / "reviews.jsonl")),
        "--data.cache_dir", str(folder / "cache"), "--tokenizer.vocab_size", "340", "--model.embedding_dim", "16",
        "--model.hidden_size", "32", "--batch_size", "8", "--seq_len", "16", "--mixed_precision", "no",
        "--tracking.mode", "disabled", *FLAGS,
    ]  # fmt: skip


def figures(ended: Mapping[str, Counter[str]]) -> list[int]:
    """Return a row of the table: how often a damage was tried, and how often each end was met."""
    resumed, loaded, fallen_back = (ended[way] for way in WAYS)
    right = [way[end] for way in (resumed, loaded, fallen_back) for end in (REFUSED, RIGHT)]
    wrong = sum(ended[way][WRONG] for way in WAYS)
    return [resumed.total(), *right, wrong, sum(ended[way].total() for way in WAYS) - sum(right) - wrong]


def main() -> None:
    """Damage as often as asked, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("textgen").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        flags = tiny_flags(home)
        checkpoints = train(home, flags)
        started = time.perf_counter()
        ended, wrong = try_damages(checkpoints, flags, home, count=args.count, seed=args.seed)
        seconds = time.perf_counter() - started
    rows = [[kind, *figures(ended[kind])] for kind in DAMAGES if kind in ended]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(rows[0])))])
    columns = [
        "damage", "tried", "`resume` refused it", "`resume` loaded what was saved", "`load_model` refused it",
        "`load_model` loaded what was saved", "`load_model` of the run refused it",
        "`load_model` of the run loaded what was saved", "loaded WRONG", "other end",
    ]  # fmt: skip
    write_result("corruption", columns, rows, seconds=seconds)
    if wrong or rows[-1][-1]:
        print("\n".join(wrong[:50]), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
