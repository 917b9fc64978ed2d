"""What names of models refer to: looked up in storage at each request, and remembered while it is away."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from services.api.records import ModelRecord
from services.artifacts import models
from services.errors import NotFound, Unavailable

log = logging.getLogger("ray.serve")
PATIENCE_S = 2.0
"""How long a look-up may take before what it found last is used; of that, later requests do not wait."""
THREADS = 8

Name = tuple[str, str]
"""A project's root and a name, id or ``name@alias``."""


class Names:
    """Looks up models. A name that was found once is known while storage does not answer."""

    def __init__(self) -> None:
        self._known: dict[Name, ModelRecord] = {}
        self._late: dict[Name, asyncio.Future[ModelRecord]] = {}
        # Of its own: look-ups that hang must not keep other work waiting.
        self._threads = ThreadPoolExecutor(THREADS, "names")

    async def find(self, root: str, name: str) -> ModelRecord:
        """The model that the name refers to. Raises NotFound, and Unavailable if nothing is known of it."""
        key = (root, name)
        late = self._late.get(key)
        if late is not None and not late.done():
            return self._known[key]
        looking = asyncio.get_running_loop().run_in_executor(self._threads, models.find, root, name)
        looking.add_done_callback(lambda done: self._remember(key, done))
        await asyncio.wait({looking}, timeout=PATIENCE_S if key in self._known else None)
        if not looking.done():
            self._late[key] = looking
            log.warning("storage is slow: model %r is what it was before", name)
            return self._known[key]
        try:
            return looking.result()
        except Unavailable as error:
            if key not in self._known:
                raise
            log.warning("storage does not answer: model %r is what it was before: %s", name, error)
            return self._known[key]

    def _remember(self, key: Name, looking: asyncio.Future[ModelRecord]) -> None:
        """Called in the event loop, as soon as a look-up has ended."""
        if self._late.get(key) is looking:
            del self._late[key]
        if looking.cancelled():
            return
        error = looking.exception()
        if error is None:
            self._known[key] = looking.result()
        elif isinstance(error, NotFound) and key not in self._late:
            self._known.pop(key, None)
