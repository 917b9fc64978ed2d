"""The run of a job's current stage, as one review of the job observes and stops it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from services.control import attempt, stages, transitions, waiting
from services.control.attempt import Attempt
from services.control.job_update import JobUpdate
from services.control.launchers.contract import Launcher, RunState, RunStatus
from services.control.tables import Job
from services.errors import Unavailable
from services.settings import Settings
from services.stages.specs import StageFailure


@dataclass(frozen=True)
class StageRun:
    """Observations go into ``update``. Never reads the database."""

    update: JobUpdate
    settings: Settings
    launcher: Launcher

    @property
    def job(self) -> Job:
        return self.update.job

    @property
    def now(self) -> float:
        return self.update.now

    @cached_property
    def attempt(self) -> Attempt:
        return Attempt(self.job, stages.root(self.job, self.settings), self.launcher)

    @property
    def may_exist(self) -> bool:
        """Whether the cluster may hold a run of the job: its current stage, or one left there when the job
        failed.
        """
        return self.job.status in transitions.ACTIVE or self.job.submitted_at is not None

    def read_journal(self) -> None:
        """Add the journal's new entries to the update, which asks for another review if there may be more."""
        journal_files = self.attempt.journal(self.job.journal_cursor)
        for number, entries in journal_files:
            self.update.entries += entries
            self.update.values["journal_cursor"] = number + 1
        if self.update.entries and self.job.unreachable_at is not None:
            # A growing journal proves that the run is alive: the time without Ray starts anew.
            self.update.values["unreachable_at"] = self.now
        if journal_files and self.job.journal_cursor == 0:
            self.update.stop_waiting()  # it was for the driver, which has started
        for _, entries in journal_files:
            waiting.follow_journal(self.update, entries)
        self.update.review_again = len(journal_files) == attempt.JOURNAL_FILES

    def observe_status(self) -> RunStatus | None:
        """The run's status; None while Ray is unreachable, which fails the job after ``unreachable_s``."""
        try:
            status = self.launcher.status(self.attempt.submission)
        except Unavailable as error:
            self.record_unreachable(error)
            return None
        self.update.values["unreachable_at"] = None
        return status

    def record_pending(self, status: RunStatus | None) -> None:
        """Record whether the driver waits for room: it has no journal yet. Later, its journal reports it."""
        if status is None or self.update.value("journal_cursor") > 0:
            return
        submitted_at = self.job.submitted_at or self.now
        if status.state != "pending":
            self.update.stop_waiting()
        elif self.now - submitted_at >= waiting.STARTS_WITHIN_S:
            why = ": ".join(part for part in (status.reason, status.message) if part)
            self.update.wait("cluster_room", why or "the run is pending", submitted_at)

    def record_unreachable(self, error: Unavailable) -> None:
        """Fail the job if neither Ray answered nor the journal grew for ``unreachable_s``.

        Nobody supervises a run that is still alive then, so it is asked through storage to stop.
        """
        since = self.update.values.get("unreachable_at", self.job.unreachable_at)
        if since is None:
            self.update.values["unreachable_at"] = self.now
            self.update.log(f"waiting for Ray: {error}", "warning")
        elif self.now - since >= self.settings.unreachable_s:
            self.attempt.request_stop()
            silence = f"Ray was unreachable for {self.now - since:.0f} s, and the journal did not grow"
            self.update.fail(StageFailure(message=f"{silence}: {error}", code="cluster_unreachable"))

    def confirm_death(self, state: RunState) -> bool:
        """Whether the driver has died: Ray reports its end, the grace period is over and the journal is
        silent.

        Records when the end was first seen.
        """
        if state in attempt.RUNNING:
            self.update.values["ended_at"] = None
        elif self.job.ended_at is None or self.update.entries:
            self.update.values["ended_at"] = self.now
        else:
            return self.now - self.job.ended_at >= self.settings.driver_grace_s
        return False

    def stop_and_confirm(self, since: float) -> bool:
        """Stop the driver.

        True once Ray confirms its end, or has not done so for ``unreachable_s`` after ``since``.
        """
        if self.attempt.stop():
            return True
        if self.now - since < self.settings.unreachable_s:
            return False
        self.update.log("Ray did not confirm that the run ended; it may still be running", "warning")
        return True
