"""Where stages run: one Protocol, and its implementation on Ray's Jobs API."""

from __future__ import annotations

import logging
import threading
from typing import Any, Literal, Protocol

from services.errors import Unavailable

log = logging.getLogger("dde")

RunState = Literal["pending", "running", "succeeded", "failed", "stopped", "unknown"]
TIMEOUT_S = 10.0
TAIL_LINES = 40


class Launcher(Protocol):
    """Runs an entry point under an id of ours. Every method raises Unavailable where nobody answers."""

    def submit(self, submission_id: str, entrypoint: str, metadata: dict[str, str]) -> None:
        """Start it. A second submit with the same id does nothing."""

    def state(self, submission_id: str) -> RunState:
        """How it stands; "unknown" where it was never submitted."""

    def stop(self, submission_id: str) -> None:
        """Ask it to end. Does not wait; does nothing where it is not there."""

    def log_tail(self, submission_id: str) -> str:
        """The last lines that its driver printed."""


class RayJobsLauncher:
    """Ray's Jobs API. The connection is made at first use and again after it was lost."""

    def __init__(self, url: str) -> None:
        self._url, self._lock = url, threading.Lock()
        self._client: Any = None

    def submit(self, submission_id: str, entrypoint: str, metadata: dict[str, str]) -> None:
        try:
            self._call("submit_job", entrypoint=entrypoint, submission_id=submission_id, metadata=metadata)
        except (
            RuntimeError,
            Unavailable,
        ) as error:  # a duplicate comes back as a server error: what is there decides
            if self.state(submission_id) == "unknown":
                raise Unavailable(f"Ray at {self._url} did not take {submission_id}: {error}") from error

    def state(self, submission_id: str) -> RunState:
        details = self._unless_missing("get_job_info", submission_id)
        return "unknown" if details is None else details.status.value.lower()

    def stop(self, submission_id: str) -> None:
        self._unless_missing("stop_job", submission_id)

    def log_tail(self, submission_id: str) -> str:
        text = self._unless_missing("get_job_logs", submission_id) or ""
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    def _unless_missing(self, method: str, submission_id: str) -> Any:
        """The answer, or None where Ray does not know the job."""
        try:
            return self._call(method, submission_id)
        except RuntimeError as error:
            if "status code 404" in str(error):  # all that the client tells of an answer
                return None
            raise Unavailable(f"Ray at {self._url}: {error}") from error

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return getattr(self._connected(), method)(*args, **kwargs)
        except (ConnectionError, requests.RequestException, AuthenticationError) as error:
            self._client = None
            raise Unavailable(f"Ray at {self._url} does not answer: {error}") from error

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _client_class()(self._url)
            return self._client


def _client_class() -> type:
    """Ray's client with a time limit on every request: without one, a silent host would hold a job's lock for
    ever.
    """
    from ray.job_submission import JobSubmissionClient

    class BoundedClient(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=TIMEOUT_S, **kwargs)

    return BoundedClient
