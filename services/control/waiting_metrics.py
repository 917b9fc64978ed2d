"""Prometheus metrics of waiting jobs, read from the database at each scrape."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.api.records import WaitReason
from services.control import queueing
from services.control.database import Database
from services.control.tables import Job
from services.control.transitions import ACTIVE
from services.settings import Settings


class WaitingJobs(Collector):
    """``dde_jobs_waiting`` by reason, as answers show it, and ``dde_jobs_oldest_wait_seconds``."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    def describe(self) -> Iterator[Metric]:
        yield from _families()

    def collect(self) -> Iterator[Metric]:
        waiting, oldest = _families()
        with self._database.read() as session:
            for reason, count in self._by_reason(session).items():
                waiting.add_metric([reason], count)
            oldest.add_metric([], _oldest_wait_s(session))
        yield from (waiting, oldest)

    def _by_reason(self, session: Session) -> Counter[str]:
        queue = queueing.read(session, self._settings)
        counts = Counter(dict.fromkeys(get_args(WaitReason), 0))
        for share in queue.shares.values():
            counts[queue.reason(share.name)[0]] += share.queued
        columns = select(Job.unreachable_at, Job.waiting_since).where(Job.status.in_(ACTIVE))
        for unreachable_at, waiting_since in session.execute(columns):
            if unreachable_at is not None:
                counts["cluster_unreachable"] += 1
            elif waiting_since is not None:
                counts["cluster_room"] += 1
        return counts


def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
    help_text = "Jobs that wait for room, by reason."
    waiting = GaugeMetricFamily("dde_jobs_waiting", help_text, labels=["reason"])
    help_text = "How long the job has waited for room that waits longest; 0 if none waits."
    return waiting, GaugeMetricFamily("dde_jobs_oldest_wait_seconds", help_text)


def _oldest_wait_s(session: Session) -> float:
    """One look into the index for each status."""
    since = (
        session.scalar(select(func.min(Job.waiting_since)).where(Job.status == status))
        for status in ("queued", *sorted(ACTIVE))
    )
    oldest = min((at for at in since if at is not None), default=None)
    return 0.0 if oldest is None else max(0.0, time.time() - oldest)
