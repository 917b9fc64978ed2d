"""KubeRay's operator with real Ray clusters: a RayJob's head and workers are processes of this machine."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.kube.kubelet import Kubelet
from tests.support.kube.objects import ApiError, now
from tests.support.kube.operator import TERMINAL, Operator
from tests.support.kube.schema import Json
from tests.support.kube.server import KubeServer
from tests.support.namespaces import PodNetwork


class ProcessOperator(Operator):
    """Plays every RayJob by itself, while the ``with`` block lasts; afterwards nothing is left.

    ``network`` holds the pods, each with an address of its own; None: all share 127.0.0.1, with free ports.
    ``env`` are variables of the pods' image. ``status_check_timeout_s``: how long a dashboard may be silent
    before the job has failed (JobStatusCheckTimeoutExceeded).

    Not played: Kueue, the autoscaler (a group has ``replicas`` pods), volumes, init containers, sidecars.
    """

    def __init__(
        self,
        server: KubeServer,
        folder: Path,
        network: PodNetwork | None = None,
        *,
        namespace: str = "default",
        env: Mapping[str, str] | None = None,
        status_check_timeout_s: float = 300.0,
        period_s: float = 0.5,
    ) -> None:
        super().__init__(server, namespace)
        self.kubelet = Kubelet(self.store, namespace, folder, network, env)
        self._status_check_timeout_s = status_check_timeout_s
        self._period_s = period_s
        self._silent_since: dict[str, float] = {}
        self._http = httpx.Client(timeout=10.0, trust_env=False)
        self._closed = threading.Event()
        self._loop = threading.Thread(target=self._run, daemon=True)
        self.errors: list[str] = []
        """Tracebacks of reconciliations that failed."""

    def __enter__(self) -> ProcessOperator:
        self._loop.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._closed.set()
        self._loop.join(120.0)
        self.kubelet.close()
        self._http.close()
        if kind is None:
            assert not self.errors, "\n".join(self.errors)

    def end_pods(self, *names: str) -> None:
        """The kubelet does it, once the containers have stopped."""

    def _run(self) -> None:
        while not self._closed.wait(self._period_s):
            try:
                self.kubelet.tend()
                for name in self.jobs():
                    with suppress(ApiError):  # it has changed or gone meanwhile: the next round sees it
                        self._reconcile(name)
            except ApiError:
                continue
            except Exception:
                self.errors.append(traceback.format_exc())

    def _reconcile(self, name: str) -> None:
        job = self.job(name)
        status = job.get("status") or {}
        state = status.get("jobDeploymentStatus", "")
        spec = job["spec"]
        if "deletionTimestamp" in job["metadata"]:
            if status.get("jobStatus") not in TERMINAL:
                self._stop(name, status)
            self.finalize(name)
        elif state == "":
            self.see(name)
        elif state in ("Initializing", "Running") and spec.get("suspend"):
            self.set(name, jobDeploymentStatus="Suspending")
        elif state == "Suspending":
            self._suspended(name)
        elif state == "Suspended" and not spec.get("suspend"):
            self._reset(name, "")
        elif state == "Retrying":
            self.retry(name)
        elif state in ("Initializing", "Running") and self._is_late(
            status, spec.get("activeDeadlineSeconds")
        ):
            self.fail(name, "DeadlineExceeded", "The RayJob has passed the activeDeadlineSeconds.")
        elif state == "Initializing":
            self._initialize(name, job)
        elif state == "Running":
            self._repair(name)
            self._follow(name, job)
        elif state in ("Complete", "Failed") and _seconds_since(status["endTime"]) >= spec.get(
            "ttlSecondsAfterFinished", 0
        ):
            self.clean_up(name)

    def _initialize(self, name: str, job: Json) -> None:
        """Wait until all pods are nodes of the cluster."""
        if self._is_late(job["status"], job["spec"].get("preRunningDeadlineSeconds")):
            message = "The RayJob has passed the preRunningDeadlineSeconds."
            self.fail(name, "PreRunningDeadlineExceeded", message)
            return
        self._repair(name)
        cluster = job["status"]["rayClusterName"]
        head = self.kubelet.address(cluster)
        if head is None:
            return
        url = f"{head[0]}:{head[1].dashboard}"
        answer = self._ask(job, "GET", url, "/nodes", params={"view": "summary"})
        if answer is None or not answer.is_success:
            return
        nodes = answer.json()["data"]["summary"]
        alive = sum(each.get("raylet", {}).get("state") == "ALIVE" for each in nodes)
        if alive < len(self.pods(name)):
            return
        for pod in self.pods(name):
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": now()}
            self.store.patch("pods", self.namespace, pod, {"status": {"conditions": [ready]}}, part="status")
        done = {"state": "ready", "lastUpdateTime": now(), "desiredWorkerReplicas": len(self.pods(name)) - 1}
        self.store.patch("rayclusters", self.namespace, cluster, {"status": done}, part="status")
        self.set(name, jobDeploymentStatus="Running", dashboardURL=url, rayClusterStatus=done)

    def _repair(self, name: str) -> None:
        """Replace pods that have failed for good, such as evicted ones."""
        for pod in self.pods(name):
            found = self.store.get("pods", self.namespace, pod)
            if (found.get("status") or {}).get("phase") != "Failed" or "deletionTimestamp" in found[
                "metadata"
            ]:
                continue
            self.store.delete("pods", self.namespace, pod)
            self._recreate(found)

    def _follow(self, name: str, job: Json) -> None:
        """Submit the job if Ray does not know it, and write down what Ray says of it."""
        status = job["status"]
        head = self.kubelet.address(status["rayClusterName"])
        if head is not None:
            status = status | {"dashboardURL": f"{head[0]}:{head[1].dashboard}"}
        path = f"/api/jobs/{status['jobId']}"
        answer = self._ask(job, "GET", status["dashboardURL"], path)
        if answer is None or answer.status_code >= 500:
            began = self._silent_since.setdefault(name, time.monotonic())
            if time.monotonic() - began > self._status_check_timeout_s:
                message = "JobStatus could not be checked: the dashboard does not answer."
                self.fail(name, "JobStatusCheckTimeoutExceeded", message)
            return
        self._silent_since.pop(name, None)
        if answer.status_code == 404:
            self._ask(job, "POST", status["dashboardURL"], "/api/jobs/", json=submission(job))
            return
        info = answer.raise_for_status().json()
        told = (info["status"], info.get("message") or "")
        if told == (status.get("jobStatus"), status.get("message", "")):
            return
        if info["status"] in TERMINAL:
            self.finish(name, *told)
        else:
            self.set(name, jobStatus=told[0], message=told[1], dashboardURL=status["dashboardURL"])

    def _stop(self, name: str, status: Json) -> None:
        """Tell Ray to stop the job of a RayJob that is being deleted."""
        job = self.job(name)
        if status.get("dashboardURL") and status.get("jobId"):
            self._ask(job, "POST", status["dashboardURL"], f"/api/jobs/{status['jobId']}/stop")

    def _ask(self, job: Json, method: str, url: str, path: str, **options: Any) -> httpx.Response | None:
        """The dashboard's answer, or None."""
        headers = {}
        auth = job["spec"]["rayClusterSpec"].get("authOptions") or {}
        if auth.get("mode") == "token":
            with suppress(ValueError):
                secret = auth.get("secretName") or job["status"]["rayClusterName"]
                headers = {"Authorization": f"Bearer {self.kubelet.sources.secret(secret, 'auth_token')}"}
        try:
            return self._http.request(method, f"http://{url}{path}", headers=headers, **options)
        except httpx.HTTPError:
            return None

    @staticmethod
    def _is_late(status: Json, limit_s: int | None) -> bool:
        return limit_s is not None and _seconds_since(status["startTime"]) >= limit_s


def submission(job: Json) -> Json:
    """What the operator posts to the dashboard in HTTPMode."""
    spec = job["spec"]
    body = {
        "entrypoint": spec["entrypoint"],
        "submission_id": job["status"]["jobId"],
        "metadata": spec.get("metadata") or {},
        "runtime_env": yaml.safe_load(spec.get("runtimeEnvYAML", "")) or {},
    }
    numbers = {"entrypoint_num_cpus": "entrypointNumCpus", "entrypoint_num_gpus": "entrypointNumGpus"}
    body |= {ours: spec[theirs] for ours, theirs in numbers.items() if spec.get(theirs)}
    if spec.get("entrypointResources"):
        body["entrypoint_resources"] = yaml.safe_load(spec["entrypointResources"])
    return body


def _seconds_since(text: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
