"""The life cycles of a RayJob: what the operator does, step by step, and what a launcher then reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.control.launchers.contract import RunState
from tests.support.kube.operator import Operator


@dataclass(frozen=True)
class Step:
    """``play`` acts on the RayJob of a name; then the run is in ``state``, for good if ``is_final``.

    ``reason`` is what the RunStatus names; None: anything.
    """

    name: str
    play: Callable[[Operator, str], None]
    state: RunState
    reason: str | None = None
    is_final: bool = False


@dataclass(frozen=True)
class LifeCycle:
    """``id`` names the case."""

    id: str
    steps: tuple[Step, ...]


def _nothing(operator: Operator, name: str) -> None:
    """The operator is absent, or has not looked yet."""


def _delete(operator: Operator, name: str) -> None:
    """Someone else deletes the RayJob."""
    operator.store.delete("rayjobs", operator.namespace, name, {"propagationPolicy": "Background"})


def _lose_secret(operator: Operator, name: str) -> None:
    """The Secret of the token goes, then someone deletes the RayJob: it hangs in Terminating."""
    spec = operator.job(name)["spec"]["rayClusterSpec"]
    secret = spec["authOptions"]["secretName"]
    if operator.store.find("secrets", operator.namespace, secret):
        operator.store.delete("secrets", operator.namespace, secret)
    _delete(operator, name)
    operator.finalize(name)


UNSEEN = Step("the operator has not looked yet", _nothing, "pending")
SEEN = Step("Initializing", Operator.see, "pending", "Initializing")
PROVISIONED = Step("Running, unknown to Ray", Operator.provision, "pending")
PENDING = Step("Running, PENDING", lambda operator, name: operator.run(name, "PENDING"), "pending")
RUNNING = Step("Running, RUNNING", Operator.run, "running")
STARTED = (UNSEEN, SEEN, PROVISIONED, PENDING, RUNNING)


def _fails(reason: str, *before: Step, is_final: bool = False) -> LifeCycle:
    message = f"stopped for {reason}"
    last = Step(
        reason, lambda operator, name: operator.fail(name, reason, message), "failed", reason, is_final
    )
    return LifeCycle(reason, (*before, last))


def _state(status: str, state: RunState) -> Step:
    return Step(status, lambda operator, name: operator.set(name, jobDeploymentStatus=status), state, status)


LIFE_CYCLES: tuple[LifeCycle, ...] = (
    LifeCycle(
        "succeeds",
        (
            *STARTED,
            Step("Complete, SUCCEEDED", Operator.finish, "succeeded"),
            Step("the cluster is deleted", Operator.clean_up, "succeeded"),
        ),
    ),
    LifeCycle(
        "stopped",
        (
            *STARTED,
            Step("Complete, STOPPED", lambda operator, name: operator.finish(name, "STOPPED"), "stopped"),
        ),
    ),
    LifeCycle(
        "AppFailed",
        (
            *STARTED,
            Step(
                "Failed, AppFailed",
                lambda operator, name: operator.finish(name, "FAILED", "exit code 1"),
                "failed",
                "AppFailed",
            ),
        ),
    ),
    LifeCycle("absent operator", (UNSEEN, UNSEEN)),
    LifeCycle("Waiting", (SEEN, _state("Waiting", "pending"))),
    LifeCycle(
        "Retrying",
        (SEEN, PROVISIONED, _state("Retrying", "pending"), Step("again", Operator.retry, "pending")),
    ),
    _fails("SubmissionFailed", SEEN, PROVISIONED),
    _fails("PreRunningDeadlineExceeded", SEEN),
    _fails("JobStatusCheckTimeoutExceeded", *STARTED),
    _fails("DeadlineExceeded", *STARTED, is_final=True),
    LifeCycle(
        "Suspended before it ran",
        (
            UNSEEN,
            Step("Kueue holds it", Operator.suspend, "pending", "Suspended"),
            Step("Kueue admits it", Operator.resume, "pending"),
            PROVISIONED,
            RUNNING,
        ),
    ),
    LifeCycle(
        "Suspended while it ran",
        (
            *STARTED,
            Step(
                "Suspending",
                lambda operator, name: operator.suspend(name, done=False),
                "running",
                "Suspending",
            ),
            Step("Suspended", Operator.suspend, "stopped", "Suspended"),
        ),
    ),
    LifeCycle("no room", (SEEN, Step("Unschedulable", Operator.lose_room, "pending"), PROVISIONED, RUNNING)),
    LifeCycle(
        "head evicted", (*STARTED, Step("Evicted", Operator.evict, "running"), _fails("AppFailed").steps[0])
    ),
    LifeCycle(
        "deleted under us",
        (
            *STARTED,
            Step("being deleted", _delete, "running"),
            Step("gone", Operator.finalize, "unknown"),
        ),
    ),
    LifeCycle("stuck terminating", (*STARTED, Step("no token Secret", _lose_secret, "running"))),
)
"""Every line of the table. ValidationFailed is apart: it takes a RayJob that the operator refuses."""
