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
    """The admin key of the default project. Image URLs are signed with a key that is made from it."""
    storage_uri: str
    """Where everything is stored but the database: a path, ``file://`` or ``s3://bucket/prefix``, the same
    for the control plane, Ray and Serve.
    """
    database_url: str = "sqlite:///dde.db"
    """SQLite for one replica, ``postgresql+psycopg://USER:PASSWORD@HOST/NAME`` for several."""
    database_password_file: Path | None = None
    """A file with PostgreSQL's password, read for each new connection: a rotated one is used at once. None:
    the password is in ``database_url``.
    """
    ray_url: str = "http://127.0.0.1:8265"
    """The dashboard of the Ray cluster that runs jobs."""
    serve_url: str = "http://127.0.0.1:8000"
    """Ray Serve's HTTP address, to which requests for images and scores are sent on."""
    host: str = "127.0.0.1"
    """The address that the API listens on; ``0.0.0.0`` in a container."""
    port: int = 8080
    """The port that the API listens on."""
    use_gpu: bool = False
    """Give each training worker and each actor of the other stages one GPU. Serve has its own ``use_gpu``."""
    encode_actors: int = 1
    """Replicas of the model in the stages encode and ledger."""
    evaluate_actors: int = 1
    """Replicas of the model in the stages evaluate, generate and relabel."""
    poll_interval_s: float = 0.5
    """How long to wait between two reviews of a job."""
    lock_s: float = 60.0
    """How long a replica keeps a job that it reviews. If it dies, another one takes the job after that."""
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
    rayjob_image: str | None = None
    """The image of their head and workers, by digest in production: the nodes of one job then run the same
    one. By default what the template names.
    """
    kubeconfig: Path | None = None
    """How to reach the Kubernetes API outside of a pod; in a pod, by its service account."""
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
    """The most jobs that run at once. The others wait as queued; the order is fair between projects."""
    max_active_jobs_per_project: Annotated[int, Field(ge=1)] | None = None
    """The most of them of one project; None: no limit."""
    max_wait_s: Annotated[float, Field(gt=0)] = 7 * 86_400.0
    """How long a job may wait for room in all, for a slot and for machines, unless it says so itself; then it
    fails. A week: a queue may be long.
    """
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
    unreachable_s: Annotated[float, Field(gt=0)] = 3600.0
    """How long Ray may be unreachable, with nothing new in the run's journal, before its job fails; also how
    long to wait until Ray confirms the end of a run that was stopped.

    An hour: after the loss of a head's node, Kubernetes takes minutes to notice it, to move the pod, to add a
    machine and to pull the image.
    """
    request_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """How long a request for images or scores may take, unless it says so itself; at most Serve's
    ``limits.max_timeout_s``.
    """
    pause_ack_s: Annotated[float, Field(gt=0)] = 300.0
    """How long training that runs may take to acknowledge a pause. Then it hangs, and is killed: workers poll
    for it every few seconds, between steps.
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
    """The control plane's address; by default that of ``dde up`` in ``home``, else http://127.0.0.1:8080."""
    api_key: SecretStr | None = None
    """A key of ``dde keys create``, or the control plane's; by default that of ``dde up`` in ``home``."""
    home: Path = Path(".dde")
    """The state folder of ``dde up``."""

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
    max_worker_failures: Annotated[int, Field(ge=0)] = 30
    """How often workers of one attempt may die while they train, such as with their nodes: spot machines are
    lost often. An error that would only come again ends the attempt at once.
    """
    max_start_failures: Annotated[int, Field(ge=0)] = 30
    """How often they may die while they start, in a row. To wait for room is no failure."""
    storage_retry_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long training goes on while storage accepts none of its writes. Half an hour: an outage of a store
    seldom lasts longer, and the steps since the last checkpoint would be lost.
    """
    stop_ack_s: Annotated[float, Field(gt=0)] = 90.0
    """How long workers may take to acknowledge a request to stop; then the stage ends at its last checkpoint.
    Running workers do so within seconds, unless storage hangs: it gives up on a request after a minute.
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
    """Where MLflow's server is. Training logs to it if this is set; needs the extra ``mlflow``."""
    mlflow_experiment_name: Annotated[str, Field(min_length=1)] = "dde"
    """The experiment of all runs."""
    wandb_api_key: SecretStr | None = None
    """Training logs to Weights & Biases if this is set; needs the extra ``wandb``."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """``offline`` writes files to the run's folder, without a key; ``disabled`` logs nothing."""
    wandb_project: Annotated[str, Field(min_length=1)] = "dde"
    """The project of all runs."""

    @property
    def mlflow(self) -> bool:
        """Whether to log to MLflow: MLFLOW_TRACKING_URI is set."""
        return bool(self.mlflow_tracking_uri)

    @property
    def wandb(self) -> bool:
        """Whether to log to Weights & Biases: with WANDB_API_KEY, or to files with WANDB_MODE=offline."""
        return self.wandb_mode == "offline" or (bool(self.wandb_api_key) and self.wandb_mode != "disabled")
