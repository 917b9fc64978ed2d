"""Encoding that is killed ten times gives the dataset of an undisturbed run and encodes nothing twice."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from dde_core.config import DataConfig
from dde_core.latents.schema import Manifest
from services.api.records import EncodeResult
from services.client.local import LocalSystem
from services.storage import files
from tests.support.stage_runs import StageRuns, cluster_environment, shapes_record
from tests.support.synthetic_pairs import synthetic_rows, write_stream

KILLS, ROWS, SEED = 10, 6000, 20261120


def manifest(result: EncodeResult) -> Manifest:
    return Manifest.from_json(files.read_bytes(files.join(result.dataset, "manifest.json")))


def written_files(runs: StageRuns, pattern: str) -> dict[str, int]:
    """The time at which each file of the one dataset below ``runs`` was written."""
    found = Path(files.resolve(runs.prefix("datasets"))[1]).glob(f"*/{pattern}")
    written = {}
    for path in found:
        try:
            written[path.name] = path.stat().st_mtime_ns
        except FileNotFoundError:  # a block that was just deleted
            continue
    return written


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_at_random_points_change_nothing(system: LocalSystem, tmp_path: Path):
    rows = list(synthetic_rows(ROWS))
    for number in range(0, ROWS, 250):
        rows[number]["jpg_0"] = b"not an image"
    pairs, env = (
        write_stream(tmp_path / "pairs.parquet", rows, row_group_size=100).as_uri(),
        cluster_environment(system),
    )
    calm, killed = StageRuns(tmp_path / "calm", env), StageRuns(tmp_path / "killed", env)
    model, data = shapes_record(), {"data": DataConfig(max_bad_fraction=0.1)}
    expected = calm.start("encode", calm.encode_spec("calm", pairs, model, **data)).finish()

    rng, pieces = random.Random(SEED), ROWS // 100 + len(manifest(expected).shards)
    points = sorted(rng.randrange(pieces) for _ in range(KILLS))
    committed: dict[str, int] = {}
    for number, point in enumerate(points):
        run = killed.start("encode", killed.encode_spec(f"kill-{number}", pairs, model, **data))
        deadline = time.monotonic() + 240
        while (
            len(written_files(killed, "blocks/*.parquet")) + len(written_files(killed, "shard-*.parquet"))
            < point
        ):
            assert run.process.poll() is None, run.failure()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(rng.random() * 0.5)
        os.kill(run.process.pid, signal.SIGKILL)
        assert run.process.wait() == -signal.SIGKILL, "the driver was still running"
        now = written_files(killed, "blocks/*.parquet")
        assert committed.items() <= now.items(), "a committed block is never written again"
        committed = now
        print(f"kill {number + 1} after {point} of {pieces} pieces: {len(committed)} blocks are committed")

    last = killed.start("encode", killed.encode_spec("last", pairs, model, **data))
    found = last.finish()
    print(f"digests: undisturbed {expected.digest}, killed {KILLS} times {found.digest}")
    assert any("already encoded by an earlier run" in event for event in last.events())
    assert manifest(found) == manifest(expected), "the same digest, counts and shards"
    assert not found.reused
    assert not written_files(killed, "blocks/*"), "blocks are deleted once the manifest is written"


@pytest.mark.slow
def test_the_same_request_again_reuses_the_dataset_and_another_setting_does_not(
    system: LocalSystem, tmp_path: Path
):
    pairs = write_stream(tmp_path / "pairs.parquet", synthetic_rows(60)).as_uri()
    runs, model = StageRuns(tmp_path / "runs", cluster_environment(system)), shapes_record()
    first = runs.start("encode", runs.encode_spec("first", pairs, model)).finish()
    again = runs.start("encode", runs.encode_spec("again", pairs, model)).finish()
    assert (again.digest, again.dataset, again.reused) == (first.digest, first.dataset, True)
    flipped = runs.start(
        "encode", runs.encode_spec("flipped", pairs, model, data=DataConfig(flip="all"))
    ).finish()
    assert not flipped.reused
    assert flipped.digest != first.digest
