"""Where stages run: a Protocol, and its implementation with Ray's Jobs API."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any, Literal, Protocol

from services.errors import Unavailable

log = logging.getLogger("dde")

RunState = Literal["pending", "running", "succeeded", "failed", "stopped", "unknown"]
TIMEOUT_S = 10.0
TAIL_LINES = 40


class Launcher(Protocol):
    """Runs commands under ids that the caller chooses. Every method raises Unavailable without an answer."""

    def submit(self, submission_id: str, entrypoint: str, metadata: dict[str, str]) -> None:
        """Start the command. A second submit with the same id does nothing."""

    def state(self, submission_id: str) -> RunState:
        """The run's state; "unknown" if it was never submitted."""

    def stop(self, submission_id: str) -> None:
        """Request the run's end without waiting for it. Does nothing for an unknown run."""

    def log_tail(self, submission_id: str) -> str:
        """The last lines of the driver's output."""


class RayJobsLauncher:
    """Ray's Jobs API. Connects at first use, and again after the connection was lost."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._client: Any = None

    def submit(self, submission_id: str, entrypoint: str, metadata: dict[str, str]) -> None:
        try:
            self._call("submit_job", entrypoint=entrypoint, submission_id=submission_id, metadata=metadata)
        except (RuntimeError, Unavailable) as error:
            # Ray answers a repeated submit with a server error, too: only the state tells them apart.
            if self.state(submission_id) == "unknown":
                raise Unavailable(f"Ray at {self._url} did not accept {submission_id}: {error}") from error

    def state(self, submission_id: str) -> RunState:
        details = self._unless_missing("get_job_info", submission_id)
        return "unknown" if details is None else details.status.value.lower()

    def stop(self, submission_id: str) -> None:
        self._unless_missing("stop_job", submission_id)

    def log_tail(self, submission_id: str) -> str:
        text = self._unless_missing("get_job_logs", submission_id) or ""
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    def _unless_missing(self, method: str, submission_id: str) -> Any:
        """The answer, or None if Ray does not know the job."""
        try:
            return self._call(method, submission_id)
        except RuntimeError as error:
            # Ray's client reports the HTTP status in the error's text only.
            if "status code 404" in str(error):
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


def keep_modules() -> None:
    """Leave what is imported so far out of all garbage collections: to walk Ray's modules takes 100 ms, in
    which no request is answered.
    """
    gc.collect()
    gc.freeze()


def _client_class() -> type:
    """Ray's client with a timeout on every request: a silent host must not block a review forever."""
    from ray.job_submission import JobSubmissionClient

    class BoundedClient(JobSubmissionClient):  # type: ignore[misc]  # Ray's class is untyped
        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=TIMEOUT_S, **kwargs)

    keep_modules()
    return BoundedClient
