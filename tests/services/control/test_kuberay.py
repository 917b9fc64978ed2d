"""RayJobs on a stand-in API server: every line of the table of states, and what comes between two calls."""

from __future__ import annotations

import time

import pytest

from services.control.launchers import rayjob
from services.control.launchers.contract import RunStatus
from services.control.launchers.kuberay import OPERATOR_S
from services.control.launchers.kubernetes_api import KubernetesApi
from services.control.launchers.rayjob_states import run_status
from services.errors import Refused, Unavailable
from services.storage import files
from tests.services.control.test_launchers import KubeWorld, stand_in
from tests.support.kube import LIFE_CYCLES, Fault, LifeCycle
from tests.support.s3_server import first


@pytest.fixture(scope="module")
def module_world(tmp_path_factory):
    with stand_in(tmp_path_factory.mktemp("runs")) as world:
        yield world


@pytest.fixture
def world(module_world):
    """Without faults before and after a test."""
    store = module_world.server.store
    module_world.server.inject()
    yield module_world
    module_world.server.inject()
    store.quotas.clear()
    store.holds_garbage = False
    store.collect()


class Clock:
    """The time, and some more."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


# ---- the table of states

ROWS = [
    ("", "", "", False, RunStatus("pending")),
    ("Initializing", "", "", False, RunStatus("pending", "Initializing")),
    ("Waiting", "", "", False, RunStatus("pending", "Waiting")),
    ("Retrying", "FAILED", "", False, RunStatus("pending", "Retrying")),
    ("Running", "", "", False, RunStatus("pending", "Running")),
    ("Running", "PENDING", "", False, RunStatus("pending", "Running")),
    ("Running", "RUNNING", "", True, RunStatus("running", "Running")),
    ("Running", "SUCCEEDED", "", True, RunStatus("running", "Running")),
    ("Suspending", "RUNNING", "", True, RunStatus("running", "Suspending")),
    (
        "Suspended",
        "",
        "",
        False,
        RunStatus("pending", "Suspended", "it is not admitted to the cluster yet"),
    ),
    (
        "Suspended",
        "",
        "",
        True,
        RunStatus("stopped", "Suspended", "the cluster took its machines back", is_evicted=True),
    ),
    ("Complete", "SUCCEEDED", "", True, RunStatus("succeeded", "Complete")),
    ("Complete", "STOPPED", "", True, RunStatus("stopped", "Complete")),
    ("Complete", "FAILED", "", True, RunStatus("failed", "Complete")),
    ("Failed", "FAILED", "AppFailed", True, RunStatus("failed", "AppFailed")),
    ("Failed", "", "SubmissionFailed", False, RunStatus("failed", "SubmissionFailed")),
    ("Failed", "", "PreRunningDeadlineExceeded", False, RunStatus("failed", "PreRunningDeadlineExceeded")),
    (
        "Failed",
        "RUNNING",
        "JobStatusCheckTimeoutExceeded",
        True,
        RunStatus("failed", "JobStatusCheckTimeoutExceeded"),
    ),
    (
        "Failed",
        "RUNNING",
        "DeadlineExceeded",
        True,
        RunStatus("failed", "DeadlineExceeded", is_final=True),
    ),
    ("Failed", "", "ValidationFailed", False, RunStatus("failed", "ValidationFailed", is_final=True)),
    (
        "ValidationFailed",
        "",
        "ValidationFailed",
        False,
        RunStatus("failed", "ValidationFailed", is_final=True),
    ),
]


@pytest.mark.parametrize(("deployment", "job", "reason", "has_run", "expected"), ROWS)
def test_a_status_of_kuberay_means_one_of_a_run(deployment, job, reason, has_run, expected):
    status = {"jobDeploymentStatus": deployment, "jobStatus": job, "reason": reason}
    found = {"metadata": {"name": "a"}, "status": {key: value for key, value in status.items() if value}}
    assert run_status(found, lambda: has_run) == expected


def test_the_message_of_kuberay_is_passed_on():
    status = {"jobDeploymentStatus": "Failed", "reason": "AppFailed", "message": "exit code 9"}
    assert run_status({"metadata": {"name": "a"}, "status": status}, bool).message == "exit code 9"


@pytest.mark.parametrize("status", [{"jobDeploymentStatus": "Paused"}, {"jobDeploymentStatus": "Complete"}])
def test_a_status_that_no_version_had_tells_nothing_about_the_run(status):
    with pytest.raises(Unavailable, match=r"RayJob a: this version knows no .*jobStatus ''"):
        run_status({"metadata": {"name": "a"}, "status": status}, bool)


@pytest.mark.parametrize("cycle", LIFE_CYCLES, ids=lambda cycle: cycle.id)
def test_a_life_cycle_is_reported_step_by_step(cycle: LifeCycle, world: KubeWorld):
    run = world.run()
    name = world.name(run)
    world.launcher.submit(run)
    for step in cycle.steps:
        step.play(world.operator, name)
        if step.name == "Running, RUNNING":
            world.works(run)
        status = world.launcher.status(run.id)
        assert (status.state, status.is_final) == (step.state, step.is_final), (step.name, status)
        assert step.reason in (None, status.reason), (step.name, status)
        assert status.is_evicted == (step.name == "Suspended"), (step.name, status)


def test_a_spec_that_the_operator_refuses_has_failed_for_good(world):
    run = world.run()
    world.launcher.submit(run)
    cluster = {"rayVersion": "2.51.0"}
    store = world.server.store
    store.patch("rayjobs", "default", world.name(run), {"spec": {"rayClusterSpec": cluster}})
    world.operator.see(world.name(run))
    status = world.launcher.status(run.id)
    assert (status.state, status.reason, status.is_final) == ("failed", "ValidationFailed", True)
    assert "minimum Ray version is 2.52.0" in status.message
    assert "InvalidRayJobSpec" in status.message, "the operator's event"


# ---- between two calls


def test_a_run_that_no_operator_takes_up_says_so_and_fails_at_its_own_deadline(world):
    clock = Clock()
    launcher = world.connected(clock)
    run = world.run(starts_within_s=600)
    launcher.submit(run)
    assert launcher.status(run.id) == RunStatus("pending")
    clock.ahead = OPERATOR_S + 5
    status = launcher.status(run.id)
    assert (status.state, status.reason) == ("pending", "NoOperator")
    assert status.message.startswith("no KubeRay operator has taken it up for 6")
    clock.ahead = 605
    status = launcher.status(run.id)
    assert (status.state, status.reason, status.is_final) == ("failed", "PreRunningDeadlineExceeded", False)
    world.operator.see(world.name(run))
    assert launcher.status(run.id).state == "pending", "it is late, but it is there"


def test_a_waiting_run_says_what_its_pods_wait_for(world):
    clock = Clock()
    launcher = world.connected(clock)
    run = world.run()
    launcher.submit(run)
    name = world.name(run)
    world.operator.see(name)
    assert launcher.status(run.id).message.startswith("0 of 3 pods run; ")
    world.operator.lose_room(name, "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    assert "Insufficient" not in launcher.status(run.id).message, "it is asked for every 10 s"
    clock.ahead += 11
    assert launcher.status(run.id).message.endswith(
        "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    )
    pod = world.operator.pods(name)[0]
    waits = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    status = {"conditions": [], "containerStatuses": [{"name": "ray-head", "state": waits}]}
    world.server.store.patch("pods", "default", pod, {"status": status}, part="status")
    world.operator.event(name, "FailedToCreateRayCluster", "quota", "Warning")
    clock.ahead += 11
    message = launcher.status(run.id).message
    assert message == (
        "0 of 3 pods run; ImagePullBackOff: no such image; Unschedulable: 0/3 nodes are available: "
        "3 Insufficient nvidia.com/gpu.; FailedToCreateRayCluster: quota"
    )


def test_a_lost_reply_to_an_older_spec_is_replaced_by_the_newer(world):
    run = world.run()
    world.connected(image="dde-ray:1").submit(run)
    newer = world.connected(image="dde-ray:2")
    with pytest.raises(Unavailable, match="has an older spec: it is replaced"):
        newer.submit(run)
    newer.submit(run)
    spec = world.operator.job(world.name(run))["spec"]["rayClusterSpec"]
    assert spec["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] == "dde-ray:2"


def test_a_rayjob_of_somebody_else_is_left_alone_and_the_run_refused(world):
    run = world.run()
    world.connected(installation="there").submit(run)
    with pytest.raises(Refused, match=r"belongs to somebody else.*'dde-installation': 'there'"):
        world.launcher.submit(run)
    assert "deletionTimestamp" not in world.operator.job(world.name(run))["metadata"]


def test_a_run_whose_rayjob_is_still_being_deleted_is_submitted_later(world):
    run = world.run()
    world.launcher.submit(run)
    world.goes_on(run)
    world.launcher.stop(run.id)
    with pytest.raises(Unavailable, match="of an earlier submit is being deleted"):
        world.launcher.submit(run)
    world.carries_out_stops(run)
    world.launcher.submit(run)
    assert world.launcher.status(run.id).state == "pending"


def test_a_stop_reaches_the_driver_first_and_then_all_pods_before_the_rayjob(world):
    run = world.run()
    name = world.name(run)
    world.launcher.submit(run)
    world.goes_on(run)
    world.launcher.stop(run.id)
    assert world.jobs[run.id] == "STOPPED", "the driver was told to stop"
    meta = world.operator.job(name)["metadata"]
    assert "foregroundDeletion" in meta["finalizers"]
    pods = world.operator.pods(name)
    status = world.launcher.status(run.id)
    assert (status.state, status.reason) == ("running", "Terminating")
    assert all(pod in status.message for pod in pods)
    assert len(pods) == 3
    world.carries_out_stops(run)
    assert world.launcher.status(run.id) == RunStatus("unknown")


def test_a_stop_without_a_dashboard_still_deletes_the_rayjob(world):
    run = world.run()
    world.launcher.submit(run)
    name = world.name(run)
    world.operator.see(name)
    world.operator.provision(name, "127.0.0.1:1")
    world.operator.run(name)
    world.launcher.stop(run.id)
    assert "deletionTimestamp" in world.operator.job(name)["metadata"]
    with pytest.raises(Unavailable):
        world.launcher.log_tail(run.id)


def test_a_rayjob_that_hangs_in_its_deletion_is_over_once_no_pod_runs(world):
    run = world.run()
    name = world.name(run)
    world.launcher.submit(run)
    world.goes_on(run)
    store = world.server.store
    store.delete("secrets", "default", rayjob.TOKEN_SECRET)
    world.launcher.stop(run.id)
    world.operator.finalize(name)
    assert world.launcher.status(run.id).state == "running"
    world.operator.end_pods(*world.operator.pods(name))
    assert store.find("rayjobs", "default", name), "the operator cannot end it without the token"
    status = world.launcher.status(run.id)
    assert (status.state, status.reason) == ("stopped", "Terminating")


def test_pods_that_outlive_a_deleted_rayjob_keep_its_run_running(world):
    run = world.run()
    name = world.name(run)
    world.launcher.submit(run)
    world.goes_on(run)
    pods = world.operator.pods(name)
    store = world.server.store
    store.holds_garbage = True
    store.delete("rayjobs", "default", name, {"propagationPolicy": "Background"})
    world.operator.finalize(name)
    assert store.find("rayjobs", "default", name) is None
    status = world.launcher.status(run.id)
    assert (status.state, status.reason) == ("running", "Terminating")
    store.holds_garbage = False
    store.collect()
    assert world.launcher.status(run.id).state == "running", "they are being stopped"
    world.operator.end_pods(*pods)
    assert world.launcher.status(run.id).state == "unknown"


def test_a_renewed_token_is_read_again_and_a_refused_one_is_no_answer(world):
    run = world.run()
    world.launcher.submit(run)
    old = world.token.read_text()
    world.server.rotate(old, "token-new")
    with pytest.raises(Unavailable, match="401"):
        world.launcher.status(run.id)
    world.token.write_text("token-new")
    assert world.launcher.status(run.id).state == "pending"


@pytest.mark.parametrize("code", [403, 429, 500, 503, 504])
def test_an_overloaded_or_forbidding_server_gives_no_answer_about_the_run(code, world):
    run = world.run()
    world.launcher.submit(run)
    calls = {
        "submit": lambda: world.launcher.submit(world.run()),
        "status": lambda: world.launcher.status(run.id),
        "stop": lambda: world.launcher.stop(run.id),
        "log_tail": lambda: world.launcher.log_tail(run.id),
    }
    for call in calls.values():
        world.server.inject(Fault(code))
        with pytest.raises(Unavailable, match=f"the Kubernetes API answers {code}: "):
            call()
    world.server.inject()
    assert world.launcher.status(run.id).state == "pending", "nothing was done"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_conflict_of_anything_but_a_submit_is_no_refusal(method, world):
    run = world.run()
    world.launcher.submit(run)
    world.server.inject(Fault(409, first(1), method))
    with pytest.raises(Unavailable, match="409"):
        world.launcher.stop(run.id)
    world.launcher.stop(run.id)
    assert world.launcher.status(run.id).state == "unknown"


def test_a_used_up_quota_is_waited_for(world):
    world.server.store.quotas["rayjobs.ray.io"] = world.count()
    with pytest.raises(Unavailable, match=r"403: .*exceeded quota"):
        world.launcher.submit(world.run())


def test_a_namespace_that_does_not_exist_is_named(world):
    launcher = world.connected()
    launcher._api = KubernetesApi("elsewhere", world.launcher._api._account)
    with pytest.raises(Unavailable, match="KubeRay must be installed, and namespace elsewhere must exist"):
        launcher.submit(world.run())


def test_a_run_is_evicted_only_if_its_driver_had_started(world):
    """KubeRay forgets that a suspended job ran: the driver's own mark in storage tells."""
    run = world.run()
    world.launcher.submit(run)
    world.goes_on(run)
    world.operator.suspend(world.name(run))
    assert world.launcher.status(run.id).is_evicted
    files.delete_file(f"{run.prefix}/started.json")
    assert world.launcher.status(run.id).state == "pending"


