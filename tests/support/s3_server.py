"""A real S3 server (moto's) on 127.0.0.1, behind a proxy that injects faults into chosen requests.

with serve_s3(folder) as server:
    server.inject(Fault("slow_down", every(3)))
    ... use s3://bucket/... with server.env in the environment ...
    assert server.counts["slow_down"] > 0
"""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any, Literal

import boto3
import pytest

from services.client.processes import Child, free_ports, port_is_free, wait_until
from services.storage import s3

BUCKET = "bucket"
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code>"
    b"<Message>Please reduce your request rate.</Message></Error>"
)
EXPIRED = (
    b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code>"
    b"<Message>The provided token has expired.</Message></Error>"
)
XML = {"Content-Type": "application/xml"}

Kind = Literal[
    "slow_down", "expired", "delay", "refuse_upload", "cut_upload", "lose_response", "cut_download"
]
"""What happens to the request:

slow_down      status 503
expired        status 400, as while credentials are renewed
delay          a pause of ``seconds`` before the body is read
refuse_upload  the connection closes after part of the upload; the server receives nothing
cut_upload     the server receives part of the upload, then the connection closes
lose_response  the server executes the request; the connection closes before the response
cut_download   the response announces its whole length; the connection closes after part of its body
"""

CLOSING = ("refuse_upload", "cut_upload", "lose_response", "cut_download")
"""Kinds that close the connection."""

Choice = Callable[[int], bool]
"""Takes the number (0, 1, ...) of a matching request; returns whether the fault hits it."""


def first(number: int) -> Choice:
    return lambda n: n < number


def every(nth: int) -> Choice:
    return lambda n: n % nth == 0


def random_fraction(fraction: float, seed: int) -> Choice:
    return lambda n: random.Random(f"{seed} {n}").random() < fraction


def always(n: int) -> bool:
    return True


@dataclass
class Fault:
    """Hits the ``chosen`` requests of ``method`` (empty: any) whose path and query contain ``target``.

    ``at`` is the fraction of the body that is passed on before the connection closes.
    """

    kind: Kind
    chosen: Choice = always
    method: str = ""
    target: str = ""
    at: float = 0.5
    seconds: float = 0.0
    seen: Iterator[int] = field(default_factory=count, init=False)

    def hits(self, method: str, target: str) -> bool:
        matches = self.method in ("", method) and self.target in target
        return matches and self.chosen(next(self.seen))


class Proxy(ThreadingHTTPServer):
    """Forwards requests to the port ``upstream``; the first of ``faults`` that hits a request is injected."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.counts: Counter[str] = Counter()
        self.refused_keys: set[str] = set()
        self._lock = threading.Lock()

    def take_fault(self, method: str, target: str) -> Fault | None:
        """Count this request, and find and count its fault."""
        with self._lock:
            self.counts[method] += 1
            fault = next((each for each in self.faults if each.hits(method, target)), None)
            if fault:
                self.counts[fault.kind] += 1
        return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore closed connections: tests kill clients."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def forward(self) -> None:
        """Send the request upstream and respond, or inject a fault."""
        fault = self.server.take_fault(self.command, self.path)
        if self._key() in self.server.refused_keys:
            fault = Fault("expired")
        kind = fault.kind if fault else None
        at = fault.at if fault else 1.0
        time.sleep(fault.seconds if fault else 0.0)
        body = self._read(at if kind == "refuse_upload" else 1.0)
        if kind == "cut_upload":
            self._send_part(body, at)
        elif kind == "slow_down":
            self._respond(503, XML, SLOW_DOWN)
        elif kind == "expired":
            self._respond(400, XML, EXPIRED)
        elif kind != "refuse_upload":
            status, headers, response = self._request(body)
            if kind != "lose_response":
                self._respond(status, headers, response, at if kind == "cut_download" else 1.0)
        self.close_connection = self.close_connection or kind in CLOSING

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def _key(self) -> str:
        """The access key that signed the request."""
        return self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]

    def _read(self, at: float) -> bytes:
        """The first ``at`` of the body. Of a chunked body (pyarrow's), the first chunk if ``at`` < 1."""
        if "Content-Length" in self.headers:
            length = int(int(self.headers["Content-Length"]) * at)
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionError(f"the client closed its upload after {len(body)} of {length} bytes")
            return body
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0 or at < 1.0:
                break
        return body

    def _request(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the server's response."""
        connection = HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body, self._forwarded_headers(len(body)))
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def _forwarded_headers(self, length: int) -> dict[str, str]:
        own = ("connection", "expect", "transfer-encoding", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in own}
        return headers | {"content-length": str(length)}

    def _send_part(self, body: bytes, at: float) -> None:
        headers = [f"{name}: {value}" for name, value in self._forwarded_headers(len(body)).items()]
        head = "\r\n".join([f"{self.command} {self.path} HTTP/1.1", *headers, "", ""])
        with socket.create_connection(("127.0.0.1", self.server.upstream)) as connection:
            connection.sendall(head.encode("latin-1") + body[: int(len(body) * at)])

    def _respond(self, status: int, headers: Mapping[str, str], body: bytes, at: float = 1.0) -> None:
        """Send the first ``at`` of the body and announce the length of the whole."""
        own = {} if self.command == "HEAD" else {"content-length": str(len(body))}
        dropped = {"connection", "transfer-encoding", *own}
        forwarded = {name: value for name, value in headers.items() if name.lower() not in dropped}
        self.send_response_only(status)
        for name, value in {**forwarded, **own}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: int(len(body) * at)])


@dataclass(frozen=True)
class S3Server:
    """``endpoint`` is the proxy's; ``env`` holds the variables that S3 clients need."""

    proxy: Proxy

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.proxy.server_port}"

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    @property
    def counts(self) -> Counter[str]:
        """Requests by method and faults by kind, since the last ``inject``."""
        return self.proxy.counts

    def inject(self, *faults: Fault) -> None:
        """Replace the faults (none: inject nothing) and reset the counts."""
        self.proxy.faults = [replace(each) for each in faults]
        self.proxy.counts = Counter()

    def direct(self) -> Any:
        """A client that bypasses the proxy, to see what is really stored."""
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.proxy.upstream}",
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )


@contextmanager
def serve_s3(folder: Path, bucket: str = BUCKET) -> Iterator[S3Server]:
    """A server with one empty bucket. In the block, this process and those it starts use it for ``s3://``."""
    (port,) = free_ports(1)
    with ExitStack() as undo:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = Child("s3", command, folder / "s3.log", os.environ)
        undo.callback(server.stop, 5.0)
        wait_until(lambda: not port_is_free(port), "the S3 server does not listen", [server], 120.0)
        proxy = Proxy(port)
        undo.callback(proxy.server_close)
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        undo.callback(proxy.shutdown)
        running = S3Server(proxy)
        running.direct().create_bucket(Bucket=bucket)
        undo.enter_context(_environment(running.env))
        yield running


@contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """Set these variables, and drop cached clients that were made with others."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            s3.forget_clients()
            yield
    finally:
        s3.forget_clients()
