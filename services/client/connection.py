"""The system that the environment names."""

from __future__ import annotations

from services.client.api import Client
from services.settings import ClientSettings


def connect() -> Client:
    """A client of the system that the environment names."""
    settings = ClientSettings()
    return Client(settings.base_url, settings.key)
