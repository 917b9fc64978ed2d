"""A one-machine Ray cluster that lives as long as a ``with`` block, and the part of its REST API that is
needed here.

Ray's processes listen on every interface and run whatever is submitted, so this cluster requires a token. Ray
reads it at every call, in every process, from a file that only the user can read.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import httpx

from services.client.processes import Child, StartFailed, environment, executables, free_ports

TEMPORARY = "/tmp"
"""Fixed rather than TMPDIR: it holds Unix sockets, whose paths must be short."""
OBJECT_STORE_BYTES = 500_000_000
STOP_TIMEOUT_S = 20.0
APPLICATIONS = "/api/serve/applications/"
START_TIMED_OUT = "The current node timed out during startup"
"""Ray's message where its node takes more than 30 s to start, or the node's dashboard agent more than 15 s.
Nothing can lengthen either.
"""
RESTARTS = 2
"""A machine on which Ray starts too slowly twice has its files in memory by the third time."""


@dataclass(frozen=True, kw_only=True)
class RayPorts:
    """Every port that Ray would otherwise fix, so that two clusters fit on one machine."""

    gcs: int
    dashboard: int
    client: int
    agent: int
    autoscaler_metrics: int
    dashboard_metrics: int
    metrics: int

    @classmethod
    def free(cls) -> RayPorts:
        names = [field.name for field in fields(cls)]
        return cls(**dict(zip(names, free_ports(len(names)), strict=True)))


class RayHead:
    """Runs ``ray start`` on ``__enter__`` without waiting for it. ``__exit__`` ends all its processes and
    keeps its logs. Prometheus reads ``metrics_url``.

    ``num_cpus`` is how many CPUs Ray may assign, not how many the machine has. ``mark`` marks the processes.
    """

    def __init__(self, logs: Path, mark: str, *, num_cpus: int = 8) -> None:
        self.ports = RayPorts.free()
        self.token = secrets.token_hex(32)
        self.url = f"http://127.0.0.1:{self.ports.dashboard}"
        self.metrics_url = f"http://127.0.0.1:{self.ports.metrics}/metrics"
        self._logs = logs
        self._mark = mark
        self._num_cpus = num_cpus
        headers = {"Authorization": f"Bearer {self.token}"}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=60.0, trust_env=False)

    def __enter__(self) -> RayHead:
        with ExitStack() as undo:
            undo.enter_context(self._http)
            self._folder = Path(tempfile.mkdtemp(prefix=_prefix(self._mark), dir=TEMPORARY))
            undo.callback(self._clear)
            token_file = self._folder / "token"
            token_file.touch(mode=0o600)
            token_file.write_text(self.token)
            self.auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
            env = environment(self._mark, {**ray_environment(self.ports), **self.auth})
            command = start_command(self.ports, self._num_cpus, self._folder / "ray")
            log = self._logs / "ray.log"
            self.child = Child("ray", command, log, env, START_TIMED_OUT, RESTARTS)
            undo.callback(self.child.stop, STOP_TIMEOUT_S)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    @property
    def session_logs(self) -> Path:
        """The logs of the running session."""
        return self._folder / "ray" / "session_latest" / "logs"

    def is_ready(self) -> bool:
        """Whether the cluster accepts requests."""
        try:
            return self._http.get(APPLICATIONS, timeout=10.0).is_success
        except httpx.TransportError:
            return False

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Tell Serve to run the applications of ``config``. Raises StartFailed with the reason if refused."""
        response = self._http.put(APPLICATIONS, json=config)
        if not response.is_success:
            raise StartFailed(f"Serve refused its config: {response.text.strip()[-2000:]}")

    def is_running(self, application: str) -> bool:
        """Whether the application runs. Raises StartFailed with Serve's message if its deployment failed."""
        try:
            response = self._http.get(APPLICATIONS).raise_for_status()
        except httpx.HTTPError:
            return False
        found = response.json()["applications"].get(application)
        if found and found["status"] == "DEPLOY_FAILED":
            raise StartFailed(f"Serve application {application!r} could not be deployed: {_messages(found)}")
        return bool(found) and found["status"] == "RUNNING"

    def _clear(self) -> None:
        """Replace the logs of the last session with this session's, and delete the rest."""
        kept = self._logs / "ray"
        shutil.rmtree(kept, ignore_errors=True)
        for logs in (self._folder / "ray").glob("session_2*/logs"):
            shutil.copytree(logs, kept, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)


def clear_folders(mark: str) -> None:
    """Delete the temporary folders of clusters with this mark. None of them may be running."""
    for folder in Path(TEMPORARY).glob(f"{_prefix(mark)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(mark: str) -> str:
    return f"dde-{hashlib.sha256(mark.encode()).hexdigest()[:8]}-"


def start_command(ports: RayPorts, num_cpus: int, folder: Path) -> list[str]:
    """``ray start`` in the foreground."""
    return [
        *(str(executables() / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        f"--num-cpus={num_cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={folder}",
        f"--port={ports.gcs}",
        f"--ray-client-server-port={ports.client}",
        f"--dashboard-agent-listen-port={ports.agent}",
        f"--metrics-export-port={ports.metrics}",
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports.dashboard}"),
    ]


def ray_environment(ports: RayPorts) -> dict[str, str]:
    """Variables for Ray's processes. One thread each: two on busy cores make torch many times slower."""
    return {
        "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": "10",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _messages(application: Mapping[str, Any]) -> str:
    """Serve's messages about the application and its deployments, without repetitions."""
    reporters = [application, *application["deployments"].values()]
    messages = [reporter.get("message", "").strip() for reporter in reporters]
    return "\n".join(dict.fromkeys(message[-3000:] for message in messages if message))
