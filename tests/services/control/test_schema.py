"""Code and schema of different versions: `migrate`, what an app does on an older or a newer schema, and that
migrations only expand.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import text

from services.control import database as database_module
from services.control import schema
from services.control.database import MIGRATIONS, Database
from services.errors import Conflict, Unavailable
from tests.services.control.conftest import make_plane
from tests.services.control.test_database import ROWS, fill, migrate, rows_of
from tests.support import schemas
from tests.support.control_process import command, settings

EXPANDS_SINCE = "0010"
"""Every later migration only expands."""
SCRIPTS = ScriptDirectory(str(MIGRATIONS))
REVISIONS = [script.revision for script in SCRIPTS.walk_revisions()][::-1]
NEXT = '''
    """What the next version may add."""

    import sqlalchemy as sa
    from alembic import op

    revision = "next"
    down_revision = "{head}"


    def upgrade() -> None:
        op.create_table("visits", sa.Column("seq", sa.Integer(), primary_key=True))
        for table in ("jobs", "models", "datasets", "events", "idempotency_keys"):
            op.add_column(table, sa.Column("note", sa.Text(), nullable=True))
            op.add_column(table, sa.Column("weight", sa.Integer(), nullable=False, server_default="1"))
        op.create_index("ix_jobs_weight", "jobs", ["weight"])
'''


@pytest.fixture
def database(database_url):
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def next_version(tmp_path, monkeypatch):
    """``with next_version():`` the code has one more migration, as the next version will."""
    folder = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, folder)
    script = textwrap.dedent(NEXT.format(head=REVISIONS[-1])).lstrip()
    (folder / "versions" / "next_next.py").write_text(script)

    def migrate_to_next(database: Database) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(database_module, "MIGRATIONS", folder)
            database.migrate()

    return migrate_to_next


# ---- the rule: expand, then contract


def test_every_migration_from_now_on_only_expands(database):
    later = REVISIONS[REVISIONS.index(EXPANDS_SINCE) + 1 :]
    fill(database, EXPANDS_SINCE, ROWS)
    for revision in later:
        before, rows = schemas.read(database.engine), rows_of(database)
        migrate(database, revision)
        assert schemas.contractions(before, schemas.read(database.engine)) == [], revision
        for table, (row,) in rows.items():
            [migrated] = rows_of(database)[table]
            assert {name: migrated[name] for name in row} == dict(row), f"{revision} rewrites {table}"


@pytest.mark.parametrize(
    ("revision", "problem"),
    [
        ("0003", "datasets.columns is new, not null and has no server default"),
        ("0004", "jobs.restarts is new, not null and has no server default"),
        ("0006", "idempotency_keys has another primary key: ('project', 'key')"),
        ("0010", "datasets.digest may be null now"),
    ],
)
def test_the_rule_finds_what_the_first_migrations_did_to_the_version_before(database, revision, problem):
    migrate(database, REVISIONS[REVISIONS.index(revision) - 1])
    before = schemas.read(database.engine)
    migrate(database, revision)
    assert problem in schemas.contractions(before, schemas.read(database.engine))


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("DROP TABLE scorers", "scorers is gone"),
        ("ALTER TABLE jobs RENAME COLUMN attempt TO tries", "jobs.attempt is gone"),
        ("ALTER TABLE jobs DROP COLUMN last_error", "jobs.last_error is gone"),
        ("CREATE UNIQUE INDEX once ON scorers (digest)", "scorers has a new unique constraint: ('digest',)"),
    ],
)
def test_what_the_version_before_does_not_survive_is_named(database, statement, problem):
    database.migrate()
    before = schemas.read(database.engine)
    with database.engine.execution_options(dde_write=True).begin() as connection:
        connection.execute(text(statement))
    assert problem in schemas.contractions(before, schemas.read(database.engine))


# ---- an app on a schema of another version


def test_an_app_works_on_the_schema_of_the_next_version_and_says_so(
    tmp_path, database_url, database, next_version, caplog
):
    database.migrate()
    before = schemas.read(database.engine)
    next_version(database)
    assert schemas.contractions(before, schemas.read(database.engine)) == []
    for plane in make_plane(tmp_path, database_url):
        assert "is newer than" in caplog.text
        job = plane.job()
        plane.settle()
        assert plane.get(f"/v1/alignment/jobs/{job['id']}")["status"] == "succeeded"
        assert plane.get("/v1/models")["data"][0]["job"] == job["id"]
        plane.http.app.state.parts.parts["database"].run()
        check = plane.get("/readyz")["checks"]["database"]
        assert check["ok"]
        assert check["detail"] == f"the schema next is newer than {REVISIONS[-1]}, the newest of this version"
        assert plane.post("/v1/keys", {"name": "k", "project": "default"})["key"]


def test_an_app_that_may_not_migrate_refuses_an_older_schema_and_serves_on_a_newer_one(
    database, next_version
):
    with pytest.raises(Conflict, match=r"it is empty.*run `python -m services.control migrate` first"):
        schema.prepare(database, may_migrate=False)
    migrate(database, "0009")
    with pytest.raises(Conflict, match=f"has the schema 0009, this version needs {REVISIONS[-1]}"):
        schema.prepare(database, may_migrate=False)
    assert schema.state(database).revision == "0009", "it migrates nothing"
    database.migrate()
    schema.prepare(database, may_migrate=False)
    next_version(database)
    schema.prepare(database, may_migrate=False)
    schema.prepare(database, may_migrate=True)
    assert schema.state(database).revision == "next", "an app of the version before leaves it as it is"


def test_a_process_that_may_not_migrate_ends_with_what_to_run_and_without_a_traceback(tmp_path, sqlite_url):
    ended = command(tmp_path, sqlite_url, MIGRATE="false")
    assert ended.returncode == 1
    assert "run `python -m services.control migrate` first" in ended.stderr
    assert "Traceback" not in ended.stderr


# ---- python -m services.control migrate


def test_migrate_is_safe_if_several_run_at_once_and_does_nothing_afterwards(tmp_path, database_url, database):
    run = [sys.executable, "-m", "services.control", "migrate"]
    env = settings(tmp_path, database_url)
    started = [
        subprocess.Popen(run, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert any(f"from an empty database to {REVISIONS[-1]}" in output for output in outputs), outputs
    assert schema.migrate(database) == f"nothing to do: the schema is {REVISIONS[-1]}"
    assert schema.state(database).is_ahead == "neither"


def test_migrate_of_the_version_before_leaves_a_newer_schema_alone(database, next_version):
    database.migrate()
    next_version(database)
    assert schema.migrate(database).startswith("nothing to do: the schema next is newer than")
    assert schema.state(database).revision == "next"


def test_migrate_waits_for_a_database_that_starts_later_and_names_one_that_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "POLL_S", 0.05)
    late = Database(f"sqlite:///{tmp_path}/late/dde.db")
    with pytest.raises(Unavailable, match=r"does not answer after 0\.2 s: unable to open database file"):
        schema.migrate(late, wait_s=0.2)
    threading.Thread(target=lambda: (time.sleep(0.3), (tmp_path / "late").mkdir())).start()
    assert schema.migrate(late, wait_s=20).startswith("migrated the schema from an empty database to")
    late.close()
