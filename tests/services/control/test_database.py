"""Tables, migrations and transactions on each kind of database."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import delete, func, inspect, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import aliased

from services.control.database import MIGRATIONS, Database, FairLock, update_one
from services.control.tables import Base, Dataset, IdempotencyKey, Job, Model
from services.control.transitions import (
    STAGE_STATUS,
    STAGES,
    TRANSITIONS,
    UNFINISHED,
    IllegalTransition,
    check,
    next_stage,
)
from services.errors import BadRequest


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


def test_a_new_connection_reads_the_password_that_the_file_has_by_then(tmp_path, postgres):
    admin = f"{postgres}/postgres"
    port = postgres.rpartition(":")[2]
    file = tmp_path / "password"
    with psycopg.connect(admin, autocommit=True) as connection:
        [hba] = connection.execute("SHOW hba_file").fetchone()
        rules = Path(hba).read_text()
        Path(hba).write_text(f"host all rotating 127.0.0.1/32 scram-sha-256\n{rules}")
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("CREATE ROLE rotating LOGIN PASSWORD 'one'")
        database = Database(f"postgresql://rotating@127.0.0.1:{port}/postgres", file)
        with pytest.raises(BadRequest, match="database_password_file: cannot be read"):
            database.engine.connect()
        file.write_text("one\n")
        with database.engine.connect() as open_before:
            open_before.execute(text("SELECT 1"))
            connection.execute("ALTER ROLE rotating PASSWORD 'two'")
            with pytest.raises(OperationalError, match="password authentication failed"):
                database.engine.connect()
            file.write_text("two\n")
            with database.engine.connect() as new:
                assert new.scalar(text("SELECT 2")) == 2
            assert open_before.scalar(text("SELECT 1")) == 1, "open connections go on"
        database.close()
        connection.execute("DROP ROLE rotating")
        Path(hba).write_text(rules)
        connection.execute("SELECT pg_reload_conf()")


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


def migrate(database: Database, revision: str, move=command.upgrade) -> None:
    """Bring the tables to a revision, as the command line does."""
    with database.engine.execution_options(dde_write=True).begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        move(config, revision)


BEFORE_PROJECTS = "0005"
JOB = {
    "id": "ajob_1", "created_at": 1.0, "kind": "alignment", "status": "queued", "model": "model_1",
    "request": "{}", "inputs": "{}", "results": "{}", "stage_seconds": "{}", "attempt": 1, "restarts": 0,
    "restart_step": 0, "journal_cursor": 0, "next_at": 0.0, "failures": 0,
}  # fmt: skip
ROWS = {
    "datasets": {
        "id": "ds_1", "created_at": 1.0, "name": "d", "uri": "u", "digest": "x", "columns": "{}",
        "counts": "{}",
    },
    "models": {
        "id": "model_1", "created_at": 1.0, "name": "shapes", "uri": "u", "family": "sd15", "digest": "x",
        "lineage": "{}", "current": True,
    },
    "jobs": JOB,
    "job_metadata": {"job_seq": 1, "key": "run", "value": "a"},
    "events": {"job": "ajob_1", "created_at": 1.0, "level": "info", "message": "created"},
    "metrics": {"job": "ajob_1", "stage": "train", "step": 1, "at": 1.0, "values": "{}"},
    "idempotency_keys": {"key": "once", "fingerprint": "f", "answer": "{}", "created_at": 1.0},
}  # fmt: skip
ADDED = {
    "datasets": {"job": None},
    "jobs": {"waiting_since": None, "waiting_reason": None, "waiting_message": None, "waited_s": 0.0},
}
"""Columns that later versions add to these rows."""
OWNED = ("datasets", "models", "jobs", "idempotency_keys")


@pytest.fixture
def filled(database):
    """A database of the version before projects, with a row in every table."""
    return fill(database, BEFORE_PROJECTS, ROWS)


def fill(database: Database, revision: str, rows: dict[str, dict]) -> Database:
    migrate(database, revision)
    with database.engine.begin() as connection:
        for table, row in rows.items():
            names = ", ".join(f'"{name}"' for name in row)
            values = ", ".join(f":{name}" for name in row)
            connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), row)
    return database


def test_a_job_with_events_survives_the_migration_from_every_version(database):
    added_later = {"adapter_of", "columns", "restarts", "restart_step"}
    first = {
        table: {name: value for name, value in row.items() if name not in added_later}
        for table, row in ROWS.items()
    }
    fill(database, "0001", first)
    database.migrate()
    assert {table: len(found) for table, found in rows_of(database).items()} == dict.fromkeys(ROWS, 1)
    with database.read() as session, pytest.raises(IntegrityError):
        session.execute(text("INSERT INTO job_metadata VALUES (99, 'run', 'a')"))


def rows_of(database: Database) -> dict[str, list]:
    with database.engine.connect() as connection:
        return {name: list(connection.execute(text(f"SELECT * FROM {name}")).mappings()) for name in ROWS}


def test_the_rows_of_the_version_before_are_in_the_default_project_after_the_migration(filled):
    before = rows_of(filled)
    filled.migrate()
    after = rows_of(filled)
    for table, (row,) in before.items():
        project = {"project": "default"} if table in OWNED else {}
        assert [dict(each) for each in after[table]] == [{**row, **project, **ADDED.get(table, {})}]
    with filled.read("default") as session:
        assert session.scalar(select(Job.id)) == "ajob_1"
        assert session.get(IdempotencyKey, ("default", "once")) is not None
    with filled.read("other") as session:
        assert [session.scalar(select(table)) for table in (Dataset, Model, Job)] == [None] * 3


def test_a_downgrade_gives_back_the_tables_of_the_version_before(filled):
    before = rows_of(filled)
    filled.migrate()
    migrate(filled, BEFORE_PROJECTS, command.downgrade)
    assert rows_of(filled) == before


def test_a_downgrade_that_would_show_a_projects_rows_to_everybody_is_refused(filled):
    filled.migrate()
    with filled.write("other") as session:
        session.add(Dataset(id="ds_2", created_at=0.0, name="d", uri="u", digest="x", counts={}))
    with pytest.raises(RuntimeError, match="datasets of other projects exist"):
        migrate(filled, BEFORE_PROJECTS, command.downgrade)
    assert len(rows_of(filled)["datasets"]) == 2


BEFORE_COMPARED = "0006"
NUMBERS = {"base": 0.1, "candidate": 0.2}
EVALUATED = {"report": "r", "grid": "g", "num_prompts": 3, "scores": {"taste": NUMBERS}, "seconds": 1.0}


def test_evaluations_of_earlier_versions_get_the_form_of_those_of_several_models_and_back(database):
    records = {role: {"id": f"model_{role}", "name": role} for role in ("model", "base")}
    evaluation = {
        "id": "eval_1",
        "kind": "evaluation",
        "model": "model_model",
        "base": "model_base",
        "inputs": json.dumps(records),
        "request": json.dumps({"model": "model_model", "base": "model_base", "num_prompts": 3}),
        "results": json.dumps({"evaluate": EVALUATED}),
    }
    alignment = {
        "seq": 2,
        "name": "aligned",
        "inputs": json.dumps({"model": {"name": "shapes"}, "dataset": {}}),
        "results": json.dumps({"encode": {}, "evaluate": EVALUATED}),
    }
    answer = {
        "key": "of-evaluation",
        "fingerprint": "f",
        "answer": '{"object": "evaluation"}',
        "created_at": 1.0,
    }
    fill(database, BEFORE_COMPARED, {"jobs": {**JOB, **evaluation}, "idempotency_keys": answer})
    fill(database, BEFORE_COMPARED, {"jobs": {**JOB, **alignment}})
    before = rows_of(database)["jobs"]
    database.migrate()
    with database.read("default") as session:
        first, second = session.scalars(select(Job).order_by(Job.seq)).all()
        assert session.get(IdempotencyKey, ("default", "of-evaluation")) is None
    base, candidate = ({"name": role, "model": f"model_{role}"} for role in ("base", "model"))
    expected = {"models": [base, candidate], "base": "base", "num_prompts": 3, "images_per_prompt": 1}
    assert first.request == expected
    assert first.inputs == {"models": [records["base"], records["model"]]}
    new = {"images_per_prompt": 1, "images_drawn": 6}
    for row, names in ((first, ("base", "model")), (second, ("shapes", "aligned"))):
        scores = {"taste": {names[1]: NUMBERS}}
        assert row.results["evaluate"] == {**EVALUATED, **new, "base": names[0], "scores": scores}
    migrate(database, BEFORE_COMPARED, command.downgrade)
    after = rows_of(database)["jobs"]
    for old, found in zip(before, after, strict=True):
        for column in ("request", "inputs", "results"):
            assert as_json(found[column]) == as_json(old[column])


def as_json(value):
    """A JSON column as it is read without a type: decoded by PostgreSQL's driver, text on SQLite."""
    return json.loads(value) if isinstance(value, str) else value


