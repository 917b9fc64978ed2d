"""One request for images: its model is leased, the engine draws, and the files are the answer, or events."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from dde_core.engine.contract import (
    Cancelled,
    Drawn,
    Engine,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Pixels,
    Preview,
    Started,
)
from dde_core.errors import ConfigError, NonFiniteError
from services.api.image_urls import ImageUrls
from services.api.images import (
    CompletedImage,
    ImageData,
    ImageRequest,
    ImagesResponse,
    PartialImage,
    StreamEvent,
    Usage,
)
from services.api.records import ModelRecord
from services.api.requests import DEFAULT_PROJECT
from services.errors import BadRequest, DeadlineExceeded, ServiceError, ShuttingDown
from services.serving.admission import Admission, Limits, Ticket, Work
from services.serving.contract import LoadedModels
from services.serving.encoding import encode
from services.serving.metrics import Metrics, Unmeasured
from services.serving.prompts import Reading, read
from services.stages import layout
from services.storage import files

PARAMS = {"height": "size", "width": "size", "steps": "num_inference_steps"}
"""Fields of SampleConfig that a request calls otherwise."""
log = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who sends a request: the project and the id of the API key, and the time that the request has.

    ``timeout_s`` None is the longest time.
    """

    project: str = DEFAULT_PROJECT
    key: str = ""
    timeout_s: float | None = None


