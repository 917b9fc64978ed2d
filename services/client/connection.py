"""Which system the command talks to: DDE_URL and DDE_API_KEY, else the system of `dde up`."""

from __future__ import annotations

from services.client.api import Client
from services.settings import ClientSettings


def connect() -> Client:
    """A client of the configured system. Raises BadRequest if no key is found."""
    settings = ClientSettings()
    return Client(settings.base_url, settings.key)
