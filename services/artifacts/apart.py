"""Calls in a process of their own, one at a time: for heavy libraries, and files made to use up memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from dde_core.errors import DdeError
from services.errors import ServiceError
from services.storage import sources

Result = TypeVar("Result")
POLL_S = 0.2
_calling = threading.Lock()


def call_apart(what: str, call: Callable[..., Result], *args: Any) -> Result:
    """What ``call(*args)``, a function of a module, returns. ``what`` it is, for errors.

    Raises what it raises of DdeError, ServiceError and OSError; ServiceError if the process dies or lacks a
    library; BadRequest once the caller's time limit is over.
    """
    spawn = get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_call_here, args=(sender, what, call, args), daemon=True)
    with _calling:
        process.start()
        sender.close()
        try:
            while not receiver.poll(POLL_S):
                sources.check_time()
            error, result = receiver.recv()
        except EOFError:
            process.join()
            raise ServiceError(f"{what} died with exit code {process.exitcode}") from None
        finally:
            process.kill()
            process.join()
    if error is not None:
        raise error
    found: Result = result
    return found


def _call_here(sender: Connection, what: str, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with suppress(OSError):  # only Linux has it: the first process to go if memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        outcome: tuple[Exception | None, Any] = (None, call(*args))
    except ImportError as error:
        outcome = (ServiceError(f"{what} is not possible here: {error}; install 'dde-align[control]'"), None)
    except (DdeError, ServiceError, OSError) as error:
        outcome = (error, None)
    sender.send(outcome)
