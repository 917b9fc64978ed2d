"""What the driver passes on to trackers: the metrics that the workers' journal tells, and what validation finds."""

from __future__ import annotations

from contextlib import suppress

from services import checkpoints, storage
from services.contracts import TrainSpec, Validated
from services.observability import Journal, read_journal
from services.settings import TrackerSettings
from services.training import selection
from services.training.trackers import open_trackers

FILES_AT_ONCE = 200


class Tracking:
    """Reads the attempt's journal as the control plane does, so workers know nothing of trackers and may die as they like.

    A step that is told again, by workers that were started again, is passed on once.
    """

    def __init__(self, spec: TrainSpec, journal: Journal) -> None:
        self._spec, self._next_file = spec, 0
        self._told = max(checkpoints.steps(spec.run), default=0)
        self._trackers = open_trackers(TrackerSettings(), spec, self._told, journal.event)
        for _, found in sorted(selection.outcomes(spec.run).items()):
            self.validated(found)

    def look(self) -> None:
        """Pass on what is new."""
        for number, entries in read_journal(self._spec.prefix, self._next_file, FILES_AT_ONCE):
            self._next_file = number + 1
            for entry in entries:
                if entry.metrics and "loss" in entry.metrics and (entry.step or 0) > self._told:
                    self._told = entry.step or 0
                    self._trackers.metrics(self._told, entry.metrics)
        self._trackers.flush()

    def validated(self, found: Validated) -> None:
        """Pass on what was measured of a checkpoint, and its pictures."""
        picture = None
        if found.picture:
            with suppress(FileNotFoundError):
                picture = storage.read_bytes(found.picture)
        self._trackers.validation(found.step, found.metrics, picture)

    def close(self) -> None:
        """Pass on what is left."""
        self.look()
        self._trackers.close()
