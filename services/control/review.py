"""Reviews an unfinished job: decides what happens next from storage and Ray, never from the database.

Storage decides: a marker file ends a stage, whatever Ray reports of its driver. Every step may be repeated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from pydantic import ValidationError

from services.api.records import EvaluateResult, PairsResult, Stage, TrainResult
from services.api.requests import PromoteIf, Strict
from services.artifacts import models
from services.control import gates, stages, stopping, transitions, waiting
from services.control.attempt import Attempt
from services.control.job_update import MAX_DELAY_S, JobUpdate, new_attempt_columns
from services.control.launchers.contract import Launcher
from services.control.stage_run import StageRun
from services.control.tables import Job
from services.errors import NotFound, Refused, Unavailable
from services.settings import Settings
from services.stages import layout
from services.stages.specs import RESULTS, Level, StageFailure
from services.storage import files

TRANSIENT = ("unavailable", "stopped")
"""Failure codes that justify another attempt: a dependency was unreachable, or somebody else stopped the
driver.
"""


@dataclass(frozen=True)
class JobReview:
    """One review of one job at time ``now``."""

    job: Job
    settings: Settings
    launcher: Launcher
    now: float

    @cached_property
    def update(self) -> JobUpdate:
        """What the review has decided so far."""
        return JobUpdate(self.job, self.now)

    @cached_property
    def run(self) -> StageRun:
        """The run of the current stage."""
        return StageRun(self.update, self.settings, self.launcher)

    @property
    def attempt(self) -> Attempt:
        return self.run.attempt

    @property
    def stage(self) -> Stage:
        """The current stage; not to be read before the first one."""
        return cast(Stage, self.job.stage)

    def decide(self) -> JobUpdate:
        """Start or stop runs as needed; return the changes to the job."""
        job = self.job
        if job.cancel_requested_at is not None:
            stopping.continue_cancel(self.run)
        elif job.status == "validating":
            self._validate()
        elif job.pause_requested_at is not None and not self.run.may_exist:
            stopping.mark_paused(self.run)
        elif job.stage is None:
            self._enter(transitions.next_stage(job.kind, None, job.request))
        elif job.status == "queued":
            self._resume()
        elif job.submitted_at is None and job.pause_requested_at is None:
            self._submit()
        else:
            self._follow()
        return self.update

    def _validate(self) -> None:
        """Repeat two checks of the request: what they found then may have been deleted since."""
        try:
            models.find(stages.root(self.job, self.settings), self.job.model)
        except NotFound as error:
            missing = StageFailure(message=error.message, code=error.code, param=error.param)
            return self.update.fail(missing)
        gone = self._missing_source()
        if gone is not None:
            return self.update.fail(gone)
        self.update.move("queued", "the job is valid")

    def _missing_source(self) -> StageFailure | None:
        """Why the job has no pairs, or no prompts to draw them for; None if it has."""
        rollouts = self.job.request.get("rollouts")
        if rollouts is not None:
            uri = rollouts["prompts_uri"]
            message = f"the prompts of the rollouts no longer exist at {uri}"
            gone = StageFailure(message=message, code="prompts_not_found", param="rollouts.prompts_uri")
        else:
            uri = self.job.inputs["dataset"]["uri"]
            message = f"the files of dataset {self.job.dataset} no longer exist at {uri}"
            gone = StageFailure(message=message, code="dataset_not_found", param="dataset")
        return None if files.exists(uri) else gone

    def _enter(self, stage: Stage | None) -> None:
        """Begin a stage; after the last one, end the job."""
        update = self.update
        update.review_again = True
        if stage is None:
            update.succeed()
            update.set_alias = self.job.kind == "alignment"
            self._pass_gate()
            return
        status = transitions.STAGE_STATUS[stage]
        if status == self.job.status:
            update.stop_waiting()
            update.log(f"stage {stage}")
        else:
            update.move(status, f"stage {stage}")
        update.values |= new_attempt_columns(1)
        update.values |= {
            "stage": stage,
            "stage_started_at": self.now,
            "started_at": self.job.started_at or self.now,
        }

    def _pass_gate(self) -> None:
        """Promote the model if the job has a gate and the evaluation passes it."""
        requested = self.job.request.get("promote_if")
        if requested is None:
            return
        results = self.update.values.get("results", self.job.results)
        gate = PromoteIf.model_validate_json(json.dumps(requested))
        evaluated = EvaluateResult.model_validate_json(json.dumps(results["evaluate"]))
        outcome = gates.judge(gate, evaluated, str(self.job.name))
        self.update.values["results"] = {**results, "gate": outcome.model_dump(mode="json")}
        if outcome.passed:
            self.update.promote = gate.alias
            self.update.log(f"gate: passed; {self.job.name}@{gate.alias} is {self.job.output_model}")
        else:
            self.update.log(f"gate: failed: {'; '.join(outcome.reasons)}", "warning")

    def _resume(self) -> None:
        """Continue the stage that a pause or a failure interrupted, once nothing of the old attempt runs."""
        if self.run.may_exist and not self._clean_up():
            return
        if self.job.pause_requested_at is not None:
            return stopping.mark_paused(self.run)
        number = self.job.attempt + 1
        status = transitions.STAGE_STATUS[self.stage]
        self.update.review_again = True
        if self._has_result():
            self.update.move(status, f"stage {self.stage} had already finished")
            self.update.values["submitted_at"] = self.job.submitted_at or self.now
            return
        self.update.move(status, f"stage {self.stage} resumes as attempt {number}")
        self.update.values |= new_attempt_columns(number)

    def _has_result(self) -> bool:
        """Whether the last attempt finished after all, while nobody supervised it."""
        done = self.attempt.done()
        if done is None:
            return False
        try:
            RESULTS[self.stage].model_validate_json(done)
        except ValidationError:
            return False
        return True

    def _clean_up(self) -> bool:
        """Stop the run that a failed job may have left, and read the rest of its journal. True once both are
        done.

        Requires an answer of Ray: no run starts beside one that nobody has stopped.
        """
        if self.run.observe_status() is None:
            return False
        since = self.job.ended_at or self.now
        self.update.values["ended_at"] = since
        if not self.run.stop_and_confirm(since):
            self.attempt.request_stop()
            return False
        self.run.read_journal()
        return not self.update.review_again

    def _submit(self) -> None:
        root = stages.root(self.job, self.settings)
        spec = stages.spec(self.job, self.settings)
        files.write_json(layout.spec_uri(self.attempt.prefix), spec.model_dump(mode="json"))
        run = stages.run(self.job, root, self.settings)
        try:
            self.launcher.submit(run)
        except Refused as error:
            return self.update.fail(StageFailure(message=error.message, code=error.code, param=error.param))
        except Unavailable as error:
            return self.run.record_unreachable(error)
        self.update.values |= {"submitted_at": self.now, "unreachable_at": None}
        self.update.log(f"submitted {run.id}")

    def _follow(self) -> None:
        """Read the markers before the journal: a stage writes its marker after its last journal file."""
        done = self.attempt.done()
        failure = self.attempt.failure()
        stopped = self.attempt.stopped()
        self.run.read_journal()
        if self.update.review_again:
            return
        if done is not None:
            self._complete_stage(done)
        elif failure is not None and failure.code not in TRANSIENT:
            self.update.fail(failure)
        elif waiting.left_s(self.update, self.settings) <= 0:
            self._give_up_waiting()
        elif self.job.pause_requested_at is not None:
            has_ended = failure is not None or stopped is not None
            stopping.continue_pause(self.run, has_ended=has_ended)
        elif stopped is not None:
            message = f"the stage was stopped after step {stopped.step} ({stopped.why})"
            self._restart(StageFailure(message=message, code="stopped"), at_once=True)
        elif failure is not None:
            self._restart(failure)
        else:
            self._check_driver()

    def _complete_stage(self, done: bytes) -> None:
        try:
            result = RESULTS[self.stage].model_validate_json(done)
        except ValidationError as error:
            message = f"done.json of stage {self.stage} cannot be read: {error}"
            return self.update.fail(StageFailure(message=message, code="bad_result"))
        self.update.stop_waiting()
        seconds = round(self.now - (self.update.value("stage_started_at") or self.now), 3)
        published = self._published(result)
        self.update.values |= {
            "results": {**self.job.results, self.stage: published.model_dump(mode="json")},
            "stage_seconds": {**self.job.stage_seconds, self.stage: seconds},
        }
        self.update.log(f"stage {self.stage} done")
        self._enter(transitions.next_stage(self.job.kind, self.stage, self.job.request))

    def _published(self, result: Strict) -> Strict:
        """The result. Training's model gets the id and name that the job gave it, and is published; pairs
        complete their dataset.
        """
        if isinstance(result, PairsResult):
            self.update.dataset = result
        if not isinstance(result, TrainResult):
            return result
        self.update.publish = stages.aligned_record(self.job, result.model)
        return result.model_copy(update={"model": self.update.publish})

    def _check_driver(self) -> None:
        """Restart a stage whose driver died without writing a marker."""
        status = self.run.observe_status()
        self.run.record_pending(status)
        if status is not None and self.run.confirm_death(status.state):
            message = f"the driver of stage {self.stage} ended without a result; Ray says {status}"
            why = StageFailure(message=message, code="driver_died")
            if status.is_final:
                return self.update.fail(why)
            self._restart(why, counts=not status.is_evicted)

    def _give_up_waiting(self) -> None:
        """End the run, then the job: it has waited for room for as long as it may."""
        since = self.job.ended_at or self.now
        self.update.values["ended_at"] = since
        if self.run.stop_and_confirm(since):
            self.update.fail(waiting.too_long(self.update, self.settings))

    def _restart(self, why: StageFailure, *, at_once: bool = False, counts: bool = True) -> None:
        """Begin a new attempt once the old one has surely ended, or fail the job after ``max_attempts``.

        An attempt counts unless it brought the stage further, was stopped on request or was evicted.
        """
        job = self.job
        since = job.ended_at or self.now
        self.update.values["ended_at"] = since
        if not self.run.stop_and_confirm(since):
            return
        step = self.attempt.newest_step()
        restarts = 0 if step > job.restart_step else job.restarts
        if counts and not self.attempt.was_stopped_on_request():
            restarts += 1
        is_last = restarts >= self.settings.max_attempts
        if not at_once:
            self._log_driver_output("error" if is_last else "warning")
        if is_last:
            return self.update.fail(why)
        number = job.attempt + 1
        self.update.stop_waiting()
        self.update.log(f"stage {job.stage} restarts as attempt {number}: {why.message}", "warning")
        self.update.values |= new_attempt_columns(number)
        self.update.values |= {"restarts": restarts, "restart_step": max(step, job.restart_step)}
        self.update.review_again = at_once
        self.update.delay_s = min(MAX_DELAY_S, self.settings.poll_interval_s * 2**restarts)

    def _log_driver_output(self, level: Level) -> None:
        try:
            output = self.attempt.log_tail()
        except Unavailable as error:
            self.update.log(f"the driver's log is unavailable: {error}", "warning")
        else:
            self.update.log(output or "the driver's log is empty", level)
