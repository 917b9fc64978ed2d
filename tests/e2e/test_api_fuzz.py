"""Thousands of generated requests, valid and invalid, alone and in sequences: the API keeps what its OpenAPI
document promises.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.client.local import LocalSystem

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("schemathesis.toml")
HOOKS = "tests.support.schemathesis_hooks"
EXAMPLES = 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_schemathesis_finds_nothing_with_every_check(tmp_path: Path):
    with LocalSystem(tmp_path / "state", fresh=True) as system:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "--no-color", "run"),
            f"{system.url}/openapi.json",
            *("--header", f"Authorization: Bearer {system.key}"),
            *("--checks", "all", "--phases", "examples,coverage,fuzzing,stateful"),
            *("--max-examples", str(EXAMPLES), "--continue-on-failure"),
        ]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "SCHEMATHESIS_HOOKS": HOOKS, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    print(done.stdout[done.stdout.rfind("SUMMARY") :])
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
