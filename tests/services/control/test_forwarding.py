"""Requests for images and scores on their way to Serve and back, over real sockets on both sides."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import closing, contextmanager

import httpx
import pytest
from starlette.requests import Request

from services.control import inference
from services.control.connections import LimitedConnection
from tests.services.control.conftest import KEY
from tests.services.control.test_streams import listening

IMAGES = "/v1/images/generations"
IMAGE = {"model": "shapes", "prompt": "a red star"}
STEP_S = 0.05
"""A step of the engine in Serve's place, which looks for a client that left before each."""
EVENTS = [f"event: image_generation.partial_image\ndata: {i}\n\n".encode() for i in range(4)]


class Upstream:
    """In Serve's place, an ASGI app: what it does is chosen by the prompt; what it saw is kept."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.left_at: list[float] = []
        self.steps: list[float] = []
        self.gone = threading.Event()
        self.pass_next = threading.Event()

    async def __call__(self, scope, receive, send) -> None:
        request = Request(scope, receive)
        body = await request.json()
        self.calls.append({"body": body, "path": scope["path"], "headers": dict(request.headers)})
        number = sum(call["body"] == body for call in self.calls)
        prompt = body["prompt"] if "prompt" in body else body["prompts"][0]
        await getattr(self, prompt.replace(" ", "_"))(number, request, send)

    async def draws(self, number, request, send) -> None:
        await reply(send, 200, {"data": []})

    async def takes_long(self, number, request, send) -> None:
        """Draws until the client leaves."""
        while not await request.is_disconnected():
            self.steps.append(time.monotonic())
            await asyncio.sleep(STEP_S)
        self.left_at.append(time.monotonic())
        self.gone.set()

    async def streams(self, number, request, send) -> None:
        """Each event waits until the test has read the one before."""
        await start(send, 200, "text/event-stream")
        for event in EVENTS:
            while not self.pass_next.is_set():
                await asyncio.sleep(0.001)
            self.pass_next.clear()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def streams_without_end(self, number, request, send) -> None:
        await start(send, 200, "text/event-stream")
        while not await request.is_disconnected():
            self.steps.append(time.monotonic())
            await send({"type": "http.response.body", "body": EVENTS[0], "more_body": True})
            await asyncio.sleep(STEP_S)
        self.left_at.append(time.monotonic())
        self.gone.set()

    async def dies_once(self, number, request, send) -> None:
        """What Serve's proxy answers for a replica that was killed."""
        await (plain(send, 500, "Internal Server Error") if number == 1 else reply(send, 200, {"data": [1]}))

    async def dies_always(self, number, request, send) -> None:
        await plain(send, 500, "Internal Server Error")

    async def breaks_off_once(self, number, request, send) -> None:
        """The connection ends in the middle of the body, or of a stream before its first event."""
        if number == 1:
            kind = "text/event-stream" if request.headers["x-request-id"] == "stream" else "application/json"
            await start(send, 200, kind)
            return
        await reply(send, 200, {"data": [1]})

    async def breaks_off_between_events(self, number, request, send) -> None:
        await start(send, 200, "text/event-stream")
        await send({"type": "http.response.body", "body": EVENTS[0], "more_body": True})
        await asyncio.sleep(0.05)

    async def breaks_off_in_an_event(self, number, request, send) -> None:
        await start(send, 200, "text/event-stream")
        await send({"type": "http.response.body", "body": EVENTS[0] + EVENTS[1][:20], "more_body": True})
        await asyncio.sleep(0.05)

    async def shuts_down_once(self, number, request, send) -> None:
        error = {"message": "bye", "type": "server_error", "param": None, "code": "shutting_down"}
        if number == 1:
            await reply(send, 503, {"error": error}, {"retry-after": "1"})
        else:
            await reply(send, 200, {"data": [1]})

    async def is_full(self, number, request, send) -> None:
        error = {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}
        await reply(send, 429, {"error": error}, {"retry-after": "7"})

    async def serve_is_full(self, number, request, send) -> None:
        """BackpressureConfig(status_code=429, retry_after_s=3)."""
        await plain(send, 429, "Request dropped due to backpressure", {"retry-after": "3"})

    async def serve_is_full_by_default(self, number, request, send) -> None:
        await plain(send, 503, "Request dropped due to backpressure")

    async def has_no_application(self, number, request, send) -> None:
        await plain(send, 404, "Path '/' not found. Ping http://.../-/routes for available routes.")

    async def timed_out(self, number, request, send) -> None:
        await plain(send, 408, "Request timed out after 1s.")

    async def has_a_bad_model(self, number, request, send) -> None:
        error = {"message": "m", "type": "server_error", "param": "model", "code": "model_unusable"}
        await reply(send, 500, {"error": error})

    async def is_out_of_time(self, number, request, send) -> None:
        error = {"message": "m", "type": "server_error", "param": None, "code": "deadline_exceeded"}
        await reply(send, 504, {"error": error}, {"x-should-retry": "false"})