def test_a_deleted_rayjob_whose_cluster_may_still_make_pods_goes_on(world):
    run = world.run()
    name = world.name(run)
    world.launcher.submit(run)
    world.operator.see(name)
    store = world.server.store
    for pod in world.operator.pods(name):
        store.delete("pods", "default", pod)
    store.delete("rayjobs", "default", name, {"propagationPolicy": "Background"})
    assert world.operator.pods(name) == []
    status = world.launcher.status(run.id)
    assert (status.state, status.reason) == ("running", "Terminating")
    store.delete("rayclusters", "default", world.operator.job(name)["status"]["rayClusterName"])
    assert world.launcher.status(run.id).state == "stopped"


def test_a_run_without_a_deadline_waits_for_an_operator_however_long(world):
    clock = Clock()
    launcher = world.connected(clock)
    run = world.run()
    launcher.submit(run)
    clock.ahead = 30 * 86400
    status = launcher.status(run.id)
    assert (status.state, status.reason) == ("pending", "NoOperator")


def test_each_waiting_run_has_an_explanation_of_its_own(world):
    launcher = world.connected(Clock())
    runs = {"quota": world.run(), "webhook": world.run()}
    for message, run in runs.items():
        launcher.submit(run)
        world.operator.see(world.name(run))
        world.operator.event(world.name(run), "FailedToCreateRayCluster", message, "Warning")
    for message, run in runs.items():
        assert launcher.status(run.id).message.endswith(f"; FailedToCreateRayCluster: {message}")


