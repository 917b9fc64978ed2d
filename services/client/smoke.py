"""`dde smoke`: a tiny job against any installation, from a shipped model to a served image, all over HTTP.

Everything that it makes has one new name, by which it is found and deleted again, however the run ends.
"""

from __future__ import annotations

import base64
import io
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import FrameType
from typing import Any

from PIL import Image
from pydantic import ValidationError
from rich.console import Console

from dde_core.config import SampleConfig, TrainConfig
from dde_core.errors import DdeError
from dde_core.shapes import FEW_PAIRS_URI, MODEL_URI, PROMPTS_URI
from services.api.answers import JobView
from services.api.images import ImageRequest, ScoreRequest
from services.api.requests import ALL_SCORERS, AlignmentJobCreate, EvaluationConfig, Scope
from services.client.api import PAGE_SIZE, ApiError, Client
from services.client.up import signals_interrupt
from services.errors import ServiceError

POLL_S = 1.0
CLEAN_UP_S = 180.0
"""How long the end of a canceled job and the deletions may take."""
SETTLE_S = 5.0
"""How long the server has for the requests that it had when the run was interrupted, before the clean-up."""
CLEAN_UP_TRIES = 5
SAMPLE = SampleConfig(steps=20, guidance_scale=3.0)
SIZE_PX = 32
PROMPT = "a medium orange square on a white background"
BETTER_BY = 0.2
"""The least by which an image's match must exceed that of noise. Noise has at most 0.5, a drawn image 0.9."""
NEEDED_SCOPES: tuple[Scope, ...] = ("read", "submit", "generate")


class OutOfTime(ServiceError):
    """The run, or its clean-up, took longer than it may."""


def run_smoke(console: Console, base_url: str, key: str, timeout_s: float) -> None:
    """Print a line for each step, and clean up. Raises ServiceError with the step that failed and why."""
    with signals_interrupt(), Client(base_url, key) as client:
        Smoke(client, console).run(timeout_s)


