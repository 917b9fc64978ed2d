"""Studies: a grid of alignment jobs, its cells, and evaluations of their models, advanced by the reconciler.

A study is a row of the table of jobs that uses no cluster itself. Each review does one step: start a cell,
start an evaluation, or write the report. The ids of its jobs are made from its own id, so a step that was
repeated, after a kill or by another replica, finds its job and starts none twice.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session, load_only

from services.api.answers import StudyView
from services.api.records import FINAL_STATUSES, StudyCellRecord
from services.api.requests import (
    MAX_COMPARED,
    AlignmentJobCreate,
    EvaluationConfig,
    EvaluationCreate,
    StudyCreate,
)
from services.api.study_cells import Cell, expand
from services.control import (
    checks,
    jobs,
    journal,
    making,
    models,
    on_policy,
    scorers,
    stopping,
    study_report,
    transitions,
)
from services.control.database import Database, ProjectDatabase
from services.control.held_out import HeldOut, is_held_out
from services.control.idempotency import IdempotentRequest, create_once
from services.control.job_update import JobUpdate, StaleToken, new_job
from services.control.launchers.clusters import placed
from services.control.listing import is_id
from services.control.problems import from_validation
from services.control.tables import Job, Model, new_id
from services.control.transitions import UNFINISHED
from services.control.views import study_view
from services.errors import BadRequest, Conflict, NotFound, ServiceError
from services.settings import Settings
from services.stages.specs import Level, StageFailure
from services.storage import files

MODELS_OF_ONE = MAX_COMPARED - 1
"""How many aligned models one evaluation compares with the base. The base's images are drawn once for all."""

# ---- requests


@dataclass(frozen=True)
class _Checked:
    """A study's cells and request with files of all prompts, what was checked of each setting, and warnings
    of the study itself."""

    cells: list[Cell]
    request: StudyCreate
    settings: dict[str, jobs.Checked]
    warnings: list[str]


def create(
    database: ProjectDatabase,
    root: str,
    settings: Settings,
    idempotent: IdempotentRequest,
    request: StudyCreate,
) -> StudyView:
    """Check every cell as if it were sent as a job, and start the study.

    Raises BadRequest, NotFound or Conflict, naming the cell and its field.
    """

    def check() -> _Checked:
        given = expand(request, _parse)
        held_out = HeldOut(database, root)
        cells: list[Cell] = []
        checked: dict[str, jobs.Checked] = {}
        for cell in given:
            with _errors_of(cell.label):
                placed(settings, cell.request)
                if cell.setting not in checked:  # no check depends on seeds
                    checked[cell.setting] = jobs.check_alignment(database, held_out, cell.request)
            cells.append(replace(cell, request=_with_files(cell.request, checked[cell.setting].request)))
        of_cells = {cell.label: cell.request for cell in given}
        evaluation = held_out.of_study(request.evaluation, of_cells, request.evaluation.base)
        found_request = request.model_copy(update={"evaluation": evaluation})
        warns = not is_held_out(request.evaluation.prompts_uri)
        own_warnings = _check_evaluation(database, found_request, cells, warns)
        return _Checked(cells, found_request, checked, own_warnings)

    def insert(session: Session, checked: _Checked) -> StudyView:
        cells = checked.cells
        _refuse_name(session, request.name)
        bases = {}
        for cell in cells:
            with _errors_of(cell.label):
                base, _ = jobs.find_inputs(session, cell.request)
                bases[base.id] = base
                models.refuse_taken_name(session, str(cell.request.name))
        base = _base(session, request, list(bases.values()))
        study_id = new_id("study")
        row = new_job(study_id, "study", "running", _stored(checked.request))
        row.name = request.name
        row.model = base.id
        row.base = base.id
        row.started_at = row.created_at
        row.inputs = {
            "bodies": {cell.label: cell.request.model_dump(mode="json") for cell in cells},
            "warnings": {name: each.warnings for name, each in checked.settings.items()},
            "prompts_digests": {name: each.prompts_digest for name, each in checked.settings.items()},
            "scorers": jobs.scorer_inputs(session, request.evaluation.scorers, "evaluation.scorers"),
        }
        records = [_waiting(cell) for cell in cells]
        row.results = {"cells": records, "evaluations": []}
        session.add(row)
        session.flush()
        journal.log(session, study_id, f"created: {len(cells)} cells, at most {request.parallel} at a time")
        for message in checked.warnings:
            journal.log(session, study_id, message, "warning")
        return study_view(row)

    return create_once(database, idempotent, StudyView, check, insert)


