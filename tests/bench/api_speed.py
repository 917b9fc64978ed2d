"""How long do a submit and a list take while 20 clients submit jobs?

The control plane runs as its own process on SQLite, with its reconciler; Ray is unreachable, so jobs wait.
Both results are 99th percentiles, each against the same row or rows by SQL alone, on one connection to a file
of the same kind, in the same run.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dde_core.shapes import MODEL_DIR, PAIRS_FILE, PROMPTS_FILE
from services.client.processes import free_ports
from services.control.job_update import PARKED_S
from tests.bench.measure import Result, result

CLIENTS = 20
SUBMITS = 50
"""Jobs that each client submits, one after the other."""
LISTS = 200
JOBS = 100_000
QUEUED = 20_000
"""So many of the jobs are queued; the others have succeeded."""
PAGE = 100
KEY = "dde-bench"
PATH = "/v1/alignment/jobs"
START_TIMEOUT_S = 120.0
LIST_SQL = "SELECT * FROM jobs WHERE kind = 'alignment' ORDER BY seq DESC LIMIT ?"


def api_submit(scratch: Path) -> dict[str, Result]:
    """``api_submit_p99_ms``: 20 clients submit at once."""
    with serving(scratch) as server:
        body = server.job_body()
        server.warm_up(body)
        seconds = submit_at_once(server, body)
    bare = timed(bare_insert(scratch / "dde.db", scratch / "bare.db"), len(seconds))
    what = f"{CLIENTS} clients at once, p50 {ms(seconds, 50):.3g} ms; a bare insert"
    return {"api_submit_p99_ms": compared(seconds, bare, what)}


def api_list(scratch: Path) -> dict[str, Result]:
    """``api_list_100k_p99_ms``: a list of 100 of 100,000 jobs, while 20 clients submit."""
    with serving(scratch) as server:
        server.request("POST", PATH, server.job_body())
    fill(scratch / "dde.db", JOBS)
    with serving(scratch) as server:
        body = server.job_body()
        server.warm_up(body)
        with load(server, body):
            seconds = timed(server.lister(), LISTS)
    connection = sqlite3.connect(scratch / "dde.db")
    bare = timed(lambda: connection.execute(LIST_SQL, (PAGE + 1,)).fetchall(), LISTS)
    what = f"{JOBS} jobs, {CLIENTS} clients submit, p50 {ms(seconds, 50):.3g} ms; a bare select"
    return {"api_list_100k_p99_ms": compared(seconds, bare, what)}


def ms(seconds: Sequence[float], percent: int) -> float:
    """A percentile in milliseconds."""
    return 1000 * statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]


def compared(ours: Sequence[float], bare: Sequence[float], what: str) -> Result:
    """The 99th percentiles of both."""
    value = ms(ours, 99)
    against = ms(bare, 99)
    return result(value / against, value, "ms", f"{what}: {against:.3g} ms; {len(ours)} requests")


def timed(call: Callable[[], object], times: int) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


# ---- the control plane and its clients


@dataclass(frozen=True)
class Server:
    """A control plane that runs on a port of this machine."""

    port: int

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """One request on a new connection."""
        return send(self.connect(), method, path, body)

    def job_body(self) -> dict[str, Any]:
        """A job on the shipped model and pairs, which are registered first if they are not."""
        models = self.request("GET", "/v1/models")["data"]
        if not models:
            self.request("POST", "/v1/models", {"name": "shapes", "uri": MODEL_DIR.as_uri()})
            self.request("POST", "/v1/datasets", {"name": "pairs", "uri": PAIRS_FILE.as_uri()})
        dataset = self.request("GET", "/v1/datasets")["data"][0]["id"]
        evaluation = {"prompts_uri": PROMPTS_FILE.as_uri()}
        body = {"model": "shapes", "dataset": dataset, "evaluation": evaluation}
        return {**body, "training": {"batch_size": 64}, "metadata": {"run": "bench"}}

    def warm_up(self, body: dict[str, Any]) -> None:
        """Wait until the reconciler has tried to reach Ray, for which it imports Ray's client."""
        job = self.request("POST", PATH, body)["id"]
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            jobs = self.request("GET", f"{PATH}?status=preparing")["data"]
            events = [self.request("GET", f"{PATH}/{each['id']}/events")["data"] for each in jobs[:1]]
            if any("waiting for Ray" in event["message"] for found in events for event in found):
                return
            time.sleep(0.2)
        raise TimeoutError(f"job {job} did not wait for Ray within {START_TIMEOUT_S:g} s")

    def lister(self) -> Callable[[], None]:
        """A call that lists the newest jobs on one connection."""
        connection = self.connect()

        def listing() -> None:
            found = send(connection, "GET", f"{PATH}?limit={PAGE}")["data"]
            assert len(found) == PAGE

        return listing


