"""The HTTP of the stand-in API server: paths, tokens, permissions, watches and faults."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.support.kube.faults import Fault
from tests.support.kube.objects import ApiError, resources
from tests.support.kube.schema import Json, unknown_fields
from tests.support.kube.store import Store
from tests.support.kube.watches import Call, expired, watched

_PATH = re.compile(
    r"^/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+)(?:/(?P<part>status))?)?$"
)
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}
ALL: list[Json] = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]
"""The rules of an administrator."""


@dataclass(frozen=True)
class User:
    """Whom a token stands for. ``rules`` are those of a Role (apiGroups, resources, verbs)."""

    name: str
    rules: Sequence[Json]

    def may(self, verb: str, group: str, resource: str, name: str) -> bool:
        return any(
            _covers(rule["verbs"], verb)
            and _covers(rule["apiGroups"], group)
            and _covers(rule["resources"], resource)
            and (not rule.get("resourceNames") or name in rule["resourceNames"])
            for rule in self.rules
        )


def _covers(allowed: Sequence[str], value: str) -> bool:
    return "*" in allowed or value in allowed


class KubeServer(ThreadingHTTPServer):
    """Serves ``store`` at ``url``. ``tokens`` maps valid bearer tokens to users."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, crds: Path | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = Store(resources(crds))
        self.tokens: dict[str, User] = {"admin": User("kubernetes-admin", ALL)}
        self.faults: list[Fault] = []
        self.counts: Counter[str] = Counter()
        self.closed = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def allow(self, token: str, rules: Sequence[Json] = ALL, user: str = "dde-control") -> None:
        """Make a token valid for the ServiceAccount ``user`` with the rules of a Role."""
        self.tokens[token] = User(f"system:serviceaccount:default:{user}", rules)

    def rotate(self, old: str, new: str) -> None:
        """Replace a token: requests with the old one are answered with 401."""
        self.tokens[new] = self.tokens.pop(old)

    def inject(self, *faults: Fault) -> None:
        """Replace the faults (none: inject nothing) and reset the counts."""
        self.faults = [replace(each) for each in faults]
        self.counts = Counter()

    def kubeconfig(self, path: Path, token: Path | str, namespace: str = "default") -> Path:
        """Write a kubeconfig for this server. ``token`` is one, or the file that it is read from."""
        secret = {"tokenFile": str(token)} if isinstance(token, Path) else {"token": token}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": self.url}}],
            "users": [{"name": "here", "user": secret}],
            "contexts": [
                {"name": "here", "context": {"cluster": "here", "user": "here", "namespace": namespace}}
            ],
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def take_fault(self, method: str, target: str) -> Fault | None:
        """Count this request, and find and count its fault."""
        with self._lock:
            self.counts[method] += 1
            fault = next((each for each in self.faults if each.hits(method, target)), None)
            if fault:
                self.counts[str(fault.code or "closed")] += 1
        return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore closed connections: clients end watches so."""


@contextmanager
def serve_kube(crds: Path | None = None) -> Iterator[KubeServer]:
    """A server on 127.0.0.1. ``crds`` is the folder of KubeRay's CRDs; without it no fields are checked."""
    server = KubeServer(crds)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.closed.set()
        with server.store.changed:
            server.store.changed.notify_all()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: KubeServer

    def answer(self) -> None:
        """Carry the request out and respond, or inject a fault."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.take_fault(self.command, self.path)
        try:
            error = fault.error() if fault else None
            if error:
                raise error
            call = self._call()
            if call.verb == "watch" and (fault is None or fault.carried_out):
                self._watch(call, fault)
                return
            closes = fault is not None
            if fault:
                time.sleep(fault.seconds)
            if not closes or (fault and fault.carried_out):
                code, answer, warnings = self._carry_out(call, body)
            if closes:
                self.close_connection = True
                return
        except ApiError as refused:
            headers = {}
            if "retryAfterSeconds" in refused.details:
                headers["Retry-After"] = str(refused.details["retryAfterSeconds"])
            self._respond(refused.code, refused.status(), headers)
            return
        self._respond(code, answer, {"Warning": "; ".join(warnings)} if warnings else {})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the tests count."""

    def _call(self) -> Call:
        """Parse the request. Raises ApiError for an unknown path, a wrong token or a missing permission."""
        split = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(split.query).items()}
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        user = self.server.tokens.get(token)
        if user is None:
            raise ApiError(401, "Unauthorized", "Unauthorized")
        match = _PATH.match(split.path)
        kind = self.server.store.kinds.get(match["plural"]) if match else None
        if (
            not match
            or not kind
            or kind.api_version != (match["core"] or f"{match['group']}/{match['version']}")
        ):
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        call = Call(
            kind, self._verb(match["name"], query), match["namespace"], match["name"], match["part"], query
        )
        resource = "/".join(filter(None, (kind.plural, call.part)))
        if not user.may(call.verb, kind.group, resource, call.name or ""):
            place = f' in the namespace "{call.namespace}"' if call.namespace else " at the cluster scope"
            subject = f'{kind.full_name} "{call.name}"' if call.name else kind.full_name
            raise ApiError(
                403,
                "Forbidden",
                f'{subject} is forbidden: User "{user.name}" cannot {call.verb} resource "{resource}" '
                f'in API group "{kind.group}"{place}',
                name=call.name or "",
                group=kind.group,
                kind=kind.plural,
            )
        return call

    def _verb(self, name: str | None, query: dict[str, str]) -> str:
        if self.command == "GET":
            is_watch = query.get("watch") in ("true", "True", "1")
            return "get" if name else "watch" if is_watch else "list"
        if self.command == "DELETE":
            return "delete" if name else "deletecollection"
        return _VERBS[self.command]

    def _carry_out(self, call: Call, body: bytes) -> tuple[int, Json, list[str]]:
        """The HTTP status, the answer and its warnings."""
        store = self.server.store
        plural = call.kind.plural
        content = self._json(body)
        if call.verb == "list":
            return 200, self._list(call), []
        if call.namespace is None or call.verb == "deletecollection":
            raise ApiError(405, "MethodNotAllowed", "the server does not allow this method here")
        if call.verb == "create":
            created = store.create(plural, call.namespace, content, strict=call.is_strict)
            return 201, created, self._warnings(call, content)
        assert call.name
        place = (plural, call.namespace, call.name)
        if call.verb == "get":
            return 200, store.get(*place), []
        if call.verb == "delete":
            query: Json = {name: call.query[name] for name in ("propagationPolicy",) if name in call.query}
            if "gracePeriodSeconds" in call.query:
                query["gracePeriodSeconds"] = int(call.query["gracePeriodSeconds"])
            return 200, self._deleted(call, *store.delete(*place, query | content)), []
        if call.verb == "patch" and "merge-patch" not in self.headers.get("Content-Type", ""):
            raise ApiError(
                415, "UnsupportedMediaType", "this server takes application/merge-patch+json alone"
            )
        change = store.patch if call.verb == "patch" else store.replace
        return (
            200,
            change(*place, content, part="status" if call.part else "main", strict=call.is_strict),
            self._warnings(call, content),
        )

    @staticmethod
    def _json(body: bytes) -> Json:
        try:
            content = json.loads(body or b"{}")
        except ValueError as error:
            raise ApiError(400, "BadRequest", f"the object provided is unrecognized: {error}") from error
        if not isinstance(content, dict):
            raise ApiError(400, "BadRequest", "the object provided is unrecognized (must be of type Object)")
        return content

    @staticmethod
    def _warnings(call: Call, content: Json) -> list[str]:
        """Unknown fields, which were dropped, as the default ``fieldValidation=Warn`` reports them."""
        if call.kind.schema is None or call.query.get("fieldValidation") == "Ignore" or call.verb == "patch":
            return []
        return [f'299 - "unknown field \\"{each}\\""' for each in unknown_fields(call.kind.schema, content)]

    @staticmethod
    def _deleted(call: Call, item: Json, is_gone: bool) -> Json:
        if not is_gone or not call.kind.group:
            return item
        details = {"name": call.name, "group": call.kind.group, "kind": call.kind.plural}
        details["uid"] = item["metadata"]["uid"]
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}

    def _list(self, call: Call) -> Json:
        """A list, or a page of it: ``continue`` names the last object of the page before."""
        store = self.server.store
        with store.changed:
            items = store.list(call.kind.plural, call.namespace, call.matches)
            version = store.version
            compacted = store.compacted
        meta: Json = {"resourceVersion": str(version)}
        after = json.loads(call.query["continue"]) if "continue" in call.query else None
        if after:
            if after["version"] < compacted:
                raise expired(after["version"], compacted)
            items = [each for each in items if _place(each) > after["place"]]
        limit = int(call.query.get("limit", 0)) or len(items)
        if limit < len(items):
            place = _place(items[limit - 1])
            meta["continue"] = json.dumps({"version": version, "place": place})
            meta["remainingItemCount"] = len(items) - limit
        kind = f"{call.kind.kind}List"
        return {"apiVersion": call.kind.api_version, "kind": kind, "metadata": meta, "items": items[:limit]}

    def _watch(self, call: Call, fault: Fault | None) -> None:
        """Stream changes until the client goes, ``timeoutSeconds`` are over or a fault closes it."""
        timeout_s = float(call.query.get("timeoutSeconds", 3600))
        ends = time.monotonic() + (fault.seconds if fault else timeout_s)
        self.send_response_only(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in watched(self.server.store, call, ends, self.server.closed):
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        if fault:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _respond(self, code: int, answer: Json, headers: dict[str, str]) -> None:
        content = json.dumps(answer).encode()
        self.send_response_only(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _place(item: Json) -> list[str]:
    return [item["metadata"]["namespace"], item["metadata"]["name"]]
