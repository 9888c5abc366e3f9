"""`textgen publish`: what it writes reads back as the same model, and its card says what the run's files say."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from tokenizers import Tokenizer as FastTokenizer

from textgen.cli import main
from textgen.commands.export import export_command
from textgen.commands.parsing import parse_train_config
from textgen.commands.publish import publish_command
from textgen.model import files as model_files
from textgen.model.files import read_model
from textgen.runs.checkpoint import newest_valid
from textgen.runs.metrics_file import read_metrics
from textgen.tokenizer import Tokenizer

Capture = pytest.CaptureFixture[str]
FILES = {
    "README.md", "config.json", "model.safetensors", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def refusal(capsys: Capture, *argv: str) -> str:
    """Return the one line with which the verb ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["publish", *argv])
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    (line,) = said.err.splitlines()
    return line.removeprefix("error: ")


def sampled(capsys: Capture, name: str | Path) -> str:
    capsys.readouterr()
    main(["sample", str(name), "--prompt", "The plot", "--max_new_tokens", "40", "--seed", "3"])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def published(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "reviews"
    publish_command([str(tiny_run), "--to", str(path), "--license", "mit"])
    return path


@pytest.fixture
def checkpoint(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a checkpoint in a run of its own."""
    newest, _ = newest_valid(Path(shutil.copytree(tiny_run, tmp_path / "run")))
    assert newest is not None
    return newest


# --- a folder --------------------------------------------------------------------------------------------------------


def test_published_folder_samples_the_text_of_the_run(published: Path, tiny_run: Path, capsys: Capture) -> None:
    assert {path.name for path in published.iterdir()} == FILES
    assert sampled(capsys, published) == sampled(capsys, tiny_run)


def test_a_published_tokenizer_has_the_same_ids_for_hugging_face(published: Path) -> None:
    fast = FastTokenizer.from_file(str(published / "tokenizer.json"))
    text = "The plot was \u2581 Ça 🙂 <br /><br />silly."
    assert fast.encode(text).ids == Tokenizer.from_file(published).encode(text)


def test_nothing_is_published_over_something_else(published: Path, tiny_run: Path, capsys: Capture) -> None:
    before = {path: path.read_bytes() for path in published.iterdir()}
    assert (
        refusal(capsys, str(tiny_run), "--to", str(published))
        == f"`{published}` is not an empty folder: name a new one"
    )
    assert {path: path.read_bytes() for path in published.iterdir()} == before


def test_an_empty_folder_may_be_published_into(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    publish_command([str(tiny_run), "--to", str(tmp_path / "empty")])
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES


def test_a_full_disk_leaves_nothing_half_published(
    tiny_run: Path, small_disk: Callable[[str], Path], capsys: Capture
) -> None:
    disk = small_disk("64k")
    assert "No space left on device" in refusal(capsys, str(tiny_run), "--to", str(disk / "reviews"))
    assert list(disk.iterdir()) == []


def test_a_damaged_checkpoint_is_not_published(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)
    assert "is damaged" in refusal(capsys, str(checkpoint), "--to", str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_decoder_is_published_with_the_weights_it_is_of(checkpoint: Path, tmp_path: Path) -> None:
    export_command([str(checkpoint), "--limit", "2"])
    publish_command([str(checkpoint), "--to", str(tmp_path / "with")])
    assert {path.name for path in (tmp_path / "with").iterdir()} == FILES | {"decoder.safetensors", "decoder.json"}
    bits = json.loads((tmp_path / "with" / "decoder.json").read_text())["bits_per_byte"]
    assert f"{bits['int8'] - bits['plain']:+.5f} bits per byte" in (tmp_path / "with" / "README.md").read_text()
    figures = json.loads((checkpoint / "decoder.json").read_text())
    (checkpoint / "decoder.json").write_text(json.dumps(figures | {"model_sha256": "0" * 64}))
    publish_command([str(checkpoint), "--to", str(tmp_path / "without")])
    assert {path.name for path in (tmp_path / "without").iterdir()} == FILES


# --- the card --------------------------------------------------------------------------------------------------------


def test_card_has_the_figures_of_the_run(published: Path, tiny_run: Path) -> None:
    text, data = (published / "README.md").read_text(), json.loads((tiny_run / "data.json").read_text())
    row = [row for row in read_metrics(tiny_run) if "valid/loss" in row][-1]
    splits = data["splits"]
    assert f"| bits per byte | {row['valid/bits_per_byte']:.4f}, {splits['validation']['documents']} held-out" in text
    assert f"| nats per token | {row['valid/loss']:.4f}, " in text
    assert "| training | 4 steps, 512 tokens, precision no |" in text
    for name, size in splits.items():
        assert f"| {name} | {size['documents']:,} | {size['tokens']:,} | {size['bytes']:,} |" in text
    assert f"{read_model(published).num_parameters:,} parameters" in text


def test_card_header_is_read_by_the_hub_s_own_client(published: Path, tiny_run: Path) -> None:
    header = ModelCard.load(published / "README.md").data
    row = [row for row in read_metrics(tiny_run) if "valid/loss" in row][-1]
    assert (header.license, header.library_name, header.pipeline_tag) == ("mit", "textgen", "text-generation")
    assert header.language is None, "nobody has said what these files are written in"
    assert header.eval_results is not None
    (result,) = header.eval_results
    assert (result.metric_type, result.metric_value) == ("bits_per_byte", row["valid/bits_per_byte"])


def test_card_claims_neither_license_nor_language_nor_figures_that_nobody_gave(
    checkpoint: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    publish_command([str(alone), "--to", str(tmp_path / "out"), "--language", "en", "fr"])
    header = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (header.license, header.language, header.eval_results) == (None, ["en", "fr"], None)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "No license was stated" in text
    assert "| bits per byte |" not in text
    publish_command([str(tmp_path / "out"), "--to", str(tmp_path / "again")])  # of which nothing is known but its shape
    assert "## Settings" not in (tmp_path / "again" / "README.md").read_text()


def test_card_of_a_model_of_imdb_names_the_hub_s_dataset(checkpoint: Path, tmp_path: Path) -> None:
    record = json.loads((checkpoint / "trainer.json").read_text())
    record["config"]["data"] |= {"source": "package", "files": []}
    raw = json.dumps(record).encode()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["trainer.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (checkpoint / "trainer.json").write_bytes(raw)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    publish_command([str(checkpoint), "--to", str(tmp_path / "out")])
    header = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (header.datasets, header.language) == (["stanfordnlp/imdb"], ["en"])


def test_nothing_of_the_machine_is_published(published: Path, tiny_run: Path, reviews_file: Path) -> None:
    for path in published.iterdir():
        for private in (tiny_run.parent, reviews_file.parent, Path.home(), published.parent):
            assert str(private).encode() not in path.read_bytes(), path.name


def test_settings_of_the_card_are_a_config_file(published: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"(?ms)^```yaml\n(.*?)\n```$", (published / "README.md").read_text())
    (tmp_path / "config.yaml").write_text(block)
    settings = yaml.safe_load(block)
    assert settings["data"].pop("source") == "files"  # which the card does not name
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert parse_train_config(["--config", str(tmp_path / "config.yaml")]).model.hidden_size == 32


def test_generated_text_is_never_markdown_or_html(checkpoint: Path, tmp_path: Path) -> None:
    samples = checkpoint.parents[1] / "samples.md"
    text = "<script>alert(1)</script>\n````\n# not a heading\n````"
    samples.write_text(f"## step 2\n\nan earlier one\n\n## step 4\n\n- temperature 0.8: **The**{text}\n\n")
    publish_command([str(checkpoint), "--to", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`````text\n[temperature 0.8] The{text}\n`````\n" in card
    assert "an earlier one" not in card


# --- the hub ---------------------------------------------------------------------------------------------------------


class FakeHub(BaseHTTPRequestHandler):
    """What of the hub's HTTP interface the client uses for small files; all files go through one commit."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, Any]]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        place = self.path.partition("?")[0]
        if self.headers.get("Authorization") != "Bearer hf_secret":
            self._answer(401, {"error": "Invalid username or password."})
        elif place == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {"private": asked["visibility"] == "private", "files": {}})
            self._answer(200, {"url": f"http://{self.headers['Host']}/{name}"})
        elif place == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(\w+/\w+)(?:/(\w+).*)?", place):
            self._repository(found[1], found[2], body)
        elif found := re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", place):
            content = self.repositories[found[1]]["files"][found[2]]
            self._answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit="0" * 40)
        else:
            self._answer(404)

    def _repository(self, name: str, action: str | None, body: bytes) -> None:
        if name not in self.repositories:
            self._answer(404, X_Error_Code="RepoNotFound")
            return
        private, files = self.repositories[name].values()
        if action in (None, "revision"):
            siblings = [{"rfilename": file} for file in files]
            self._answer(200, {"id": name, "private": private, "sha": "0" * 40, "siblings": siblings})
        elif action == "tree":
            entries = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files]
            self._answer(200, entries)
        elif action == "preupload":
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer(200, {"files": [plain | {"path": file["path"]} for file in json.loads(body)["files"]]})
        elif action == "commit":
            for change in map(json.loads, body.splitlines()):
                if change["key"] == "file":
                    files[change["value"]["path"]] = base64.b64decode(change["value"]["content"])
                elif change["key"] == "deletedFile":
                    del files[change["value"]["path"]]
            url = f"http://{self.headers['Host']}/{name}/commit/{'0' * 40}"
            self._answer(200, {"commitUrl": url, "commitOid": "0" * 40})

    do_GET = do_HEAD = do_POST = _handle  # noqa: N815


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """Yield a hub on this machine, an empty cache, and a token in the client's own place."""
    handler = type("Handler", (FakeHub,), {"repositories": {}})
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def repositories(hub: ThreadingHTTPServer) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = hub.RequestHandlerClass.repositories  # type: ignore[attr-defined]
    return found


