"""A small control plane over real HTTP, on a loopback port, that can be told to fail."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from services.client.api import Client

KEY = "dde-test-key"
PNG = b"\x89PNG\r\n\x1a\n-a-picture"
INTERVAL = {"value": 0.64, "low": 0.571, "high": 0.703}
SCORES = {
    "base": 0.5,
    "candidate": 0.6,
    "difference": {"value": 0.1, "low": 0.05, "high": 0.15},
    "beat_ratio": INTERVAL,
}
EVALUATED = {
    "report": "file:///r.json",
    "grid": "file:///g.png",
    "num_prompts": 200,
    "scores": {"match": SCORES, "taste": SCORES},
    "seconds": 9.5,
}


def job(status: str, **other: Any) -> dict[str, Any]:
    """A job as the API answers it."""
    asked = {"name": "better", "model": "model_1", "dataset": "ds_1", "training": {"steps": 40}}
    state = {
        "stage": None,
        "reason": None,
        "aligned_model": None,
        "result": {},
        "stage_seconds": {},
        "created_at": 1,
    }
    return {"id": "ajob_1", "object": "alignment.job", "status": status, **asked, **state, **other}


class ScriptedServer:
    """Answers in the API's form from ``items``, ``single`` and ``rows``; ``failures`` are answered first, one a request.

    ``pauses`` are waited, in seconds, before an answer, one a request.
    """

    def __init__(self) -> None:
        self.items: dict[str, list[dict]] = {}
        self.single: dict[str, deque[dict]] = {}
        self.failures: deque[Response] = deque()
        self.pauses: deque[float] = deque()
        self.requests: list[tuple[str, str, dict[str, str], dict[str, str], Any]] = []
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        app = FastAPI()
        app.add_api_route("/{path:path}", self._answer, methods=["GET", "POST"])
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self.socket]}, daemon=True
        )

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(10)
        self.socket.close()

    def fail(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        """Answer one request with an error in the API's form."""
        error = {"message": message, "type": "t", "param": param, "code": code}
        plain = {name.replace("_", "-"): value for name, value in headers.items()}
        self.failures.append(JSONResponse({"error": error}, status, headers=plain))

    def sent(self, method: str, path: str) -> list[tuple[dict[str, str], dict[str, str], Any]]:
        """Headers, query and body of every request of this kind."""
        return [
            (headers, query, body) for m, p, headers, query, body in self.requests if (m, p) == (method, path)
        ]

    async def _answer(self, path: str, request: Request) -> Response:
        body = await request.json() if await request.body() else None
        query = dict(request.query_params)
        self.requests.append((request.method, f"/{path}", dict(request.headers), query, body))
        if self.pauses:
            await asyncio.sleep(self.pauses.popleft())
        if self.failures:
            return self.failures.popleft()
        if request.headers.get("authorization") != f"Bearer {KEY}":
            error = {
                "message": "no such key",
                "type": "authentication_error",
                "param": None,
                "code": "invalid_api_key",
            }
            return JSONResponse({"error": error}, 401)
        return JSONResponse(self._success(f"/{path}", request.method, query, body))

    def _success(self, path: str, method: str, query: dict[str, str], body: Any) -> dict:
        if path in self.single:
            return self.single[path].popleft() if len(self.single[path]) > 1 else self.single[path][0]
        if path == "/v1/images/generations":
            return {"created": 1, "data": [{"b64_json": base64.b64encode(PNG).decode()}] * body["n"]}
        if method == "POST":
            return {
                "id": "new_1",
                "created_at": 1,
                "status": "queued",
                "training": {},
                "family": "sd15",
                **body,
            }
        return self._page(self.items.get(path, []), query)

    def _page(self, items: list[dict], query: dict[str, str]) -> dict:
        cursor, limit = "id" if items and "id" in items[0] else "step", int(query["limit"])
        if "stage" in query:
            items = [item for item in items if item["stage"] == query["stage"]]
        if "after" in query:
            keys = [str(item[cursor]) for item in items]
            items = items[keys.index(query["after"]) + 1 :]
        return {"object": "list", "data": items[:limit], "has_more": len(items) > limit}


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[Client]:
    with Client(server.url, KEY, retries=3) as client:
        yield client
