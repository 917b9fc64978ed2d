"""What runs in pods of k8s/ and beside them: how a pod ends, and the scripts of an installation."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.validate_k8s import facts
from tests.validate_k8s.overlay import K8S, Overlay, at, build


@pytest.fixture(scope="module")
def production() -> Overlay:
    return build("production")


# ---- how a pod ends ------------------------------------------------------------------------------


def script_of(overlay: Overlay, part: str, group: str, process: subprocess.Popen[bytes]) -> str:
    """The script, on a pod whose only process is the one given."""
    (pod,) = [
        pod for pod in overlay.pods() if (pod.part, pod.group) == (part, group) and pod.kind != "RayJob"
    ]
    script = at(pod.own_containers[0], "lifecycle", "preStop", "exec", "command", 2, default="")
    assert "/proc/[0-9]*/" in script
    return script.replace("/proc/[0-9]*/", f"/proc/{process.pid}/")


@pytest.fixture
def ray_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a script in place of `ray` writes its calls: the real one would stop nodes of this machine."""
    (tmp_path / "ray").write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/calls\n')
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "calls"


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the title that Ray gives to such an actor."""
    process = subprocess.Popen(["bash", "-c", f"exec -a '{request.param}' sleep 60"])
    title = Path(f"/proc/{process.pid}/cmdline")
    while not title.read_text().startswith(request.param):
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


ENDS = [("train", "gpu", "ray::TrainWorkerOfNobody"), ("serve", "serve", "ray::IDLE")]


@pytest.mark.parametrize(("part", "group", "worker"), ENDS, indirect=["worker"])
def test_an_idle_pod_ends_at_once(
    production: Overlay, ray_calls: Path, part: str, group: str, worker: Any
) -> None:
    start = time.monotonic()
    subprocess.run(["sh", "-c", script_of(production, part, group, worker)], check=True, timeout=20)
    assert ray_calls.read_text().split() == ["stop"]
    assert time.monotonic() - start < 5


BUSY = [
    ("train", "gpu", "ray::RayTrainWorker.execute"),
    ("train", "gpu-spot", "ray::RayTrainWorker"),
    ("serve", "serve", "ray::ServeReplica:dde:ImageServer"),
]


def calls_of(log: Path, count: int) -> None:
    """Wait for so many calls of ray."""
    ends = time.monotonic() + 30
    while not log.exists() or len(log.read_text().split()) < count:
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.parametrize(("part", "group", "worker"), BUSY, indirect=["worker"])
def test_a_busy_pod_drains_its_node_and_ends_when_the_work_has_left(
    production: Overlay, ray_calls: Path, part: str, group: str, worker: subprocess.Popen[bytes]
) -> None:
    with subprocess.Popen(["sh", "-c", script_of(production, part, group, worker)]) as ending:
        calls_of(ray_calls, 1)
        assert ray_calls.read_text().split() == ["drain-node"]
        assert ending.poll() is None
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        assert ending.wait(timeout=10) == 0
    assert ray_calls.read_text().split() == ["drain-node", "stop"]


# ---- the scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///dde.db", "scheme must be postgresql+psycopg"),
        ("postgresql://u:p@db/dde", "scheme must be postgresql+psycopg"),
        ("postgresql+psycopg://u:p@localhost/dde", "host must be one that pods can reach"),
        ("postgresql+psycopg://USER:PASSWORD@HOST/dde", "host must be one that pods can reach"),
        ("postgresql+psycopg://u@db/dde", "password is missing"),
        ("postgresql+psycopg://:p@db/dde", "user is missing"),
        ("postgresql+psycopg://u:p@db", "database must be one name"),
        ("postgresql+psycopg://u:p@db:port/dde", "host or port cannot be read"),
        ("postgresql+psycopg://u:p#w@db/dde", "host or port cannot be read"),
        ("postgresql+psycopg://u:p@db/dde#x", "'#' ends the URL"),
    ],
)
def test_a_wrong_database_url_is_refused_without_its_password(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        facts.secrets_script().checked(url)


def test_a_right_database_url_is_kept_with_its_options() -> None:
    url = "postgresql+psycopg://dde:p%23w@db.internal:6432/dde?sslmode=verify-full"
    assert facts.secrets_script().checked(url) == url


def make_secrets(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(K8S / "make-secrets.py"), *arguments]
    clean = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment)


def test_the_secrets_of_a_machine_are_complete_and_differ_each_time() -> None:
    first, second = (json.loads(make_secrets("--local", "--print").stdout)["items"] for _ in range(2))
    made = {item["metadata"]["name"]: sorted(item["stringData"]) for item in first}
    assert made == {name: sorted(keys) for name, keys in facts.secret_keys("local").items()}
    values = [{item["metadata"]["name"]: item["stringData"] for item in items} for items in (first, second)]
    assert values[0]["dde-control"]["api_key"] != values[1]["dde-control"]["api_key"]
    assert len(values[0]["dde-ray-token"]["auth_token"]) == 64
    assert values[0]["dde-control"]["postgres_password"] in values[0]["dde-control"]["database_url"]


def test_missing_arguments_of_the_script_are_named() -> None:
    without = make_secrets("--print")
    assert (without.returncode, without.stdout) == (1, "")
    assert "--database-url: give it, or set DDE_DATABASE_URL" in without.stderr
    store = make_secrets("--print", "--object-store", AWS_ACCESS_KEY_ID="k")
    assert "AWS_SECRET_ACCESS_KEY is not set" in store.stderr


class SecretsServer(ThreadingHTTPServer):
    """The part of an API server that kubectl needs to make Secrets. ``refused``: names that it forbids."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.made: dict[str, dict] = {}
        self.refused: set[str] = set()

    def kubeconfig(self, folder: Path) -> str:
        cluster = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}
        context = {"name": "here", "context": {"cluster": "here", "user": "here"}}
        users = [{"name": "here", "user": {}}]
        config = {"current-context": "here", "clusters": [cluster], "users": users, "contexts": [context]}
        (folder / "kubeconfig").write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **config}))
        return str(folder / "kubeconfig")


