"""Arguments of the Serve application."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.serving.admission import Limits
from services.settings import ServingSettings


class ServeArgs(BaseModel):
    """``args`` of the application in a Serve config.

    ``storage_uri``: by default the environment's DDE_STORAGE_URI. ``max_bytes``: memory for models and
    scorers; None is half of what the replica may use. ``preload``: models that are loaded before a replica is
    ready, NAME or PROJECT/NAME. ``gpus_per_replica``: the part of a GPU, and of its memory, that a replica
    gets with ``use_gpu``. With ``max_replicas`` above ``min_replicas``, replicas start and stop to bring the
    time in their queues to ``target_queue_s``.
    """

    model_config = ConfigDict(extra="forbid")

    storage_uri: str
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    preload: list[str] = []
    use_gpu: bool = False
    gpus_per_replica: Annotated[float, Field(gt=0, le=1)] = 1.0
    limits: Limits = Limits()
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    target_queue_s: Annotated[float, Field(gt=0)] = 10.0
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0

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
