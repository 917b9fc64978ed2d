"""A replica that ends: on SIGTERM it is no longer ready, finishes what it has, and exits with 0.

For ``notice_s`` it goes on to accept connections: load balancers need some seconds to read /readyz. Each
answer then closes its connection, so clients connect again, elsewhere. After that it stops listening, and the
requests that it has may take until ``drain_s`` after the signal. A second signal ends it at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

log = logging.getLogger("dde")
EXIT_S = 10.0
"""How long threads that hang in a read may delay the exit, after all is done that must be done."""


class Drain:
    """Whether this replica ends, and since when (time.monotonic())."""

    def __init__(self) -> None:
        self.began_at_s: float | None = None
        self.notice_s = 0.0

    @property
    def is_draining(self) -> bool:
        return self.began_at_s is not None

    @property
    def is_noticed(self) -> bool:
        """Whether load balancers have had their time to notice."""
        return self.began_at_s is not None and time.monotonic() - self.began_at_s >= self.notice_s

    def begin(self, notice_s: float) -> None:
        """Not ready from now on. Safe in a signal handler."""
        self.notice_s = notice_s
        self.began_at_s = time.monotonic()


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which on SIGTERM drains as above; on SIGINT, without the time to notice.

    ``on_drain`` is called once, when draining begins.
    """

    def __init__(
        self, config: uvicorn.Config, drain: Drain, on_drain: Callable[[], None], notice_s: float
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._on_drain: Callable[[], None] | None = on_drain
        self._notice_s = notice_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's, which raises the signal again at its end: the exit status would be the signal's."""
        if self._drain.is_draining:
            self.should_exit = True
            self.force_exit = True
        else:
            self._drain.begin(self._notice_s if sig == signal.SIGTERM else 0.0)

    async def on_tick(self, counter: int) -> bool:
        if self._drain.is_draining and self._on_drain is not None:
            log.info("draining: not ready from now on; listening for %g s more", self._drain.notice_s)
            self._on_drain()
            self._on_drain = None
        if self._drain.is_noticed:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        give_up = threading.Timer(EXIT_S, _exit)
        give_up.daemon = True
        give_up.start()


def _exit() -> None:
    log.warning("a thread did not end within %g s; exiting without it", EXIT_S)
    logging.shutdown()
    os._exit(0)
