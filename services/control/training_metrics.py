"""Prometheus metrics of jobs that train, read from the database at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from services.api.records import CHECKPOINT_SECONDS
from services.control import tables
from services.control.database import Database


class RunningTraining(Collector):
    """For each job that has trained a step and runs: when its newest step and checkpoint were logged.

    The second is the time of the first step while there is no checkpoint, so its age is what a loss of the
    run would cost.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> Iterator[Metric]:
        yield from _families()

    def collect(self) -> Iterator[Metric]:
        steps, stored = _families()
        with self._database.read() as session:
            for job_id, last, since in _times(session):
                steps.add_metric([job_id], last)
                stored.add_metric([job_id], since)
        yield from (steps, stored)


def _times(session: Session) -> Iterator[tuple[str, float, float]]:
    """Id, newest step and newest checkpoint of each training that has made a step and waits for no room."""
    job = tables.Job
    trains = (job.stage == "train") & (job.status == "running") & job.waiting_since.is_(None)
    for job_id in session.scalars(select(job.id).where(trains)).all():
        last = _last_step(session, job_id)
        since = _newest_checkpoint(session, job_id)
        if last is not None and since is not None:
            yield job_id, last, since


def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
    steps = "When the newest step of a running training was logged, in Unix time."
    stored = "When its newest checkpoint was stored, else its first step was logged, in Unix time."
    return (
        GaugeMetricFamily("dde_training_last_step_timestamp_seconds", steps, labels=["job_id"]),
        GaugeMetricFamily("dde_training_last_checkpoint_timestamp_seconds", stored, labels=["job_id"]),
    )


def _last_step(session: Session, job_id: str) -> float | None:
    return session.scalar(_of_training(job_id).order_by(tables.Metric.seq.desc()).limit(1))


def _newest_checkpoint(session: Session, job_id: str) -> float | None:
    """When it was logged, else the first step."""
    seconds = tables.Metric.values[CHECKPOINT_SECONDS].as_float()
    stored = _of_training(job_id).where(seconds.is_not(None)).order_by(tables.Metric.seq.desc()).limit(1)
    first = _of_training(job_id).order_by(tables.Metric.seq).limit(1)
    found = session.scalar(stored)
    return session.scalar(first) if found is None else found


def _of_training(job_id: str) -> Select[float]:
    """The times of the job's training steps."""
    return select(tables.Metric.at).where(tables.Metric.job == job_id, tables.Metric.stage == "train")
