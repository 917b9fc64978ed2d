"""The database: SQLite for one replica, PostgreSQL for several.

Reads and writes are sessions in a with-block.
"""

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
LOCK = 0x6464655F  # "dde_": the advisory lock on PostgreSQL that SQLite's one writer stands for


class Database:
    """Sessions on one database. Objects stay readable after their session has ended."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self._reads = sessionmaker(self.engine, expire_on_commit=False)
        self._writes = sessionmaker(self.engine.execution_options(dde_write=True), expire_on_commit=False)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading."""
        with self._reads() as session:
            yield session

    @contextmanager
    def write(self, *, alone: bool = False) -> Iterator[Session]:
        """A transaction: committed at the end of the block, rolled back by an exception.

        ``alone``: no other transaction of this kind runs meanwhile, on any replica; what is checked still
        holds when it is acted on.
        """
        with self._writes.begin() as session:
            if alone:
                _lock(session.connection())
            yield session

    def migrate(self) -> None:
        """Bring the tables to the newest version. Safe when several replicas start at once."""
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
    """Run a guarded UPDATE. Says whether its guard let it through."""
    return cast(CursorResult[Any], session.execute(statement)).rowcount > 0


def _lock(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})


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


def _prepare_sqlite(connection, _record) -> None:  # type: ignore[no-untyped-def]
    connection.isolation_level = None  # transactions begin where we say so, see _begin_sqlite
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "foreign_keys=ON", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}")
    _use_wal(connection)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Change the journal mode.

    SQLite does not wait for that lock where several start at once on a new file: so we do.
    """
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
    """A writer takes the lock at once: a reader that turns writer half-way would be refused without waiting."""
    kind = "IMMEDIATE" if connection.get_execution_options().get("dde_write") else "DEFERRED"
    connection.exec_driver_sql(f"BEGIN {kind}")
