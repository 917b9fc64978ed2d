"""/v1/evaluations"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import HTMLResponse

from services.api.answers import EvaluationView, EventView, ListView, RunView
from services.api.records import JobStatus
from services.api.requests import EvaluationCreate
from services.control import jobs, journal, reports, stopping
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
from services.control.launchers.clusters import placed
from services.control.reading import READ_S, reads_sources, reads_storage

router = APIRouter(tags=["evaluations"])
PATH = "/v1/evaluations"


@router.post(PATH, openapi_extra=takes(EvaluationCreate), dependencies=[SUBMIT])
@reads_sources(READ_S, reads_a_dataset)
def create_evaluation(
    request: Annotated[EvaluationCreate, Depends(body(EvaluationCreate))],
    db: Db,
    root: Root,
    settings: Config,
    key: Key = None,
) -> EvaluationView:
    """Start a comparison of two registered models on held-out prompts."""
    idempotent = IdempotentRequest.of(key, PATH, request)
    return jobs.create_evaluation(db, root, idempotent, placed(settings, request))


@router.get(PATH, response_model=ListView[EvaluationView], dependencies=[READ])
def list_evaluations(
    db: Db, settings: Config, after: After = None, limit: Limit = 20, status: JobStatus | None = None
) -> ListView[RunView]:
    return jobs.page(db, settings, "evaluation", after, limit, status, {})


@router.get(PATH + "/{evaluation_id}", response_model=EvaluationView, dependencies=[READ])
def get_evaluation(evaluation_id: str, db: Db, settings: Config) -> RunView:
    return jobs.get(db, settings, "evaluation", evaluation_id)


@router.get(PATH + "/{evaluation_id}/events", dependencies=[READ])
def list_evaluation_events(
    evaluation_id: str, db: Db, after: After = None, limit: LongLimit = 100
) -> ListView[EventView]:
    """The evaluation's events in order of time."""
    return journal.list_events(db, "evaluation", evaluation_id, after, limit)


@router.post(PATH + "/{evaluation_id}/cancel", response_model=EvaluationView, dependencies=[SUBMIT])
def cancel_evaluation(evaluation_id: str, db: Db) -> RunView:
    return stopping.cancel(db, "evaluation", evaluation_id)


@router.get(PATH + "/{evaluation_id}/report", response_class=HTMLResponse, dependencies=[READ, STORED])
@reads_storage
def get_evaluation_page(evaluation_id: str, db: Db) -> Response:
    """The evaluation's report as one page of HTML, without scripts."""
    return HTMLResponse(reports.read(db, "evaluation", evaluation_id, "page"), headers=reports.PAGE_HEADERS)


@router.get(PATH + "/{evaluation_id}/report.json", response_model=dict[str, Any], dependencies=[READ, STORED])
@reads_storage
def get_evaluation_report(evaluation_id: str, db: Db) -> Response:
    """The evaluation's report as JSON."""
    return Response(reports.read(db, "evaluation", evaluation_id, "report"), media_type="application/json")
