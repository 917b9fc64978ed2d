"""How far encoding is, told to people and programs; and the moment to stop when too many rows are bad."""

from __future__ import annotations

from services.ingest.pace import Pace
from services.ingest.plan import Plan
from services.ingest.quarantine import Quarantine
from services.stages.journal import Journal


class Progress:
    """``done`` are the blocks that an earlier run has committed."""

    def __init__(self, plan: Plan, quarantine: Quarantine, journal: Journal, done: set[int]) -> None:
        self._plan, self._quarantine, self._journal = plan, quarantine, journal
        counts = plan.counts
        settled = (
            block for block in plan.blocks if block.number in done or not plan.first[block.slots].any()
        )
        self._rows = sum(block.stop - block.start for block in settled)
        self._before = (
            sum(int(plan.first[plan.blocks[n].slots].sum()) for n in done) - quarantine.num_bad_images
        )
        self._images = self._before
        self._pace = Pace(self._before)
        ahead = f"{plan.num_images - self._before} images to encode"
        earlier = f", {self._before} are there from an earlier run" if done else ""
        journal.event(f"{counts.pairs} decided pairs in {counts.rows} rows: {ahead}{earlier}")

    def add(self, block: int, images: int) -> None:
        """A block is committed. Raises BadRequest where too many rows are bad by now."""
        self._rows += self._plan.blocks[block].stop - self._plan.blocks[block].start
        self._images += images
        if self._pace.metrics_due():
            self._tell(aloud=self._pace.event_due())

    def end(self) -> None:
        """Every block is committed."""
        self._tell(aloud=True)

    def _tell(self, *, aloud: bool) -> None:
        bad, total = self._quarantine.check(), self._plan.num_images - self._quarantine.num_bad_images
        rate, eta_s = self._pace.measure(self._images, total)
        values = {"images": self._images, "images_total": total, "images_per_s": rate, "eta_s": eta_s}
        values |= {"rows": self._rows, "rows_total": self._plan.counts.rows, "quarantined": bad}
        self._journal.metrics(self._images, {name: float(value) for name, value in values.items()})
        if aloud:
            self._journal.event(
                f"{self._images} of {total} images encoded ({self._rows} of {self._plan.counts.rows} rows), "
                f"{rate:.1f} images/s, {eta_s:.0f} s left, {bad} rows quarantined"
            )
