"""Record what clients send: `python -m tests.clients.record RUN PYTHON [NODE_FOLDER]`.

Serves RUN behind a proxy that keeps requests, has the clients of PYTHON's environment (and those of a folder with
node packages) make their calls, and writes requests.json: for each call the requests of different shape, at most once.
Prints the outcome of each call.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.serving.servers import running

HERE = Path(__file__).parent


def proxy(port: int, kept: list[tuple[str, str, Any]]) -> ThreadingHTTPServer:
    """Return a proxy of the server on a port, which keeps method, path and body of each request."""

    class Handler(BaseHTTPRequestHandler):
        def forward(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length", 0)))
            kept.append((self.command, self.path, json.loads(raw) if raw else None))
            connection = HTTPConnection("127.0.0.1", port)
            headers = {"content-type": "application/json"} if raw else {}
            connection.request(self.command, self.path, raw or None, headers)
            answer = connection.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = forward  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def shape(request: tuple[str, str, Any]) -> str:
    """Return what distinguishes a request from others like it: its path, its fields, and the kind of its prompt."""
    method, path, body = request
    prompt = (body or {}).get("prompt")
    kind = type(prompt[0]) if isinstance(prompt, list) else type(prompt)
    stream = (body or {}).get("stream")
    return f"{method} {path} {sorted(body or {})} {kind} {stream} {(body or {}).get('echo')}"


def main(run: str, python: str, node_folder: str | None = None) -> None:
    """Record all clients."""
    commands = [([python, str(HERE / "calls.py")], None)]
    if node_folder:
        commands.append((["node", str(HERE / "calls.mjs")], node_folder))
    recorded: list[dict[str, Any]] = []
    kept: list[tuple[str, str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, running(Path(run), Path(folder) / "log") as server:
        between = proxy(server.port, kept)
        threading.Thread(target=between.serve_forever, daemon=True).start()
        for command, cwd in commands:
            url = f"http://127.0.0.1:{between.server_address[1]}"
            process = subprocess.Popen([*command, url], cwd=cwd, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                call = json.loads(line)
                requests = {shape(request): request for request in reversed(kept)}
                kept.clear()
                for method, path, body in reversed(requests.values()):
                    if path == "/v1/models" and call["call"] != "models":  # calls.py itself asks for the model's name
                        continue
                    entry = {name: call[name] for name in ("client", "version", "call")}
                    recorded.append(entry | {"method": method, "path": path, "body": body})
            assert process.wait() == 0
        between.shutdown()
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in recorded)
    (HERE / "requests.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
