"""A request for images between HTTP and the engine: who holds the model, and what a cancelled task frees."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest

from dde_core.engine.contract import Finished
from services.api.images import ImageRequest
from services.errors import ServiceError
from services.serving.images import Images
from tests.services.serving.conftest import RECORD, pixels
from tests.support.fake_engine import FakeEngine, FakeModels, drawn


@pytest.fixture
def engine():
    fake = FakeEngine(paused=True)
    yield fake
    fake.close()


@pytest.fixture
def models() -> FakeModels:
    return FakeModels({("default", "shapes"): RECORD})


def request(**changes) -> ImageRequest:
    return ImageRequest(**{"model": "shapes", "prompt": "a red star", "steps": 3, **changes})


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_true():
            await asyncio.sleep(0.005)


def test_a_cancelled_task_cancels_its_images_and_keeps_the_model_until_the_engine_is_done(
    engine: FakeEngine, models: FakeModels, tmp_path
):
    async def leave_in_the_middle() -> None:
        images = Images(engine, models, str(tmp_path))
        task = asyncio.create_task(images.answer(request(n=4)))
        await until(lambda: bool(engine.generations))
        (generation,) = engine.generations
        engine.turn()
        await until(lambda: generation.steps == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert generation.cancels == 1
        assert not generation.is_over.is_set()
        assert models.leases == 1
        engine.turn()
        await until(lambda: models.leases == 0)
        assert generation.is_over.is_set()

    asyncio.run(leave_in_the_middle())


def test_a_stream_that_is_dropped_cancels_its_image(engine: FakeEngine, models: FakeModels, tmp_path):
    async def drop() -> None:
        images = Images(engine, models, str(tmp_path))
        stream = images.stream(request(stream=True, partial_images=1))
        engine.turn()
        assert (await anext(stream)).type == "image_generation.partial_image"
        assert models.leases == 1
        del stream
        await until(lambda: engine.generations[0].cancels == 1)
        engine.turn()
        await until(lambda: models.leases == 0)

    asyncio.run(drop())


def test_a_task_that_is_cancelled_while_its_model_loads_submits_nothing(
    engine: FakeEngine, models: FakeModels, tmp_path
):
    class Loading(FakeModels):
        def lease(self, project: str, name: str):
            self.leases += 1
            return Forever(self)

    class Forever:
        def __init__(self, models: FakeModels) -> None:
            self.models = models

        async def __aenter__(self):
            try:
                await asyncio.sleep(3600)
            finally:
                self.models.leases -= 1

        async def __aexit__(self, *error: object) -> None:
            raise AssertionError("it was not entered")

    async def leave() -> None:
        loading = Loading(models.records)
        task = asyncio.create_task(Images(engine, loading, str(tmp_path)).answer(request()))
        await until(lambda: loading.leases == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (loading.leases, engine.generations) == (0, [])

    asyncio.run(leave())


def test_the_model_of_a_finished_request_is_released(engine: FakeEngine, models: FakeModels, tmp_path):
    async def draw() -> None:
        images = Images(engine, models, str(tmp_path))
        engine.turn(6)
        answers = await asyncio.gather(images.answer(request(seed=1)), images.answer(request(n=2, seed=7)))
        for answer in answers:
            for image in answer.data:
                exact = drawn("a red star", image.seed, request().sample())
                np.testing.assert_array_equal(pixels(image.content), exact)
        assert [image.seed for answer in answers for image in answer.data] == [1, 7, 8]
        await until(lambda: models.leases == 0)

    asyncio.run(draw())


def test_a_failed_request_releases_its_model(engine: FakeEngine, models: FakeModels, tmp_path):
    async def fail() -> None:
        engine.failure = RuntimeError("broken")
        engine.turn()
        with pytest.raises(ServiceError, match="the request failed: RuntimeError: broken"):
            await Images(engine, models, str(tmp_path)).answer(request())
        await until(lambda: models.leases == 0)

    asyncio.run(fail())


def test_the_engine_does_not_notice_an_event_loop_that_has_closed(
    engine: FakeEngine, models: FakeModels, tmp_path
):
    async def leave() -> None:
        images = Images(engine, models, str(tmp_path))
        task = asyncio.create_task(images.answer(request()))
        await until(lambda: bool(engine.generations))
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    (generation,) = engine.generations
    engine.turn()
    assert generation.is_over.wait(10)
    generation.on_event(Finished())
