"""Images by URL: whoever has a URL that the control plane signed can fetch the image until it expires.

The control plane signs before Serve draws, so that Serve needs no secret. What has expired is deleted.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from functools import cache

from sqlalchemy import select

from services.api.image_urls import ImageUrls, set_of
from services.api.requests import DEFAULT_PROJECT
from services.control.database import Database
from services.control.problems import show
from services.control.tables import ApiKey
from services.errors import Forbidden, Gone, NotFound
from services.settings import Settings
from services.stages import layout
from services.storage import files

SWEEP_S = 60.0
MAX_SWEPT = 1000
"""Files of a project that one sweep deletes."""
log = logging.getLogger("dde")


def sign(settings: Settings, project: str, request_url: str) -> ImageUrls:
    """URLs for the images of a request, at ``public_url`` or the address that the request was sent to."""
    set_id = f"img_{secrets.token_hex(16)}"
    expires = int(time.time()) + settings.image_url_s
    return ImageUrls(
        base_url=(settings.public_url or request_url).rstrip("/"),
        project=project,
        set_id=set_id,
        expires=expires,
        signature=_signature(settings, project, set_id, expires),
    )


def read(settings: Settings, file_name: str, project: str, expires: int, signature: str) -> bytes:
    """The image of a URL.

    Raises NotFound for a name that no image has, Forbidden for a URL that was not signed like this, Gone for
    one that has expired.
    """
    set_id = set_of(file_name)
    if set_id is None:
        raise NotFound(f"id: image {show(file_name)} does not exist", param="id", code="image_not_found")
    expected = _signature(settings, project, set_id, expires)
    if not hmac.compare_digest(expected.encode(), signature.encode()):
        message = "signature: is not of this URL; use the URL as it was answered"
        raise Forbidden(message, param="signature", code="invalid_signature")
    if expires <= time.time():
        message = f"expires: the URL has expired; request the image again, got {expires}"
        raise Gone(message, param="expires", code="url_expired")
    try:
        root = layout.project_root(settings.storage_uri, project)
        return files.read_bytes(layout.generated_uri(root, expires, file_name))
    except FileNotFoundError as error:
        message = f"id: image {show(file_name)} does not exist"
        raise NotFound(message, param="id", code="image_not_found") from error


def _signature(settings: Settings, project: str, set_id: str, expires: int) -> str:
    key = _signing_key(settings.api_key.get_secret_value())
    return hmac.new(key, f"{project}\n{set_id}\n{expires}".encode(), hashlib.sha256).hexdigest()


@cache
def _signing_key(api_key: str) -> bytes:
    """Derived from DDE_API_KEY so slowly that a URL is of no use to guess a weak one."""
    return hashlib.scrypt(api_key.encode(), salt=b"dde image urls", n=1 << 14, r=8, p=1, dklen=32)


def sweep(settings: Settings, database: Database) -> int:
    """Delete the images that have expired. Returns how many; at most ``MAX_SWEPT`` of each project."""
    with database.read() as session:
        projects = {DEFAULT_PROJECT, *session.scalars(select(ApiKey.project).distinct())}
    now = time.time()
    deleted = 0
    for project in sorted(projects):
        folder = layout.generated_folder(layout.project_root(settings.storage_uri, project))
        expiries = {name: layout.generated_expiry(name) for name in files.list_files(folder)}
        expired = [name for name, expires in expiries.items() if expires is not None and expires <= now]
        for name in expired[:MAX_SWEPT]:
            files.delete_file(files.join(folder, name))
        deleted += len(expired[:MAX_SWEPT])
    return deleted


def sweep_until(stopping: threading.Event, settings: Settings, database: Database) -> None:
    """``sweep`` every ``SWEEP_S`` seconds, on every replica: to delete a file twice does no harm.

    For a daemon thread: storage that hangs does not delay the end of the process.
    """
    while not stopping.is_set():
        try:
            sweep(settings, database)
        except Exception:
            log.exception("expired images could not be deleted; this is tried again in %g s", SWEEP_S)
        stopping.wait(SWEEP_S)
