"""Who may enter a replica: budgets of work, a bounded queue, and a deadline for each request.

Work is counted in pixel-steps, as by the engine: pixels x steps x U-Net rows. Knows no HTTP and no Ray.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from dde_core.engine.contract import Load
from dde_core.errors import ConfigError
from services.api.requests import TIMEOUT_HEADER
from services.errors import BadRequest, DeadlineExceeded, ShuttingDown, TooManyRequests

Result = TypeVar("Result")

UNKNOWN_RATE_RETRY_S = 5.0
"""Retry-After before the engine's first turn, when no rate of work is known."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one replica accepts. Work is in pixel-steps. Raises ConfigError, naming the field."""

    max_work_per_request: float = 2e9
    """More is refused for good. The default: 16 guided images of 1024 px, 60 steps."""
    max_work_per_key: float = 8e9
    """What one API key may have queued and running."""
    max_native_ratio: float = 4.0
    """How many times the pixels that its model was made for an image may have, if ``max_pixels`` is 0."""
    max_pixels: int = 0
    """The most pixels of an image; 0: ``max_native_ratio`` decides."""
    max_queued_s: float = 60.0
    """The time that the replica may need, at the rate it works at, for what it has accepted. While it is
    more, or more than the time that a request has, a key that has something here is refused.
    """
    max_requests: int = 256
    """Accepted requests, queued and running. The only bound until a rate is known."""
    key_share: float = 0.5
    """The part of ``max_queued_s`` and ``max_requests`` that one key may take, so that others find room. A
    key always finds room for one request within ``max_requests``, so a huge request of one shuts no other
    out.
    """
    max_timeout_s: float = 600.0
    """The longest time a request may ask for, and what one without a wish gets."""

    def __post_init__(self) -> None:
        for name in ("max_work_per_request", "max_queued_s", "max_requests", "max_timeout_s"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "must be positive")
        _check("max_native_ratio", self.max_native_ratio, self.max_native_ratio >= 1, "must be 1 or more")
        _check("max_pixels", self.max_pixels, self.max_pixels >= 0, "must be 0 or more")
        _check("key_share", self.key_share, 0 < self.key_share <= 1, "must be above 0 and at most 1")
        holds_one = self.max_work_per_key >= self.max_work_per_request
        _check("max_work_per_key", self.max_work_per_key, holds_one, "must be at least max_work_per_request")

    @property
    def max_requests_per_key(self) -> int:
        """At least one."""
        return max(1, int(self.max_requests * self.key_share))

    def check_pixels(self, width: int, height: int, native_width: int, native_height: int) -> None:
        """Raises BadRequest for an image of more pixels than a model of the native size may draw."""
        allowed = self.max_pixels or int(self.max_native_ratio * native_width * native_height)
        if width * height > allowed:
            rule = (
                f"images have at most {self.max_pixels} pixels here"
                if self.max_pixels
                else f"a model made for {native_width}x{native_height} draws at most {allowed} pixels"
            )
            raise BadRequest(f"size: {rule}, got {width}x{height}", param="size", code="too_many_pixels")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a request costs: ``images`` of one size. ``rows``: 2 where guidance needs both halves, else 1."""

    width: int
    height: int
    steps: int
    rows: int
    images: int

    @property
    def pixel_steps(self) -> float:
        """The sum over its images."""
        return float(self.width * self.height * self.steps * self.rows * self.images)

    def check(self, limit: float) -> None:
        """Raises BadRequest above ``limit`` pixel-steps, which names ``n`` if fewer images would fit."""
        if self.pixel_steps <= limit:
            return
        fits_alone = self.images > 1 and self.pixel_steps / self.images <= limit
        param = "n" if fits_alone else "num_inference_steps"
        value = self.images if fits_alone else self.steps
        message = (
            f"{param}: a request has at most {limit:.4g} pixel-steps, and {self.images} x {self.width}x"
            f"{self.height} px x {self.steps} steps x {self.rows} U-Net rows are {self.pixel_steps:.4g}; "
            f"got {value}"
        )
        raise BadRequest(message, param=param, code="too_much_work")


class Ticket:
    """An accepted request. A context manager: it leaves the replica's count when the block ends, however."""

    def __init__(self, admission: Admission, key: str, work: float, timeout_s: float) -> None:
        self.key = key
        self.work = work
        self.timeout_s = timeout_s
        self.is_submitted = False
        self._admission = admission
        self._ends_at_s = admission.now_s() + timeout_s

    def submitted(self) -> None:
        """The engine has the request, so from now on ``Load.work`` holds its work."""
        self.is_submitted = True

    def remaining_s(self) -> float:
        """Seconds to the deadline; negative after it."""
        return self._ends_at_s - self._admission.now_s()

    async def wait_for(self, work: Awaitable[Result]) -> Result:
        """The result of ``work``. At the deadline it is cancelled. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(max(0.0, self.remaining_s())) as limit:
                return await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            message = f"the request was not done within {self.timeout_s:g} s ({TIMEOUT_HEADER})"
            raise DeadlineExceeded(message) from error

    def release(self) -> None:
        """Give the room back. Every call but the first does nothing."""
        self._admission.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Admission:
    """Accepts and refuses the requests of one replica. Safe to use from several threads.

    ``load`` reports what the engine has to do. ``on_refused`` is called with the code of each refusal.
    """

    def __init__(
        self,
        limits: Limits,
        load: Callable[[], Load],
        on_refused: Callable[[str], None] = lambda code: None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.now_s = now_s
        self._load = load
        self._on_refused = on_refused
        self._lock = threading.Lock()
        self._tickets: set[Ticket] = set()
        self._is_closed = False
        self._promised_s = 0.0
        """The time, by ``now_s``, at which the request that was refused last may find room."""

    @property
    def accepted(self) -> int:
        """The number of requests that are in."""
        return len(self._tickets)

    def enter(
        self,
        key: str,
        work: Work,
        timeout_s: float | None = None,
        native: tuple[int, int] | None = None,
    ) -> Ticket:
        """Accept a request of the API key with this id; ``timeout_s`` is what it asks for.

        ``native`` is width and height that the model was made for. Raises BadRequest for what can never
        enter: images too large for the model, too much work, a time that is not positive or too long.
        Raises TooManyRequests, with the time after which there may be room, if the queue is full
        (``queue_full``) or the key has its share of it (``key_limit``), and ShuttingDown after ``close``.
        """
        try:
            if native is not None:
                self.limits.check_pixels(work.width, work.height, *native)
            work.check(self.limits.max_work_per_request)
            seconds = self._timeout(timeout_s)
            with self._lock:
                self._check_room(key, work.pixel_steps, seconds)
                ticket = Ticket(self, key, work.pixel_steps, seconds)
                self._tickets.add(ticket)
        except (BadRequest, TooManyRequests, ShuttingDown) as error:
            self._on_refused(error.code)
            raise
        return ticket

    def remove(self, ticket: Ticket) -> None:
        """Forget an accepted request. What is not in is ignored."""
        with self._lock:
            self._tickets.discard(ticket)

    def queued_s(self) -> float:
        """How long the replica needs for all that it accepted; 0.0 before a rate is known."""
        with self._lock:
            load = self._load()
            return self._queued_work(load) / load.work_per_s if load.work_per_s else 0.0

    def close(self) -> None:
        """Refuse every further request with ShuttingDown."""
        self._is_closed = True

    def _timeout(self, timeout_s: float | None) -> float:
        longest = self.limits.max_timeout_s
        if timeout_s is None:
            return longest
        if not 0 < timeout_s <= longest:
            message = f"{TIMEOUT_HEADER}: must be above 0 and at most {longest:g}, got {timeout_s:g}"
            raise BadRequest(message, param=TIMEOUT_HEADER)
        return timeout_s

    def _check_room(self, key: str, work: float, timeout_s: float) -> None:
        """Called with the lock. A key that has nothing here passes while there is room for a request."""
        if self._is_closed:
            raise ShuttingDown("the replica is shutting down")
        load = self._load()
        mine = [ticket for ticket in self._tickets if ticket.key == key]
        if mine:
            self._check_key(mine, work, load)
        if len(self._tickets) >= self.limits.max_requests:
            message = f"the queue has {len(self._tickets)} requests, which is its limit"
            mean_work = _sum(self._tickets) / len(self._tickets)
            request_s = _until_done(mean_work, load)
            raise TooManyRequests(message, retry_after_s=self._room_after_s(request_s, request_s))
        if mine and load.work_per_s:
            queued_s = self._queued_work(load) / load.work_per_s
            limit_s = min(self.limits.max_queued_s, timeout_s)
            if queued_s > limit_s:
                message = f"the queue is {queued_s:.1f} s long; this request can wait for {limit_s:g} s"
                room_s = self._room_after_s(queued_s - limit_s, work / load.work_per_s)
                raise TooManyRequests(message, retry_after_s=room_s)

    def _room_after_s(self, first_s: float, request_s: float) -> float:
        """Seconds until there may be room for a request that is refused now.

        It is ``first_s`` for the first one, and ``request_s`` more for each that was refused before, at most
        ``max_queued_s``: requests that were refused together do not return together.
        """
        now_s = self.now_s()
        longest_s = max(first_s, self.limits.max_queued_s)
        promised_s = max(now_s + first_s, self._promised_s + request_s)
        self._promised_s = min(promised_s, now_s + longest_s)
        return self._promised_s - now_s

    def _check_key(self, mine: Sequence[Ticket], work: float, load: Load) -> None:
        """``mine`` are the key's tickets, one or more."""
        held = _sum(mine)
        allowed = self.limits.max_work_per_key
        if load.work_per_s:
            allowed = min(allowed, self.limits.key_share * self.limits.max_queued_s * load.work_per_s)
        excess = held + work - allowed
        if excess > 0 or len(mine) >= self.limits.max_requests_per_key:
            message = (
                f"the API key has {len(mine)} requests of {held:.4g} pixel-steps here, and this one has "
                f"{work:.4g}; it may have {self.limits.max_requests_per_key} of {allowed:.4g} at a time"
            )
            to_do = max(excess, held / len(mine))  # room comes back by whole requests
            part = held / _sum(self._tickets)
            raise TooManyRequests(message, code="key_limit", retry_after_s=_until_done(to_do / part, load))

    def _queued_work(self, load: Load) -> float:
        """What the engine has to do, and what was accepted but waits for its model to be loaded."""
        return load.work + _sum(ticket for ticket in self._tickets if not ticket.is_submitted)


def _until_done(work: float, load: Load) -> float:
    """Seconds until so much work of the queue is done."""
    return work / load.work_per_s if load.work_per_s else UNKNOWN_RATE_RETRY_S


def _sum(tickets: Iterable[Ticket]) -> float:
    return math.fsum(ticket.work for ticket in tickets)


def _check(field: str, value: float, holds: bool, reason: str) -> None:
    if not holds or not math.isfinite(value):
        raise ConfigError(field, value, reason)
