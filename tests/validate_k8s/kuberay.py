"""KubeRay's rules that its schemas do not hold, and what training and serving need of a Ray cluster."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from services.settings import Settings
from tests.validate_k8s import facts
from tests.validate_k8s.overlay import Overlay, Pod, at, cluster_of, title

LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
PORTS = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080, "serve": 8000}
API_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
UPGRADE = {"RayCluster": {"type": "Recreate"}, "RayService": {"type": "NewCluster"}}
JOB_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "10"}
"""A stopped job has 10 s to leave its marker. Whatever starts drivers needs it."""
JOB_START = {"RAY_JOB_START_TIMEOUT_SECONDS": f"{Settings.model_fields['max_wait_s'].default:.0f}"}
"""A driver on the shared cluster waits for room as long as its job may."""
RECONNECT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
"""A node waits so long for a head that was lost. By Ray's default it ends after 60 s."""
BUSY = {"serve": "ServeReplica", "train": "RayTrainWorker"}
"""The actors whose processes a pod waits for before it ends."""


def findings(overlay: Overlay) -> Iterator[str]:
    for document in overlay.ray:
        for check in (_names, _cluster, _tolerates_loss, _autoscaler, _head, _groups, _job, _service):
            yield from (f"{title(document)}: {message}" for message in check(document))
    for pod in overlay.pods():
        if cluster_of(pod.owner):
            for check in (_ports, _leaves, _variables):
                yield from (f"{pod.title}: {message}" for message in check(pod))


def _names(document: dict) -> Iterator[str]:
    name = at(document, "metadata", "name", default="")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"name {name!r} is not a DNS-1035 label"
    if len(name) > LONGEST_NAME[document["kind"]]:
        yield f"name {name!r} is longer than {LONGEST_NAME[document['kind']]}"


def _cluster(document: dict) -> Iterator[str]:
    cluster = cluster_of(document)
    if at(cluster, "authOptions") != {"mode": "token", "secretName": "dde-ray-token"}:
        yield "authOptions is not the token of Secret dde-ray-token"
    if cluster.get("rayVersion") != facts.ray_version():
        yield f"rayVersion {cluster.get('rayVersion')!r} is not the images' {facts.ray_version()}"
    upgrade = cluster if document["kind"] == "RayCluster" else at(document, "spec")
    if at(upgrade, "upgradeStrategy") != UPGRADE.get(document["kind"], {}):
        yield f"upgradeStrategy is not {UPGRADE.get(document['kind'])}: a new image would change no pod"


def _tolerates_loss(document: dict) -> Iterator[str]:
    redis = at(cluster_of(document), "gcsFaultToleranceOptions")
    if document["kind"] == "RayJob":
        if redis:
            yield "a RayJob's cluster is not recovered: its next attempt has a new one"
        return
    if set(redis) != {"redisAddress", "redisPassword"}:
        yield "gcsFaultToleranceOptions must name Redis and its password: else a lost head ends the cluster"
    names = {
        e["name"] for group in _all_groups(document) for c in _containers(group) for e in c.get("env", [])
    }
    if names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"}:
        yield "gcsFaultToleranceOptions excludes the variables RAY_REDIS_ADDRESS and REDIS_PASSWORD"


def _autoscaler(document: dict) -> Iterator[str]:
    cluster = cluster_of(document)
    options = at(cluster, "autoscalerOptions")
    if document["kind"] == "RayJob" and not options and "enableInTreeAutoscaling" not in cluster:
        return  # a fixed size
    if cluster.get("enableInTreeAutoscaling") is not True or options.get("version") != "v2":
        yield "enableInTreeAutoscaling is not on, with version v2"
    if not 60 <= at(options, "idleTimeoutSeconds", default=0) <= 3600:
        yield "idleTimeoutSeconds is not between a minute and an hour"
    mounts = at(options, "volumeMounts", default=[])
    if [(m.get("mountPath"), m.get("readOnly")) for m in mounts] != [(API_TOKEN, True)]:
        yield f"the autoscaler's container does not mount the account's token at {API_TOKEN}"
    for group in _all_groups(document):
        if at(group, "template", "spec", "restartPolicy", default="Never") != "Never":
            yield "autoscaling needs restartPolicy Never or none"
    head = at(cluster, "headGroupSpec", "template", "spec")
    tokens = [v for v in at(head, "volumes", default=[]) if _is_api_token(v)]
    if [v["name"] for v in tokens] != [m.get("name") for m in mounts]:
        yield "the head has no volume with the token and the certificate for the autoscaler"


