"""Connections to the API: closed while they wait for a client that does not go on.

uvicorn limits only the pause between two requests. Here, too: the time for a request's headers, and for a
client that does not read its answer. ``dependencies.read_body`` limits the time for a body.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADERS_S = 10.0
"""From the connection, or the first byte of a later request, to the end of the headers."""
STALLED_S = 60.0
"""How long an answer may wait for the client to read."""


class Limits(asyncio.Protocol):
    """What is put before one of uvicorn's two HTTP/1.1 protocols: a limit on both waits."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    cycle: Any
    """uvicorn's state of the last request; None before the first."""
    headers_s = HEADERS_S
    stalled_s = STALLED_S
    _headers: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._limit_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.stalled_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stalled = _stopped(self._stalled)
        super().resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._headers = _stopped(self._headers)
        self._stalled = _stopped(self._stalled)
        super().connection_lost(error)

    def _limit_headers(self) -> None:
        """Have a timer while no request is being answered; bytes that complete none do not renew it."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering:
            self._headers = _stopped(self._headers)
        elif self._headers is None:
            self._headers = self.loop.call_later(self.headers_s, self._close_unless_answering)

    def _close_unless_answering(self) -> None:
        self._headers = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class LimitedConnection(Limits, AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # chosen at import
    """uvicorn's protocol with these limits."""


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer, in place of this one."""
    if timer is not None:
        timer.cancel()
    return None
