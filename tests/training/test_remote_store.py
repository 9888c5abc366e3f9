"""Trainings on a store at an address have a local store's losses, through failures and kills, and keep no secret."""

from __future__ import annotations

import http.server
import os
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tests.forking import run_script, server
from tests.object_storage import SECRET, Faults, ObjectStorage
from tests.training.test_resume import assert_same_end, steps_of
from textgen.config import TrainConfig
from textgen.data.lanes import Course
from textgen.data.store import TokenStore
from textgen.runs.metrics_file import read_metrics

ADDRESS = "s3://trainings/store"
SCRIPT = "train_distributed.py"


@pytest.fixture
def flags(tiny_flags: list[str], tmp_path: Path) -> list[str]:
    """Flags of a training over an epoch of the store in shards, without its store and its folder."""
    rest = tiny_flags[tiny_flags.index("--tokenizer.vocab_size") + 2 :]
    sizes = ["--batch_size", "16", "--seq_len", "32", "--max_steps", "70", "--save_every", "5", "--log_every", "1"]
    return [*rest, *sizes, "--data.cache_dir", str(tmp_path / "cache")]


@pytest.fixture
def local_run(flags: list[str], sharded: TokenStore, tmp_path: Path) -> Path:
    """A finished training on the local store."""
    run_script(SCRIPT, *flags, "--data.store", str(sharded.directory), "--run_dir", str(tmp_path / "local"))
    return tmp_path / "local"


def test_a_training_killed_while_its_storage_is_dead_ends_as_one_on_a_local_store(
    flags: list[str], local_run: Path, sharded: TokenStore, object_storage: ObjectStorage, tmp_path: Path
) -> None:
    assert sharded.shards is not None
    object_storage.send(sharded.directory, ADDRESS)
    two_shards = 2 * max(record.size for record in sharded.shards.records) / 2**30
    argv = [
        SCRIPT, *flags, "--data.store", ADDRESS, "--data.store_cache_gib", str(two_shards),
        "--run_dir", str(tmp_path / "remote"),
    ]  # fmt: skip
    files = {"output": tmp_path / "out.txt", "error": tmp_path / "err.txt"}
    seed = TrainConfig().seed
    late = Course(sharded.shards, batch_size=16, seq_len=32, seed=seed).find(40).shard
    object_storage.faults = Faults(refused=True, only=f"train-{late:05}")
    training = server().start(argv, **files)
    deadline = time.monotonic() + 120
    while not files["error"].exists() or "trying again for 300 s" not in files["error"].read_text():
        assert time.monotonic() < deadline
        assert training.poll() is None
        time.sleep(0.01)
    training.kill()
    while training.poll() is None:
        time.sleep(0.01)
    assert 0 < max(steps_of(tmp_path / "remote")) < 70

    object_storage.faults = Faults()
    done = run_script(*argv)
    assert_same_end(tmp_path / "remote", local_run)
    # What a config, a log, a report and the cache hold of the credentials.
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    for content in [path.read_bytes() for path in written] + [done.stdout.encode(), done.stderr.encode()]:
        assert SECRET.encode() not in content
        assert b"a-key-id-of-the-test" not in content
    assert ADDRESS in (tmp_path / "remote" / "config.yaml").read_text()


def test_two_processes_fetch_each_shard_once_and_have_the_losses_of_one(
    flags: list[str], local_run: Path, sharded: TokenStore, object_storage: ObjectStorage, tmp_path: Path
) -> None:
    object_storage.send(sharded.directory, ADDRESS)
    argv = [SCRIPT, *flags, "--data.store", ADDRESS, "--run_dir", str(tmp_path / "remote")]
    done = server().run(argv, processes=2)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    ours, theirs = ([row["train/loss"] for row in read_metrics(run) if "train/loss" in row] for run in (
        tmp_path / "remote", local_run))  # fmt: skip
    assert len(ours) == 70
    assert ours == pytest.approx(theirs, rel=1e-5)
    shards = [line for line in object_storage.requests if line.startswith("GET") and "train-" in line]
    assert len(shards) == len(set(shards)) == len(sharded.shards or ())


def test_an_address_that_cannot_be_used_ends_with_one_line_and_no_run(
    flags: list[str], object_storage: ObjectStorage, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for address, reason in (
        (f"s3://key:{SECRET}@bucket/store", "was given with a user, a password or a query"),
        ("reference://x", "is not of a protocol that can be used"),
        ("s3://no-such-bucket/store", "`s3://no-such-bucket/store/store.json` does not exist"),
    ):
        done = run_script(SCRIPT, *flags, "--data.store", address, "--run_dir", str(run), expect=2)
        assert reason in done.stderr.splitlines()[-1]
        assert SECRET not in done.stdout + done.stderr
        assert not list(run.rglob("config.yaml"))
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_a_store_is_read_over_https(sharded: TokenStore, tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    handler = partial(_Silent, directory=str(sharded.directory.parent))
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    web.socket = context.wrap_socket(web.socket, server_side=True)
    threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
    script = """
import sys
from textgen.config import DataConfig
from textgen.data.store import open_store
store = open_store(DataConfig(store=sys.argv[1], cache_dir=sys.argv[2]))
print(sum(part.num_tokens for part in store.parts("train")))
"""
    url = f"https://127.0.0.1:{web.server_port}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, f"{url}/{sharded.directory.name}", str(tmp_path / "cache")],
            capture_output=True, text=True, timeout=300, check=False,
            env=os.environ | {"SSL_CERT_FILE": str(certificate), "PYTHONPATH": sys.path[0]},
        )  # fmt: skip
    finally:
        web.shutdown()
        web.server_close()
    assert done.stdout.strip() == str(sharded.record["splits"]["train"]["tokens"]), done.stderr


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *values: object) -> None:
        """Write nothing."""


def make_certificate(folder: Path) -> Path:
    """Write a certificate of 127.0.0.1 with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    encoding = serialization.Encoding.PEM
    path = folder / "certificate.pem"
    path.write_bytes(
        certificate.public_bytes(encoding)
        + key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path
