"""Kills a training again and again, and holds what it became against one that nobody touched.

`python -m tests.faults.kills --kills 200`: SIGKILL of real trainings on 1, 2 and 4 processes, at random moments of
which most are aimed at a save, each followed by the same command. `tests/faults/journaled_training.py` notes the bits
of every loss, so that a step that is replayed is held against the first time, and both against the untouched run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.report import write_result
from textgen.runs.checkpoint import checkpoints, newest_valid, verify
from textgen.runs.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("journaled_training.py")

# All processes of a job are to be gone so soon after one of them, or their launcher, was killed.
GONE_SECONDS = 5.0
# A busy machine starts four processes in half a minute.
START_SECONDS = 300.0

BATCH_SIZE, SEQ_LEN, KEEP_LAST = 8, 8, 2
FLAGS = [
    "--tokenizer.vocab_size", "340", "--model.num_layers", "1", "--model.dropout", "0.1", "--ema_decay", "0.9",
    "--max_grad_norm", "1", "--log_every", "3", "--batch_size", str(BATCH_SIZE), "--seq_len", str(SEQ_LEN),
    "--gradient_accumulation_steps", "2", "--save_every", "5", "--evaluate_every", "33", "--evaluate_documents", "4",
    "--keep_last", str(KEEP_LAST), "--max_epochs", "1000", "--mixed_precision", "no", "--tracking.mode", "disabled",
    "--sample_prompts", "[]",
]  # fmt: skip
# 6 million parameters: 96 MB a checkpoint, 0.35 s of writing at 0.1 s a step (2026-11-23)
LARGE = ["--model.embedding_dim", "512", "--model.hidden_size", "928"]

# What kills are aimed at, in these shares; where they struck is read from the disk afterwards.
AIMS = {"save": 10, "prune": 3, "step": 4, "start": 3}
# Whom they strike, where there are several processes: the job at once, one that trains, or the launcher alone.
TARGETS = {"launcher": 1, "worker": 1, "all": 1}

STARTING, STEPPING, WRITING, RENAMED, REPLACING, PRUNING = (
    "starting up", "between saves", "writing a checkpoint", "renamed, not pruned", "between two renames", "pruning",
)  # fmt: skip
IN_A_SAVE = (WRITING, RENAMED, REPLACING, PRUNING)

WORDS = """
the plot was dull and every hero seemed lost while music carried a weak script through long quiet scenes that nobody
in our row would call thrilling but my wife laughed twice at two silly jokes about rain trains love and an old dog
""".split()  # noqa: SIM905


def write_reviews(path: Path, documents: int = 120) -> Path:
    """Write made-up reviews with labels, the same ones always; no two are equal."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(documents):
            text = " ".join(draw.choices(WORDS, k=draw.randint(20, 60)))
            row = {"text": f"{text.capitalize()}. (No. {number})", "label": ["bad", "good", None][number % 3]}
            file.write(json.dumps(row) + "\n")
    return path


# --- jobs ------------------------------------------------------------------------------------------------------------


class Job:
    """A training on one or several processes, with everything that its launcher starts.

    Args:
        home: of a run: its directory, journals and outputs.
        launch: number of this launch, which names journals and output.
        processes: how many there are; a launcher is one more, where there are several.
        flags: of the training, without `--run_dir`.
    """

    def __init__(self, home: Path, launch: int, *, processes: int, flags: Sequence[str]) -> None:
        self.home, self.launch, self._processes = home, launch, processes
        self.mark = f"TEXTGEN_JOB={uuid.uuid4().hex}"
        command = [sys.executable, str(DRIVER)]
        if processes > 1:
            options = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
            command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(DRIVER)]
        (home / "journal").mkdir(parents=True, exist_ok=True)
        self.output = home / f"output-{launch}.txt"
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
            "TEXTGEN_JOURNAL": str(home / "journal"), "TEXTGEN_LAUNCH": str(launch),
        } | dict([self.mark.split("=")])  # fmt: skip
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *flags, "--run_dir", str(home / "run")], cwd=ROOT, env=environment, stdout=output,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.started = time.monotonic()

    def pids(self) -> list[int]:
        """Return the processes that run, launcher included."""
        self.process.poll()  # reaps it
        mark, found = f"\0{self.mark}\0".encode(), []
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            try:
                environment = Path(entry.path, "environ").read_bytes()  # empty of one that has ended
            except OSError:
                continue
            if mark in b"\0" + environment:
                found.append(int(entry.name))
        return found

    def workers(self) -> list[int]:
        """Return the processes that train, or are about to; helpers of theirs are none."""
        if self._processes == 1:
            return [self.process.pid]
        return [
            pid for pid in self.pids()
            if _read_proc(pid, "stat").rpartition(")")[2].split()[1:2] == [str(self.process.pid)]
            and DRIVER.name in (words := _read_proc(pid, "cmdline")) and "accelerate.commands" not in words
        ]  # fmt: skip

    def steps(self) -> int:
        """Return the last step that the main process has noted in this launch, counted from 1; 0 before the first."""
        return 1 + max((entry[0] for entry in _read_journal(self.home / "journal" / f"{self.launch}-0")), default=-1)

    def has_stepped(self) -> bool:
        """Tell whether some process has noted a step of this launch."""
        return any(path.stat().st_size for path in (self.home / "journal").glob(f"{self.launch}-*"))

    def wait_until_gone(self, seconds: float) -> int:
        """Wait until no process is left, at most so long; kill and count those that are."""
        deadline = time.monotonic() + seconds
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.02)
        kill(left)
        while self.pids():
            time.sleep(0.02)
        self.process.wait()
        return len(left)

    def tail(self) -> str:
        """Return the end of what it printed."""
        return self.output.read_text(errors="replace")[-3000:]


