"""Serving under kills, overload, eviction, redeployment and for long: no answer is wrong, none is missing.

Each image is compared with its solo run in this process; ``image_load.TOLERANCE`` is 1 of 255. An error must
be one that tells when to try again.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from dde_core.config import SampleConfig
from dde_core.shapes import MODEL_DIR
from services.api.records import ModelRecord
from services.api.requests import KeyCreate
from services.client.local import SERVE_CONFIG, LocalSystem, fill_serve_config, read_serve_config
from services.control.tables import new_id
from services.serving.loaded import weight_bytes
from tests.support.image_load import (
    PATH,
    TOLERANCE,
    Senders,
    Wanted,
    decoded,
    distance,
    metric,
    publish_version,
    solo_images,
    until,
)
from tests.support.open_sources import EVERYWHERE
from tests.support.tiny_folders import sd15_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SOAK_S = float(os.environ.get("SOAK_S", "600"))
SAMPLES = (
    SampleConfig(steps=2),
    SampleConfig(steps=4, guidance_scale=1.0),
    SampleConfig(steps=5, sampler="euler_a"),
    SampleConfig(steps=3, sampler="dpmpp_2m", height=48, width=32),
)


@contextmanager
def serving(folder: Path, **args: Any) -> Iterator[LocalSystem]:
    """A system of its own whose Serve application has these arguments."""
    config = read_serve_config(SERVE_CONFIG)
    (application,) = config["applications"]
    application["args"] |= args
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    with LocalSystem(folder / "state", fresh=True, allow=EVERYWHERE.allowed, serve_config=path) as system:
        yield system


def replicas(system: LocalSystem) -> list[psutil.Process]:
    """The processes of the application's replicas."""
    found = []
    for process in psutil.Process(system.ray.child.pid).children(recursive=True):
        try:
            if process.name().startswith("ray::ServeRepl") or any(
                "ServeReplica:dde" in part for part in process.cmdline()
            ):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def changed(target: Path) -> Path:
    """The shipped model with other weights."""
    shutil.copytree(MODEL_DIR, target)
    weights = target / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"] = tensors["conv_out.bias"] + np.float32(0.2)
    save_file(tensors, weights, metadata={"format": "pt"})
    return target


def test_1000_mixed_requests_with_one_of_two_replicas_killed_are_answered_right_or_told_when_to_come_again(
    tmp_path: Path,
):
    folders = {"shapes": MODEL_DIR, "random": sd15_folder(tmp_path / "random")}
    kinds = [
        Wanted(name, folder, seed=seed, sample=sample)
        for (name, folder), sample, seed in itertools.product(folders.items(), SAMPLES, range(2))
    ]
    wanted = random.Random(0).choices(kinds, k=1000)
    long = Wanted("shapes", MODEL_DIR, seed=4, sample=SampleConfig(steps=100))
    wanted[380:396] = [long] * 16  # so that both replicas have begun something when one is killed
    alone = solo_images([*kinds, long])
    with serving(tmp_path, min_replicas=2, max_replicas=2) as system:
        with system.client() as client:
            for name, folder in folders.items():
                client.create_model(name, folder.as_uri())
        warm = Senders(system, alone)
        asyncio.run(warm.send_all(kinds * 2, at_once=16))
        senders = Senders(system, alone)
        victim, other = replicas(system)

        async def kill_in_the_middle() -> None:
            while senders.counts.total() < 400:
                await asyncio.sleep(0.01)
            os.kill(victim.pid, signal.SIGKILL)

        async def run() -> None:
            killing = asyncio.create_task(kill_in_the_middle())
            await senders.send_all(wanted, at_once=32)
            await killing

        began = time.monotonic()
        asyncio.run(run())
        seconds = time.monotonic() - began
        again = (system.logs / "control.log").read_text().count("Serve answered 500")
        until(lambda: len(replicas(system)) == 2, 120)
        assert other in replicas(system)
        assert victim not in replicas(system)
        after = Senders(system, alone)
        asyncio.run(after.send_all(kinds * 2, at_once=16))
    print(
        f"\n1000 requests in {seconds:.0f} s over two replicas, one killed after 400: "
        f"{dict(senders.counts)}, {len(senders.wrong)} wrong, "
        f"largest distance to a solo run {senders.largest_distance} of 255, "
        f"slowest {max(senders.seconds):.1f} s, {again} sent again; afterwards {dict(after.counts)}"
    )
    assert senders.counts.total() == 1000
    assert not senders.wrong
    assert again > 0, "the killed replica was drawing"
    assert after.counts == {"200": 2 * len(kinds)}
    assert not after.wrong


