"""Prometheus metrics: requests, counted as they pass, and jobs, counted in the database at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from services.control.database import Database
from services.control.tables import Job

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class JobCounts(Collector):
    """The number of jobs of each kind and status."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("dde_jobs", "Jobs by kind and status.", labels=["kind", "status"])

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("dde_jobs", "Jobs by kind and status.", labels=["kind", "status"])
        with self._database.read() as session:
            for kind, status, count in session.execute(
                select(Job.kind, Job.status, func.count()).group_by(Job.kind, Job.status)
            ):
                family.add_metric([kind, status], count)
        yield family


class Telemetry:
    """The metrics of one app."""

    def __init__(self, database: Database) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(JobCounts(database))
        labels = ("method", "route")
        self._requests = Counter(
            "dde_http_requests", "Requests answered.", (*labels, "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "dde_http_request_seconds",
            "Time to the last byte.",
            labels,
            buckets=BUCKETS_S,
            registry=self._registry,
        )

    def register(self, collector: Collector) -> None:
        """Add what ``collector`` finds at each scrape."""
        self._registry.register(collector)

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request and its duration."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self._registry)
