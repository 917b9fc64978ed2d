"""A real S3 server (moto's) as a process on 127.0.0.1, and in front of it a proxy that does harm to chosen requests.

with s3(folder) as server:
    server.harm(Harm("slow_down", every(3)))
    ... s3://bucket/... with server.env in the environment ...
    assert server.done["slow_down"] > 0
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
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"

EXPIRED = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"

Kind = Literal["slow_down", "expired", "delay", "refuse_upload", "cut_upload", "lose_answer", "cut_download"]
"""What happens: 503; 400, as while credentials are renewed; a pause of ``seconds`` before the body is read; the connection is
closed after a part of the upload, of which nothing is passed on; the server gets a part of the upload and then a closed
connection; the request is done and its answer is lost; the connection is closed after a part of the answer's body, whose length
was announced whole."""

CLOSING = ("refuse_upload", "cut_upload", "lose_answer", "cut_download")

Choice = Callable[[int], bool]
"""Is the n-th (0, 1, ...) of the requests that match harmed?"""


def first(number: int) -> Choice:
    return lambda n: n < number


def every(nth: int) -> Choice:
    return lambda n: n % nth == 0


def part(fraction: float, seed: int) -> Choice:
    """A fraction of them, drawn."""
    return lambda n: random.Random(f"{seed} {n}").random() < fraction


def always(n: int) -> bool:
    return True


@dataclass
class Harm:
    """``kind`` is done to the requests of ``method`` (any, where it is empty) with ``target`` in their path and query."""

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
    """Passes requests on to ``upstream``, with the harm that is set at the time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.harms, self.done = upstream, list[Harm](), Counter[str]()
        self._lock = threading.Lock()

    def hit(self, method: str, target: str) -> Harm | None:
        """The harm for this request, and count it."""
        with self._lock:
            self.done[method] += 1
            harm = next((each for each in self.harms if each.hits(method, target)), None)
            self.done.update([harm.kind] if harm else [])
        return harm

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed close their connections; that is no error of the proxy."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def pass_on(self) -> None:
        """Ask upstream and answer, or do harm."""
        harm = self.server.hit(self.command, self.path)
        kind, at = (harm.kind, harm.at) if harm else (None, 1.0)
        time.sleep(harm.seconds if harm else 0.0)
        body = self._read(at if kind == "refuse_upload" else 1.0)
        if kind == "cut_upload":
            self._send_part(body, at)
        elif kind == "slow_down":
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
        elif kind == "expired":
            self._answer(400, {"Content-Type": "application/xml"}, EXPIRED)
        elif kind != "refuse_upload":
            status, headers, answer = self._ask(body)
            if kind != "lose_answer":
                self._answer(status, headers, answer, at if kind == "cut_download" else 1.0)
        self.close_connection = self.close_connection or kind in CLOSING

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def _read(self, at: float) -> bytes:
        """The body or its first part; of chunked ones (pyarrow's uploads) the first chunks."""
        if "Content-Length" in self.headers:
            length = int(int(self.headers["Content-Length"]) * at)
            if len(body := self.rfile.read(length)) < length:
                raise ConnectionError("the client ended in the middle of its upload")
            return body
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0 or at < 1.0:
                break
        return body

    def _ask(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body, self._passed(len(body)))
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def _passed(self, length: int) -> dict[str, str]:
        own = ("connection", "expect", "transfer-encoding", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in own}
        return headers | {"content-length": str(length)}

    def _send_part(self, body: bytes, at: float) -> None:
        headers = [f"{name}: {value}" for name, value in self._passed(len(body)).items()]
        head = "\r\n".join([f"{self.command} {self.path} HTTP/1.1", *headers, "", ""])
        with socket.create_connection(("127.0.0.1", self.server.upstream)) as connection:
            connection.sendall(head.encode("latin-1") + body[: int(len(body) * at)])

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, at: float = 1.0) -> None:
        """A part of the body, with the length of the whole."""
        own = {} if self.command == "HEAD" else {"content-length": str(len(body))}
        left_out = {"connection", "transfer-encoding", *own}
        passed = {name: value for name, value in headers.items() if name.lower() not in left_out}
        self.send_response_only(status)
        for name, value in {**passed, **own}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: int(len(body) * at)])


@dataclass(frozen=True)
class S3Server:
    """``endpoint`` is the proxy's; ``env`` is what SDKs in this and other processes need."""

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
    def done(self) -> Counter[str]:
        """Requests by method, and harm by kind, since the last ``harm``."""
        return self.proxy.done

    def harm(self, *harms: Harm) -> None:
        """Do this from now on, and count anew; nothing: do no harm."""
        self.proxy.harms, self.proxy.done = [replace(each) for each in harms], Counter()

    def direct(self) -> Any:
        """A client of the server itself, past the proxy, to see what really lies there."""
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.proxy.upstream}",
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )


@contextmanager
def serve_s3(folder: Path, bucket: str = BUCKET) -> Iterator[S3Server]:
    """A server with one empty bucket, which this process and those that it starts use for as long as the block runs."""
    (port,) = free_ports(1)
    with ExitStack() as undo:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = Child("s3", command, folder / "s3.log", os.environ)
        undo.callback(server.stop, 5.0)
        wait_until(lambda: not port_is_free(port), "the S3 server does not listen", [server], 30.0)
        proxy = Proxy(port)
        undo.callback(proxy.server_close)
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        undo.callback(proxy.shutdown)
        running = S3Server(proxy)
        running.direct().create_bucket(Bucket=bucket)
        undo.enter_context(_used(running.env))
        yield running


@contextmanager
def _used(env: Mapping[str, str]) -> Iterator[None]:
    """With these variables, and clients that were made with them."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            _forget_clients()
            yield
    finally:
        _forget_clients()


def _forget_clients() -> None:
    s3.client.cache_clear()
    s3.filesystem.cache_clear()
