"""Around every request: a request id, metrics, an access log line, and an answer to unexpected errors."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.control.draining import Drain
from services.control.problems import METHODS
from services.control.telemetry import Telemetry
from services.errors import ServiceError, Unavailable

log = logging.getLogger("dde.http")
_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Observed:
    """Adds ``x-request-id`` to every answer, and answers unexpected errors with 500.

    The id is the one that the caller sent, if it is valid. While the replica drains, every answer closes its
    connection, and a request that takes longer than the drain is answered with a 503.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry, drain: Drain) -> None:
        self._app = app
        self._telemetry = telemetry
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started_at = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if self._drain.is_draining:
                    headers["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            log.info("%s %s: the client disconnected (%s)", scope["method"], scope["path"], request_id)
        except asyncio.CancelledError:
            if status != 0 or not self._drain.is_draining:
                raise
            gone = Unavailable("this replica ended before it answered; send the request again", code="retry")
            await JSONResponse(gone.body(), gone.status, gone.headers())(scope, receive, send_with_id)
        except Exception:  # nothing above would answer the request
            log.exception("%s %s failed (%s)", scope["method"], scope["path"], request_id)
            has_begun = status != 0
            if has_begun:
                raise
            error = ServiceError(f"internal error; find {request_id} in the server's log")
            await JSONResponse(error.body(), error.status)(scope, receive, send_with_id)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            seconds = time.perf_counter() - started_at
            self._telemetry.count_request(method, _route(scope), status, seconds)
            log.info("%s %s %d %.3fs %s", method, scope["path"], status, seconds, request_id)


def _request_id(scope: Scope) -> str:
    sent = Headers(scope=scope).get("x-request-id", "")
    return sent if _VALID_ID.fullmatch(sent) else f"req_{secrets.token_hex(12)}"


def _route(scope: Scope) -> str:
    """The route's template, without ids: the label of a metric must have few values."""
    return getattr(scope.get("route"), "path", "unmatched")
