"""A stage's append-only journal in storage. The control plane turns it into events.

Object stores cannot append, so a journal is a folder of numbered files, each a JSON list of entries. Entries
are buffered for up to a second.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections import deque

from pydantic import TypeAdapter, ValidationError

from services.stages import layout
from services.stages.specs import JournalEvent, Level
from services.storage import files

log = logging.getLogger("dde")
_ENTRIES = TypeAdapter(list[JournalEvent])


class Journal:
    """Writes entries; threads may share a writer, and several processes may write one journal.

    A file is created only under an unused number, so concurrent writers never overwrite one another. Entries
    whose write fails are kept for the next flush; the error is raised as OSError or Unavailable.
    """

    def __init__(self, prefix: str, flush_every_s: float = 1.0) -> None:
        self._prefix = prefix
        self._flush_every_s = flush_every_s
        self._pending: deque[JournalEvent] = deque()
        self._unwritten = b""
        self._number = 0
        self._flushed_at = 0.0
        self._writing = threading.Lock()

    def event(self, message: str, level: Level = "info") -> None:
        """Log a message for people and record it."""
        log.log(logging.getLevelName(level.upper()), message)
        self._add(JournalEvent(at=time.time(), level=level, message=message))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record the metrics of one step."""
        self._add(JournalEvent(at=time.time(), step=step, metrics=values))

    def waiting(self, what: str) -> None:
        """Record the room on the cluster that the stage waits for; "" ends the wait."""
        log.info("waiting for room: %s", what or "there is some")
        self._add(JournalEvent(at=time.time(), waiting_for=what))

    def _add(self, entry: JournalEvent) -> None:
        self._pending.append(entry)
        if time.monotonic() - self._flushed_at >= self._flush_every_s:
            self.flush()

    def flush(self) -> None:
        """Write all buffered entries."""
        with self._writing:
            # Bytes of a failed write are repeated unchanged: it may have succeeded without an answer.
            self._write()
            entries = [self._pending.popleft() for _ in range(len(self._pending))]
            if entries:
                data = [entry.model_dump(exclude_none=True) for entry in entries]
                self._unwritten = json.dumps(data).encode()
                self._write()
            self._flushed_at = time.monotonic()

    def _write(self) -> None:
        while self._unwritten:
            if files.create_bytes(layout.journal_uri(self._prefix, self._number), self._unwritten):
                self._unwritten = b""
                self._number += 1
            else:
                num_files = len(files.list_files(layout.journal_folder(self._prefix)))
                self._number = max(self._number + 1, num_files)


def read_journal(prefix: str, start: int, limit: int | None = None) -> list[tuple[int, list[JournalEvent]]]:
    """The journal's files from number ``start`` on, at most ``limit``, each with its entries.

    Numbers have no gaps. A file with incomplete JSON is still being written (files.create_bytes) and ends the
    list. Raises ValidationError for other contents.
    """
    journal_files: list[tuple[int, list[JournalEvent]]] = []
    for number in itertools.count(start):
        if len(journal_files) == limit:
            break
        try:
            entries = _ENTRIES.validate_json(files.read_bytes(layout.journal_uri(prefix, number)))
        except FileNotFoundError:
            break
        except ValidationError as error:
            if error.errors()[0]["type"] == "json_invalid":
                break
            raise
        journal_files.append((number, entries))
    return journal_files
