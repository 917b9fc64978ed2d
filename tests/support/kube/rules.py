"""What KubeRay 1.7's operator refuses although the schema allows it, in the order in which it looks."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from tests.support.kube.schema import Json

MAX_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
LEAST_RAY_WITH_TOKENS = (2, 52, 0)
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_OWN_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")


def refusal(job: Json) -> str | None:
    """Why the operator refuses a RayJob, or None."""
    return next(_refusals(job), None)


def cluster_refusal(spec: Json, annotations: Json | None = None) -> str | None:
    """Why the operator refuses a RayCluster's spec, or None."""
    return next(_in_cluster(spec, annotations or {}), None)


def _refusals(job: Json) -> Iterator[str]:
    name = job["metadata"]["name"]
    spec = job["spec"]
    cluster = spec.get("rayClusterSpec")
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    mode = spec.get("submissionMode")
    if len(name) > MAX_NAME["RayJob"]:
        yield f"RayJob name should be no more than {MAX_NAME['RayJob']} characters"
    if not _LABEL.fullmatch(name):
        yield "RayJob name should be a valid DNS1035 label"
    if spec.get("suspend") and not shuts_down:
        yield "a RayJob with shutdownAfterJobFinishes set to false is not allowed to be suspended"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished must be a non-negative integer"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shuts_down:
        yield "a RayJob with shutdownAfterJobFinishes set to false cannot have ttlSecondsAfterFinished"
    yield from _in_deletion(spec, shuts_down)
    yield from _in_selector(spec)
    if cluster is None and not spec.get("clusterSelector"):
        yield "one of rayClusterSpec or clusterSelector must be set"
    if mode not in (None, "K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
        yield f"submissionMode {mode} is unknown"
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit is incompatible with InteractiveMode"
    if mode == "SidecarMode":
        yield from _in_sidecar(spec)
    if cluster is not None:
        yield from _in_cluster(cluster, job["metadata"].get("annotations") or {})
    try:
        runtime_env = yaml.safe_load(spec.get("runtimeEnvYAML", "")) or {}
    except yaml.YAMLError as error:
        yield f"runtimeEnvYAML is no YAML: {error}"
    else:
        if not isinstance(runtime_env, dict):
            yield "runtimeEnvYAML must be a map"
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        yield "activeDeadlineSeconds must be a positive integer"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit must be a positive integer"


def _in_deletion(spec: Json, shuts_down: bool) -> Iterator[str]:
    strategy = spec.get("deletionStrategy") or {}
    rules = strategy.get("deletionRules") or []
    has_autoscaler = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling", False)
    if rules and shuts_down:
        yield "shutdownAfterJobFinishes and deletionStrategy.deletionRules are mutually exclusive"
    seen: dict[tuple[str, str], int] = {}
    for index, rule in enumerate(rules):
        condition = rule["condition"]
        policy = rule["policy"]
        status = condition.get("jobStatus") or condition.get("jobDeploymentStatus") or ""
        ttl = condition.get("ttlSeconds", 0)
        if ttl < 0:
            yield f"deletionRules[{index}]: ttlSeconds must be non-negative"
        if spec.get("clusterSelector") and policy in ("DeleteCluster", "DeleteWorkers"):
            yield f"deletionRules[{index}]: {policy} is not supported when clusterSelector is set"
        if has_autoscaler and policy == "DeleteWorkers":
            yield f"deletionRules[{index}]: DeleteWorkers is not supported with autoscaling enabled"
        if (status, policy) in seen:
            yield f"deletionRules[{index}]: duplicate rule for {policy} and {status}"
        seen[status, policy] = ttl
    for status in {status for status, _ in seen}:
        ttls = [seen[status, policy] for policy in _ORDER if (status, policy) in seen]
        if ttls != sorted(ttls):
            yield f"for {status}: the ttlSeconds of {' <= '.join(_ORDER)} must not decrease"
    legacy = [(strategy[name] or {}).get("policy") for name in ("onSuccess", "onFailure") if name in strategy]
    if shuts_down and "DeleteNone" in legacy:
        yield "shutdownAfterJobFinishes is true while the deletion policy is DeleteNone"
    if has_autoscaler and "DeleteWorkers" in legacy:
        yield "DeleteWorkers does not support a RayCluster with autoscaling enabled"


def _in_selector(spec: Json) -> Iterator[str]:
    selector = spec.get("clusterSelector")
    if not selector:
        return
    if spec.get("suspend"):
        yield "the clusterSelector mode doesn't support the suspend operation"
    if not selector.get("ray.io/cluster"):
        yield "cluster name in clusterSelector should not be empty"
    if spec.get("submissionMode") == "SidecarMode":
        yield "clusterSelector is not supported in SidecarMode"
    if spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit above 0 is not supported with clusterSelector"


def _in_sidecar(spec: Json) -> Iterator[str]:
    if spec.get("submitterPodTemplate"):
        yield "SidecarMode doesn't support submitterPodTemplate"
    if spec.get("submitterConfig"):
        yield "SidecarMode doesn't support submitterConfig"
    head = (spec.get("rayClusterSpec") or {}).get("headGroupSpec", {})
    if _restart_policy(head) not in (None, "", "Never"):
        yield "restartPolicy for head Pod should be Never or unset when using SidecarMode"


def _in_cluster(spec: Json, annotations: Json) -> Iterator[str]:
    head = spec["headGroupSpec"]
    groups = [("Head", head), *((each["groupName"], each) for each in spec.get("workerGroupSpecs") or [])]
    for name, group in groups:
        if not group["template"].get("spec", {}).get("containers"):
            yield f"the {name} group should have at least one container"
            return
        params = group.get("rayStartParams") or {}
        if group.get("resources") and any(params.get(each) for each in _OWN_RESOURCES):
            yield f"resource fields should not be set in both rayStartParams and resources for {name} group"
        if "labels" in params:
            yield f"rayStartParams['labels'] is not supported for {name} group"
    env = {
        each["name"]: each.get("value") for each in head["template"]["spec"]["containers"][0].get("env") or []
    }
    params = head.get("rayStartParams") or {}
    if spec.get("gcsFaultToleranceOptions") is not None:
        if annotations.get("ray.io/ft-enabled"):
            yield "ray.io/ft-enabled annotation and gcsFaultToleranceOptions are both set"
        if params.get("redis-password"):
            yield "cannot set `redis-password` in rayStartParams when gcsFaultToleranceOptions is enabled"
        for name in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"):
            if name in env:
                yield f"cannot set `{name}` env var in head Pod when gcsFaultToleranceOptions is enabled"
        if annotations.get("ray.io/external-storage-namespace"):
            yield "cannot set `ray.io/external-storage-namespace` with gcsFaultToleranceOptions"
    elif "RAY_REDIS_ADDRESS" in env and annotations.get("ray.io/ft-enabled") != "true":
        yield "RAY_REDIS_ADDRESS is set, but gcsFaultToleranceOptions is not set"
    if params.get("redis-username") or "REDIS_USERNAME" in env:
        yield "cannot set redis username in rayStartParams or environment variables"
    yield from _in_autoscaling(spec, groups, env)
    yield from _in_auth(spec)


def _in_autoscaling(spec: Json, groups: list[tuple[str, Json]], env: Json) -> Iterator[str]:
    variable = env.get("RAY_enable_autoscaler_v2")
    version = (spec.get("autoscalerOptions") or {}).get("version")
    if not spec.get("enableInTreeAutoscaling"):
        if variable in ("1", "true"):
            yield "RAY_enable_autoscaler_v2 cannot be set when enableInTreeAutoscaling is false"
        return
    if version and variable is not None:
        yield "both autoscalerOptions.version and RAY_enable_autoscaler_v2 are set"
    for name, group in groups:
        if group.get("suspend"):
            yield f"worker group {name} cannot be suspended with Autoscaler enabled"
        if (version == "v2" or variable in ("1", "true")) and _restart_policy(group) not in (
            None,
            "",
            "Never",
        ):
            yield f"restartPolicy for {name} group should be Never or unset when using autoscaler V2"


def _in_auth(spec: Json) -> Iterator[str]:
    if (spec.get("authOptions") or {}).get("mode") != "token":
        return
    version = spec.get("rayVersion") or ""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if not numbers:
        yield f"authOptions.mode is 'token' but rayVersion is no version: {version!r}"
    elif tuple(int(each) for each in numbers.groups()) < LEAST_RAY_WITH_TOKENS:
        yield f"authOptions.mode is 'token' but minimum Ray version is 2.52.0, got {version}"


def _restart_policy(group: Json) -> str | None:
    policy: str | None = group.get("template", {}).get("spec", {}).get("restartPolicy")
    return policy
