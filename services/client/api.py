"""The Python SDK: the HTTP API as typed methods.

    client = Client("http://127.0.0.1:8080", key)
    job = client.create_job(AlignmentJobCreate(model="shapes", dataset=dataset.id, evaluation=...))
    job = client.wait(job.id)

Requests are repeated after 408, 429, 5xx and connection errors, with growing pauses, each POST under one Idempotency-Key;
but not the registration of a dataset, which would be read again.

    ServiceError
    ├── ApiError       the server refused or failed; says status, message, param and code
    └── Unavailable    the server could not be reached
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
from pydantic import BaseModel
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from services.api.records import CreditRecord, DatasetReport
from services.api.requests import (
    AlignmentJobCreate,
    DatasetCreate,
    DatasetSource,
    EvaluationCreate,
    ImageRequest,
    ModelCreate,
    ScoreRequest,
)
from services.client.types import (
    Checkpoint,
    Dataset,
    Evaluation,
    Event,
    Item,
    Job,
    MetricRow,
    Model,
    Page,
    parse,
)
from services.errors import ServiceError, Unavailable

PAGE = 100
LONGEST_PAUSE_S = 10.0
CONNECT_TIMEOUT_S = 5.0


class ApiError(ServiceError):
    """An error answer. ``status`` is the HTTP status, ``param`` the field that is wrong, ``code`` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, param, code)
        self.args = (status, message, param, code, retry_after_s)
        self.status, self.retry_after_s = status, retry_after_s

    @classmethod
    def of(cls, response: httpx.Response) -> ApiError:
        """The error of a response, whether or not its body has the API's form."""
        try:
            error = response.json()["error"]
            message, param, code = str(error["message"]), error.get("param"), error.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            text = response.text.strip()[:500] or response.reason_phrase
            message, param, code = f"HTTP {response.status_code}: {text}", None, None
        return cls(response.status_code, message, param, code, _seconds(response.headers.get("retry-after")))


