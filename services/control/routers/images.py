"""/v1/images/generations and /v1/scores: one front door to Serve."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from services.api.requests import ImageRequest, ScoreRequest
from services.control import inference
from services.control.dependencies import BODY_BYTES, parse, read_body, takes

router = APIRouter(tags=["inference"])


@router.post("/v1/images/generations", openapi_extra=takes(ImageRequest))
async def generate(request: Request) -> Response:
    """Draw pictures with a registered model."""
    raw = await read_body(request, BODY_BYTES)
    inference.check_image(parse(ImageRequest, raw))
    return await inference.pass_on(
        request.app.state.serve, "/v1/images/generations", raw, request.state.request_id
    )


@router.post("/v1/scores", openapi_extra=takes(ScoreRequest))
async def score(request: Request) -> Response:
    """Score pictures against prompts."""
    raw = await read_body(request, inference.SCORE_BYTES)
    inference.check_scores(parse(ScoreRequest, raw))
    return await inference.pass_on(request.app.state.serve, "/v1/scores", raw, request.state.request_id)
