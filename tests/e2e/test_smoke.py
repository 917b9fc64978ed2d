"""`dde smoke` on the real system, with a key of a project of its own."""

from __future__ import annotations

import os
import subprocess

import pytest

from services.api.requests import KeyCreate
from services.client.api import Client
from services.client.local import LocalSystem
from services.client.processes import executables
from services.stages import layout
from services.storage import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = [
    "health",
    "key",
    "model",
    "dataset",
    "job",
    "encode",
    "train",
    "evaluate",
    "report",
    "image",
    "clean-up",
]


def smoke(system: LocalSystem, key: str) -> subprocess.CompletedProcess[str]:
    command = [executables() / "dde", "smoke", "--base-url", system.url, "--timeout-s", "1500"]
    env = {**os.environ, "DDE_API_KEY": key}
    return subprocess.run(command, capture_output=True, text=True, timeout=1700, env=env)


def test_a_smoke_run_goes_through_every_stage_and_leaves_only_encoded_pairs(
    system: LocalSystem, client: Client
):
    created = client.create_key(KeyCreate(name="smoke", project="smoke"))
    done = smoke(system, created.key)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [tuple(line.split()[:2]) for line in lines[:-1]] == [("ok", step) for step in STEPS]
    assert lines[-1] == f"{system.url} works"
    with Client(system.url, created.key) as own:
        assert [*own.models(), *own.datasets(), *own.jobs()] == []
    root = layout.project_root(system.storage_uri, "smoke")
    assert {name.partition("/")[0] for name in files.list_files(root, recursive=True)} == {"datasets"}


def test_a_key_that_may_only_read_is_told_what_it_lacks(system: LocalSystem, client: Client):
    created = client.create_key(KeyCreate(name="reader", project="reader", scopes=["read"]))
    done = smoke(system, created.key)
    assert done.returncode == 1
    assert "error: key: the key lacks the scope submit and generate" in done.stderr
