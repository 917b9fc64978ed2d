"""Tables, migrations and transactions on each kind of database."""

from __future__ import annotations

import itertools
import shutil
import threading
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select

from services.control.database import MIGRATIONS, Database
from services.control.tables import Base, Dataset
from services.control.transitions import (
    STAGE_STATUS,
    STAGES,
    TRANSITIONS,
    UNFINISHED,
    IllegalTransition,
    check,
    next_stage,
)


@pytest.fixture
def database(database_url):
    database = Database(database_url)
    yield database
    database.close()


def test_the_migrations_make_the_tables_that_the_code_declares(database):
    database.migrate()
    database.migrate()
    with database.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, Base.metadata) == []
        assert set(inspect(connection).get_table_names()) == {*Base.metadata.tables, "alembic_version"}


def test_alembic_from_the_command_line_finds_nothing_to_add(tmp_path, sqlite_url, monkeypatch):
    for name, value in {"API_KEY": "k", "STORAGE_URI": str(tmp_path), "DATABASE_URL": sqlite_url}.items():
        monkeypatch.setenv(f"DDE_{name}", value)
    config = Config(MIGRATIONS.parent / "alembic.ini")
    shutil.copytree(MIGRATIONS, tmp_path / "migrations")
    config.set_main_option("script_location", str(tmp_path / "migrations"))
    command.upgrade(config, "head")
    written = command.revision(config, "nothing new", autogenerate=True, rev_id="next")
    text = Path(written.path).read_text()
    assert text.startswith('"""nothing new')
    assert text.count("    pass") == 2
    command.downgrade(config, "base")


def test_replicas_that_start_at_once_migrate_once(database_url):
    failures: list[Exception] = []

    def start() -> None:
        replica = Database(database_url)
        try:
            replica.migrate()
        except Exception as error:
            failures.append(error)
        finally:
            replica.close()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_transaction_that_raises_leaves_nothing(database):
    database.migrate()

    def broken() -> None:
        with database.write() as session:
            session.add(Dataset(id="ds_1", created_at=0.0, name="d", uri="u", digest="x", counts={}))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    with database.read() as session:
        assert session.scalars(select(Dataset)).all() == []


def test_writers_at_once_wait_for_one_another(database):
    database.migrate()

    def write(number: int) -> None:
        for i in range(5):
            with database.write(alone=True) as session:
                seen = len(session.scalars(select(Dataset.seq)).all())
                session.add(
                    Dataset(
                        id=f"ds_{number}_{i}", created_at=0.0, name=str(seen), uri="u", digest="x", counts={}
                    )
                )

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert sorted(int(name) for name in session.scalars(select(Dataset.name))) == list(range(20))


def test_the_statuses_form_a_line_with_two_ways_out():
    for kind, stages in STAGES.items():
        line = ["queued", *dict.fromkeys(STAGE_STATUS[stage] for stage in stages), "succeeded"]
        line = ["validating", *line] if kind == "alignment" else line
        for old, new in itertools.pairwise(line):
            check(old, new)
        for status in line[:-1]:
            assert status in UNFINISHED
            check(status, "failed")
            check(status, "cancelled")
        assert next_stage(kind, stages[-1], {}) is None


@pytest.mark.parametrize("ended", ["succeeded", "failed", "cancelled"])
def test_nothing_follows_an_end_but_a_failure_that_is_resumed_and_no_status_is_skipped(ended):
    assert ended not in UNFINISHED, "nothing is kept for it, and nobody looks after it"
    for status in TRANSITIONS:
        if (ended, status) == ("failed", "queued"):
            check(ended, status)
            continue
        with pytest.raises(IllegalTransition, match=f"{ended} -> {status}"):
            check(ended, status)
    with pytest.raises(IllegalTransition, match="queued -> succeeded"):
        check("queued", "succeeded")