def resume(database: ProjectDatabase, study_id: str) -> StudyView:
    """Repeat the evaluations of a study that did not succeed: its models are trained already.

    Images that they have drawn are used again. Raises NotFound for an unknown study or scorer, and Conflict
    for a study that has not failed or had compared nothing yet, and for one whose models or name are gone.
    """
    now = time.time()
    with database.write(alone=True) as session:
        row = stopping.locked(session, study_id, "study")
        _refuse_resume(session, row)
        ended = _ended(session, row.results["evaluations"])
        row.attempt += 1
        numbers = [
            evaluation_id(row.id, place, row.attempt) if number in ended else number
            for place, number in enumerate(row.results["evaluations"])
        ]
        row.results = {**row.results, "evaluations": numbers}
        transitions.check(row.status, "evaluating")
        journal.log(session, row.id, f"{row.status} -> evaluating: resumed on request")
        row.status = "evaluating"
        row.reason = None
        row.finished_at = None
        row.lock_token = None
        row.lock_expires_at = None
        row.next_at = now
        return study_view(row)


def _refuse_resume(session: Session, row: Job) -> None:
    if row.status != "failed":
        raise stopping.conflict(row, f"has not failed: it is {row.status}")
    if not row.results["evaluations"]:
        why = "failed before its models were compared: resume its cells' jobs, or start a new study"
        raise stopping.conflict(row, why)
    for model in (row.base, *row.results["compared"]):
        if session.scalar(select(Model.id).where(Model.id == model)) is None:
            raise stopping.conflict(row, f"cannot resume: its model {model} was deleted", "model_not_found")
    scorers.of_names(session, row.request["evaluation"]["scorers"], "evaluation.scorers")
    try:
        _refuse_name(session, str(row.name))
    except BadRequest as error:
        raise stopping.conflict(row, f"cannot resume: {error.message}", error.code) from error


def _ended(session: Session, numbers: list[str]) -> set[str]:
    """The evaluations that have ended without success."""
    ended = Job.status.in_(("failed", "cancelled"))
    return set(session.scalars(select(Job.id).where(Job.id.in_(numbers), ended)))


def _parse(label: str, body: dict[str, Any]) -> AlignmentJobCreate:
    with _errors_of(label):
        try:
            return AlignmentJobCreate.model_validate_json(json.dumps(body))
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False)) from error


@contextmanager
def _errors_of(label: str) -> Iterator[None]:
    """Name the cell in a ServiceError of its job."""
    try:
        yield
    except ServiceError as error:
        param = f"cells.{label}" + (f".{error.param}" if error.param else "")
        raise type(error)(f"cell {label}: {error.message}", param=param, code=error.code) from error


def _with_files(request: AlignmentJobCreate, checked: AlignmentJobCreate) -> AlignmentJobCreate:
    """The request with the files of prompts that were found for another cell of its setting."""
    parts = ("evaluation", "validation", "rollouts")
    return request.model_copy(update={part: getattr(checked, part) for part in parts})


