"""Requests for images and scores, their answers and stream events: OpenAI's Images API and our own fields.

Declared once: sent by the client, read by the control plane and Ray Serve. Docstrings of classes are part of
the OpenAPI document. Imports no torch and no Ray.
"""

from __future__ import annotations

import base64
import secrets
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticUseDefault, core_schema

from dde_core.config import MAX_SIZE_PX, Background, SampleConfig, SamplerName
from dde_core.errors import ConfigError
from services.api.answers import Answer
from services.api.requests import ALL_SCORERS, MAX_IMAGES, Scorers, Strict
from services.errors import BadRequest

MAX_PROMPT_CHARS = 32_000
MAX_PARTIAL_IMAGES = 3
MAX_STEPS = 1000
DEFAULT_STEPS = 25
MAX_SEED = 2**63 - 1
FRESH_SEEDS = 2**32
"""A seed that nobody chose is below this: every JSON parser keeps it exactly."""
PATCH_PX = 16
"""``usage`` counts an image in patches of this side."""
SIZE_PATTERN = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
_SIDES = "|".join(str(side) for side in range(8, MAX_SIZE_PX + 1, 8))
_EXACT_SIZES = f"^(auto|({_SIDES})x({_SIDES}))$"
"""For the OpenAPI document; an error message would not name the rule."""

OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
AnsweredQuality = Literal["low", "medium", "high", "xhigh", "max"]


class _OrNull:
    """Marks a field that takes null for its default, as OpenAI's API does."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_use_default_for_null, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"type": "null"}]}


def _use_default_for_null(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


def _refuse(value: Any) -> Any:
    if value is None:
        return value
    raise PydanticCustomError(
        "not_supported", "is for SVG and GIF files; leave it out and use output_format png, jpeg or webp"
    )


OR_NULL = _OrNull()
NotSupported = Annotated[None, BeforeValidator(_refuse)]
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
Steps = Annotated[int, Field(gt=0, le=MAX_STEPS)]
Identifier = Annotated[str, Field(max_length=512)]


class ImageRequest(Strict):
    """Generate ``n`` images of ``prompt`` with a registered model, named by its name, name@alias or id.

    The fields are those of OpenAI's ``images.generate``, and our own: ``seed``, ``num_inference_steps``
    (``steps`` is an alias), ``guidance_scale``, ``negative_prompt``, ``sampler`` and ``metadata``. Null means
    a field's default.

    Image i is generated from ``seed`` + i: the same request returns the same images. Without a seed a fresh
    one is drawn, and the answer has it. ``size`` is "WIDTHxHEIGHT" in pixels, both multiples of 8, or "auto"
    for the model's own size. The negative prompt is read if ``guidance_scale`` is above 1.

    ``output_compression`` is the encoder's quality, 0 to 100; at 100 WebP is lossless. PNG is always
    lossless and takes 100 only. With ``metadata`` a PNG file has a text chunk with everything that determines
    the image. With ``stream``, which takes one image a request, the answer is server-sent events, with
    ``partial_images`` previews before the image. ``response_format`` "url" returns a URL that expires instead
    of the file.

    ``quality``, ``style``, ``complexity``, ``moderation``, ``user`` and ``safety_identifier`` have no effect.
    ``svg``, ``frame_count`` and ``frame_duration_ms`` are refused.
    """

    model: str
    prompt: Annotated[Prompt, Field(min_length=1)]
    negative_prompt: Annotated[Prompt, OR_NULL] = ""
    n: Annotated[int, Field(gt=0, le=MAX_IMAGES), OR_NULL] = 1
    size: Annotated[
        str, Field(pattern=SIZE_PATTERN, json_schema_extra={"pattern": _EXACT_SIZES}), OR_NULL
    ] = "auto"
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    sampler: Annotated[SamplerName, OR_NULL] = "ddim"
    num_inference_steps: Steps | None = None
    steps: Steps | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100), OR_NULL] = 5.0
    response_format: Annotated[Literal["b64_json", "url"], OR_NULL] = "b64_json"
    output_format: Annotated[OutputFormat, OR_NULL] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100), OR_NULL] = 100
    metadata: Annotated[bool, OR_NULL] = True
    stream: Annotated[bool, OR_NULL] = False
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES), OR_NULL] = 0
    background: Annotated[Literal["auto", "opaque"], OR_NULL] = "auto"
    quality: Annotated[Quality, OR_NULL] = "auto"
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    user: Identifier | None = None
    safety_identifier: Identifier | None = None
    svg: NotSupported = None
    frame_count: NotSupported = None
    frame_duration_ms: NotSupported = None

    def check(self) -> None:
        """Raises BadRequest for fields that contradict each other, and for a size that no model can
        generate."""
        if self.steps is not None and self.num_inference_steps not in (None, self.steps):
            raise BadRequest(
                f"steps: is an alias of num_inference_steps, which is {self.num_inference_steps}; "
                f"give one of them, got {self.steps}",
                param="steps",
            )
        if self.seed is not None and self.seed + self.n - 1 > MAX_SEED:
            raise BadRequest(
                f"seed: image i has the seed + i, which must be at most {MAX_SEED}; got {self.seed} "
                f"for {self.n} images",
                param="seed",
            )
        if self.output_format == "png" and self.output_compression != 100:
            raise BadRequest(
                f"output_compression: PNG takes 100 only; use output_format jpeg or webp, "
                f"got {self.output_compression}",
                param="output_compression",
            )
        self._check_stream()
        try:
            self.sample()
        except ConfigError as error:
            raise BadRequest(f"size: {error.reason}, got {self.size!r}", param="size") from error

    def _check_stream(self) -> None:
        if self.partial_images and not self.stream:
            raise BadRequest(
                f"partial_images: needs stream true, got {self.partial_images}", param="partial_images"
            )
        if self.stream and self.n > 1:
            raise BadRequest(f"n: a stream has one image; send a request for each, got {self.n}", param="n")
        if self.stream and self.response_format == "url":
            raise BadRequest(
                "response_format: events have b64_json; use it, or stream false, got 'url'",
                param="response_format",
            )

    @property
    def num_steps(self) -> int:
        """The sampling steps under either name."""
        return self.num_inference_steps or self.steps or DEFAULT_STEPS

    @property
    def answered_quality(self) -> AnsweredQuality | None:
        """The quality as answers repeat it; None for those that OpenAI's answers do not have."""
        match self.quality:
            case "auto" | "standard" | "hd":
                return None
        return self.quality

    def sample(self) -> SampleConfig:
        """The sampling settings. Raises ConfigError for a size that is too large or not a multiple of 8."""
        width, height = 0, 0
        if self.size != "auto":
            width, height = map(int, self.size.split("x"))
        try:
            return SampleConfig(
                sampler=self.sampler,
                steps=self.num_steps,
                guidance_scale=self.guidance_scale,
                height=height,
                width=width,
            )
        except ConfigError as error:
            raise ConfigError("size", self.size, f"{error.field} {error.reason}") from error

    def seeds(self) -> tuple[int, ...]:
        """The seed of each image; fresh ones, which differ at each call, if the request has none."""
        first = secrets.randbelow(FRESH_SEEDS) if self.seed is None else self.seed
        return tuple(range(first, first + self.n))

    def without_effect(self) -> list[str]:
        """The fields of OpenAI's API that were given and that change nothing here."""
        given = {
            "quality": self.quality != "auto",
            "moderation": self.moderation == "low",
            "style": self.style is not None,
            "complexity": self.complexity is not None,
        }
        return [name for name, is_given in given.items() if is_given]


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


