"""Ray's token in a file that is replaced while the control plane runs."""

from __future__ import annotations

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse

from services.control.launchers.ray_jobs import RayJobsLauncher
from services.errors import Unavailable
from tests.services.control.test_streams import listening

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


def test_a_token_that_was_replaced_is_read_again_once_the_old_one_is_refused(head, tmp_path, monkeypatch):
    from ray._raylet import AuthenticationTokenLoader

    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "auth_token"
    file.write_text(FIRST)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        ray = RayJobsLauncher(head.url)
        assert ray.status("j").state == "running"
        file.write_text(SECOND)
        assert ray.status("j").state == "running", "the old token is still good"
        head.token = SECOND
        assert ray.status("j").state == "running"
        assert head.refused == 1, "the old token, once"
        head.token = "third" * 8
        with pytest.raises(Unavailable, match="Authentication failed"):
            ray.status("j")
    finally:
        AuthenticationTokenLoader.instance().reset_cache()
