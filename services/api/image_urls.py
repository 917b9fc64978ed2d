"""Where the images of a request can be fetched: signed by the control plane, filled in by Serve.

The control plane sends an ``ImageUrls`` with a request for URLs. Serve stores the files under their names and
answers with their URLs, so it needs no secret.
"""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import quote, urlencode

from pydantic import Field

from services.api.images import OutputFormat
from services.api.requests import Project, Strict

URLS_HEADER = "x-dde-image-urls"
"""Holds an ``ImageUrls`` as JSON. The control plane sets it; callers cannot."""
PATH = "/v1/images/files/"
SET_PATTERN = r"img_[0-9a-f]{32}"
FILE = re.compile(rf"({SET_PATTERN})-(\d{{1,3}})\.(png|jpeg|webp)")
MEDIA_TYPES: dict[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class ImageUrls(Strict):
    """The images of one request: ``set_id`` begins the names of their files.

    ``signature`` is of project, set and ``expires`` (Unix time in seconds). ``base_url`` is the control
    plane's address, without a slash at its end.
    """

    base_url: str
    project: Project
    set_id: Annotated[str, Field(pattern=f"^{SET_PATTERN}$")]
    expires: int
    signature: str

    def file_name(self, index: int, output_format: OutputFormat) -> str:
        """The name of image ``index``."""
        return f"{self.set_id}-{index}.{output_format}"

    def url(self, file_name: str) -> str:
        """Where the file can be fetched until ``expires``."""
        query = {"project": self.project, "expires": self.expires, "signature": self.signature}
        return f"{self.base_url}{PATH}{quote(file_name)}?{urlencode(query)}"


def set_of(file_name: str) -> str | None:
    """The set that a file belongs to; None for a name that no image has."""
    match = FILE.fullmatch(file_name)
    return match[1] if match else None


def media_type(file_name: str) -> str:
    """The media type of an image, from its name."""
    return MEDIA_TYPES[file_name.rpartition(".")[2]]
