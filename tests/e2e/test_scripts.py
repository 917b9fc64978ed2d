"""The scripts that made the shipped weights and pairs are deterministic."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dde_core.shapes import MODEL_DIR

SCRIPTS = {
    "train": ["--vae-steps", "40", "--steps", "40"],
    "pairs": ["--pairs", "8", "--prompts", "4", "--model", str(MODEL_DIR)],
}


def files_of(script: str, out: Path) -> dict[str, bytes]:
    command = [sys.executable, "-m", f"dde_core.shapes.{script}", "--out", str(out), *SCRIPTS[script]]
    subprocess.run(command, check=True, timeout=280, capture_output=True)
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_writes_the_same_bytes_from_the_same_seed(script: str, tmp_path: Path):
    first, second = (files_of(script, tmp_path / name) for name in "ab")
    assert first
    assert first == second
