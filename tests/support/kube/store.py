"""The objects of the stand-in API server, with versions, history, finalizers and garbage collection."""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.support.kube.objects import (
    ApiError,
    Resource,
    conflict,
    details_of,
    invalid,
    merge,
    metadata_causes,
    not_found,
    now,
    random_suffix,
    without,
)
from tests.support.kube.schema import Cause, Json, pruned, unknown_fields, violations, with_defaults

Key = tuple[str, str, str]
"""Plural, namespace and name."""
_FIXED = (
    *("name", "namespace", "uid", "creationTimestamp", "generation", "resourceVersion"),
    *("deletionTimestamp", "deletionGracePeriodSeconds"),
)
"""Metadata that a change of an object does not reach."""
FOREGROUND = "foregroundDeletion"
ORPHAN = "orphan"


@dataclass(frozen=True)
class Change:
    """An entry of the history. ``old`` is None for ADDED, ``new`` is the last state for DELETED."""

    version: int
    plural: str
    type: Literal["ADDED", "MODIFIED", "DELETED"]
    old: Json | None
    new: Json


@dataclass
class Store:
    """All objects. Every method is atomic and raises ApiError as the server answers.

    ``quotas`` maps ``rayjobs.ray.io`` and such to the most objects in a namespace. ``holds_garbage``: owned
    objects stay although their owner is deleted, as while the controller manager is down.
    """

    kinds: dict[str, Resource]
    namespaces: set[str] = field(default_factory=lambda: {"default"})
    quotas: dict[str, int] = field(default_factory=dict)
    holds_garbage: bool = False
    version: int = 1
    compacted: int = 0
    """Watches that start before this version are too old."""

    def __post_init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.history: list[Change] = []
        self._objects: dict[Key, Json] = {}

    def create(self, plural: str, namespace: str, body: Json, *, strict: bool = False) -> Json:
        """Create the object of a request. ``strict``: refuse unknown fields instead of dropping them."""
        kind = self.kinds[plural]
        with self.changed:
            if namespace not in self.namespaces:
                raise not_found("namespaces", namespace)
            new = self._accepted(kind, namespace, body, strict)
            meta = new["metadata"]
            if not meta.get("name") and meta.get("generateName"):
                meta["name"] = meta["generateName"] + random_suffix()
            if kind.group:
                new.pop("status", None)
            self._check(kind, new)
            key = (plural, namespace, meta["name"])
            if key in self._objects:
                raise ApiError(
                    409,
                    "AlreadyExists",
                    f'{kind.full_name} "{meta["name"]}" already exists',
                    **details_of(kind, meta["name"]),
                )
            self._check_quota(kind, namespace, meta["name"])
            meta |= {
                "namespace": namespace,
                "uid": str(uuid.uuid4()),
                "creationTimestamp": now(),
                "generation": 1,
            }
            for each in ("deletionTimestamp", "deletionGracePeriodSeconds"):
                meta.pop(each, None)
            self._put(key, new)
            return copy.deepcopy(self._objects[key])

    def get(self, plural: str, namespace: str, name: str) -> Json:
        with self.changed:
            return copy.deepcopy(self._stored(plural, namespace, name))

    def find(self, plural: str, namespace: str, name: str) -> Json | None:
        """The object, or None."""
        with suppress(ApiError):
            return self.get(plural, namespace, name)
        return None

    def list(self, plural: str, namespace: str | None, matches: Callable[[Json], bool]) -> list[Json]:
        """The objects of a namespace (None: of all) that match, by namespace and name."""
        with self.changed:
            found = [
                item
                for (kind, space, _), item in sorted(self._objects.items(), key=lambda each: each[0])
                if kind == plural and namespace in (None, space) and matches(item)
            ]
            return copy.deepcopy(found)

    def replace(
        self,
        plural: str,
        namespace: str,
        name: str,
        body: Json,
        *,
        part: Literal["main", "status"] = "main",
        strict: bool = False,
    ) -> Json:
        """Replace all but the status, or the status alone. Raises a conflict for another version."""
        kind = self.kinds[plural]
        with self.changed:
            old = self._stored(plural, namespace, name)
            version = (body.get("metadata") or {}).get("resourceVersion")
            if kind.group and not version:
                raise invalid(
                    kind,
                    name,
                    [
                        Cause(
                            "metadata.resourceVersion",
                            "FieldValueInvalid",
                            "Invalid value: 0: must be specified for an update",
                        )
                    ],
                )
            if version and version != old["metadata"]["resourceVersion"]:
                raise conflict(kind, name)
            return self._update(kind, (plural, namespace, name), old, body, part, strict)

    def patch(
        self,
        plural: str,
        namespace: str,
        name: str,
        patch: Json,
        *,
        part: Literal["main", "status"] = "main",
        strict: bool = False,
    ) -> Json:
        """Apply a JSON merge patch. Raises a conflict if it names another version."""
        kind = self.kinds[plural]
        with self.changed:
            old = self._stored(plural, namespace, name)
            merged = merge(copy.deepcopy(old), patch)
            if merged["metadata"].get("resourceVersion") != old["metadata"]["resourceVersion"]:
                raise conflict(kind, name)
            return self._update(kind, (plural, namespace, name), old, merged, part, strict)

    def delete(
        self, plural: str, namespace: str, name: str, options: Json | None = None
    ) -> tuple[Json, bool]:
        """Delete, or mark as being deleted what has finalizers or a container to stop.

        ``options`` are DeleteOptions. Returns the object and whether it is gone.
        """
        options = options or {}
        kind = self.kinds[plural]
        with self.changed:
            old = self._stored(plural, namespace, name)
            required = options.get("preconditions") or {}
            for each in ("uid", "resourceVersion"):
                if required.get(each) not in (None, old["metadata"][each]):
                    raise ApiError(
                        409,
                        "Conflict",
                        f"Precondition failed: {each} in precondition: {required[each]}, "
                        f"{each} in object meta: {old['metadata'][each]}",
                        **details_of(kind, name),
                    )
            grace = self._grace_s(old, options)
            marked = copy.deepcopy(old)
            meta = marked["metadata"]
            finalizers = list(meta.get("finalizers", []))
            wanted = {"Foreground": FOREGROUND, "Orphan": ORPHAN}.get(options.get("propagationPolicy", ""))
            if wanted and wanted not in finalizers:
                finalizers.append(wanted)
            if finalizers:
                meta["finalizers"] = finalizers
            if not finalizers and grace == 0:
                self._remove((plural, namespace, name), old)
                return old, True
            if "deletionTimestamp" not in meta:
                meta |= {"deletionTimestamp": now(), "generation": meta["generation"] + 1}
            meta["deletionGracePeriodSeconds"] = grace
            self._put((plural, namespace, name), marked)
            self._collect()
            left = self._objects.get((plural, namespace, name))
            return copy.deepcopy(left or marked), left is None

    def compact(self) -> None:
        """Forget the history: a watch that starts before now is answered with 410."""
        with self.changed:
            self.compacted = self.version
            self.history.clear()

    def collect(self) -> None:
        """Collect garbage now; see ``holds_garbage``."""
        with self.changed:
            self._collect()

    def _stored(self, plural: str, namespace: str, name: str) -> Json:
        try:
            return self._objects[plural, namespace, name]
        except KeyError:
            raise not_found(
                self.kinds[plural].full_name, name, **details_of(self.kinds[plural], name)
            ) from None

    def _accepted(self, kind: Resource, namespace: str, body: Json, strict: bool) -> Json:
        """The body of a request, without unknown fields and with defaults."""
        if not isinstance(body, dict) or not isinstance(body.get("metadata"), dict):
            raise ApiError(400, "BadRequest", "the object provided is unrecognized (must be of type Object)")
        for name, value in (("apiVersion", kind.api_version), ("kind", kind.kind)):
            given = body.get(name, value if not kind.group else None)
            if given != value:
                raise ApiError(
                    400,
                    "BadRequest",
                    f"the {name} in the data ({given}) does not match the expected {name} ({value})",
                )
        if body["metadata"].get("namespace") not in (None, "", namespace):
            raise ApiError(
                400,
                "BadRequest",
                "the namespace of the provided object does not match the namespace sent on the request",
            )
        new = copy.deepcopy(body) | {"apiVersion": kind.api_version, "kind": kind.kind}
        if kind.schema is None:
            return new
        unknown = unknown_fields(kind.schema, new)
        if unknown and strict:
            listed = ", ".join(f'unknown field "{each}"' for each in unknown)
            raise ApiError(
                400,
                "BadRequest",
                f'{kind.kind} in version "{kind.version}" cannot be handled as a {kind.kind}: '
                f"strict decoding error: {listed}",
            )
        accepted: Json = with_defaults(kind.schema, pruned(kind.schema, new))
        return accepted

    def _check(self, kind: Resource, new: Json, old: Json | None = None) -> None:
        """Raise Invalid for metadata, fields or rules that are violated."""
        causes = metadata_causes(new["metadata"])
        if kind.schema:
            causes += violations(kind.schema, new, old)
        if causes:
            raise invalid(kind, new["metadata"].get("name", ""), causes)

    def _check_quota(self, kind: Resource, namespace: str, name: str) -> None:
        used = sum(plural == kind.plural and space == namespace for plural, space, _ in self._objects)
        limit = self.quotas.get(kind.full_name)
        if limit is not None and used >= limit:
            count = f"count/{kind.full_name}"
            raise ApiError(
                403,
                "Forbidden",
                f'{kind.full_name} "{name}" is forbidden: exceeded quota: quota, requested: {count}=1, '
                f"used: {count}={used}, limited: {count}={limit}",
                **details_of(kind, name),
            )

    def _update(self, kind: Resource, key: Key, old: Json, body: Json, part: str, strict: bool) -> Json:
        """Store the part of the body that the request may change."""
        new = self._accepted(kind, key[1], body, strict)
        meta = {name: value for name, value in new["metadata"].items() if name not in _FIXED}
        meta |= {name: old["metadata"][name] for name in _FIXED if name in old["metadata"]}
        if part == "status":
            new = copy.deepcopy(old) | {"status": new.get("status", {})}
        else:
            new["metadata"] = meta
            if kind.has_status:
                new.pop("status", None)
            if kind.has_status and "status" in old:
                new["status"] = copy.deepcopy(old["status"])
        self._check(kind, new, old)
        if without(new, "metadata", "status") != without(old, "metadata", "status"):
            new["metadata"]["generation"] = old["metadata"]["generation"] + 1
        if new == old:
            return copy.deepcopy(old)
        if "deletionTimestamp" in new["metadata"] and self._may_go(new):
            self._remove(key, new)
            return new
        self._put(key, new)
        return copy.deepcopy(self._objects[key])

    @staticmethod
    def _may_go(item: Json) -> bool:
        meta = item["metadata"]
        return not meta.get("finalizers") and not meta.get("deletionGracePeriodSeconds")

    @staticmethod
    def _grace_s(item: Json, options: Json) -> int:
        """How long containers may take to stop. 0 for what has none, such as a pod without a node."""
        if item["kind"] != "Pod" or not (item.get("spec") or {}).get("nodeName"):
            return 0
        if (item.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            return 0
        own = item["spec"].get("terminationGracePeriodSeconds", 30)
        return int(options.get("gracePeriodSeconds", own))

    def _put(self, key: Key, new: Json) -> None:
        old = self._objects.get(key)
        self.version += 1
        new["metadata"]["resourceVersion"] = str(self.version)
        self._objects[key] = new
        self._record("MODIFIED" if old else "ADDED", key, old, new)

    def _remove(self, key: Key, last: Json) -> None:
        old = self._objects.pop(key)
        self.version += 1
        last = copy.deepcopy(last)
        last["metadata"]["resourceVersion"] = str(self.version)
        self._record("DELETED", key, old, last)
        self._collect()

    def _record(self, type: Literal["ADDED", "MODIFIED", "DELETED"], key: Key, old: Any, new: Json) -> None:
        self.history.append(Change(self.version, key[0], type, copy.deepcopy(old), copy.deepcopy(new)))
        self.changed.notify_all()

    def _collect(self) -> None:
        """One round of the garbage collector, and more as long as one deletes something."""
        if self.holds_garbage:
            return
        for key, item in list(self._objects.items()):
            if self._objects.get(key) is not item:
                continue
            meta = item["metadata"]
            owners = meta.get("ownerReferences", [])
            alive = [each for each in owners if self._is_there(each["uid"])]
            if owners and not alive and "deletionTimestamp" not in meta:
                self.delete(*key, {"propagationPolicy": "Background"})
            elif any(each.get("blockOwnerDeletion") for each in alive) and "deletionTimestamp" not in meta:
                if any(self._goes_last(each["uid"]) for each in alive):
                    owns_more = next(self._blocking(meta["uid"]), None)
                    self.delete(*key, {"propagationPolicy": "Foreground" if owns_more else "Background"})
            elif FOREGROUND in meta.get("finalizers", []) and not list(self._blocking(meta["uid"])):
                self._drop_finalizer(key, item, FOREGROUND)
            elif ORPHAN in meta.get("finalizers", []):
                self._release(meta["uid"])
                self._drop_finalizer(key, item, ORPHAN)

    def _drop_finalizer(self, key: Key, item: Json, finalizer: str) -> None:
        new = copy.deepcopy(item)
        new["metadata"]["finalizers"].remove(finalizer)
        if self._may_go(new):
            self._remove(key, new)
        else:
            self._put(key, new)

    def _is_there(self, uid: str) -> bool:
        return any(item["metadata"]["uid"] == uid for item in self._objects.values())

    def _goes_last(self, uid: str) -> bool:
        """Whether the owner is deleted in the foreground: after what it owns."""
        owner = next(each for each in self._objects.values() if each["metadata"]["uid"] == uid)
        meta = owner["metadata"]
        return "deletionTimestamp" in meta and FOREGROUND in meta.get("finalizers", [])

    def _blocking(self, uid: str) -> Iterator[Key]:
        for key, item in self._objects.items():
            for each in item["metadata"].get("ownerReferences", []):
                if each["uid"] == uid and each.get("blockOwnerDeletion"):
                    yield key

    def _release(self, uid: str) -> None:
        """Remove the references to an owner that is deleted alone."""
        for key, item in list(self._objects.items()):
            owners = item["metadata"].get("ownerReferences", [])
            kept = [each for each in owners if each["uid"] != uid]
            if len(kept) < len(owners):
                new = copy.deepcopy(item)
                new["metadata"]["ownerReferences"] = kept
                self._put(key, new)
