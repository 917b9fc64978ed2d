"""Prometheus metrics: requests, counted as they pass; jobs, counted in the database at each scrape; and what
the checks of the parts found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from services.control.database import Database
from services.control.health import Parts
from services.control.reconciler import Reconciler
from services.control.tables import Job
from services.control.training_metrics import RunningTraining
from services.errors import Conflict, Unavailable

log = logging.getLogger("dde")
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class JobCounts(Collector):
    """The number of jobs of each kind and status."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("dde_jobs", "Jobs by kind and status.", labels=["kind", "status"])

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("dde_jobs", "Jobs by kind and status.", labels=["kind", "status"])
        counts = select(Job.kind, Job.status, func.count()).group_by(Job.kind, Job.status)
        with self._database.read() as session:
            for kind, status, count in session.execute(counts):
                family.add_metric([kind, status], count)
        yield family


class WhileDatabase(Collector):
    """A collector that reads the database: while that is away its metrics have no values, and others do."""

    def __init__(self, collector: Collector, parts: Parts) -> None:
        self._collector = collector
        self._parts = parts

    def describe(self) -> Iterator[Metric]:
        yield from self._collector.describe()  # type: ignore[attr-defined]

    def collect(self) -> Iterator[Metric]:
        try:
            self._parts.require("database")
            yield from list(self._collector.collect())
        except (Unavailable, SQLAlchemyError) as error:  # what else there is to measure is wanted then
            log.warning("the database cannot be measured: %s", str(error).splitlines()[0])
            yield from self.describe()


class Health(Collector):
    """Which parts are reachable, and when the reconciler last looked for work."""

    def __init__(self, parts: Parts, reconciler: Reconciler) -> None:
        self._parts = parts
        self._reconciler = reconciler

    def describe(self) -> Iterator[Metric]:
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        help_text = "Whether the part was reachable at its last check."
        up = GaugeMetricFamily("dde_part_up", help_text, labels=["part"])
        for name, view in self._parts.views().items():
            up.add_metric([name], float(view.ok))
        yield up
        help_text = "When this replica last reviewed a job or found none due, in Unix time."
        last = GaugeMetricFamily("dde_reconciler_last_review_timestamp_seconds", help_text)
        if self._reconciler.last_review_at is not None:
            last.add_metric([], self._reconciler.last_review_at)
        yield last


class Telemetry:
    """The metrics of one app."""

    def __init__(self, database: Database, parts: Parts, reconciler: Reconciler) -> None:
        self._registry = CollectorRegistry()
        self._parts = parts
        self.register(JobCounts(database))
        self.register(RunningTraining(database))
        self._registry.register(Health(parts, reconciler))
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
        self._registry.register(WhileDatabase(collector, self._parts))

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request and its duration."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def listen(self, host: str, port: int) -> WSGIServer:
        """Answer scrapes on a port and threads of their own. Raises Conflict if the port is taken."""
        try:
            server, _ = start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            message = f"metrics_port: cannot be listened on, got {port}: {error}"
            raise Conflict(message, param="metrics_port") from error
        return server

    def text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self._registry)
