"""Ray's token in a file that is replaced while the control plane runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse

from tests.services.control.test_streams import listening

ROOT = Path(__file__).parents[3]
FIRST = "first" * 8
SECOND = "second" * 8


@pytest.fixture
def head():
    """A dashboard that accepts the token of ``app.state.token``, as Ray's does."""
    app = FastAPI()
    app.state.token = FIRST
    app.state.refused = 0

    @app.middleware("http")
    async def check(request: Request, call_next):
        if request.headers.get("authorization") != f"Bearer {app.state.token}":
            app.state.refused += 1
            return PlainTextResponse("Forbidden: Invalid authentication token", 403)
        return await call_next(request)

    @app.get("/api/version")
    def version():
        return {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}

    @app.get("/api/jobs/{name}")
    def info(name: str):
        return {"type": "SUBMISSION", "submission_id": name, "status": "RUNNING", "entrypoint": "x"}

    with listening(app) as app.state.url:
        yield app.state


SCRIPT = """
import os, sys
from services.control.launchers.ray_jobs import RayJobsLauncher
from services.errors import Unavailable

ray = RayJobsLauncher(sys.argv[1])
for line in sys.stdin:
    try:
        print(ray.status("j").state, flush=True)
    except Unavailable as error:
        print(str(error).splitlines()[0], flush=True)
"""


def test_a_token_that_was_replaced_is_read_again_once_the_old_one_is_refused(head, tmp_path):
    """In a process of its own: Ray reads its mode when it is imported."""
    file = tmp_path / "auth_token"
    file.write_text(FIRST)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, head.url]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def status() -> str:
            process.stdin.write("again\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        assert status() == "running"
        file.write_text(SECOND)
        assert status() == "running", "the old token is still good"
        head.token = SECOND
        assert status() == "running"
        assert head.refused == 1, "the old token, once"
        head.token = "third" * 8
        assert "Authentication failed" in status()
        process.stdin.close()
