"""Runs on a Ray cluster of their own: one RayJob each, which KubeRay starts and removes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime

from services.control.launchers import rayjob
from services.control.launchers.contract import Run, RunStatus
from services.control.launchers.kubernetes_api import KubernetesApi, Object
from services.control.launchers.ray_jobs import RayJobsLauncher
from services.control.launchers.rayjob_states import run_status
from services.errors import Conflict, NotFound, Refused, Unavailable
from services.stages import layout
from services.storage import files

log = logging.getLogger("dde")
OPERATOR_S = 60.0
"""How long an operator that runs may take to take up a RayJob: it works through a queue."""
EXPLAINED_S = 10.0
"""How long the explanation of a waiting run is kept: a review of a job asks more often than it changes."""
ORIGIN = "ray.io/originated-from-cr-name"
"""KubeRay's label of a RayCluster: the name of its RayJob."""
ENDED_PODS = ("Succeeded", "Failed")
ENDED = ("Complete", "Failed", "ValidationFailed")


class KubeRayLauncher:
    """One RayJob for each run. Reads its state from the Kubernetes API at every call."""

    def __init__(
        self,
        api: KubernetesApi,
        template: rayjob.Template,
        options: rayjob.Options,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._template = template
        self._options = options
        self._clock = clock
        self._explained: dict[str, tuple[float, str | None]] = {}

    def submit(self, run: Run) -> None:
        body = self._template.rayjob(run, self._options)
        name = body["metadata"]["name"]
        try:
            self._api.create_rayjob(body)
            return
        except Conflict:
            existing = self._find(name)
        except NotFound as error:
            namespace = self._api.namespace
            message = f"{error}; KubeRay must be installed, and namespace {namespace} must exist"
            raise Unavailable(message) from error
        if existing is None or "deletionTimestamp" in existing["metadata"]:
            raise Unavailable(f"RayJob {name} of an earlier submit is being deleted")
        self._adopt(existing, body)

    def _adopt(self, existing: Object, body: Object) -> None:
        """Accept a RayJob that exists already: the answer to an earlier submit was lost.

        One with another spec, such as of an older template, is deleted. Raises Unavailable then: the next
        submit creates it anew. Raises Refused for somebody else's.
        """
        meta = existing["metadata"]
        labels = meta.get("labels", {})
        theirs = {key: labels.get(key) for key in (rayjob.MANAGED_BY, rayjob.INSTALLATION, rayjob.JOB)}
        ours = {key: body["metadata"]["labels"].get(key) for key in theirs}
        if theirs != ours:
            raise Refused(f"RayJob {meta['name']} belongs to somebody else: its labels are {theirs}")
        if meta.get("annotations", {}).get(rayjob.DIGEST) == body["metadata"]["annotations"][rayjob.DIGEST]:
            return
        self._delete(existing)
        raise Unavailable(f"RayJob {meta['name']} has an older spec: it is replaced")

    def status(self, run_id: str) -> RunStatus:
        name = rayjob.name_of(run_id)
        found = self._find(name)
        if found is None or "deletionTimestamp" in found["metadata"]:
            return self._status_of_deleted(name, exists=found is not None)
        status = run_status(found, lambda: _has_run(found))
        if status.state == "pending":
            return self._status_of_pending(found, status)
        if status.state == "failed":
            return _with(status, self._warnings(found))
        return status

    def _status_of_deleted(self, name: str, *, exists: bool) -> RunStatus:
        """What is deleted runs until its pods are gone, also where somebody else deleted it.

        A RayJob without pods is over, even if Kubernetes never removes it, such as one whose token is gone.
        """
        pods = [pod["metadata"]["name"] for pod in self._pods(name)]
        with _no_refusals():
            clusters = self._api.rayclusters(f"{ORIGIN}={name}")
        is_growing = any("deletionTimestamp" not in each["metadata"] for each in clusters)
        if pods or is_growing:
            listed = ", ".join(pods) or "none yet"
            return RunStatus(
                "running", "Terminating", f"its RayJob is deleted; pods that still run: {listed}"
            )
        if exists:
            return RunStatus("stopped", "Terminating", "its RayJob is being deleted; none of its pods runs")
        return RunStatus("unknown")

    def _status_of_pending(self, found: Object, status: RunStatus) -> RunStatus:
        """A waiting run with what it waits for. One that no operator took up fails at its own deadline."""
        if (found.get("status") or {}).get("jobDeploymentStatus"):
            return _with(status, self._explanation(found))
        waited_s = self._clock() - _timestamp(found["metadata"]["creationTimestamp"])
        if waited_s < OPERATOR_S:
            return status
        why = f"no KubeRay operator has taken it up for {waited_s:.0f} s"
        limit_s = found["spec"].get("preRunningDeadlineSeconds")
        if limit_s is not None and waited_s > limit_s:
            return RunStatus("failed", "PreRunningDeadlineExceeded", why)
        return RunStatus("pending", "NoOperator", why)

    def stop(self, run_id: str) -> None:
        found = self._find(rayjob.name_of(run_id))
        if found is None or "deletionTimestamp" in found["metadata"]:
            return
        dashboard = self._dashboard(found)
        if dashboard is not None:
            try:
                dashboard.stop(found["spec"]["jobId"])
            except Unavailable as error:  # the operator stops the job, too, before it removes the cluster
                log.info("run %s: its dashboard does not accept a stop: %s", run_id, error)
        self._delete(found)

    def log_tail(self, run_id: str) -> str:
        found = self._find(rayjob.name_of(run_id))
        dashboard = None if found is None else self._dashboard(found)
        return "" if dashboard is None else dashboard.log_tail(run_id)

    def runs(self) -> dict[str, bool]:
        """The ids of the runs that this installation has RayJobs of, and whether each has ended."""
        mine = f"{rayjob.MANAGED_BY}={rayjob.MANAGER},{rayjob.INSTALLATION}={self._options.installation}"
        with _no_refusals():
            found = self._api.rayjobs(mine)
        alive = [each for each in found if "deletionTimestamp" not in each["metadata"]]
        return {each["spec"].get("jobId", ""): _deployment(each) in ENDED for each in alive}

    def _find(self, name: str) -> Object | None:
        with _no_refusals():
            try:
                return self._api.rayjob(name)
            except NotFound:
                return None

    def _delete(self, found: Object) -> None:
        """Delete it, unless another one has its name by now."""
        with _no_refusals(), suppress(NotFound):
            self._api.delete_rayjob(found["metadata"]["name"], found["metadata"]["uid"])

    def _pods(self, name: str) -> list[Object]:
        """The pods of a run whose containers may still run."""
        with _no_refusals():
            pods = self._api.pods(f"{rayjob.RUN}={name}")
        return [pod for pod in pods if (pod.get("status") or {}).get("phase") not in ENDED_PODS]

    def _explanation(self, found: Object) -> str | None:
        """What keeps a run's pods from running; at most ``EXPLAINED_S`` old."""
        name = found["metadata"]["name"]
        now = self._clock()
        known = {each: kept for each, kept in self._explained.items() if kept[0] > now}
        if name not in known:
            known[name] = (now + EXPLAINED_S, self._explain(found))
        self._explained = known
        return known[name][1]

    def _explain(self, found: Object) -> str | None:
        pods = self._pods(found["metadata"]["name"])
        waiting = [_why_not_running(pod) for pod in pods if not _runs(pod)]
        texts = [f"{len(pods) - len(waiting)} of {len(pods)} pods run"] if pods else []
        texts += sorted({f"{reason}: {message}" for reason, message in waiting})
        return "; ".join(filter(None, [*texts, self._warnings(found)])) or None

    def _warnings(self, found: Object) -> str | None:
        """The newest warnings of Kubernetes about a RayJob and its cluster."""
        names = [found["metadata"]["name"], (found.get("status") or {}).get("rayClusterName")]
        with _no_refusals():
            newest = [self._api.warnings(name)[-1:] for name in names if name]
        texts = [f"{each.get('reason')}: {each.get('message')}" for events in newest for each in events]
        return "; ".join(texts) or None

    @staticmethod
    def _dashboard(found: Object) -> RayJobsLauncher | None:
        """The Jobs API of a run's own cluster, while it has one."""
        url = (found.get("status") or {}).get("dashboardURL")
        return RayJobsLauncher(f"http://{url}") if url else None


@contextmanager
def _no_refusals() -> Iterator[None]:
    """Only a submit is refused: of anything else, such an answer tells nothing about the run."""
    try:
        yield
    except (Conflict, Refused) as error:
        raise Unavailable(error.message) from error


def _has_run(found: Object) -> bool:
    """Whether the driver of a RayJob was ever started: it says so in storage before it works."""
    prefix = found["metadata"].get("annotations", {}).get(rayjob.PREFIX)
    return prefix is not None and files.exists(layout.started_uri(prefix))


def _deployment(found: Object) -> str:
    return str((found.get("status") or {}).get("jobDeploymentStatus", ""))


def _with(status: RunStatus, explanation: str | None) -> RunStatus:
    message = "; ".join(filter(None, [status.message, explanation])) or None
    return replace(status, message=message)


def _runs(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") == "Running"


def _why_not_running(pod: Object) -> tuple[str, str]:
    """(reason, message) of what a pod waits for: a node, or its image."""
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return condition.get("reason", "Unschedulable"), condition.get("message", "")
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waits = (container.get("state") or {}).get("waiting")
        if waits:
            return waits.get("reason", "Waiting"), waits.get("message", "")
    return str(status.get("phase", "Pending")), "its containers have not started"


def _timestamp(text: str) -> float:
    """Seconds since 1970 of a time of Kubernetes, such as 2026-01-31T12:00:00Z."""
    return datetime.fromisoformat(text).timestamp()