def _check_evaluation(
    database: ProjectDatabase, request: StudyCreate, cells: list[Cell], warns: bool
) -> list[str]:
    """Refuse prompts that cannot be read or scored, and base models that draw images of several sizes.

    Returns warnings of prompts that are not held out, if it ``warns``.
    """
    with database.read() as session:
        used = scorers.of_names(session, request.evaluation.scorers, "evaluation.scorers")
    prompts = checks.check_evaluation(request.evaluation, used, "evaluation.")
    with database.read() as session:
        found = [models.find(session, name, "model") for name in {cell.request.model for cell in cells}]
        base = _base(session, request, list({row.id: row for row in found}.values()))
        records = {row.id: models.record_of(row) for row in [base, *found]}
    checks.check_compared(list(records.values()), request.evaluation, prompts)
    datasets = dict.fromkeys(cell.request.dataset for cell in cells) if warns else {}
    warnings = [
        each for name in datasets for each in making.reused_prompts(database, name, request.evaluation)
    ]
    drawn = {cell.setting: cell for cell in reversed(cells) if cell.request.rollouts}
    for cell in drawn.values():
        assert cell.request.rollouts
        with _errors_of(cell.label):
            compared = {"the study's evaluation.prompts_uri": prompts}
            warnings += on_policy.shared_prompts(cell.request.rollouts, compared)
    return list(dict.fromkeys(warnings))


def _refuse_name(session: Session, name: str) -> None:
    if is_id(name):
        raise BadRequest(f"name: must not have the form of an id, got {name!r}", param="name")
    same = select(Job.id).where(Job.kind == "study", Job.name == name, Job.status.in_(UNFINISHED)).limit(1)
    taken = session.scalar(same)
    if taken:
        message = f"name: belongs to the unfinished study {taken}, got {name!r}"
        raise BadRequest(message, param="name", code="name_taken")


def _base(session: Session, request: StudyCreate, bases: list[Model]) -> Model:
    """The model that all others are compared with."""
    if request.evaluation.base is not None:
        return models.find(session, request.evaluation.base, "evaluation.base")
    if len(bases) > 1:
        names = ", ".join(base.name for base in bases)
        message = f"evaluation.base: required, since the cells align several models: {names}"
        raise BadRequest(message, param="evaluation.base", code="missing_required_parameter")
    return bases[0]


def _stored(request: StudyCreate) -> dict[str, Any]:
    stored = request.model_dump(mode="json")
    stored["evaluation"]["prompts_uri"] = files.as_uri(request.evaluation.prompts_uri)
    return stored


def _waiting(cell: Cell) -> dict[str, Any]:
    record = StudyCellRecord(label=cell.label, setting=cell.setting, overrides=cell.overrides)
    return record.model_dump(mode="json")


# ---- reviews


