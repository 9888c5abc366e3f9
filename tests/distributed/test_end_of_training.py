"""Processes end: nothing of a training outlives what its destructor needs."""

from __future__ import annotations

from pathlib import Path

from tests.forking import server

SCRIPT = """
import gc
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from textgen.cli import train_main

end_training, prepare, made = Accelerator.end_training, Accelerator.prepare, []

def check_and_end(self):
    alive = sum(type(one) is DistributedDataParallel for one in gc.get_objects())
    print(f"{sum(made)} made, {alive} alive", flush=True)
    end_training(self)

def count(self, *objects, **options):
    prepared = prepare(self, *objects, **options)
    made.extend(type(one) is DistributedDataParallel for one in (prepared if type(prepared) is tuple else [prepared]))
    return prepared

Accelerator.end_training, Accelerator.prepare = check_and_end, count
train_main()
"""


def test_ddp_is_freed_before_the_process_group(tiny_flags: list[str], tmp_path: Path) -> None:
    """Else it may destroy the group with the GIL held, for which a thread of gloo waits: a deadlock now and then."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for name, more in (("trained", []), ("costed", ["--dry_run"])):
        ended = server().run([str(script), *tiny_flags, *more, "--run_dir", str(tmp_path / name)], processes=2)
        assert [one.returncode for one in ended] == [0, 0], ended
        assert [one.stdout.splitlines()[-1] for one in ended] == ["1 made, 0 alive"] * 2, ended