def kill(pids: Sequence[int]) -> None:
    """Send SIGKILL to processes, some of which may be gone."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _read_proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


# --- what the disk tells ---------------------------------------------------------------------------------------------


def entries(run_dir: Path) -> list[str]:
    """Return the names in a run's folder of checkpoints."""
    try:
        return os.listdir(run_dir / "checkpoints")
    except FileNotFoundError:
        return []


def being_written(names: Sequence[str]) -> str | None:
    """Return the name of the folder that a checkpoint is written into."""
    return next((n for n in names if n.startswith(".step-") and n.count(".") == 2), None)


def is_to_be_pruned(names: Sequence[str], best: int | None) -> bool:
    """Tell whether there are more checkpoints than a finished save leaves."""
    steps = sorted((int(n.removeprefix("step-")) for n in names if n.removeprefix("step-").isdigit()), reverse=True)
    return any(step != best for step in steps[KEEP_LAST:])


def phase_of(run_dir: Path, *, stepped: bool) -> tuple[str, int]:
    """Return where a kill has struck, and how many files of a checkpoint were there, from what lies on the disk."""
    names = entries(run_dir)
    if not stepped:
        return STARTING, 0
    if any(name.endswith(".old") for name in names):
        return REPLACING, 0
    if (aside := being_written(names)) is not None:
        try:
            return WRITING, len(os.listdir(run_dir / "checkpoints" / aside))
        except FileNotFoundError:  # a process that outlives the kill for an instant has renamed it
            return RENAMED, 0
    if any(name.endswith(".removed.tmp") for name in names):
        return PRUNING, 0
    return (RENAMED if is_to_be_pruned(names, _best_step(run_dir)) else STEPPING), 0


def _best_step(run_dir: Path) -> int | None:
    for _, path in checkpoints(run_dir):
        try:
            return json.loads((path / "trainer.json").read_text())["progression"]["best_step"]
        except OSError:
            continue
    return None


# --- one run that is killed ------------------------------------------------------------------------------------------


@dataclass
class Kill:
    """One kill, and what came of it; the restart is the launch after it."""

    aim: str
    target: str
    phase: str = STARTING
    files: int = 0
    left_over: int = 0
    gone: float = 0.0
    """seconds until no process was left"""
    invalid: int = 0
    failed: int = 0
    differing: int = 0
    skipped: int = 0
    repeated: int = 0


@dataclass
class Outcome:
    """A killed run against the untouched one."""

    processes: int
    kills: list[Kill]
    steps: int
    replayed: int
    metrics: int
    """rows of train/loss and valid/loss that differ, or stand out of order"""
    tensors: int
    """files of the last checkpoint that differ"""
    notes: list[str] = field(default_factory=list)


@dataclass
class Timing:
    """What kills are aimed by; taken from the untouched run."""

    start: float
    save: float