class Client:
    """One connection pool to one control plane. ``retries`` counts repeats after the first try."""

    def __init__(self, base_url: str, api_key: str, *, timeout_s: float = 120.0, retries: int = 5) -> None:
        self.base_url, self.retries = base_url, retries
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # ---- what is registered

    def create_dataset(self, name: str, uri: str, columns: Mapping[str, str] | None = None) -> Dataset:
        """Register preference pairs; the server reads and counts them, which takes minutes where they are many: the answer is
        waited for as long as it takes, and is not asked for twice. ``columns`` maps what is read to the files' names."""
        asked = DatasetCreate.model_validate({"name": name, "uri": uri, "columns": dict(columns or {})})
        return parse(Dataset, self._send("POST", "/v1/datasets", asked, slow=True))

    def validate_dataset(self, uri: str, columns: Mapping[str, str] | None = None) -> DatasetReport:
        """What a sample of the rows and pictures at a URI shows; nothing is stored."""
        asked = DatasetSource.model_validate({"uri": uri, "columns": dict(columns or {})})
        return DatasetReport.model_validate(
            self._send("POST", "/v1/datasets/validate", asked), extra="ignore"
        )

    def dataset(self, dataset_id: str) -> Dataset:
        return self._get(Dataset, f"/v1/datasets/{dataset_id}")

    def datasets(self) -> Iterator[Dataset]:
        return self._items(Dataset, "/v1/datasets")

    def create_model(self, name: str, uri: str, family: str | None = None) -> Model:
        """Register a base model: a diffusers folder, whose family is told from its files."""
        return self._post(
            Model, "/v1/models", ModelCreate.model_validate({"name": name, "uri": uri, "family": family})
        )

    def model(self, model_id: str) -> Model:
        return self._get(Model, f"/v1/models/{model_id}")

    def models(self) -> Iterator[Model]:
        return self._items(Model, "/v1/models")

    # ---- jobs

    def create_job(self, request: AlignmentJobCreate) -> Job:
        """Start an alignment job."""
        return self._post(Job, "/v1/alignment/jobs", request)

    def job(self, job_id: str) -> Job:
        return self._get(Job, f"/v1/alignment/jobs/{job_id}")

    def jobs(self, status: str | None = None) -> Iterator[Job]:
        return self._items(Job, "/v1/alignment/jobs", {"status": status} if status else {})

    def cancel_job(self, job_id: str) -> Job:
        return self._post(Job, f"/v1/alignment/jobs/{job_id}/cancel")

    def pause_job(self, job_id: str) -> Job:
        """Have a job store its state and free the cluster; its status is paused once nothing of it runs any more."""
        return self._post(Job, f"/v1/alignment/jobs/{job_id}/pause")

    def resume_job(self, job_id: str) -> Job:
        """Let a paused job, or one that failed in a stage, go on where it was."""
        return self._post(Job, f"/v1/alignment/jobs/{job_id}/resume")

    def checkpoints(self, job_id: str) -> Iterator[Checkpoint]:
        """What the training of a job has stored and kept, in order of steps."""
        return self._items(Checkpoint, f"/v1/alignment/jobs/{job_id}/checkpoints", cursor="step")

    def events(self, job_id: str, after: str | None = None) -> Iterator[Event]:
        """The job's events in order; ``after`` is the id of the last one already seen."""
        return self._items(Event, f"/v1/alignment/jobs/{job_id}/events", {"after": after} if after else {})

    def metrics(self, job_id: str, stage: str, after: int | None = None) -> Iterator[MetricRow]:
        """A stage's rows of metrics in order, of the steps beyond ``after``."""
        path, query = (
            f"/v1/alignment/jobs/{job_id}/metrics",
            {"stage": stage} if after is None else {"stage": stage, "after": after},
        )
        return self._items(MetricRow, path, query, cursor="step")

    def credit(self, job_id: str) -> CreditRecord:
        """Where the training of a job put its credit; there once its model is."""
        return CreditRecord.model_validate_json(
            json.dumps(self._send("GET", f"/v1/alignment/jobs/{job_id}/credit"))
        )

    def wait(self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 1.0) -> Job:
        """The job once it has succeeded, failed (it may be resumed) or been cancelled. Raises TimeoutError."""
        return _until_finished(lambda: self.job(job_id), timeout_s, poll_s)

    # ---- evaluations, pictures, scores

    def create_evaluation(self, request: EvaluationCreate) -> Evaluation:
        """Start a comparison of two registered models."""
        return self._post(Evaluation, "/v1/evaluations", request)

    def evaluation(self, evaluation_id: str) -> Evaluation:
        return self._get(Evaluation, f"/v1/evaluations/{evaluation_id}")

    def evaluations(self) -> Iterator[Evaluation]:
        return self._items(Evaluation, "/v1/evaluations")

    def wait_evaluation(
        self, evaluation_id: str, *, timeout_s: float | None = None, poll_s: float = 1.0
    ) -> Evaluation:
        """The evaluation once it has ended. Raises TimeoutError."""
        return _until_finished(lambda: self.evaluation(evaluation_id), timeout_s, poll_s)

    def generate(self, request: ImageRequest) -> list[bytes]:
        """Pictures as PNG bytes."""
        answer = self._send("POST", "/v1/images/generations", request)
        return [base64.b64decode(picture["b64_json"]) for picture in answer["data"]]

    def scores(self, request: ScoreRequest) -> list[dict[str, float]]:
        """One row of scores for each picture."""
        return self._send("POST", "/v1/scores", request)["data"]

    def ready(self) -> bool:
        """Does the control plane say that it can work? Asks once."""
        try:
            return self._http.get("/readyz", timeout=5.0).is_success
        except httpx.TransportError:
            return False

    # ---- one request

    def _get(self, answer: type[Item], path: str, query: dict[str, Any] | None = None) -> Item:
        return parse(answer, self._send("GET", path, query=query))

    def _post(self, answer: type[Item], path: str, body: BaseModel | None = None) -> Item:
        return parse(answer, self._send("POST", path, body))

    def _items(
        self, item: type[Item], path: str, query: dict[str, Any] | None = None, cursor: str = "id"
    ) -> Iterator[Item]:
        query = {"limit": PAGE, **(query or {})}
        while True:
            page: Page[Item] = self._get(Page[item], path, query)  # type: ignore[valid-type]
            yield from page.data
            if not (page.has_more and page.data):
                return
            query["after"] = getattr(page.data[-1], cursor)

    def _send(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        query: dict[str, Any] | None = None,
        slow: bool = False,
    ) -> Any:
        """The answer's JSON; ``slow`` waits for it without a limit, and tries once."""
        headers = {"Idempotency-Key": uuid.uuid4().hex} if method == "POST" else {}
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S) if slow else self._http.timeout
        content = None if body is None else body.model_dump(mode="json", exclude_none=True)
        request = self._http.build_request(
            method, path, json=content, params=query, headers=headers, timeout=timeout
        )
        retrying = Retrying(
            stop=stop_after_attempt(1 if slow else self.retries + 1),
            wait=_pause,
            retry=retry_if_exception(_worth_another),
            reraise=True,
        )
        try:
            return retrying(self._once, request)
        except httpx.TransportError as error:
            raise Unavailable(
                f"{self.base_url} does not answer: {error or type(error).__name__}", param="url"
            ) from error

    def _once(self, request: httpx.Request) -> Any:
        response = self._http.send(request)
        if not response.is_success:
            raise ApiError.of(response)
        return response.json()


def _worth_another(error: BaseException) -> bool:
    if isinstance(error, ApiError):
        return error.status in (408, 429) or error.status >= 500
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


_GROWING = wait_random_exponential(multiplier=0.25, max=LONGEST_PAUSE_S)


def _pause(state: RetryCallState) -> float:
    """What the server asked for, else a random pause that grows."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, ApiError) else None
    return _GROWING(state) if asked is None else min(asked, LONGEST_PAUSE_S)


def _seconds(header: str | None) -> float | None:
    """A Retry-After in seconds; the form with a date is not read."""
    return float(header) if header and header.strip().isdigit() else None


def _until_finished(read: Callable[[], Any], timeout_s: float | None, poll_s: float) -> Any:
    began = time.monotonic()
    while not (thing := read()).finished:
        if timeout_s is not None and time.monotonic() - began > timeout_s:
            raise TimeoutError(f"{thing.id} is still {thing.status} after {timeout_s:g} s")
        time.sleep(poll_s)
    return thing
