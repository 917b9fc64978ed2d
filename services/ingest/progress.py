"""How far encoding is, told to people and programs; and the moment to stop when too many rows are bad."""

from __future__ import annotations

import time

from services.ingest.plan import Plan
from services.ingest.quarantine import Quarantine
from services.observability import Journal

METRICS_EVERY_S = 1.0
EVENT_EVERY_S = 15.0


class Progress:
    """``done`` are the blocks that an earlier run has committed."""

    def __init__(self, plan: Plan, quarantine: Quarantine, journal: Journal, done: set[int]) -> None:
        self._plan, self._quarantine, self._journal = plan, quarantine, journal
        counts = plan.counts
        self._rows = sum(plan.blocks[number].stop - plan.blocks[number].start for number in done)
        self._before = sum(int(plan.first[plan.blocks[n].slots].sum()) for n in done) - quarantine.num_pictures
        self._images = self._before
        self._began = self._told_metrics = self._told_event = time.monotonic()
        ahead = f"{plan.num_images - self._before} pictures to encode"
        earlier = f", {self._before} are there from an earlier run" if done else ""
        journal.event(f"{counts.pairs} decided pairs in {counts.rows} rows: {ahead}{earlier}")

    def add(self, block: int, images: int) -> None:
        """A block is committed. Raises BadRequest where too many rows are bad by now."""
        self._rows += self._plan.blocks[block].stop - self._plan.blocks[block].start
        self._images += images
        now = time.monotonic()
        if now - self._told_metrics >= METRICS_EVERY_S:
            self._told_metrics = now
            self._tell(now, aloud=now - self._told_event >= EVENT_EVERY_S)

    def end(self) -> None:
        """Every block is committed."""
        self._tell(time.monotonic(), aloud=True)

    def _tell(self, now: float, aloud: bool) -> None:
        self._quarantine.check()
        total, bad = self._plan.num_images - self._quarantine.num_pictures, self._quarantine.num_rows
        rate = (self._images - self._before) / (now - self._began)
        eta_s = (total - self._images) / rate if rate else 0.0
        values = {"images": self._images, "images_total": total, "images_per_s": rate, "eta_s": eta_s}
        values |= {"rows": self._rows, "rows_total": self._plan.counts.rows, "quarantined": bad}
        self._journal.metrics(self._images, {name: float(value) for name, value in values.items()})
        if aloud:
            self._told_event = now
            self._journal.event(
                f"{self._images} of {total} pictures encoded ({self._rows} of {self._plan.counts.rows} rows), "
                f"{rate:.1f} pictures/s, {eta_s:.0f} s left, {bad} rows quarantined"
            )
