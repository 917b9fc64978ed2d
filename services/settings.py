"""Everything that is read from the environment, in one place: variables that begin with ``DDE_``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.errors import BadRequest


class Settings(BaseSettings):
    """The control plane's settings. ``api_key`` and ``storage_uri`` have no default: a deployment says them."""

    model_config = SettingsConfigDict(env_prefix="DDE_", extra="ignore")

    api_key: Annotated[SecretStr, Field(min_length=1)]
    storage_uri: str
    database_url: str = "sqlite:///dde.db"
    ray_url: str = "http://127.0.0.1:8265"
    serve_url: str = "http://127.0.0.1:8000"
    host: str = "127.0.0.1"
    port: int = 8080
    use_gpu: bool = False
    encode_actors: int = 1
    evaluate_actors: int = 1
    poll_interval_s: float = 0.5
    lock_s: float = 60.0
    max_active_jobs: int = 8
    """How many jobs may have a stage on the cluster at once; the others wait as queued, the oldest first."""
    max_attempts: Annotated[int, Field(ge=1)] = 5
    """How often a stage is started without coming further, whose driver died or lacked something, before its job fails."""
    driver_grace_s: float = 10.0
    """How long a marker is waited for after Ray says that a driver has ended."""
    unreachable_s: float = 300.0
    """How long Ray may be out of reach, with nothing new in the run's journal, before a job that runs there is failed, and how
    long the end of a run that was told to end is waited for."""
    stopping_s: float = 3600.0
    """How long training that has heard of a pause may take over the step in hand and its checkpoint, outages of storage
    included."""


class ClientSettings(BaseSettings):
    """Where the ``dde`` command and scripts find a control plane, and with which key.

    ``home`` is the state folder of ``dde up``; it keeps the address and the key of the system that runs there, and
    these are taken where ``url`` and ``api_key`` are not given.
    """

    model_config = SettingsConfigDict(env_prefix="DDE_", extra="ignore")

    url: str | None = None
    api_key: SecretStr | None = None
    home: Path = Path(".dde")

    @property
    def base_url(self) -> str:
        """``DDE_URL``, else the address that `dde up` left, else http://127.0.0.1:8080."""
        return self.url or _first_line(self.home / "url") or "http://127.0.0.1:8080"

    @property
    def key(self) -> str:
        """``DDE_API_KEY``, else the key file of `dde up`. Raises BadRequest where there is neither."""
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
    """How training goes about the cluster: ``DDE_*`` variables where Ray runs."""

    model_config = SettingsConfigDict(env_prefix="DDE_", extra="ignore")

    resize_every_s: Annotated[float, Field(gt=0)] = 600.0
    """So often an elastic run looks whether there is room for more workers. Those that run end then; where a step and an upload
    are short against this, they have stored a checkpoint for it."""


class TrackerSettings(BaseSettings):
    """Where training tells its metrics beside the journal and TensorBoard's files: the variables that the clients of MLflow and
    of Weights & Biases read themselves. They are set where Ray runs, so no key passes through a spec or storage.

    Everything else that those clients read (user, token, entity, certificates) reaches them as it is.
    """

    model_config = SettingsConfigDict(extra="ignore")

    mlflow_tracking_uri: str | None = None
    mlflow_experiment_name: Annotated[str, Field(min_length=1)] = "dde"
    wandb_api_key: SecretStr | None = None
    wandb_mode: Annotated[str, Field(pattern="^(online|offline|disabled)$")] | None = None
    wandb_project: Annotated[str, Field(min_length=1)] = "dde"

    @property
    def mlflow(self) -> bool:
        """Whether MLflow is told: where MLFLOW_TRACKING_URI says where."""
        return bool(self.mlflow_tracking_uri)

    @property
    def wandb(self) -> bool:
        """Whether Weights & Biases is told: with WANDB_API_KEY, or into files with WANDB_MODE=offline."""
        return self.wandb_mode == "offline" or (bool(self.wandb_api_key) and self.wandb_mode != "disabled")
