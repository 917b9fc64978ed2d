"""Requests to the stand-in API server, and the events of a watch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.kube.objects import ApiError, Resource
from tests.support.kube.schema import Json
from tests.support.kube.selectors import Matches, selected
from tests.support.kube.store import Change, Store


@dataclass(frozen=True)
class Call:
    """A request, parsed."""

    kind: Resource
    verb: str
    namespace: str | None
    name: str | None
    part: str | None
    query: dict[str, str]

    @property
    def is_strict(self) -> bool:
        return self.query.get("fieldValidation") == "Strict"

    @property
    def matches(self) -> Matches:
        labels = self.query.get("labelSelector", "")
        return selected(self.kind, labels, self.query.get("fieldSelector", ""))


def watched(store: Store, call: Call, ends: float, closed: threading.Event) -> Iterator[Json]:
    """The events of a watch until the time ``ends`` (of ``time.monotonic``) or until the server is closed."""
    matches = call.matches
    requested = call.query.get("resourceVersion", "")
    with store.changed:
        seen = int(requested) if requested not in ("", "0") else store.version
        first = [] if requested not in ("", "0") else store.list(call.kind.plural, call.namespace, matches)
        too_old = seen < store.compacted
        compacted = store.compacted
    if too_old:
        yield {"type": "ERROR", "object": expired(seen, compacted).status()}
        return
    yield from ({"type": "ADDED", "object": item} for item in first)
    while not closed.is_set():
        with store.changed:
            if seen < store.compacted:
                yield {"type": "ERROR", "object": expired(seen, store.compacted).status()}
                return
            left = ends - time.monotonic()
            changes = [each for each in store.history if each.version > seen]
            if not changes and left > 0:
                store.changed.wait(min(left, 1.0))
            seen = max([seen, *(each.version for each in changes)])
        for change in changes:
            event = _event(change, call, matches)
            if event:
                yield event
        if left <= 0:
            break
    if call.query.get("allowWatchBookmarks") in ("true", "True"):
        meta = {"resourceVersion": str(seen)}
        bookmark = {"apiVersion": call.kind.api_version, "kind": call.kind.kind, "metadata": meta}
        yield {"type": "BOOKMARK", "object": bookmark}


def _event(change: Change, call: Call, matches: Matches) -> Json | None:
    """The event of a change for a watch: what begins to match its selectors is ADDED, what ceases DELETED."""
    meta = change.new["metadata"]
    if change.plural != call.kind.plural or call.namespace not in (None, meta["namespace"]):
        return None
    was = change.old is not None and matches(change.old)
    matches_now = change.type != "DELETED" and matches(change.new)
    if not was and not matches_now:
        return None
    type = "MODIFIED" if was and matches_now else "ADDED" if matches_now else "DELETED"
    return {"type": type, "object": change.new}


def expired(version: int, oldest: int) -> ApiError:
    return ApiError(410, "Expired", f"too old resource version: {version} ({oldest})")
