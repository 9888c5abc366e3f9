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
        self.requests = 0
        """all requests, also those that are not answered"""
        self.runs: dict[str, list[dict[str, Any]]] | None = None
        """rows by run, if the server is to keep runs; without this it refuses them"""

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
        if self.runs is not None and operation == "ArtifactType":
            return {"data": {"project": None}}
        if self.runs is not None and operation in ("UpsertBucket", "RunResumeStatus", "CreateRunFiles"):
            return {"data": self._answer_of_run(operation, self.asked[-1][1])}
        if operation != "Heartbeat":
            return {"data": self.answers}
        commands = self.commands.pop(0) if self.commands else []
        return {"data": {"agentHeartbeat": {"agent": {"id": "1"}, "commands": json.dumps(commands)}}}

    def _answer_of_run(self, operation: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        assert self.runs is not None
        if operation == "CreateRunFiles":
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}
        rows = self.runs.get(asked["name"])
        bucket: dict[str, Any] = {"id": "1", "name": asked["name"], "displayName": asked["name"], "config": "{}"}
        if operation == "RunResumeStatus":
            bucket |= {
                "historyLineCount": len(rows or ()), "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]",
                "historyTail": json.dumps([json.dumps(row) for row in (rows or ())[-1:]]),
                "summaryMetrics": "{}", "tags": [],
                "wandbConfig": '{"t": 1}',  # without `t` the run counts as not begun
            }  # fmt: skip
            return {"model": {"bucket": bucket if rows is not None else None}}
        self.runs.setdefault(asked["name"], [])
        project = {"id": "1", "name": asked["project"], "entity": {"id": "1", "name": "somebody"}}
        return {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": rows is None}}

    def keep_rows(self, path: str, sent: Mapping[str, Any]) -> None:
        """Keep the rows that a run sends."""
        found = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path)
        if self.runs is not None and found:
            lines = (sent.get("files") or {}).get("wandb-history.jsonl", {}).get("content", [])
            self.runs[found[1]] += map(json.loads, lines)


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_error(404)

    def do_POST(self) -> None:
        self.server.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if "file_stream" in self.path:
                self.server.keep_rows(self.path, json.loads(body))
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
