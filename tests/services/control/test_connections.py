"""Connections over which nothing comes are closed, and those that are in use are not."""

from __future__ import annotations

import socket
import time

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.control import connections, dependencies
from services.control.app import build_app
from services.settings import Settings
from tests.services.control.conftest import KEY
from tests.services.control.test_streams import listening

HEADERS_S = 0.5
CHUNK_S = 0.5
HEAD = f"POST /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"


class OnHttptools(connections.Limits, HttpToolsProtocol):
    pass


class OnH11(connections.Limits, H11Protocol):
    pass


@pytest.fixture(params=[OnHttptools, OnH11])
def port(request, tmp_path, monkeypatch):
    """The port of a control plane with short limits, on each of uvicorn's protocols."""
    monkeypatch.setattr(connections.Limits, "headers_s", HEADERS_S)
    monkeypatch.setattr(dependencies, "CHUNK_S", CHUNK_S)
    settings = Settings(
        api_key=KEY, storage_uri=str(tmp_path / "store"), database_url=f"sqlite:///{tmp_path}/dde.db"
    )
    with listening(build_app(settings, reconcile=False), http=request.param) as url:
        yield int(url.rpartition(":")[2])


def connect(port: int) -> socket.socket:
    connected = socket.create_connection(("127.0.0.1", port))
    connected.settimeout(10)
    return connected


def seconds_until_closed(connected: socket.socket, drip: bytes = b"") -> tuple[float, bytes]:
    """How long the server keeps the connection, to which a byte is sent now and then, and what it sends."""
    started = time.monotonic()
    received = b""
    connected.settimeout(0.05)
    while time.monotonic() - started < 60:
        try:
            data = connected.recv(65536)
        except TimeoutError:
            if drip:
                connected.sendall(drip)
            continue
        except ConnectionError:
            break
        if not data:
            break
        received += data
    return time.monotonic() - started, received


@pytest.mark.parametrize(
    ("sent", "drip"),
    [("", b""), ("GET ", b"/"), ("GET /healthz HTTP/1.1\r\nHost: x\r\n", b""), (HEAD, b""), (HEAD, b"x")],
)
def test_a_connection_without_complete_headers_is_closed_however_it_drips(port, sent, drip):
    with connect(port) as connected:
        connected.sendall(sent.encode())
        seconds, _ = seconds_until_closed(connected, drip)
    assert HEADERS_S * 0.8 < seconds < HEADERS_S + 30


def test_a_body_that_stops_is_answered_with_408_and_the_connection_is_closed(port):
    with connect(port) as connected:
        connected.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        seconds, received = seconds_until_closed(connected)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in received
    assert seconds < CHUNK_S + 30


def test_a_body_that_no_route_reads_does_not_keep_a_connection(port):
    with connect(port) as connected:
        connected.sendall(b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        seconds, received = seconds_until_closed(connected, b"x")
    assert received.startswith(b"HTTP/1.1 401 ")
    assert seconds < HEADERS_S + 30


def test_a_client_that_does_not_read_its_answer_is_cut_off(port, monkeypatch):
    monkeypatch.setattr(connections.Limits, "stalled_s", 0.5)
    with connect(port) as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        connected.settimeout(0.1)
        assert is_reset(connected, request)


def is_reset(connected: socket.socket, request: bytes) -> bool:
    """Whether the server ends, within minutes, the connection of a client that sends and reads no answer."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            connected.sendall(request)
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def test_requests_that_come_in_pieces_and_one_after_the_other_are_answered(port):
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(port) as connected:
        for _ in range(3):
            for start in range(0, len(request), 9):
                connected.sendall(request[start : start + 9])
                time.sleep(0.02)
            assert connected.recv(65536).startswith(b"HTTP/1.1 200 ")
            time.sleep(HEADERS_S * 0.6)
