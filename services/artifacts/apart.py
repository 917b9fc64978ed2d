"""Calls in a process of its own, one at a time: for heavy libraries, and files made to use up memory.

The process stays for a minute, so that the next calls find the libraries loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from dde_core.errors import DdeError
from services.errors import ServiceError
from services.storage import sources

Result = TypeVar("Result")
IDLE_S = 60.0
POLL_S = 0.2


class ProcessApart:
    """Starts its process for the first call, and again once it has left after ``idle_s`` or died."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._idle_s = idle_s
        self._calling = threading.Lock()
        self._running: tuple[BaseProcess, Connection] | None = None

    def call(self, what: str, call: Callable[..., Result], *args: Any) -> Result:
        """Like ``call_apart``."""
        with self._calling:
            error, result = self._outcome(what, (what, call, args))
        if error is not None:
            raise error
        found: Result = result
        return found

    def stop(self) -> None:
        """End the process, if there is one."""
        with self._calling:
            self._end()

    def _outcome(self, what: str, request: tuple[Any, ...]) -> tuple[Exception | None, Any]:
        is_new = self._running is None
        self._running = self._running or self._start()
        process, connection = self._running
        try:
            connection.send(request)
            while not connection.poll(POLL_S):
                sources.check_time()
            outcome: tuple[Exception | None, Any] = connection.recv()
            return outcome
        except (EOFError, ConnectionError):
            process.join()
            code = process.exitcode
            self._end()
        except BaseException:  # what this call returns later is not the outcome of the next one
            self._end()
            raise
        if code == 0 and not is_new:  # it left while the request was on its way
            return self._outcome(what, request)
        raise ServiceError(f"{what} died with exit code {code}")

    def _start(self) -> tuple[BaseProcess, Connection]:
        spawn = get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve_until_idle, args=(theirs, self._idle_s), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _end(self) -> None:
        if self._running is None:
            return
        process, connection = self._running
        self._running = None
        connection.close()
        process.kill()
        process.join()


_apart = ProcessApart()


def call_apart(what: str, call: Callable[..., Result], *args: Any) -> Result:
    """What ``call(*args)``, a function of a module, returns. ``what`` it is, for errors.

    Raises what it raises of DdeError, ServiceError and OSError; ServiceError if the process dies or lacks a
    library; BadRequest once the caller's time limit is over.
    """
    return _apart.call(what, call, *args)


def _serve_until_idle(connection: Connection, idle_s: float) -> None:
    with suppress(OSError):  # only Linux has it: the first process to go if memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(EOFError, ConnectionError):  # the caller has ended
        while connection.poll(idle_s):
            connection.send(_call_here(*connection.recv()))


def _call_here(what: str, call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Exception | None, Any]:
    try:
        return None, call(*args)
    except ImportError as error:
        return ServiceError(f"{what} is not possible here: {error}; install 'dde-align[control]'"), None
    except (DdeError, ServiceError, OSError) as error:
        return error, None
