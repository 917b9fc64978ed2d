"""Requests for images and scores: checked here, then forwarded to Serve unchanged."""

from __future__ import annotations

import logging

import httpx
from fastapi import Response
from fastapi.responses import JSONResponse

from services.api.requests import PROJECT_HEADER
from services.errors import ServiceError, Unavailable

TIMEOUT = httpx.Timeout(600.0, connect=5.0)
SCORE_BYTES = 64 << 20
log = logging.getLogger("dde.serve")
_RETURNED_HEADERS = ("content-type", "retry-after")


def make_client(serve_url: str) -> httpx.AsyncClient:
    """An HTTP client without a limit on connections: Serve limits requests itself."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    return httpx.AsyncClient(base_url=serve_url, timeout=TIMEOUT, limits=limits, trust_env=False)


async def forward(
    client: httpx.AsyncClient,
    path: str,
    raw: bytes,
    request_id: str,
    project: str,
    headers: dict[str, str] | None = None,
) -> Response:
    """Serve's status and body; ``headers`` are sent, too. Raises Unavailable if Serve does not answer."""
    headers = {
        **(headers or {}),
        "content-type": "application/json",
        "x-request-id": request_id,
        PROJECT_HEADER: project,
    }
    try:
        answer = await client.post(path, content=raw, headers=headers)
    except httpx.TransportError as error:
        raise Unavailable(f"Serve does not answer: {error or type(error).__name__}") from error
    returned = {name: answer.headers[name] for name in _RETURNED_HEADERS if name in answer.headers}
    if answer.is_server_error:
        log.error("Serve answered %d: %s (%s)", answer.status_code, answer.text.strip()[:500], request_id)
    is_json = returned.get("content-type", "").startswith("application/json")
    if answer.is_error and not is_json:
        return _proxy_error(answer, returned)
    return Response(answer.content, answer.status_code, returned)


def _proxy_error(answer: httpx.Response, headers: dict[str, str]) -> Response:
    """A plain-text error of Serve's proxy, not of our application, in the API's form."""
    message = f"Serve answered {answer.status_code}: {answer.text.strip()[:500]}"
    error = ServiceError(message, code="serve_error")
    headers.pop("content-type", None)
    return JSONResponse(error.body(), answer.status_code, headers)