def _is_api_token(volume: dict) -> bool:
    sources = at(volume, "projected", "sources", default=[])
    token = {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}}
    certificate = {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    return sources == [token, {"configMap": certificate}]


def _head(document: dict) -> Iterator[str]:
    start = at(cluster_of(document), "headGroupSpec", "rayStartParams")
    if start.get("num-cpus") != "0":
        yield "head num-cpus is not '0'"
    if start.get("dashboard-host") != "0.0.0.0":
        yield "head dashboard-host is not 0.0.0.0: nobody else could reach it"


def _groups(document: dict) -> Iterator[str]:
    groups = _all_groups(document)
    names = [group.get("groupName", "head") for group in groups]
    if len(set(names)) < len(names) or "" in names:
        yield f"groups need names of their own: {names}"
    known = {
        "RayCluster": {"cpu", "gpu", "gpu-spot"},
        "RayService": {"serve"},
        "RayJob": {"decode", "workers"},
    }
    if set(names) - known[document["kind"]] - {"head"}:
        yield f"groups {sorted(set(names) - {'head'})} are not among {sorted(known[document['kind']])}"
    for group in groups:
        name = group.get("groupName", "head")
        start = group.get("rayStartParams", {})
        if unknown := set(start) - facts.ray_start_options():
            yield f"{name}: `ray start` has no option {sorted(unknown)}"
        if set(start) - {"num-cpus", "dashboard-host", "metrics-export-port"}:
            yield f"{name}: rayStartParams {sorted(start)} has more than we use"
        if set(start) & {"num-cpus", "dashboard-host"} and name != "head":
            yield f"{name}: rayStartParams {sorted(start)} are the head's"
        if start.get("metrics-export-port", "8080") != "8080" or (
            document["kind"] != "RayJob" and "metrics-export-port" not in start
        ):
            yield f"{name}: metrics-export-port is not 8080"
        if name != "head":
            yield from _size(name, group)
    if document["kind"] == "RayCluster" and at(groups, 1, "minReplicas", default=0) < 1:
        yield "group cpu must have a pod for drivers"


def _size(name: str, group: dict) -> Iterator[str]:
    least, most = at(group, "minReplicas", default=0), at(group, "maxReplicas", default=0)
    if not 0 <= least <= at(group, "replicas", default=least) <= most:
        yield f"{name}: not minReplicas <= replicas <= maxReplicas"
    if name in ("gpu", "gpu-spot") and least:
        yield f"{name}: training starts from 0 GPUs"
    if set(group) - {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}:
        yield f"{name}: fields that we do not use: {sorted(group)}"


def _job(document: dict) -> Iterator[str]:
    if document["kind"] != "RayJob":
        return
    spec = at(document, "spec")
    if spec.get("ttlSecondsAfterFinished", 0) <= 0 or not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished and shutdownAfterJobFinishes do not delete the finished RayJob"
    if spec.get("submissionMode") != "HTTPMode":
        yield "submissionMode is not HTTPMode: others kill a live job when its log stream drops"
    if spec.get("backoffLimit") != 0:
        yield "backoffLimit is not 0: attempts are the control plane's"
    if set(spec) & {
        "clusterSelector",
        "deletionStrategy",
        "submitterPodTemplate",
        "suspend",
        "activeDeadlineSeconds",
    }:
        yield "fields that are not ours to set"
    parts = shlex.split(spec.get("entrypoint", ""))
    if parts[:2] != ["python", "-m"] or len(parts) < 3 or not facts.runs_as_module(parts[2]):
        yield f"entrypoint {parts} runs no module of ours"
    if "workers" not in [group.get("groupName") for group in _all_groups(document)]:
        yield "there is no group workers for the control plane to size"


def _service(document: dict) -> Iterator[str]:
    if document["kind"] != "RayService":
        return
    if at(cluster_of(document), "headGroupSpec", "headService"):
        yield "headService is set"
    if at(document, "spec", "excludeHeadPodFromServeSvc", default=False) is not True:
        yield "excludeHeadPodFromServeSvc is not true: the head runs no replica"


def _ports(pod: Pod) -> Iterator[str]:
    needed = {"metrics"} | ({"gcs-server", "dashboard"} if pod.group == "head" else set())
    needed |= {"serve"} if pod.kind == "RayService" else set()
    if pod.ports != {name: PORTS[name] for name in needed}:
        yield f"its ports are {pod.ports}, not {sorted(needed)} as Ray opens them"
    container = at(pod.spec, "containers", 0)
    if container.get("name") != ("ray-head" if pod.group == "head" else "ray-worker"):
        yield f"its container is called {container.get('name')!r}"


def _variables(pod: Pod) -> Iterator[str]:
    starts_drivers = pod.kind != "RayService" and (pod.group in ("head", "cpu"))
    container = at(pod.spec, "containers", 0)
    given = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
    stop = {name: value for name, value in given.items() if name.startswith("RAY_JOB_STOP")}
    if stop != (JOB_STOP if starts_drivers else {}):
        yield f"a job's stop is {stop}, not {JOB_STOP if starts_drivers else 'unset'}"
    waits = {name: value for name, value in given.items() if name.startswith("RAY_JOB_START")}
    places_drivers = pod.kind == "RayCluster" and pod.group == "head"
    if waits != (JOB_START if places_drivers else {}):
        yield f"a driver's wait is {waits}, not {JOB_START if places_drivers else 'unset'}"
    reconnect = {name: value for name, value in given.items() if name.startswith("RAY_gcs_")}
    has_recovery = pod.kind != "RayJob"
    if reconnect != (RECONNECT if has_recovery else {}):
        yield f"the wait for a lost head is {reconnect}, not {RECONNECT if has_recovery else 'unset'}"


def _leaves(pod: Pod) -> Iterator[str]:
    """How the pod ends: where work can run, it drains its node first, and waits only while there is work."""
    container = at(pod.spec, "containers", 0)
    command = at(container, "lifecycle", "preStop", "exec", "command", default=[])
    grace = at(pod.spec, "terminationGracePeriodSeconds", default=30)
    script = command[2] if command[:2] == ["sh", "-c"] and len(command) == 3 else shlex.join(command)
    if not re.search(r"(^|[\s;])ray stop\s*$", script):
        yield "preStop does not end with `ray stop`"
    waits = [int(n) for n in re.findall(r"\[ \$i -lt (\d+) \]|^sleep (\d+);", script) for n in n if n]
    if sum(waits) > grace - 8:
        yield f"preStop takes up to {sum(waits)} s and `ray stop` 8 s: the pod is killed after {grace} s"
    if pod.part in ("train", "align") and grace > 600:
        yield f"terminationGracePeriodSeconds {grace} holds a node for more than ten minutes"
    works = (pod.part in ("train", "align") and pod.gpus) or (pod.part == "serve" and pod.group != "head")
    if not works:
        allowed = {"ray stop"} | ({"sleep 12; ray stop"} if pod.kind == "RayJob" else set())
        if script not in allowed:
            yield f"preStop is {script!r}, not one of {sorted(allowed)}"
        if not 30 <= grace <= 60:
            yield f"terminationGracePeriodSeconds {grace} is not between 30 and 60"
        return
    drain = re.search(
        r"ray drain-node .*?--deadline-remaining-seconds=\d+", script.replace("\\\n", " "), re.DOTALL
    )
    if not drain:
        yield "preStop does not drain its Ray node"
        return
    yield from _drain(shlex.split(drain[0]), waits, grace)
    wanted = BUSY["serve" if pod.part == "serve" else "train"]
    pattern = rf"grep -qs (['\"])\^ray::(\.\*)?{wanted}\1 /proc/\[0-9\]\*/cmdline"
    if not re.search(pattern, script) or not re.search(r"while \[ \$i -lt \d+ \] && ", script):
        yield f"preStop does not wait while a {wanted} runs on the pod, and only then"
    if not re.search(r"do sleep 1; i=\$\(\(i\+1\)\); done", script):
        yield "preStop does not wait in steps of a second"


def _drain(command: list[str], waits: list[int], grace: int) -> Iterator[str]:
    import click
    from ray.scripts.scripts import drain_node

    try:
        given: dict[str, Any] = drain_node.make_context("drain-node", command[2:]).params
    except click.ClickException as error:
        yield f"preStop: ray drain-node: {error.format_message()}"
        return
    if given["reason"] != "DRAIN_NODE_REASON_PREEMPTION":
        yield "preStop: Ray may reject a drain that is no preemption"
    deadline = given["deadline_remaining_seconds"]
    if not waits or not waits[-1] <= deadline <= grace:
        yield f"not: preStop's wait {waits} <= the drain's deadline {deadline} <= the pod's {grace} s"


def _all_groups(document: dict) -> list[dict]:
    cluster = cluster_of(document)
    return [at(cluster, "headGroupSpec"), *at(cluster, "workerGroupSpecs", default=[])]


def _containers(group: dict) -> list[dict]:
    return at(group, "template", "spec", "containers", default=[])
