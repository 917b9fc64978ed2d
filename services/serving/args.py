"""Arguments of the Serve application."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.serving.admission import Limits
from services.settings import ServingSettings


class ServeArgs(BaseModel):
    """``args`` of the application in a Serve config (`deploy/serve.yaml`)."""

    model_config = ConfigDict(extra="forbid")

    storage_uri: str
    """The control plane's DDE_STORAGE_URI; by default the environment's."""
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    """Memory for models and scorers; by default half of the GPU's, or of the container's on a CPU."""
    preload: list[str] = []
    """Models that are loaded before a replica is ready: NAME, or PROJECT/NAME."""
    use_gpu: bool = False
    """Give each replica a GPU, or a part of one."""
    gpus_per_replica: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The part of a GPU, and of its memory, that a replica gets with ``use_gpu``."""
    limits: Limits = Limits()
    """What a replica accepts: see below."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    """The fewest replicas."""
    max_replicas: Annotated[int, Field(ge=1)] = 1
    """The most replicas. Above ``min_replicas``, they start and stop to reach ``target_queue_s``."""
    target_queue_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds of work to have queued at each replica."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    """How long the queues must ask for more replicas."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0
    """How long the queues must ask for fewer."""

    @model_validator(mode="before")
    @classmethod
    def _read_environment(cls, args: Any) -> Any:
        default = ServingSettings().storage_uri
        if isinstance(args, dict) and "storage_uri" not in args and default:
            return {**args, "storage_uri": default}
        return args

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: must be at least min_replicas ({self.min_replicas}), got {self.max_replicas}"
            )
        return self

    @property
    def device(self) -> str:
        """The device of models and scorers."""
        if self.use_gpu:
            return "cuda"
        return "cpu"

    @property
    def num_gpus(self) -> float:
        """The GPUs that Ray reserves for a replica."""
        if self.use_gpu:
            return self.gpus_per_replica
        return 0.0
