"""/v1/studies"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import HTMLResponse

from services.api.answers import EventView, ListView, RunView, StudyView
from services.api.records import JobStatus
from services.api.requests import StudyCreate
from services.control import jobs, journal, reports, stopping, studies
from services.control.dependencies import (
    READ,
    STORED,
    SUBMIT,
    After,
    Config,
    Db,
    Key,
    Limit,
    LongLimit,
    Root,
    body,
    takes,
)
from services.control.held_out import reads_a_dataset
from services.control.idempotency import IdempotentRequest
from services.control.reading import READ_S, reads_sources, reads_storage

router = APIRouter(tags=["studies"])
PATH = "/v1/studies"


@router.post(PATH, openapi_extra=takes(StudyCreate), dependencies=[SUBMIT])
@reads_sources(READ_S, reads_a_dataset)
def create_study(
    request: Annotated[StudyCreate, Depends(body(StudyCreate))],
    db: Db,
    root: Root,
    settings: Config,
    key: Key = None,
) -> StudyView:
    """Start a study: a grid of alignment jobs, then a comparison of all of their models."""
    return studies.create(db, root, settings, IdempotentRequest.of(key, PATH, request), request)


@router.get(PATH, response_model=ListView[StudyView], dependencies=[READ])
def list_studies(
    db: Db, settings: Config, after: After = None, limit: Limit = 20, status: JobStatus | None = None
) -> ListView[RunView]:
    return jobs.page(db, settings, "study", after, limit, status, {})


@router.get(PATH + "/{study_id}", response_model=StudyView, dependencies=[READ])
def get_study(study_id: str, db: Db, settings: Config) -> RunView:
    return jobs.get(db, settings, "study", study_id)


@router.get(PATH + "/{study_id}/events", dependencies=[READ])
def list_study_events(
    study_id: str, db: Db, after: After = None, limit: LongLimit = 100
) -> ListView[EventView]:
    """The study's events in order of time. Each cell's job has its own."""
    return journal.list_events(db, "study", study_id, after, limit)


@router.post(PATH + "/{study_id}/cancel", response_model=StudyView, dependencies=[SUBMIT])
def cancel_study(study_id: str, db: Db) -> RunView:
    """Request the cancellation of a study and of all of its jobs."""
    return stopping.cancel(db, "study", study_id)


@router.post(PATH + "/{study_id}/resume", dependencies=[SUBMIT])
def resume_study(study_id: str, db: Db) -> StudyView:
    """Repeat the evaluations of a study that failed when its models were compared.

    No cell is trained again, and images that are drawn already are used again.
    """
    return studies.resume(db, study_id)


@router.get(PATH + "/{study_id}/report", response_class=HTMLResponse, dependencies=[READ, STORED])
@reads_storage
def get_study_page(study_id: str, db: Db) -> Response:
    """The study's report as one page of HTML, without scripts."""
    return HTMLResponse(reports.read(db, "study", study_id, "page"), headers=reports.PAGE_HEADERS)


@router.get(PATH + "/{study_id}/report.json", response_model=dict[str, Any], dependencies=[READ, STORED])
@reads_storage
def get_study_report(study_id: str, db: Db) -> Response:
    """The study's report as JSON."""
    return Response(reports.read(db, "study", study_id, "report"), media_type="application/json")
