"""A whole installation in pods on this machine: Redis, S3, Ray's head, workers with Serve, control plane.

Every pod has its own network (namespaces.PodNetwork) and restarts what has ended in it, as a kubelet does.
The head keeps the cluster's state in Redis (GCS fault tolerance). Pods are ``cut`` off and healed; machines
are lost by ``lose``, and come back by ``recover`` or ``replace``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil

from services.client.api import Client
from services.client.local import SERVE_CONFIG, fill_serve_config, read_serve_config
from services.client.processes import environment, executables
from services.client.ray_head import APPLICATIONS, ray_environment
from tests.support.kube.sandboxes import PORTS as KUBERAY_PORTS
from tests.support.namespaces import Container, Pod, PodNetwork, network_or_skip
from tests.support.open_sources import EVERYWHERE
from tests.support.s3_server import BUCKET

PORTS = replace(KUBERAY_PORTS, metrics=8090)
"""As in pods of KubeRay, but for the metrics."""
OBJECT_STORE_BYTES = 100_000_000
STORAGE_URI = f"s3://{BUCKET}/dde"
SERVE_PORT = 8000
CONTROL_PORT = 8080
S3_PORT = 9000
REDIS_PORT = 6379


@dataclass(frozen=True)
class Part:
    """What runs in a pod."""

    command: Sequence[str]
    env: Mapping[str, str]
    has_ray: bool = False


class PodCluster:
    """Starts everything on ``start_all``. ``workers`` maps the names of worker pods to their CPUs.

    ``settings`` are the control plane's beside its own, such as DDE_UNREACHABLE_S; ``ray_env`` goes to all
    of Ray's processes.
    """

    def __init__(
        self,
        network: PodNetwork,
        folder: Path,
        workers: Mapping[str, int],
        settings: Mapping[str, str] | None = None,
        ray_env: Mapping[str, str] | None = None,
    ) -> None:
        self.network = network
        self.folder = folder
        self.key = f"dde-{secrets.token_urlsafe(32)}"
        self._workers = workers
        self._settings = settings or {}
        self._ray_env = ray_env or {}
        self._parts: dict[str, Part] = {}
        self._containers: dict[str, Container] = {}
        self.starts: dict[str, int] = {}
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        # Short: Ray's Unix sockets lie below it. Each pod mounts a folder of its own there.
        self._ray_folder = Path(tempfile.mkdtemp(prefix="ddens-", dir="/tmp"))
        self._token = folder / "token"
        self._token.write_text(secrets.token_hex(32))

    # ---- parts

    def start_all(self, serve_args: Mapping[str, Any]) -> None:
        """Start every part and wait for it, Serve and its replicas too."""
        for name in ("redis", "s3", "head", *self._workers, "control"):
            self.network.add(name)
        self._keeper.start()
        self._define_stores()
        self.start("redis")
        self.start("s3")
        self.wait(lambda: self.s3_answers(), "the S3 server does not answer", 60)
        with self.s3() as s3:
            s3.create_bucket(Bucket=BUCKET)
        self._define_ray()
        self.start("head")
        self.wait(self.dashboard_answers, f"Ray's dashboard does not answer{self.tail('head')}", 300)
        for number, name in enumerate(self._workers, start=2):  # one by one: a raylet gives up after 30 s
            self.start(name)
            self.wait(lambda expected=number: self.live_nodes() == expected, f"{name} has not joined", 900)
        self._define_control()
        self.start("control")
        self.deploy(serve_args)
        with self.client() as client:
            self.wait(client.ready, "the control plane is not ready", 300)

    def _define_stores(self) -> None:
        env = environment(str(self.folder), {})
        redis = ["redis-server", "--port", str(REDIS_PORT), "--bind", "0.0.0.0", "--protected-mode", "no"]
        data = self.folder / "redis"
        data.mkdir()
        kept = ["--dir", str(data), "--appendonly", "yes", "--save", ""]
        self._parts["redis"] = Part([*redis, *kept], env)
        s3 = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(S3_PORT)]
        self._parts["s3"] = Part(s3, env)

    def _define_ray(self) -> None:
        env = self.ray_environment()
        own = [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={self._ray_folder}"]
        start = [str(executables() / "ray"), "start", "--block", "--disable-usage-stats", *own]
        head = [
            *("--head", f"--port={PORTS.gcs}", "--num-cpus=0", f"--metrics-export-port={PORTS.metrics}"),
            *("--dashboard-host=0.0.0.0", f"--node-ip-address={self.address('head')}"),
        ]
        persistent = {
            "RAY_REDIS_ADDRESS": f"{self.address('redis')}:{REDIS_PORT}",
            "RAY_external_storage_namespace": "dde",
        }
        self._parts["head"] = Part([*start, *head], {**env, **persistent}, has_ray=True)
        for name, cpus in self._workers.items():
            worker = [f"--address={self.address('head')}:{PORTS.gcs}", f"--num-cpus={cpus}"]
            self._parts[name] = Part([*start, *worker], env, has_ray=True)

    def _define_control(self) -> None:
        settings = {
            "DDE_API_KEY": self.key,
            "DDE_STORAGE_URI": STORAGE_URI,
            "DDE_DATABASE_URL": f"sqlite:///{self.folder / 'dde.db'}",
            "DDE_RAY_URL": f"http://{self.address('head')}:{PORTS.dashboard}",
            "DDE_SERVE_URL": f"http://{self.address(next(iter(self._workers)))}:{SERVE_PORT}",
            "DDE_HOST": "0.0.0.0",
            "DDE_PORT": str(CONTROL_PORT),
            "DDE_ALLOWED_SOURCES": json.dumps(EVERYWHERE.allowed),
            **self._settings,
        }
        env = environment(str(self.folder), {**settings, **self._auth(), **self.s3_env()})
        self._parts["control"] = Part([sys.executable, "-m", "services.control"], env)

    def ray_environment(self) -> dict[str, str]:
        """The environment of Ray's processes."""
        own = {
            **ray_environment(PORTS),
            **self._auth(),
            **self.s3_env(),
            # By default, whatever else the machine does comes before Ray's workers.
            "RAY_worker_niceness": "0",
            "RAY_memory_monitor_refresh_ms": "0",  # the machine's memory is not this cluster's alone
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            **self._ray_env,
        }
        return environment(str(self.folder), own)

    def s3_env(self) -> dict[str, str]:
        """What S3 clients need."""
        return {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{self.address('s3')}:{S3_PORT}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "*",
        }

    def _auth(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._token)}

    def address(self, name: str) -> str:
        return self.network.pods[name].address

    # ---- life and loss

    def start(self, name: str) -> None:
        """Start the pod's part. From now on it is started again whenever it ends."""
        with self._lock:
            number = self.starts[name] = self.starts.get(name, 0) + 1
            pod, part = self.network.pods[name], self._parts[name]
            hosts = self.folder / f"{name}.hosts"
            hosts.write_text(f"127.0.0.1 localhost\n{pod.address} {socket.gethostname()}\n")
            mounts = {"/etc/hosts": hosts}
            if part.has_ray:
                folder = self.folder / f"{name}-ray-{number}"
                folder.mkdir()
                mounts[str(self._ray_folder)] = folder
            log = self.folder / f"{name}.log"
            self._containers[name] = pod.start(part.command, log, part.env, mounts=mounts)

    def cut(self, name: str) -> None:
        """Cut the pod off; it goes on running."""
        self.network.pods[name].cut()

    def heal(self, name: str) -> None:
        self.network.pods[name].heal()

    def lose(self, name: str) -> None:
        """The pod's machine loses its power, without a signal. ``recover`` or ``replace`` it."""
        with self._lock:
            self._containers.pop(name)
            self.network.pods[name].cut()
            self.network.pods[name].kill()

    def recover(self, name: str) -> None:
        """Start a lost pod again, at its address."""
        self.heal(name)
        self.start(name)

    def kill(self, name: str) -> None:
        """Kill the pod's processes. They are started again, at once."""
        self.network.pods[name].kill()

    def replace(self, name: str) -> Pod:
        """A new pod with another address for one that was lost, started."""
        with self._lock:
            self.network.remove(name)
            pod = self.network.add(name)
            self.start(name)
            return pod

    def _keep(self) -> None:
        while not self._closed.wait(1.0):
            with self._lock:
                for name, container in list(self._containers.items()):
                    if container.poll() is not None:
                        self.start(name)

    def close(self) -> None:
        """Stop the restarts and remove the folders. The network removes the pods."""
        self._closed.set()
        if self._keeper.is_alive():
            self._keeper.join()
        for name in list(self.network.pods):
            self.network.remove(name)
        shutil.rmtree(self._ray_folder, ignore_errors=True)

    def workers(self, pod: str) -> list[psutil.Process]:
        """The training workers in a pod."""
        return [each for each in self.network.pods[pod].processes() if _runs(each, "RayTrainWorker")]

    # ---- what answers

    @property
    def url(self) -> str:
        """The control plane's."""
        return f"http://{self.address('control')}:{CONTROL_PORT}"

    def client(self) -> Client:
        return Client(self.url, self.key)

    @contextmanager
    def s3(self) -> Iterator[Any]:
        """A client of the S3 server."""
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{self.address('s3')}:{S3_PORT}",
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        with closing(client):
            yield client

    def s3_answers(self) -> bool:
        return _answers(f"http://{self.address('s3')}:{S3_PORT}/")

    def dashboard_answers(self) -> bool:
        return self._dashboard("GET").status_code == 200

    def is_whole(self) -> bool:
        """Whether all nodes live and all replicas run."""
        running = [each for each in self.replicas().values() if each.startswith("RUNNING")]
        return self.live_nodes() == 1 + len(self._workers) and len(running) == self._num_replicas

    def live_nodes(self) -> int:
        """How many nodes Ray believes to be alive."""
        answer = self._dashboard("GET", "/api/v0/nodes")
        nodes = answer.json()["data"]["result"]["result"] if answer.is_success else []
        return sum(node["state"] == "ALIVE" for node in nodes)

    def _dashboard(self, method: str, path: str = APPLICATIONS, **more: Any) -> httpx.Response:
        url = f"http://{self.address('head')}:{PORTS.dashboard}{path}"
        headers = {"Authorization": f"Bearer {self._token.read_text()}"}
        try:
            return httpx.request(method, url, headers=headers, timeout=60.0, trust_env=False, **more)
        except httpx.TransportError as error:
            return httpx.Response(503, text=str(error))

    def deploy(self, args: Mapping[str, Any]) -> None:
        """Deploy the Serve application with a proxy on every node, and wait until it runs."""
        config = fill_serve_config(read_serve_config(SERVE_CONFIG), SERVE_PORT, STORAGE_URI)
        config["applications"][0]["args"] |= args
        self._num_replicas = config["applications"][0]["args"]["min_replicas"]
        # A lost node takes a replica with it, and its successor gets one.
        config["applications"][0]["deployments"] = [{"name": "ImageServer", "max_replicas_per_node": 1}]
        config["proxy_location"] = "EveryNode"
        config["http_options"]["host"] = "0.0.0.0"
        answer = self._dashboard("PUT", json=config)
        assert answer.is_success, answer.text
        self.wait(self.serve_runs, "the Serve application does not run", 900)

    def serve_runs(self) -> bool:
        return self.serve_status()["applications"].get("dde", {}).get("status") == "RUNNING"

    def serve_status(self) -> dict[str, Any]:
        answer = self._dashboard("GET")
        return answer.json() if answer.is_success else {"applications": {}, "error": answer.text}

    def replicas(self) -> dict[str, str]:
        """State and address of every replica that Serve knows."""
        found = {}
        for application in self.serve_status()["applications"].values():
            for deployment in application["deployments"].values():
                for replica in deployment["replicas"]:
                    found[replica["replica_id"]] = f"{replica['state']} {replica['node_ip']}"
        return found

    def tail(self, name: str) -> str:
        return self._containers[name].tail() if name in self._containers else f"; {name} does not run"

    def wait(self, ready: Callable[[], object], problem: str, timeout_s: float) -> float:
        """Poll until ``ready()``; the seconds that it took."""
        began = time.monotonic()
        while not ready():
            assert time.monotonic() - began < timeout_s, f"{problem} after {timeout_s:g} s"
            time.sleep(0.2)
        return time.monotonic() - began


def _answers(url: str) -> bool:
    try:
        httpx.get(url, timeout=5.0, trust_env=False)
    except httpx.TransportError:
        return False
    return True


def _runs(process: psutil.Process, word: str) -> bool:
    try:
        return word in process.name() or word in " ".join(process.cmdline())
    except psutil.Error:
        return False


@contextmanager
def pod_cluster(folder: Path, workers: Mapping[str, int], **more: Any) -> Iterator[PodCluster]:
    """A cluster in a network of its own, not started; skips the test where there can be none."""
    with ExitStack() as undo:
        network = undo.enter_context(network_or_skip())
        folder.mkdir(parents=True, exist_ok=True)
        cluster = PodCluster(network, folder, workers, **more)
        undo.callback(cluster.close)
        yield cluster
