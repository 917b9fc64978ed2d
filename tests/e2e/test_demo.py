"""The demo as a user runs it, twice: the aligned model improves, and both runs give the same scores."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from services.client.processes import MARK, executables

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2700)]


def run_demo(state: Path) -> dict:
    done = subprocess.run(
        [executables() / "dde", "demo", "--state", state], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "curl" in done.stdout
    assert (state / "grid.png").exists()
    assert not left_behind(state)
    return json.loads((state / "summary.json").read_text())


def left_behind(state: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(state):
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


def test_the_demo_aligns_a_model_and_two_runs_give_the_same_scores(tmp_path: Path):
    first, second = run_demo(tmp_path / "one"), run_demo(tmp_path / "two")
    scores = first["scores"]
    assert first["num_prompts"] == 200
    assert scores["taste"]["beat_ratio"]["low"] > 0.5
    assert scores["match"]["difference"]["value"] >= -0.02
    assert scores["fidelity"]["difference"]["value"] >= -0.02
    print(f"the demo took {first['seconds']['total']:.0f} s")
    assert second["scores"] == scores
