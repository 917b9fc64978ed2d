"""What a model's text encoders read of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from services.api.images import ImageRequest
from services.serving.contract import LoadedModel

NO_SAFETY_CHECKER = "no safety checker: images are not checked"
SAFETY_CHECKER_NOT_RUN = (
    "safety_checker: the model's folder has one, which is not run; images are not checked"
)


@dataclass(frozen=True)
class Reading:
    """``tokens``: how many of prompt and negative prompt are read, without start and end marks.

    ``warnings`` are for the caller: what was cut or has no effect, and that no safety checker runs.
    """

    tokens: int
    warnings: list[str]


def read(loaded: LoadedModel, request: ImageRequest) -> Reading:
    """How the model's text encoders read the request's prompts."""
    is_guided = request.guidance_scale > 1
    prompts = {"prompt": request.prompt}
    if is_guided:
        prompts["negative_prompt"] = request.negative_prompt
    warnings = []
    num_read = 0
    for field, prompt in prompts.items():
        tokens, limit = loaded.count_tokens(prompt)
        num_read += min(tokens, limit)
        if tokens > limit:
            warnings.append(f"{field}: the text encoder reads the first {limit} of {tokens} tokens")
    if request.negative_prompt and not is_guided:
        warnings.append("negative_prompt: is read only if guidance_scale is above 1")
    warnings += [f"{field}: has no effect here" for field in request.without_effect()]
    warnings.append(SAFETY_CHECKER_NOT_RUN if loaded.has_safety_checker else NO_SAFETY_CHECKER)
    return Reading(num_read, warnings)
