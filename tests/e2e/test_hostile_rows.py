"""Ten thousand rows, two in three hostile: none is lost, none crashes, each is reported with its cause."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dde_core.config import DataConfig
from services.client.local import LocalSystem
from services.storage import files
from tests.support.hostile_rows import hostile_rows
from tests.support.pairs_file import write_pairs
from tests.support.stage_runs import StageRuns, cluster_environment, shapes_record

pytestmark = pytest.mark.slow
ROWS = 10_000


def test_hostile_rows_are_counted_by_cause_and_quarantined_by_row(system: LocalSystem, tmp_path: Path):
    rows = list(hostile_rows(ROWS, seed=0))
    uri = write_pairs(tmp_path / "pairs.parquet", [row for row, _ in rows], row_group_size=500).as_uri()
    runs = StageRuns(tmp_path, cluster_environment(system))
    spec = runs.encode_spec("hostile", uri, shapes_record(), data=DataConfig(max_bad_fraction=1.0))
    result = runs.start("encode", spec).finish()

    expected = Counter(outcome for _, outcome in rows)
    undecided = {"", "tie", "missing"}
    print(f"{ROWS} rows: {dict(sorted(expected.items()))}")
    assert result.counts["rows"] == ROWS
    assert (result.counts["pairs"], result.counts["ties"], result.counts["missing"]) == tuple(
        expected[outcome] for outcome in ("", "tie", "missing")
    )
    assert result.bad == {
        cause: number for cause, number in sorted(expected.items()) if cause not in undecided
    }
    lines = files.read_bytes(files.join(result.dataset, "quarantine.jsonl")).decode().splitlines()
    reported = {line["row"]: line["cause"] for line in map(json.loads, lines)}
    assert len(lines) == len(reported) == result.counts["bad"]
    found = {
        int(key.rsplit(":", 1)[1]) + 500 * int(key.split(":")[1]): cause for key, cause in reported.items()
    }
    assert found == {number: outcome for number, (_, outcome) in enumerate(rows) if outcome not in undecided}


def test_too_many_bad_rows_fail_the_stage_with_the_counts(system: LocalSystem, tmp_path: Path):
    rows = [row for row, _ in hostile_rows(200, seed=1)]
    uri = write_pairs(tmp_path / "pairs.parquet", rows).as_uri()
    runs = StageRuns(tmp_path, cluster_environment(system))
    run = runs.start(
        "encode", runs.encode_spec("hostile", uri, shapes_record(), data=DataConfig(max_bad_fraction=0.01))
    )
    assert run.process.wait(240) != 0
    failure = json.loads(run.failure())
    assert (failure["code"], failure["param"]) == ("too_many_bad_rows", "data.max_bad_fraction")
    assert "of 200 rows are bad (caption_" in failure["message"]
    assert "more than data.max_bad_fraction = 0.01 allows" in failure["message"]
    folder = Path(files.resolve(runs.prefix("datasets"))[1])
    assert list(folder.glob("*/quarantine.jsonl")), "what is bad can be read"
    assert not list(folder.glob("*/manifest.json"))
