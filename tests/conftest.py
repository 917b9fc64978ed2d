"""One system for the whole session: real Ray, real Serve, a real control plane, on free ports of 127.0.0.1."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.client.api import Client
from services.client.local import LocalSystem
from tests.support.pairs_file import pair_rows, write_pairs
from tests.support.s3_server import BUCKET, S3Server, s3

os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
)


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    """Started once; the tests that share it leave it usable."""
    with LocalSystem(tmp_path_factory.mktemp("system"), fresh=True) as running:
        yield running


@pytest.fixture(scope="session")
def client(system: LocalSystem) -> Iterator[Client]:
    with system.client() as connected:
        yield connected


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """``s3://bucket`` on 127.0.0.1, for this process and those that are started after it; does harm when told to."""
    with s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[str]:
    """A place of its own in the S3 server for one test, and no harm before and after it."""
    s3_server.harm()
    yield f"s3://{BUCKET}/{uuid.uuid4().hex}"
    s3_server.harm()


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows of drawn scenes: 180 decided, 20 ties; one of the decided holds a broken picture."""
    rows = pair_rows(200)
    rows[3]["jpg_0"] = b"no picture"
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", rows)
