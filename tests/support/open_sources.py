"""Rules under which sources may be anywhere, for tests whose files are in temporary folders and buckets."""

from __future__ import annotations

from services.storage.sources import SourceRules

EVERYWHERE = SourceRules(("file:///", "s3://"))