class _Handler(BaseHTTPRequestHandler):
    server: SecretsServer
    verbs = ("create", "get", "delete")
    resource = {"name": "secrets", "namespaced": True, "kind": "Secret", "verbs": verbs}  # noqa: RUF012
    discovery = {  # noqa: RUF012
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "groups": []},
        "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [resource]},
        "/api/v1/namespaces/dde": {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "dde"}},
    }

    def log_message(self, format: str, *args: Any) -> None: ...

    def answer(self, code: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def fail(self, code: int, reason: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
        self.answer(code, {**status, "message": reason})

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        found = self.discovery.get(path) or self.server.made.get(path.rsplit("/", 1)[-1])
        if found:
            self.answer(200, found)
        else:
            self.fail(404, "NotFound")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["metadata"]["name"]
        if name in self.server.refused:
            self.fail(403, "Forbidden")
        elif name in self.server.made:
            self.fail(409, "AlreadyExists")
        else:
            self.server.made[name] = body
            self.answer(201, body)

    def do_DELETE(self) -> None:
        self.answer(200, self.server.made.pop(self.path.split("?")[0].rsplit("/", 1)[-1]))


@pytest.fixture
def secrets_server() -> Iterator[SecretsServer]:
    with SecretsServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_script_makes_its_secrets_once(secrets_server: SecretsServer, tmp_path: Path) -> None:
    cluster = {"KUBECONFIG": secrets_server.kubeconfig(tmp_path), "HOME": str(tmp_path)}
    url = "postgresql+psycopg://dde:p@db.internal/dde"
    first = make_secrets("--database-url", url, **cluster)
    assert (first.returncode, first.stderr) == (0, "")
    assert "p@db" not in first.stdout
    made = {name: sorted(body["stringData"]) for name, body in secrets_server.made.items()}
    assert made == {name: facts.secret_keys("gpu")[name] for name in ("dde-control", "dde-ray-token")}
    before = json.dumps(secrets_server.made)
    again = make_secrets("--database-url", url, **cluster)
    assert again.returncode == 1
    assert "nothing was made: dde-control, dde-ray-token exist already" in again.stderr
    assert json.dumps(secrets_server.made) == before


def test_a_cluster_that_refuses_one_secret_keeps_none(secrets_server: SecretsServer, tmp_path: Path) -> None:
    secrets_server.refused = {"dde-ray-token"}
    cluster = {"KUBECONFIG": secrets_server.kubeconfig(tmp_path), "HOME": str(tmp_path)}
    answer = make_secrets("--local", **cluster)
    assert answer.returncode == 1
    assert "make-secrets: nothing was made: " in answer.stderr
    assert secrets_server.made == {}


def test_a_cluster_that_does_not_answer_gets_no_secret() -> None:
    answer = make_secrets("--local", KUBECONFIG="/nowhere")
    assert answer.returncode == 1
    assert "make-secrets: " in answer.stderr


def test_an_overlay_with_blanks_is_not_applied(tmp_path: Path) -> None:
    answer = subprocess.run(["sh", str(K8S / "apply.sh"), "production"], capture_output=True, text=True)
    assert answer.returncode == 1
    assert "fill in the lines above" in answer.stderr
    assert "DDE_STORAGE_URI=s3://change-me/dde" in answer.stdout


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_redis_starts_with_the_arguments_of_its_pod(production: Overlay, tmp_path: Path) -> None:
    (pod,) = [pod for pod in production.pods() if pod.part == "redis"]
    container = pod.own_containers[0]
    arguments = [
        a.replace("/data", str(tmp_path)).replace("$(REDIS_PASSWORD)", "secret") for a in container["args"]
    ]
    socket = tmp_path / "redis.sock"
    server = subprocess.Popen(
        [*container["command"], *arguments, "--port", "0", "--unixsocket", str(socket)],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        ask = ["redis-cli", "-s", str(socket), "--no-auth-warning"]
        refused = subprocess.run([*ask, "ping"], capture_output=True, text=True).stdout
        assert "NOAUTH" in refused
        policy = subprocess.run(
            [*ask, "-a", "secret", "config", "get", "*"], capture_output=True, text=True
        ).stdout
        settings = dict(zip(policy.split("\n")[::2], policy.split("\n")[1::2], strict=False))
        assert (settings["maxmemory-policy"], settings["appendonly"]) == ("noeviction", "yes")
    finally:
        server.terminate()
        server.wait()
