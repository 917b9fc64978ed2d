"""Liveness, readiness and metrics: what a replica says of itself while the rest of the system is away."""

from __future__ import annotations

import socket
import threading
import time

import httpx
import pytest
from starlette.testclient import TestClient

from services.client.processes import free_ports
from services.control import health
from services.control.app import build_app
from services.errors import Conflict, Unavailable
from tests.services.control.conftest import make_plane


def until(holds, timeout_s: float = 20.0):
    """What ``holds()`` returns as soon as it is true."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return found


def checks(plane, status: int = 200) -> dict:
    return plane.get("/readyz", status)["checks"]


def away(plane) -> list[str]:
    return [name for name, check in checks(plane).items() if not check["ok"]]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(health, "EVERY_S", dict.fromkeys(health.EVERY_S, 0.05))
    monkeypatch.setattr(health, "AWAY_EVERY_S", 0.05)
    monkeypatch.setattr(health, "PATIENCE_S", 0.3)


@pytest.fixture
def plane(quick, tmp_path, migrated_url):
    yield from make_plane(tmp_path, migrated_url)


def test_a_replica_is_ready_without_storage_ray_and_serve_and_names_them(plane):
    until(lambda: away(plane) == ["serve"])
    plane.launcher.down = True
    (plane.root / "store" / ".writable").unlink()
    (plane.root / "store" / ".writable").mkdir()
    until(lambda: away(plane) == ["storage", "ray", "serve"])
    found = checks(plane)
    assert "connection refused" in found["ray"]["detail"]
    assert "IsADirectoryError" in found["storage"]["detail"]
    assert "ConnectError" in found["serve"]["detail"]
    assert plane.get("/healthz") == {"status": "ok"}
    plane.launcher.down = False
    until(lambda: away(plane) == ["storage", "serve"])


def test_a_replica_without_its_database_is_not_ready_but_alive_and_still_measured(plane):
    until(lambda: checks(plane)["database"]["ok"])

    def lost():
        raise Unavailable("the database is gone")

    plane.http.app.state.parts.parts["database"]._check = lost
    until(lambda: plane.http.get("/readyz").status_code == 503)
    assert "the database is gone" in checks(plane, 503)["database"]["detail"]
    assert plane.get("/healthz") == {"status": "ok"}
    figures = plane.http.get("/metrics").text
    assert 'dde_part_up{part="database"} 0.0' in figures
    assert 'dde_part_up{part="ray"} 1.0' in figures
    assert "dde_jobs{" not in figures
    assert 'route="/readyz",status="503"' in figures


def test_a_part_that_hangs_delays_no_probe_and_is_told_with_the_age_of_its_last_check(plane):
    until(lambda: away(plane) == ["serve"])
    hang = threading.Event()
    answer = plane.launcher.status

    def silent(run_id: str):
        hang.wait(60)
        return answer(run_id)

    plane.launcher.status = silent
    try:
        until(lambda: "ray" in away(plane))
        began_s = time.monotonic()
        found = checks(plane)["ray"]
        figures = plane.http.get("/metrics").text
        assert time.monotonic() - began_s < 10.0
        assert found["detail"].startswith("no answer for ")
        assert found["age_s"] >= health.PATIENCE_S
        assert 'dde_part_up{part="ray"} 0.0' in figures
    finally:
        hang.set()
    until(lambda: "ray" not in away(plane))


def test_a_check_that_fails_in_an_unforeseen_way_goes_on_and_counts_as_away():
    attempts = []

    def broken():
        attempts.append(1)
        raise ZeroDivisionError("one over none")

    part = health.Part("ray", broken)
    assert part.view().detail == "not checked yet"
    assert part.run() == health.AWAY_EVERY_S
    assert (part.view().ok, part.view().detail) == (False, "ZeroDivisionError: one over none")


def test_the_reconcilers_last_review_is_measured_where_it_runs(tmp_path, plane, sqlite_url):
    name = "dde_reconciler_last_review_timestamp_seconds"
    assert f"\n{name} " not in plane.http.get("/metrics").text, "the plane of the tests reviews on request"
    reconciler = plane.http.app.state.reconciler
    began = time.time()
    reconciler.start()
    text = until(
        lambda: [line for line in plane.http.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
    )
    assert began <= float(text[0].split()[1]) <= time.time()
    reconciler.stop()


def test_metrics_with_a_port_of_their_own_are_not_on_the_port_of_the_api(tmp_path, plane):
    (port,) = free_ports(1)
    settings = plane.settings.model_copy(update={"metrics_port": port})
    with TestClient(build_app(settings, plane.launcher, reconcile=False)) as http:
        assert http.get("/metrics").status_code == 404
        assert "/metrics" not in http.get("/openapi.json").json()["paths"]
        figures = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
        assert figures.headers["content-type"].startswith("text/plain")
        assert 'dde_http_requests_total{method="GET",route="unmatched",status="404"} 1.0' in figures.text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)


def test_a_metrics_port_that_is_taken_is_named(plane):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"metrics_port: cannot be listened on, got {port}: .*in use"):
            plane.http.app.state.telemetry.listen("127.0.0.1", port)
