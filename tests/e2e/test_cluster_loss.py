"""An alignment job and a Serve application survive the loss of each part of the installation.

Everything runs in pods with networks of their own: Redis, an S3 server, Ray's head, two workers and the
control plane. Each test loses one part in the middle of training, while images are requested and the job is
read, prints figures, and compares the trained weights with those of an undisturbed run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
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
from tests.support.probe import Outage, Probe
from tests.support.weights import WEIGHTS, Weights, same_bits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STORE_AWAY_S = float(os.environ.get("STORE_AWAY_S", "60"))
"""How long the object store is away; 600 for the full test."""
TRAINING = TrainConfig(steps=100, batch_size=16, learning_rate=1e-4, checkpoint_every=5)
LOST_AT_STEP = 20
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
class Survived:
    """What a loss cost. ``resumed``: the steps from which workers started."""

    job: JobView
    events: list[str]
    attempts: int
    resumed: list[int]
    lost_steps: int
    generations: Outage
    reads: Outage
    is_same: bool


def survive(
    trial: Trial,
    undisturbed: Weights,
    name: str,
    lose: Callable[[], None],
    bring_back: Callable[[], None],
    away_s: float,
) -> Survived:
    """Lose something after ``LOST_AT_STEP``, bring it back ``away_s`` later, and wait for the job's end."""
    cluster = trial.cluster
    whole_after_s = cluster.wait(cluster.is_whole, "the cluster is not whole", 600)
    job_id = trial.begin(name)
    cluster.wait(lambda: trial.steps(job_id) >= LOST_AT_STEP, f"{name} does not train", 600)
    with (
        Probe(lambda: images(trial)) as generations,
        Probe(lambda: reads(trial, job_id)) as job_reads,
    ):
        time.sleep(3)
        lost_step = trial.steps(job_id)
        lost_at = time.monotonic()
        lose()
        time.sleep(away_s)
        bring_back()
        back_at = time.monotonic()
        job = wait_for_end(trial, job_id, 1800)
        ended_at = time.monotonic()
        cluster.wait(lambda: generations.good_since(back_at), "no image is drawn", 300)
    events = trial.events(job_id)
    starts = [int(each.rpartition(" ")[2]) for each in events if "workers" in each and "from step" in each]
    attempts = 1 + sum("restarts as attempt" in each for each in events)
    weights = trial.weights(job) if job.status == "succeeded" else {}
    found = Survived(
        job=job,
        events=events,
        attempts=attempts,
        resumed=starts,
        lost_steps=sum(max(0, lost_step - start) for start in starts[1:2]),
        generations=generations.report(lost_at),
        reads=job_reads.report(lost_at),
        is_same=same_bits(undisturbed, weights),
    )
    print(
        f"\n{name} (the cluster was whole after {whole_after_s:.0f} s): away {away_s:g} s; lost at step "
        f"{lost_step}, {job.status} {ended_at - lost_at:.0f} s later; attempts {attempts}, workers started "
        f"from steps {starts}, lost steps {found.lost_steps}, weights "
        f"{'equal' if found.is_same else 'differ'}"
        f"\n  generations: {found.generations}\n  reads: {found.reads}"
        f"\n  replicas {cluster.replicas()}, starts {cluster.starts}"
    )
    print("\n".join(f"    {each[:300]}" for each in events))
    assert job.status == "succeeded", job.reason
    assert found.is_same, "a resumed run ends in the weights of an undisturbed one"
    return found


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


def test_a_lost_worker_node_that_is_replaced_costs_the_steps_since_a_checkpoint(trial: Trial, undisturbed):
    cluster = trial.cluster
    found = survive(
        trial,
        undisturbed,
        "worker-lost",
        lose=lambda: cluster.lose("worker-2"),
        bring_back=lambda: cluster.replace("worker-2"),
        away_s=10,
    )
    assert found.attempts == 1, "Ray Train starts new workers, and the driver goes on"
    assert len(found.resumed) == 2
    assert found.resumed[1] > 0
    assert not found.reads.bad


@pytest.mark.parametrize("away_s", [10, 90])
def test_a_worker_node_that_is_cut_off_for_a_while_costs_no_attempt(trial: Trial, undisturbed, away_s: float):
    """After ten seconds it goes on; after 90 Ray has given it up, and it starts again as a new node."""
    cluster = trial.cluster
    found = survive(
        trial,
        undisturbed,
        f"worker-cut-{away_s}",
        lose=lambda: cluster.cut("worker-2"),
        bring_back=lambda: cluster.heal("worker-2"),
        away_s=away_s,
    )
    assert found.attempts == 1
    assert not found.reads.bad


def test_while_the_head_is_lost_images_are_drawn_and_its_return_costs_an_attempt(trial: Trial, undisturbed):
    """Drivers run on the head, and die with it."""
    cluster = trial.cluster
    found = survive(
        trial,
        undisturbed,
        "head-lost",
        lose=lambda: cluster.lose("head"),
        bring_back=lambda: cluster.recover("head"),
        away_s=30,
    )
    assert found.attempts == 2
    assert found.resumed[1] > 0
    assert not found.generations.bad
    assert not found.reads.bad


def test_redis_may_be_away_for_a_minute(trial: Trial, undisturbed):
    cluster = trial.cluster
    found = survive(
        trial,
        undisturbed,
        "redis-away",
        lose=lambda: cluster.cut("redis"),
        bring_back=lambda: cluster.heal("redis"),
        away_s=60,
    )
    assert found.attempts == 1
    assert len(found.resumed) == 1
    assert not found.generations.bad
    assert not found.reads.bad


def test_a_killed_control_plane_goes_on_with_its_jobs(trial: Trial, undisturbed):
    cluster = trial.cluster
    found = survive(
        trial,
        undisturbed,
        "control-killed",
        lose=lambda: cluster.kill("control"),
        bring_back=lambda: None,
        away_s=1,
    )
    assert found.attempts == 1
    assert len(found.resumed) == 1, "training goes on without a control plane"
    assert found.reads.bad, "it was really away"
    assert found.reads.again_after_s < 60


def test_the_object_store_may_be_away_while_images_are_drawn(trial: Trial, undisturbed):
    cluster = trial.cluster
    found = survive(
        trial,
        undisturbed,
        "store-away",
        lose=lambda: cluster.cut("s3"),
        bring_back=lambda: cluster.heal("s3"),
        away_s=STORE_AWAY_S,
    )
    assert not found.reads.bad
