"""More requests than there is room for: through a control plane under uvicorn to a replica's admission."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from dde_core.engine.contract import (
    Cancelled,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Load,
    Started,
)
from services.api.images import ImageRequest
from services.api.requests import KEY_HEADER, TIMEOUT_HEADER
from services.control.inference import unless_disconnected
from services.errors import ServiceError
from services.serving.admission import Admission, Limits, Ticket, Work
from tests.services.control.conftest import KEY
from tests.services.control.test_forwarding import IMAGES, control_plane
from tests.services.control.test_streams import listening

TURN_S = 0.01
IMAGE = {"model": "shapes", "prompt": "a red star", "size": "32x32", "steps": 10, "guidance_scale": 1.0}
WORK = 32 * 32 * 10
"""Pixel-steps of ``IMAGE``."""


@dataclass(eq=False)
class Paced:
    """A request of ``PacedEngine``."""

    work: float
    on_event: Callable[[Event], None]
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class PacedEngine:
    """Draws nothing, at a constant rate of work, one request after another; looks for cancels every turn."""

    def __init__(self, work_per_s: float) -> None:
        self._work_per_s = work_per_s
        self._waiting: deque[Paced] = deque()
        self._lock = threading.Lock()
        self._measured = 0.0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def submit(self, model: Any, request: GenerationRequest, on_event: Callable[[Event], None]) -> Paced:
        sample = request.sample
        pixel_steps = sample.width * sample.height * sample.steps * request.rows * len(request.seeds)
        paced = Paced(float(pixel_steps), on_event)
        with self._lock:
            self._waiting.append(paced)
        return paced

    def load(self) -> Load:
        with self._lock:
            work = sum(paced.work for paced in self._waiting)
            return Load(
                requests=len(self._waiting), samples=len(self._waiting), work=work, work_per_s=self._measured
            )

    def close(self) -> None:
        self._is_closed = True
        self._thread.join()

    def _run(self) -> None:
        looked_at = time.monotonic()
        while not self._is_closed:
            time.sleep(TURN_S)
            elapsed_s = time.monotonic() - looked_at
            looked_at += elapsed_s
            with self._lock:
                for paced in [paced for paced in self._waiting if paced.is_cancelled]:
                    self._waiting.remove(paced)
                    paced.on_event(Failed(Cancelled()))
                budget = self._work_per_s * elapsed_s
                while self._waiting and budget > 0:
                    paced = self._waiting[0]
                    done = min(budget, paced.work)
                    paced.work -= done
                    budget -= done
                    if paced.work == 0:
                        self._waiting.popleft()
                        paced.on_event(Started(0.0))
                        paced.on_event(Finished())
                        self._measured = self._work_per_s


class Replica:
    """The way of a request through a replica: admission, engine, answer."""

    def __init__(self, engine: PacedEngine, **limits: Any) -> None:
        self.engine = engine
        self.refused: Counter[str] = Counter()
        self.admission = Admission(Limits(**limits), engine.load, lambda code: self.refused.update([code]))
        self.app = FastAPI()
        self.app.add_exception_handler(ServiceError, _answer)
        self.app.add_api_route(IMAGES, self.generate, methods=["POST"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app; as by Serve, its task is cancelled when the client leaves."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = await Request(scope, receive).body()

        async def read() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        with suppress(ClientDisconnect):
            await unless_disconnected(receive, self.app(scope, read, send))

    async def generate(
        self,
        body: ImageRequest,
        key: Annotated[str, Header(alias=KEY_HEADER)],
        timeout_s: Annotated[float, Header(alias=TIMEOUT_HEADER)],
    ) -> dict[str, str]:
        sample = body.sample()
        request = GenerationRequest(prompt=body.prompt, seeds=tuple(range(body.n)), sample=sample)
        work = Work(
            width=sample.width, height=sample.height, steps=sample.steps, rows=request.rows, images=body.n
        )
        with self.admission.enter(key, work, timeout_s) as ticket:
            await ticket.wait_for(self._draw(request, ticket))
        return {"key": key}

    async def _draw(self, request: GenerationRequest, ticket: Ticket) -> None:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        running = self.engine.submit(
            None, request, lambda event: loop.call_soon_threadsafe(events.put_nowait, event)
        )
        ticket.submitted()
        try:
            while not isinstance(await events.get(), Finished):
                pass
        finally:
            running.cancel()


def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return JSONResponse(error.body(), error.status, error.headers())


@pytest.fixture
def serving(plane):
    """Starts a replica and a control plane before it: (the address, the replica)."""
    with ExitStack() as opened:

        def start(requests_per_s: float, **limits) -> tuple[str, Replica]:
            engine = PacedEngine(WORK * requests_per_s)
            opened.callback(engine.close)
            replica = Replica(engine, **limits)
            serve = opened.enter_context(listening(replica))
            return opened.enter_context(control_plane(plane, serve)), replica

        yield start


def all_at_once(url: str, sent: list[tuple[str, dict]]) -> list[httpx.Response]:
    """The answers to (key, body) each, sent together; every one within 60 s."""

    async def main() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60.0, limits=limits) as http:
            posts = [
                http.post(IMAGES, json=body, headers={"authorization": f"Bearer {key}"}) for key, body in sent
            ]
            return await asyncio.gather(*posts)

    return asyncio.run(main())


def eventually(holds: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    ends_at = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < ends_at:
        time.sleep(0.005)
    return holds()


def test_of_200_requests_at_once_each_is_drawn_or_told_when_to_come_again(serving):
    url, replica = serving(requests_per_s=5, max_requests=32, max_queued_s=6.0, key_share=1.0)
    answers = all_at_once(url, [(KEY, IMAGE)] * 200)
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 30
    assert sum(statuses.values()) == 200
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] in ("queue_full", "key_limit")
            assert int(answer.headers["retry-after"]) >= 1
    assert sum(replica.refused.values()) == statuses[429]
    assert replica.admission.accepted == 0
    assert replica.engine.load().work == 0.0


def test_a_key_that_sends_150_at_once_leaves_room_for_another(serving, plane):
    url, replica = serving(requests_per_s=20, max_requests=20, max_queued_s=20.0)
    other = plane.post("/v1/keys", {"name": "other", "project": "default"})["key"]
    greedy = threading.Thread(target=lambda: found.extend(all_at_once(url, [(KEY, IMAGE)] * 150)))
    found: list[httpx.Response] = []
    greedy.start()
    assert eventually(lambda: replica.refused["key_limit"] > 10)
    modest = all_at_once(url, [(other, IMAGE)] * 5)
    greedy.join()
    assert [answer.status_code for answer in modest] == [200] * 5
    assert {answer.json()["error"]["code"] for answer in found if answer.status_code == 429} == {"key_limit"}
    assert len({answer.json()["key"] for answer in modest} | {"operator"}) == 2


def test_whoever_comes_again_when_told_finds_room(serving):
    url, replica = serving(requests_per_s=5, max_queued_s=4.0, key_share=1.0)
    assert all_at_once(url, [(KEY, IMAGE)])[0].status_code == 200
    queue = threading.Thread(target=all_at_once, args=(url, [(KEY, {**IMAGE, "n": 8})] * 2))
    queue.start()
    assert eventually(lambda: replica.admission.accepted == 2)
    refused = all_at_once(url, [(KEY, {**IMAGE, "n": 8})])[0]
    assert refused.status_code == 429
    time.sleep(int(refused.headers["retry-after"]))
    assert all_at_once(url, [(KEY, {**IMAGE, "n": 8})])[0].status_code == 200
    queue.join()


def test_clients_that_leave_give_their_room_back(serving):
    url, replica = serving(requests_per_s=0.1, max_requests=16, key_share=1.0)

    async def leave_after_entering() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60.0) as http:
            headers = {"authorization": f"Bearer {KEY}"}
            posts = [asyncio.ensure_future(http.post(IMAGES, json=IMAGE, headers=headers)) for _ in range(16)]
            while replica.admission.accepted < 16:
                await asyncio.sleep(0.005)
            for post in posts:
                post.cancel()
            await asyncio.gather(*posts, return_exceptions=True)

    asyncio.run(leave_after_entering())
    assert eventually(lambda: replica.admission.accepted == 0 and replica.engine.load().requests == 0)


def test_a_request_that_runs_out_of_time_is_a_504_and_gives_its_room_back(serving):
    url, replica = serving(requests_per_s=0.1)
    headers = {"authorization": f"Bearer {KEY}", TIMEOUT_HEADER: "0.3"}
    answer = httpx.post(f"{url}{IMAGES}", json=IMAGE, headers=headers, timeout=30.0)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert eventually(lambda: replica.engine.load().requests == 0)
    assert replica.admission.accepted == 0


def test_work_that_no_replica_takes_is_a_400_through_the_control_plane(serving):
    url, replica = serving(requests_per_s=10, max_work_per_request=WORK * 2.0)
    answer = all_at_once(url, [(KEY, {**IMAGE, "n": 3})])[0]
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    assert replica.refused == {"too_much_work": 1}
