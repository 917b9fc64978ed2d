"""The report of an evaluation, of a job's own evaluation or of a study, from storage."""

from __future__ import annotations

from typing import Literal

from services.control.database import ProjectDatabase
from services.control.listing import by_id
from services.control.tables import Job
from services.errors import NotFound
from services.storage import files

Form = Literal["report", "page"]
"""The data as JSON, or the page of HTML made of it: the fields of a result that name them."""
RESULTS = {"alignment": "evaluate", "evaluation": "evaluate", "study": "report"}
"""The result that names the report of each kind of job."""
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; sandbox"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""A report shows prompts and names that users wrote: the page runs no script and loads nothing."""


def read(database: ProjectDatabase, kind: str, job_id: str, form: Form) -> bytes:
    """Raises NotFound for an unknown id, and for a job that has no report, with the reason."""
    with database.read() as session:
        row = by_id(session, Job, job_id, kind)
    result = row.results.get(RESULTS[kind])
    uri = result.get(form) if result else None
    if uri is not None:
        try:
            return files.read_bytes(uri)
        except FileNotFoundError:
            pass
    why = f"it is {row.status}, and the report is written at its end"
    if result:
        why = f"{uri} was deleted" if uri else "the version that ran it wrote none"
    message = f"{job_id} has no {form}: {why}"
    raise NotFound(message, param="id", code="report_not_found")
