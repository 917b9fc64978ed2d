"""How fast a stage is, what is left, and when it is time to say so."""

from __future__ import annotations

import time

METRICS_EVERY_S = 1.0
EVENT_EVERY_S = 15.0


class Pace:
    """Of work that had ``done`` behind it when this was made."""

    def __init__(self, done: int = 0) -> None:
        self._before = done
        self._began = self._told_metrics = self._told_event = time.monotonic()

    def measure(self, done: int, total: int) -> tuple[float, float]:
        """Units a second since the beginning, and the seconds that are left at that pace."""
        rate = (done - self._before) / (time.monotonic() - self._began)
        return rate, (total - done) / rate if rate else 0.0

    def metrics_due(self) -> bool:
        """Has a second gone by since the last time?"""
        now = time.monotonic()
        if due := now - self._told_metrics >= METRICS_EVERY_S:
            self._told_metrics = now
        return due

    def event_due(self) -> bool:
        """The same for what people read, which is told less often."""
        now = time.monotonic()
        if due := now - self._told_event >= EVENT_EVERY_S:
            self._told_event = now
        return due