def test_the_runs_of_an_installation_are_told_apart_from_others_from_ended_and_from_deleted_ones(world):
    launcher = world.connected(installation="alone")
    waiting, ended, deleted, theirs = (world.run() for _ in range(4))
    for run in (waiting, ended, deleted):
        launcher.submit(run)
    world.connected(installation="there").submit(theirs)
    world.goes_on(ended)
    world.ends(ended, 0)
    launcher.stop(deleted.id)
    assert launcher.runs() == {waiting.id: False, ended.id: True}


def test_a_run_that_is_not_there_has_no_log_and_its_stop_does_nothing(world):
    run = world.run()
    world.launcher.stop(run.id)
    assert world.launcher.log_tail(run.id) == ""
    world.launcher.submit(run)
    assert world.launcher.log_tail(run.id) == "", "its cluster has no dashboard yet"


def test_a_rayjob_that_has_taken_a_deleted_ones_name_is_spared(world, monkeypatch):
    run = world.run()
    name = world.name(run)
    world.launcher.submit(run)
    found = world.launcher._find(name)
    store = world.server.store
    store.delete("rayjobs", "default", name, {"propagationPolicy": "Background"})
    world.launcher.submit(run)
    monkeypatch.setattr(world.launcher, "_find", lambda _: found)
    with pytest.raises(Unavailable):
        world.launcher.stop(run.id)
    assert "deletionTimestamp" not in world.operator.job(name)["metadata"]