async def start(send, status: int, kind: str, headers: dict[str, str] | None = None) -> None:
    fields = {"content-type": kind, **(headers or {})}
    pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})


async def reply(send, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
    await start(send, status, "application/json", headers)
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


async def plain(send, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    await start(send, status, "text/plain", headers)
    await send({"type": "http.response.body", "body": text.encode()})


@pytest.fixture
def upstream():
    return Upstream()


@pytest.fixture
def front(plane, upstream):
    """The address of a control plane under uvicorn, whose Serve is ``upstream``.

    The plane's client of Serve belongs to the loop of another thread, so this one gets its own.
    """
    with listening(upstream, lifespan="off") as serve, control_plane(plane, serve) as url:
        yield url


@contextmanager
def control_plane(plane, serve: str):
    """The plane's app on a socket, with a client of its own for Serve at this address."""
    app = plane.http.app
    before = app.state.serve

    async def with_client(scope, receive, send):
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        await receive()
        async with inference.make_client(serve) as app.state.serve:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    with listening(with_client, lifespan="on", http=LimitedConnection) as url:
        yield url
    app.state.serve = before


def post(url: str, prompt: str, headers: dict[str, str] | None = None, **fields) -> httpx.Response:
    sent = {"authorization": f"Bearer {KEY}", **(headers or {})}
    return httpx.post(
        f"{url}{IMAGES}", json={**IMAGE, "prompt": prompt, **fields}, headers=sent, timeout=30.0
    )


def leave(url: str, path: str, body: dict, upstream: Upstream) -> float:
    """Send a request and close the connection at the third step of the work. The time of leaving."""
    address = httpx.URL(url)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {address.host}\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    with closing(socket.create_connection((address.host, address.port))) as connection:
        connection.sendall(head.encode() + content)
        while len(upstream.steps) < 3:
            time.sleep(0.001)
    return time.monotonic()


def test_serve_is_told_project_key_request_and_the_time_that_is_left(front, upstream, plane):
    created = plane.post("/v1/keys", {"name": "k", "project": "default"})
    own = {"authorization": f"Bearer {created['key']}", "x-request-id": "abc", "x-request-timeout-s": "5"}
    spoofed = {"x-dde-key": "key_other", "x-dde-project": "other"}
    assert post(front, "draws", {**own, **spoofed}).status_code == 200
    assert post(front, "draws").status_code == 200
    first, second = (call["headers"] for call in upstream.calls)
    assert (first["x-dde-key"], first["x-dde-project"], first["x-request-id"]) == (
        created["id"],
        "default",
        "abc",
    )
    assert 4.0 < float(first["x-request-timeout-s"]) <= 5.0
    assert second["x-dde-key"] == "operator"
    assert 299.0 < float(second["x-request-timeout-s"]) <= 300.0


@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "inf", "1e300", "soon"])
def test_a_time_that_is_none_is_refused_and_named(front, upstream, wrong):
    answer = post(front, "draws", {"x-request-timeout-s": wrong})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-timeout-s"
    assert not upstream.calls


def test_events_pass_one_by_one_as_they_come(front, upstream):
    headers = {"authorization": f"Bearer {KEY}"}
    body = {**IMAGE, "prompt": "streams"}
    upstream.pass_next.set()
    with httpx.stream("POST", f"{front}{IMAGES}", json=body, headers=headers, timeout=10.0) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        chunks = answer.iter_raw()
        for event in EVENTS:
            assert next(chunks) == event, "the next one is not sent before this one was read"
            upstream.pass_next.set()
        assert b"".join(chunks) == b""


