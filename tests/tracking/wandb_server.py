"""A server that answers a few of W&B's questions, so that its own tools can be tried without a network."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "0123456789" * 4


class WandbServer(ThreadingHTTPServer):
    """Answers on 127.0.0.1, whatever the operation; what a question does not ask for does not hurt."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        """operations and their variables"""
        self.answers: dict[str, Any] = {
            "viewer": {"id": "1", "entity": "somebody", "username": "somebody", "flags": "{}", "teams": {"edges": []}},
            "upsertView": {"view": {"id": "1", "name": "nw-abc-v"}, "inserted": True},
        }
        self.refused: dict[str, str] = {}
        """operations, and why"""
        self.commands: list[list[dict[str, Any]]] = []
        """of a sweep's agent, one list for each of its heartbeats"""

    def environment(self, home: Path) -> Mapping[str, str]:
        """Return what makes W&B's tools ask here, and leave their files in a folder."""
        folders = {f"WANDB_{name}_DIR": str(home) for name in ("CACHE", "CONFIG", "DATA")}
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY, **folders}

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Note a question and return data, or an error."""
        found = re.match(r"\s*(?:query|mutation)\s+(\w+)", question["query"])
        operation = found[1] if found else ""
        self.asked.append((operation, question.get("variables") or {}))
        if operation in self.refused:
            return {"errors": [{"message": self.refused[operation]}]}
        if operation != "Heartbeat":
            return {"data": self.answers}
        commands = self.commands.pop(0) if self.commands else []
        return {"data": {"agentHeartbeat": {"agent": {"id": "1"}, "commands": json.dumps(commands)}}}


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            said = json.dumps(self.server.answer(json.loads(body))).encode()
        except (ValueError, KeyError):  # telemetry and the like
            said = b"{}"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Yield a server that runs."""
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
