"""An engine without torch, and models that are not loaded: for what lies between HTTP and the engine.

Its images are a function of prompt, seed and settings, as a real engine's are.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dde_core.config import SampleConfig
from dde_core.engine.contract import (
    Cancelled,
    Drawn,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Load,
    Pixels,
    Preview,
    Started,
)
from dde_core.errors import ConfigError
from dde_core.models.tokens import count_tokens, load_tokenizers
from services.api.records import ModelRecord
from services.artifacts import models
from services.errors import NotFound

OWN_SIZE_PX = 32


def drawn(prompt: str, seed: int, sample: SampleConfig, negative_prompt: str = "", step: int = 0) -> Pixels:
    """The fake's image; ``step`` above 0 is a preview."""
    height = sample.height or OWN_SIZE_PX
    width = sample.width or OWN_SIZE_PX
    settings = (prompt, seed, sample.sampler, sample.steps, sample.guidance_scale, negative_prompt, step)
    digest = hashlib.sha256(repr(settings).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8]))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@dataclass
class FakeGeneration:
    """A request of the fake; ``cancels`` counts the calls, ``steps`` those that were taken."""

    model: Any
    request: GenerationRequest
    on_event: Callable[[Event], None]
    cancels: int = 0
    steps: int = 0
    is_over: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancels += 1


class FakeEngine:
    """Draws the requests in order, in a thread of its own, one step a turn.

    While ``paused``, each call of ``turn`` allows one more step. With ``failure`` the request that draws, or
    the next one, fails at its next step.
    """

    def __init__(self, *, paused: bool = False) -> None:
        self.generations: list[FakeGeneration] = []
        self.failure: BaseException | None = None
        self._allowed = threading.Semaphore(0)
        self._paused = paused
        self._queue: queue.Queue[FakeGeneration | None] = queue.Queue()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    def turn(self, steps: int = 1) -> None:
        """Let a paused engine take this many steps."""
        self._allowed.release(steps)

    def submit(
        self, model: Any, request: GenerationRequest, on_event: Callable[[Event], None]
    ) -> FakeGeneration:
        for name in ("height", "width"):
            if getattr(request.sample, name) % 16:
                reason = "must be a multiple of 16 for this model"
                raise ConfigError(name, getattr(request.sample, name), reason)
        generation = FakeGeneration(model, request, on_event)
        self.generations.append(generation)
        self._queue.put(generation)
        return generation

    def load(self) -> Load:
        waiting = [each for each in self.generations if not each.is_over.is_set()]
        return Load(
            requests=len(waiting),
            samples=sum(len(g.request.seeds) for g in waiting),
            work=0.0,
            work_per_s=0.0,
        )

    def close(self) -> None:
        self._is_closing = True
        self._queue.put(None)
        self._allowed.release(len(self.generations) + 1)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while (generation := self._queue.get()) is not None:
            last = self._draw(generation)
            generation.is_over.set()
            generation.on_event(last)

    def _draw(self, generation: FakeGeneration) -> Event:
        """Draw a request. Returns its last event."""
        request = generation.request
        generation.on_event(Started(0.0))
        steps = request.sample.steps
        shown = {steps * (i + 1) // (request.partial_images + 1): i for i in range(request.partial_images)}
        for step in range(1, steps + 1):
            if self._paused:
                self._allowed.acquire()
            if generation.cancels or self._is_closing:
                return Failed(Cancelled())
            if self.failure is not None:
                failure = self.failure
                self.failure = None
                return Failed(failure)
            generation.steps = step
            if step in shown:
                for index, seed in enumerate(request.seeds):
                    image = drawn(request.prompt, seed, request.sample, request.negative_prompt, step)
                    generation.on_event(Preview(index, shown[step], image))
        for index, seed in reversed(list(enumerate(request.seeds))):
            image = drawn(request.prompt, seed, request.sample, request.negative_prompt)
            generation.on_event(Drawn(index, image))
        return Finished()


@dataclass(frozen=True)
class FakeLoaded:
    """Reads prompts by the tokenizers of the record's folder."""

    record: ModelRecord
    model: str

    @property
    def _folder(self) -> Path:
        return models.fetch(self.record)[0]

    @property
    def has_safety_checker(self) -> bool:
        return (self._folder / "safety_checker").is_dir()

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        return count_tokens(load_tokenizers(self._folder, self.record.family), prompt)


NATIVE_PX = 512


class FakeModels:
    """Models by project and name. ``leases`` counts those that are held now."""

    def __init__(self, records: dict[tuple[str, str], ModelRecord]) -> None:
        self.records = records
        self.leases = 0

    async def native_size(self, project: str, name: str) -> tuple[int, int]:
        self._find(project, name)
        return NATIVE_PX, NATIVE_PX

    def _find(self, project: str, name: str) -> ModelRecord:
        record = self.records.get((project, name))
        if record is None:
            raise NotFound(f"model {name!r} does not exist", param="model", code="model_not_found")
        return record

    @asynccontextmanager
    async def lease(self, project: str, name: str) -> AsyncIterator[FakeLoaded]:
        record = self._find(project, name)
        self.leases += 1
        try:
            yield FakeLoaded(record, record.id)
        finally:
            self.leases -= 1
