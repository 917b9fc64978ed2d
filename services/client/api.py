"""The Python SDK: the HTTP API as typed methods.

    client = Client("http://127.0.0.1:8080", key)
    job = client.create_job(AlignmentJobCreate(model="shapes", dataset=dataset.id, evaluation=...))
    job = client.wait(job.id)

After 408, 429, 5xx and connection errors a request is retried with growing pauses. All tries of a POST share
one Idempotency-Key. Not retried are the registrations of a dataset and of a scorer, for which the server
would read all files again, and the creation of a key, of which the server could not repeat the secret.

    ServiceError
    ├── ApiError       the server refused or failed: status, message, param, code
    └── Unavailable    the server could not be reached
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import httpx
from pydantic import BaseModel
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from services.api.answers import (
    CheckpointView,
    DatasetView,
    DeletedView,
    EvaluationView,
    EventView,
    Item,
    JobView,
    KeyCreated,
    KeyView,
    ListView,
    MetricView,
    ModelView,
    ReadyView,
    RunView,
    ScorerView,
    StudyView,
    parse,
)
from services.api.images import ImageRequest, ImagesResponse, ScoreRequest
from services.api.records import CreditRecord, DatasetReport
from services.api.requests import (
    AlignmentJobCreate,
    DatasetCreate,
    DatasetSource,
    EvaluationCreate,
    GeneratePairs,
    KeyCreate,
    ModelCreate,
    Promote,
    Relabel,
    ScorerCreate,
    StudyCreate,
)
from services.errors import BadRequest, DeadlineExceeded, ServiceError, Unavailable

PAGE_SIZE = 100
LONGEST_PAUSE_S = 10.0
CONNECT_TIMEOUT_S = 5.0
REPORTS = {"ajob": "/v1/alignment/jobs", "eval": "/v1/evaluations", "study": "/v1/studies"}
"""Where the reports are of what has an id of this kind."""

Run = TypeVar("Run", bound=RunView)


class ApiError(ServiceError):
    """An error response: HTTP ``status``, ``param`` (the invalid field) and ``code`` (for programs)."""

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
        self.status = status
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, response: httpx.Response) -> ApiError:
        """The error of a response. A body that is not the API's becomes the message."""
        try:
            error = response.json()["error"]
            message = str(error["message"])
            param = error.get("param")
            code = error.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            text = response.text.strip()[:500] or response.reason_phrase
            message = f"HTTP {response.status_code}: {text}"
            param = None
            code = None
        return cls(response.status_code, message, param, code, _seconds(response.headers.get("retry-after")))