class TokenDetails(Answer):
    """Tokens by kind."""

    text_tokens: int
    image_tokens: int


class Usage(Answer):
    """``input_tokens`` are the tokens of prompt and negative prompt that the text encoder reads.

    ``output_tokens`` are the images' patches of 16 x 16 px: a measure of their size, not of work.
    """

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int

    @classmethod
    def of(cls, input_tokens: int, images: int, height_px: int, width_px: int) -> Usage:
        """The usage of ``images`` images of one size."""
        patches = images * -(-height_px // PATCH_PX) * -(-width_px // PATCH_PX)
        return cls(
            input_tokens=input_tokens,
            input_tokens_details=TokenDetails(text_tokens=input_tokens, image_tokens=0),
            output_tokens=patches,
            output_tokens_details=TokenDetails(text_tokens=0, image_tokens=patches),
            total_tokens=input_tokens + patches,
        )


class ImageData(Answer):
    """An image: its file in base64, or the URL of it; and the seed that repeats it."""

    b64_json: str | None = None
    url: str | None = None
    seed: int

    @property
    def content(self) -> bytes:
        """The file. Raises BadRequest for an image that was returned as a URL."""
        if self.b64_json is None:
            raise BadRequest(f"the image is at {self.url}", param="response_format")
        return base64.b64decode(self.b64_json)


class ImagesResponse(Answer):
    """Generated images. ``model`` was asked for by name; ``model_id`` and ``model_digest`` are the version
    that drew. ``warnings`` say what the images do not show: a prompt that was cut, fields without effect, no
    safety checker.

    ``created``, ``data``, ``background``, ``output_format``, ``quality``, ``size`` and ``usage`` are as in
    OpenAI's API; ``quality`` repeats the request's.
    """

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: AnsweredQuality | None = None
    size: str
    usage: Usage
    model: str
    model_id: str
    model_digest: str
    warnings: list[str] = []


class ImageEvent(Answer):
    """What both events of a stream have, as in OpenAI's API."""

    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: OutputFormat
    quality: AnsweredQuality | Literal["auto"]
    size: str


class PartialImage(ImageEvent):
    """An estimate of the image while it is denoised; ``partial_image_index`` counts them from 0."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class CompletedImage(ImageEvent):
    """The image; our own fields are those of ImagesResponse."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage
    seed: int
    model: str
    model_id: str
    model_digest: str
    warnings: list[str] = []


StreamEvent = PartialImage | CompletedImage
