"""How a stage tells what it does: an append-only journal in storage, which the control plane turns into events.

Object stores cannot append, so a journal is a folder of numbered files, each a JSON list of entries. Writes are
gathered for up to a second.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections import deque
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from services.stages import layout
from services.stages.specs import JournalEvent
from services.storage import files

log = logging.getLogger("dde")
_ENTRIES = TypeAdapter(list[JournalEvent])


class Journal:
    """A writer's side, for several threads. Several processes may write one journal at once: a file is made where there is
    none, or the next one is tried. What could not be written stays for the next flush, and raises OSError or Unavailable."""

    def __init__(self, prefix: str, flush_every_s: float = 1.0) -> None:
        self._prefix, self._flush_every_s = prefix, flush_every_s
        self._pending: deque[dict] = deque()
        self._begun = b""
        self._number, self._flushed_at = 0, 0.0
        self._writing = threading.Lock()

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
        with self._writing:
            self._write()  # as it was, where it failed before: it may be there, and only the answer was lost
            if some := [self._pending.popleft() for _ in range(len(self._pending))]:
                self._begun = json.dumps(some).encode()
                self._write()
            self._flushed_at = time.monotonic()

    def _write(self) -> None:
        while self._begun:
            if files.create_bytes(layout.journal_uri(self._prefix, self._number), self._begun):
                self._number, self._begun = self._number + 1, b""
            else:
                self._number = max(
                    self._number + 1, len(files.list_files(layout.journal_folder(self._prefix)))
                )


def read_journal(prefix: str, start: int, limit: int | None = None) -> list[tuple[int, list[JournalEvent]]]:
    """The journal's files from number ``start`` on (at most ``limit``), each with its entries. Numbers have no gaps.

    A file that is no JSON is still being written (storage.create_bytes), and counts as not there yet.
    """
    found = []
    for number in itertools.count(start):
        try:
            entries = _ENTRIES.validate_json(files.read_bytes(layout.journal_uri(prefix, number)))
        except FileNotFoundError:
            break
        except ValidationError as error:
            if error.errors()[0]["type"] == "json_invalid":
                break
            raise
        found.append((number, entries))
        if len(found) == limit:
            break
    return found
