"""/v1/images/files: images by URL. The signature in the URL takes the place of a key."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from services.api.image_urls import PATH, media_type
from services.api.requests import PROJECT_PATTERN
from services.control import image_files
from services.control.dependencies import STORED, Config
from services.control.reading import reads_storage

router = APIRouter(tags=["inference"])
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}
}


@router.get(f"{PATH}{{file_name}}", response_class=Response, responses=CONTENT, dependencies=[STORED])
@reads_storage
def get_image(
    file_name: str,
    project: Annotated[str, Query(pattern=PROJECT_PATTERN)],
    expires: Annotated[int, Query(ge=0, lt=10**12)],
    signature: str,
    settings: Config,
) -> Response:
    """Fetch an image from the URL in the answer to a request with ``response_format`` "url"."""
    content = image_files.read(settings, file_name, project, expires, signature)
    headers = {
        "cache-control": f"private, max-age={max(0, expires - int(time.time()))}",
        "x-content-type-options": "nosniff",
    }
    return Response(content, media_type=media_type(file_name), headers=headers)
