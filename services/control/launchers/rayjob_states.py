"""What the status of a RayJob says about its run: a table, after KubeRay's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from services.control.launchers.contract import RunState, RunStatus
from services.control.launchers.kubernetes_api import Object
from services.errors import Unavailable

BEFORE_IT_RUNS = ("", "Initializing", "Waiting", "Retrying")
FINAL_REASONS = ("DeadlineExceeded", "ValidationFailed")
"""Why another attempt would fail, too: its own deadline, and a spec that the operator refuses."""
_OF_DRIVER: dict[str, RunState] = {"": "pending", "NEW": "pending", "PENDING": "pending"}
"""By jobStatus while the RayJob is Running. With any other, the driver was started."""
_OF_COMPLETE: dict[str, RunState] = {"SUCCEEDED": "succeeded", "STOPPED": "stopped", "FAILED": "failed"}


def run_status(rayjob: Object, has_run: Callable[[], bool]) -> RunStatus:
    """The status of the run of a RayJob that is not being deleted.

    ``has_run`` finds out whether its driver was ever started: of a suspended RayJob, KubeRay has forgotten.
    Raises Unavailable for a status that is not in the table.
    """
    status: dict[str, Any] = rayjob.get("status") or {}
    deployment = status.get("jobDeploymentStatus", "")
    driver = status.get("jobStatus", "")
    reason = status.get("reason") or deployment or None
    message = status.get("message") or None
    if deployment in BEFORE_IT_RUNS:
        return RunStatus("pending", reason, message)
    if deployment == "Running":
        return RunStatus(_OF_DRIVER.get(driver, "running"), reason, message)
    if deployment == "Suspending":
        return RunStatus("running", reason, message)
    if deployment == "Suspended":
        if not has_run():
            return RunStatus("pending", reason, message or "it is not admitted to the cluster yet")
        return RunStatus("stopped", reason, message or "the cluster took its machines back", is_evicted=True)
    if deployment == "Complete" and driver in _OF_COMPLETE:
        return RunStatus(_OF_COMPLETE[driver], reason, message)
    if deployment == "Failed":
        return RunStatus("failed", reason, message, is_final=reason in FINAL_REASONS)
    if deployment == "ValidationFailed":
        return RunStatus("failed", reason, message, is_final=True)
    name = rayjob["metadata"]["name"]
    text = f"jobDeploymentStatus {deployment!r} with jobStatus {driver!r}"
    raise Unavailable(f"RayJob {name}: this version knows no {text}")
