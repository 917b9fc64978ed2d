"""The commands of docs/ that back up and restore a database, and what goes on afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import func, select
from starlette.testclient import TestClient

from services.control.app import build_app
from services.control.database import Database
from services.control.tables import Dataset
from tests.services.control import fakes
from tests.services.control.conftest import make_plane

ROOT = Path(__file__).parents[3]
JOBS = "/v1/alignment/jobs"
LISTS = (JOBS, "/v1/models", "/v1/datasets", "/v1/keys", "/v1/evaluations")


def documented(start: str) -> str:
    """The one command of docs/ that begins so."""
    lines = [line.strip() for page in (ROOT / "docs").glob("*.md") for line in page.read_text().splitlines()]
    [found] = [line for line in lines if line.startswith(start)]
    return found


def run(command: str, folder: Path, url: str = "") -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "DDE_DATABASE_URL": url}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def backup(tmp_path, database_url, request):
    """``save()`` while the control plane runs, and ``restore()``: the URL of what was restored."""
    if database_url.startswith("sqlite"):
        (tmp_path / ".dde").mkdir()

        def save() -> None:
            command = documented('python -c "import sqlite3').replace(".dde/dde.db", "dde.db")
            run(command, tmp_path)

        def restore() -> str:
            for end in ("", "-wal", "-shm"):
                (tmp_path / ".dde" / f"dde.db{end}").write_bytes(b"what was lost")
            run(documented("rm -f .dde/dde.db"), tmp_path)
            return f"sqlite:///{tmp_path}/.dde/dde.db"

        return save, restore
    if shutil.which("pg_dump") is None:
        pytest.skip("pg_dump is not installed (apt-get install postgresql-client)")

    def save() -> None:
        run(documented("pg_dump"), tmp_path, database_url)

    def restore() -> str:
        server, name = database_url.rpartition("/")[0], f"t{uuid.uuid4().hex}"
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        run(documented("pg_restore"), tmp_path, f"{server}/{name}")
        return f"{server}/{name}"

    return save, restore


def everything(plane, job: str) -> dict:
    """What the API tells of rows, and of one job."""
    found = {path: plane.get(path) for path in LISTS}
    return found | {part: plane.get(f"{JOBS}/{job}/{part}?limit=1000") for part in ("events", "metrics")}


def test_a_restored_backup_has_all_rows_and_unfinished_jobs_go_on_without_a_second_run(
    tmp_path, database_url, backup
):
    save, restore = backup
    for plane in make_plane(tmp_path, database_url):
        finished = plane.job(name="first")["id"]
        plane.settle()
        plane.launcher.plays["train"] = fakes.runs
        running = plane.job(name="second")["id"]
        plane.settle()
        waiting = plane.job(name="third")["id"]
        key = plane.post("/v1/keys", {"name": "k", "project": "default"})["key"]
        evaluation = plane.post("/v1/evaluations", plane.evaluation_body())["id"]
        assert plane.get(f"{JOBS}/{running}")["status"] == "running"
        before = everything(plane, finished)
        save()

        fakes.train(plane.launcher.specs[f"{running}-train-a1"])
        plane.launcher.states[f"{running}-train-a1"] = "succeeded"
        plane.launcher.plays["train"] = fakes.train
        plane.settle(60)
        assert plane.get(f"{JOBS}/{running}")["status"] == "succeeded"
        late = plane.job(name="late")["id"]
        launcher = plane.launcher
        ran = list(launcher.submitted)
        root = plane.root

    for restored in restored_plane(plane, restore(), launcher):
        assert everything(restored, finished) == before
        assert restored.get("/v1/models", headers={"authorization": f"Bearer {key}"})["data"]
        assert restored.get(f"{JOBS}/{late}", 404)["error"]["type"] == "invalid_request_error"
        restored.settle(60)
        for job in (running, waiting):
            done = restored.get(f"{JOBS}/{job}")
            assert (done["status"], done["result"]["train"]["step"]) == ("succeeded", 5)
            assert restored.get(f"/v1/models/{done['aligned_model']}")["job"] == job
        assert restored.get(f"/v1/evaluations/{evaluation}")["status"] == "succeeded"
        assert launcher.submitted == ran, "every run had been there before, under the same id"
        assert len(set(ran)) == len(ran)
    assert (root / "dde.backup").is_file()


def restored_plane(plane, url: str, launcher):
    """The same storage and the same cluster on another database."""
    plane.settings = plane.settings.model_copy(update={"database_url": url})
    app = build_app(plane.settings, launcher, reconcile=False)
    headers = {"authorization": f"Bearer {plane.settings.api_key.get_secret_value()}"}
    with TestClient(app, headers=headers, raise_server_exceptions=False) as plane.http:
        yield plane


def test_a_backup_of_a_database_that_is_written_to_is_whole(tmp_path, database_url, backup):
    """Rows that belong together are in it together, whatever is committed meanwhile."""
    save, restore = backup
    database = Database(database_url)
    database.migrate()
    over = threading.Event()
    written = []

    def write() -> None:
        while not over.is_set():
            with database.write("default") as session:
                number = len(written)
                for table in ("a", "b"):
                    session.add(dataset(number, table))
            written.append(number)

    def dataset(number: int, table: str) -> Dataset:
        return Dataset(id=f"ds_{table}{number}", created_at=0.0, name=table, uri="u", digest="x", counts={})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(written) < 20:
            over.wait(0.01)
        save()
    finally:
        over.set()
        writer.join()
        database.close()
    restored = Database(restore())
    with restored.read() as session:
        counts = dict(session.execute(select(Dataset.name, func.count()).group_by(Dataset.name)).all())
    restored.close()
    assert counts["a"] == counts["b"] >= 20
