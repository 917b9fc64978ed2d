"""Sends a request at regular times, whatever became of the ones before, and reports how it was answered."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class Answer:
    """``outcome`` is "200", another status with its error's code, or the name of httpx's error."""

    sent_at: float
    seconds: float
    outcome: str

    @property
    def is_good(self) -> bool:
        return self.outcome == "200"

    @property
    def at(self) -> float:
        return self.sent_at + self.seconds


class Probe:
    """Sends ``request`` every ``every_s`` seconds on a thread of its own, from ``start`` to ``stop``.

    Times are of ``time.monotonic``.
    """

    def __init__(self, request: Callable[[], httpx.Request], every_s: float = 0.5) -> None:
        self._request = request
        self._every_s = every_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.answers: list[Answer] = []

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self._thread.join()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, trust_env=False) as http, asyncio.TaskGroup() as sending:
            while not self._stopping.is_set():
                sending.create_task(self._send(http))
                await asyncio.sleep(self._every_s)

    async def _send(self, http: httpx.AsyncClient) -> None:
        sent_at = time.monotonic()
        try:
            answer = await http.send(self._request())
            outcome = str(answer.status_code)
            if not answer.is_success:
                outcome += f" {answer.json()['error']['code']}"
        except (httpx.HTTPError, ValueError, KeyError) as error:
            outcome = type(error).__name__
        self.answers.append(Answer(sent_at, time.monotonic() - sent_at, outcome))

    def good_since(self, moment: float) -> bool:
        """Whether a request that was sent after the moment has been answered well."""
        return any(each.is_good and each.sent_at > moment for each in self.answers)

    def report(self, lost_at: float) -> Outage:
        """What became of the requests that were sent since ``lost_at``."""
        after = sorted((each for each in self.answers if each.at > lost_at), key=lambda each: each.sent_at)
        bad = Counter(each.outcome for each in after if not each.is_good)
        last_bad = max((each.sent_at for each in after if not each.is_good), default=lost_at)
        again = min((each.at for each in after if each.is_good and each.sent_at >= last_bad), default=None)
        return Outage(
            sent=len(after),
            bad=bad,
            again_after_s=None if again is None else max(0.0, again - lost_at) if bad else 0.0,
            slowest_s=max((each.seconds for each in after if each.is_good), default=0.0),
        )


@dataclass(frozen=True)
class Outage:
    """``again_after_s``: from the loss until every later request was answered well; 0 if none failed."""

    sent: int
    bad: Counter[str]
    again_after_s: float | None
    slowest_s: float

    def __str__(self) -> str:
        again = "never well again" if self.again_after_s is None else f"well after {self.again_after_s:.1f} s"
        return (
            f"{self.bad.total()} of {self.sent} failed {dict(self.bad)}, {again}, "
            f"slowest good one {self.slowest_s:.1f} s"
        )
