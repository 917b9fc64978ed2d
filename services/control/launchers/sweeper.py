"""Deletes RayJobs that no job needs: they have no owner in Kubernetes that would take them along.

A recreated Deployment would take running jobs with it if it owned their RayJobs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sqlalchemy import select

from services.control import stages
from services.control.database import Database
from services.control.launchers.kuberay import KubeRayLauncher
from services.control.tables import Job
from services.control.transitions import UNFINISHED
from services.errors import ServiceError

log = logging.getLogger("dde")
SWEEP_S = 30.0
ORPHAN_S = 300.0
"""How long a run that nobody needs may go on: the driver of a stage ends a little after its last marker."""


class Sweeper:
    """Remembers since when it sees each orphan. Any number of replicas may sweep."""

    def __init__(
        self, database: Database, launcher: KubeRayLauncher, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._launcher = launcher
        self._clock = clock
        self._since: dict[str, float] = {}

    def sweep(self) -> list[str]:
        """Delete the RayJobs of ended runs that no job needs, and of others ``ORPHAN_S`` after they were seen
        first. Returns the ids of the runs. Raises Unavailable.
        """
        runs = self._launcher.runs()  # before the jobs: whatever it finds, its job is known by now
        needed = self._needed()
        now = self._clock()
        orphans = {run_id: has_ended for run_id, has_ended in runs.items() if run_id not in needed}
        self._since = {run_id: self._since.get(run_id, now) for run_id in orphans}
        over = [
            run_id
            for run_id, has_ended in orphans.items()
            if has_ended or now - self._since[run_id] >= ORPHAN_S
        ]
        for run_id in over:
            log.info("deleting the RayJob of run %s: no job needs it", run_id)
            self._launcher.stop(run_id)
        return over

    def _needed(self) -> set[str]:
        """The runs of the current attempts of all unfinished jobs."""
        query = select(Job).where(Job.status.in_(UNFINISHED), Job.stage.is_not(None))
        with self._database.read() as session:
            return {stages.submission_id(job) for job in session.scalars(query)}

    def sweep_until(self, stopping: threading.Event) -> None:
        """Sweep every ``SWEEP_S`` seconds."""
        while not stopping.wait(SWEEP_S):
            try:
                self.sweep()
            except ServiceError as error:
                log.warning("RayJobs that no job needs could not be deleted: %s", error)
            except Exception:
                log.exception("RayJobs that no job needs could not be deleted")
