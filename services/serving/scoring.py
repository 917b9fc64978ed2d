"""Scores of images: the work of POST /v1/scores."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dde_core.config import Background
from dde_core.errors import DataError, DdeError, NonFiniteError
from dde_core.scorers.kinds import KINDS, Scorer
from dde_core.shapes.scenes import SIZE_PX
from services.api.images import ScoreRequest
from services.api.records import ScorerRecord
from services.api.requests import DEFAULT_PROJECT
from services.artifacts import scorers
from services.errors import BadRequest, ServiceError, Unavailable
from services.pairs.images import BadImage, decode_whole
from services.serving.memory import LoadFailed, Memory, Wanted
from services.stages import layout


@dataclass(frozen=True)
class Scored:
    """One number per scorer and image; each scorer's description and digest."""

    scores: dict[str, list[float]]
    scorers: dict[str, dict[str, Any]]

    def answer(self) -> dict[str, Any]:
        """The API's answer: one row of scores for each image."""
        rows = zip(*self.scores.values(), strict=True)
        data = [dict(zip(self.scores, row, strict=True)) for row in rows]
        return {"object": "list", "data": data, "scorers": self.scorers}


class _Loaded:
    """A scorer in memory. Those of the shapes world take none of their own."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        model = getattr(scorer, "model", None)
        tensors = [] if model is None else [*model.parameters(), *model.buffers()]
        self.num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def close(self) -> None:
        del self.scorer


class Scoring:
    """Scores images with the registry's scorers, which share ``memory`` with the models.

    One thread scores, beside the one that draws: scorers are called one at a time.
    """

    def __init__(self, storage_uri: str, memory: Memory, device: str = "cpu") -> None:
        self._storage = storage_uri
        self._memory = memory
        self._device = device
        self._thread = ThreadPoolExecutor(1, "score")
        self._running: set[asyncio.Task[None]] = set()

    async def score(self, request: ScoreRequest, project: str = DEFAULT_PROJECT) -> Scored:
        """One number per scorer and pair of image and prompt.

        Raises BadRequest, naming the entry, NotFound for a scorer that the project does not have, Unavailable
        where storage does not answer or no room can be made, and ServiceError for a scorer that cannot be
        loaded or gives values that are not finite.
        """
        request.check_lengths()
        records, images = await asyncio.to_thread(self._read, request, project)
        found = Scored({}, {})
        has_left = threading.Event()
        for record in records:
            task = asyncio.ensure_future(self._score(record, images, request.prompts, found, has_left))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            try:
                await asyncio.shield(task)  # the scorer stays leased while the thread uses it
            except asyncio.CancelledError:
                has_left.set()
                raise
        return found

    def _read(self, request: ScoreRequest, project: str) -> tuple[list[ScorerRecord], np.ndarray]:
        """The scorers' records, and the images as uint8 [n, h, w, 3]."""
        root = layout.project_root(self._storage, project)
        records = [scorers.find(root, name) for name in request.scorers]
        for record in records:
            _check_level(record)
        images = _stack(
            [from_base64(data, f"images[{i}]", request.background) for i, data in enumerate(request.images)]
        )
        height, width = images.shape[1:3]
        has_built_in = any(KINDS[record.kind].is_built_in for record in records)
        if has_built_in and (width, height) != (SIZE_PX, SIZE_PX):
            message = f"images must be {SIZE_PX} x {SIZE_PX} px for these scorers, got {width} x {height}"
            raise BadRequest(message, param="images")
        return records, images

    async def _score(
        self,
        record: ScorerRecord,
        images: np.ndarray,
        prompts: list[str],
        found: Scored,
        has_left: threading.Event,
    ) -> None:
        """Add one scorer's numbers to ``found``; none where the caller has left."""
        async with AsyncExitStack() as stack:
            try:
                loaded = await stack.enter_async_context(self._memory.hold(_wanted(record, self._device)))
            except LoadFailed as failure:
                raise _load_error(record, failure.error) from failure
            except Unavailable as error:
                raise _unavailable(record, error) from error
            scorer = loaded.scorer
            work = partial(_scores, record, scorer, images, prompts, has_left)
            scores = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        found.scores[record.name] = scores
        found.scorers[record.name] = {**scorer.description, "digest": record.digest}


def _wanted(record: ScorerRecord, device: str) -> Wanted[_Loaded]:
    return Wanted(
        f"{record.kind} {record.resize} {record.uri} {record.processor} {record.digest}",
        "scorer",
        lambda: scorers.stored_bytes(record),
        lambda _: _Loaded(scorers.load(record, device)),
    )


def _scores(
    record: ScorerRecord,
    scorer: Scorer,
    images: np.ndarray,
    prompts: list[str],
    has_left: threading.Event,
) -> list[float]:
    if has_left.is_set():
        return []
    try:
        scores: list[float] = scorer(images, prompts).tolist()
    except DataError as error:
        raise BadRequest(str(error), param="prompts") from error
    except NonFiniteError as error:
        raise _scorer_error(record, f"gives no scores: {error}") from error
    return scores


def _check_level(record: ScorerRecord) -> None:
    """Refuse a scorer that has no number for a single image."""
    kind = KINDS[record.kind]
    if kind.level != "image":
        message = f"scorers: {record.name!r} is of kind {kind.name}, which has no number for a single image: "
        raise BadRequest(f"{message}{kind.scale}", param="scorers", code="scorer_of_sets")


def _load_error(record: ScorerRecord, error: Exception) -> ServiceError:
    if isinstance(error, Unavailable):
        return _unavailable(record, error)
    if isinstance(error, BadRequest):  # its files have changed
        return BadRequest(error.message, param=error.param, code=error.code)
    reason = str(error) if isinstance(error, DdeError) else f"{type(error).__name__}: {error}"
    return _scorer_error(record, f"cannot be loaded: {reason}")


def _scorer_error(record: ScorerRecord, reason: str) -> ServiceError:
    """An error that lies in the scorer, not in the request."""
    return ServiceError(f"scorer {record.name!r} {reason}", param="scorers", code="scorer_unusable")


def _unavailable(record: ScorerRecord, error: Unavailable) -> Unavailable:
    message = f"scorer {record.name!r} cannot be loaded now: {error}"
    return Unavailable(message, param="scorers", code=error.code)


def from_base64(data: str, field: str, background: Background = "white") -> np.ndarray:
    """A base64 image file as uint8 [h, w, 3], read as those of a dataset. Raises BadRequest, naming the
    field."""
    try:
        return decode_whole(base64.b64decode(data, validate=True), background)
    except BadImage as error:
        raise BadRequest(f"{field} cannot be scored: {error}", param=field, code=error.cause) from error
    except ValueError as error:
        raise BadRequest(f"{field} is not base64: {data[:40]!r}", param=field) from error


def _stack(images: Sequence[np.ndarray]) -> np.ndarray:
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise BadRequest(f"images must all have one size, got {sorted(shapes)}", param="images")
    return np.stack(images)
