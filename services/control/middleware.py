"""Around every request: an id, a figure, a line in the log, and an answer where something broke."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.control.telemetry import Telemetry
from services.errors import ServiceError

log = logging.getLogger("dde.http")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = {"GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"}


class Observed:
    """Puts ``x-request-id`` on every answer (the caller's own where it sent a sane one) and answers 500 for
    the unexpected.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app, self._telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status, began = 0, time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            log.info("%s %s: the caller left (%s)", scope["method"], scope["path"], request_id)
        except Exception:  # the last frame before the server: nobody else would answer
            log.exception("%s %s failed (%s)", scope["method"], scope["path"], request_id)
            if status:
                raise
            error = ServiceError(f"something broke on our side; ask for {request_id} in the log")
            await JSONResponse(error.body(), error.status)(scope, receive, watch)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            seconds = time.perf_counter() - began
            self._telemetry.request(method, _route(scope), status, seconds)
            log.info("%s %s %d %.3fs %s", method, scope["path"], status, seconds, request_id)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _route(scope: Scope) -> str:
    """The route's template: a label must not grow with ids."""
    return getattr(scope.get("route"), "path", "unmatched")
