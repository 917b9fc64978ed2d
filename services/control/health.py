"""Whether the services that a job needs are reachable."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from services.api.answers import CheckView, ReadyView
from services.control.database import Database
from services.control.launchers.contract import Launcher
from services.errors import ServiceError
from services.storage import files


def readiness(database: Database, root: str, launcher: Launcher) -> ReadyView:
    """Whether all parts are reachable, and a report on each."""

    def query_database() -> None:
        with database.read() as session:
            session.execute(select(1))

    def write_storage() -> None:
        files.write_bytes(files.join(root, ".writable"), b"the control plane can write here\n")

    def reach_ray() -> None:
        launcher.status("readyz")

    probes = {"database": query_database, "storage": write_storage, "ray": reach_ray}
    problems = {name: _problem(probe) for name, probe in probes.items()}
    checks = {name: CheckView(ok=problem is None, detail=problem) for name, problem in problems.items()}
    return ReadyView(status="not ready" if any(problems.values()) else "ready", checks=checks)


def _problem(probe: Callable[[], None]) -> str | None:
    """The first line of the error that the probe raises, None if it succeeds."""
    try:
        probe()
    except (ServiceError, SQLAlchemyError, OSError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return None
