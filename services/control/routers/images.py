"""/v1/images/generations and /v1/scores: forwarded to Serve."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from services.api.requests import ImageRequest, ScoreRequest
from services.control import inference
from services.control.dependencies import BODY_BYTES, parse, read_body, takes

router = APIRouter(tags=["inference"])
IMAGES = "/v1/images/generations"
SCORES = "/v1/scores"


@router.post(IMAGES, openapi_extra=takes(ImageRequest))
async def generate(request: Request) -> Response:
    """Generate images with a registered model."""
    parsed, raw = parse(ImageRequest, await read_body(request, BODY_BYTES))
    inference.check_image(parsed)
    return await inference.forward(request.app.state.serve, IMAGES, raw, request.state.request_id)


@router.post(SCORES, openapi_extra=takes(ScoreRequest))
async def score(request: Request) -> Response:
    """Score images against their prompts."""
    parsed, raw = parse(ScoreRequest, await read_body(request, inference.SCORE_BYTES))
    parsed.check_lengths()
    return await inference.forward(request.app.state.serve, SCORES, raw, request.state.request_id)
