"""What the driver passes on to trackers: the metrics that the workers' journals tell, and what validation finds."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from services.api.records import Validated
from services.artifacts import checkpoints
from services.errors import Unavailable
from services.settings import TrackerSettings
from services.stages.journal import Journal, read_journal
from services.stages.specs import Level, TrainSpec
from services.storage import files
from services.training.tracking.clients import CLOSES_WITHIN_S
from services.training.tracking.outbox import open_trackers

log = logging.getLogger("dde")
FILES_AT_ONCE = 200
LOOK_EVERY_S = 2.0


class Tracking:
    """Reads the journals of this attempt and of those before it, as the control plane does, so workers know nothing of trackers
    and may die as they like; on a thread of its own, so a server that does not answer holds nothing up.

    An attempt may have ended before everything was delivered, so each passes on all steps from the first one on, and trackers
    leave out what they know. A step that is told again, by workers that were started again, is passed on once.
    """

    def __init__(self, spec: TrainSpec, journal: Journal) -> None:
        self._spec, self._journal = spec, journal
        self._prefixes, self._next_file = deque(_attempts(spec)), 0
        self._told, self._seen = 0, set[str]()
        self._said: deque[tuple[str, Level]] = deque()
        self._errors = set[str]()
        self._trackers = open_trackers(
            TrackerSettings(), spec, lambda message, level: self._said.append((message, level))
        )
        self._over, self._ends_at = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def close(self, within_s: float = CLOSES_WITHIN_S) -> None:
        """Return once everything is passed on, as far as trackers take it within this time; no later, whatever they do."""
        self._ends_at = time.monotonic() + within_s
        self._over.set()
        self._thread.join(within_s)

    def _run(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            for call in (self._pass_on_steps, self._pass_on_validation, self._trackers.deliver, self._say):
                self._survive(call)
        for call in (self._pass_on_validation, self._pass_on_the_rest, self._close, self._say):
            self._survive(call)

    def _survive(self, call: Callable[[], object]) -> None:
        """Where storage is away, the next look sees it all; what else goes wrong is said once."""
        try:
            call()
        except (OSError, Unavailable) as error:
            log.warning("trackers are told later: %s", error)
        except Exception as error:  # no tracker is worth a run
            if (kind := type(error).__name__) not in self._errors:
                log.exception("trackers lack something of this run")
                self._errors.add(kind)
                self._said.append(
                    (f"trackers lack something of this run: {kind}: {error}".splitlines()[0], "warning")
                )

    def _pass_on_the_rest(self) -> None:
        while self._pass_on_steps() and time.monotonic() < self._ends_at:
            pass

    def _pass_on_steps(self) -> bool:
        """Is there more at once?"""
        journal_files = read_journal(self._prefixes[0], self._next_file, FILES_AT_ONCE)
        for number, entries in journal_files:
            self._next_file = number + 1
            for entry in entries:
                if entry.metrics and "loss" in entry.metrics and (entry.step or 0) > self._told:
                    self._told = entry.step or 0
                    self._trackers.metrics(self._told, entry.metrics)
        if (is_read := len(journal_files) < FILES_AT_ONCE) and len(self._prefixes) > 1:
            self._prefixes.popleft()
            self._next_file, is_read = 0, False
        return not is_read

    def _pass_on_validation(self) -> None:
        folder = files.join(self._spec.run, checkpoints.VALIDATION)
        names = [
            name for name in files.list_files(folder) if name.endswith(".json") and name not in self._seen
        ]
        for name in names:
            found = Validated.model_validate_json(files.read_bytes(files.join(folder, name)))
            picture = files.read_bytes(found.picture) if found.picture else None
            self._trackers.validation(found.step, found.metrics, picture)
            self._seen.add(name)

    def _close(self) -> None:
        """With a tenth of the time left to say how it went."""
        self._trackers.close(0.9 * max(0.0, self._ends_at - time.monotonic()))

    def _say(self) -> None:
        """The journal keeps what storage does not take."""
        while self._said:
            message, level = self._said.popleft()
            with suppress(OSError, Unavailable):
                self._journal.event(message, level)
        self._journal.flush()


def _attempts(spec: TrainSpec) -> list[str]:
    """The folders of the attempts up to this one, where they lie beside it."""
    folder, _, name = spec.prefix.rstrip("/").rpartition("/")
    if name != f"a{spec.attempt}":
        return [spec.prefix]
    return [files.join(folder, f"a{attempt}") for attempt in range(1, spec.attempt + 1)]
