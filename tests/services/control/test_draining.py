"""A replica that is asked to end, as a process: it finishes what it has, and nobody notices a rollout."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import psycopg
import pytest
from starlette.requests import Request

from tests.services.control.conftest import write_base, write_pairs
from tests.services.control.test_streams import listening
from tests.support.control_process import HEADERS, ControlProcess, RoundRobin, command

JOBS = "/v1/alignment/jobs"
IMAGES = "/v1/images/generations"
EVENT = b'event: image_generation.partial_image\ndata: {"n": %d}\n\n'


class Draws:
    """In Serve's place: takes as many seconds as the seed says, or streams ten events in them."""

    def __init__(self) -> None:
        self.begun = 0
        self.url = ""

    async def __call__(self, scope, receive, send) -> None:
        body = await Request(scope, receive).json() if scope["method"] == "POST" else {}
        self.begun += bool(body)
        seconds = body.get("seed", 0)
        kind = b"text/event-stream" if body.get("stream") else b"application/json"
        if not body.get("stream"):
            await asyncio.sleep(seconds)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if not body.get("stream"):
            answer = json.dumps({"data": [], "seed": seconds}).encode()
            await send({"type": "http.response.body", "body": answer})
            return
        for number in range(10):
            await asyncio.sleep(seconds / 10)
            await send({"type": "http.response.body", "body": EVENT % number, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def wait_for(self, number: int) -> None:
        """Wait until as many requests have come."""
        while self.begun < number:
            time.sleep(0.01)


@pytest.fixture
def serve():
    draws = Draws()
    with listening(draws, lifespan="off") as draws.url:
        yield draws


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers=HEADERS, timeout=60.0, trust_env=False)


def register(url: str, tmp_path) -> dict:
    """A model and a dataset. Returns the body of a job on them."""
    (tmp_path / "prompts.txt").write_text("a red cross\na blue circle\n")
    with client(url) as http:
        model = {"name": "shapes", "uri": write_base(tmp_path / "base")}
        http.post("/v1/models", json=model).raise_for_status()
        pairs = {"name": "pairs", "uri": write_pairs(tmp_path / "pairs")}
        dataset = http.post("/v1/datasets", json=pairs).raise_for_status().json()["id"]
    evaluation = {"prompts_uri": str(tmp_path / "prompts.txt"), "num_prompts": 2}
    training = {"steps": 2, "batch_size": 4}
    return {"model": "shapes", "dataset": dataset, "training": training, "evaluation": evaluation}


def image(seconds: float, **fields) -> dict:
    return {"model": "shapes", "prompt": "a red star", "seed": seconds, **fields}


def test_a_replica_that_ends_finishes_its_requests_hands_its_streams_on_and_exits_with_0(
    tmp_path, sqlite_url, serve
):
    options = {"SERVE_URL": serve.url, "DRAIN_NOTICE_S": "6", "DRAIN_S": "60"}
    with ControlProcess(tmp_path, sqlite_url, **options) as control, ThreadPoolExecutor(4) as pool:
        job = register(control.url, tmp_path)
        with client(control.url) as http:
            run = http.post(JOBS, json=job).raise_for_status().json()["id"]
            accept = {"accept": "text/event-stream"}
            generation = pool.submit(
                httpx.post, control.url + IMAGES, json=image(8), headers=HEADERS, timeout=60
            )
            drawing = pool.submit(
                httpx.post, control.url + IMAGES, json=image(8, stream=True), headers=HEADERS, timeout=60
            )
            with http.stream("GET", f"{JOBS}/{run}/events", headers=accept) as events:
                seen = events.iter_text()
                first = next(seen)
                serve.wait_for(2)
                control.terminate()
                report = control.wait_for(lambda report: report["draining"], 5)
                assert report["status"] == "not ready"
                assert control.readiness()[0] == 503
                late = httpx.get(f"{control.url}/v1/models", headers=HEADERS)
                assert (late.status_code, late.headers["connection"]) == (200, "close")
                last = first + "".join(seen)
        assert last.endswith("retry: 500\n\n"), "a browser reconnects by itself then"
        assert generation.result().json() == {"data": [], "seed": 8}
        assert drawing.result().content == b"".join(EVENT % number for number in range(10))
        assert control.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            control.readiness()
    assert "Traceback" not in control.log
    number = last.split("id: ")[-1].split("\n")[0]
    with ControlProcess(tmp_path, sqlite_url) as control, client(control.url) as http:
        later = {"accept": "text/event-stream", "last-event-id": number}
        with http.stream("GET", f"{JOBS}/{run}/events", headers=later) as events:
            http.post(f"{JOBS}/{run}/cancel").raise_for_status()
            rest = ""
            for text in events.iter_text():
                rest += text
                if "cancel requested" in rest:
                    break
    assert "cancel requested" in rest
    assert "created: " not in rest, "it goes on after the last event that the client has"


def test_what_does_not_end_within_the_drain_is_told_to_be_sent_again(tmp_path, sqlite_url, serve):
    with ControlProcess(tmp_path, sqlite_url, SERVE_URL=serve.url, DRAIN_S="1") as control:
        register(control.url, tmp_path)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, control.url + IMAGES, json=image(50), headers=HEADERS, timeout=60)
            serve.wait_for(1)
            began_s = time.monotonic()
            control.terminate()
            answer = asked.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "retry")
        assert answer.headers["retry-after"] == "2"
        assert control.process.wait(30) == 0
        assert time.monotonic() - began_s < 20
    assert "Traceback" not in control.log