class Client:
    """A connection pool to one control plane. ``retries`` counts the tries after the first."""

    def __init__(self, base_url: str, api_key: str, *, timeout_s: float = 120.0, retries: int = 5) -> None:
        self.base_url = base_url
        self.retries = retries
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

    # ---- datasets and models

    def create_dataset(
        self, name: str, uri: str, columns: Mapping[str, str] | None = None, split: str | None = None
    ) -> DatasetView:
        """Register preference pairs.

        ``columns`` maps the API's column names to the files' names. ``split`` is the one to read of a folder
        that holds several.

        The server reads and counts all pairs first, which can take minutes. This waits without a limit and
        tries once.
        """
        body = {"name": name, "uri": uri, "columns": dict(columns or {}), "split": split}
        request = DatasetCreate.model_validate(body)
        return parse(DatasetView, self._send("POST", "/v1/datasets", request, slow=True))

    def generate_dataset(self, name: str, wanted: GeneratePairs) -> DatasetView:
        """Let a model draw images and scorers rank them; the dataset is ready once the run has ended."""
        return self._post(DatasetView, "/v1/datasets", DatasetCreate(name=name, generate=wanted))

    def relabel_dataset(self, name: str, wanted: Relabel) -> DatasetView:
        """Let a scorer label a dataset's pairs; the new one is ready once the run has ended."""
        return self._post(DatasetView, "/v1/datasets", DatasetCreate(name=name, relabel=wanted))

    def dataset_events(self, dataset_id: str, after: str | None = None) -> Iterator[EventView]:
        """The events of the run that makes a dataset, from the one after the event of id ``after``."""
        query = {"after": after} if after else {}
        return self._items(EventView, f"/v1/datasets/{dataset_id}/events", query)

    def cancel_dataset(self, dataset_id: str) -> DatasetView:
        """Stop making a dataset. It fails once its run has ended."""
        return self._post(DatasetView, f"/v1/datasets/{dataset_id}/cancel")

    def validate_dataset(
        self, uri: str, columns: Mapping[str, str] | None = None, split: str | None = None
    ) -> DatasetReport:
        """Check a sample of the rows and images at a URI; the server stores nothing."""
        request = DatasetSource.model_validate({"uri": uri, "columns": dict(columns or {}), "split": split})
        answer = self._send("POST", "/v1/datasets/validate", request)
        return DatasetReport.model_validate(answer, extra="ignore")

    def dataset(self, dataset_id: str) -> DatasetView:
        return self._get(DatasetView, f"/v1/datasets/{dataset_id}")

    def datasets(self) -> Iterator[DatasetView]:
        return self._items(DatasetView, "/v1/datasets")

    def create_model(self, name: str, uri: str, family: str | None = None) -> ModelView:
        """Register a diffusers folder as a base model. The server detects the family and refuses another."""
        request = ModelCreate.model_validate({"name": name, "uri": uri, "family": family})
        return self._post(ModelView, "/v1/models", request)

    def model(self, model_id: str) -> ModelView:
        return self._get(ModelView, f"/v1/models/{model_id}")

    def models(self) -> Iterator[ModelView]:
        return self._items(ModelView, "/v1/models", cursor="version")

    def promote(self, model: str, alias: str = "production") -> ModelView:
        """Let ``NAME@alias`` refer to this version of the model, named by its version, name or alias."""
        request = Promote.model_validate({"alias": alias})
        return self._post(ModelView, f"/v1/models/{model}/promote", request)

    def delete_dataset(self, dataset_id: str) -> DeletedView:
        """Forget a dataset that no unfinished job uses; its files stay unless scorers made it. Tries once."""
        return parse(DeletedView, self._send("DELETE", f"/v1/datasets/{dataset_id}", once=True))

    def delete_model(self, model: str) -> DeletedView:
        """Delete a model that no unfinished job uses, named by its id, name or alias. Tries once.

        An aligned model's weights are deleted; a base model's files stay.
        """
        return parse(DeletedView, self._send("DELETE", f"/v1/models/{model}", once=True))

    # ---- scorers

    def create_scorer(self, request: ScorerCreate) -> ScorerView:
        """Register a scorer. The server reads all of its files first, which can take minutes; tries once."""
        return parse(ScorerView, self._send("POST", "/v1/scorers", request, slow=True))

    def scorer(self, scorer_id: str) -> ScorerView:
        return self._get(ScorerView, f"/v1/scorers/{scorer_id}")

    def scorers(self) -> Iterator[ScorerView]:
        """The project's scorers, and the built-in ones."""
        return self._items(ScorerView, "/v1/scorers")

    def delete_scorer(self, scorer_id: str) -> DeletedView:
        """Forget a scorer that no unfinished job or evaluation uses; its files stay. Tries once."""
        return parse(DeletedView, self._send("DELETE", f"/v1/scorers/{scorer_id}", once=True))

    # ---- keys

    def create_key(self, request: KeyCreate) -> KeyCreated:
        """Create an API key. The answer alone has its secret; tries once."""
        return parse(KeyCreated, self._send("POST", "/v1/keys", request, once=True))

    def api_keys(self) -> Iterator[KeyView]:
        """The keys that this client's key manages, revoked ones too."""
        return self._items(KeyView, "/v1/keys")

    def revoke_key(self, key_id: str) -> KeyView:
        """Refuse a key from now on."""
        return self._post(KeyView, f"/v1/keys/{key_id}/revoke")

    # ---- jobs

    def create_job(self, request: AlignmentJobCreate) -> JobView:
        """Start an alignment job."""
        return self._post(JobView, "/v1/alignment/jobs", request)

    def job(self, job_id: str) -> JobView:
        return self._get(JobView, f"/v1/alignment/jobs/{job_id}")

    def jobs(self, status: str | None = None) -> Iterator[JobView]:
        return self._items(JobView, "/v1/alignment/jobs", {"status": status} if status else {})

    def cancel_job(self, job_id: str) -> JobView:
        return self._post(JobView, f"/v1/alignment/jobs/{job_id}/cancel")

    def delete_job(self, job_id: str) -> DeletedView:
        """Delete a job that has ended and whose model is deleted. Tries once."""
        return parse(DeletedView, self._send("DELETE", f"/v1/alignment/jobs/{job_id}", once=True))

    def pause_job(self, job_id: str) -> JobView:
        """Request a pause: the job stores its state, frees its resources, and is then "paused"."""
        return self._post(JobView, f"/v1/alignment/jobs/{job_id}/pause")

    def resume_job(self, job_id: str) -> JobView:
        """Continue a paused job, or one that failed in a stage, from its last state."""
        return self._post(JobView, f"/v1/alignment/jobs/{job_id}/resume")

    def checkpoints(self, job_id: str) -> Iterator[CheckpointView]:
        """The stored checkpoints of a job's training, in order of steps."""
        return self._items(CheckpointView, f"/v1/alignment/jobs/{job_id}/checkpoints", cursor="step")

    def events(self, job_id: str, after: str | None = None) -> Iterator[EventView]:
        """The job's events in order, from the one after the event of id ``after``."""
        query = {"after": after} if after else {}
        return self._items(EventView, f"/v1/alignment/jobs/{job_id}/events", query)

    def metrics(self, job_id: str, stage: str, after: int | None = None) -> Iterator[MetricView]:
        """A stage's metrics in order of steps, from the step after ``after``."""
        query: dict[str, Any] = {"stage": stage}
        if after is not None:
            query["after"] = after
        return self._items(MetricView, f"/v1/alignment/jobs/{job_id}/metrics", query, cursor="step")

    def credit(self, job_id: str) -> CreditRecord:
        """Where a job's training put its credit. Raises ApiError 404 before the model exists."""
        answer = self._send("GET", f"/v1/alignment/jobs/{job_id}/credit")
        return CreditRecord.model_validate_json(json.dumps(answer))

    def wait(self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 1.0) -> JobView:
        """Wait until the job has succeeded, failed or been canceled. Raises TimeoutError."""
        return _until_finished(lambda: self.job(job_id), timeout_s, poll_s)

    # ---- evaluations

    def create_evaluation(self, request: EvaluationCreate) -> EvaluationView:
        """Start a comparison of two registered models."""
        return self._post(EvaluationView, "/v1/evaluations", request)

    def evaluation(self, evaluation_id: str) -> EvaluationView:
        return self._get(EvaluationView, f"/v1/evaluations/{evaluation_id}")

    def evaluations(self) -> Iterator[EvaluationView]:
        return self._items(EvaluationView, "/v1/evaluations")

    def wait_evaluation(
        self, evaluation_id: str, *, timeout_s: float | None = None, poll_s: float = 1.0
    ) -> EvaluationView:
        """Wait until the evaluation has ended. Raises TimeoutError."""
        return _until_finished(lambda: self.evaluation(evaluation_id), timeout_s, poll_s)

    # ---- studies

    def create_study(self, request: StudyCreate) -> StudyView:
        """Start a study: a grid of alignment jobs, then a comparison of all of their models."""
        return self._post(StudyView, "/v1/studies", request)

    def study(self, study_id: str) -> StudyView:
        return self._get(StudyView, f"/v1/studies/{study_id}")

    def studies(self, status: str | None = None) -> Iterator[StudyView]:
        return self._items(StudyView, "/v1/studies", {"status": status} if status else {})

    def study_events(self, study_id: str, after: str | None = None) -> Iterator[EventView]:
        """The study's events in order, from the one after the event of id ``after``."""
        return self._items(EventView, f"/v1/studies/{study_id}/events", {"after": after} if after else {})

    def cancel_study(self, study_id: str) -> StudyView:
        """Cancel a study and all of its jobs."""
        return self._post(StudyView, f"/v1/studies/{study_id}/cancel")

    def resume_study(self, study_id: str) -> StudyView:
        """Repeat the evaluations of a study that failed when its models were compared."""
        return self._post(StudyView, f"/v1/studies/{study_id}/resume")

    # ---- reports

    def report(self, run_id: str, form: Literal["html", "json"] = "html") -> bytes:
        """The report of a job, an evaluation or a study, by its id. Raises ApiError 404 before it ends."""
        kind = run_id.partition("_")[0]
        if kind not in REPORTS:
            message = f"id: must be of a job, an evaluation or a study, got {run_id!r}"
            raise BadRequest(message, param="id")
        suffix = "report" if form == "html" else "report.json"
        return self._receive("GET", f"{REPORTS[kind]}/{run_id}/{suffix}").content

    # ---- images and scores

    def generate(self, request: ImageRequest) -> ImagesResponse:
        """Generate images. Each of the answer's ``data`` has a file's ``content`` and the seed that repeats
        it.

        Raises BadRequest for a request with ``stream``, which this client does not read.
        """
        if request.stream:
            raise BadRequest("stream: this client takes whole answers; leave it out, got true", "stream")
        request.check()
        return self._post(ImagesResponse, "/v1/images/generations", request)

    def scores(self, request: ScoreRequest) -> list[dict[str, float]]:
        """One row of scores for each image: ``{"match": 0.9, ...}``."""
        rows: list[dict[str, float]] = self._send("POST", "/v1/scores", request)["data"]
        return rows

    def parts(self) -> ReadyView:
        """What the control plane reports on its parts, also if it cannot answer requests. Tries once.

        Raises Unavailable if nothing answers, ApiError for an answer that is not a control plane's.
        """
        try:
            response = self._http.get("/readyz", timeout=5.0)
            return parse(ReadyView, response.json())
        except httpx.TransportError as error:
            raise self._no_answer(error) from error
        except ValueError as error:
            raise ApiError.of(response) from error

    def ready(self) -> bool:
        """Whether the control plane can answer. Tries once and does not raise."""
        return self.readiness() is not None

    def complete(self) -> bool:
        """Whether the control plane can answer and reaches all parts. Tries once and does not raise."""
        report = self.readiness()
        return report is not None and not report.away

    def readiness(self) -> ReadyView | None:
        """The report of a control plane that can answer, else None. Tries once and does not raise."""
        try:
            report = self.parts()
        except (ApiError, Unavailable):
            return None
        return report if report.status == "ready" else None

    # ---- one request

    def _get(self, answer: type[Item], path: str, query: dict[str, Any] | None = None) -> Item:
        return parse(answer, self._send("GET", path, query=query))

    def _post(self, answer: type[Item], path: str, body: BaseModel | None = None) -> Item:
        return parse(answer, self._send("POST", path, body))

    def _items(
        self, item: type[Item], path: str, query: dict[str, Any] | None = None, cursor: str = "id"
    ) -> Iterator[Item]:
        query = {"limit": PAGE_SIZE, **(query or {})}
        while True:
            page: ListView[Item] = self._get(ListView[item], path, query)  # type: ignore[valid-type]
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
        once: bool = False,
    ) -> Any:
        """Send a request and return the JSON of the answer."""
        return self._receive(method, path, body, query, slow, once).json()

    def _receive(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        query: dict[str, Any] | None = None,
        slow: bool = False,
        once: bool = False,
    ) -> httpx.Response:
        """Send a request and return the answer.

        ``once`` tries once; ``slow`` does, too, and waits without a limit.
        """
        headers = {"Idempotency-Key": uuid.uuid4().hex} if method == "POST" else {}
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S) if slow else self._http.timeout
        content = None if body is None else body.model_dump(mode="json", exclude_none=True)
        request = self._http.build_request(
            method, path, json=content, params=query, headers=headers, timeout=timeout
        )
        retrying = Retrying(
            stop=stop_after_attempt(1 if slow or once else self.retries + 1),
            wait=_pause,
            retry=retry_if_exception(_is_transient),
            reraise=True,
        )
        try:
            return retrying(self._try_once, request)
        except httpx.TransportError as error:
            raise self._no_answer(error) from error

    def _no_answer(self, error: httpx.TransportError) -> Unavailable:
        return Unavailable(f"{self.base_url} does not answer: {error or type(error).__name__}", param="url")

    def _try_once(self, request: httpx.Request) -> httpx.Response:
        response = self._http.send(request)
        if not response.is_success:
            raise ApiError.of(response)
        return response


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, ApiError):
        is_out_of_time = error.code == DeadlineExceeded.default_code
        return error.status in (408, 429) or (error.status >= 500 and not is_out_of_time)
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


_GROWING_PAUSE = wait_random_exponential(multiplier=0.25, max=LONGEST_PAUSE_S)


def _pause(state: RetryCallState) -> float:
    """The server's Retry-After, at most ``LONGEST_PAUSE_S``; else a random pause that grows."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, ApiError) and error.retry_after_s is not None:
        return min(error.retry_after_s, LONGEST_PAUSE_S)
    return _GROWING_PAUSE(state)


def _seconds(header: str | None) -> float | None:
    """A Retry-After in seconds; None for a date."""
    return float(header) if header and header.strip().isdigit() else None


def _until_finished(read: Callable[[], Run], timeout_s: float | None, poll_s: float) -> Run:
    began = time.monotonic()
    while True:
        run = read()
        if run.finished:
            return run
        if timeout_s is not None and time.monotonic() - began > timeout_s:
            raise TimeoutError(f"{run.id} is still {run.status} after {timeout_s:g} s")
        time.sleep(poll_s)
