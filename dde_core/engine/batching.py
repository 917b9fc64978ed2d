"""The engine: requests from any thread, one U-Net call after another in its own thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from dde_core.engine.batch_size import BatchSizes
from dde_core.engine.contract import (
    Cancelled,
    Drawn,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Load,
    Preview,
    Started,
    Turn,
)
from dde_core.engine.model import BaseModel, Model, are_finite, to_pixels
from dde_core.engine.order import choose, due_of
from dde_core.engine.sample import Sample, start
from dde_core.engine.turn import advance
from dde_core.errors import NonFiniteError

RATE_TURNS = 64
"""The rate of work is measured over so many turns of which each was half full, or left others waiting."""

STARTED_BYTES = 1 << 30
"""Latents and conditioning of all started samples together."""

log = logging.getLogger("dde.engine")


@dataclass(eq=False)
class Running:
    """A submitted request: a ``Generation``."""

    engine: StepEngine
    model: Model
    request: GenerationRequest
    on_event: Callable[[Event], None]
    size_px: tuple[int, int]
    due: float
    submitted: float
    is_started: bool = False
    is_cancelled: bool = False
    is_over: bool = False
    members: list[Member] = field(default_factory=list)

    def cancel(self) -> None:
        """See ``contract.Generation``."""
        self.engine.cancel(self)


@dataclass(eq=False)
class Member:
    """One image of a request; ``sample`` is None until its first turn."""

    of: Running
    index: int
    sample: Sample | None = None
    previews: int = 0
    is_drawn: bool = False

    @property
    def group(self) -> Hashable:
        return (id(self.of.model.base), self.of.size_px)

    @property
    def due(self) -> float:
        return self.of.due

    @property
    def rows(self) -> int:
        return self.of.request.rows

    @property
    def steps_left(self) -> int:
        if self.sample is None:
            return self.of.request.sample.steps
        return len(self.sample.timesteps) - self.sample.steps_done

    @property
    def work_left(self) -> float:
        """In pixel-steps."""
        return _pixels(self.of.size_px) * self.rows * self.steps_left


class StepEngine:
    """An ``Engine`` on one device. All models are called in its thread alone.

    ``on_turn`` is called after each U-Net call, in that thread. ``sizes`` says how many rows a call may have.
    """

    def __init__(
        self,
        sizes: BatchSizes | None = None,
        on_turn: Callable[[Turn], None] = lambda turn: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sizes = sizes or BatchSizes()
        self._on_turn = on_turn
        self._clock_s = clock
        self._changed = threading.Condition()
        self._waiting: list[Member] = []
        """All images that are not drawn, in order of arrival. Guarded by ``_changed``."""
        self._to_prepare: list[tuple[BaseModel, Future[None]]] = []
        self._work_done = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=RATE_TURNS)
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, model: Model, request: GenerationRequest, on_event: Callable[[Event], None]) -> Running:
        """See ``contract.Engine``."""
        size_px = model.base.size_of(request.sample)
        model.base.scheduler(request.sample)
        work = _pixels(size_px) * request.rows * request.sample.steps * len(request.seeds)
        with self._changed:
            if self._is_closed:
                raise Cancelled("the engine is closed")
            running = Running(
                self, model, request, on_event, size_px, due_of(self._work_done, work), self._clock_s()
            )
            running.members = [Member(running, i) for i in range(len(request.seeds))]
            self._waiting += running.members
            self._changed.notify()
        return running

    def prepare(self, base: BaseModel) -> None:
        """Measure, between two turns, how many rows a call of the base's own size may have, and wait for it.

        Other sizes are measured at their first request. Raises Cancelled if the engine is closed.
        """
        prepared: Future[None] = Future()
        with self._changed:
            if self._is_closed:
                raise Cancelled("the engine is closed")
            self._to_prepare.append((base, prepared))
            self._changed.notify()
        prepared.result()

    def cancel(self, running: Running) -> None:
        """End a request before the next turn."""
        with self._changed:
            running.is_cancelled = True
            self._changed.notify()

    def load(self) -> Load:
        """See ``contract.Engine``."""
        with self._changed:
            seconds = sum(seconds for seconds, _ in self._recent)
            work = sum(work for _, work in self._recent)
            return Load(
                requests=len({id(member.of) for member in self._waiting}),
                samples=len(self._waiting),
                work=sum(member.work_left for member in self._waiting),
                work_per_s=work / seconds if seconds else 0.0,
            )

    def close(self) -> None:
        """See ``contract.Engine``."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    # ---- the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._to_prepare or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    break
                to_prepare, self._to_prepare = self._to_prepare, []
                cancelled = {member.of for member in self._waiting if member.of.is_cancelled}
            for running in cancelled:
                self._end(running, Failed(Cancelled("the request was cancelled")))
            for base, prepared in to_prepare:
                self._prepare(base, prepared)
            chosen = self._choose()
            if chosen:
                self._turn(chosen)
        for _, prepared in self._to_prepare:
            prepared.set_exception(Cancelled("the engine is closed"))
        for running in {member.of for member in self._waiting}:
            self._end(running, Failed(Cancelled("the engine is closed")))

    def _prepare(self, base: BaseModel, prepared: Future[None]) -> None:
        try:
            self._sizes.max_rows(base, (base.height_px, base.width_px))
        except Exception as error:
            prepared.set_exception(error)
        else:
            prepared.set_result(None)

    def _choose(self) -> list[Member]:
        with self._changed:
            waiting = list(self._waiting)
        started = sum(_bytes_of(member.sample) for member in waiting if member.sample is not None)
        if started > STARTED_BYTES:
            waiting = [member for member in waiting if member.sample is not None]
        return choose(waiting, self._max_rows)

    def _max_rows(self, member: Member) -> int:
        return self._sizes.max_rows(member.of.model.base, member.of.size_px)

    def _turn(self, chosen: Sequence[Member]) -> None:
        """One U-Net call for these images. What fails, fails those of this call alone."""
        began = self._clock_s()
        try:
            self._start(chosen)
            base = chosen[0].of.model.base
            advance(base, [member.sample for member in chosen if member.sample is not None])
            finished = [member for member in chosen if member.steps_left == 0]
            self._decode(base, finished)
            self._preview(base, [member for member in chosen if member.steps_left])
            base.wait()
        except torch.OutOfMemoryError as error:
            self._out_of_memory(chosen, error)
            return
        except Exception as error:
            log.exception("a U-Net call failed")
            for running in {member.of for member in chosen}:
                self._end(running, Failed(error))
            return
        seconds = self._clock_s() - began
        rows = sum(member.rows for member in chosen)
        work = _pixels(chosen[0].of.size_px) * rows
        max_rows = self._max_rows(chosen[0])
        with self._changed:
            self._work_done += work
            is_busy = len(self._waiting) > len(chosen) or 2 * rows > max_rows
            if is_busy or not self._recent:  # a call with few rows does not show what the device can do
                self._recent.append((seconds, work))
        self._on_turn(Turn(samples=len(chosen), rows=rows, max_rows=max_rows, seconds=seconds))

    def _out_of_memory(self, chosen: Sequence[Member], error: BaseException) -> None:
        """Halve the calls of this size and go on; a single image that does not fit fails."""
        torch.cuda.empty_cache()
        if len(chosen) > 1:
            rows = sum(member.rows for member in chosen)
            self._sizes.lower(chosen[0].of.model.base, chosen[0].of.size_px, max(1, rows // 2))
            log.warning("%d rows do not fit the device's memory: the next calls are smaller", rows)
            return
        self._end(chosen[0].of, Failed(error))

    def _start(self, chosen: Sequence[Member]) -> None:
        """Encode the prompts of images that have their first turn, and make their latents."""
        new = [member for member in chosen if member.sample is None]
        for running in dict.fromkeys(member.of for member in new if not member.of.is_started):
            running.is_started = True
            running.on_event(Started(self._clock_s() - running.submitted))
        captions: dict[str | None, None] = dict.fromkeys(member.of.request.prompt for member in new)
        guided = [member.of.request for member in new if member.rows == 2]
        captions |= dict.fromkeys(request.negative_prompt or None for request in guided)
        if not captions:
            return
        base = new[0].of.model.base
        encoded = base.encode(list(captions), *new[0].of.size_px)
        rows = {
            caption: {name: tensor[i : i + 1] for name, tensor in encoded.items()}
            for i, caption in enumerate(captions)
        }
        for member in new:
            request = member.of.request
            uncond = rows[request.negative_prompt or None] if member.rows == 2 else None
            member.sample = start(
                base,
                request.seeds[member.index],
                request.sample,
                rows[request.prompt],
                uncond,
                member.of.model.adapter,
            )

    def _decode(self, base: BaseModel, finished: Sequence[Member]) -> None:
        """Decode finished images. A request with one that is not finite fails; the others do not."""
        if not finished:
            return
        latents = torch.cat([member.sample.latents for member in finished if member.sample is not None])
        images = base.decode(latents)
        good = [a and b for a, b in zip(are_finite(latents), are_finite(images), strict=True)]
        for i, (member, is_good) in enumerate(zip(finished, good, strict=True)):
            if member.of.is_over:
                continue
            if not is_good:
                error = NonFiniteError(f"image {member.index} of the request has infinite or NaN values")
                self._end(member.of, Failed(error))
                continue
            member.is_drawn = True
            member.sample = None
            with self._changed:
                self._waiting.remove(member)
            member.of.on_event(Drawn(member.index, to_pixels(images[i : i + 1])[0]))
            if all(each.is_drawn for each in member.of.members):
                self._end(member.of, Finished())

    def _preview(self, base: BaseModel, chosen: Sequence[Member]) -> None:
        """Decode the estimates of images whose next preview is due."""
        due = [member for member in chosen if _preview_is_due(member)]
        if not due:
            return
        estimates = [m.sample.estimate for m in due if m.sample is not None and m.sample.estimate is not None]
        images = base.decode(torch.cat(estimates))
        for i, (member, is_good) in enumerate(zip(due, are_finite(images), strict=True)):
            number = member.previews
            member.previews += 1
            if is_good:
                member.of.on_event(Preview(member.index, number, to_pixels(images[i : i + 1])[0]))

    def _end(self, running: Running, last: Event) -> None:
        """Send the last event of a request and forget its images."""
        with self._changed:
            self._waiting = [member for member in self._waiting if member.of is not running]
        if running.is_over:
            return
        running.is_over = True
        running.members = []
        running.on_event(last)


def _pixels(size_px: tuple[int, int]) -> float:
    height, width = size_px
    return float(height * width)


def _bytes_of(sample: Sample) -> int:
    tensors = [sample.latents, *sample.cond.values(), *(sample.uncond or {}).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _preview_is_due(member: Member) -> bool:
    """Preview k of n is shown after the share (k + 1) / (n + 1) of the steps."""
    wanted = member.of.request.partial_images
    if member.sample is None or member.previews >= wanted:
        return False
    share = (member.previews + 1) / (wanted + 1)
    return member.sample.steps_done >= share * len(member.sample.timesteps)
