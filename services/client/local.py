"""The whole system on one machine: Ray, Serve and the control plane on 127.0.0.1, as long as a ``with``
block.

    with LocalSystem(Path(".dde")) as system, system.client() as client:
        client.create_model("shapes", MODEL_DIR.as_uri())

The state folder keeps what outlives a run: ``key``, ``dde.db``, ``storage/``, and ``logs/`` of the last run.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml

from services.client.api import Client
from services.client.processes import (
    Child,
    StartFailed,
    environment,
    free_ports,
    kill_marked,
    port_is_free,
    wait_until,
)
from services.client.ray_head import RayHead, clear_folders

SERVE_CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "serve.yaml"
CONTROL_STOP_TIMEOUT_S = 10.0
DRAIN_S = 5.0
PRIVATE = ("key", "dde.db", "dde.db-wal", "dde.db-shm", "logs")
"""What of the state folder no request may read."""


class LocalSystem:
    """Starts everything on ``__enter__``. Leaves no process behind: neither on ``__exit__`` nor when the
    start fails.

    ``fresh`` deletes what earlier runs stored. Pairs, prompts and base models are read from the state folder,
    from the working directory, and from ``allow``: paths and URIs of folders and buckets. The API gets the
    first free port of ``ports``; 0 means any free one. ``num_cpus`` is how many CPUs Ray may assign, not how
    many the machine has: workers and replicas may share cores. ``report`` receives one message per phase of
    the start.
    """

    def __init__(
        self,
        state: Path,
        *,
        fresh: bool = False,
        allow: Sequence[str] = (),
        ports: Sequence[int] = (0,),
        num_cpus: int = 8,
        use_gpu: bool = False,
        serve_config: Path = SERVE_CONFIG,
        timeout_s: float = 180.0,
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.state = state.resolve()
        self.logs = self.state / "logs"
        self.key_file = self.state / "key"
        self.storage_uri = (self.state / "storage").as_uri()
        self._fresh = fresh
        self._allow = allow
        self._ports = ports
        self._num_cpus = num_cpus
        self._use_gpu = use_gpu
        self._timeout_s = timeout_s
        self._report = report
        self._serve_config = read_serve_config(serve_config)

    @property
    def key(self) -> str:
        """The API key."""
        return self.key_file.read_text().strip()

    def client(self) -> Client:
        """An SDK client of this system."""
        return Client(self.url, self.key)

    def __enter__(self) -> LocalSystem:
        with ExitStack() as undo:
            self._claim_state(undo)
            self._choose_ports()
            self._report("starting Ray")
            self.ray = undo.enter_context(RayHead(self.logs, str(self.state), num_cpus=self._num_cpus))
            self.control = self._start_control(undo)
            self._wait(self.ray.is_ready, "Ray's dashboard does not answer", self.ray.child)
            self._report("starting Serve")
            self._start_serve()
            self._report("waiting for the control plane")
            with self.client() as client:
                self._wait(client.complete, "the control plane does not reach all parts", self.control)
            write_private(self.state / "url", self.url)
            undo.callback((self.state / "url").unlink, missing_ok=True)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def check(self) -> None:
        """Raise StartFailed if Ray or the control plane has ended by itself."""
        self.ray.child.check()
        self.control.check()

    def _claim_state(self, undo: ExitStack) -> None:
        """Lock the state folder, kill what an earlier run left running, create a key if there is none."""
        self.logs.mkdir(parents=True, exist_ok=True)
        undo.enter_context(locked(self.state / "lock"))
        kill_marked(str(self.state))
        clear_folders(str(self.state))
        undo.callback(kill_marked, str(self.state))
        if self._fresh:
            shutil.rmtree(self.state / "storage", ignore_errors=True)
            for database in self.state.glob("dde.db*"):
                database.unlink()
        if not self.key_file.exists():
            write_private(self.key_file, f"dde-{secrets.token_urlsafe(32)}")

    def _choose_ports(self) -> None:
        serve_port, any_port = free_ports(2)
        candidates = [port for port in self._ports if port_is_free(port)]
        if not candidates:
            tried = ", ".join(map(str, self._ports))
            raise StartFailed(f"port {tried} is in use: choose another, or 0 for any free one", param="port")
        self.serve_port = serve_port
        self.port = candidates[0] or any_port
        self.serve_url = f"http://127.0.0.1:{self.serve_port}"
        self.url = f"http://127.0.0.1:{self.port}"

    def _start_control(self, undo: ExitStack) -> Child:
        settings = {
            "DDE_API_KEY": self.key,
            "DDE_STORAGE_URI": self.storage_uri,
            "DDE_DATABASE_URL": f"sqlite:///{self.state / 'dde.db'}",
            "DDE_RAY_URL": self.ray.url,
            "DDE_SERVE_URL": self.serve_url,
            "DDE_HOST": "127.0.0.1",
            "DDE_PORT": str(self.port),
            "DDE_USE_GPU": str(self._use_gpu).lower(),
            "DDE_DRAIN_NOTICE_S": "0",
            "DDE_DRAIN_S": str(DRAIN_S),
            **source_settings(self.state, self._allow),
        }
        env = environment(str(self.state), {**settings, **self.ray.auth})
        control = Child("control", [sys.executable, "-m", "services.control"], self.logs / "control.log", env)
        undo.callback(control.stop, CONTROL_STOP_TIMEOUT_S)
        return control

    def _start_serve(self) -> None:
        config = fill_serve_config(self._serve_config, self.serve_port, self.storage_uri, self._use_gpu)
        self.ray.deploy(config)
        for application in config["applications"]:
            name = application["name"]
            is_running = partial(self.ray.is_running, name)
            self._wait(is_running, f"Serve application {name!r} does not run", self.ray.child)
        self._wait(self._serve_answers, "Serve does not answer /healthz", self.ray.child)

    def _wait(self, ready: Callable[[], bool], problem: str, child: Child) -> None:
        """Wait for one part. At the deadline the error holds ``problem`` and the log of ``child``."""
        wait_until(ready, problem, [child, self.ray.child, self.control], self._timeout_s)

    def _serve_answers(self) -> bool:
        try:
            return httpx.get(f"{self.serve_url}/healthz", timeout=5.0, trust_env=False).is_success
        except httpx.TransportError:
            return False


def source_settings(state: Path, allow: Sequence[str] = ()) -> dict[str, str]:
    """Where the control plane may read: the state folder less its private files, the working directory, and
    ``allow``.
    """
    return {
        "DDE_ALLOWED_SOURCES": json.dumps([str(state), str(Path.cwd()), *allow]),
        "DDE_DENIED_SOURCES": json.dumps([str(state / name) for name in PRIVATE]),
    }


def read_serve_config(path: Path) -> dict[str, Any]:
    """The Serve config. Raises StartFailed, naming the path, if it cannot be read or has no applications."""
    try:
        config: dict[str, Any] = yaml.safe_load(path.read_text())
        applications = config["applications"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise StartFailed(f"serve config {path} cannot be read: {error}", param="serve_config") from error
    if not applications:
        raise StartFailed(f"serve config {path} has no applications", param="serve_config")
    return config


def fill_serve_config(
    config: dict[str, Any], port: int, storage_uri: str, use_gpu: bool = False
) -> dict[str, Any]:
    """The config with this system's port on the loopback interface, its storage and its device."""
    own_args = {"storage_uri": storage_uri, "use_gpu": use_gpu}
    applications = [{**each, "args": {**each.get("args", {}), **own_args}} for each in config["applications"]]
    http_options = {**config.get("http_options", {}), "host": "127.0.0.1", "port": port}
    return {**config, "http_options": http_options, "applications": applications}


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read."""
    path.touch(mode=0o600)
    path.write_text(text + "\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a state folder's lock, which the kernel drops with the process. Raises StartFailed if taken."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"another system is running in {path.parent}: stop it, or choose another --state"
            raise StartFailed(message, param="state") from error
        yield
