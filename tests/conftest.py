"""Shared fixtures: one system a session (real Ray, Serve, control plane on 127.0.0.1), one S3 server.

In this process the types of every call to dde_core are checked, and the shapes where a module names any. The
hooks must be in place before dde_core is imported.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from tests.support.typechecker import check_calls

check_calls("dde_core")

# ruff: noqa: E402
from services.client.api import Client
from services.client.local import LocalSystem
from services.storage import s3, sources
from tests.support.open_sources import EVERYWHERE
from tests.support.pairs_file import pair_rows, write_pairs
from tests.support.s3_server import BUCKET, S3Server, serve_s3

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_metrics_report_interval_ms="1000",
    DDE_ALLOWED_SOURCES=json.dumps(EVERYWHERE.allowed),
)
sources.hold_to(EVERYWHERE)


@pytest.fixture(autouse=True)
def open_sources() -> Iterator[None]:
    """Let this process read sources anywhere, whatever an earlier test held it to.

    A test that leaves the rules of a request behind fails: later ones would be held to them.
    """
    sources.hold_to(EVERYWHERE)
    yield
    left = sources._request_rules.get()
    sources._request_rules.set(None)
    assert left is None


class FileByFile(LoadFileScheduling):
    """A file runs in one process, and all files of tests/e2e in the same one, for they share a system."""

    def _split_scope(self, nodeid: str) -> str:
        path = super()._split_scope(nodeid)
        return "tests/e2e" if path.startswith("tests/e2e/") else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileByFile:
    return FileByFile(config, log)


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    """Starts once for the session. Tests leave it usable for the next one."""
    with LocalSystem(tmp_path_factory.mktemp("system"), fresh=True, allow=EVERYWHERE.allowed) as running:
        yield running


@pytest.fixture(scope="session")
def client(system: LocalSystem) -> Iterator[Client]:
    with system.client() as connected:
        yield connected


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """``s3://bucket`` on 127.0.0.1, for this process and those it starts. ``inject`` makes requests fail."""
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[str]:
    """A prefix of its own in the S3 server for one test, without faults before and after it.

    The test gets a client of its own: boto3's allows fewer retries after many failures, those of earlier
    tests too.
    """
    s3.forget_clients()
    s3_server.inject()
    yield f"s3://{BUCKET}/{uuid.uuid4().hex}"
    s3_server.inject()


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows of rendered scenes: 180 decided, 20 ties. One decided row has a broken image."""
    rows = pair_rows(200)
    rows[3]["jpg_0"] = b"not an image"
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", rows)
