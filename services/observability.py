"""How a stage tells what it does: an append-only journal in storage, which the control plane turns into events.

Object stores cannot append, so a journal is a folder of numbered files, each a JSON list of entries. Writes are
gathered for up to a second.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from typing import Literal

from pydantic import TypeAdapter

from services import storage
from services.contracts import JournalEvent

log = logging.getLogger("dde")
_ENTRIES = TypeAdapter(list[JournalEvent])


class Journal:
    """A writer's side. Several processes may write one journal at once: a file is made where there is none, or the next one
    is tried. What could not be written stays, and is written with the next flush."""

    def __init__(self, prefix: str, flush_every_s: float = 1.0) -> None:
        self._folder, self._flush_every_s = storage.join(prefix, "journal"), flush_every_s
        self._pending: list[dict] = []
        self._number, self._flushed_at = 0, 0.0

    def event(self, message: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Tell people something."""
        log.log(logging.getLevelName(level.upper()), message)
        self._add(JournalEvent(at=time.time(), level=level, message=message))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers of one step."""
        self._add(JournalEvent(at=time.time(), step=step, metrics=values))

    def _add(self, entry: JournalEvent) -> None:
        self._pending.append(entry.model_dump(exclude_none=True))
        if time.monotonic() - self._flushed_at >= self._flush_every_s:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered."""
        entries = json.dumps(self._pending).encode() if self._pending else None
        while entries and not storage.create_bytes(storage.join(self._folder, f"{self._number:08d}.json"), entries):
            self._number = max(self._number + 1, len(storage.list_files(self._folder)))
        self._pending, self._flushed_at = [], time.monotonic()


def read_journal(prefix: str, start: int, limit: int | None = None) -> list[tuple[int, list[JournalEvent]]]:
    """The journal's files from number ``start`` on (at most ``limit``), each with its entries. Numbers have no gaps."""
    folder, found = storage.join(prefix, "journal"), []
    for number in itertools.count(start):
        try:
            data = storage.read_bytes(storage.join(folder, f"{number:08d}.json"))
        except FileNotFoundError:
            break
        found.append((number, _ENTRIES.validate_json(data)))
        if len(found) == limit:
            break
    return found