def test_a_model_goes_to_the_hub_and_comes_back_the_same(
    hub: ThreadingHTTPServer, tiny_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    main(["publish", str(tiny_run), "--to", "hub:me/reviews"])
    assert capsys.readouterr().out == f"{constants.ENDPOINT}/me/reviews\n"
    repository = repositories(hub)["me/reviews"]
    assert (repository["private"], repository["files"].keys()) == (True, FILES)
    assert b"textgen sample hub:me/reviews" in repository["files"]["README.md"]
    wanted = sampled(capsys, tiny_run)
    (tmp_path / "me" / "reviews").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sampled(capsys, "hub:me/reviews") == wanted, "a folder of that name is not meant"
    monkeypatch.chdir("/")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert sampled(capsys, "me/reviews") == wanted, "what was fetched is there without the hub"
    assert read_model("hub:me/reviews").config.hidden_size == 32


def test_a_training_starts_from_a_model_of_the_hub(
    hub: ThreadingHTTPServer, tiny_run: Path, tiny_flags: list[str], tmp_path: Path
) -> None:
    main(["publish", str(tiny_run), "--to", "hub:me/reviews", "--license", "mit"])
    run, out = tmp_path / "run", tmp_path / "out"
    main(["train", *tiny_flags, "--run_dir", str(run), "--init_from", "hub:me/reviews", "--max_steps", "1"])
    repositories(hub).clear()
    main(["publish", str(run), "--to", str(out)])
    card = ModelCard((out / "README.md").read_text())
    assert (card.data.base_model, card.data.license) == ("me/reviews", "mit")
    assert "from the weights of `me/reviews` of the Hugging Face hub" in card.text


def test_a_repository_keeps_its_visibility_and_loses_an_old_decoder(
    hub: ThreadingHTTPServer, tiny_run: Path, capsys: Capture
) -> None:
    main(["publish", str(tiny_run), "--to", "hub:me/reviews", "--public"])
    repository = repositories(hub)["me/reviews"]
    assert repository["private"] is False
    assert refusal(capsys, str(tiny_run), "--to", "hub:me/reviews") == (
        "`me/reviews` is public on the hub, `--public` is False"
    )
    repository["files"]["decoder.json"] = b"{}"
    main(["publish", str(tiny_run), "--to", "hub:me/reviews", "--public"])
    assert repository["files"].keys() == FILES


@pytest.mark.parametrize("case", ["refused", "silent", "no token"])
def test_a_hub_that_cannot_be_used_is_one_line_in_bounded_time(
    case: str, hub: ThreadingHTTPServer, tiny_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textgen.commands.publish.REACH_SECONDS", 0.5)
    monkeypatch.setattr(model_files, "HUB_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # which accepts and never answers
        if case == "no token":
            monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        else:
            port = listener.getsockname()[1] if case == "silent" else 9
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        line = refusal(capsys, str(tiny_run), "--to", "hub:me/reviews")
        assert line.startswith(f"`me/reviews` cannot be published on {constants.ENDPOINT}: ")
        with pytest.raises(model_files.TextgenError, match=r"^`hub:me/reviews` is not a directory and cannot"):
            read_model("hub:me/reviews")


@pytest.mark.parametrize("name", ["hub:", "hub:reviews", "hub:me/", "hub:me/re views", "hub:a/b/c", "hub:../x"])
def test_a_repository_has_an_owner_and_a_name(name: str, tiny_run: Path, capsys: Capture) -> None:
    assert "wants an owner and a name" in refusal(capsys, str(tiny_run), "--to", name)
