"""The scripted operator writes the status that KubeRay 1.7 writes, and refuses what KubeRay refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes_validate import validate

from tests.support.kube import FINALIZER, LIFE_CYCLES, Operator, serve_kube
from tests.support.kube.rules import cluster_refusal, refusal
from tests.support.kube.samples import TOKEN_SECRET, ray_job
from tests.support.kube.schema import read_crd, unknown_fields, violations

NAME = "ajob-a"


@pytest.fixture
def crds() -> Path | None:
    folder = os.environ.get("KUBERAY_CRDS")
    return Path(folder) if folder else None


@pytest.fixture
def operator(crds) -> Iterator[Operator]:
    with serve_kube(crds) as server:
        yield Operator(server)


def create(operator: Operator, name: str = NAME, **spec) -> None:
    operator.store.create("rayjobs", "default", ray_job(name, **spec), strict=True)


def status(operator: Operator, name: str = NAME) -> dict:
    return operator.job(name).get("status", {})


def count(operator: Operator, plural: str) -> int:
    return len(operator.store.list(plural, None, lambda item: True))


def test_a_job_gets_a_cluster_of_its_own_which_goes_when_it_ends(operator):
    create(operator)
    assert status(operator) == {}
    operator.see(NAME)
    seen = status(operator)
    assert (seen["jobDeploymentStatus"], seen["jobId"]) == ("Initializing", f"{NAME}-submission")
    assert FINALIZER in operator.job(NAME)["metadata"]["finalizers"]
    cluster = operator.store.get("rayclusters", "default", seen["rayClusterName"])
    assert cluster["spec"]["rayVersion"] == "2.60.0"
    assert count(operator, "pods") == 3
    operator.provision(NAME)
    assert (
        status(operator)["dashboardURL"]
        == f"{seen['rayClusterName']}-head-svc.default.svc.cluster.local:8265"
    )
    operator.run(NAME)
    operator.finish(NAME)
    over = status(operator)
    assert (over["jobDeploymentStatus"], over["jobStatus"], over["succeeded"]) == ("Complete", "SUCCEEDED", 1)
    operator.clean_up(NAME)
    assert [count(operator, plural) for plural in ("rayjobs", "rayclusters", "pods", "services")] == [
        1,
        0,
        0,
        0,
    ]


def test_a_failed_job_is_retried_up_to_its_limit_with_a_new_cluster(operator):
    create(operator, backoffLimit=1)
    operator.see(NAME)
    first = status(operator)["rayClusterName"]
    operator.provision(NAME)
    operator.finish(NAME, "FAILED", "exit code 1")
    assert status(operator)["jobDeploymentStatus"] == "Retrying"
    operator.retry(NAME)
    again = status(operator)
    assert again["jobDeploymentStatus"] == "Initializing"
    assert "reason" not in again
    assert again["rayClusterName"] != first
    operator.provision(NAME)
    operator.finish(NAME, "FAILED", "exit code 1")
    over = status(operator)
    assert (over["jobDeploymentStatus"], over["reason"], over["failed"]) == ("Failed", "AppFailed", 2)


def test_a_deadline_is_not_retried(operator):
    create(operator, backoffLimit=1, activeDeadlineSeconds=60)
    operator.see(NAME)
    operator.fail(NAME, "DeadlineExceeded", "60 s are over")
    assert status(operator)["jobDeploymentStatus"] == "Failed"


def test_a_suspended_job_has_no_cluster_and_no_trace_of_its_run(operator):
    create(operator)
    operator.see(NAME)
    operator.provision(NAME)
    operator.run(NAME)
    operator.suspend(NAME, done=False)
    assert (status(operator)["jobDeploymentStatus"], count(operator, "pods")) == ("Suspending", 3)
    operator.suspend(NAME)
    held = status(operator)
    assert held["jobDeploymentStatus"] == "Suspended"
    assert not {"jobId", "jobStatus", "rayClusterName", "dashboardURL"} & set(held)
    assert count(operator, "pods") == 0
    operator.resume(NAME)
    assert status(operator)["jobDeploymentStatus"] == "Initializing"
    assert status(operator)["jobId"] == f"{NAME}-submission"


def test_a_deleted_job_goes_with_its_pods_once_the_operator_has_stopped_it(operator):
    create(operator)
    operator.see(NAME)
    operator.provision(NAME)
    operator.store.delete("rayjobs", "default", NAME, {"propagationPolicy": "Foreground"})
    pods = operator.store.list("pods", None, lambda item: True)
    assert all("deletionTimestamp" in each["metadata"] for each in pods)
    operator.end_pods(*operator.pods(NAME))
    assert (count(operator, "pods"), count(operator, "rayclusters"), count(operator, "rayjobs")) == (0, 0, 1)
    operator.finalize(NAME)
    assert count(operator, "rayjobs") == 0


def test_a_deleted_job_stays_while_the_secret_of_its_token_is_gone(operator):
    create(operator)
    operator.see(NAME)
    operator.provision(NAME)
    operator.store.delete("secrets", "default", TOKEN_SECRET)
    operator.store.delete("rayjobs", "default", NAME)
    operator.finalize(NAME)
    assert FINALIZER in operator.job(NAME)["metadata"]["finalizers"]
    operator.store.create("secrets", "default", {"metadata": {"name": TOKEN_SECRET}})
    operator.finalize(NAME)
    assert [count(operator, plural) for plural in ("rayjobs", "rayclusters", "pods")] == [0, 0, 0]


@pytest.mark.parametrize("cycle", LIFE_CYCLES, ids=lambda cycle: cycle.id)
def test_each_life_cycle_leaves_what_the_schemas_know(operator, crds, cycle):
    if crds is None:
        pytest.skip("KUBERAY_CRDS does not name a folder with KubeRay's CRDs")
    create(operator)
    for step in cycle.steps:
        step.play(operator, NAME)
        for plural in ("rayjobs", "rayclusters"):
            schema = read_crd(crds / f"ray.io_{plural}.yaml").schema
            for item in operator.store.list(plural, None, lambda item: True):
                assert (violations(schema, item), unknown_fields(schema, item)) == ([], [])


def test_the_objects_of_the_core_are_valid_for_kubernetes(operator):
    create(operator)
    operator.see(NAME)
    operator.provision(NAME)
    operator.evict(NAME)
    for plural in ("pods", "events", "services", "secrets"):
        items = operator.store.list(plural, None, lambda item: True)
        assert items
        validate(items[0], "1.37", strict=True)


HEAD = ("rayClusterSpec", "headGroupSpec")
POD = (*HEAD, "template", "spec")
ENV = (*POD, "containers", 0, "env")
WORKER = ("rayClusterSpec", "workerGroupSpecs", 0)
STRATEGY = ("deletionStrategy", "deletionRules")
REFUSED = {
    "at most 47 characters": ({"name": "a" * 48}, "no more than 47 characters"),
    "begins with a digit": ({"name": "1a"}, "DNS1035"),
    "has a dot": ({"name": "a.b"}, "DNS1035"),
    "a TTL without a shutdown": ({"shutdownAfterJobFinishes": False}, "cannot have ttlSecondsAfterFinished"),
    "a negative TTL": ({"ttlSecondsAfterFinished": -1}, "non-negative"),
    "suspended without a shutdown": (
        {"suspend": True, "shutdownAfterJobFinishes": False},
        "not allowed to be suspended",
    ),
    "a shutdown beside deletion rules": ({STRATEGY: [{"policy": "DeleteSelf"}]}, "mutually exclusive"),
    "no cluster": ({"rayClusterSpec": None}, "one of rayClusterSpec or clusterSelector"),
    "a selector with retries": (
        {"clusterSelector": {"ray.io/cluster": "a"}, "backoffLimit": 1},
        "backoffLimit above 0",
    ),
    "a selector without a name": ({"clusterSelector": {"a": "b"}}, "should not be empty"),
    "a selector with a sidecar": (
        {"clusterSelector": {"ray.io/cluster": "a"}, "submissionMode": "SidecarMode"},
        "not supported in SidecarMode",
    ),
    "a selector that is suspended": (
        {"clusterSelector": {"ray.io/cluster": "a"}, "suspend": True},
        "doesn't support the suspend",
    ),
    "a sidecar with a submitter": (
        {"submissionMode": "SidecarMode", "submitterPodTemplate": {"spec": {"containers": []}}},
        "submitterPodTemplate",
    ),
    "a sidecar and a head that restarts": (
        {"submissionMode": "SidecarMode", (*POD, "restartPolicy"): "Always"},
        "restartPolicy for head",
    ),
    "a mode that does not exist": ({"submissionMode": "HttpMode"}, "submissionMode HttpMode is unknown"),
    "retries of an interactive job": (
        {"submissionMode": "InteractiveMode", "backoffLimit": 1},
        "incompatible with InteractiveMode",
    ),
    "a runtime environment that is no YAML": ({"runtimeEnvYAML": "a: ["}, "no YAML"),
    "a runtime environment that is no map": ({"runtimeEnvYAML": "- a"}, "must be a map"),
    "no time at all": ({"activeDeadlineSeconds": 0}, "activeDeadlineSeconds"),
    "negative retries": ({"backoffLimit": -1}, "backoffLimit"),
    "no container": ({(*POD, "containers"): []}, "at least one container"),
    "no container of workers": ({(*WORKER, "template", "spec", "containers"): []}, "at least one container"),
    "resources twice": ({(*HEAD, "resources"): {"CPU": "1"}}, "both rayStartParams and resources"),
    "labels as parameters": ({(*WORKER, "rayStartParams"): {"labels": "a=b"}}, "labels"),
    "Redis without its options": ({ENV: [{"name": "RAY_REDIS_ADDRESS", "value": "x"}]}, "gcsFaultTolerance"),
    "Redis twice": (
        {
            ENV: [{"name": "RAY_REDIS_ADDRESS", "value": "x"}],
            ("rayClusterSpec", "gcsFaultToleranceOptions"): {"redisAddress": "x"},
        },
        "cannot set `RAY_REDIS_ADDRESS`",
    ),
    "Redis' password in the environment": (
        {
            ENV: [{"name": "REDIS_PASSWORD", "value": "x"}],
            ("rayClusterSpec", "gcsFaultToleranceOptions"): {"redisAddress": "x"},
        },
        "cannot set `REDIS_PASSWORD`",
    ),
    "Redis' password as a parameter": (
        {
            (*HEAD, "rayStartParams"): {"redis-password": "x"},
            ("rayClusterSpec", "gcsFaultToleranceOptions"): {"redisAddress": "x"},
        },
        "redis-password",
    ),
    "an autoscaler v2 and pods that restart": (
        {
            ("rayClusterSpec", "enableInTreeAutoscaling"): True,
            ("rayClusterSpec", "autoscalerOptions"): {"version": "v2"},
            (*WORKER, "template", "spec", "restartPolicy"): "Always",
        },
        "restartPolicy for gpu group",
    ),
    "an autoscaler v2 without autoscaling": (
        {ENV: [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]},
        "enableInTreeAutoscaling is false",
    ),
    "a token without a version": ({("rayClusterSpec", "rayVersion"): ""}, "rayVersion"),
    "a token of an old Ray": ({("rayClusterSpec", "rayVersion"): "2.51.2"}, "minimum Ray version is 2.52.0"),
}
"""Changes of a RayJob (by their path in its spec; its name), and what the operator says to them."""


def changed(changes: dict) -> dict:
    job = ray_job(changes.get("name", NAME))
    for path, value in changes.items():
        if path == "name":
            continue
        *steps, last = (path,) if isinstance(path, str) else path
        part = job["spec"]
        for step in steps:
            part = part.setdefault(step, {}) if isinstance(part, dict) else part[step]
        if value is None:
            del part[last]
        else:
            part[last] = value
    return job


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_kuberay_refuses_is_refused(case):
    changes, message = REFUSED[case]
    why = refusal(changed(changes))
    assert why is not None
    assert message in why


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("DeleteCluster", 60), ("DeleteSelf", 30)], "must not decrease"),
        ([("DeleteSelf", 30), ("DeleteSelf", 60)], "duplicate rule"),
        ([("DeleteSelf", -1)], "non-negative"),
        ([("DeleteWorkers", 10), ("DeleteCluster", 20), ("DeleteSelf", 20)], None),
    ],
)
def test_deletion_rules_are_in_order(rules, message):
    listed = [
        {"policy": policy, "condition": {"jobStatus": "FAILED", "ttlSeconds": ttl}} for policy, ttl in rules
    ]
    changes = {STRATEGY: listed, "shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0}
    why = refusal(changed(changes))
    assert why == message or (why and message in why)


def test_workers_are_not_deleted_alone_with_autoscaling():
    rule = {"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED"}}
    changes = {STRATEGY: [rule], "shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0}
    assert refusal(changed(changes)) is None
    assert "autoscaling" in refusal(changed(changes | {("rayClusterSpec", "enableInTreeAutoscaling"): True}))


def test_what_kuberay_accepts_is_accepted():
    assert refusal(ray_job(NAME)) is None
    assert refusal(ray_job("a" * 47)) is None
    assert cluster_refusal(ray_job(NAME)["spec"]["rayClusterSpec"]) is None


def test_a_refused_job_is_told_why_and_gets_no_cluster(operator):
    create(operator, shutdownAfterJobFinishes=False)
    operator.see(NAME)
    refused = status(operator)
    assert (refused["jobDeploymentStatus"], refused["reason"]) == ("ValidationFailed", "ValidationFailed")
    assert "cannot have ttlSecondsAfterFinished" in refused["message"]
    assert [count(operator, plural) for plural in ("rayclusters", "pods", "events")] == [0, 0, 1]
