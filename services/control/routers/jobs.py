"""/v1/alignment/jobs"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from services.api.answers import (
    CheckpointView,
    DeletedView,
    EventView,
    JobView,
    ListView,
    MetricView,
    RunView,
)
from services.api.records import CreditRecord, JobStatus, Stage
from services.api.requests import AlignmentJobCreate
from services.control import job_deletion, jobs, journal, reports, stopping
from services.control.dependencies import (
    EVENT_STREAM,
    FILTERS,
    READ,
    STORED,
    SUBMIT,
    After,
    CallerOf,
    Config,
    Db,
    Key,
    Limit,
    LongLimit,
    Root,
    body,
    metadata_filter,
    takes,
)
from services.control.held_out import reads_a_dataset
from services.control.idempotency import IdempotentRequest
from services.control.launchers.clusters import placed
from services.control.reading import READ_S, reads_sources, reads_storage

router = APIRouter(tags=["alignment"])
PATH = "/v1/alignment/jobs"
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": EVENT_STREAM},
    204: {"description": "A finished job has no events after the last one that the client has."},
}
AfterStep = Annotated[int | None, Query(description="The last step already seen.", ge=-1, lt=2**63)]


@router.post(PATH, openapi_extra=takes(AlignmentJobCreate), dependencies=[SUBMIT])
@reads_sources(READ_S, reads_a_dataset)
def create_job(
    request: Annotated[AlignmentJobCreate, Depends(body(AlignmentJobCreate))],
    db: Db,
    root: Root,
    settings: Config,
    key: Key = None,
) -> JobView:
    """Start a job: encode the pairs, train, evaluate. The aligned model is then served under its name."""
    idempotent = IdempotentRequest.of(key, PATH, request)
    return jobs.create_alignment(db, root, idempotent, placed(settings, request))


@router.get(PATH, response_model=ListView[JobView], openapi_extra=FILTERS, dependencies=[READ])
def list_jobs(
    db: Db,
    settings: Config,
    metadata: Annotated[dict[str, str], Depends(metadata_filter)],
    after: After = None,
    limit: Limit = 20,
    status: JobStatus | None = None,
) -> ListView[RunView]:
    """Jobs, newest first. The query parameter ``metadata[key]=value`` selects jobs with that metadata."""
    return jobs.page(db, settings, "alignment", after, limit, status, metadata)


@router.get(PATH + "/{job_id}", response_model=JobView, dependencies=[READ])
def get_job(job_id: str, db: Db, settings: Config) -> RunView:
    return jobs.get(db, settings, "alignment", job_id)


@router.delete(PATH + "/{job_id}", dependencies=[SUBMIT])
def delete_job(job_id: str, db: Db, root: Root) -> DeletedView:
    """Delete a job that has ended and whose model is deleted.

    Its events, metrics, checkpoints and reports are deleted with it.
    """
    return job_deletion.delete(db, root, job_id)


@router.post(PATH + "/{job_id}/cancel", response_model=JobView, dependencies=[SUBMIT])
def cancel_job(job_id: str, db: Db) -> RunView:
    """Request the cancellation of a job. Its status becomes "cancelled" once its run has ended."""
    return stopping.cancel(db, "alignment", job_id)


@router.post(PATH + "/{job_id}/pause", dependencies=[SUBMIT])
def pause_job(job_id: str, db: Db) -> JobView:
    """Request that a job stores its state and frees the cluster.

    Its status becomes "paused" once its run has ended.
    """
    return stopping.pause(db, job_id)


@router.post(PATH + "/{job_id}/resume", dependencies=[SUBMIT])
def resume_job(job_id: str, db: Db) -> JobView:
    """Queue a paused or failed job again.

    It continues from its last stored state, at the stage that it had reached.
    """
    return stopping.resume(db, job_id)


@router.get(
    PATH + "/{job_id}/events",
    response_model=ListView[EventView],
    responses=STREAM,
    dependencies=[READ],
)
def list_events(
    job_id: str,
    request: Request,
    db: Db,
    caller: CallerOf,
    settings: Config,
    after: After = None,
    limit: LongLimit = 100,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response | ListView[EventView]:
    """The job's events in order of time: one page, or server-sent events if ``Accept`` is
    ``text/event-stream``.
    """
    if "text/event-stream" not in accept:
        return journal.list_events(db, "alignment", job_id, after, limit)
    after = last_event_id or after
    if journal.is_read_to_the_end(db, job_id, after):
        return Response(status_code=204)  # tells browsers not to reconnect
    drain = request.app.state.drain
    stream = journal.stream_events(db, caller, job_id, after, settings.poll_interval_s, drain)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})


@router.get(PATH + "/{job_id}/metrics", dependencies=[READ])
def list_metrics(
    job_id: str,
    db: Db,
    stage: Stage | None = None,
    after: AfterStep = None,
    limit: LongLimit = 100,
) -> ListView[MetricView]:
    """The job's metrics in order of time. Each stage counts its own steps: select one with ``stage``."""
    return journal.list_metrics(db, job_id, stage, after, limit)


@router.get(PATH + "/{job_id}/checkpoints", dependencies=[READ, STORED])
@reads_storage
def list_checkpoints(
    job_id: str, db: Db, root: Root, after: AfterStep = None, limit: Limit = 20
) -> ListView[CheckpointView]:
    """The checkpoints that training has stored and kept, in order of steps."""
    return jobs.list_checkpoints(db, root, job_id, after, limit)


@router.get(PATH + "/{job_id}/credit", response_model=CreditRecord, dependencies=[READ, STORED])
@reads_storage
def get_credit(job_id: str, db: Db) -> Response:
    """Where training put its credit: gradient weights by tenths of the timesteps, logged and predicted from
    margins.
    """
    return Response(jobs.credit(db, job_id), media_type="application/json")


@router.get(PATH + "/{job_id}/report", response_class=HTMLResponse, dependencies=[READ, STORED])
@reads_storage
def get_job_page(job_id: str, db: Db) -> Response:
    """The report of the job's own evaluation as one page of HTML, without scripts."""
    return HTMLResponse(reports.read(db, "alignment", job_id, "page"), headers=reports.PAGE_HEADERS)


@router.get(PATH + "/{job_id}/report.json", response_model=dict[str, Any], dependencies=[READ, STORED])
@reads_storage
def get_job_report(job_id: str, db: Db) -> Response:
    """The report of the job's own evaluation as JSON."""
    return Response(reports.read(db, "alignment", job_id, "report"), media_type="application/json")
