"""Runs the steps of launch/container/Dockerfile in a fresh virtual environment, without a container engine.

    python -m tests.launch.places.container    # minutes, as root on Linux

The files that the build copies are copied, and its `pip install` lines are run as they are. Then the entry point trains
as a user whom the machine does not know, on a read-only root with an empty /tmp, as in a container with `--read-only`,
`--tmpfs /tmp:exec` and `--user 12345:12345`. SIGTERM saves a checkpoint, and a second start continues from it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "launch" / "container" / "Dockerfile"
USER = "12345"
# In a mount namespace of its own: all is read-only but the run's folder and an empty /tmp.
SANDBOX = """
set -e
mount --make-rprivate /
mount --bind "$RUNS" "$RUNS"
mount -o remount,bind,ro /
mount -t tmpfs -o mode=1777,exec tmpfs /tmp
cd /tmp
exec setpriv --reuid "$AS" --regid "$AS" --clear-groups --no-new-privs "$@"
"""


def main() -> None:
    """Run all steps; an exception names the one that failed."""
    folder = Path(tempfile.mkdtemp(prefix="textgen-container-", dir="/var/tmp"))  # /tmp is hidden later
    folder.chmod(0o755)
    try:
        started = time.monotonic()
        scripts = build(folder)
        print(f"built in {time.monotonic() - started:.0f} s", flush=True)
        train(folder, scripts)
    finally:
        shutil.rmtree(folder)


def build(folder: Path) -> Path:
    """Run the steps of the Dockerfile in a folder; return where the environment has its scripts."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    place, scripts = folder / "textgen", folder / "venv" / "bin"
    place.mkdir()
    subprocess.run([os.environ.get("PYTHON", "/usr/bin/python3"), "-m", "venv", folder / "venv"], check=True)
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE))
    environment = (
        os.environ | arguments | {"PATH": f"{scripts}:{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    )
    for step, content in re.findall(r"^(COPY|RUN) (.*)$", text, re.MULTILINE):
        if step == "COPY":
            *sources, target = content.split()
            for source in sources:
                to = place / target / Path(source).name if target.endswith("/") else place / target
                to.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, to, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, to)
        elif content.startswith("pip install"):
            print(content, flush=True)
            subprocess.run(["bash", "-c", f"umask 022; {content} --quiet"], cwd=place, env=environment, check=True)
    return scripts


def train(folder: Path, scripts: Path) -> None:
    """Train by the entry point, stop it as `docker stop` does, and train to the end."""
    runs = folder / "runs"
    runs.mkdir()
    os.chown(runs, int(USER), int(USER))
    (runs / "text.txt").write_text("".join(f"This is line {number} of a made-up text.\n" for number in range(2000)))
    variables = re.search(r"^ENV (.*)$", DOCKERFILE.read_text().replace("\\\n", " "), re.MULTILINE)
    assert variables is not None
    environment = dict(word.split("=", 1) for word in variables[1].split())
    environment |= {"PATH": f"{scripts}:/usr/bin:/bin:/usr/sbin:/sbin", "RUNS": str(runs), "AS": USER}
    assert 'ENTRYPOINT ["textgen"]' in DOCKERFILE.read_text()
    command = ["unshare", "--mount", "bash", "-c", SANDBOX, "bash", "textgen", "train",
               "--data.files", f"{runs}/text.txt", "--data.source", "files", "--data.txt_documents", "line",
               "--tokenizer.vocab_size", "300",
               "--model.hidden_size", "64", "--model.embedding_dim", "32", "--batch_size", "8", "--seq_len", "16",
               "--max_epochs", "50", "--evaluate_every", "1000000", "--log_every", "1", "--tracking.mode", "disabled",
               "--run_dir", f"{runs}/run"]  # fmt: skip
    process = subprocess.Popen(command, env=environment)
    metrics, status = runs / "run" / "metrics.jsonl", runs / "run" / "status.json"
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert process.poll() is None, "the training has ended"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=120)
    stopped = json.loads(status.read_text())
    assert (code, stopped["state"], stopped["reason"]) == (143, "preempted", "SIGTERM"), (code, stopped)
    print(f"SIGTERM saved step {stopped['step']} as user {(runs / 'run').stat().st_uid}", flush=True)
    subprocess.run(
        [*command, "--max_steps", str(stopped["step"] + 5), "--resume_override"], env=environment, check=True
    )
    ended = json.loads(status.read_text())
    assert (ended["state"], ended["step"]) == ("finished", stopped["step"] + 5), ended
    print(f"a second start continued to step {ended['step']}")


if __name__ == "__main__":
    main()
