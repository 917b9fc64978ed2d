"""Waits for machines: a run that others leave no room for reports it in its journal, and never fails for it.

The control plane ends a run that has waited for longer than its job may (``max_wait_s``).
"""

from __future__ import annotations

import time

import ray
from ray.util import placement_group_table

from services.api.requests import least_workers
from services.stages.journal import Journal
from services.stages.specs import TrainSpec
from services.training.driver import capacity

REPORT_AFTER_S = 5.0
"""Resources of workers that have just ended are free within seconds: that is no wait."""
UNPLACED_AFTER_S = 30.0
"""Ray places workers within seconds if it can; later, free resources are on the wrong nodes."""
FIRST_PAUSE_S = 60.0
LONGEST_PAUSE_S = 3600.0
"""What a waiting run needs is repeated after pauses that double, so days of waiting are a few lines."""


class WaitReport:
    """Writes a wait to the journal: its beginning, its end, and in between what the cluster has by then."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._since: float | None = None
        self._is_reported = False
        self._next_at = 0.0
        self._pause_s = FIRST_PAUSE_S

    def update(self, shortage: str | None) -> None:
        """``shortage`` is what the run waits for now; None: it does not wait. Raises OSError or Unavailable
        if the journal cannot be written.
        """
        now = time.monotonic()
        if shortage is None:
            was_reported = self._is_reported
            self._since = None
            self._is_reported = False
            if was_reported:
                self._journal.waiting("")
        elif self._since is None:
            self._since = now
            self._next_at = now + REPORT_AFTER_S
            self._pause_s = FIRST_PAUSE_S
        elif now >= self._next_at:
            self._next_at = now + self._pause_s
            self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
            self._is_reported = True
            self._journal.waiting(shortage)
        self._journal.flush()


class WorkersRoom:
    """Whether a run's workers have machines."""

    def __init__(self, spec: TrainSpec) -> None:
        self._least = least_workers(spec.workers)
        self._needs = capacity.needed(spec, self._least)
        self._without_since: float | None = None
        self.has_machines = False

    def look(self) -> str | None:
        """Update ``has_machines``. What the workers wait for, or None while they have it or may get it."""
        self.has_machines = _has_placed_group()
        if self.has_machines:
            self._without_since = None
            return None
        now = time.monotonic()
        self._without_since = self._without_since or now
        who = f"workers = {self._least} need"
        shortage = _shortage(self._needs)
        if shortage:
            return f"{who} {shortage}"
        if now - self._without_since < UNPLACED_AFTER_S:
            return None
        needs = ", ".join(f"{amount:g} {name}" for name, amount in self._needs.items() if amount)
        return f"{who} {needs}; the cluster has that free, but not on nodes where workers fit"


def validation_shortage(spec: TrainSpec) -> str | None:
    """What a validation task waits for in a cluster that is too small for it."""
    needs = capacity.needed(spec)
    total = ray.cluster_resources()
    name = capacity.missing(needs, total)
    return name and f"validation needs {needs[name]:g} {name}; the cluster has {total.get(name, 0):g}"


def _shortage(needs: dict[str, float]) -> str | None:
    """``2 GPU; the cluster has 0 free of 1``."""
    free = ray.available_resources()
    name = capacity.missing(needs, free)
    if name is None:
        return None
    total = ray.cluster_resources()
    return f"{needs[name]:g} {name}; the cluster has {free.get(name, 0):g} free of {total.get(name, 0):g}"


def _has_placed_group() -> bool:
    """Whether Ray has placed workers of this driver. The id of a placement group ends in that of its job."""
    own = ray.get_runtime_context().get_job_id()
    groups = placement_group_table().values()
    return any(group["state"] == "CREATED" and group["placement_group_id"].endswith(own) for group in groups)
