"""Requests for images and scores: checked here, then forwarded to Serve, and its answers sent on.

Drawing and scoring are functions of the request alone, so a request whose replica died is sent a second time
as long as no byte of its answer has left.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import httpx
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from services.api.requests import KEY_HEADER, OPERATOR_KEY, PROJECT_HEADER, TIMEOUT_HEADER
from services.control.keys import Caller
from services.errors import (
    DeadlineExceeded,
    ServiceError,
    ShuttingDown,
    TooManyRequests,
    Unavailable,
)

CONNECT_S = 5.0
MARGIN_S = 10.0
"""How much longer than a request's own time Serve has for an answer: it tells the deadline itself."""
TRIES = 2
SCORE_BYTES = 64 << 20
log = logging.getLogger("dde.serve")
_RETURNED_HEADERS = ("content-type", "retry-after", "x-should-retry", "cache-control")
_EVENTS = "text/event-stream"


class ReplicaDied(Exception):
    """Serve or the replica ended before it answered; another one may answer."""


def make_client(serve_url: str) -> httpx.AsyncClient:
    """An HTTP client without a limit on connections: Serve limits requests itself."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    return httpx.AsyncClient(base_url=serve_url, limits=limits, trust_env=False)


@dataclass(frozen=True, kw_only=True)
class Forwarding:
    """A request for Serve, which has ``timeout_s`` for it from ``began_at_s`` on (time.monotonic())."""

    client: httpx.AsyncClient
    path: str
    body: bytes
    headers: dict[str, str]
    timeout_s: float
    began_at_s: float

    @property
    def remaining_s(self) -> float:
        return max(0.001, self.began_at_s + self.timeout_s - time.monotonic())

    def send(self) -> Any:
        """The context of Serve's answer, whose body has not been read."""
        remaining_s = self.remaining_s
        return self.client.stream(
            "POST",
            self.path,
            content=self.body,
            headers={**self.headers, TIMEOUT_HEADER: f"{remaining_s:.3f}"},
            timeout=httpx.Timeout(remaining_s + MARGIN_S, connect=CONNECT_S),
        )

    def out_of_time(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the request was not done within {self.timeout_s:g} s ({TIMEOUT_HEADER})")


def forward(
    request: Request,
    path: str,
    body: bytes,
    timeout_s: float | None,
    own_headers: Mapping[str, str] | None = None,
) -> Forwarded:
    """The answer that Serve will give. ``timeout_s`` None is the setting ``request_timeout_s``.

    ``own_headers`` are the control plane's, beside those of every request.
    """
    state = request.app.state
    caller: Caller = request.state.caller
    headers = {
        **(own_headers or {}),
        "content-type": "application/json",
        "accept-encoding": "identity",
        "x-request-id": request.state.request_id,
        PROJECT_HEADER: caller.project,
        KEY_HEADER: caller.key or OPERATOR_KEY,
    }
    return Forwarded(
        Forwarding(
            client=state.serve,
            path=path,
            body=body,
            headers=headers,
            timeout_s=state.settings.request_timeout_s if timeout_s is None else timeout_s,
            began_at_s=time.monotonic(),
        )
    )


class Forwarded(Response):
    """Serve's answer to a request: events as they come, anything else once it is whole.

    The request to Serve ends as soon as the client leaves. Raises, before anything is sent, Unavailable if
    Serve does not answer or a second replica died too, DeadlineExceeded, and TooManyRequests.
    """

    def __init__(self, forwarding: Forwarding) -> None:
        super().__init__()
        self._forwarding = forwarding

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_disconnected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(TRIES):
            try:
                await self._try(scope, receive, send)
                return
            except ReplicaDied as error:
                log.error("%s (%s)", error, self._forwarding.headers["x-request-id"])
        message = "the replica ended before it answered, and so did a second one; send the request again"
        raise Unavailable(message, code="retry")

    async def _try(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ReplicaDied if nothing was sent."""
        try:
            async with self._forwarding.send() as answer:
                if answer.is_success and answer.headers.get("content-type", "").startswith(_EVENTS):
                    chunks = answer.aiter_raw()
                    first = await anext(chunks, b"")
                    await self._pass_on(answer, first, chunks, send)
                    return
                await answer.aread()
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unavailable(f"Serve does not answer: {_what(error)}") from error
        except httpx.TimeoutException as error:
            raise self._forwarding.out_of_time() from error
        except httpx.TransportError as error:
            raise ReplicaDied(f"Serve ended the connection: {_what(error)}") from error
        await self._reply(answer)(scope, receive, send)

    async def _pass_on(
        self, answer: httpx.Response, first: bytes, rest: AsyncIterator[bytes], send: Send
    ) -> None:
        """Events, of which the first bytes are here. A failure in between is the last event."""
        headers = [(name.encode(), value.encode()) for name, value in _returned(answer).items()]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        end = first[-2:]
        try:
            async for chunk in rest:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                end = (end + chunk)[-2:]
        except httpx.TransportError as error:
            log.error(
                "Serve's events broke off: %s (%s)", _what(error), self._forwarding.headers["x-request-id"]
            )
            if end != b"\n\n":
                return  # in the middle of an event: uvicorn breaks the connection off, too
            failure: ServiceError = Unavailable("the replica ended; send the request again", code="retry")
            if isinstance(error, httpx.TimeoutException):
                failure = self._forwarding.out_of_time()
            event = f"event: error\ndata: {json.dumps(failure.body())}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _reply(self, answer: httpx.Response) -> Response:
        """An answer that was read, in the API's form. Raises ReplicaDied if another replica should answer."""
        if answer.is_server_error:
            request_id = self._forwarding.headers["x-request-id"]
            text = answer.text.strip()[:500]
            log.error("Serve answered %d: %s (%s)", answer.status_code, text, request_id)
        error = _error_of(answer)
        if answer.is_error and error is None:
            self._raise_proxy_error(answer)
        if error is not None and error.get("code") == ShuttingDown.default_code:
            raise ReplicaDied("the replica is shutting down")
        headers = _returned(answer)
        if answer.status_code in (429, 503):
            headers.setdefault("retry-after", str(TooManyRequests.default_retry_after_s))
        return Response(answer.content, answer.status_code, headers)

    def _raise_proxy_error(self, answer: httpx.Response) -> NoReturn:
        """A plain-text error of Serve's proxy, not of our application.

        It answers 500 for a replica that died, 404 without an application, 503 while that is not healthy.
        """
        text = answer.text.strip()[:500]
        message = f"Serve answered {answer.status_code}: {text}"
        retry_after_s = answer.headers.get("retry-after", "")
        wait_s = float(retry_after_s) if retry_after_s.isdigit() else None
        match answer.status_code:
            case 500 | 502:
                raise ReplicaDied(message)
            case 408:
                raise self._forwarding.out_of_time()
            case 429:
                raise TooManyRequests(message, retry_after_s=wait_s)
            case 404 | 503:
                raise Unavailable(message, retry_after_s=wait_s)
        raise ServiceError(message, code="serve_error")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work`` for a request whose body was read. It is cancelled as soon as the client leaves.

    Raises ClientDisconnect then, after ``work`` has ended.
    """
    working = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        working.cancel()
        disconnect.cancel()
        await asyncio.gather(working, disconnect, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error_of(answer: httpx.Response) -> dict[str, Any] | None:
    """The error in the API's form that an answer holds, if it does."""
    if not answer.is_error:
        return None
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return error if isinstance(error, dict) else None


def _returned(answer: httpx.Response) -> dict[str, str]:
    return {name: answer.headers[name] for name in _RETURNED_HEADERS if name in answer.headers}


def _what(error: Exception) -> str:
    return str(error) or type(error).__name__
