"""The database: SQLite for one replica, PostgreSQL for several. Use its sessions in with-blocks."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, CursorResult, Engine, Update, create_engine, event, text
from sqlalchemy.orm import Session, sessionmaker

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_MS = 30_000
ADVISORY_LOCK = 0x6464655F  # "dde_"; on PostgreSQL only: SQLite has a single writer anyway


class Database:
    """Sessions on one database. Rows stay readable after their session is closed."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self._reads = sessionmaker(self.engine, expire_on_commit=False)
        self._writes = sessionmaker(self.engine.execution_options(dde_write=True), expire_on_commit=False)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that only reads."""
        with self._reads() as session:
            yield session

    @contextmanager
    def write(self, *, alone: bool = False) -> Iterator[Session]:
        """A transaction: committed at the end of the block, rolled back by an exception.

        With ``alone``, no other such transaction runs at the same time on any replica: what was checked is
        still true when it is acted on.
        """
        with self._writes.begin() as session:
            if alone:
                _lock(session.connection())
            yield session

    def migrate(self) -> None:
        """Migrate the tables to the newest version. Safe if several replicas start at once."""
        with self.engine.execution_options(dde_write=True).begin() as connection:
            _lock(connection)
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()


def update_one(session: Session, statement: Update) -> bool:
    """Run an UPDATE. True if its WHERE clause matched a row."""
    return cast(CursorResult[Any], session.execute(statement)).rowcount > 0


def _lock(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})


def _engine(url: str) -> Engine:
    if url.startswith("postgres"):
        return create_engine(
            "postgresql+psycopg://" + url.partition("://")[2],
            pool_size=10,
            max_overflow=10,
            pool_pre_ping=True,
        )
    engine = create_engine(url, pool_size=10, max_overflow=40)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


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
