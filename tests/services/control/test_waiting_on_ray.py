"""Trainings that wait for one another on a real cluster with machines for one. `pytest -s` shows figures."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator

import pytest

from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
from services.api.requests import AlignmentJobCreate, EvaluationConfig, Workers
from services.client.api import Client
from services.client.local import LocalSystem
from tests.services.control.test_on_ray import wait_for
from tests.support.open_sources import EVERYWHERE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
START_TIMEOUT_S = 3
"""Of Ray Train: after it, workers that found no room have failed to start."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    """Four CPUs: Serve's replica has one, and two workers have two, so two more find no room."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
        folder = tmp_path_factory.mktemp("small")
        with LocalSystem(folder, fresh=True, allow=EVERYWHERE.allowed, num_cpus=4) as running:
            yield running


def test_trainings_wait_for_a_first_longer_than_ray_trains_start_timeout_and_then_succeed(small, pairs_file):
    with small.client() as client:
        submit = submitter(client, pairs_file)
        first = submit(100_000)
        wait_for(lambda: list(client.metrics(first, "train")))
        second = submit(3)
        elastic = submit(3, workers=(2, 3))
        third = submit(3)
        for job in (second, elastic, third):
            wait_for(lambda job=job: waits(client, job))
        shown = client.job(second).waiting
        assert shown.position is None, "it has a slot"
        assert "workers = 2 need 2 CPU; the cluster has 1 free of 4" in shown.message

        began = time.monotonic()
        client.pause_job(third)
        wait_for(lambda: client.job(third).status == "paused", 60)
        paused_s = time.monotonic() - began
        client.resume_job(third)
        wait_for(lambda: waits(client, third))
        began = time.monotonic()
        client.cancel_job(third)
        wait_for(lambda: client.job(third).status == "cancelled", 60)
        cancelled_s = time.monotonic() - began
        print(f"while it waited: paused within {paused_s:.1f} s, cancelled within {cancelled_s:.1f} s")
        assert cancelled_s < 30

        wait_for(lambda: time.time() - client.job(elastic).waiting.since > 5 * START_TIMEOUT_S)
        client.cancel_job(first)
        for job in (second, elastic):
            ended = client.wait(job, timeout_s=600)
            assert ended.status == "succeeded", ended.reason
            assert ended.waiting is None
            assert attempts(small, job) == (1, 0), "one attempt at the last stage, and no restart"
            messages = [event.message for event in client.events(job)]
            assert len([text for text in messages if text.startswith("waiting (cluster_room)")]) == 1
            assert not [text for text in messages if "restarts as attempt" in text]
            (waited,) = [text for text in messages if text.startswith("waited ")]
            seconds = float(waited.split()[1])
            print(f"{job}: {waited}; {ended.stage_seconds}")
            assert seconds > 4 * START_TIMEOUT_S
            whole_s = ended.finished_at - ended.started_at
            assert sum(ended.stage_seconds.values()) <= whole_s - seconds + 5, "no stage took the wait"


def submitter(client: Client, pairs_file) -> Callable[..., str]:
    base = client.create_model("waiting-base", MODEL_DIR.as_uri()).name
    dataset = client.create_dataset("waiting-pairs", pairs_file.as_uri()).id
    evaluation = EvaluationConfig(
        prompts_uri=PROMPTS_FILE.as_uri(), num_prompts=2, sample=SampleConfig(steps=2)
    )

    def submit(steps: int, workers: Workers = 2) -> str:
        training = TrainConfig(steps=steps, batch_size=8, learning_rate=1e-4, checkpoint_every=100)
        request = AlignmentJobCreate(
            model=base,
            dataset=dataset,
            objective=ObjectiveConfig(beta=2000.0, calibration_bins=50),
            training=training,
            workers=workers,
            evaluation=evaluation,
        )
        return client.create_job(request).id

    return submit


def waits(client: Client, job: str) -> bool:
    shown = client.job(job)
    assert not shown.finished, shown.reason
    return shown.status == "running" and shown.waiting is not None and shown.waiting.reason == "cluster_room"


def attempts(system: LocalSystem, job: str) -> tuple[int, int]:
    """(attempt, restarts) as the control plane counts them."""
    with sqlite3.connect(system.state / "dde.db") as connection:
        return connection.execute("SELECT attempt, restarts FROM jobs WHERE id = ?", (job,)).fetchone()