class Trial:
    """Trains once untouched and once under kills.

    Args:
        processes: of the training.
        count: kills.
        home: an empty directory.
        seed: of all that is drawn.
        flags: of the model's size.
        share: steps that a launch adds on average, at most; so the kills never run out of work.
        gone_seconds: all processes of the job are to be gone so soon after a kill.
        say: takes lines of progress.
    """

    def __init__(
        self, processes: int, count: int, home: Path, *, seed: int, flags: Sequence[str], share: int,
        gone_seconds: float = GONE_SECONDS, say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.processes, self.count, self.home, self.share, self.say = processes, count, home, share, say
        self.gone_seconds = gone_seconds
        self.draw = random.Random(f"{seed} {processes}")
        self.steps = share * count + 20
        home.mkdir(parents=True, exist_ok=True)
        reviews = write_reviews(home / "reviews.jsonl")
        self.flags = [
            "--data.source", "files", "--data.files", str(reviews), "--data.cache_dir", str(home / "cache"), *FLAGS,
            *flags, "--max_steps", str(self.steps),
        ]  # fmt: skip
        self.notes: list[str] = []

    def run(self) -> Outcome:
        """Train, kill, restart, compare."""
        timing = self._untouched()
        kills: list[Kill] = []
        aims = _deck(AIMS, self.count, self.draw)
        targets = _deck(TARGETS if self.processes > 1 else {"all": 1}, self.count, self.draw)
        for launch, (aim, target) in enumerate(zip(aims, targets, strict=True)):
            kills.append(self._killed_launch(launch, aim, target, timing, kills[-1] if kills else None))
        job = self._start("killed", len(kills))
        if job.process.wait() != 0:
            kills[-1].failed += 1
            self._note(f"the last launch ended with {job.process.returncode}:\n{job.tail()}")
        job.wait_until_gone(self.gone_seconds)
        self._check_first_step(job, kills[-1], self._expected)
        return self._compare(kills)

    def _start(self, name: str, launch: int) -> Job:
        return Job(self.home / name, launch, processes=self.processes, flags=self.flags)

    def _untouched(self) -> Timing:
        job, run_dir = self._start("untouched", 0), self.home / "untouched" / "run"
        start, saves, began = 0.0, [], {}
        while job.process.poll() is None:
            now = time.monotonic()
            if not start and job.has_stepped():
                start = now - job.started
            aside = being_written(entries(run_dir))
            if aside is not None:
                began.setdefault(aside, now)
            saves += [now - began.pop(name) for name in list(began) if name != aside]
            time.sleep(0.01)
        if job.process.returncode != 0:
            raise RuntimeError(f"the untouched run failed:\n{job.tail()}")
        timing = Timing(start=start, save=sorted(saves)[len(saves) // 2])
        self.say(
            f"{self.processes} processes: {self.steps} steps in {time.monotonic() - job.started:.0f} s untouched, "
            f"the first after {timing.start:.1f} s, a save takes {timing.save:.2f} s"
        )
        return timing

    _expected = 0
    """the step at which the next launch is to go on"""

    def _killed_launch(self, launch: int, aim: str, target: str, timing: Timing, before: Kill | None) -> Kill:
        run_dir, job = self.home / "killed" / "run", self._start("killed", launch)
        this = Kill(aim, target)
        why = _wait_for(job, aim, timing, self.draw, run_dir, limit=(launch + 1) * self.share)
        failure = None
        if why is not None:
            failure = f"launch {launch} {why}:\n{job.tail()}"
        victims = job.pids()
        if this.target == "launcher":
            victims = [job.process.pid]
        elif this.target == "worker":
            victims = self.draw.sample(workers, 1) if (workers := job.workers()) else victims
        kill(victims)
        this.phase, this.files = phase_of(run_dir, stepped=job.has_stepped())
        killed_at = time.monotonic()
        this.left_over = job.wait_until_gone(self.gone_seconds)
        this.gone = time.monotonic() - killed_at
        if this.left_over:
            self._note(f"{this.left_over} left over, {this}, launch {launch}:\n{job.tail()}")
        if failure is not None:
            self._note(failure)
            if before is None:
                raise RuntimeError(failure)
            before.failed += 1
        else:
            self._check_first_step(job, before, self._expected)
        newest, problems = newest_valid(run_dir)
        if problems:
            this.invalid = 1
            self._note(f"invalid after {this}: {problems}")
        self._expected = verify(newest, []).step if newest is not None else 0
        self.say(
            f"{self.processes} processes, kill {launch + 1}/{self.count}: aimed at {aim}, {this.target} in "
            f"`{this.phase}` ({this.files} files), gone after {this.gone:.2f} s, goes on at {self._expected}"
        )
        return this

    def _check_first_step(self, job: Job, before: Kill | None, expected: int) -> None:
        for path in (self.home / "killed" / "journal").glob(f"{job.launch}-*"):
            first = next(_read_journal(path), None)
            if first is not None and first[0] != expected:
                self._note(f"launch {job.launch} ({path.name}) went on at {first[0]}, expected {expected}")
                if before is not None:
                    before.failed += 1
                    return

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.say(f"!!! {text}")

    # --- comparison

    def _compare(self, kills: list[Kill]) -> Outcome:
        untouched = read_journals(self.home / "untouched" / "journal")[0]
        launches = read_journals(self.home / "killed" / "journal")
        wanted = {(e[0], e[1], rank): e for rank, found in untouched.items() for e in found}
        record = json.loads((self.home / "killed" / "run" / "data.json").read_text())
        windows = (record["splits"]["train"]["tokens"] - 1) // BATCH_SIZE // SEQ_LEN
        replayed = 0
        stepped = sorted(launches)
        if min(e[0] for found in launches[stepped[0]].values() for e in found) != 0:
            kills[0].skipped += 1
        for place, launch in enumerate(stepped):
            blamed = kills[max(launch - 1, 0)]
            ranks = launches[launch]
            for rank, found in ranks.items():
                blamed.differing += sum(e != wanted[e[0], e[1], rank] for e in found)
            first = min(e[0] for found in ranks.values() for e in found)
            after = stepped[place + 1] if place + 1 < len(stepped) else None
            end = self.steps
            if after is not None:
                end = min(e[0] for found in launches[after].values() for e in found)
            last = max(e[0] for found in ranks.values() for e in found)
            replayed += max(last + 1 - end, 0)
            seen: Counter[Any] = Counter()
            for found in ranks.values():
                for step, _, epoch, of_windows, lanes, _, _ in found:
                    if step < end:
                        seen.update((step, epoch, *sample) for sample in zip(of_windows, lanes, strict=True))
            due = Counter((s, *divmod(s, windows), lane) for s in range(first, end) for lane in range(BATCH_SIZE))
            blamed.skipped += (due - seen).total()
            blamed.repeated += (seen - due).total()
        if len(wanted) != self.steps * 2 * self.processes:
            self._note(f"the untouched run noted {len(wanted)} micro-batches")
            kills[-1].skipped += 1
        return Outcome(self.processes, kills, self.steps, replayed, self._metrics(), self._tensors(), self.notes)

    def _metrics(self) -> int:
        differing = 0
        for name in ("train/loss", "valid/loss"):
            rows = [
                [(row["step"], row[name]) for row in read_metrics(self.home / run / "run") if name in row]
                for run in ("untouched", "killed")
            ]
            steps = [step for step, _ in rows[1]]
            differing += len(set(rows[0]) ^ set(rows[1]))
            differing += sum(a >= b for a, b in itertools.pairwise(steps))
        return differing

    def _tensors(self) -> int:
        directories = []
        for name in ("untouched", "killed"):
            step, directory = checkpoints(self.home / name / "run")[0]
            if step != self.steps:
                self._note(f"the {name} run ends at step {step}")
            directories.append(directory)
        manifests = [verify(directory).files for directory in directories]
        tensors = [{n: v for n, v in files.items() if n.endswith(".safetensors")} for files in manifests]
        progressions = [json.loads((d / "trainer.json").read_text())["progression"] for d in directories]
        if progressions[0] != progressions[1]:
            self._note(f"progressions differ: {progressions}")
        return len(dict(set(tensors[0].items()) ^ set(tensors[1].items()))) + (progressions[0] != progressions[1])


def _deck(shares: Mapping[str, int], count: int, draw: random.Random) -> list[str]:
    """Return so many names in their shares, in random order; where there are few, the first are favoured."""
    total = sum(shares.values())
    cards = [name for name, share in shares.items() for _ in range(-(-share * count // total))][:count]
    draw.shuffle(cards)
    return cards


def _wait_for(
    job: Job, aim: str, timing: Timing, draw: random.Random, run_dir: Path, *, limit: int
) -> str | None:  # fmt: skip
    """Wait for the moment of a kill; return what went wrong where the job ends by itself or never steps."""

    def ended() -> str | None:
        if job.process.poll() is not None:
            return f"ended by itself with {job.process.returncode}"
        if time.monotonic() - job.started > START_SECONDS:
            return f"does not step after {START_SECONDS:.0f} s"
        return None

    if aim == "start":
        moment = job.started + draw.uniform(0.02, 1) * timing.start
        while time.monotonic() < moment and not job.has_stepped():
            if why := ended():
                return why
            time.sleep(0.005)
        return None
    while not job.has_stepped():
        if why := ended():
            return why
        time.sleep(0.01)
    wait = draw.uniform(0, 1.5 if aim == "step" else 1.0)
    moment = time.monotonic() + wait
    checked, fraction = time.monotonic(), draw.random()
    seen: str | None = None
    best = _best_step(run_dir)
    while True:
        now = time.monotonic()
        if now - checked > 0.1:
            checked, best = now, _best_step(run_dir)
            if why := ended():
                return why
            if job.steps() >= limit:
                return None
        names = entries(run_dir)
        if aim == "step":
            if now >= moment and being_written(names) is None and not is_to_be_pruned(names, best):
                return None
        elif aim == "prune":
            if now >= moment and (
                any(n.endswith(".removed.tmp") for n in names)
                or (being_written(names) is None and is_to_be_pruned(names, best))
            ):
                return None
        else:
            aside = being_written(names)
            if seen is None and now >= moment and aside is not None:
                seen, moment = aside, now + fraction * timing.save
            elif seen is not None and (now >= moment or aside != seen):
                return None
        time.sleep(0.001)


def _read_journal(path: Path) -> Iterator[list[Any]]:
    """Yield a process's notes; a line that a kill cut off is none."""
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def read_journals(directory: Path) -> dict[int, dict[int, list[list[Any]]]]:
    """Return the notes of all launches that made a step: by launch and rank."""
    found: dict[int, dict[int, list[list[Any]]]] = defaultdict(dict)
    for path in directory.iterdir():
        launch, rank = map(int, path.name.split("-"))
        if notes := list(_read_journal(path)):
            found[launch][rank] = notes
    return dict(found)


# --- the table -------------------------------------------------------------------------------------------------------

COLUMNS = [
    "processes", "killed while", "kills", "failed restarts", "differing losses", "samples skipped", "samples repeated",
    "invalid newest checkpoints", "processes left over", "all gone within, s", "differing rows of metrics",
    "final weights equal",
]  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> list[list[Any]]:
    """Return a row per phase and number of processes, and one per number of processes and for all together."""
    rows = []

    def row(first: Any, name: str, kills: Sequence[Kill], of: Sequence[Outcome]) -> list[Any]:
        sums = [
            sum(getattr(k, key) for k in kills)
            for key in ("failed", "differing", "skipped", "repeated", "invalid", "left_over")
        ]
        whole = [sum(o.metrics for o in of), "no" if any(o.tensors for o in of) else "yes"] if of else ["", ""]
        return [first, name, len(kills), *sums, f"{max(k.gone for k in kills):.1f}", *whole]

    for outcome in outcomes:
        for phase in (STARTING, STEPPING, WRITING, RENAMED, REPLACING, PRUNING):
            if kills := [k for k in outcome.kills if k.phase == phase]:
                name = phase
                if phase == WRITING:
                    counts = [k.files for k in kills]
                    name += f" ({min(counts)}-{max(counts)} files there)"
                rows.append(row(outcome.processes, name, kills, []))
        replayed = f"all: {outcome.steps} steps, {outcome.replayed} of them again"
        rows.append(row(outcome.processes, replayed, outcome.kills, [outcome]))
    everything = [kill for outcome in outcomes for kill in outcome.kills]
    saves = sum(kill.phase in IN_A_SAVE for kill in everything)
    rows.append(row("all", f"all, {100 * saves / len(everything):.0f} % in a save", everything, outcomes))
    return rows


def split_kills(kills: int) -> dict[int, int]:
    """Return kills by number of processes: 40, 35 and 25 %."""
    two, four = round(kills * 0.35), round(kills * 0.25)
    return {1: kills - two - four, 2: two, 4: four}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="over 1, 2 and 4 processes: 40, 35 and 25 %% of them")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="kept; default: a temporary one, kept where something is wrong")
    parser.add_argument("--share", type=int, default=6, help="steps per kill")
    parser.add_argument("--gone-seconds", type=float, default=GONE_SECONDS)
    parser.add_argument("--no-write", action="store_true", help="only print")
    args = parser.parse_args()
    home = args.directory or Path(tempfile.mkdtemp(prefix="kills-"))
    started = time.monotonic()
    outcomes = [
        Trial(
            processes,
            count,
            home / str(processes),
            seed=args.seed,
            flags=LARGE,
            share=args.share,
            gone_seconds=args.gone_seconds,
            say=_say,
        ).run()
        for processes, count in split_kills(args.kills).items()
        if processes in args.processes
    ]
    rows, seconds = table(outcomes), time.monotonic() - started
    if args.no_write:
        print("\n".join(" | ".join(map(str, row)) for row in [COLUMNS, *rows]))
    else:
        write_result("kills", COLUMNS, rows, seconds=seconds)
    print(f"{seconds / 60:.1f} minutes", file=sys.stderr)
    if notes := [note for outcome in outcomes for note in outcome.notes]:
        raise SystemExit(f"{len(notes)} things were not as they should be, see `{home}`")
    if args.directory is None:
        shutil.rmtree(home)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