def send(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> Any:
    """The JSON of the answer. Raises RuntimeError for any status but 200."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{method} {path}: {answer.status} {content[:500]!r}")
    return json.loads(content)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A control plane whose database and storage are in a folder."""
    port, closed = free_ports(2)
    settings = {
        "DDE_API_KEY": KEY,
        "DDE_STORAGE_URI": str(folder / "store"),
        "DDE_DATABASE_URL": f"sqlite:///{folder}/dde.db",
        "DDE_RAY_URL": f"http://127.0.0.1:{closed}",
        "DDE_PORT": str(port),
        "DDE_UNREACHABLE_S": "100000",
    }
    with (folder / "control.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.control"], env={**os.environ, **settings}, stderr=log
        )
    server = Server(port)
    try:
        wait_until_alive(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def wait_until_alive(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.request("GET", "/healthz")
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the control plane did not start: exit code {process.poll()}")


def submit_at_once(server: Server, body: dict[str, Any]) -> list[float]:
    """Seconds of every submit of every client."""
    found: list[list[float]] = []

    def client() -> None:
        connection = server.connect()
        found.append(timed(lambda: send(connection, "POST", PATH, body), SUBMITS))

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == CLIENTS, "a client failed"
    return [seconds for each in found for seconds in each]


@contextmanager
def load(server: Server, body: dict[str, Any]) -> Iterator[None]:
    """Every client submits until the block ends."""
    ended = threading.Event()

    def client() -> None:
        connection = server.connect()
        while not ended.is_set():
            send(connection, "POST", PATH, body)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


# ---- SQL alone


def columns_of(connection: sqlite3.Connection) -> list[str]:
    return [name for _, name, *_ in connection.execute("PRAGMA table_info(jobs)") if name != "seq"]


def fill(database: Path, jobs: int) -> None:
    """Copy the newest job until there are so many."""
    with sqlite3.connect(database) as connection:
        names = columns_of(connection)
        changed = {
            "id": "printf('ajob_%024x', n)",
            "name": "printf('job-%d', n)",
            "status": f"CASE WHEN n <= {QUEUED} THEN 'queued' ELSE 'succeeded' END",
            "output_model": "printf('model_%024x', n)",
            "next_at": f"next_at + {PARKED_S}",
        }
        values = ", ".join(changed.get(name, f'"{name}"') for name in names)
        numbers = "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?)"
        quoted = ", ".join(f'"{name}"' for name in names)
        newest = "(SELECT * FROM jobs ORDER BY seq DESC LIMIT 1)"
        connection.execute(
            f"{numbers} INSERT INTO jobs ({quoted}) SELECT {values} FROM {newest}, numbers", (jobs,)
        )


def bare_insert(database: Path, target: Path) -> Callable[[], None]:
    """A call that inserts a row like a submitted job into a table of its own, and commits."""
    with sqlite3.connect(database) as source:
        names = columns_of(source)
        row = source.execute(f"SELECT {', '.join(names)} FROM jobs ORDER BY seq DESC LIMIT 1").fetchone()
    connection = sqlite3.connect(target, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute(f"CREATE TABLE jobs (seq INTEGER PRIMARY KEY, {', '.join(names)})")
    statement = f"INSERT INTO jobs ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"

    def insert() -> None:
        connection.execute(statement, row)

    return insert
