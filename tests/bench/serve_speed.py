"""What does serving the shapes model cost against diffusers' pipeline: the engine alone, and over HTTP?

Every side computes on one thread. The engine in process is measured in CPU seconds of this process, in which
nothing else works, so other programs do not count. What goes over HTTP is measured in wall time.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import torch

from dde_core.config import SampleConfig
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR
from services.api.images import ImageRequest
from services.client.api import Client
from services.client.local import LocalSystem
from tests.bench.measure import Result, in_turn, ratio, result
from tests.bench.serving import PROMPT, Serving, load_adapters

CLIENTS = 16
EQUAL = SampleConfig(steps=20, guidance_scale=5.0)
MIXED = [
    SampleConfig(steps=steps, guidance_scale=guidance)
    for steps, guidance in ((16, 3.0), (24, 7.0), (18, 5.0), (22, 4.0))
]
"""Together they are as much work as equal ones."""
WHAT = f"shapes, 32 px, {EQUAL.steps} steps"
MIX = "shapes, 32 px, 16 to 24 steps, guidance 3 to 7"
CPU = "CPU seconds of this process"
PAIRS = 25
"""Lonely requests of each side: short measurements in turn meet the same machine."""
ONE_STEP = SampleConfig(steps=1, guidance_scale=5.0)
RANK = 8
KEYS = ("a", "b", "c")
OVERLOAD = 3.0
OVERLOAD_S = 20.0


def serve_in_process(scratch: Path, rounds: int = 7) -> dict[str, Result]:
    """The engine against the pipeline of the same modules.

    ``serve_vs_sequential``: 16 mixed requests at once, against the pipeline one by one, and against its batch
    of 16 equal ones. ``serve_vs_request_batching``: against a server that batches whole requests, of equal
    settings each. ``serve_lonely_overhead``: seconds of one request over those of the pipeline.
    ``serve_three_adapters``: requests for three LoRA models at once against those for one, and for the base.
    """
    torch.set_num_threads(1)
    serving = Serving(ModelFolder(MODEL_DIR), torch.device("cpu"), EQUAL, time.process_time)
    load_adapters(serving.base, scratch, KEYS, RANK)
    equal = [EQUAL] * CLIENTS
    mixed = MIXED * (CLIENTS // len(MIXED))
    sides: dict[str, Callable[[], float]] = {
        "engine, mixed": lambda: serving.by_engine(mixed),
        "one by one": lambda: serving.one_by_one(MIXED),
        "groups": lambda: serving.in_groups(mixed),
        "engine, equal": lambda: serving.by_engine(equal),
        "batch": lambda: serving.in_batch(CLIENTS),
        "three adapters": lambda: serving.by_engine(equal, KEYS),
        "one adapter": lambda: serving.by_engine(equal, KEYS[:1]),
    }
    for side in sides.values():
        side()
    found = in_turn(rounds, sides)
    lonely = {
        "engine": lambda: 1 / serving.by_engine([EQUAL]),
        "pipeline": lambda: 1 / serving.one_by_one([EQUAL]),
    }
    alone = in_turn(PAIRS, lonely)
    serving.engine.close()
    rate = f"images/s by {CPU}"
    groups = f"pipeline, one call for each of the {len(MIXED)} settings, {MIX}"
    one = f"all {CLIENTS} requests for one, LoRA of rank {RANK}, {WHAT}"
    return {
        "serve_vs_sequential": ratio(
            found, "engine, mixed", "one by one", rate, f"pipeline one by one, {MIX}"
        ),
        "serve_vs_sequential, batch": ratio(
            found, "engine, mixed", "batch", rate, f"pipeline, one batch of {CLIENTS} equal requests, {WHAT}"
        ),
        "serve_vs_request_batching": ratio(
            found, "engine, equal", "batch", rate, f"pipeline, one batch of {CLIENTS}, {WHAT}"
        ),
        "serve_vs_request_batching, mixed": ratio(found, "engine, mixed", "groups", rate, groups),
        "serve_lonely_overhead": ratio(
            alone, "engine", "pipeline", f"s by {CPU}", f"pipeline, one image, {WHAT}"
        ),
        "serve_three_adapters": ratio(found, "three adapters", "one adapter", rate, one),
        "serve_three_adapters, base": ratio(
            found, "three adapters", "engine, equal", rate, f"no adapters, {WHAT}"
        ),
    }


def serve_over_http(scratch: Path, rounds: int = 5) -> dict[str, Result]:
    """The whole system on this machine against the pipeline in this process.

    ``serve_http_vs_sequential``: 16 clients at once through control plane and Ray Serve, by wall time, and
    by CPU seconds of the replica against those of the pipeline. ``serve_lonely_overhead_ms``: median of a
    single request less that of the engine in process. ``serve_overload_p99_s``: of the requests that were
    answered, while they come at three times the measured rate.
    """
    torch.set_num_threads(1)
    serving = Serving(ModelFolder(MODEL_DIR), torch.device("cpu"), EQUAL)
    with LocalSystem(scratch / "system", allow=[str(MODEL_DIR)]) as system:
        http = Http(system)
        http.at_once()
        serving.one_by_one(MIXED)
        serving.draw([EQUAL])
        images_per_cpu_s: dict[str, list[float]] = {"HTTP": [], "one by one": []}

        def over_http() -> float:
            before = http.replica_cpu_s()
            rate = http.at_once()
            images_per_cpu_s["HTTP"].append(CLIENTS / (http.replica_cpu_s() - before))
            return rate

        def one_by_one() -> float:
            before = time.process_time()
            rate = serving.one_by_one(MIXED)
            images_per_cpu_s["one by one"].append(len(MIXED) / (time.process_time() - before))
            return rate

        found = in_turn(rounds, {"HTTP": over_http, "one by one": one_by_one})
        alone = {sample: in_turn(PAIRS, http.lonely(serving, sample)) for sample in (EQUAL, ONE_STEP)}
        answers = http.overload(OVERLOAD * statistics.median(found["HTTP"]))
    serving.engine.close()
    against = f"pipeline one by one in this process, {CLIENTS} clients, {MIX}"
    by_cpu = "images/s by CPU seconds of the process that draws"
    return {
        "serve_http_vs_sequential": ratio(found, "HTTP", "one by one", "images/s", against),
        "serve_http_vs_sequential, CPU": ratio(images_per_cpu_s, "HTTP", "one by one", by_cpu, against),
        "serve_lonely_overhead_ms": added(alone[EQUAL], EQUAL.steps),
        "serve_lonely_overhead_ms, one step": added(alone[ONE_STEP], ONE_STEP.steps),
        "serve_overload_p99_s": answers,
    }


def added(alone: dict[str, list[float]], steps: int) -> Result:
    """What HTTP adds to the median of a lonely request."""
    over_http, engine = (1e3 * statistics.median(alone[side]) for side in ("HTTP", "engine"))
    what = (
        f"engine in process, shapes, 32 px, steps {steps}: p50 {engine:.4g} ms; over HTTP {over_http:.4g} ms"
    )
    text = f"{what}; {len(alone['HTTP'])} requests each, in turn"
    return result(over_http / engine, over_http - engine, "ms more", text)


class Http:
    """Clients of a running system, in which the shapes model is registered."""

    def __init__(self, system: LocalSystem) -> None:
        self._system = system
        with system.client() as client:
            client.create_model("shapes", MODEL_DIR.as_uri())
            client.generate(request_of(EQUAL, seed=0))
        workers = psutil.Process(system.ray.child.pid).children(recursive=True)
        self._replica = next(worker for worker in workers if "ServeReplica" in title(worker))
        for worker in workers:  # Ray's workers give way to every other process; no side may
            with suppress(psutil.Error):
                worker.nice(psutil.Process().nice())

    def replica_cpu_s(self) -> float:
        """CPU seconds of the replica so far."""
        times = self._replica.cpu_times()
        return float(times.user + times.system)

    def at_once(self) -> float:
        """Images/s of 16 clients with mixed requests at once."""
        with self._clients(CLIENTS) as clients, ThreadPoolExecutor(CLIENTS) as pool:
            requests = [request_of(MIXED[i % len(MIXED)], seed=i) for i in range(CLIENTS)]
            began = time.monotonic()
            answers = list(pool.map(lambda client, request: client.generate(request), clients, requests))
            seconds = time.monotonic() - began
        assert all(len(answer.data) == 1 for answer in answers)
        return CLIENTS / seconds

    def lonely(self, serving: Serving, sample: SampleConfig) -> dict[str, Callable[[], float]]:
        """Sides that return the seconds of one request, here and on a connection that is open."""

        def over_http() -> float:
            with self._clients(1) as (client,):
                began = time.monotonic()
                client.generate(request_of(sample, seed=0))
                return time.monotonic() - began

        return {"HTTP": over_http, "engine": lambda: 1 / serving.by_engine([sample])}

    @contextmanager
    def _clients(self, number: int) -> Iterator[list[Client]]:
        """Clients that try once and have a connection open."""
        clients = [Client(self._system.url, self._system.key, retries=0) for _ in range(number)]
        try:
            for client in clients:
                assert client.ready()
            yield clients
        finally:
            for client in clients:
                client.close()

    def overload(self, rate: float) -> Result:
        """Requests at so many a second, whether or not those before are answered."""
        answers = asyncio.run(self._at_rate(rate))
        seconds = [taken for status, taken in answers if status == httpx.codes.OK]
        counts = Counter(status for status, _ in answers)
        statuses = ", ".join(f"{counts[status]} x {status}" for status in sorted(counts))
        refusals = [taken for status, taken in answers if status == httpx.codes.TOO_MANY_REQUESTS]
        text = f"{len(answers)} equal requests, {rate:.3g}/s for {OVERLOAD_S:g} s, one API key: {statuses}"
        text += f"; p50 {statistics.median(seconds):.3g} s"
        if refusals:
            text += f"; of 429 p50 {statistics.median(refusals):.3g} s, p99 {percentile(refusals, 99):.3g} s"
        return result(None, percentile(seconds, 99), "s, p99 of status 200", text)

    async def _at_rate(self, rate: float) -> list[tuple[int, float]]:
        """Status and seconds of each request."""
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {self._system.key}"}
        async with httpx.AsyncClient(
            base_url=self._system.url, headers=headers, timeout=120, limits=limits, trust_env=False
        ) as client:
            began = time.monotonic()
            running = []
            for i in range(int(rate * OVERLOAD_S)):
                await asyncio.sleep(began + i / rate - time.monotonic())
                running.append(asyncio.create_task(post(client, request_of(EQUAL, seed=i))))
            return list(await asyncio.gather(*running))


async def post(client: httpx.AsyncClient, request: ImageRequest) -> tuple[int, float]:
    """Status and seconds of a request; status 0 if the connection broke."""
    began = time.monotonic()
    try:
        answer = await client.post(
            "/v1/images/generations", json=request.model_dump(mode="json", exclude_unset=True)
        )
    except httpx.TransportError:
        return 0, time.monotonic() - began
    return answer.status_code, time.monotonic() - began


def request_of(sample: SampleConfig, seed: int) -> ImageRequest:
    """A request for one image of the registered model."""
    return ImageRequest(
        model="shapes",
        prompt=PROMPT,
        seed=seed,
        num_inference_steps=sample.steps,
        guidance_scale=sample.guidance_scale,
    )


def percentile(seconds: Sequence[float], percent: int) -> float:
    """Of two values or more."""
    return statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]


def title(process: psutil.Process) -> str:
    """How a process calls itself; "" if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