class Load:
    """Clients that send one request after the other until report to stop; what was not 200 is kept."""

    def __init__(self, url: str, job: dict) -> None:
        self.url = url
        self.job = job
        self.sent: Counter[str] = Counter()
        self.failed: list[str] = []
        self.jobs: list[str] = []
        self.over = threading.Event()

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(6)
        kinds = (self.read, self.read, self.submit, self.draw, self.draw, self.stream)
        self._running = [self._pool.submit(self._repeat, kind) for kind in kinds]
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        for each in self._running:
            each.result(120)
        self._pool.shutdown()

    def _repeat(self, send) -> None:
        with client(self.url) as http:
            while not self.over.is_set():
                try:
                    problem = send(http)
                except httpx.HTTPError as error:
                    problem = repr(error)
                self.sent[send.__name__] += 1
                if problem:
                    self.failed.append(f"{send.__name__}: {problem}")

    def read(self, http: httpx.Client) -> str | None:
        return _problem(http.get(JOBS, params={"limit": 5}))

    def submit(self, http: httpx.Client) -> str | None:
        answer = http.post(JOBS, json=self.job, headers={"idempotency-key": uuid.uuid4().hex})
        if answer.is_success:
            self.jobs.append(answer.json()["id"])
        time.sleep(0.2)
        return _problem(answer)

    def draw(self, http: httpx.Client) -> str | None:
        return _problem(http.post(IMAGES, json=image(1)))

    def stream(self, http: httpx.Client) -> str | None:
        answer = http.post(IMAGES, json=image(2, stream=True))
        whole = answer.content == b"".join(EVENT % number for number in range(10))
        return _problem(answer) or (None if whole else f"a part of a stream: {answer.content!r}")


def _problem(answer: httpx.Response) -> str | None:
    return None if answer.is_success else f"{answer.status_code} {answer.text}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_request_fails_while_two_replicas_on_postgresql_are_replaced_one_by_one(tmp_path, postgres, serve):
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = f"{postgres}/{name}"
    assert command(tmp_path, url, "migrate").returncode == 0
    options = {"SERVE_URL": serve.url, "MIGRATE": "false", "DRAIN_NOTICE_S": "5", "DRAIN_S": "60"}
    with ExitStack() as undo:
        start = lambda: undo.enter_context(ControlProcess(tmp_path, url, **options))  # noqa: E731
        proxy = undo.enter_context(RoundRobin())
        old = [start(), start()]
        proxy.replicas = [each.url for each in old]
        job = register(old[0].url, tmp_path)
        while len(proxy.ready) < 2:
            time.sleep(0.05)
        with Load(proxy.url, job) as load:
            time.sleep(3.0)
            for each in old:
                proxy.replicas = [*proxy.replicas, start().url]
                each.terminate()
                assert each.process.wait(90) == 0, each.log
            time.sleep(3.0)
        assert (load.failed, proxy.failures) == ([], [])
        new = set(proxy.replicas) - {each.url for each in old}
        assert all(proxy.served[url] > 5 for url in proxy.replicas), proxy.served
        print(f"sent {dict(load.sent)}, failed 0; served by old and new: {dict(proxy.served)}")
        assert len(new) == 2
        with client(proxy.url) as http:
            known = {row["id"] for row in http.get(JOBS, params={"limit": 100}).json()["data"]}
            missing = [each for each in load.jobs[-50:] if each not in known]
        assert missing == []
        assert load.sent["submit"] == len(load.jobs)
