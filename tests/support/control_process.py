"""The control plane as a process of its own, and what stands between it and its clients.

with ControlProcess(folder, database_url) as control:
    httpx.get(f"{control.url}/readyz")
"""

from __future__ import annotations

import http.client
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from services.client.processes import free_ports

ROOT = Path(__file__).parents[2]
KEY = "sk-test"
HEADERS = {"authorization": f"Bearer {KEY}"}
START_S = 240.0
STOP_S = 60.0
NOWHERE = "http://127.0.0.1:1"


def settings(folder: Path, database_url: str, **own: str) -> dict[str, str]:
    """The environment of a control plane whose files are in ``folder``; ``own`` without ``DDE_``."""
    values = {
        "API_KEY": KEY,
        "STORAGE_URI": (folder / "store").as_uri(),
        "DATABASE_URL": database_url,
        "RAY_URL": NOWHERE,
        "SERVE_URL": NOWHERE,
        "ALLOWED_SOURCES": f'["{folder}"]',
        "DRAIN_NOTICE_S": "0",
        **own,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DDE_")}
    return {**kept, "PYTHONPATH": str(ROOT), **{f"DDE_{name}": value for name, value in values.items()}}


def command(folder: Path, database_url: str, *arguments: str, **own: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m services.control`` with these arguments to its end."""
    return subprocess.run(
        [sys.executable, "-m", "services.control", *arguments],
        env=settings(folder, database_url, **own),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=START_S,
    )


class ControlProcess:
    """One replica. Leaving the block ends it by SIGTERM, and by SIGKILL if that takes ``STOP_S``."""

    def __init__(self, folder: Path, database_url: str, **own: str) -> None:
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = folder / f"control-{self.port}.log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.control"],
                env=settings(folder, database_url, PORT=str(self.port), **own),
                cwd=folder,
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> ControlProcess:
        self.wait_for(lambda report: report["status"] == "ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def terminate(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def readiness(self) -> tuple[int, dict[str, Any]]:
        answer = httpx.get(f"{self.url}/readyz", timeout=5.0, trust_env=False)
        return answer.status_code, answer.json()

    def wait_for(self, holds: Any, timeout_s: float = START_S) -> dict[str, Any]:
        """Wait until ``holds(report)`` of /readyz. Raises AssertionError with the log."""
        deadline_s = time.monotonic() + timeout_s
        report: dict[str, Any] = {}
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.log
            try:
                _, report = self.readiness()
                if holds(report):
                    return report
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"{report}\n{self.log}")


class RoundRobin(ThreadingHTTPServer):
    """A Service of Kubernetes in small: each request goes to the next replica that /readyz calls ready.

    It repeats nothing. ``failures`` has what went wrong between it and a replica, ``served`` counts the
    requests of each. Replicas are URLs; add and remove them at any time.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, poll_s: float = 0.2) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.replicas: list[str] = []
        self.failures: list[str] = []
        self.served: Counter[str] = Counter()
        self.ready: list[str] = []
        self._turn = itertools.count()
        self._poll_s = poll_s
        self._closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> RoundRobin:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self.shutdown()
        self.server_close()

    def next_replica(self) -> str:
        """Fails if none is ready, as a connection to a Service without endpoints does."""
        ready = self.ready
        return ready[next(self._turn) % len(ready)]

    def handle_error(self, request: object, client_address: object) -> None:
        self.failures.append("".join(traceback.format_exc(limit=3)))

    def _watch(self) -> None:
        while not self._closing.is_set():
            self.ready = [url for url in self.replicas if _is_ready(url)]
            self._closing.wait(self._poll_s)


def _is_ready(url: str) -> bool:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


class _Pass(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: RoundRobin

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        replica = self.server.next_replica()
        connection = http.client.HTTPConnection(replica.removeprefix("http://"), timeout=300)
        kept = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        try:
            connection.request(self.command, self.path, body, kept)
            answer = connection.getresponse()
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in (*HOP, "content-length"):
                    self.send_header(name, value)
            self.send_header("connection", "close")
            self.end_headers()
            while chunk := answer.read1(65_536):
                self.wfile.write(chunk)
            self.server.served[replica] += 1
        finally:
            connection.close()
            self.close_connection = True

    do_GET = do_POST = do_DELETE = pass_on

    def log_message(self, *arguments: object) -> None:
        pass


HOP = ("connection", "keep-alive", "transfer-encoding")
