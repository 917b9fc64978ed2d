"""Requests to Serve: checked here, passed on as they came, answered as Serve answers."""

from __future__ import annotations

import httpx
from fastapi import Response
from fastapi.responses import JSONResponse

from dde_core.errors import ConfigError
from services.api.requests import ImageRequest, ScoreRequest
from services.errors import BadRequest, ServiceError, Unavailable

TIMEOUT = httpx.Timeout(600.0, connect=5.0)
SCORE_BYTES = 64 << 20
_PASSED_BACK = ("content-type", "retry-after")


def make_client(serve_url: str) -> httpx.AsyncClient:
    """Serve sets its own limits: none on connections here."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    return httpx.AsyncClient(base_url=serve_url, timeout=TIMEOUT, limits=limits, trust_env=False)


def check_image(asked: ImageRequest) -> None:
    """Raises BadRequest for a size that no model draws."""
    try:
        asked.sample()
    except ConfigError as error:
        raise BadRequest(f"size: {error.reason}, got {error.value!r}", param="size") from error


def check_scores(asked: ScoreRequest) -> None:
    """Raises BadRequest where pictures and prompts do not pair up."""
    if len(asked.images) != len(asked.prompts):
        message = f"prompts: must be as many as the {len(asked.images)} images, got {len(asked.prompts)}"
        raise BadRequest(message, param="prompts")


async def pass_on(client: httpx.AsyncClient, path: str, raw: bytes, request_id: str) -> Response:
    """Serve's answer, status and body. Raises Unavailable where Serve does not answer."""
    headers = {"content-type": "application/json", "x-request-id": request_id}
    try:
        answer = await client.post(path, content=raw, headers=headers)
    except httpx.TransportError as error:
        raise Unavailable(f"Serve does not answer: {error or type(error).__name__}") from error
    back = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
    if answer.is_error and not back.get("content-type", "").startswith("application/json"):
        return _in_our_shape(answer, back)
    return Response(answer.content, answer.status_code, back)


def _in_our_shape(answer: httpx.Response, headers: dict[str, str]) -> Response:
    """An error that Serve's proxy made, not the application: plain text."""
    error = ServiceError(
        f"Serve answered {answer.status_code}: {answer.text.strip()[:500]}", code="serve_error"
    )
    headers.pop("content-type", None)
    return JSONResponse(error.body(), answer.status_code, headers)