class Smoke:
    """One run. ``step`` is the step that it is at."""

    def __init__(self, client: Client, console: Console) -> None:
        self.name = f"smoke-{secrets.token_hex(6)}"
        self.base = f"{self.name}-base"
        self.step = "health"
        self._client = client
        self._console = console
        self._since = time.monotonic()
        self._has_made = False

    def run(self, timeout_s: float) -> None:
        """All steps within ``timeout_s`` seconds, then the clean-up. Raises ServiceError."""
        problem: str | None = None
        was_interrupted = True
        try:
            with limit(timeout_s):
                self._do("health", self._check_health)
                self._do("key", self._check_key)
                self._has_made = True
                self._do("model", self._register_model)
                dataset = self._do("dataset", self._register_pairs)
                job = self._follow(dataset)
                self._do("report", lambda: self._check_report(job))
                self._do("image", lambda: self._check_image(job))
            was_interrupted = False
        except (ServiceError, DdeError, ValidationError, OSError) as error:
            was_interrupted = isinstance(error, OutOfTime)
            problem = f"{self.step}: {_line(error)}"
            self._print("FAILED", self.step, _line(error))
        finally:
            left = self._clean_up(was_interrupted) if self._has_made else []
        if problem or left:
            raise ServiceError("; ".join(filter(None, [problem, *left])))
        self._console.print(f"{self._client.base_url} works", highlight=False, markup=False, soft_wrap=True)

    # ---- steps: each returns what its line says, or that and a result

    def _check_health(self) -> str:
        report = self._client.parts()
        away = ", ".join(f"{part} ({why})" for part, why in report.away.items())
        if away or report.status != "ready":
            raise ServiceError(f"away: {away}" if away else f"the control plane is {report.status}")
        return ", ".join(report.checks)

    def _check_key(self) -> str:
        """Every scope is tried on a request that makes nothing."""
        tries: dict[Scope, Callable[[], object]] = {
            "read": lambda: next(self._client.models(), None),
            "submit": lambda: self._client.validate_dataset(FEW_PAIRS_URI),
            "generate": self._ask_for_no_model,
        }
        missing = [scope for scope in NEEDED_SCOPES if not _may(tries[scope])]
        if missing:
            raise ServiceError(f"the key lacks the scope {' and '.join(missing)}; it needs {_scopes()}")
        return f"has {_scopes()}"

    def _ask_for_no_model(self) -> None:
        """Serve answers that it does not know the model: so it is there, and the key may draw."""
        try:
            self._client.generate(ImageRequest(model=self.name, prompt=PROMPT))
        except ApiError as error:
            if error.code != "model_not_found":
                raise

    def _register_model(self) -> str:
        model = self._client.create_model(self.base, MODEL_URI)
        return f"{model.version}, {model.family}"

    def _register_pairs(self) -> tuple[str, str]:
        dataset = self._client.create_dataset(self.name, FEW_PAIRS_URI)
        pairs = dataset.counts.pairs if dataset.counts else 0
        return f"{dataset.id}, {pairs} pairs", dataset.id

    def _follow(self, dataset: str) -> JobView:
        """Start the job; a step for each of its stages."""
        job = self._do("job", lambda: self._start(dataset))
        done: set[str] = set()
        while True:
            self.step = job.stage or job.status
            job = self._client.job(job.id)
            for stage, seconds in job.stage_seconds.items():
                if stage not in done:
                    done.add(stage)
                    self._print("ok", stage, f"{seconds:.1f} s of work")
            if job.finished:
                break
            time.sleep(POLL_S)
        self.step = job.stage or "job"
        if job.status != "succeeded":
            raise ServiceError(f"{job.id} {job.status}: {job.reason or 'without a reason'}")
        return job

    def _start(self, dataset: str) -> tuple[str, JobView]:
        request = AlignmentJobCreate(
            model=self.base,
            dataset=dataset,
            name=self.name,
            training=TrainConfig(steps=4, batch_size=8, learning_rate=1e-5, checkpoint_every=4),
            evaluation=EvaluationConfig(prompts_uri=PROMPTS_URI, num_prompts=8, sample=SAMPLE),
        )
        job = self._client.create_job(request)
        return job.id, job

    def _check_report(self, job: JobView) -> str:
        found = job.result.evaluate
        scores = {} if found is None else found.scores
        missing = [name for name in ALL_SCORERS if self.name not in scores.get(name, {})]
        if found is None or missing:
            raise ServiceError(f"{job.id} has no scores of {', '.join(missing)}")
        self._client.report(job.id, "json")
        match = scores[ALL_SCORERS[0]][self.name]
        return (
            f"{found.num_prompts} prompts, match {match.base:.3f} of the base, {match.candidate:.3f} aligned"
        )

    def _check_image(self, job: JobView) -> str:
        request = ImageRequest(
            model=self.name, prompt=PROMPT, seed=0, steps=SAMPLE.steps, guidance_scale=SAMPLE.guidance_scale
        )
        answer = self._client.generate(request)
        if answer.model_id != job.aligned_model:
            raise ServiceError(f"{answer.model_id} drew it, the job made {job.aligned_model}")
        content = answer.data[0].content
        check_size(content)
        drawn, noise = self._client.scores(
            ScoreRequest(images=[_base64(content), _base64(_noise())], prompts=[PROMPT, PROMPT])
        )
        if drawn["match"] < noise["match"] + BETTER_BY:
            raise ServiceError(
                f"is like noise: match {drawn['match']:.3f}, that of noise {noise['match']:.3f}"
            )
        return f"{SIZE_PX}x{SIZE_PX} px, match {drawn['match']:.3f}, of noise {noise['match']:.3f}"

    # ---- clean-up

    def _clean_up(self, was_interrupted: bool) -> list[str]:
        """Delete what has the run's name. Returns a sentence for each thing that is left.

        Tries again while something cannot be deleted: the job that uses it may only have been created now.
        """
        self.step = "clean-up"
        self._since = time.monotonic()
        deleted: list[str] = []
        left: list[str] = []
        try:
            with limit(CLEAN_UP_S):
                if was_interrupted:
                    time.sleep(SETTLE_S)
                left = self._delete_all(deleted)
                for _ in range(CLEAN_UP_TRIES - 1):
                    if not left:
                        break
                    time.sleep(POLL_S)
                    left = self._delete_all(deleted)
        except OutOfTime as error:
            left.append(str(error))
        if left:
            left = [*(f"clean-up: {each}" for each in left), f"delete what is called {self.name} by hand"]
            self._print("FAILED", self.step, "; ".join(left))
        else:
            self._print("ok", self.step, f"deleted {', '.join(deleted) or 'nothing: nothing was made'}")
        return left

    def _delete_all(self, deleted: list[str]) -> list[str]:
        """Try each deletion; adds what was deleted. Returns the errors."""
        left = []
        for delete in (self._delete_jobs, self._delete_datasets, self._delete_base):
            try:
                for each in delete():
                    deleted.append(each)
            except OutOfTime:
                raise
            except (ServiceError, ValidationError, OSError) as error:
                left.append(_line(error))
        return left

    def _delete_jobs(self) -> Iterator[str]:
        """End the job of this name; then delete the model that it made, and the job."""
        for job in islice(self._client.jobs(), PAGE_SIZE):
            if job.name != self.name:
                continue
            if not job.finished:
                self._client.cancel_job(job.id)
                job = self._client.wait(job.id, poll_s=POLL_S)
            model = job.aligned_model
            if model and self._exists(model):
                yield self._client.delete_model(model).id
            yield self._client.delete_job(job.id).id

    def _delete_datasets(self) -> Iterator[str]:
        for dataset in islice(self._client.datasets(), PAGE_SIZE):
            if dataset.name == self.name:
                yield self._client.delete_dataset(dataset.id).id

    def _delete_base(self) -> Iterator[str]:
        if self._exists(self.base):
            yield self._client.delete_model(self.base).id

    def _exists(self, model: str) -> bool:
        try:
            self._client.model(model)
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        return True

    # ---- lines

    def _do(self, step: str, work: Callable[[], Any]) -> Any:
        """Do a step and print its line. Returns its result."""
        self.step = step
        found = work()
        line, result = found if isinstance(found, tuple) else (found, None)
        self._print("ok", step, line)
        return result

    def _print(self, outcome: str, step: str, line: str) -> None:
        """``ok      model     model_..., sd15                   0.4 s``"""
        now = time.monotonic()
        text = f"{outcome:<7} {step:<9} {line}  [{now - self._since:.1f} s]"
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._since = now


