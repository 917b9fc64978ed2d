"""The bodies of requests for images and scores: sent by the client, read by the control plane and Ray Serve.

Docstrings of classes are part of the OpenAPI document. Imports no torch and no Ray.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dde_core.config import MAX_SIZE_PX, Background, SampleConfig
from dde_core.errors import ConfigError
from services.api.requests import ALL_SCORERS, MAX_IMAGES, Scorers, Strict
from services.errors import BadRequest

SIZE_PATTERN = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
_SIDES = "|".join(str(side) for side in range(8, MAX_SIZE_PX + 1, 8))
_EXACT_SIZES = f"^(auto|({_SIDES})x({_SIDES}))$"
"""For the OpenAPI document; an error message would not name the rule."""


class ImageRequest(Strict):
    """Generate ``n`` images of ``prompt`` with a registered model, named by its name or id.

    Image i is generated from ``seed`` + i: the same request returns the same images. ``size`` is
    "WIDTHxHEIGHT" in pixels, both multiples of 8, or "auto" for the model's own size.
    """

    model: str
    prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    n: Annotated[int, Field(gt=0, le=MAX_IMAGES)] = 1
    size: Annotated[str, Field(pattern=SIZE_PATTERN, json_schema_extra={"pattern": _EXACT_SIZES})] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Annotated[int, Field(gt=0, le=1000)] = 25
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 5.0
    response_format: Literal["b64_json"] = "b64_json"

    def sample(self) -> SampleConfig:
        """The sampling settings. Raises ConfigError for a size that is too large or not a multiple of 8."""
        width, height = 0, 0
        if self.size != "auto":
            width, height = map(int, self.size.split("x"))
        try:
            return SampleConfig(
                steps=self.steps, guidance_scale=self.guidance_scale, height=height, width=width
            )
        except ConfigError as error:
            raise ConfigError("size", self.size, f"{error.field} {error.reason}") from error


class ScoreRequest(Strict):
    """Score images (base64 PNG or JPEG) against their prompts: ``prompts[i]`` belongs to ``images[i]``.

    ``scorers`` are names of registered scorers that give each image a number of its own.
    Transparent pixels show the ``background``.
    """

    images: Annotated[list[str], Field(min_length=1, max_length=256)]
    prompts: Annotated[list[str], Field(min_length=1, max_length=256)]
    scorers: Annotated[Scorers, Field(min_length=1)] = list(ALL_SCORERS)
    background: Background = "white"

    def check_lengths(self) -> None:
        """Raises BadRequest unless there is one prompt for each image."""
        if len(self.images) != len(self.prompts):
            message = f"prompts: must be as many as the {len(self.images)} images, got {len(self.prompts)}"
            raise BadRequest(message, param="prompts")
