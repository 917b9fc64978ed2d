"""A small control plane over real HTTP, on a loopback port, that fails on demand."""

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
from typer.testing import CliRunner, Result

from services.client.api import Client
from services.client.cli import app as cli

KEY = "dde-test-key"
PNG = b"\x89PNG\r\n\x1a\n-a-picture"
INTERVAL = {"value": 0.64, "low": 0.571, "high": 0.703}
SCORES = {
    "base": 0.5,
    "candidate": 0.6,
    "difference": {"value": 0.1, "low": 0.05, "high": 0.15},
    "beat_ratio": INTERVAL,
    "verdict": "better",
}
EVALUATED = {
    "report": "file:///r.json",
    "page": "file:///r.html",
    "summary": ["better: better on match."],
    "grid": "file:///g.png",
    "base": "shapes",
    "num_prompts": 200,
    "images_per_prompt": 1,
    "images_drawn": 400,
    "scores": {"match": {"better": SCORES}, "taste": {"better": SCORES}},
    "seconds": 9.5,
}

COMPARED = [{"name": name, "model": f"model_{name}"} for name in ("shapes", "better")]
RUN = {
    "reason": None,
    "stage": None,
    "stage_seconds": {},
    "created_at": 1,
    "started_at": None,
    "finished_at": None,
}


def job(status: str = "queued", **other: Any) -> dict[str, Any]:
    """A job as the API answers it."""
    settings = {
        "data": {},
        "objective": {},
        "training": {"steps": 40},
        "workers": 1,
        "evaluation": {},
        "validation": None,
    }
    names = {"id": "ajob_1", "name": "better", "model": "model_1", "dataset": "ds_1", "metadata": {}}
    outcome = {"pause_requested_at": None, "aligned_model": None, "result": {}}
    return {"object": "alignment.job", "status": status, **RUN, **names, **settings, **outcome, **other}


def evaluation(status: str = "queued", **other: Any) -> dict[str, Any]:
    """An evaluation as the API answers it."""
    counts = {"num_prompts": 200, "images_per_prompt": 1}
    settings = {"prompts_uri": "file:///p", **counts, "seed": 0, "scorers": ["match"], "sample": {}}
    names = {"id": "new_1", "models": COMPARED, "base": "shapes", "result": None}
    return {"object": "evaluation", "status": status, **RUN, **names, **settings, **other}


def study(status: str = "running", **other: Any) -> dict[str, Any]:
    """A study of two cells as the API answers it."""
    cell = {
        "setting": "dde",
        "overrides": {},
        "status": "waiting",
        "job": None,
        "model": None,
        "reason": None,
    }
    cells = [{**cell, "label": "dde-seed0"}, {**cell, "label": "dde-seed1"}]
    settings = {"parallel": 2, "on_failure": "continue", "evaluation": {}}
    names = {"id": "study_1", "name": "paper", "cells": cells, "evaluations": [], "result": None}
    return {"object": "study", "status": status, **RUN, **names, **settings, **other}


def dataset(**other: Any) -> dict[str, Any]:
    """A dataset as the API answers it."""
    counts = {"rows": 10, "pairs": 8, "ties": 1, "missing": 1}
    plain = {"id": "ds_1", "name": "d", "uri": "file:///d", "columns": {}, "digest": "0", "created_at": 1}
    return {"object": "dataset", "counts": counts, **plain, **other}


def model(**other: Any) -> dict[str, Any]:
    """A base model as the API answers it."""
    plain = {
        "id": "shapes",
        "name": "shapes",
        "uri": "file:///m",
        "family": "sd15",
        "digest": "0",
        "created_at": 1,
    }
    openai = {"created": 1, "owned_by": "dde", "version": "model_1"}
    origin = {"base": None, "job": None, "adapter_of": None, "lineage": {}, "current": True}
    return {"object": "model", **plain, **openai, **origin, **other}


def scorer(**other: Any) -> dict[str, Any]:
    """A registered scorer as the API answers it."""
    files_of = {"uri": "file:///c", "processor": None, "resize": "antialiased", "digest": "0123456789abcdef"}
    kind = {"level": "image", "reads_prompt": True, "higher_is_better": True, "scale": "cosine, -1 to 1"}
    plain = {"id": "scorer_1", "name": "pick", "kind": "pickscore", "created_at": 1}
    return {"object": "scorer", **plain, **files_of, **kind, **other}


def key(**other: Any) -> dict[str, Any]:
    """An API key as the API answers it."""
    plain = {"id": "key_1", "name": "ci", "project": "default", "scopes": ["read"], "hint": "ab12"}
    return {"object": "api_key", **plain, "created_at": 1, "revoked_at": None, **other}


def event(number: int, message: str, level: str = "info") -> dict[str, Any]:
    """An event as the API answers it, created at second ``number``."""
    kind = {"object": "alignment.job.event", "level": level, "created_at": number}
    return {"id": f"event_{number}", "message": message, **kind}


def metric(stage: str, step: int, at: float, metrics: dict[str, float]) -> dict[str, Any]:
    """A row of metrics as the API answers it."""
    return {"object": "alignment.job.metrics", "stage": stage, "step": step, "at": at, "metrics": metrics}


CREATED = {
    "/v1/datasets": dataset,
    "/v1/models": model,
    "/v1/scorers": scorer,
    "/v1/alignment/jobs": job,
    "/v1/evaluations": lambda **body: evaluation(**{**body, "models": COMPARED, "base": "shapes"}),
    "/v1/studies": lambda **body: study(id="new_1"),
    "/v1/keys": lambda **body: key(
        **{**body, "project": body.get("project", "default"), "key": "dde_secret"}
    ),
}


def drawn(n: int, model: str, seed: int = 5, output_format: str = "png", **_: Any) -> dict:
    """The answer to a request for images."""
    details = {"text_tokens": 1, "image_tokens": 0}
    usage = {"input_tokens": 1, "output_tokens": 0, "total_tokens": 1}
    usage |= {"input_tokens_details": details, "output_tokens_details": details}
    image = base64.b64encode(PNG).decode()
    return {
        "created": 1,
        "data": [{"b64_json": image, "seed": seed + i} for i in range(n)],
        "output_format": output_format,
        "size": "1x1",
        "usage": usage,
        "model": model,
        "model_id": "model_1",
        "model_digest": "d",
        "warnings": ["no safety checker: images are not checked"],
    }


class ScriptedServer:
    """Answers in the API's form from ``items`` and ``single``; ``failures`` come first, one per request.

    Before an answer it sleeps for the next of ``pauses``, in seconds.
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
        app.add_api_route("/{path:path}", self._answer, methods=["GET", "POST", "DELETE"])
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
            return drawn(**body)
        if method == "POST":
            return CREATED[path](**{**body, "id": "new_1"})
        return self._page(self.items.get(path, []), query)

    def _page(self, items: list[dict], query: dict[str, str]) -> dict:
        cursor, limit = "id" if items and "id" in items[0] else "step", int(query["limit"])
        if "stage" in query:
            items = [item for item in items if item["stage"] == query["stage"]]
        if "after" in query and cursor == "step":
            items = [item for item in items if item["step"] > int(query["after"])]
        elif "after" in query:
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


@pytest.fixture
def dde(server, tmp_path):
    """Run the command against the server."""

    def run(*arguments: object, **env: str) -> Result:
        environment = {
            "DDE_URL": server.url,
            "DDE_API_KEY": KEY,
            "DDE_HOME": str(tmp_path / "home"),
            "COLUMNS": "200",
            **env,
        }
        return CliRunner().invoke(cli, list(map(str, arguments)), env=environment)

    return run
