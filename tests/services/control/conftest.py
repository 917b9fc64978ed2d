"""A control plane in a temporary folder, on SQLite and, if it is installed, on a real PostgreSQL."""

from __future__ import annotations

import glob
import shutil
import socket
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from services.control.app import build_app
from services.control.database import Database
from services.control.launchers.clusters import Clusters
from services.control.reconciler import Reconciler
from services.settings import Settings
from services.storage import files
from tests.services.control.fakes import FakeLauncher
from tests.support.zero_folder import write_zero_folder

KEY = "sk-test"
POSTGRES = sorted(glob.glob("/usr/lib/postgresql/*/bin"))


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """A throwaway PostgreSQL server: its URL without a database. Skips where there are no binaries."""
    if not POSTGRES or shutil.which("runuser") is None:
        pytest.skip("PostgreSQL's server binaries are not installed (apt-get install postgresql)")
    folder = Path(f"/tmp/dde-postgres-{uuid.uuid4().hex[:8]}")
    folder.mkdir()
    shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = ["runuser", "-u", "postgres", "--"]
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200"
    subprocess.run(
        [*run, f"{POSTGRES[-1]}/initdb", "-D", folder / "data", "-A", "trust", "-N"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    start = [
        *run,
        f"{POSTGRES[-1]}/pg_ctl",
        "-D",
        folder / "data",
        "-w",
        "-l",
        folder / "log",
        "-o",
        options,
        "start",
    ]
    subprocess.run(start, check=True, capture_output=True, cwd="/")
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}"
    finally:
        subprocess.run(
            [*run, f"{POSTGRES[-1]}/pg_ctl", "-D", folder / "data", "-m", "immediate", "stop"],
            check=False,
            cwd="/",
        )
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/dde.db"
    return new_database(request.getfixturevalue("postgres"))


@pytest.fixture
def sqlite_url(tmp_path):
    """Where an empty database may be made."""
    return f"sqlite:///{tmp_path}/dde.db"


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory) -> Path:
    """The file of a database with all tables and no row: a copy takes less time than a migration."""
    path = tmp_path_factory.mktemp("migrated") / "dde.db"
    migrate(f"sqlite:///{path}")
    assert [each.name for each in path.parent.iterdir()] == [path.name], "nothing is left beside the file"
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres) -> str:
    """The name of such a database on the server."""
    url = new_database(postgres)
    migrate(url)
    return url.rpartition("/")[2]


@pytest.fixture
def migrated_url(tmp_path, migrated_sqlite) -> str:
    """A SQLite database with all tables and no row."""
    shutil.copyfile(migrated_sqlite, tmp_path / "dde.db")
    return f"sqlite:///{tmp_path}/dde.db"


def migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.close()


