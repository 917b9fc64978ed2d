"""Pause, resume and cancel of a real training on a real cluster. `pytest -s` shows how long they took."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest

from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
from services.api.requests import AlignmentJobCreate, EvaluationConfig
from services.client.api import Client
from services.client.local import LocalSystem
from services.storage import files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def request_of(client: Client, pairs_file) -> Callable[[int], AlignmentJobCreate]:
    """A job that trains for so many steps."""
    base = client.create_model("paused-base", MODEL_DIR.as_uri()).name
    dataset = client.create_dataset("paused-pairs", pairs_file.as_uri()).id
    evaluation = EvaluationConfig(
        prompts_uri=PROMPTS_FILE.as_uri(), num_prompts=4, sample=SampleConfig(steps=2)
    )

    def request(steps: int) -> AlignmentJobCreate:
        training = TrainConfig(steps=steps, batch_size=16, learning_rate=1e-4, checkpoint_every=1000)
        objective = ObjectiveConfig(beta=2000.0, calibration_bins=50)
        return AlignmentJobCreate(
            model=base,
            dataset=dataset,
            objective=objective,
            training=training,
            workers=2,
            evaluation=evaluation,
        )

    return request


def wait_for(holds: Callable[[], object], timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.2)


def workers(system: LocalSystem) -> list[int]:
    """Training workers of this cluster."""
    found = []
    for process in psutil.Process(system.ray.child.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_paused_training_frees_its_workers_keeps_its_step_and_resumes_from_it(client, system, request_of):
    job = client.create_job(request_of(60)).id
    wait_for(lambda: len(list(client.metrics(job, "train"))) >= 5)
    requested_at = time.monotonic()
    assert client.pause_job(job).state == "pausing"
    wait_for(lambda: client.job(job).status == "paused")
    paused = time.monotonic()
    wait_for(lambda: not workers(system))
    freed_s = time.monotonic() - paused
    print(f"pause: job paused after {paused - requested_at:.1f} s, workers gone {freed_s:.1f} s later")
    (kept,) = client.checkpoints(job)
    assert 0 < kept.step < 60
    assert kept.step == max(row.step for row in client.metrics(job, "train")), (
        "the step at which it was paused"
    )
    client.resume_job(job)
    ended = client.wait(job, timeout_s=300)
    assert ended.status == "succeeded", ended.reason
    messages = [event.message for event in client.events(job)]
    assert f"stopped after step {kept.step}" in messages
    folder = files.join(system.storage_uri, "jobs", job, "train", "a2", "journal")
    again = [
        entry["step"]
        for name in files.list_files(folder)
        for entry in files.read_json(f"{folder}/{name}")
        if "metrics" in entry
    ]
    assert min(again) == kept.step + 1, "no step was made twice"


def test_a_cancelled_training_frees_its_workers_and_leaves_its_last_checkpoint(client, system, request_of):
    request = request_of(100_000)
    often = request.model_copy(
        update={"training": TrainConfig(steps=100_000, batch_size=16, checkpoint_every=2)}
    )
    job = client.create_job(often).id
    wait_for(lambda: list(client.checkpoints(job)))
    requested_at = time.monotonic()
    client.cancel_job(job)
    wait_for(lambda: client.job(job).status == "cancelled" and not workers(system))
    seconds = time.monotonic() - requested_at
    print(f"cancel: job cancelled and workers gone after {seconds:.1f} s")
    assert [kept.bytes > 0 for kept in client.checkpoints(job)]
