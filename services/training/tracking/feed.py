"""The driver's feed to the trackers: metrics from the workers' journals, and what validation measured."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from services.api.records import Validated
from services.errors import Unavailable
from services.settings import TrackerSettings
from services.stages import layout
from services.stages.journal import Journal, read_journal
from services.stages.specs import Level, TrainSpec
from services.storage import files
from services.training.tracking.clients import CLOSES_WITHIN_S
from services.training.tracking.outbox import open_trackers

log = logging.getLogger("dde")
FILES_AT_ONCE = 200
POLL_EVERY_S = 2.0


class Tracking:
    """Reads the journals of all attempts so far, as the control plane does, so that workers need no trackers.
    Runs on a thread of its own, so that a server that does not answer delays nothing.

    Earlier attempts may have ended before everything was delivered. So every attempt sends all steps, from
    the first one on, and trackers skip those they have. A step that restarted workers log again is sent once.
    """

    def __init__(self, spec: TrainSpec, journal: Journal) -> None:
        self._run = spec.run
        self._journal = journal
        self._prefixes = deque(layout.attempts_up_to(spec.prefix, spec.attempt))
        self._next_file = 0
        self._last_step = 0
        self._sent_outcomes = set[str]()
        self._reported_errors = set[str]()
        self._events: deque[tuple[str, Level]] = deque()
        self._trackers = open_trackers(TrackerSettings(), spec, self._log_event)
        self._closing = threading.Event()
        self._ends_at = 0.0
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def close(self, within_s: float = CLOSES_WITHIN_S) -> None:
        """Send what is left, and return within this time whether or not trackers have received it."""
        self._ends_at = time.monotonic() + within_s
        self._closing.set()
        self._thread.join(within_s)

    # ---- the thread

    def _work(self) -> None:
        while not self._closing.wait(POLL_EVERY_S):
            self._attempt(self._send_steps)
            self._attempt(self._send_outcomes)
            self._attempt(self._trackers.deliver)
            self._attempt(self._write_events)
        self._attempt(self._send_outcomes)
        self._attempt(self._send_remaining_steps)
        self._attempt(self._close_trackers)
        self._attempt(self._write_events)

    def _attempt(self, call: Callable[[], object]) -> None:
        """Survive any error. The next poll recovers from storage errors; others are reported once."""
        try:
            call()
        except (OSError, Unavailable) as error:
            log.warning("storage failed, trackers are updated later: %s", error)
        except Exception as error:  # no tracker is worth a run
            kind = type(error).__name__
            if kind not in self._reported_errors:
                self._reported_errors.add(kind)
                log.exception("trackers lack some of this run's data")
                message = f"trackers lack some of this run's data: {kind}: {error}"
                self._log_event(message.splitlines()[0], "warning")

    def _send_steps(self) -> bool:
        """Send the steps of up to FILES_AT_ONCE journal files; whether there may be more to send at once."""
        journal_files = read_journal(self._prefixes[0], self._next_file, FILES_AT_ONCE)
        for number, entries in journal_files:
            self._next_file = number + 1
            for entry in entries:
                step = entry.step or 0
                if entry.metrics and "loss" in entry.metrics and step > self._last_step:
                    self._last_step = step
                    self._trackers.log_metrics(step, entry.metrics)
        if len(journal_files) == FILES_AT_ONCE:
            return True
        if len(self._prefixes) == 1:
            return False
        self._prefixes.popleft()
        self._next_file = 0
        return True

    def _send_remaining_steps(self) -> None:
        while self._send_steps() and time.monotonic() < self._ends_at:
            pass

    def _send_outcomes(self) -> None:
        folder = layout.validation_folder(self._run)
        for name in files.list_files(folder):
            if layout.outcome_step(name) is None or name in self._sent_outcomes:
                continue
            outcome = Validated.model_validate_json(files.read_bytes(files.join(folder, name)))
            image = files.read_bytes(outcome.picture) if outcome.picture else None
            self._trackers.log_validation(outcome.step, outcome.metrics, image)
            self._sent_outcomes.add(name)

    def _close_trackers(self) -> None:
        """Leaves a tenth of the time to write events."""
        self._trackers.close(0.9 * max(0.0, self._ends_at - time.monotonic()))

    def _log_event(self, message: str, level: Level) -> None:
        self._events.append((message, level))

    def _write_events(self) -> None:
        """If storage fails, the journal keeps them until the next flush."""
        while self._events:
            message, level = self._events.popleft()
            with suppress(OSError, Unavailable):
                self._journal.event(message, level)
        self._journal.flush()
