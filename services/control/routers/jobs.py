"""/v1/alignment/jobs"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse

from services.api.records import CreditRecord, JobStatus, Stage
from services.api.requests import AlignmentJobCreate
from services.control import jobs, journal
from services.control.dependencies import (
    After,
    Config,
    Db,
    Key,
    Limit,
    LongLimit,
    body,
    metadata_filter,
    takes,
)
from services.control.idempotency import Once
from services.control.views import CheckpointView, EventView, JobView, ListView, MetricView

router = APIRouter(tags=["alignment"])
PATH = "/v1/alignment/jobs"
AfterStep = Annotated[int | None, Query(description="The last step already seen.", ge=-1, lt=2**63)]


@router.post(PATH, response_model=JobView, openapi_extra=takes(AlignmentJobCreate))
def create_job(
    asked: Annotated[AlignmentJobCreate, Depends(body(AlignmentJobCreate))], db: Db, key: Key = None
) -> JSONResponse:
    """Start a job: encode the pairs, train, evaluate; then the model is served under its name."""
    return JSONResponse(jobs.create_alignment(db, Once.of(key, PATH, asked), asked))


@router.get(PATH, response_model=ListView[JobView])
def list_jobs(
    db: Db,
    metadata: Annotated[dict[str, str], Depends(metadata_filter)],
    after: After = None,
    limit: Limit = 20,
    status: JobStatus | None = None,
) -> JSONResponse:
    """Newest first. ``metadata[key]=value`` in the query keeps the jobs that carry it."""
    return JSONResponse(jobs.page(db, "alignment", after, limit, status, metadata))


@router.get(PATH + "/{job_id}", response_model=JobView)
def get_job(job_id: str, db: Db) -> JSONResponse:
    return JSONResponse(jobs.get(db, "alignment", job_id))


@router.post(PATH + "/{job_id}/cancel", response_model=JobView)
def cancel_job(job_id: str, db: Db) -> JSONResponse:
    """Ask for the job to be stopped; it is cancelled once its run has ended."""
    return JSONResponse(jobs.cancel(db, "alignment", job_id))


@router.post(PATH + "/{job_id}/pause", response_model=JobView)
def pause_job(job_id: str, db: Db) -> JSONResponse:
    """Ask for the job to store its state and free the cluster; it is paused once nothing of it runs any more."""
    return JSONResponse(jobs.pause(db, job_id))


@router.post(PATH + "/{job_id}/resume", response_model=JobView)
def resume_job(job_id: str, db: Db) -> JSONResponse:
    """Queue a paused job again, or one that failed in a stage: it goes on at that stage, from what is stored. What a failed
    one has left on the cluster is ended first."""
    return JSONResponse(jobs.resume(db, job_id))


@router.get(PATH + "/{job_id}/events", response_model=ListView[EventView])
def list_events(
    job_id: str,
    db: Db,
    settings: Config,
    after: After = None,
    limit: LongLimit = 100,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """In order of time: a page, or a stream of server-sent events where Accept asks for ``text/event-stream``."""
    if "text/event-stream" not in accept:
        return JSONResponse(journal.list_events(db, "alignment", job_id, after, limit))
    after = last_event_id or after
    if journal.nothing_left(db, job_id, after):
        return Response(status_code=204)  # tells a browser not to connect again
    stream = journal.stream_events(db, job_id, after, settings.poll_interval_s)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})


@router.get(PATH + "/{job_id}/metrics", response_model=ListView[MetricView])
def list_metrics(
    job_id: str,
    db: Db,
    stage: Stage | None = None,
    after: AfterStep = None,
    limit: LongLimit = 100,
) -> JSONResponse:
    """In order of time. Steps of different stages count different things: ``stage`` keeps one."""
    return JSONResponse(journal.list_metrics(db, job_id, stage, after, limit))


@router.get(PATH + "/{job_id}/checkpoints", response_model=ListView[CheckpointView])
def list_checkpoints(
    job_id: str, db: Db, settings: Config, after: AfterStep = None, limit: Limit = 20
) -> JSONResponse:
    """In order of steps: those that training has stored and kept."""
    return JSONResponse(jobs.list_checkpoints(db, settings.storage_uri, job_id, after, limit))


@router.get(PATH + "/{job_id}/credit", response_model=CreditRecord)
def get_credit(job_id: str, db: Db) -> Response:
    """Where training put its credit: gradient weights by tenths of the timesteps, as logged and as predicted from margins."""
    return Response(jobs.credit(db, job_id), media_type="application/json")
