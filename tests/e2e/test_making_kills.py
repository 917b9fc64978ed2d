"""A run that makes pairs and is killed ends with the files of an undisturbed one, and draws nothing twice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from dde_core.config import SampleConfig
from dde_core.shapes import PROMPTS_FILE
from services.api.requests import GeneratePairs
from services.artifacts.prompts import digest_of, read_prompts
from services.artifacts.scorers import BUILT_IN
from services.client.local import LocalSystem
from services.stages.specs import GenerateSpec
from tests.support.stage_runs import StageRuns, cluster_environment, shapes_record

PROMPTS = 96
"""Of four images each: six chunks."""


def spec(runs: StageRuns, name: str, output: Path) -> GenerateSpec:
    wanted = GeneratePairs(
        model="shapes",
        prompts_uri=PROMPTS_FILE.as_uri(),
        num_prompts=PROMPTS,
        scorers={"taste": 1.0, "match": 1.0},
        margin=0.1,
        sample=SampleConfig(steps=4, guidance_scale=3.0),
    )
    return GenerateSpec(
        **runs.frame(name),
        model=shapes_record(),
        generate=wanted,
        prompts_digest=digest_of(read_prompts(wanted.prompts_uri, PROMPTS)),
        scorers=[BUILT_IN["taste"], BUILT_IN["match"]],
        output=output.as_uri(),
    )


def chunks(output: Path) -> dict[str, int]:
    """The time at which each committed chunk was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "scored").glob("*.parquet")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_between_chunks_change_no_byte_of_the_pairs(system: LocalSystem, tmp_path: Path):
    runs = StageRuns(tmp_path / "runs", cluster_environment(system))
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    expected = runs.start("generate", spec(runs, "calm", calm)).finish()
    committed: dict[str, int] = {}
    for number in (1, 3):
        run = runs.start("generate", spec(runs, f"kill-{number}", killed))
        deadline = time.monotonic() + 240
        while len(chunks(killed)) < number:
            assert run.process.poll() is None, run.failure()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
        now = chunks(killed)
        assert committed.items() <= now.items(), "a committed chunk is never written again"
        committed = now
        print(f"killed with {len(now)} of 6 chunks committed")
    last = runs.start("generate", spec(runs, "last", killed))
    found = last.finish()
    assert any("already scored by an earlier run" in event for event in last.events())
    assert found.model_dump(exclude={"seconds"}) == expected.model_dump(exclude={"seconds"})
    pairs = [{path.name: path.read_bytes() for path in (each / "pairs").iterdir()} for each in (calm, killed)]
    assert pairs[0] == pairs[1]
    assert not (killed / "scored").exists()
