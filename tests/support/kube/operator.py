"""KubeRay's operator, scripted: every transition of a RayJob's status happens when a test calls for it."""

from __future__ import annotations

import base64
import secrets
import string
from collections.abc import Iterator
from typing import Any

from tests.support.kube import rules
from tests.support.kube.objects import now
from tests.support.kube.schema import Json
from tests.support.kube.server import KubeServer

FINALIZER = "ray.io/rayjob-finalizer"
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
DASHBOARD_PORT = 8265
NODE = "node-1"


class Operator:
    """Acts on the RayJobs of one namespace, each by its name. An operator whose methods nobody calls is
    absent.

    Step by step: ``see`` (validate; Initializing), ``provision`` (pods run; Running), ``run`` (the job's own
    status), ``finish`` (Complete, or Failed with AppFailed), ``clean_up`` (the cluster is deleted). Instead:
    ``fail``, ``retry``, ``suspend``, ``resume``, ``evict``. What a client deleted goes with ``finalize``.
    """

    def __init__(self, server: KubeServer, namespace: str = "default") -> None:
        self.server = server
        self.store = server.store
        self.namespace = namespace

    def job(self, name: str) -> Json:
        return self.store.get("rayjobs", self.namespace, name)

    def jobs(self) -> list[str]:
        """The names of all RayJobs."""
        return [each["metadata"]["name"] for each in self.store.list("rayjobs", self.namespace, _any)]

    def see(self, name: str) -> None:
        """Notice a new RayJob: refuse it (ValidationFailed), hold it (Suspended), or create its cluster."""
        job = self.job(name)
        why = rules.refusal(job)
        if why:
            message = f"The RayJob spec is invalid: {why}"
            refused = {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed"}
            self.set(name, **refused, message=message)
            self.event(name, "InvalidRayJobSpec", message, "Warning")
            return
        finalizers = job["metadata"].get("finalizers", [])
        if FINALIZER not in finalizers:
            patch = {"metadata": {"finalizers": [*finalizers, FINALIZER]}}
            self.store.patch("rayjobs", self.namespace, name, patch)
        spec = job["spec"]
        selected = (spec.get("clusterSelector") or {}).get("ray.io/cluster")
        cluster = selected or f"{name}-{_suffix()}"
        job_id = spec.get("jobId") or f"{name}-{_suffix()}"
        first = {"jobId": job_id, "rayClusterName": cluster, "startTime": now()}
        self.set(name, jobDeploymentStatus="Initializing", jobStatus="", **first)
        if spec.get("suspend"):
            self.set(name, jobDeploymentStatus="Suspending")
            self._suspended(name)
            return
        if not selected:
            self._create_cluster(name, cluster)

    def provision(self, name: str, url: str | None = None) -> None:
        """The cluster's pods run; the job is Running, though Ray does not know it yet."""
        cluster = self.job(name)["status"]["rayClusterName"]
        service = f"{cluster}-head-svc.{self.namespace}.svc.cluster.local:{DASHBOARD_PORT}"
        for index, pod in enumerate(self.pods(name)):
            patch = {"spec": {"nodeName": NODE}}
            self.store.patch("pods", self.namespace, pod, patch)
            status: Json = {"phase": "Running", "podIP": f"10.0.0.{index + 1}", "startTime": now()}
            status["conditions"] = [{"type": "Ready", "status": "True", "lastTransitionTime": now()}]
            self.store.patch("pods", self.namespace, pod, {"status": status}, part="status")
        ready = {"state": "ready", "lastUpdateTime": now(), "desiredWorkerReplicas": len(self.pods(name)) - 1}
        self.store.patch("rayclusters", self.namespace, cluster, {"status": ready}, part="status")
        self.set(name, jobDeploymentStatus="Running", dashboardURL=url or service, rayClusterStatus=ready)

    def run(self, name: str, job_status: str = "RUNNING", message: str = "") -> None:
        """Ray's own status of the job: PENDING, then RUNNING."""
        started = {"rayJobInfo": {"startTime": now()}} if job_status == "RUNNING" else {}
        self.set(name, jobDeploymentStatus="Running", jobStatus=job_status, message=message, **started)

    def finish(self, name: str, job_status: str = "SUCCEEDED", message: str = "") -> None:
        """The job ended: SUCCEEDED and STOPPED are Complete, FAILED is Failed with AppFailed."""
        assert job_status in TERMINAL
        if job_status == "FAILED":
            self.fail(name, "AppFailed", message, jobStatus="FAILED")
            return
        self.set(
            name,
            jobDeploymentStatus="Complete",
            jobStatus=job_status,
            message=message,
            endTime=now(),
            succeeded=int(job_status == "SUCCEEDED"),
        )

    def fail(self, name: str, reason: str, message: str = "", **status: Any) -> None:
        """Failed, for a reason such as DeadlineExceeded, SubmissionFailed, PreRunningDeadlineExceeded or
        JobStatusCheckTimeoutExceeded; Retrying where backoffLimit allows.
        """
        job = self.job(name)
        failed = job.get("status", {}).get("failed", 0) + 1
        final = reason == "DeadlineExceeded" or failed > job["spec"].get("backoffLimit", 0)
        state = "Failed" if final else "Retrying"
        status |= {"reason": reason, "message": message, "failed": failed, "endTime": now()}
        self.set(name, jobDeploymentStatus=state, **status)

    def retry(self, name: str) -> None:
        """Of a job that is Retrying: delete its cluster and begin anew."""
        assert self.job(name)["status"]["jobDeploymentStatus"] == "Retrying"
        self._delete_cluster(name)
        self._reset(name, "")
        self.see(name)

    def suspend(self, name: str, *, done: bool = True) -> None:
        """Kueue takes the room away: Suspending, and if ``done``, Suspended without a cluster."""
        self.store.patch("rayjobs", self.namespace, name, {"spec": {"suspend": True}})
        self.event(name, "Stopped", "Preempted to accommodate a workload in the ClusterQueue", "Normal")
        if "status" not in self.job(name):
            self.see(name)
            return
        self.set(name, jobDeploymentStatus="Suspending")
        if done:
            self._suspended(name)

    def resume(self, name: str) -> None:
        """Kueue admits the job: it begins anew."""
        self.store.patch("rayjobs", self.namespace, name, {"spec": {"suspend": False}})
        self.event(name, "Started", "Admitted by clusterQueue cluster-queue", "Normal")
        self._reset(name, "")
        self.see(name)

    def evict(self, name: str, pod: int = 0) -> None:
        """The kubelet evicts a pod (0: the head's)."""
        evicted = self.pods(name)[pod]
        message = "The node was low on resource: memory."
        status = {"phase": "Failed", "reason": "Evicted", "message": message}
        self.store.patch("pods", self.namespace, evicted, {"status": status}, part="status")
        self.event(evicted, "Evicted", message, "Warning", kind="Pod")

    def lose_room(
        self, name: str, message: str = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    ) -> None:
        """The scheduler finds no node for the pods."""
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        for pod in self.pods(name):
            status = {"phase": "Pending", "conditions": [condition]}
            self.store.patch("pods", self.namespace, pod, {"status": status}, part="status")
            self.event(pod, "FailedScheduling", message, "Warning", kind="Pod")

    def clean_up(self, name: str) -> None:
        """Delete the cluster of a job that ended, as shutdownAfterJobFinishes says after the TTL."""
        if self.job(name)["spec"].get("shutdownAfterJobFinishes"):
            self._delete_cluster(name)

    def finalize(self, name: str) -> None:
        """Of a RayJob that is being deleted: remove our finalizer, and end its pods.

        While the Secret that ``authOptions`` names is missing, the operator cannot stop the job, and the
        finalizer stays.
        """
        job = self.job(name)
        assert "deletionTimestamp" in job["metadata"], f"{name} is not being deleted"
        secret = (job["spec"].get("rayClusterSpec") or {}).get("authOptions", {}).get("secretName")
        is_over = job.get("status", {}).get("jobStatus") in TERMINAL
        if secret and not is_over and self.store.find("secrets", self.namespace, secret) is None:
            self.event(name, "FailedToStopJob", f'secrets "{secret}" not found', "Warning")
            return
        pods = self.pods(name)
        finalizers = [each for each in job["metadata"].get("finalizers", []) if each != FINALIZER]
        self.store.patch("rayjobs", self.namespace, name, {"metadata": {"finalizers": finalizers}})
        self.end_pods(*pods)

    def end_pods(self, *names: str) -> None:
        """The kubelet confirms that the containers of these pods, if they are being deleted, have stopped."""
        for name in names:
            pod = self.store.find("pods", self.namespace, name)
            if pod and "deletionTimestamp" in pod["metadata"]:
                self.store.delete("pods", self.namespace, name, {"gracePeriodSeconds": 0})

    def pods(self, name: str) -> list[str]:
        """The names of the job's pods, the head's first."""
        cluster = self.job(name).get("status", {}).get("rayClusterName")
        pods = self.store.list("pods", self.namespace, lambda pod: _cluster_of(pod) == cluster)
        return sorted((each["metadata"]["name"] for each in pods), key=lambda each: "-head-" not in each)

    def set(self, name: str, **status: Any) -> None:
        """Write fields of the status. Empty ones go, as the operator leaves them out."""
        status = {field: None if value == "" else value for field, value in status.items()}
        self.store.patch("rayjobs", self.namespace, name, {"status": status}, part="status")

    def event(self, name: str, reason: str, message: str, type: str, *, kind: str = "RayJob") -> None:
        """Record an event about a RayJob or a pod."""
        about = self.store.get("pods" if kind == "Pod" else "rayjobs", self.namespace, name)
        reference = {"kind": kind, "name": name, "namespace": self.namespace, "uid": about["metadata"]["uid"]}
        self.store.create(
            "events",
            self.namespace,
            {
                "metadata": {"generateName": f"{name}."},
                "involvedObject": reference,
                "reason": reason,
                "message": message,
                "type": type,
                "source": {"component": "rayjob-controller"},
                "firstTimestamp": now(),
                "lastTimestamp": now(),
                "count": 1,
            },
        )

    def _create_cluster(self, name: str, cluster: str) -> None:
        """The RayCluster, its head Service and its pods, which nothing has scheduled yet; and the Secret with
        Ray's token, if there is none.
        """
        job = self.job(name)
        spec = job["spec"]["rayClusterSpec"]
        secret = (spec.get("authOptions") or {}).get("secretName")
        if secret and self.store.find("secrets", self.namespace, secret) is None:
            data = {"auth_token": base64.b64encode(secrets.token_hex(32).encode()).decode()}
            self.store.create("secrets", self.namespace, {"metadata": {"name": secret}, "data": data})
        labels = {**(job["metadata"].get("labels") or {}), "ray.io/originated-from-cr-name": name}
        labels["ray.io/originated-from-crd"] = "RayJob"
        meta = {"name": cluster, "labels": labels, "ownerReferences": [_owner(job)]}
        meta["annotations"] = job["metadata"].get("annotations") or {}
        body = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": meta, "spec": spec}
        made = self.store.create("rayclusters", self.namespace, body)
        self.event(name, "CreatedRayCluster", f"Created RayCluster {self.namespace}/{cluster}", "Normal")
        service = {"name": f"{cluster}-head-svc", "ownerReferences": [_owner(made)]}
        ports = [{"name": "dashboard", "port": DASHBOARD_PORT}]
        self.store.create("services", self.namespace, {"metadata": service, "spec": {"ports": ports}})
        for group, node_type, pod, template in pods_of(cluster, spec):
            own = template.get("metadata") or {}
            owned = {"ray.io/cluster": cluster, "ray.io/group": group, "ray.io/node-type": node_type}
            meta = {
                "name": pod,
                "labels": {**(own.get("labels") or {}), **owned, "ray.io/is-ray-node": "yes"},
                "annotations": own.get("annotations") or {},
                "ownerReferences": [_owner(made)],
            }
            body = {"metadata": meta, "spec": template["spec"], "status": {"phase": "Pending"}}
            self.store.create("pods", self.namespace, body)

    def _recreate(self, pod: Json) -> None:
        """A new pod in place of one that has failed."""
        old = pod["metadata"]
        meta = {name: old[name] for name in ("labels", "annotations", "ownerReferences") if name in old}
        meta["name"] = f"{old['name'].rpartition('-')[0]}-{_suffix()}"
        spec = {name: value for name, value in pod["spec"].items() if name != "nodeName"}
        self.store.create(
            "pods", self.namespace, {"metadata": meta, "spec": spec, "status": {"phase": "Pending"}}
        )

    def _delete_cluster(self, name: str) -> None:
        pods = self.pods(name)
        cluster = self.job(name)["status"].get("rayClusterName", "")
        if self.store.find("rayclusters", self.namespace, cluster):
            self.store.delete("rayclusters", self.namespace, cluster)
            self.event(name, "DeletedRayCluster", f"Deleted cluster {self.namespace}/{cluster}", "Normal")
        self.end_pods(*pods)

    def _suspended(self, name: str) -> None:
        self._delete_cluster(name)
        self._reset(name, "Suspended")

    def _reset(self, name: str, state: str) -> None:
        """What the operator forgets where a job begins anew."""
        gone = (
            "jobId",
            "rayClusterName",
            "dashboardURL",
            "message",
            "reason",
            "rayJobInfo",
            "rayClusterStatus",
        )
        self.set(name, jobDeploymentStatus=state, jobStatus="", **dict.fromkeys(gone))


def pods_of(cluster: str, spec: Json) -> Iterator[tuple[str, str, str, Json]]:
    """Group, node type, name and template of each pod of a RayCluster, the head's first."""
    yield "headgroup", "head", f"{cluster}-head-{_suffix()}", spec["headGroupSpec"]["template"]
    for group in spec.get("workerGroupSpecs") or []:
        for _ in range(group.get("replicas", group["minReplicas"]) * group.get("numOfHosts", 1)):
            name = group["groupName"]
            yield name, "worker", f"{cluster}-{name}-worker-{_suffix()}", group["template"]


def _owner(item: Json) -> Json:
    meta = item["metadata"]
    owner = {"apiVersion": item["apiVersion"], "kind": item["kind"], "name": meta["name"], "uid": meta["uid"]}
    return owner | {"controller": True, "blockOwnerDeletion": True}


def _cluster_of(pod: Json) -> str | None:
    cluster: str | None = (pod["metadata"].get("labels") or {}).get("ray.io/cluster")
    return cluster


def _any(item: Json) -> bool:
    return True


def _suffix() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(5))
