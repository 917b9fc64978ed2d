"""Deletes an alignment job that has ended: its row, events and metrics, and its files."""

from __future__ import annotations

from sqlalchemy import delete as delete_rows
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.api.answers import DeletedView
from services.control.database import ProjectDatabase
from services.control.stopping import conflict, locked
from services.control.tables import Event, Job, JobMetadata, Metric, Model
from services.control.transitions import UNFINISHED
from services.stages import layout
from services.storage import files


def delete(database: ProjectDatabase, root: str, job_id: str) -> DeletedView:
    """Delete a job and its checkpoints and reports. Encoded pairs stay: jobs share them.

    Raises NotFound, and Conflict while the job is unfinished, while its model is registered, and for a job of
    a study that exists.
    """
    with database.write(alone=True) as session:
        row = locked(session, job_id, "alignment")
        if row.status in UNFINISHED:
            raise conflict(row, f"is {row.status}: cancel it first")
        model = session.scalar(select(Model.id).where(Model.job == job_id).limit(1))
        if model is not None:
            raise conflict(row, f"made the model {model}: delete that first", "in_use")
        study = _study(session, row)
        if study is not None:
            raise conflict(row, f"is part of the study {study}", "in_use")
        for table, of_job in ((Event, Event.job == job_id), (Metric, Metric.job == job_id)):
            session.execute(delete_rows(table).where(of_job))
        session.execute(delete_rows(JobMetadata).where(JobMetadata.job_seq == row.seq))
        session.delete(row)
    # Not in the transaction: others would wait for it, and nobody can find the files any more.
    files.delete_folder(layout.job_folder(root, job_id))
    return DeletedView(id=job_id, object="alignment.job", deleted=True)


def _study(session: Session, row: Job) -> str | None:
    """The id of the study that the job is a cell of, if that exists."""
    named = select(JobMetadata.value).where(JobMetadata.job_seq == row.seq, JobMetadata.key == "study")
    study = select(Job.id).where(Job.kind == "study", Job.id.in_(named.scalar_subquery()))
    return session.scalar(study)
