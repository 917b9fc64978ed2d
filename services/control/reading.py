"""Threads for requests that read sources or our own storage, apart from those that answer all others.

However slow a disk, a bucket or a dataset is, it holds a few threads of one route, for a limited time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from services.errors import ServiceError, Unavailable
from services.storage import sources

THREADS = 8
"""Of each route. Requests beyond them wait for at most ``WAIT_S``."""
WAIT_S = 30.0
READ_S = 60.0
"""The time to read prompts, the configs of a base model, or a sample of pairs."""
DATASET_S = 900.0
"""The time to find the held-out captions of a dataset, which reads all of its rows but no image."""
STORAGE_S = 120.0
"""The time to read or delete what our own storage holds, such as a report or a model."""
REGISTER_S = 3600.0
"""The time to register a dataset or a model, which reads all of it."""
GRACE_S = 5.0
"""How long a call may take to notice that its time is over; its thread is then left to itself."""

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def _never(_: Any) -> bool:
    return False


def reads_sources(
    seconds: float,
    reads_a_dataset: Callable[[Any], bool] = _never,
    too_slow: Callable[[float], ServiceError] = sources.too_slow,
) -> Callable[[Callable[Arguments, Answer]], Callable[Arguments, Awaitable[Answer]]]:
    """Run an endpoint on threads of its own, each call for at most ``seconds``.

    A call whose ``request`` reads a dataset may take ``DATASET_S``.

    It then raises ``too_slow`` for a call that takes longer, and Unavailable where no thread gets free.
    """

    def decorate(endpoint: Callable[Arguments, Answer]) -> Callable[Arguments, Awaitable[Answer]]:
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix=endpoint.__name__)

        @wraps(endpoint)
        async def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
            loop = asyncio.get_running_loop()
            limit_s = DATASET_S if reads_a_dataset(kwargs.get("request")) else seconds
            begun = asyncio.Event()

            def limited() -> Answer:
                loop.call_soon_threadsafe(begun.set)
                with sources.time_limit(limit_s):
                    return endpoint(*args, **kwargs)

            call = pool.submit(copy_context().run, limited)
            answer = asyncio.wrap_future(call)
            with suppress(TimeoutError):
                await asyncio.wait_for(begun.wait(), WAIT_S)
            if call.cancel():
                raise Unavailable("too many requests are reading files; try again later")
            await asyncio.wait([answer], timeout=limit_s + GRACE_S)
            if not answer.done():
                answer.cancel()
                raise too_slow(limit_s)
            return answer.result()

        return run

    return decorate


def _storage_too_slow(seconds: float) -> Unavailable:
    return Unavailable(f"storage does not answer within {seconds:g} s; try again later")


reads_storage = reads_sources(STORAGE_S, too_slow=_storage_too_slow)
"""The same for an endpoint that reads or deletes files of our own storage."""
