"""All environment variables that are read, in one place; most begin with ``DDE_``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from services.errors import BadRequest


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError('must be a JSON list, such as ["/data", "s3://bucket/prefix"]') from error


Sources = Annotated[list[str], NoDecode, BeforeValidator(_from_json)]


class Settings(BaseSettings):
    """The control plane's settings. A deployment must set ``api_key`` and ``storage_uri``."""

    model_config = SettingsConfigDict(env_prefix="DDE_", extra="ignore")

    api_key: Annotated[SecretStr, Field(min_length=1)]
    storage_uri: str
    database_url: str = "sqlite:///dde.db"
    database_password_file: Path | None = None
    """A file with PostgreSQL's password, read for each new connection: a rotated one is used at once. None:
    the password is in ``database_url``.
    """
    ray_url: str = "http://127.0.0.1:8265"
    serve_url: str = "http://127.0.0.1:8000"
    host: str = "127.0.0.1"
    port: int = 8080
    use_gpu: bool = False
    encode_actors: int = 1
    evaluate_actors: int = 1
    poll_interval_s: float = 0.5
    lock_s: float = 60.0
    allowed_sources: Sources = []
    """The folders (paths or file:// URIs) and buckets (s3://bucket/prefix) from which pairs, prompts and base
    models may be read, by the control plane and by the stages of its jobs; a JSON list. What the package
    ships is always allowed.
    """
    denied_sources: Sources = []
    """What is not read although it is inside of ``allowed_sources``, such as a file with keys."""
    public_url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    """The address at which clients reach the control plane, for the URLs of images; by default the one that
    the request for images was sent to.
    """
    image_url_s: Annotated[int, Field(ge=1, le=7 * 86_400)] = 3600
    """How long an image can be fetched from its URL. Then it is deleted."""
    cluster: Literal["shared", "own"] = "shared"
    """Where jobs run that do not say it themselves: on the Ray cluster at ``ray_url``, or each stage on a Ray
    cluster of its own, which KubeRay starts (``rayjob_*``).
    """
    rayjob_template: Path | None = None
    """The RayJob (YAML) that those of stages are made from. Without it no job can have its own cluster."""
    rayjob_namespace: str | None = None
    """Where RayJobs are created; by default the namespace of the control plane's pod."""
    rayjob_queue: str | None = None
    """The Kueue LocalQueue that admits RayJobs; none: they start as soon as Kubernetes has room."""
    rayjob_priority: str | None = None
    """The Kueue WorkloadPriorityClass of RayJobs."""
    driver_cpus: Annotated[float, Field(ge=0)] = 0.0
    """The CPUs that Ray reserves for the driver of a stage on a shared cluster. Above 0, Ray places it on a
    worker node with room, so that many drivers do not exhaust the head's memory.
    """
    driver_memory: Annotated[int, Field(ge=0)] = 0
    """The bytes that Ray reserves for such a driver."""
    max_active_jobs: int = 8
    """The most jobs that run at once. The others wait as queued."""
    max_active_jobs_per_project: Annotated[int, Field(ge=1)] | None = None
    """The most of them of one project; None: no limit."""
    max_wait_s: Annotated[float, Field(gt=0)] = 7 * 86_400.0
    """How long a job may wait for room in all, unless it says so itself. A week: a queue may be long."""
    max_attempts: Annotated[int, Field(ge=1)] = 5
    """The most attempts without progress after a driver died or could not reach something; then the job
    fails.
    """
    driver_grace_s: float = 10.0
    """How long to wait for a driver's marker file after Ray reports its end."""
    migrate: bool = True
    """Migrate the database at start. False where ``python -m services.control migrate`` runs before."""
    metrics_port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """A port of its own for /metrics, without a key; None: the port of the API answers it."""
    drain_s: Annotated[float, Field(ge=0)] = 300.0
    """How long a replica that is asked to end (SIGTERM) finishes the requests that it has."""
    drain_notice_s: Annotated[float, Field(ge=0)] = 5.0
    """How much of that it still accepts new ones, although it is no longer ready: load balancers need some
    seconds to notice.
    """
    unreachable_s: float = 300.0
    """How long Ray may be unreachable, with nothing new in the run's journal, before its job fails; also how
    long to wait until Ray confirms the end of a run that was stopped.
    """
    request_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """How long a request for images or scores may take, unless it says so itself; at most Serve's
    ``limits.max_timeout_s``.
    """
    stopping_s: float = 3600.0
    """How long training may take, after it acknowledged a pause, to finish the step and store its checkpoint,
    including outages of storage."""


class ClientSettings(BaseSettings):
    """How the ``dde`` command and scripts reach a control plane.

    ``home`` is the state folder of ``dde up``. The address and key of the system that runs there are the
    defaults of ``url`` and ``api_key``.
    """

    model_config = SettingsConfigDict(env_prefix="DDE_", extra="ignore")

    url: str | None = None
    api_key: SecretStr | None = None
    home: Path = Path(".dde")

    @property
    def base_url(self) -> str:
        """``DDE_URL``, else the address that `dde up` wrote, else http://127.0.0.1:8080."""
        return self.url or _first_line(self.home / "url") or "http://127.0.0.1:8080"

    @property
    def key(self) -> str:
        """``DDE_API_KEY``, else the key file of `dde up`. Raises BadRequest if neither exists."""
        key = self.api_key.get_secret_value() if self.api_key else _first_line(self.home / "key")
        if not key:
            raise BadRequest(
                f"no key: DDE_API_KEY is not set and there is no key file {self.home / 'key'}",
                param="api_key",
            )
        return key


def _first_line(path: Path) -> str | None:
    return path.read_text().strip() if path.is_file() else None


class TrainingSettings(BaseSettings):
    """How training uses the cluster: ``DDE_*`` variables of the machines on which Ray runs."""

    model_config = SettingsConfigDict(env_prefix="DDE_", extra="ignore")

    resize_every_s: Annotated[float, Field(gt=0)] = 600.0
    """How often an elastic run checks whether there is room for more workers.

    To add some, the current workers restart from a checkpoint that they store just before, if a step and an
    upload are short compared with this.
    """


class ServingSettings(BaseSettings):
    """What the Serve application reads on the machines on which Ray runs."""

    model_config = SettingsConfigDict(env_prefix="DDE_", extra="ignore")

    storage_uri: str | None = None
    """The storage of an application whose ``args`` name none, so that one manifest value serves both."""


class TrackerSettings(BaseSettings):
    """Where training logs its metrics, besides the journal and TensorBoard files.

    These are the variables that the clients of MLflow and Weights & Biases read themselves, as they read all
    others (user, token, entity, certificates). Set them on the machines on which Ray runs: no key passes
    through storage.
    """

    model_config = SettingsConfigDict(extra="ignore")

    mlflow_tracking_uri: str | None = None
    mlflow_experiment_name: Annotated[str, Field(min_length=1)] = "dde"
    wandb_api_key: SecretStr | None = None
    wandb_mode: Annotated[str, Field(pattern="^(online|offline|disabled)$")] | None = None
    wandb_project: Annotated[str, Field(min_length=1)] = "dde"

    @property
    def mlflow(self) -> bool:
        """Whether to log to MLflow: MLFLOW_TRACKING_URI is set."""
        return bool(self.mlflow_tracking_uri)

    @property
    def wandb(self) -> bool:
        """Whether to log to Weights & Biases: with WANDB_API_KEY, or to files with WANDB_MODE=offline."""
        return self.wandb_mode == "offline" or (bool(self.wandb_api_key) and self.wandb_mode != "disabled")
