"""An alignment job and a Serve application survive the loss of each part of the installation.

Everything runs in pods with networks of their own: Redis, an S3 server, Ray's head, two workers and the
control plane. Each test loses one part in the middle of training, while images are requested and the job is
read, prints figures, and compares the trained weights with those of an undisturbed run.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from safetensors.numpy import load

from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
from services.api.answers import JobView
from services.api.requests import TIMEOUT_HEADER, AlignmentJobCreate, EvaluationConfig
from services.client.api import Client
from tests.support.pairs_file import pair_rows, write_pairs
from tests.support.pod_cluster import PodCluster, pod_cluster
from tests.support.probe import Probe
from tests.support.weights import WEIGHTS, Weights, same_bits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STORE_AWAY_S = float(os.environ.get("STORE_AWAY_S", "60"))
"""How long the object store is away; 600 for the full test."""
TRAINING = TrainConfig(steps=100, batch_size=16, learning_rate=1e-4, checkpoint_every=5)
LOST_AT_STEP = 20
STARTED = re.compile(r"training on \d+ workers \(\w+\) from step (\d+)")
SETTINGS = {"DDE_UNREACHABLE_S": "3600"}
RAY_ENV = {
    # Raylets wait this long for the head; KubeRay sets it for workers, too.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    # The head waits for Redis rather than ending; a second each.
    "RAY_num_redis_request_retries": "1000",
    "RAY_redis_db_connect_retries": "1000",
}


@dataclass
class Trial:
    """The cluster and what was measured. A test begins a job, loses something, and ends the job."""

    cluster: PodCluster
    client: Client
    base: str
    dataset: str
    figures: list[str] = field(default_factory=list)

    def begin(self, name: str) -> str:
        request = AlignmentJobCreate(
            model=self.base,
            dataset=self.dataset,
            name=name,
            objective=ObjectiveConfig(beta=500.0, calibration_bins=50),
            training=TRAINING,
            workers=2,
            evaluation=EvaluationConfig(
                prompts_uri=PROMPTS_FILE.as_uri(), num_prompts=2, sample=SampleConfig(steps=2)
            ),
        )
        return self.client.create_job(request).id

    def steps(self, job: str) -> int:
        """Steps that the control plane knows of."""
        return max((row.step for row in self.client.metrics(job, "train")), default=0)

    def events(self, job: str) -> list[str]:
        return [event.message for event in self.client.events(job)]

    def weights(self, job: JobView) -> Weights:
        uri = self.client.model(job.aligned_model).uri
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        with self.cluster.s3() as s3:
            return load(s3.get_object(Bucket=bucket, Key=f"{key}/unet/{WEIGHTS}")["Body"].read())


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    folder = tmp_path_factory.mktemp("loss")
    pairs = write_pairs(folder / "pairs.parquet", pair_rows(200))
    workers = {"worker-1": 2, "worker-2": 2}
    with pod_cluster(folder / "pods", workers, settings=SETTINGS, ray_env=RAY_ENV) as cluster:
        cluster.start_all({"min_replicas": 2, "max_replicas": 2})
        with cluster.client() as client:
            base = client.create_model("shapes", MODEL_DIR.as_uri()).name
            dataset = client.create_dataset("scenes", pairs.as_uri()).id
            yield Trial(cluster, client, base, dataset)


@pytest.fixture(scope="module")
def undisturbed(trial: Trial) -> Weights:
    began = time.monotonic()
    job = trial.client.wait(trial.begin("undisturbed"), timeout_s=900)
    assert job.status == "succeeded", job.reason
    print(f"\nundisturbed: {time.monotonic() - began:.0f} s, {job.stage_seconds}; {trial.cluster.replicas()}")
    return trial.weights(job)


def images(trial: Trial) -> httpx.Request:
    body = {"model": "shapes", "prompt": "a large red circle", "num_inference_steps": 2}
    headers = {"authorization": f"Bearer {trial.cluster.key}", TIMEOUT_HEADER: "20"}
    return httpx.Request(
        "POST",
        f"{trial.cluster.url}/v1/images/generations",
        json=body,
        headers=headers,
        extensions={"timeout": httpx.Timeout(40.0).as_dict()},
    )


def reads(trial: Trial, job: str) -> httpx.Request:
    headers = {"authorization": f"Bearer {trial.cluster.key}"}
    return httpx.Request(
        "GET",
        f"{trial.cluster.url}/v1/alignment/jobs/{job}",
        headers=headers,
        extensions={"timeout": httpx.Timeout(40.0).as_dict()},
    )


@dataclass(frozen=True)
class Loss:
    """What is lost, for how long, and what that costs.

    ``how`` and ``back`` are methods of PodCluster. ``starts``: how often workers start; None: once or twice.
    """

    part: str
    how: str
    away_s: float
    back: str | None
    attempts: int = 1
    starts: int | None = 1
    images_may_fail: bool = False
    reads_fail: bool = False

    def __str__(self) -> str:
        return f"{self.part}-{self.how}-for-{self.away_s:g}-s"


LOSSES = [
    # Ray Train starts new workers, and the driver goes on.
    Loss("worker-2", "lose", 10, "replace", starts=2, images_may_fail=True),
    # Ray gives a node up only after a while; then it starts again as a new one.
    Loss("worker-2", "cut", 10, "heal", starts=None, images_may_fail=True),
    Loss("worker-2", "cut", 90, "heal", starts=None, images_may_fail=True),
    # Drivers run on the head, and die with it.
    Loss("head", "lose", 30, "recover", attempts=2, starts=2),
    Loss("redis", "cut", 60, "heal"),
    Loss("control", "kill", 1, None, images_may_fail=True, reads_fail=True),
    Loss("s3", "cut", STORE_AWAY_S, "heal"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_job_that_loses_a_part_of_its_installation_ends_in_the_weights_of_an_undisturbed_run(
    trial: Trial, undisturbed: Weights, loss: Loss
):
    cluster = trial.cluster
    whole_after_s = cluster.wait(cluster.is_whole, "the cluster is not whole", 600)
    job_id = trial.begin(str(loss))
    cluster.wait(lambda: trial.steps(job_id) >= LOST_AT_STEP, f"{loss} does not train", 600)
    with (
        Probe(lambda: images(trial)) as generations,
        Probe(lambda: reads(trial, job_id)) as job_reads,
    ):
        time.sleep(3)
        lost_step = trial.steps(job_id)
        lost_at = time.monotonic()
        getattr(cluster, loss.how)(loss.part)
        time.sleep(loss.away_s)
        if loss.back:
            getattr(cluster, loss.back)(loss.part)
        back_at = time.monotonic()
        job = wait_for_end(trial, job_id, 1800)
        ended_at = time.monotonic()
        cluster.wait(lambda: generations.good_since(back_at), "no image is drawn", 300)
    images_report, reads_report = generations.report(lost_at), job_reads.report(lost_at)
    events = trial.events(job_id)
    starts = [int(found[1]) for each in events if (found := STARTED.fullmatch(each))]
    attempts = 1 + sum("restarts as attempt" in each for each in events)
    is_same = same_bits(undisturbed, trial.weights(job) if job.status == "succeeded" else {})
    print(
        f"\n{loss} (the cluster was whole after {whole_after_s:.0f} s): lost at step {lost_step}, "
        f"{job.status} {ended_at - lost_at:.0f} s later; attempts {attempts}, "
        f"workers started from steps {starts}, weights {'equal' if is_same else 'differ'}"
        f"\n  generations: {images_report}\n  reads: {reads_report}"
        f"\n  replicas {cluster.replicas()}, starts {cluster.starts}"
    )
    print("\n".join(f"    {each[:300]}" for each in events))
    assert job.status == "succeeded", job.reason
    assert is_same, "a resumed run ends in the weights of an undisturbed one"
    assert attempts == loss.attempts
    assert len(starts) in ((1, 2) if loss.starts is None else (loss.starts,))
    assert all(step > 0 for step in starts[1:]), "it goes on from a checkpoint"
    assert loss.images_may_fail or not images_report.bad
    assert bool(reads_report.bad) == loss.reads_fail
    assert reads_report.again_after_s is not None
    assert reads_report.again_after_s < 60


def wait_for_end(trial: Trial, job_id: str, timeout_s: float) -> JobView:
    """The job at its end, whatever does not answer meanwhile."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with httpx.Client(trust_env=False) as http:
                answer = http.send(reads(trial, job_id))
            if answer.is_success and answer.json()["status"] in ("succeeded", "failed", "cancelled"):
                return trial.client.job(job_id)
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, trial.events(job_id)
        time.sleep(1)
