"""/v1/images/generations and /v1/scores: forwarded to Serve."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from services.api.image_urls import URLS_HEADER
from services.api.images import ImageRequest, ImagesResponse, ScoreRequest
from services.control import image_files, inference, models, scorers
from services.control.dependencies import (
    BODY_BYTES,
    EVENT_STREAM,
    GENERATE,
    Db,
    TimeoutS,
    parse,
    read_body,
    takes,
)

router = APIRouter(tags=["inference"])
IMAGES = "/v1/images/generations"
SCORES = "/v1/scores"
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": ImagesResponse, "content": EVENT_STREAM},
}


@router.post(IMAGES, openapi_extra=takes(ImageRequest), dependencies=[GENERATE], responses=ANSWERS)
async def generate(request: Request, db: Db, timeout_s: TimeoutS = None) -> Response:
    """Generate images with a registered model of the project."""
    parsed, raw = parse(ImageRequest, await read_body(request, BODY_BYTES))
    parsed.check()
    await run_in_threadpool(models.get, db, parsed.model, "model")
    headers = {}
    if parsed.response_format == "url":
        urls = image_files.sign(request.app.state.settings, db.project, str(request.base_url))
        headers[URLS_HEADER] = urls.model_dump_json()
    return inference.forward(request, IMAGES, raw, timeout_s, headers)


@router.post(SCORES, openapi_extra=takes(ScoreRequest), dependencies=[GENERATE])
async def score(request: Request, db: Db, timeout_s: TimeoutS = None) -> Response:
    """Score images against their prompts with scorers of the project."""
    parsed, raw = parse(ScoreRequest, await read_body(request, inference.SCORE_BYTES))
    parsed.check_lengths()
    await run_in_threadpool(scorers.check_names, db, parsed.scorers, "scorers")
    return inference.forward(request, SCORES, raw, timeout_s)
