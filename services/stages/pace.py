"""The speed of a stage, its remaining time, and the intervals at which it reports."""

from __future__ import annotations

import time

METRICS_EVERY_S = 1.0
EVENT_EVERY_S = 15.0


class Interval:
    """Elapses every ``seconds`` after the last restart."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._started = time.monotonic()

    def has_elapsed(self) -> bool:
        return time.monotonic() - self._started >= self._seconds

    def restart(self) -> None:
        self._started = time.monotonic()


class Pace:
    """Measures work of which ``done`` units were complete when this was created."""

    def __init__(self, done: int = 0) -> None:
        self._initially_done = done
        self._started = time.monotonic()
        self.metrics = Interval(METRICS_EVERY_S)
        self.event = Interval(EVENT_EVERY_S)

    def measure(self, done: int, total: int) -> tuple[float, float]:
        """Units a second since the start, and the seconds left at that rate (0 where it is 0)."""
        rate = (done - self._initially_done) / (time.monotonic() - self._started)
        return rate, (total - done) / rate if rate else 0.0
