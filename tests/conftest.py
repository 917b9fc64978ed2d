"""One system for the whole session: real Ray, real Serve, a real control plane, on free ports of 127.0.0.1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.client.api import Client
from services.client.local import LocalSystem
from tests.pairs_file import pair_rows, write_pairs

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


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
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows of drawn scenes: 180 decided, 20 ties; one of the decided holds a broken picture."""
    rows = pair_rows(200)
    rows[3]["jpg_0"] = b"no picture"
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", rows)