def check_size(content: bytes) -> None:
    """Raises OSError for a file that is no image or is cut off, ServiceError for another size."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
    if image.size != (SIZE_PX, SIZE_PX):
        raise ServiceError(f"is {image.width}x{image.height} px, must be {SIZE_PX}x{SIZE_PX}")


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block, whatever it waits for, once so many seconds have passed.

    Works in the main thread alone. An alarm that was set before goes off at its time, or right after.
    """
    began = time.monotonic()

    def expire(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"not done after {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, expire)
    earlier_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if earlier_s:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, earlier_s - (time.monotonic() - began)))


def _may(request: Callable[[], object]) -> bool:
    """Whether the key has the scope of a request."""
    try:
        request()
    except ApiError as error:
        if error.code != "missing_scope":
            raise
        return False
    return True


def _scopes() -> str:
    return ", ".join(NEEDED_SCOPES)


def _line(error: Exception) -> str:
    """An error as one line that names its field."""
    param = getattr(error, "param", None)
    text = " ".join(str(error).split()) or type(error).__name__
    return text if not param or param in text else f"{param}: {text}"


def _noise() -> bytes:
    """A PNG file of random pixels, the same in each run."""
    out = io.BytesIO()
    pixels = random.Random(0).randbytes(SIZE_PX * SIZE_PX * 3)
    Image.frombytes("RGB", (SIZE_PX, SIZE_PX), pixels).save(out, "PNG")
    return out.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
