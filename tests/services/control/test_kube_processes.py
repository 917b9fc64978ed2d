"""The operator in processes: a RayJob's head and workers are real Ray nodes, and nothing of them is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.support.kube import serve_kube
from tests.support.kube.processes import ProcessOperator
from tests.support.kube.samples import ray_job
from tests.support.namespaces import network_or_skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NAME = "ajob-a"


@pytest.fixture
def operator(tmp_path) -> Iterator[ProcessOperator]:
    with (
        network_or_skip() as network,
        serve_kube() as server,
        ProcessOperator(server, tmp_path, network) as operator,
    ):
        yield operator


def small(entrypoint: str, **spec) -> dict:
    """A head without CPUs and one worker with a CPU and a GPU that does not exist."""
    job = ray_job(NAME, entrypoint=entrypoint, ttlSecondsAfterFinished=0, **spec)
    cluster = job["spec"]["rayClusterSpec"]
    container = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["resources"] = {"limits": {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "1"}}
    container["env"] = [{"name": "GREETING", "value": "hello"}]
    head = cluster["headGroupSpec"]["template"]["spec"]
    head["terminationGracePeriodSeconds"] = 20
    head["containers"][0]["lifecycle"] = {"preStop": {"exec": {"command": ["sh", "-c", "sleep 2; ray stop"]}}}
    cluster["workerGroupSpecs"][0] |= {"replicas": 1, "minReplicas": 1, "maxReplicas": 1}
    return job


def wait(operator: ProcessOperator, ready: Callable[[dict], bool], timeout_s: float = 600.0) -> dict:
    """The status of the RayJob, once it is ready."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = operator.job(NAME).get("status", {})
        if ready(status):
            return status
        logs = "".join(operator.kubelet.tail(pod) for pod in operator.pods(NAME))
        assert time.monotonic() < deadline, f"{status}{logs}\n{operator.errors}"
        time.sleep(0.5)


def wait_for_no(operator: ProcessOperator, plural: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while operator.store.list(plural, None, lambda item: True):
        assert time.monotonic() < deadline, f"{plural} are left"
        time.sleep(0.2)


def script(code: str) -> str:
    return f'{sys.executable} -c "{code}"'


def test_a_rayjob_runs_on_nodes_of_its_own_and_its_cluster_goes(operator):
    code = (
        "import os, ray; ray.init(); "
        "greet = ray.remote(num_cpus=1, num_gpus=1)(lambda: os.environ['GREETING']); "
        "assert ray.get(greet.remote()) == 'hello'"
    )
    operator.store.create("rayjobs", "default", small(script(code), metadata={"stage": "train"}))
    running = wait(operator, lambda status: status.get("jobDeploymentStatus") == "Running")
    head, worker = operator.pods(NAME)
    assert operator.store.get("pods", "default", worker)["metadata"]["annotations"]["faked-gpus"] == "1"
    addresses = {pod: operator.store.get("pods", "default", pod)["status"]["podIP"] for pod in (head, worker)}
    assert len(set(addresses.values())) == 2
    assert running["dashboardURL"] == f"{addresses[head]}:8265"
    processes = operator.kubelet.processes()
    over = wait(operator, lambda status: status.get("jobDeploymentStatus") in ("Complete", "Failed"))
    assert (over["jobDeploymentStatus"], over["jobStatus"]) == ("Complete", "SUCCEEDED")
    wait_for_no(operator, "pods")
    wait_for_no(operator, "rayclusters")
    assert len(processes) > 2
    assert not [each for each in processes if each.is_running()]


def test_a_rayjob_that_fails_says_why_and_one_that_is_deleted_stops(operator):
    operator.store.create("rayjobs", "default", small(script("raise SystemExit(3)")))
    over = wait(operator, lambda status: status.get("jobDeploymentStatus") in ("Complete", "Failed"))
    assert (over["jobDeploymentStatus"], over["reason"]) == ("Failed", "AppFailed")
    assert "exit code 3" in over["message"]
    operator.store.delete("rayjobs", "default", NAME, {"propagationPolicy": "Foreground"})
    wait_for_no(operator, "rayjobs")
    mark = operator.kubelet.folder / "stopped"
    # A shell starts background processes with SIGINT ignored, and pods inherit that.
    hears = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{hears}\ntry: time.sleep(600)\nexcept KeyboardInterrupt: open('{mark}', 'w').close()"
    operator.store.create("rayjobs", "default", small(script(code)))
    wait(operator, lambda status: status.get("jobStatus") == "RUNNING")
    time.sleep(3.0)
    operator.store.delete("rayjobs", "default", NAME, {"propagationPolicy": "Foreground"})
    wait_for_no(operator, "rayjobs")
    assert mark.exists()
    wait_for_no(operator, "pods")


def test_a_head_that_is_lost_comes_back_and_gets_the_job_again(operator, tmp_path):
    starts = tmp_path / "starts"
    code = f"import time; open('{starts}', 'a').write('x'); time.sleep(600)"
    operator.store.create("rayjobs", "default", small(script(code)))
    wait(operator, lambda status: status.get("jobStatus") == "RUNNING" and starts.exists())
    head = operator.pods(NAME)[0]
    operator.kubelet.kill(head)
    deadline = time.monotonic() + 600
    while starts.read_text() != "xx":
        assert time.monotonic() < deadline, operator.errors
        time.sleep(0.5)
    container = operator.store.get("pods", "default", head)["status"]["containerStatuses"][0]
    assert container["restartCount"] == 1
    assert operator.job(NAME)["status"]["jobDeploymentStatus"] == "Running"


def test_nothing_is_left_of_a_job_that_runs_when_the_test_ends(tmp_path):
    with (
        network_or_skip() as network,
        serve_kube() as server,
        ProcessOperator(server, tmp_path, network) as operator,
    ):
        operator.store.create("rayjobs", "default", small(script("import time; time.sleep(600)")))
        wait(operator, lambda status: status.get("jobStatus") == "RUNNING")
        processes = operator.kubelet.processes()
    assert len(processes) > 2
    assert not [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
