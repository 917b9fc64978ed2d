"""Pods in network namespaces reach one another, are cut off and killed, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from services.client.processes import environment
from tests.support.namespaces import Pod, PodNetwork, network_or_skip

SERVER = [sys.executable, "-m", "http.server", "8000"]
GET = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=2).status)"


@pytest.fixture(scope="module")
def network() -> Iterator[PodNetwork]:
    with network_or_skip() as network:
        yield network


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return environment(str(tmp_path), {})


@pytest.fixture
def served(network: PodNetwork, tmp_path: Path, env: dict[str, str]) -> Iterator[Pod]:
    """A pod with an HTTP server."""
    pod = network.add("server")
    pod.start(SERVER, tmp_path / "server.log", env)
    wait_until_answered(pod)
    yield pod
    network.remove("server")


def answered(pod: Pod, by: Pod | None = None) -> bool:
    url = f"http://{pod.address}:8000/"
    try:
        if by:
            return by.run([sys.executable, "-c", GET, url], os.environ).stdout.strip() == "200"
        return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200
    except (httpx.TransportError, subprocess.CalledProcessError):
        return False


def wait_until_answered(pod: Pod) -> None:
    deadline = time.monotonic() + 20
    while not answered(pod):
        assert time.monotonic() < deadline, "no answer"
        time.sleep(0.05)


def test_pods_reach_one_another_until_one_is_cut_off(network: PodNetwork, served: Pod):
    other = network.add("other")
    assert answered(served, by=other)
    served.cut()
    assert not answered(served, by=other)
    assert not answered(served), "this machine does not reach it, either"
    assert served.processes(), "it goes on running"
    served.heal()
    assert answered(served, by=other)
    network.remove("other")


def test_a_killed_pod_keeps_its_address_and_starts_again(served: Pod, tmp_path: Path, env: dict[str, str]):
    served.kill()
    assert not served.processes()
    with pytest.raises(httpx.ConnectError, match="refused"):
        httpx.get(f"http://{served.address}:8000/", timeout=2.0, trust_env=False)
    served.start(SERVER, tmp_path / "again.log", env)
    wait_until_answered(served)


def test_a_container_sees_only_its_own_processes_and_mounts(
    network: PodNetwork, tmp_path: Path, env: dict[str, str]
):
    (tmp_path / "place").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "file").write_text("of the pod")
    pod = network.add("alone")
    script = "import os, time; print(sorted(os.listdir('.')), flush=True); time.sleep(60)"
    container = pod.start(
        [sys.executable, "-c", script],
        tmp_path / "alone.log",
        env,
        cwd=tmp_path,
        mounts={str(tmp_path / "place"): tmp_path / "own"},
    )
    deadline = time.monotonic() + 20
    while "alone.log" not in container.log.read_text():
        assert time.monotonic() < deadline, container.tail()
        time.sleep(0.05)
    look = (
        "import json, os, sys; processes = [name for name in os.listdir('/proc') if name.isdigit()];"
        "print(json.dumps([os.listdir(sys.argv[1]), processes]))"
    )
    done = container.run([sys.executable, "-c", look, str(tmp_path / "place")])
    files, processes = json.loads(done.stdout)
    assert files == ["file"]
    assert len(processes) == 2, "itself and process 1"
    assert not list((tmp_path / "place").iterdir()), "the mount is the container's alone"
    container.kill()
    assert container.poll() == -signal.SIGKILL
    assert not pod.processes()
    network.remove("alone")


def test_terminating_a_container_reaches_its_first_process(
    network: PodNetwork, tmp_path: Path, env: dict[str, str]
):
    pod = network.add("polite")
    script = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7));"
        "print('ready', flush=True); time.sleep(60)"
    )
    container = pod.start([sys.executable, "-c", script], tmp_path / "polite.log", env)
    deadline = time.monotonic() + 20
    while "ready" not in container.log.read_text():
        assert time.monotonic() < deadline, container.tail()
        time.sleep(0.05)
    container.terminate()
    assert container.wait(10) == 7
    network.remove("polite")


def test_what_a_killed_run_has_left_is_removed_by_the_next(network: PodNetwork, tmp_path: Path):
    script = (
        "import os, pathlib, signal; from tests.support.namespaces import PodNetwork\n"
        "with PodNetwork() as network:\n"
        "    pod = network.add('left')\n"
        "    pod.start(['sleep', '600'], pathlib.Path(os.environ['LOG']), os.environ)\n"
        "    while not pod.processes(): pass\n"
        "    print(pod.namespace, pod.processes()[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "LOG": str(tmp_path / "left.log")}
    killed = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    namespace, pid = killed.stdout.split()
    assert killed.returncode == -signal.SIGKILL
    assert namespace in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    with PodNetwork():
        left = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert namespace not in left
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    assert not list(Path("/sys/class/net").glob(f"{namespace.split('-')[0]}*"))
