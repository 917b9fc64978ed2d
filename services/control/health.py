"""Is everything there that a job needs? Each answer is None or what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from services.control.database import Database
from services.control.launcher import Launcher
from services.errors import ServiceError
from services.storage import files


def readiness(database: Database, root: str, launcher: Launcher) -> tuple[bool, dict[str, Any]]:
    """(ready, what each part says)."""
    parts: dict[str, Callable[[], None]] = {
        "database": lambda: _ask(database),
        "storage": lambda: files.write_bytes(
            files.join(root, ".writable"), b"the control plane can write here\n"
        ),
        "ray": lambda: launcher.state("readyz") and None,
    }
    problems = {name: _problem(check) for name, check in parts.items()}
    checks = {name: {"ok": problem is None, "detail": problem} for name, problem in problems.items()}
    ready = all(check["ok"] for check in checks.values())
    return ready, {"status": "ready" if ready else "not ready", "checks": checks}


def _ask(database: Database) -> None:
    with database.read() as session:
        session.execute(select(1))


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except (ServiceError, SQLAlchemyError, OSError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return None