def new_database(server: str, template: str = "template1") -> str:
    """The URL of a new database on a PostgreSQL server, with what ``template`` has."""
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    return f"{server}/{name}"


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@dataclass
class Plane:
    """A control plane whose reconciler runs only when a test says so."""

    root: Path
    settings: Settings
    launcher: FakeLauncher
    http: TestClient = field(init=False)
    clock: Clock = field(default_factory=Clock)

    @property
    def database(self):
        return self.http.app.state.database

    @property
    def app_settings(self) -> Settings:
        """The settings as the app made them absolute."""
        return self.http.app.state.settings

    def reconciler(self) -> Reconciler:
        return Reconciler(self.database, self.settings, Clusters(self.launcher), self.clock)

    def settle(self, looks: int = 30) -> None:
        """Look at every job until nothing is due any more; each look moves the clock by one poll."""
        reconciler = self.reconciler()
        self.clock.now = max(self.clock.now, time.time())
        for _ in range(looks):
            if not reconciler.once():
                self.clock.now += self.settings.poll_interval_s

    def job(self, **overrides) -> dict:
        """POST an alignment job with small, valid settings."""
        return self.post("/v1/alignment/jobs", self.job_body(**overrides))

    def job_body(self, **overrides) -> dict:
        body = {
            "model": "shapes",
            "dataset": self.dataset["id"],
            "training": {"steps": 2, "batch_size": 4},
            "evaluation": {"prompts_uri": str(self.root / "prompts.txt"), "num_prompts": 3},
        }
        return body | overrides

    def evaluation_body(self, **overrides) -> dict:
        """A small comparison of "shapes" with "rival", a base model that the first call registers."""
        if self.http.get("/v1/models/rival").status_code == 404:
            self.post("/v1/models", {"name": "rival", "uri": str(self.root / "base")})
        prompts = {"prompts_uri": str(self.root / "prompts.txt"), "num_prompts": 2}
        return {"models": ["shapes", "rival"], **prompts} | overrides

    def post(self, path: str, body, status: int = 200, **kwargs) -> dict:
        answer = self.http.post(path, json=body, **kwargs)
        assert answer.status_code == status, answer.text
        return answer.json()

    def get(self, path: str, status: int = 200, **kwargs) -> dict:
        answer = self.http.get(path, **kwargs)
        assert answer.status_code == status, answer.text
        return answer.json()

    def error(self, path: str, body, status: int = 400) -> dict:
        return self.post(path, body, status)["error"]

    def events(self, job_id: str) -> list[str]:
        return [
            event["message"] for event in self.get(f"/v1/alignment/jobs/{job_id}/events?limit=1000")["data"]
        ]

    @property
    def dataset(self) -> dict:
        found = self.get("/v1/datasets")["data"]
        return (
            found[0]
            if found
            else self.post("/v1/datasets", {"name": "pairs", "uri": write_pairs(self.root / "pairs")})
        )


@pytest.fixture
def plane(tmp_path, migrated_url):
    yield from make_plane(tmp_path, migrated_url)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def any_plane(request, tmp_path):
    """The same on each kind of database; PostgreSQL is slow."""
    yield from make_plane(tmp_path, url_of(request))


@pytest.fixture(params=["sqlite", "postgresql"])
def each_plane(request, tmp_path):
    """The same for tests of what the kinds do in ways of their own: locks, races, order, search in JSON."""
    yield from make_plane(tmp_path, url_of(request))


def url_of(request: pytest.FixtureRequest) -> str:
    """A migrated database of the kind that the fixture has as its parameter."""
    if request.param == "sqlite":
        return request.getfixturevalue("migrated_url")
    return new_database(request.getfixturevalue("postgres"), request.getfixturevalue("migrated_postgres"))


def make_plane(tmp_path: Path, url: str):
    settings = Settings(
        api_key=SecretStr(KEY),
        storage_uri=files.as_uri(tmp_path / "store"),
        database_url=url,
        ray_url="http://127.0.0.1:1",
        serve_url="http://127.0.0.1:1",
        poll_interval_s=1.0,
    )
    plane = Plane(tmp_path, settings, FakeLauncher())
    app = build_app(settings, plane.launcher, reconcile=False)
    (tmp_path / "prompts.txt").write_text("a red cross\n\na small blue circle\na green square\n")
    plane_client = TestClient(app, headers={"authorization": f"Bearer {KEY}"}, raise_server_exceptions=False)
    with plane_client as plane.http:
        plane.post("/v1/models", {"name": "shapes", "uri": write_base(tmp_path / "base")})
        yield plane


def write_base(folder: Path) -> str:
    """A folder that can be registered as a base model."""
    return str(write_zero_folder(folder))


def write_pairs(path: Path, rows: list[dict] | None = None, **columns) -> str:
    """Parquet with Pick-a-Pic's columns: eight decided pairs, a tie and a row without a label."""
    labels = [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 3 + [(0.5, 0.5), (None, None)]
    table = {
        "jpg_0": pa.array([b"0"] * 10, pa.binary()),
        "jpg_1": pa.array([b"1"] * 10, pa.binary()),
        "label_0": pa.array([label[0] for label in labels], pa.float64()),
        "label_1": pa.array([label[1] for label in labels], pa.float64()),
        "caption": pa.array([f"caption {i}" for i in range(10)]),
        "image_0_uid": pa.array([f"l{i}" for i in range(10)]),
        "image_1_uid": pa.array([f"r{i}" for i in range(10)]),
        **columns,
    }
    path.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({name: column for name, column in table.items() if column is not None}), path / "0.parquet"
    )
    return str(path)
