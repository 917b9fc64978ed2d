"""Everything that is read from the environment, in one place: variables that begin with ``DDE_``."""

from __future__ import annotations

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """The control plane's settings. ``api_key`` and ``storage_uri`` have no default: a deployment says them."""

    model_config = SettingsConfigDict(env_prefix="DDE_", extra="ignore")

    api_key: SecretStr
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
    driver_grace_s: float = 10.0
    """How long a marker is waited for after Ray says that a driver has ended."""
    unreachable_s: float = 300.0
    """How long Ray may be out of reach before a job that runs there is failed."""
