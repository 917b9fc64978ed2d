"""What the driver passes on to trackers: the metrics that the workers' journal tells, and what validation finds."""

from __future__ import annotations

import threading
from contextlib import suppress

from services import checkpoints, storage
from services.contracts import TrainSpec, Validated
from services.errors import Unavailable
from services.observability import Journal, read_journal
from services.settings import TrackerSettings
from services.training.trackers import open_trackers

FILES_AT_ONCE = 200
LOOK_EVERY_S = 2.0


class Tracking:
    """Reads the attempt's journal as the control plane does, so workers know nothing of trackers and may die as they like; on a
    thread of its own, so a server that does not answer holds nothing up.

    A step that is told again, by workers that were started again, is passed on once.
    """

    def __init__(self, spec: TrainSpec, journal: Journal) -> None:
        self._spec, self._next_file, self._seen = spec, 0, set[str]()
        self._told = max(checkpoints.steps(spec.run), default=0)
        self._trackers = open_trackers(TrackerSettings(), spec, self._told, journal.event)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Return once everything is passed on, as far as trackers take it."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self._look()
        self._look()
        self._trackers.close()

    def _look(self) -> None:
        with suppress(OSError, Unavailable):  # storage is away: the next look sees it all
            self._pass_on_steps()
            self._pass_on_validation()
        self._trackers.flush()

    def _pass_on_steps(self) -> None:
        for number, entries in read_journal(self._spec.prefix, self._next_file, FILES_AT_ONCE):
            self._next_file = number + 1
            for entry in entries:
                if entry.metrics and "loss" in entry.metrics and (entry.step or 0) > self._told:
                    self._told = entry.step or 0
                    self._trackers.metrics(self._told, entry.metrics)

    def _pass_on_validation(self) -> None:
        folder = storage.join(self._spec.run, checkpoints.VALIDATION)
        names = [name for name in storage.list_files(folder) if name.endswith(".json") and name not in self._seen]
        for name in names:
            found = Validated.model_validate_json(storage.read_bytes(storage.join(folder, name)))
            picture = storage.read_bytes(found.picture) if found.picture else None
            self._trackers.validation(found.step, found.metrics, picture)
            self._seen.add(name)
