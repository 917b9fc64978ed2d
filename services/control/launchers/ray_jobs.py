"""Runs on one Ray cluster that all jobs share, by Ray's Jobs API."""

from __future__ import annotations

import gc
import logging
import threading
import time
from typing import Any

from services.control.launchers.contract import Run, RunStatus
from services.errors import Unavailable

log = logging.getLogger("dde")

TIMEOUT_S = 10.0
TAIL_LINES = 40
HEAD_CHECK_EVERY_S = 10.0
_HEADS = "/api/v0/nodes?filter_keys=is_head_node&filter_predicates=%3D&filter_values=true"


class RayJobsLauncher:
    """Ray's Jobs API. Connects at first use, and again after the connection was lost.

    Ray reserves ``driver_cpus`` and ``driver_memory`` bytes for each driver; 0 reserves none.
    """

    def __init__(self, url: str, driver_cpus: float = 0.0, driver_memory: int = 0) -> None:
        self._url = url
        self._reserved = {"entrypoint_num_cpus": driver_cpus, "entrypoint_memory": driver_memory}
        self._lock = threading.Lock()
        self._client: Any = None
        self._head: str | None = None
        self._check_head_at = 0.0

    def submit(self, run: Run) -> None:
        job = {"entrypoint": run.command, "submission_id": run.id, "metadata": dict(run.metadata)}
        reserved = {name: amount for name, amount in self._reserved.items() if amount}
        try:
            self._call("submit_job", **job, **reserved)
        except (RuntimeError, Unavailable) as error:
            # Ray answers a repeated submit with a server error, too: only the state tells them apart.
            if self.status(run.id).state == "unknown":
                raise Unavailable(f"Ray at {self._url} did not accept {run.id}: {error}") from error

    def status(self, run_id: str) -> RunStatus:
        details = self._unless_missing("get_job_info", run_id)
        if details is None:
            return RunStatus("unknown")
        status = RunStatus(details.status.value.lower(), details.error_type, details.message)
        if status.state in ("pending", "running"):
            self._watch_head(run_id)
        return status

    def stop(self, run_id: str) -> None:
        self._unless_missing("stop_job", run_id)

    def log_tail(self, run_id: str) -> str:
        text = self._unless_missing("get_job_logs", run_id) or ""
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    def _watch_head(self, run_id: str) -> None:
        """Make a head that is new to this launcher look after the runs that it has found in Redis.

        A restarted head reports the state that its predecessor stored, for ever, though drivers have died:
        Ray reads the table of jobs when it is asked to submit one for the first time. So submit a run that it
        has already, which it refuses.
        """
        if time.monotonic() < self._check_head_at:
            return
        self._check_head_at = time.monotonic() + HEAD_CHECK_EVERY_S
        head = self._living_head()
        if head is None or head == self._head:
            return
        try:
            self._call("submit_job", entrypoint="true", submission_id=run_id)
        except RuntimeError as error:
            log.info("Ray's head is node %s; it looks after its runs: %s", head, str(error)[-200:])
        self._head = head

    def _living_head(self) -> str | None:
        """The head's node id, which changes when it restarts; None if Ray does not tell."""
        answer = self._call("_do_request", "GET", _HEADS)
        if answer.status_code != 200:
            return None
        nodes = answer.json()["data"]["result"]["result"]
        return next((str(node["node_id"]) for node in nodes if node["state"] == "ALIVE"), None)

    def _unless_missing(self, method: str, run_id: str) -> Any:
        """The answer, or None if Ray does not know the job."""
        try:
            return self._call(method, run_id)
        except RuntimeError as error:
            # Ray's client reports the HTTP status in the error's text only.
            if "status code 404" in str(error):
                return None
            raise Unavailable(f"Ray at {self._url}: {error}") from error

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            try:
                return getattr(self._connected(), method)(*args, **kwargs)
            except AuthenticationError:
                self._client = None
                _forget_token()
                return getattr(self._connected(), method)(*args, **kwargs)
        except (ConnectionError, requests.RequestException, AuthenticationError) as error:
            self._client = None
            raise Unavailable(f"Ray at {self._url} does not answer: {error}") from error

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _client_class()(self._url)
            return self._client


def keep_modules() -> None:
    """Leave what is imported so far out of all garbage collections: to walk Ray's modules takes 100 ms, in
    which no request is answered.
    """
    gc.collect()
    gc.freeze()


def _forget_token() -> None:
    """Let the next client read the token again: Ray keeps the first one that RAY_AUTH_TOKEN_PATH had."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    AuthenticationTokenLoader.instance().reset_cache()


def _client_class() -> type:
    """Ray's client with a timeout on every request: a silent host must not block a review forever."""
    from ray.job_submission import JobSubmissionClient

    class BoundedClient(JobSubmissionClient):  # type: ignore[misc]  # Ray's class is untyped
        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=TIMEOUT_S, **kwargs)

    keep_modules()
    return BoundedClient
