"""The schema of the database and the version of the code: which one is ahead, and what follows.

Migrations only expand, so a version of the code works on every later schema; on an earlier one it does not.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cache
from typing import Literal

from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.exc import OperationalError

from services.control.database import MIGRATIONS, Database
from services.errors import Conflict, Unavailable

log = logging.getLogger("dde")
WAIT_S = 60.0
"""How long a start or a migration waits for the database: it may start at the same time."""
POLL_S = 1.0
VERSIONS = "alembic_version"
"""Alembic's table. Its own way to read it writes to the log, and this is read every two seconds."""


@dataclass(frozen=True)
class SchemaState:
    """``revision`` is the database's, None for an empty one; ``known`` is the newest that the code knows."""

    revision: str | None
    known: str
    is_ahead: Literal["neither", "code", "database"]


@cache
def _revisions() -> tuple[str, ...]:
    """All that the code knows, the newest first."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return tuple(script.revision for script in ScriptDirectory.from_config(config).walk_revisions())


def state(database: Database) -> SchemaState:
    """Read the revision. Raises OperationalError if the database does not answer."""
    with database.engine.connect() as connection:
        revision = None
        if inspect(connection).has_table(VERSIONS):
            revision = connection.scalar(text(f"SELECT version_num FROM {VERSIONS}"))
    known = _revisions()
    if revision == known[0]:
        return SchemaState(revision, known[0], "neither")
    is_older = revision is None or revision in known
    return SchemaState(revision, known[0], "code" if is_older else "database")


def remark(found: SchemaState) -> str | None:
    """What is unusual about a schema that the code can work on. None if nothing is."""
    if found.is_ahead != "database":
        return None
    return f"the schema {found.revision} is newer than {found.known}, the newest of this version"


def migrate(database: Database, wait_s: float = WAIT_S) -> str:
    """Migrate, and say what was done. Does nothing on a newer schema. Safe if several run at once.

    Raises Unavailable if the database does not answer within ``wait_s``.
    """
    before = _wait(database, wait_s)
    if before.is_ahead == "database":
        return f"nothing to do: {remark(before)}"
    if before.is_ahead == "neither":
        return f"nothing to do: the schema is {before.known}"
    database.migrate()
    return f"migrated the schema from {before.revision or 'an empty database'} to {before.known}"


def prepare(database: Database, *, may_migrate: bool, wait_s: float = WAIT_S) -> None:
    """Migrate at the start if the app may. Without that, raises Conflict on an older schema; always
    Unavailable if the database does not answer within ``wait_s``.
    """
    found = _wait(database, wait_s)
    if found.is_ahead == "code" and may_migrate:
        database.migrate()
        log.info("migrated the schema from %s to %s", found.revision or "an empty database", found.known)
    elif found.is_ahead == "code":
        raise Conflict(
            f"the database has the schema {found.revision or 'of nothing: it is empty'}, this version needs "
            f"{found.known}, and DDE_MIGRATE is false: run `python -m services.control migrate` first",
            code="schema_too_old",
        )
    elif found.is_ahead == "database":
        log.warning("%s; serving on it, for migrations only expand", remark(found))


def _wait(database: Database, wait_s: float) -> SchemaState:
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            return state(database)
        except OperationalError as error:
            cause = str(error.orig).strip()
            if time.monotonic() > deadline_s:
                message = f"the database does not answer after {wait_s:g} s: {cause}"
                raise Unavailable(message, param="database_url") from error
            log.warning("waiting for the database: %s", cause)
            time.sleep(POLL_S)
