"""Evaluations on a cluster: the number of actors and kills of actors and drivers change no byte.

Without a cluster, tests/services/evaluation/test_evaluate.py holds the same for any order of chunks and for a
kill at every write.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from dde_core.config import SampleConfig
from dde_core.shapes import PROMPTS_FILE
from services.api.records import EvaluateResult
from services.api.requests import EvaluationConfig
from services.artifacts.scorers import BUILT_IN
from services.client.local import LocalSystem
from services.stages.specs import EvaluateSpec
from services.storage import files
from tests.support.evaluate_here import record_of
from tests.support.stage_runs import StageRuns, cluster_environment, shapes_record
from tests.support.tiny_folders import sd15_folder

KILLS = 5
SEED = 20261127


def spec(runs: StageRuns, name: str, folder: Path, actors: int, num_prompts: int, steps: int) -> EvaluateSpec:
    """The shipped model against one of random weights in ``folder``, which all runs share."""
    config = EvaluationConfig(
        prompts_uri=PROMPTS_FILE.as_uri(),
        num_prompts=num_prompts,
        images_per_prompt=2,
        sample=SampleConfig(steps=steps, guidance_scale=3.0),
    )
    return EvaluateSpec(
        **runs.frame(name),
        models=[shapes_record(), record_of("random", folder)],
        base="shapes",
        scorers=[BUILT_IN[scorer] for scorer in config.scorers],
        evaluation=config,
        images=runs.prefix("images"),
        output=runs.prefix(name),
        actors=actors,
    )


def stored(runs: StageRuns) -> dict[str, bytes]:
    """The contents of every stored chunk of images and of scores."""
    root = Path(files.resolve(runs.prefix("images"))[1])
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("*/*.parquet")}


def num_stored(runs: StageRuns) -> int:
    return sum(1 for _ in Path(files.resolve(runs.prefix("images"))[1]).glob("*/*.parquet"))


def same(runs: StageRuns, result: EvaluateResult, others: StageRuns, other: EvaluateResult) -> None:
    """Every stored byte, number and image of two runs is the same."""
    assert stored(runs) == stored(others)
    assert result.scores == other.scores
    assert files.read_bytes(result.report) == files.read_bytes(other.report)
    assert files.read_bytes(result.page) == files.read_bytes(other.page)
    assert files.read_bytes(result.grid) == files.read_bytes(other.grid)


@pytest.mark.slow
def test_one_actor_and_three_give_the_same_bytes(system: LocalSystem, tmp_path: Path):
    folder = sd15_folder(tmp_path / "random")
    env = cluster_environment(system)
    one = StageRuns(tmp_path / "one", env)
    three = StageRuns(tmp_path / "three", env)
    runs = [
        runs.start("evaluate", spec(runs, "first", folder, actors, 50, 1))
        for runs, actors in ((one, 1), (three, 3))
    ]
    alone, together = (run.finish() for run in runs)
    assert alone.images_drawn == together.images_drawn == 2 * 2 * 50
    same(one, alone, three, together)


def actors_of(system: LocalSystem) -> list[psutil.Process]:
    """The processes of the pool's actors on this cluster."""
    found = []
    for process in psutil.Process(system.ray.child.pid).children(recursive=True):
        try:
            if "ChunkScorer" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_kills_of_actors_and_drivers_change_nothing(system: LocalSystem, tmp_path: Path):
    folder = sd15_folder(tmp_path / "random")
    env = cluster_environment(system)
    calm = StageRuns(tmp_path / "calm", env)
    killed = StageRuns(tmp_path / "killed", env)
    expected = calm.start("evaluate", spec(calm, "calm", folder, 1, 200, 5)).finish()
    pieces = num_stored(calm)

    rng = random.Random(SEED)
    points = sorted(rng.randrange(1, pieces - 8) for _ in range(KILLS))
    targets = ["actor", "driver", "actor", "driver", "driver"]
    run = killed.start("evaluate", spec(killed, "run-0", folder, 3, 200, 5))
    for number, (point, target) in enumerate(zip(points, targets, strict=True), 1):
        deadline = time.monotonic() + 240
        while num_stored(killed) < point or not actors_of(system):
            assert run.process.poll() is None, run.failure()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        before = stored(killed)
        if target == "actor":
            rng.choice(actors_of(system)).kill()
        else:
            os.kill(run.process.pid, signal.SIGKILL)
            assert run.process.wait() == -signal.SIGKILL, "the driver was still running"
            run = killed.start("evaluate", spec(killed, f"run-{number}", folder, 3, 200, 5))
        print(f"kill {number}, of {target}: {len(before)} of {pieces} files were stored")
        assert before.items() <= stored(killed).items()
    found = run.finish()
    assert found.images_drawn < 2 * 2 * 200
    same(calm, expected, killed, found)
