"""Reads and generations while other parts of the system are away or hang: real processes, real HTTP."""

from __future__ import annotations

import socket
import statistics
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from tests.services.control.test_draining import IMAGES, JOBS, Draws, client, image, register
from tests.services.control.test_streams import listening
from tests.support.control_process import HEADERS, ControlProcess
from tests.support.s3_server import Fault

HANG_S = 45.0
SOON_S = 20.0
"""Of a machine under load, in which what waits for a part that hangs takes ``HANG_S``."""


@pytest.fixture
def silent_ray():
    """Ray's head as its node is lost: connections are accepted by nobody, or never answered."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(256)
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


def timed(call) -> tuple[float, httpx.Response]:
    began_s = time.monotonic()
    answer = call()
    return time.monotonic() - began_s, answer


def measure(url: str, rounds: int) -> dict[str, list[tuple[float, httpx.Response]]]:
    """Reads of rows, and generations, one after the other."""
    with client(url) as http:
        calls = {
            "jobs": lambda: http.get(JOBS),
            "models": lambda: http.get("/v1/models/shapes"),
            "generation": lambda: http.post(IMAGES, json=image(0)),
            "key": lambda: http.post("/v1/keys", json={"name": "k", "project": "default"}),
            "ready": lambda: http.get("/readyz"),
        }
        return {name: [timed(call) for _ in range(rounds)] for name, call in calls.items()}


def check(found: dict[str, list[tuple[float, httpx.Response]]], during: str) -> None:
    for name, answers in found.items():
        assert {answer.status_code for _, answer in answers} == {200}, f"{name} while {during}"
        assert max(seconds for seconds, _ in answers) < SOON_S, f"{name} while {during}"
    all_seconds = [seconds for answers in found.values() for seconds, _ in answers]
    middle = statistics.median(all_seconds)
    print(f"{during}: {len(all_seconds)} requests, median {middle:.3f} s, slowest {max(all_seconds):.3f} s")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_are_read_and_images_drawn_while_ray_is_silent_and_storage_refuses_or_hangs(
    tmp_path, sqlite_url, s3_server, bucket, silent_ray
):
    options = {"STORAGE_URI": bucket, "RAY_URL": silent_ray, "DRAIN_S": "5"}
    with ExitStack() as undo:
        serve = undo.enter_context(listening(Draws(), lifespan="off"))
        control = undo.enter_context(ControlProcess(tmp_path, sqlite_url, SERVE_URL=serve, **options))
        pool = undo.enter_context(ThreadPoolExecutor(80))
        undo.callback(s3_server.inject)
        register(control.url, tmp_path)
        control.wait_for(lambda report: report["checks"]["storage"]["ok"])
        check(measure(control.url, 10), "Ray is silent")

        s3_server.inject(Fault("delay", seconds=HANG_S))
        waiting = ask_for_files(pool, control.url, 60, str(tmp_path / "base"))
        time.sleep(1.0)
        check(measure(control.url, 10), "storage hangs and 60 requests wait for it")
        report = control.wait_for(lambda found: not found["checks"]["storage"]["ok"], 60)
        assert report["status"] == "ready"
        assert "no answer for" in report["checks"]["storage"]["detail"]
        seconds, answer = timed(
            lambda: httpx.delete(f"{control.url}/v1/models/shapes", headers=HEADERS, timeout=60)
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert "storage is away" in answer.json()["error"]["message"]
        assert seconds < SOON_S
        check(measure(control.url, 10), "storage is known to hang")

        s3_server.inject(Fault("slow_down"))
        check(measure(control.url, 10), "storage refuses")
        figures = httpx.get(f"{control.url}/metrics").text
        assert 'dde_part_up{part="storage"} 0.0' in figures
        assert 'dde_part_up{part="serve"} 1.0' in figures
        s3_server.inject()
        control.wait_for(lambda found: found["checks"]["storage"]["ok"], 120)
        with client(control.url) as http:
            assert http.delete("/v1/models/shapes").status_code == 200, "once storage is back"
        for each in waiting:
            each.cancel()


def ask_for_files(pool: ThreadPoolExecutor, url: str, number: int, base: str) -> list[Future]:
    """Requests that read or write storage, all at once."""

    def ask(n: int) -> None:
        with httpx.Client(base_url=url, headers=HEADERS, timeout=2 * HANG_S, trust_env=False) as http:
            try:
                if n == 0:
                    http.post("/v1/models", json={"name": f"other{n}", "uri": base})
                else:
                    http.get(f"{JOBS}/ajob_0/checkpoints" if n % 2 else signed_image())
            except httpx.HTTPError:
                pass  # what becomes of them is not asked here

    return [pool.submit(ask, n) for n in range(number)]


def signed_image() -> str:
    from services.control.image_files import _signature
    from services.settings import Settings

    settings = Settings(api_key="sk-test", storage_uri="file:///x")
    name, expires = "img_" + "0" * 32, int(time.time()) + 600
    signature = _signature(settings, "default", name, expires)
    return f"/v1/images/files/{name}-0.png?project=default&expires={expires}&signature={signature}"