class Images:
    """Answers requests for images. A task that is cancelled frees its images in the engine.

    Both methods raise BadRequest, NotFound and ServiceError as the API answers them. ``admission`` None has
    the default limits.
    """

    def __init__(
        self,
        engine: Engine,
        models: LoadedModels,
        storage_uri: str,
        admission: Admission | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._engine = engine
        self._models = models
        self._storage = storage_uri
        self._admission = admission or Admission(Limits(), engine.load)
        self._metrics: Metrics = metrics or Unmeasured()
        self._releases: set[asyncio.Task[None]] = set()

    async def answer(
        self, request: ImageRequest, caller: Caller | None = None, urls: ImageUrls | None = None
    ) -> ImagesResponse:
        """All images of a request. ``urls`` is where those of ``response_format`` "url" go."""
        request.check()
        if request.response_format == "url" and urls is None:
            message = "response_format: URLs come from the control plane; send the request there, got 'url'"
            raise BadRequest(message, param="response_format")
        caller = caller or Caller()
        with self._counted(await self._enter(request, caller)) as ticket:
            return await ticket.wait_for(self._answer(request, caller, ticket, urls))

    async def stream(
        self, request: ImageRequest, caller: Caller | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events of a request with ``stream``."""
        request.check()
        caller = caller or Caller()
        with self._counted(await self._enter(request, caller)) as ticket:
            async with aclosing(self._stream(request, caller, ticket)) as events:
                while (event := await ticket.wait_for(anext(events, None))) is not None:
                    yield event

    async def _answer(
        self, request: ImageRequest, caller: Caller, ticket: Ticket, urls: ImageUrls | None
    ) -> ImagesResponse:
        async with self._drawing(request, caller, ticket) as drawing:
            found = {event.index: event.image async for event in drawing.events if isinstance(event, Drawn)}
        images = [found[index] for index in range(request.n)]
        encoded = await asyncio.gather(*(drawing.encoded(i, image) for i, image in enumerate(images)))
        if request.response_format == "url" and urls is not None:
            data = await asyncio.to_thread(self._store, drawing, encoded, caller.project, urls)
        else:
            data = [
                ImageData(b64_json=base64.b64encode(file).decode(), seed=seed)
                for file, seed in zip(encoded, drawing.wanted.seeds, strict=True)
            ]
        return ImagesResponse(
            created=int(time.time()),
            data=data,
            quality=request.answered_quality,
            **drawing.summary(images),
        )

    async def _stream(
        self, request: ImageRequest, caller: Caller, ticket: Ticket
    ) -> AsyncGenerator[StreamEvent, None]:
        async with self._drawing(request, caller, ticket) as drawing:
            async for event in drawing.events:
                if isinstance(event, Preview):
                    shared = await drawing.event_fields(event.index, event.image)
                    yield PartialImage(partial_image_index=event.number, **shared)
                elif isinstance(event, Drawn):
                    shared = await drawing.event_fields(event.index, event.image)
                    summary = drawing.summary([event.image])
                    yield CompletedImage(seed=drawing.wanted.seeds[event.index], **(summary | shared))

    async def _enter(self, request: ImageRequest, caller: Caller) -> Ticket:
        """Room for the request. Raises BadRequest and TooManyRequests, before its model is loaded."""
        native = await self._models.native_size(caller.project, request.model)
        sample = request.sample()
        width, height = sample.width or native[0], sample.height or native[1]
        rows = 2 if sample.guidance_scale > 1 else 1
        work = Work(width=width, height=height, steps=sample.steps, rows=rows, images=request.n)
        return self._admission.enter(caller.key, work, caller.timeout_s, native)

    @contextmanager
    def _counted(self, ticket: Ticket) -> Iterator[Ticket]:
        """The accepted request, whose early end is counted: it may come before the engine has the request."""
        with ticket:
            try:
                yield ticket
            except DeadlineExceeded:
                self._metrics.cancelled("deadline")
                raise
            except (asyncio.CancelledError, GeneratorExit):
                self._metrics.cancelled("disconnected")
                raise

    @asynccontextmanager
    async def _drawing(
        self, request: ImageRequest, caller: Caller, ticket: Ticket
    ) -> AsyncIterator[_Drawing]:
        """The request in the engine's queue. It is cancelled, if it runs still, when the context is left.

        The model stays leased until the engine has reported the last event, which may be later.
        """
        async with AsyncExitStack() as stack:
            loaded = await stack.enter_async_context(self._models.lease(caller.project, request.model))
            reading = await asyncio.to_thread(read, loaded, request)
            wanted = GenerationRequest(
                prompt=request.prompt,
                seeds=request.seeds(),
                sample=request.sample(),
                negative_prompt=request.negative_prompt,
                partial_images=request.partial_images,
            )
            events = _Events(loaded.record, self._metrics)
            try:
                generation = self._engine.submit(loaded.model, wanted, events.put)
            except ConfigError as error:
                raise _refused(request, error) from error
            except Cancelled as error:
                raise _failure(loaded.record, error) from error
            ticket.submitted()
            self._release_at_end(events, stack.pop_all())
        try:
            yield _Drawing(request, loaded.record, wanted, reading, events)
        finally:
            generation.cancel()

    def _release_at_end(self, events: _Events, lease: AsyncExitStack) -> None:
        async def release() -> None:
            await events.ended.wait()
            await lease.aclose()

        task = asyncio.create_task(release())
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    def _store(
        self, drawing: _Drawing, encoded: list[bytes], project: str, urls: ImageUrls
    ) -> list[ImageData]:
        root = layout.project_root(self._storage, project)
        data = []
        for index, (file, seed) in enumerate(zip(encoded, drawing.wanted.seeds, strict=True)):
            name = urls.file_name(index, drawing.request.output_format)
            files.write_bytes(layout.generated_uri(root, urls.expires, name), file)
            data.append(ImageData(url=urls.url(name), seed=seed))
        return data


class _Events:
    """Events of one generation, from the engine's thread to the event loop that made this."""

    def __init__(self, record: ModelRecord, metrics: Metrics) -> None:
        self.ended = asyncio.Event()
        self._record = record
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Pass an event on. Called in the engine's thread; a loop that is closed has nobody who listens."""
        try:
            self._loop.call_soon_threadsafe(self._arrived, event)
        except RuntimeError:
            log.info("an event of a request came after its event loop had closed")

    def _arrived(self, event: Event) -> None:
        self._queue.put_nowait(event)
        if isinstance(event, Started):
            self._metrics.waited(event.waited_s)
        elif isinstance(event, Drawn):
            self._metrics.drawn(1)
        elif isinstance(event, Finished | Failed):
            self.ended.set()

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        """The events until the last one. Raises ServiceError if the generation fails."""
        while True:
            event = await self._queue.get()
            if isinstance(event, Finished):
                return
            if isinstance(event, Failed):
                raise _failure(self._record, event.error) from event.error
            yield event


@dataclass(frozen=True)
class _Drawing:
    """A request that the engine has taken."""

    request: ImageRequest
    record: ModelRecord
    wanted: GenerationRequest
    reading: Reading
    events: _Events = field(repr=False)

    async def encoded(self, index: int, image: Pixels) -> bytes:
        """The image's file, encoded in a thread."""
        request = self.request
        text = self._text(index, image) if request.metadata else None
        return await asyncio.to_thread(encode, image, request.output_format, request.output_compression, text)

    def _text(self, index: int, image: Pixels) -> dict[str, Any]:
        """What determines image ``index``."""
        sample = self.wanted.sample
        return {
            "model": self.record.name,
            "model_id": self.record.id,
            "model_digest": self.record.digest,
            "prompt": self.wanted.prompt,
            "negative_prompt": self.wanted.negative_prompt,
            "seed": self.wanted.seeds[index],
            "sampler": sample.sampler,
            "num_inference_steps": sample.steps,
            "guidance_scale": sample.guidance_scale,
            "size": _size(image),
        }

    async def event_fields(self, index: int, image: Pixels) -> dict[str, Any]:
        """The fields of an event with this image."""
        file = await self.encoded(index, image)
        return {
            "b64_json": base64.b64encode(file).decode(),
            "created_at": int(time.time()),
            "output_format": self.request.output_format,
            "quality": self.request.answered_quality or "auto",
            "size": _size(image),
        }

    def summary(self, images: list[Pixels]) -> dict[str, Any]:
        """What an answer says of all images, which have one size."""
        height, width = images[0].shape[:2]
        return {
            "output_format": self.request.output_format,
            "size": _size(images[0]),
            "usage": Usage.of(self.reading.tokens, len(images), height, width),
            "model": self.record.name,
            "model_id": self.record.id,
            "model_digest": self.record.digest,
            "warnings": self.reading.warnings,
        }


def _size(image: Pixels) -> str:
    height, width = image.shape[:2]
    return f"{width}x{height}"


def _refused(request: ImageRequest, error: ConfigError) -> BadRequest:
    """Settings that this model cannot draw with, by the request's field."""
    param = PARAMS.get(error.field, error.field)
    if param == "size":
        return BadRequest(f"size: {error.field} {error.reason}, got {request.size!r}", param="size")
    return BadRequest(f"{param}: {error.reason}, got {error.value!r}", param=param)


def _failure(record: ModelRecord, error: BaseException) -> ServiceError:
    """Why a generation ended without its images."""
    if isinstance(error, NonFiniteError):
        message = f"model {record.name!r} gives no images: {error}"
        return ServiceError(message, param="model", code="model_unusable")
    if isinstance(error, Cancelled):
        return ShuttingDown("the replica is shutting down; send the request again")
    return as_service_error(error)


def as_service_error(error: BaseException) -> ServiceError:
    """The error as the API answers it. One that nobody expected is logged, and answered with its cause."""
    if isinstance(error, ServiceError):
        return error
    log.error("a request failed", exc_info=error)
    first_line = (str(error).strip().splitlines() or [""])[0]
    return ServiceError(f"the request failed: {type(error).__name__}: {first_line}")
