"""/v1/images/generations and /v1/scores: forwarded to Serve."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from services.api.images import ImageRequest, ScoreRequest
from services.control import inference, models, scorers
from services.control.dependencies import BODY_BYTES, GENERATE, Db, TimeoutS, parse, read_body, takes

router = APIRouter(tags=["inference"])
IMAGES = "/v1/images/generations"
SCORES = "/v1/scores"


@router.post(IMAGES, openapi_extra=takes(ImageRequest), dependencies=[GENERATE])
async def generate(request: Request, db: Db, timeout_s: TimeoutS = None) -> Response:
    """Generate images with a registered model of the project."""
    parsed, raw = parse(ImageRequest, await read_body(request, BODY_BYTES))
    inference.check_image(parsed)
    await run_in_threadpool(models.get, db, parsed.model, "model")
    return inference.forward(request, IMAGES, raw, timeout_s)


@router.post(SCORES, openapi_extra=takes(ScoreRequest), dependencies=[GENERATE])
async def score(request: Request, db: Db, timeout_s: TimeoutS = None) -> Response:
    """Score images against their prompts with scorers of the project."""
    parsed, raw = parse(ScoreRequest, await read_body(request, inference.SCORE_BYTES))
    parsed.check_lengths()
    await run_in_threadpool(scorers.check_names, db, parsed.scorers, "scorers")
    return inference.forward(request, SCORES, raw, timeout_s)
