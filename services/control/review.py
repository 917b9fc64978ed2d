"""What is to be done with an unfinished job now: looks at storage and the launcher, never at the database.

What lies in storage decides: a marker ends a stage, whatever Ray says of its driver. Every step may be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from services.api.records import Stage
from services.api.requests import Strict
from services.artifacts import models
from services.control import attempt, stages, transitions
from services.control.attempt import Attempt
from services.control.job_update import Change, fresh
from services.control.journal import printable
from services.control.launcher import Launcher, RunState
from services.control.tables import Job
from services.errors import NotFound, Unavailable
from services.settings import Settings
from services.stages.specs import RESULTS, StageFailure
from services.storage import files

LONGEST_PAUSE_S = 60.0
PASSING = ("unavailable", "stopped")
"""Codes of failures that another attempt may not have: something was out of reach, or others ended the driver."""


@dataclass(frozen=True)
class Watch:
    """One look at one job."""

    job: Job
    settings: Settings
    launcher: Launcher
    now: float

    @cached_property
    def attempt(self) -> Attempt:
        """The attempt of the stage that the job is at."""
        return Attempt(self.job, self.settings.storage_uri, self.launcher)

    @property
    def _may_run(self) -> bool:
        """Whether something of the job may be on the cluster: of its stage, or left there when the job failed."""
        return self.job.status in transitions.ACTIVE or self.job.submitted_at is not None

    def look(self) -> Change:
        """What has happened, and what follows from it. Starts and stops runs; changes nothing else."""
        change, job = Change(), self.job
        if job.cancel_requested_at is not None:
            self._cancel(change)
        elif job.status == "validating":
            self._validate(change)
        elif job.pause_requested_at is not None and not self._may_run:
            self._rest(change)
        elif job.stage is None:
            self._enter(change, transitions.next_stage(job.kind, None, job.request))
        elif job.status == "queued":
            self._go_on(change)
        elif job.submitted_at is None and job.pause_requested_at is None:
            self._submit(change)
        else:
            self._follow(change)
        return change

    # ---- the steps

    def _validate(self, change: Change) -> None:
        """What was checked when the job was created may have gone since."""
        try:
            models.find(self.settings.storage_uri, self.job.model)
        except NotFound as error:
            return self._fail(change, StageFailure(message=error.message, code=error.code, param=error.param))
        uri = self.job.inputs["dataset"]["uri"]
        if not files.exists(uri):
            message = f"the files of dataset {self.job.dataset} are gone: {uri}"
            return self._fail(
                change, StageFailure(message=message, code="dataset_not_found", param="dataset")
            )
        self._move(change, "queued", "the job is valid")
        change.again = True

    def _enter(self, change: Change, stage: Stage | None) -> None:
        """Begin a stage, or end the job where none is left."""
        change.again = True
        if stage is None:
            self._finish(change, "succeeded", None)
            change.point = self.job.kind == "alignment"
            return
        if (status := transitions.STAGE_STATUS[stage]) == self.job.status:
            change.say(self.now, f"stage {stage}")
        else:
            self._move(change, status, f"stage {stage}")
        change.values |= {
            "stage": stage,
            "stage_started_at": self.now,
            "started_at": self.job.started_at or self.now,
        }
        change.values |= fresh(1)

    def _go_on(self, change: Change) -> None:
        """Take a stage up where a pause or a failure has left it, once nothing of it runs any more."""
        if self._may_run and not self._end_what_was_left(change):
            return
        if self.job.pause_requested_at is not None:
            return self._rest(change)
        stage, number = self.job.stage, self.job.attempt + 1
        status, change.again = transitions.STAGE_STATUS[stage], True  # type: ignore[index]
        if self._has_result():
            self._move(change, status, f"stage {stage} had ended well")
            change.values["submitted_at"] = self.job.submitted_at or self.now
            return
        self._move(change, status, f"stage {stage} goes on as attempt {number}")
        change.values |= fresh(number)

    def _has_result(self) -> bool:
        """Whether the last attempt was done after all, when nobody looked after it any more."""
        try:
            return (
                RESULTS[self.job.stage].model_validate_json(self.attempt.marker("done.json") or b"")
                is not None
            )  # type: ignore[index]
        except ValidationError:
            return False

    def _end_what_was_left(self, change: Change) -> bool:
        """A job that failed may have a run that lives: it is ended, and its journal read. Are both done? Ray's answer is waited
        for, as for that to a submission: no run is started beside one that nobody has asked to end."""
        if self._ray_says(change) is None:
            return False
        since = change.values["ended_at"] = self.job.ended_at or self.now
        if not self._is_over(change, since):
            self.attempt.ask_to_stop()
            return False
        self._read_journal(change)
        return not change.again

    def _submit(self, change: Change) -> None:
        job, root = self.job, self.settings.storage_uri
        spec = stages.spec(job, self.settings).model_dump(mode="json")
        files.write_json(files.join(self.attempt.prefix, "spec.json"), spec)
        submission = self.attempt.submission
        try:
            self.launcher.submit(
                submission, stages.entrypoint(job, root), {"job": job.id, "stage": str(job.stage)}
            )
        except Unavailable as error:
            return self._unreachable(change, error)
        change.values |= {"submitted_at": self.now, "unreachable_at": None}
        change.say(self.now, f"submitted {submission}")

    def _follow(self, change: Change) -> None:
        """Markers are looked for before the journal is read: a stage writes its marker after its last journal file."""
        done, failure, stopped = (
            self.attempt.marker("done.json"),
            self.attempt.failure(),
            self.attempt.stopped(),
        )
        self._read_journal(change)
        if change.again:
            return
        if done is not None:
            self._done(change, done)
        elif failure is not None and failure.code not in PASSING:
            self._fail(change, failure)
        elif self.job.pause_requested_at is not None:
            self._pause(change, has_ended=failure is not None or stopped is not None)
        elif stopped is not None:
            why = StageFailure(
                message=f"the stage was stopped after step {stopped.step} ({stopped.why})", code="stopped"
            )
            self._start_again(change, why, at_once=True)
        elif failure is not None:
            self._start_again(change, failure)
        else:
            self._ask_ray(change)

    def _done(self, change: Change, marker: bytes) -> None:
        stage: Stage = self.job.stage  # type: ignore[assignment]
        try:
            result = RESULTS[stage].model_validate_json(marker)
        except ValidationError as error:
            message = f"done.json of stage {stage} cannot be read: {error}"
            return self._fail(change, StageFailure(message=message, code="bad_result"))
        dumped = self._result(change, result)
        change.values |= {
            "results": {**self.job.results, stage: dumped},
            "stage_seconds": {
                **self.job.stage_seconds,
                stage: round(self.now - (self.job.stage_started_at or self.now), 3),
            },
        }
        change.say(self.now, f"stage {stage} done")
        self._enter(change, transitions.next_stage(self.job.kind, stage, self.job.request))

    def _result(self, change: Change, result: Strict) -> dict[str, Any]:
        dumped = result.model_dump(mode="json")
        if self.job.stage == "train":
            change.publish = stages.aligned_record(self.job, result.model)  # type: ignore[attr-defined]
            dumped["model"] = change.publish.model_dump(mode="json")
        return dumped

    def _ask_ray(self, change: Change) -> None:
        """No marker yet: does the driver live?"""
        state = self._ray_says(change)
        if state is not None and self._has_died(change, state):
            message = f"the driver of stage {self.job.stage} ended without a result; Ray says {state}"
            self._start_again(change, StageFailure(message=message, code="driver_died"))

    def _ray_says(self, change: Change) -> RunState | None:
        """How the run stands; None where Ray does not answer, which the job survives for a while."""
        try:
            state = self.launcher.state(self.attempt.submission)
        except Unavailable as error:
            self._unreachable(change, error)
            return None
        change.values["unreachable_at"] = None
        return state

    def _has_died(self, change: Change, state: RunState) -> bool:
        """Ray's word that the driver has ended counts once the grace is over and the journal is silent."""
        if state in attempt.RUNNING:
            change.values["ended_at"] = None
        elif self.job.ended_at is None or change.entries:
            change.values["ended_at"] = self.now
        else:
            return self.now - self.job.ended_at >= self.settings.driver_grace_s
        return False

    def _start_again(self, change: Change, why: StageFailure, *, at_once: bool = False) -> None:
        """Start the stage as a new attempt once the old one is surely over. After the last attempt the job fails: attempts
        count that brought the stage no further and were not asked to end."""
        job, since = self.job, self.job.ended_at or self.now
        change.values["ended_at"] = since
        if not self._is_over(change, since):
            return
        step = self.attempt.newest_step()
        restarts = (job.restarts if step <= job.restart_step else 0) + (not self.attempt.was_asked_to_end())
        last = restarts >= self.settings.max_attempts
        if not at_once:
            self._show_log(change, "error" if last else "warning")
        if last:
            return self._fail(change, why)
        change.say(
            self.now, f"stage {job.stage} starts again as attempt {job.attempt + 1}: {why.message}", "warning"
        )
        change.values |= fresh(job.attempt + 1) | {
            "restarts": restarts,
            "restart_step": max(step, job.restart_step),
        }
        change.again = at_once
        change.pause_s = min(LONGEST_PAUSE_S, self.settings.poll_interval_s * 2**restarts)

    def _show_log(self, change: Change, level: str) -> None:
        try:
            change.say(
                self.now,
                self.launcher.log_tail(self.attempt.submission) or "the driver's log is empty",
                level,
            )
        except Unavailable as error:
            change.say(self.now, f"the driver's log cannot be had: {error}", "warning")

    def _unreachable(self, change: Change, error: Unavailable) -> None:
        """Fail the job once neither Ray nor the journal has said anything for long enough. A run that lives nevertheless is
        asked, through storage, to store its state and to end: nobody looks after it any more."""
        since = change.values.get("unreachable_at", self.job.unreachable_at)
        if since is None:
            change.values["unreachable_at"] = self.now
            change.say(self.now, f"waiting for Ray: {error}", "warning")
        elif self.now - since >= self.settings.unreachable_s:
            self.attempt.ask_to_stop()
            message = f"out of reach for {self.now - since:.0f} s, and nothing new in the journal: {error}"
            self._fail(change, StageFailure(message=message, code="cluster_unreachable"))

    # ---- on request

    def _pause(self, change: Change, *, has_ended: bool) -> None:
        """Training is asked to store its state and to end by itself; another stage is ended: what it did is committed."""
        asked_at, state = float(self.job.pause_requested_at or 0), self.attempt.state()
        gives_up = state is None and self.now - asked_at >= self.settings.unreachable_s
        if has_ended or self.job.submitted_at is None or gives_up:
            at_rest = self._is_over(change, self.job.ended_at or asked_at)
        elif state == "running" and self._was_given_time():
            at_rest = self._end_what_hangs(change)
        elif state is None or state in attempt.RUNNING:
            self._ask_to_end(change, state)
            at_rest = False
        else:
            at_rest = self._has_died(change, state)
        if at_rest:
            self._rest(change)

    def _was_given_time(self) -> bool:
        """From when the run was asked, not the pause: nobody may have been there to pass it on."""
        since = self.job.stop_asked_at
        if since is None or self.now - since < self.settings.unreachable_s:
            return False
        return self.now - since >= self.settings.stopping_s or not self.attempt.has_heard()

    def _ask_to_end(self, change: Change, state: RunState | None) -> None:
        change.values["stop_asked_at"] = self.job.stop_asked_at or self.now
        self.attempt.ask_to_stop()
        if self.job.stage != "train" or state == "pending":
            self.attempt.end()

    def _end_what_hangs(self, change: Change) -> bool:
        """What was asked to stop and goes on is ended; its end is waited for as long as it was. Is it over?"""
        since = self.job.ended_at or self.now
        change.values["ended_at"] = since
        if self.job.ended_at is None:
            waited = f"{self.now - float(self.job.stop_asked_at or since):.0f} s after it was asked to"
            message = (
                f"stage {self.job.stage} has not stopped {waited}, and is ended: what it stored last stands"
            )
            change.say(self.now, message, "warning")
        return self._is_over(change, since)

    def _rest(self, change: Change) -> None:
        """Nothing runs any more."""
        self._move(change, "paused", "paused on request")
        change.values["submitted_at"] = None

    def _cancel(self, change: Change) -> None:
        """Stop the run and end once Ray says that it is over, or when Ray was given long enough to say so."""
        if self._may_run:
            is_over = self._is_over(
                change, float(self.job.cancel_requested_at or 0)
            )  # first: its workers are wanted
            if not is_over:
                self.attempt.ask_to_stop()  # Ray may not answer: training reads it in storage, too
            self._read_journal(change)
            if change.again or not is_over:
                return
        self._finish(change, "cancelled", StageFailure(code="cancelled", message="cancelled on request"))

    # ---- what they share

    def _is_over(self, change: Change, since: float) -> bool:
        """End the run. True once Ray says that it is over, or was given long enough to say so."""
        if self.attempt.end():
            return True
        if self.now - since < self.settings.unreachable_s:
            return False
        change.say(self.now, "Ray did not say that the run has ended; it may go on", "warning")
        return True

    def _read_journal(self, change: Change) -> None:
        journal_files = self.attempt.journal(self.job.journal_cursor)
        for number, entries in journal_files:
            change.entries += entries
            change.values["journal_cursor"] = number + 1
        if change.entries and self.job.unreachable_at is not None:
            change.values["unreachable_at"] = self.now  # the run lives: the time without Ray begins anew
        change.again = len(journal_files) == attempt.JOURNAL_FILES

    def _fail(self, change: Change, why: StageFailure) -> None:
        self._finish(change, "failed", why)

    def _finish(self, change: Change, status: str, why: StageFailure | None) -> None:
        level = "error" if status == "failed" else "info"
        self._move(change, status, why.message if why else "the job is done", level)
        reason = why and {**why.model_dump(), "message": printable(why.message)}
        change.values |= {"reason": reason, "finished_at": self.now, "pause_requested_at": None}
        if why is None:
            change.values["stage"] = None

    def _move(self, change: Change, status: str, why: str, level: str = "info") -> None:
        transitions.check(self.job.status, status)
        change.values["status"] = status
        change.say(self.now, f"{self.job.status} -> {status}: {why}", level)
