"""Kills a training that saves with accelerate's own `save_state`, for comparison with `tests/faults/kills.py`.

`python -m tests.faults.save_state --kills 100`: a plain torch loop on one process, with a model of the same size, saves
as accelerate recommends (`automatic_checkpoint_naming`, `total_limit=2`, the step as a registered object) and goes on
from `load_state()`. Where that raises, the newest checkpoint is deleted and the one before is tried, which is more than
the recommended use does.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.faults.kills import ROOT
from tests.faults.report import write_result

VOCAB_SIZE, EMBEDDING_DIM, HIDDEN_SIZE = 340, 512, 928
BATCH_SIZE, SEQ_LEN, SAVE_EVERY, TOTAL_LIMIT = 8, 8, 5, 2
START_SECONDS = 300.0

# What kills are aimed at; where they struck is read from the journal afterwards.
AIMS = {"save": 12, "step": 6, "start": 2}


# --- the training that is killed -------------------------------------------------------------------------------------


class Model(nn.Module):
    """Embedding, dropout, one LSTM layer, tied output: the shape of `tests/faults/kills.py`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, EMBEDDING_DIM)
        self.dropout = nn.Dropout(0.1)
        self.lstm = nn.LSTM(EMBEDDING_DIM, HIDDEN_SIZE, batch_first=True)
        self.project = nn.Linear(HIDDEN_SIZE, EMBEDDING_DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of the tokens after the first: (batch, time) -> ()."""
        outputs, _ = self.lstm(self.dropout(self.embedding(tokens[:, :-1])))
        logits = self.project(self.dropout(outputs)) @ self.embedding.weight.T  # (batch, time, vocabulary)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Counter:
    """The step, as an object that accelerate saves."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def checkpoints(directory: Path) -> list[Path]:
    """Return accelerate's checkpoints, newest last."""
    found = (directory / "checkpoints").glob("checkpoint_*")
    return sorted(found, key=lambda path: int(re.sub(r"\D", "", path.name)))


def train(directory: Path, steps: int, journal: Path) -> None:
    """Train, and note every step's loss and every save."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration, set_seed

    with journal.open("w", buffering=1) as file:
        project = ProjectConfiguration(
            project_dir=str(directory), automatic_checkpoint_naming=True, total_limit=TOTAL_LIMIT
        )
        accelerator = Accelerator(cpu=True, mixed_precision="no", project_config=project)
        set_seed(0)
        bare = Model()
        model, optimizer = accelerator.prepare(bare, torch.optim.Adam(bare.parameters(), lr=1e-3))
        counter = Counter()
        accelerator.register_for_checkpointing(counter)
        while found := checkpoints(directory):
            project.iteration = int(found[-1].name.removeprefix("checkpoint_")) + 1  # else it would save over them
            try:
                accelerator.load_state()
                break
            except Exception as error:
                file.write(f"broken {found[-1].name} {type(error).__name__}\n")
                shutil.rmtree(found[-1])
        else:  # whatever half a load has left
            set_seed(0)
            bare.load_state_dict(Model().state_dict())
            optimizer.state.clear()
            counter.step = 0
        while counter.step < steps:
            draw = torch.Generator().manual_seed(counter.step)
            tokens = torch.randint(VOCAB_SIZE, (BATCH_SIZE, SEQ_LEN + 1), generator=draw)
            loss = model(tokens)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            file.write(f"step {counter.step} {loss.item().hex()}\n")
            counter.step += 1
            if counter.step % SAVE_EVERY == 0:
                file.write("save\n")
                accelerator.save_state()
                file.write("saved\n")


# --- the kills -------------------------------------------------------------------------------------------------------


@dataclass
class Kill:
    """One kill, and what came of it."""

    in_save: bool
    broken: int = 0
    other: int = 0
    lost: int = 0
    """steps that the restart takes again"""


def _start(directory: Path, steps: int, journal: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.faults.save_state", "--train", str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    with journal.with_suffix(".out").open("w") as output:
        return subprocess.Popen(
            [*command, "--steps", str(steps), "--journal", str(journal)], cwd=ROOT, env=environment, stdout=output,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip


def _lines(journal: Path) -> list[list[str]]:
    text = journal.read_text() if journal.exists() else ""
    return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _losses(journal: Path) -> dict[int, str]:
    return {int(words[1]): words[2] for words in _lines(journal) if words[0] == "step"}


def _wait_for(
    process: subprocess.Popen[bytes], aim: str, draw: random.Random, journal: Path, *, limit: int, **timing: float
) -> None:
    """Wait for the moment of a kill; the steps up to `limit` are this launch's, so that the work never runs out."""
    started = time.monotonic()
    moment, fraction, seen = started + draw.random() * timing["start"], draw.random(), None
    wait = draw.uniform(0, 0.5)
    while aim != "start" or time.monotonic() < moment:
        now, lines = time.monotonic(), _lines(journal)
        if process.poll() is not None or now - started > START_SECONDS:
            raise RuntimeError(f"ended by itself, or never stepped, see `{journal.with_suffix('.out')}`")
        taken = max((int(words[1]) + 1 for words in lines if words[0] == "step"), default=0)
        stepping = taken > 0
        if taken >= limit:
            return
        if aim == "start":
            if stepping:
                return
        elif stepping and wait > 0:
            wait -= 0.001
        elif aim == "step" and stepping and lines[-1] != ["save"]:
            return
        elif stepping and lines[-1] == ["save"] and seen is None:
            seen, moment = True, now + fraction * timing["save"]
        elif seen and (now >= moment or lines[-1] != ["save"]):
            return
        time.sleep(0.001)


def run(home: Path, kills: int, *, seed: int, share: int) -> list[Kill]:
    """Kill and restart; compare with a run that nobody touched."""
    draw, steps = random.Random(seed), share * kills + 20
    untouched, killed = home / "untouched", home / "killed"
    timing = _untouched(untouched, steps)
    killed.mkdir()
    wanted, history = _losses(home / "untouched" / "journal-0"), {}
    cards = [aim for aim, part in AIMS.items() for _ in range(-(-part * kills // sum(AIMS.values())))][:kills]
    draw.shuffle(cards)
    done: list[Kill] = []
    same = True
    for launch, aim in enumerate([*cards, None]):
        journal = killed / f"journal-{launch}"
        process = _start(killed, steps, journal)
        try:
            if aim is None:
                if process.wait() != 0:
                    raise RuntimeError(f"the last launch failed, see `{journal.with_suffix('.out')}`")
            else:
                _wait_for(process, aim, draw, journal, limit=(launch + 1) * share, **timing)
        finally:
            process.kill()
            process.wait()
        lines, losses = _lines(journal), _losses(journal)
        if done:
            done[-1].broken += any(words[0] == "broken" for words in lines)
            reference = wanted if same else wanted | history  # once it has turned elsewhere, that is its way
            if any(loss != reference.get(step) for step, loss in losses.items() if same or step in history):
                done[-1].other, same = 1, False
            if losses:
                done[-1].lost = max(max(history, default=-1) + 1 - min(losses), 0)
        if losses:
            history = {step: loss for step, loss in history.items() if step < min(losses)} | losses
        if aim is not None:
            done.append(Kill(in_save=bool(lines) and lines[-1] == ["save"]))
            broken = " ".join(" ".join(words) for words in lines if words[0] == "broken")
            print(f"kill {launch + 1}/{kills}: aimed at {aim}, {done[-1]} {broken}", file=sys.stderr, flush=True)
    return done


def _untouched(directory: Path, steps: int) -> dict[str, float]:
    """Train without kills; return the seconds to the first step and those of a save."""
    directory.mkdir(parents=True)
    journal, started, saves = directory / "journal-0", time.monotonic(), []
    process, start, began = _start(directory, steps, journal), 0.0, 0.0
    while process.poll() is None:
        now, lines = time.monotonic(), _lines(journal)
        if not start and lines:
            start = now - started
        saving = bool(lines) and lines[-1] == ["save"]
        if saving and not began:
            began = now
        elif began and not saving:
            saves.append(now - began)
            began = 0.0
        time.sleep(0.005)
    if process.returncode != 0:
        raise RuntimeError(f"the untouched run failed, see `{journal.with_suffix('.out')}`")
    return {"start": start, "save": sorted(saves)[len(saves) // 2]}


def table(kills: list[Kill]) -> list[list[Any]]:
    """Return a row for kills in a save, elsewhere, and all."""
    groups = {
        "in a save": [k for k in kills if k.in_save],
        "elsewhere": [k for k in kills if not k.in_save],
        "all": kills,
    }
    return [
        [name, len(g), sum(k.broken for k in g), sum(k.other for k in g), max((k.lost for k in g), default=0)]
        for name, g in groups.items()
    ]


def main() -> None:
    """Measure and write the table, or be the training that is killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=int, default=12, help="steps per kill")
    parser.add_argument("--no-write", action="store_true", help="only print")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        train(args.train, args.steps, args.journal)
        return
    started = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="save-state-"))
    rows = table(run(home, args.kills, seed=args.seed, share=args.share))
    columns = [
        "killed", "kills", "restarts whose newest checkpoint cannot be loaded", "restarts with other losses",
        "most steps taken again",
    ]  # fmt: skip
    if args.no_write:
        print("\n".join(" | ".join(map(str, row)) for row in [columns, *rows]))
    else:
        write_result("save_state", columns, rows, seconds=time.monotonic() - started)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