@pytest.mark.parametrize("path", [IMAGES, "/v1/scores"])
@pytest.mark.parametrize("prompt", ["takes long", "streams without end"])
def test_a_client_that_leaves_frees_serve_within_a_step(front, upstream, path, prompt):
    """Images and scores, before the answer and in the middle of a stream."""
    bodies = {
        IMAGES: {**IMAGE, "prompt": prompt},
        "/v1/scores": {"images": ["a"], "prompts": [prompt], "scorers": ["match"]},
    }
    left_at = leave(front, path, bodies[path], upstream)
    assert upstream.gone.wait(5.0), "Serve never saw that the client left"
    assert sum(step > left_at for step in upstream.steps) <= 1
    assert len(upstream.calls) == 1
    assert post(front, "draws").status_code == 200


def test_a_request_whose_replica_died_is_sent_once_more(front, upstream):
    answer = post(front, "dies once")
    assert (answer.status_code, answer.json()) == (200, {"data": [1]})
    assert len(upstream.calls) == 2
    assert upstream.calls[0]["body"] == upstream.calls[1]["body"]
    left = [float(call["headers"]["x-request-timeout-s"]) for call in upstream.calls]
    assert left[1] < left[0], "the second try has what is left of the request's time"


def test_after_a_second_death_the_answer_is_a_503_worth_a_retry(front, upstream, caplog):
    answer = post(front, "dies always")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "retry"
    assert int(answer.headers["retry-after"]) >= 1
    assert len(upstream.calls) == 2
    assert "Serve answered 500: Internal Server Error" in caplog.text


@pytest.mark.parametrize("request_id", ["whole", "stream"])
def test_an_answer_that_breaks_off_before_its_first_byte_is_asked_for_again(front, upstream, request_id):
    answer = post(front, "breaks off once", {"x-request-id": request_id})
    assert (answer.status_code, answer.json()) == (200, {"data": [1]})
    assert len(upstream.calls) == 2


def test_a_stream_that_has_begun_is_not_repeated_and_ends_with_an_error_event(front, upstream):
    answer = post(front, "breaks off between events")
    assert answer.status_code == 200
    first, failure = answer.text.strip().split("\n\n")
    assert first.encode() + b"\n\n" == EVENTS[0]
    name, data = failure.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "retry"
    assert len(upstream.calls) == 1


def test_a_stream_that_breaks_off_in_an_event_breaks_off_for_the_client_too(front, upstream):
    with pytest.raises(httpx.RemoteProtocolError):
        post(front, "breaks off in an event")
    assert len(upstream.calls) == 1


def test_what_a_replica_hands_back_when_it_stops_is_sent_to_another(front, upstream):
    answer = post(front, "shuts down once")
    assert (answer.status_code, answer.json()) == (200, {"data": [1]})


@pytest.mark.parametrize(
    ("prompt", "status", "code", "retry_after"),
    [
        ("is full", 429, "queue_full", "7"),
        ("serve is full", 429, "queue_full", "3"),
        ("serve is full by default", 503, "unavailable", "2"),
        ("has no application", 503, "unavailable", "2"),
        ("timed out", 504, "deadline_exceeded", None),
        ("is out of time", 504, "deadline_exceeded", None),
        ("has a bad model", 500, "model_unusable", None),
    ],
)
def test_refusals_of_serve_and_of_the_replica_have_one_form(
    front, upstream, prompt, status, code, retry_after
):
    answer = post(front, prompt)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], answer.headers.get("retry-after")) == (code, retry_after)
    assert answer.headers.get("x-should-retry") == ("false" if status == 504 else None)
    assert len(upstream.calls) == 1, "only a death is worth a second try at once"


def test_serve_has_until_the_deadline_and_a_margin(front, upstream, monkeypatch):
    monkeypatch.setattr(inference, "MARGIN_S", 0.2)
    began = time.monotonic()
    answer = post(front, "takes long", {"x-request-timeout-s": "0.3"})
    assert 0.4 < time.monotonic() - began < 2.0
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert "0.3 s" in answer.json()["error"]["message"]
    assert upstream.gone.wait(5.0), "Serve's work goes on for nobody"


def test_without_serve_the_answer_is_a_503_with_a_time_to_retry(plane):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with control_plane(plane, f"http://127.0.0.1:{port}") as url:
        answer = post(url, "draws")
    assert answer.status_code == 503
    assert answer.json()["error"]["message"].startswith("Serve does not answer:")
    assert int(answer.headers["retry-after"]) >= 1
