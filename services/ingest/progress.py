"""Progress of encoding and of scoring, as metrics and events. Encoding stops once too many rows are bad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.ingest.plan import Plan
from services.ingest.quarantine import Quarantine
from services.stages.journal import Journal
from services.stages.pace import Pace


class Progress:
    """``done`` are the blocks that an earlier run committed."""

    def __init__(self, plan: Plan, quarantine: Quarantine, journal: Journal, done: set[int]) -> None:
        self._plan = plan
        self._quarantine = quarantine
        self._journal = journal
        complete = [block for block in plan.blocks if block.number in done or not plan.num_first(block)]
        self._rows = sum(block.stop - block.start for block in complete)
        self._images = sum(plan.num_first(block) for block in complete) - quarantine.num_bad_images
        self._pace = Pace(self._images)
        message = f"{plan.counts.pairs} decided pairs in {plan.counts.rows} rows: "
        message += f"{plan.num_images - self._images} images to encode"
        if done:
            message += f", {self._images} already encoded by an earlier run"
        journal.event(message)

    def add(self, block: int, images: int) -> None:
        """Count a committed block. Raises BadRequest where too many rows are bad by now."""
        self._rows += self._plan.blocks[block].stop - self._plan.blocks[block].start
        self._images += images
        if self._pace.metrics.has_elapsed():
            self._report(with_event=self._pace.event.has_elapsed())

    def end(self) -> None:
        """Report that every block is committed. Raises BadRequest where too many rows are bad."""
        self._report(with_event=True)

    def _report(self, *, with_event: bool) -> None:
        bad_rows = self._quarantine.check()
        total = self._plan.num_images - self._quarantine.num_bad_images
        rate, eta_s = self._pace.measure(self._images, total)
        values = {"images": self._images, "images_total": total, "images_per_s": rate, "eta_s": eta_s}
        values |= {"rows": self._rows, "rows_total": self._plan.counts.rows, "quarantined": bad_rows}
        self._journal.metrics(self._images, {name: float(value) for name, value in values.items()})
        self._pace.metrics.restart()
        if with_event:
            self._journal.event(
                f"{self._images} of {total} images encoded ({self._rows} of {self._plan.counts.rows} rows), "
                f"{rate:.1f} images/s, {eta_s:.0f} s left, {bad_rows} rows quarantined"
            )
            self._pace.event.restart()


class ScoredImages:
    """Progress of scoring ``total`` images, of which an earlier run committed ``done``."""

    def __init__(self, journal: Journal, total: int, done: int) -> None:
        self._journal = journal
        self._total = total
        self._images = done
        self._pace = Pace(done)
        earlier = f", {done} already scored by an earlier run" if done else ""
        journal.event(f"{total - done} images to score{earlier}")

    def follow(self, chunks: Iterable[dict[str, Any]]) -> None:
        """Count the ``images`` of each chunk that is committed."""
        for chunk in chunks:
            self._images += chunk["images"]
            if self._pace.metrics.has_elapsed():
                self._report()
        self._report()

    def _report(self) -> None:
        rate, eta_s = self._pace.measure(self._images, self._total)
        values = {"images": self._images, "images_total": self._total, "images_per_s": rate, "eta_s": eta_s}
        self._journal.metrics(self._images, {name: float(value) for name, value in values.items()})
        self._pace.metrics.restart()
        if self._pace.event.has_elapsed():
            self._journal.event(f"{self._images} of {self._total} images scored, {rate:.1f} images/s")
            self._pace.event.restart()