@dataclass(frozen=True)
class StudyReview:
    """One review of one study at time ``now``, from the rows of its jobs."""

    study: Job
    database: Database
    settings: Settings
    now: float

    @cached_property
    def update(self) -> JobUpdate:
        """What the review has decided so far."""
        return JobUpdate(self.study, self.now)

    @cached_property
    def own(self) -> ProjectDatabase:
        """The database as the study's project sees it."""
        return ProjectDatabase(self.database, self.study.project)

    @cached_property
    def cells(self) -> list[StudyCellRecord]:
        """The cells as they are now; ``_compare_with_last`` stores them."""
        stored = [StudyCellRecord.model_validate(each) for each in self.study.results["cells"]]
        rows = self._rows([job_id(self.study.id, cell.label) for cell in stored])
        return [_present(cell, rows.get(job_id(self.study.id, cell.label))) for cell in stored]

    def decide(self) -> JobUpdate:
        """Do one step; return the changes to the study."""
        self._log_changes()
        if self.study.cancel_requested_at is not None:
            self._cancel()
        elif self.study.status == "running":
            self._run_cells()
        else:
            self._evaluate()
        return self.update

    def _log_changes(self) -> None:
        """Store what has happened to the cells since the last review, with an event for each."""
        stored = self.study.results["cells"]
        for old, cell in zip(stored, self.cells, strict=True):
            if old["job"] is None and cell.job is not None:
                self.update.log(f"cell {cell.label}: {cell.job}")
            if old["status"] != cell.status and cell.status in FINAL_STATUSES:
                why = f": {cell.reason}" if cell.reason else ""
                level: Level = "info" if cell.status == "succeeded" else "warning"
                self.update.log(f"cell {cell.label} {cell.status}{why}", level)
        self._store(cells=[cell.model_dump(mode="json") for cell in self.cells])

    def _store(self, **results: Any) -> None:
        present = self.update.values.get("results", self.study.results)
        if {**present, **results} != present:
            self.update.values["results"] = {**present, **results}

    def _run_cells(self) -> None:
        waiting = [cell for cell in self.cells if cell.status == "waiting"]
        unfinished = [cell for cell in self.cells if cell.job and cell.status not in FINAL_STATUSES]
        failed = [cell for cell in self.cells if cell.status == "failed"]
        if failed and self.study.request["on_failure"] == "stop":
            self._stop_after(failed[0], unfinished)
        elif waiting and len(unfinished) < self.study.request["parallel"]:
            self._start_cell(waiting[0])
        elif not waiting and not unfinished:
            self._begin_evaluation()

    def _stop_after(self, failed: StudyCellRecord, unfinished: list[StudyCellRecord]) -> None:
        """Cancel what runs; end the study once all of it has ended."""
        self._cancel_jobs("alignment", [cell.job for cell in unfinished if cell.job])
        if not unfinished:
            message = f"cell {failed.label} failed: {failed.reason}"
            self.update.fail(StageFailure(message=message, code="cell_failed"))

    def _start_cell(self, cell: StudyCellRecord) -> None:
        """Create the cell's job like any other. A cell whose inputs are gone by now fails alone."""
        body = self.study.inputs["bodies"][cell.label]
        body = {**body, "metadata": {**body["metadata"], "study": self.study.id}}
        request = AlignmentJobCreate.model_validate_json(json.dumps(body))
        number = job_id(self.study.id, cell.label)
        self.update.review_again = True
        with self.own.write(alone=True) as session:
            if self._may_add(session, number):
                try:
                    checked = jobs.Checked(
                        placed(self.settings, request),
                        self.study.inputs.get("prompts_digests", {}).get(cell.setting),
                        self.study.inputs["warnings"][cell.setting],
                    )
                    jobs.insert_alignment(session, number, checked)
                except (BadRequest, NotFound, Conflict) as error:
                    self._refuse(cell, error)

    def _refuse(self, cell: StudyCellRecord, error: ServiceError) -> None:
        refused = cell.model_copy(update={"status": "failed", "reason": error.message})
        cells = [refused if each.label == cell.label else each for each in self.cells]
        self.update.log(f"cell {cell.label} failed: {error.message}", "warning")
        self._store(cells=[each.model_dump(mode="json") for each in cells])

    def _may_add(self, session: Session, number: str) -> bool:
        """Whether to add a job: it does not exist yet, and nobody has cancelled the study meanwhile.

        Raises StaleToken if another replica has taken the study.
        """
        query = select(Job.lock_token, Job.cancel_requested_at).where(Job.id == self.study.id)
        token, cancel_requested_at = session.execute(query).one()
        if token != self.study.lock_token:
            raise StaleToken(self.study.id)
        exists = session.scalar(select(Job.id).where(Job.id == number)) is not None
        return not exists and cancel_requested_at is None

    def _begin_evaluation(self) -> None:
        """Fix which models are compared: those of the cells that have succeeded by now."""
        compared = [cell.model for cell in self.cells if cell.status == "succeeded" and cell.model]
        if not compared:
            message = f"none of {len(self.cells)} cells succeeded"
            return self.update.fail(StageFailure(message=message, code="no_cell_succeeded"))
        batches = range(0, len(compared), MODELS_OF_ONE)
        numbers = [evaluation_id(self.study.id, number) for number, _ in enumerate(batches)]
        self._store(compared=compared, evaluations=numbers)
        self.update.move("evaluating", f"{len(compared)} of {len(self.cells)} cells succeeded")
        self.update.review_again = True

    def _evaluate(self) -> None:
        numbers = self.study.results["evaluations"]
        rows = self._rows(numbers)
        failed = [row for row in rows.values() if row.status in ("failed", "cancelled")]
        unfinished = [row for row in rows.values() if row.status not in FINAL_STATUSES]
        missing = [number for number in numbers if number not in rows]
        if failed:
            self._cancel_jobs("evaluation", [row.id for row in unfinished])
            if not unfinished:
                self._fail_by(failed[0])
        elif missing and len(unfinished) < self.study.request["parallel"]:
            self._start_evaluation(missing[0], numbers.index(missing[0]))
        elif not missing and not unfinished:
            with self.own.read() as session:
                report = study_report.write(session, self.study, self.cells, self.settings)
            self._store(report=report.model_dump(mode="json"))
            self.update.succeed()

    def _fail_by(self, evaluation: Job) -> None:
        reason = (evaluation.reason or {}).get("message", evaluation.status)
        message = f"evaluation {evaluation.id} {evaluation.status}: {reason}"
        self.update.fail(StageFailure(message=message, code="evaluation_failed"))

    def _start_evaluation(self, number: str, batch: int) -> None:
        first = batch * MODELS_OF_ONE
        compared = self.study.results["compared"][first : first + MODELS_OF_ONE]
        request = evaluation_request(self.study, compared)
        self.update.review_again = True
        try:
            with self.own.write(alone=True) as session:
                if self._may_add(session, number):
                    jobs.insert_evaluation(session, number, placed(self.settings, request), [])
        except (BadRequest, NotFound) as error:
            self.update.review_again = False
            message = f"the models cannot be compared: {error.message}"
            return self.update.fail(StageFailure(message=message, code=error.code, param=error.param))
        self.update.log(f"evaluation {number} of {len(compared)} models")

    def _cancel(self) -> None:
        """Cancel what runs; end the study once all of it has ended."""
        rows = self._rows(self.study.results["evaluations"]).values()
        evaluations = [row.id for row in rows if row.status not in FINAL_STATUSES]
        unfinished = [cell.job for cell in self.cells if cell.job and cell.status not in FINAL_STATUSES]
        self._cancel_jobs("alignment", unfinished)
        self._cancel_jobs("evaluation", evaluations)
        if not unfinished and not evaluations:
            self.update.cancel()

    def _cancel_jobs(self, kind: str, numbers: list[str]) -> None:
        for number in numbers:
            try:
                stopping.cancel(self.own, kind, number)
            except Conflict:  # it has ended meanwhile
                continue

    def _rows(self, numbers: list[str]) -> dict[str, Job]:
        """The jobs that exist, by id, with what reviews read of them."""
        columns = load_only(Job.id, Job.status, Job.reason, Job.results, Job.output_model)
        query = select(Job).options(columns).where(Job.id.in_(numbers))
        with self.own.read() as session:
            return {row.id: row for row in session.scalars(query)}


