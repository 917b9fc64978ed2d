"""What is to be done with an unfinished job now: looks at storage and the launcher, never at the database.

What lies in storage decides: a marker ends a stage, whatever Ray says of its driver. Every step may be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from services import registry, storage
from services.contracts import RESULTS, JournalEvent, ModelRecord, Stage, StageFailure, Strict
from services.control import stages, transitions
from services.control.journal import printable
from services.control.launcher import Launcher
from services.control.tables import Job
from services.errors import NotFound, Unavailable
from services.observability import read_journal
from services.settings import Settings

JOURNAL_FILES = 200
"""How many files of a journal one look reads: a look must be over before its lock expires."""


@dataclass
class Change:
    """What one look at a job found: new column values, entries of its journal, a model that is there now.

    ``publish``: a model to be made known. ``point``: the job's name means its model from now on. ``again``: there is
    more to do at once.
    """

    values: dict[str, Any] = field(default_factory=dict)
    entries: list[JournalEvent] = field(default_factory=list)
    publish: ModelRecord | None = None
    point: bool = False
    again: bool = False

    def say(self, at: float, message: str, level: str = "info") -> None:
        """Add an event of the control plane's own."""
        self.entries.append(JournalEvent.model_validate({"at": at, "level": level, "message": message}))


@dataclass(frozen=True)
class Watch:
    """One look at one job."""

    job: Job
    settings: Settings
    launcher: Launcher
    now: float

    def look(self) -> Change:
        """What has happened, and what follows from it. Starts and stops runs; changes nothing else."""
        change = Change()
        if self.job.cancel_requested_at is not None:
            self._cancel(change)
        elif self.job.status == "validating":
            self._validate(change)
        elif self.job.stage is None:
            self._enter(change, transitions.next_stage(self.job.kind, None, self.job.request))
        elif self.job.submitted_at is None:
            self._submit(change)
        else:
            self._follow(change)
        return change

    # ---- the steps

    def _validate(self, change: Change) -> None:
        """What was checked when the job was created may have gone since."""
        try:
            registry.find(self.settings.storage_uri, self.job.model)
        except NotFound as error:
            return self._fail(change, error.code, error.message, error.param)
        uri = self.job.inputs["dataset"]["uri"]
        if not storage.exists(uri):
            return self._fail(
                change, "dataset_not_found", f"the files of dataset {self.job.dataset} are gone: {uri}", "dataset"
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
        change.values |= {"stage": stage, "stage_started_at": self.now, "submitted_at": None, "journal_cursor": 0}
        change.values |= {"ended_at": None, "unreachable_at": None, "started_at": self.job.started_at or self.now}

    def _submit(self, change: Change) -> None:
        job, root = self.job, self.settings.storage_uri
        storage.write_json(
            storage.join(stages.prefix(job, root), "spec.json"), stages.spec(job, self.settings).model_dump(mode="json")
        )
        submission = stages.submission_id(job)
        try:
            self.launcher.submit(submission, stages.entrypoint(job, root), {"job": job.id, "stage": str(job.stage)})
        except Unavailable as error:
            return self._unreachable(change, error)
        change.values |= {"submitted_at": self.now, "unreachable_at": None}
        change.say(self.now, f"submitted {submission}")

    def _follow(self, change: Change) -> None:
        """The marker is looked for before the journal is read: a stage writes its marker after its last journal file."""
        done, failed = self._marker("done.json"), self._marker("failed.json")
        self._read_journal(change)
        if change.again:
            return
        if done is not None:
            self._done(change, done)
        elif failed is not None:
            self._failed(change, failed)
        else:
            self._ask_ray(change)

    def _done(self, change: Change, marker: bytes) -> None:
        stage: Stage = self.job.stage  # type: ignore[assignment]
        try:
            result = RESULTS[stage].model_validate_json(marker)
        except ValidationError as error:
            return self._fail(change, "bad_result", f"done.json of stage {stage} cannot be read: {error}", None)
        dumped = self._result(change, result)
        change.values |= {
            "results": {**self.job.results, stage: dumped},
            "stage_seconds": {**self.job.stage_seconds, stage: round(self.now - (self.job.stage_started_at or self.now), 3)},
        }
        change.say(self.now, f"stage {stage} done")
        self._enter(change, transitions.next_stage(self.job.kind, stage, self.job.request))

    def _result(self, change: Change, result: Strict) -> dict[str, Any]:
        dumped = result.model_dump(mode="json")
        if self.job.stage == "train":
            change.publish = stages.aligned_record(self.job, result.model)  # type: ignore[attr-defined]
            dumped["model"] = change.publish.model_dump(mode="json")
        return dumped

    def _failed(self, change: Change, marker: bytes) -> None:
        try:
            failure = StageFailure.model_validate_json(marker)
        except ValidationError as error:
            failure = StageFailure(message=f"failed.json cannot be read: {error}", code="bad_result")
        self._fail(change, failure.code, failure.message, failure.param)

    def _ask_ray(self, change: Change) -> None:
        """No marker yet. Ray's word that the driver has ended counts once the grace is over and the journal is silent."""
        job, submission = self.job, stages.submission_id(self.job)
        try:
            state = self.launcher.state(submission)
        except Unavailable as error:
            return self._unreachable(change, error)
        change.values["unreachable_at"] = None
        if state in ("pending", "running"):
            change.values["ended_at"] = None
        elif job.ended_at is None or change.entries:
            change.values["ended_at"] = self.now
        elif self.now - job.ended_at >= self.settings.driver_grace_s:
            self._driver_died(change, submission, state)

    def _driver_died(self, change: Change, submission: str, state: str) -> None:
        message = f"the driver of stage {self.job.stage} ended without a result; Ray says {state}"
        try:
            change.say(self.now, self.launcher.log_tail(submission) or "the driver's log is empty", "error")
            self.launcher.stop(submission)
        except Unavailable as error:
            change.say(self.now, f"the driver's log cannot be had: {error}", "warning")
        self._fail(change, "driver_died", message, None)

    def _unreachable(self, change: Change, error: Unavailable) -> None:
        since = self.job.unreachable_at
        if since is None:
            change.values["unreachable_at"] = self.now
            change.say(self.now, f"waiting for Ray: {error}", "warning")
        elif self.now - since >= self.settings.unreachable_s:
            self._fail(change, "cluster_unreachable", f"out of reach for {self.now - since:.0f} s: {error}", None)

    def _cancel(self, change: Change) -> None:
        """Stop the run and end once Ray says that it is over, or when Ray was given long enough to say so."""
        if self.job.stage is not None:
            self._read_journal(change)
            if change.again:
                return
            if self._still_runs():
                if self.now - float(self.job.cancel_requested_at or 0) < self.settings.unreachable_s:
                    return
                change.say(self.now, "Ray did not say that the run has ended; it may go on", "warning")
        self._finish(change, "cancelled", {"code": "cancelled", "message": "cancelled on request", "param": None})

    def _still_runs(self) -> bool:
        submission = stages.submission_id(self.job)
        try:
            if self.launcher.state(submission) not in ("pending", "running"):
                return False
            self.launcher.stop(submission)
        except Unavailable:
            pass
        return True

    # ---- what they share

    def _marker(self, name: str) -> bytes | None:
        try:
            return storage.read_bytes(storage.join(stages.prefix(self.job, self.settings.storage_uri), name))
        except FileNotFoundError:
            return None

    def _read_journal(self, change: Change) -> None:
        prefix = stages.prefix(self.job, self.settings.storage_uri)
        files = read_journal(prefix, self.job.journal_cursor, JOURNAL_FILES)
        for number, entries in files:
            change.entries += entries
            change.values["journal_cursor"] = number + 1
        change.again = len(files) == JOURNAL_FILES

    def _fail(self, change: Change, code: str, message: str, param: str | None) -> None:
        self._finish(change, "failed", {"code": code, "message": printable(message), "param": param})

    def _finish(self, change: Change, status: str, reason: dict[str, Any] | None) -> None:
        self._move(
            change, status, reason["message"] if reason else "the job is done", "error" if status == "failed" else "info"
        )
        change.values |= {"reason": reason, "finished_at": self.now}
        if reason is None:
            change.values["stage"] = None

    def _move(self, change: Change, status: str, why: str, level: str = "info") -> None:
        transitions.check(self.job.status, status)
        change.values["status"] = status
        change.say(self.now, f"{self.job.status} -> {status}: {why}", level)