ROOM = 3 * weight_bytes(MODEL_DIR) // 2
"""For one model."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    """One replica with room for one model and for 100 requests."""
    with serving(tmp_path_factory.mktemp("small"), max_bytes=ROOM, limits={"max_requests": 100}) as system:
        with system.client() as client:
            client.create_model("shapes", MODEL_DIR.as_uri())
        yield system


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, small: LocalSystem) -> Path:
    """A second model as large, registered as "other"."""
    folder = changed(tmp_path_factory.mktemp("other") / "model")
    with small.client() as client:
        client.create_model("other", folder.as_uri())
    return folder


def kinds_of(folders: dict[str, Path]) -> list[Wanted]:
    return [
        Wanted(name, folder, seed=3, sample=sample) for name, folder in folders.items() for sample in SAMPLES
    ]


def test_of_200_requests_at_once_those_that_find_room_wait_and_the_others_get_429(small: LocalSystem):
    wanted = [Wanted("shapes", MODEL_DIR, seed=i % 5, sample=SampleConfig(steps=10)) for i in range(200)]
    with small.client() as client:
        keys = tuple(
            client.create_key(KeyCreate(name=f"team-{i}", scopes=["generate"])).key for i in range(10)
        )
    alone = solo_images(wanted)
    warm = Senders(small, alone)
    asyncio.run(warm.send_all(wanted[:8], at_once=8))
    senders = Senders(small, alone, keys)
    began = time.monotonic()
    answers = asyncio.run(senders.send_all(wanted, at_once=200))
    seconds = time.monotonic() - began
    by_key = {
        key: Counter(each.status_code for each in answers[key::10] if each is not None) for key in range(10)
    }
    told = sorted(
        {int(each.headers["retry-after"]) for each in answers if each is not None and each.status_code == 429}
    )
    print(
        f"\n200 requests at once by 10 keys, room for 100: {dict(senders.counts)} in {seconds:.1f} s; "
        f"by key {[dict(each) for each in by_key.values()]}; Retry-After {told} s; "
        f"slowest {max(senders.seconds):.1f} s"
    )
    assert not senders.wrong
    assert senders.counts["200"] >= 100
    assert senders.counts["429 queue_full"] > 0
    assert senders.counts.total() == 200


def test_models_are_evicted_and_re_pointed_under_load_and_no_image_is_of_the_wrong_one(
    small: LocalSystem, other: Path
):
    folders = {"shapes": MODEL_DIR, "other": other}
    alone = solo_images(kinds_of(folders))
    ids: dict[str, Path] = {}
    with small.client() as client:
        for name, folder in folders.items():
            model = client.model(name)
            record = ModelRecord(
                id=new_id("model"),
                name="moving",
                uri=model.uri,
                family=model.family,
                digest=model.digest,
                created_at=1,
            )
            publish_version(small, record)
            client.promote(record.id)
            ids[record.id] = folder
    assert len({image.tobytes() for image in alone.values()}) == len(alone)
    evicted = metric(small, "model_evictions_total")
    counts: Counter[str] = Counter()

    async def draw(senders: Senders, http: httpx.AsyncClient, number: int, sample: SampleConfig) -> None:
        """By the alias: the answer names the version, and shows it."""
        wanted = Wanted("moving@production", MODEL_DIR, seed=3, sample=sample)
        bearer = {"authorization": f"Bearer {small.key}"}
        answer = await http.post(PATH, json=wanted.body(), headers=bearer)
        assert answer.status_code == 200, answer.text
        folder = ids[answer.json()["model_id"]]
        name = next(name for name, each in folders.items() if each == folder)
        expected = alone[Wanted(name, folder, seed=3, sample=sample)]
        assert distance(decoded(answer.json()["data"][0]["b64_json"]), expected) <= TOLERANCE
        counts[name] += 1

    async def re_point(http: httpx.AsyncClient) -> int:
        bearer = {"authorization": f"Bearer {small.key}"}
        for number, model_id in enumerate(itertools.cycle(ids)):
            answer = await http.post(f"/v1/models/{model_id}/promote", json={}, headers=bearer)
            assert answer.status_code == 200, answer.text
            if counts.total() + senders.counts.total() >= 240:
                return number + 1
            await asyncio.sleep(0.3)
        raise AssertionError

    senders = Senders(small, alone)

    async def run() -> int:
        free = asyncio.Semaphore(8)
        kinds = random.Random(1).choices(kinds_of(folders), k=120)
        async with senders.client() as http:

            async def one(number: int, wanted: Wanted) -> None:
                async with free:
                    await senders.send(http, number, wanted)
                    await draw(senders, http, number, wanted.sample)

            moving = asyncio.create_task(re_point(http))
            await asyncio.gather(*(one(number, wanted) for number, wanted in enumerate(kinds)))
            return await moving

    began = time.monotonic()
    moves = asyncio.run(run())
    until(lambda: metric(small, "model_evictions_total") > evicted, 30)
    print(
        f"\nroom for one of two models: {dict(senders.counts)} by name, {dict(counts)} by an alias that "
        f"moved {moves} times, {metric(small, 'model_evictions_total') - evicted:.0f} evictions, "
        f"{time.monotonic() - began:.0f} s, {len(senders.wrong)} wrong"
    )
    assert not senders.wrong
    assert senders.counts == {"200": 120}
    assert set(counts) == set(folders)


def test_a_soak_does_not_grow_the_replica(small: LocalSystem, other: Path):
    """Mixed requests, of which one in ten leaves; now and then one of the other model, which evicts."""
    folders = {"shapes": MODEL_DIR, "other": other}
    kinds = kinds_of(folders)
    senders = Senders(small, solo_images(kinds))
    (replica,) = replicas(small)
    chance = random.Random(2)
    left = 0
    resident: list[tuple[float, int]] = []
    began = time.monotonic()

    async def leave(http: httpx.AsyncClient) -> None:
        nonlocal left
        body = kinds[0].body(num_inference_steps=300, n=4)
        sending = asyncio.create_task(
            http.post(PATH, json=body, headers={"authorization": f"Bearer {small.key}"})
        )
        await asyncio.sleep(chance.uniform(0.05, 0.5))
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        left += sending.cancelled()

    async def worker(http: httpx.AsyncClient) -> None:
        while time.monotonic() < began + SOAK_S:
            if chance.random() < 0.1:
                await leave(http)
            else:
                of_one = kinds if chance.random() < 0.02 else kinds[: len(SAMPLES)]
                await senders.send(http, 0, chance.choice(of_one))

    async def watch() -> None:
        while time.monotonic() < began + SOAK_S:
            resident.append((time.monotonic() - began, replica.memory_info().rss))
            await asyncio.sleep(0.5)

    async def run() -> None:
        async with senders.client() as http:
            await asyncio.gather(watch(), *(worker(http) for _ in range(8)))

    asyncio.run(run())
    window_s = SOAK_S / 10

    def mean_mb(until_s: float) -> float:
        found = [rss for at, rss in resident if until_s - window_s < at <= until_s]
        return sum(found) / len(found) / 1e6

    middle, end = mean_mb(SOAK_S / 2), mean_mb(SOAK_S)
    points = {f"{share:.0%}": round(mean_mb(share * SOAK_S)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)}
    print(
        f"\nsoak of {SOAK_S:.0f} s: {dict(senders.counts)}, {left} left, {len(senders.wrong)} wrong; "
        f"resident MB {points}; middle {middle:.1f}, end {end:.1f}: {100 * (end / middle - 1):+.2f}%"
    )
    assert not senders.wrong
    assert left > 0
    assert replica.is_running()
    assert abs(end / middle - 1) < 0.05


def test_a_redeployment_finishes_what_runs_and_closes_the_old_replica(small: LocalSystem):
    long = [Wanted("shapes", MODEL_DIR, seed=seed, sample=SampleConfig(steps=150)) for seed in range(3)]
    short = Wanted("shapes", MODEL_DIR, sample=SampleConfig(steps=2))
    senders = Senders(small, solo_images([*long, short]))
    (old,) = replicas(small)
    config = read_serve_config(small.state.parent / "serve.yaml")
    config = fill_serve_config(config, small.serve_port, small.storage_uri)
    config["applications"][0]["args"]["limits"] = {"max_requests": 99}

    def turns() -> float:
        return metric(small, "step_seconds_count")

    async def run() -> float:
        """Seconds from the last answer of the old replica until its process had ended."""
        async with senders.client() as http:

            async def go_on() -> None:
                while replicas(small) == [old]:
                    await senders.send(http, 0, short)

            running = [asyncio.create_task(senders.send(http, i, each)) for i, each in enumerate(long)]
            while turns() == before:
                await asyncio.sleep(0.1)
            await asyncio.to_thread(small.ray.deploy, config)
            sending = asyncio.create_task(go_on())
            await asyncio.gather(*running)
            answered = time.monotonic()
            while old.is_running() and old.status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.05)
            closed = time.monotonic()
            await sending
            return closed - answered

    before = turns()
    seconds = asyncio.run(run())
    after = Senders(small, senders.alone)
    asyncio.run(after.send_all([short] * 3, at_once=1))
    print(
        f"\nredeployed: {dict(senders.counts)}; the old replica ended {seconds:.1f} s after its last answer"
    )
    (new,) = replicas(small)
    assert new.pid != old.pid
    assert not senders.wrong
    assert set(senders.counts) == {"200"}
    assert after.counts == {"200": 3}
    assert seconds < 60, "it does not wait for its longest possible request"
    (log,) = [
        text
        for path in (small.ray.session_logs / "serve").glob("replica_*.log")
        if "Drained ongoing requests" in (text := path.read_text())
    ]
    assert "Graceful shutdown complete" in log
    assert "ERROR" not in log