def job_id(study: str, label: str) -> str:
    """The id of a cell's job."""
    return _id("ajob", study, "cell", label)


def evaluation_id(study: str, number: int, attempt: int = 1) -> str:
    """The id of a study's evaluation, numbered from 0, and counted again where the study was resumed."""
    repeated = (str(attempt),) if attempt > 1 else ()
    return _id("eval", study, "evaluation", str(number), *repeated)


def _id(prefix: str, *parts: str) -> str:
    return f"{prefix}_{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}"


def evaluation_request(study: Job, compared: list[str]) -> EvaluationCreate:
    """One evaluation of aligned models, by id, with the study's base."""
    config = {name: study.request["evaluation"][name] for name in EvaluationConfig.model_fields}
    body = {**config, "models": [study.base, *compared], "base": study.base}
    return EvaluationCreate.model_validate_json(json.dumps(body))


def _present(cell: StudyCellRecord, row: Job | None) -> StudyCellRecord:
    """The cell by the row of its job."""
    if row is None:
        return cell
    return cell.model_copy(
        update={
            "status": row.status,
            "job": row.id,
            "model": row.output_model if "train" in row.results else None,
            "reason": _reason(row.reason),
        }
    )


def _reason(reason: Mapping[str, Any] | None) -> str | None:
    return str(reason["message"]) if reason else None
