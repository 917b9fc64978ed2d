"""Requests for images of a whole system, many at once, and what each image is alone."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from dde_core.config import SampleConfig
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from services.api.records import ModelRecord
from services.artifacts import models
from services.client.local import LocalSystem
from services.control.database import Database
from services.control.tables import Model

PATH = "/v1/images/generations"
TOLERANCE = 1
"""A pixel's difference, of 255, that a batch's other rows may cause by the order of float32 sums."""

FEW_STEPS = SampleConfig(steps=4)
RETRIABLE = (429, 503)


@dataclass(frozen=True)
class Wanted:
    """One image. ``folder`` and ``adapter`` are the files of ``model``."""

    model: str
    folder: Path
    adapter: Path | None = None
    prompt: str = "a large red circle"
    seed: int = 0
    sample: SampleConfig = FEW_STEPS

    def body(self, **more: Any) -> dict[str, Any]:
        sample = self.sample
        return {
            "model": self.model,
            "prompt": self.prompt,
            "seed": self.seed,
            "sampler": sample.sampler,
            "num_inference_steps": sample.steps,
            "guidance_scale": sample.guidance_scale,
            "size": f"{sample.width}x{sample.height}" if sample.width and sample.height else "auto",
            **more,
        }


def solo_images(wanted: Iterable[Wanted]) -> dict[Wanted, np.ndarray]:
    """Each image drawn in this process, without Serve and without company of other settings."""
    found: dict[Wanted, np.ndarray] = {}
    models_of: dict[tuple[Path, Path | None], TextToImage] = {}
    for each in dict.fromkeys(wanted):
        key = (each.folder, each.adapter)
        if key not in models_of:
            models_of[key] = TextToImage(ModelFolder(*key))
        found[each] = models_of[key]([each.prompt], [each.seed], each.sample)[0]
    return found


def decoded(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def distance(image: np.ndarray, alone: np.ndarray) -> int:
    """The largest difference of a pixel's channel; 255 for images of different sizes."""
    if image.shape != alone.shape:
        return 255
    return int(np.abs(image.astype(int) - alone).max())


class Senders:
    """Sends requests to a system, ``at_once`` of them at a time, and counts the answers.

    What is not an image within ``TOLERANCE`` of the solo run, nor an error that tells when to try again,
    is in ``wrong``.
    """

    def __init__(
        self, system: LocalSystem, alone: dict[Wanted, np.ndarray], keys: tuple[str, ...] = ()
    ) -> None:
        self._url = system.url
        self._keys = keys or (system.key,)
        self.alone = alone
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self.largest_distance = 0

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self._url, limits=limits, timeout=240.0, trust_env=False)

    async def send(self, client: httpx.AsyncClient, number: int, wanted: Wanted) -> httpx.Response | None:
        """Send request ``number`` and count its answer."""
        headers = {"authorization": f"Bearer {self._keys[number % len(self._keys)]}"}
        began = time.monotonic()
        try:
            answer = await client.post(PATH, json=wanted.body(), headers=headers)
        except httpx.HTTPError as error:
            self.wrong.append(f"{number}: {error!r}")
            return None
        self.seconds.append(time.monotonic() - began)
        self._count(number, wanted, answer)
        return answer

    async def send_all(self, wanted: list[Wanted], at_once: int) -> list[httpx.Response | None]:
        """Send all of them, in order."""
        free = asyncio.Semaphore(at_once)
        async with self.client() as client:

            async def one(number: int, each: Wanted) -> httpx.Response | None:
                async with free:
                    return await self.send(client, number, each)

            return await asyncio.gather(*(one(number, each) for number, each in enumerate(wanted)))

    def _count(self, number: int, wanted: Wanted, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            apart = distance(decoded(answer.json()["data"][0]["b64_json"]), self.alone[wanted])
            self.largest_distance = max(self.largest_distance, apart)
            if apart > TOLERANCE:
                self.wrong.append(f"{number}: {apart} of 255 from its solo run: {wanted}")
            self.counts["200"] += 1
            return
        code = answer.json()["error"]["code"]
        self.counts[f"{answer.status_code} {code}"] += 1
        if answer.status_code not in RETRIABLE or int(answer.headers.get("retry-after", 0)) < 1:
            self.wrong.append(f"{number}: {answer.status_code} {answer.headers} {answer.text}")


def publish_version(system: LocalSystem, record: ModelRecord) -> None:
    """Let a model's name refer to this record, as a job does that ends: it alone makes LoRA models, and
    several versions of a name.
    """
    database = Database(f"sqlite:///{system.state / 'dde.db'}")
    try:
        with database.write(alone=True) as session:
            named = (Model.project == "default") & (Model.name == record.name) & Model.current
            session.execute(update(Model).where(named).values(current=False))
            session.add(Model(**record.model_dump(), project="default", current=True))
    finally:
        database.close()
    models.publish(system.storage_uri, record)
    models.set_alias(system.storage_uri, record.name, record.id)


def metric(system: LocalSystem, name: str, **labels: str) -> float:
    """The sum of a metric of the application over its replicas; 0.0 before there is one."""
    text = httpx.get(system.ray.metrics_url, timeout=30.0, trust_env=False).raise_for_status().text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"ray_dde_serve_{name}" and labels.items() <= sample.labels.items()
    )


def until(is_true: Callable[[], bool], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < ends
        time.sleep(0.1)


def settled(read: Callable[[], float], seconds: float = 3.0) -> float:
    """The value that ``read`` returns once it has not changed for so long."""
    value, since = read(), time.monotonic()
    while time.monotonic() < since + seconds:
        time.sleep(0.2)
        now = read()
        if now != value:
            value, since = now, time.monotonic()
    return value
