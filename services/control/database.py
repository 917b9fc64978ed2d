"""The database: SQLite for one replica, PostgreSQL for several. Use its sessions in with-blocks.

A session of a project finds and adds rows of that project alone: no query names the project, so none can
forget it. The reconciler and the keys work on all projects.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from alembic import command
from alembic.config import Config
from pydantic_core import from_json
from sqlalchemy import Connection, CursorResult, Engine, Update, create_engine, event, text
from sqlalchemy.orm import ORMExecuteState, Session, sessionmaker, with_loader_criteria

from services.control.tables import Owned
from services.errors import BadRequest
from services.settings import Settings
from services.storage import s3

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_MS = 30_000
PROJECT = "project"
"""Where a session keeps the name of its project."""
CONNECTIONS = 50
"""To SQLite that are kept open: one for each thread that answers requests or reviews jobs."""
PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
"""libpq's limits, in seconds and the last in milliseconds. Without them a lost PostgreSQL is waited for for
minutes, by every thread that answers requests.
"""
ADVISORY_LOCK = 0x6464655F  # "dde_"; on PostgreSQL only: SQLite has a single writer anyway


class Database:
    """Sessions on one database. Rows stay readable after their session is closed."""

    def __init__(self, url: str, password_file: Path | None = None) -> None:
        self.engine = _engine(url, password_file)
        self._turn = FairLock() if self.engine.dialect.name == "sqlite" else nullcontext()
        self._reads = sessionmaker(self.engine, expire_on_commit=False)
        self._writes = sessionmaker(self.engine.execution_options(dde_write=True), expire_on_commit=False)
        for sessions in (self._reads, self._writes):
            event.listen(sessions, "do_orm_execute", _find_own_rows)
            event.listen(sessions, "before_flush", _add_own_rows)

    @classmethod
    def of(cls, settings: Settings) -> Database:
        """The database of these settings."""
        return cls(settings.database_url, settings.database_password_file)

    @contextmanager
    def read(self, project: str | None = None) -> Iterator[Session]:
        """A session that only reads, of one project or (None) of all."""
        with self._reads(info={PROJECT: project}) as session:
            yield session

    @contextmanager
    def write(self, project: str | None = None, *, alone: bool = False) -> Iterator[Session]:
        """A transaction: committed at the end of the block, rolled back by an exception.

        With ``alone``, no other such transaction runs at the same time on any replica: what was checked is
        still true when it is acted on. On SQLite, which has one writer, this process's threads take turns.
        Others wait for a transaction, so an object store that it writes to must answer soon.
        """
        with self._turn, s3.briefly(), self._writes(info={PROJECT: project}) as session, session.begin():
            if alone:
                _lock(session.connection())
            yield session

    def migrate(self) -> None:
        """Migrate the tables to the newest version. Safe if several replicas start at once."""
        engine = self.engine.execution_options(dde_write=True)
        with engine.connect() as connection, _foreign_keys_off(connection), connection.begin():
            _lock(connection)
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()


class FairLock:
    """A lock that threads get in the order in which they asked for it.

    SQLite's own lets waiting writers sleep and try again, so under load some wait for seconds.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        turn = threading.Lock()
        turn.acquire()
        with self._guard:
            if self._is_held:
                self._waiting.append(turn)
            else:
                self._is_held = True
                turn.release()
        turn.acquire()

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_held = False


@dataclass(frozen=True)
class ProjectDatabase:
    """The database as one project sees it: its sessions find and add rows of the project alone."""

    database: Database
    project: str

    @contextmanager
    def read(self) -> Iterator[Session]:
        """As ``Database.read``."""
        with self.database.read(self.project) as session:
            yield session

    @contextmanager
    def write(self, *, alone: bool = False) -> Iterator[Session]:
        """As ``Database.write``."""
        with self.database.write(self.project, alone=alone) as session:
            yield session


def update_one(session: Session, statement: Update) -> bool:
    """Run an UPDATE. True if its WHERE clause matched a row."""
    return cast(CursorResult[Any], session.execute(statement)).rowcount > 0


def _find_own_rows(state: ORMExecuteState) -> None:
    """Add the session's project to the WHERE clause of every SELECT, UPDATE and DELETE."""
    project = state.session.info[PROJECT]
    if project is not None and not (state.is_column_load or state.is_relationship_load):
        own = with_loader_criteria(Owned, lambda table: table.project == project, include_aliases=True)
        state.statement = state.statement.options(own)


def _add_own_rows(session: Session, *_: object) -> None:
    """Give the session's project to every row that is added."""
    for row in session.new:
        if isinstance(row, Owned) and session.info[PROJECT] is not None:
            row.project = session.info[PROJECT]


@contextmanager
def _foreign_keys_off(connection: Connection) -> Iterator[None]:
    """Before a transaction: SQLite changes a table by dropping it, which rows that refer to it forbid."""
    if connection.dialect.name != "sqlite":
        yield
        return
    sqlite = cast(sqlite3.Connection, connection.connection.dbapi_connection)
    sqlite.execute("PRAGMA foreign_keys=OFF")
    try:
        yield
    finally:
        sqlite.execute("PRAGMA foreign_keys=ON")


def _lock(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})


def _engine(url: str, password_file: Path | None) -> Engine:
    if url.startswith("postgres"):
        engine = create_engine(
            "postgresql+psycopg://" + url.partition("://")[2],
            pool_size=10,
            max_overflow=10,
            pool_pre_ping=True,
            connect_args=PATIENCE,
            json_deserializer=from_json,
        )
        if password_file is not None:
            event.listen(engine, "do_connect", partial(_read_password, password_file))
        return engine
    engine = create_engine(url, pool_size=CONNECTIONS, max_overflow=CONNECTIONS, json_deserializer=from_json)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _read_password(
    file: Path, _dialect: object, _record: object, _arguments: object, parameters: dict[str, Any]
) -> None:
    """Give a new connection the password of the file. Raises BadRequest if it cannot be read."""
    try:
        parameters["password"] = file.read_text().strip()
    except OSError as error:
        message = f"database_password_file: cannot be read: {error}"
        raise BadRequest(message, param="database_password_file") from error


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # _begin_sqlite begins the transactions
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "foreign_keys=ON", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}")
    _use_wal(connection)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log, with retries: SQLite does not wait for this lock on a new file."""
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _begin_sqlite(connection: Connection) -> None:
    """Writers lock at once: SQLite refuses a reader that turns into a writer, without waiting."""
    kind = "IMMEDIATE" if connection.get_execution_options().get("dde_write") else "DEFERRED"
    connection.exec_driver_sql(f"BEGIN {kind}")