def test_a_session_of_a_project_finds_changes_and_adds_its_own_rows_alone(database):
    database.migrate()
    for project in ("a", "b"):
        with database.write(project) as session:
            session.add(Dataset(id=f"ds_{project}", created_at=0.0, name="d", uri="u", digest="x", counts={}))
    with database.write("a") as session:
        assert session.scalars(select(Dataset.id)).all() == ["ds_a"]
        assert session.scalar(select(func.count()).select_from(Dataset)) == 1
        other = aliased(Dataset)
        assert session.scalars(select(other.id)).all() == ["ds_a"]
        assert session.scalar(select(Dataset).where(Dataset.id == "ds_b")) is None
        assert session.get(Dataset, 2) is None
        assert not update_one(session, update(Dataset).where(Dataset.id == "ds_b").values(name="x"))
        session.execute(delete(Dataset))
    with database.read() as session:
        assert session.scalars(select(Dataset.id)).all() == ["ds_b"]


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


def test_threads_get_a_fair_lock_in_the_order_in_which_they_asked():
    lock = FairLock()
    order: list[int] = []

    def take(number: int) -> None:
        with lock:
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(20)]
    with lock:
        for number, thread in enumerate(threads, 1):
            thread.start()
            while len(lock._waiting) < number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    with lock:
        assert order, "it is free again"


def test_an_error_in_a_transaction_lets_the_next_writer_in(database):
    database.migrate()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), database.write():
            raise ZeroDivisionError


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
        if ended == "failed" and status in ("queued", "evaluating"):
            check(ended, status)
            continue
        with pytest.raises(IllegalTransition, match=f"{ended} -> {status}"):
            check(ended, status)
    with pytest.raises(IllegalTransition, match="queued -> succeeded"):
        check("queued", "succeeded")
