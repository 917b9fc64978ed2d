"""Scorers by their records: those of the shapes world and those on checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dde_core.errors import DataError
from dde_core.scorers import load as on_checkpoints
from services.api.records import ScorerRecord
from services.artifacts import scorers
from services.errors import BadRequest
from tests.support.scorers import write_tiny

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 60, 40, 3), dtype=np.uint8)
PROMPTS = ["a red star", "a blue star", "text"]


def record(kind: str, checkpoint: Path | None, processor: Path | None, **more) -> ScorerRecord:
    uris = {
        name: None if path is None else path.as_uri()
        for name, path in (("uri", checkpoint), ("processor", processor))
    }
    return ScorerRecord(id="scorer_1", name="mine", kind=kind, digest="0", created_at=0, **uris, **more)


@pytest.mark.parametrize(
    "kind", ["clip", "pickscore", "hps", "aesthetic", "imagereward", "diversity", "drift"]
)
def test_a_record_loads_as_the_scorer_of_its_files(kind: str, tmp_path: Path):
    checkpoint, processor = write_tiny(kind, tmp_path)
    scorer = scorers.load(record(kind, checkpoint, processor))
    assert scorer.kind.name == kind
    scorer.check(PROMPTS, 60, 40)
    wanted = on_checkpoints.load(kind, checkpoint, processor)(IMAGES, PROMPTS)
    np.testing.assert_array_equal(scorer(IMAGES, PROMPTS), wanted)


def test_the_resize_of_a_record_is_what_scores_are_made_with(tmp_path: Path):
    files = write_tiny("hps", tmp_path)
    first, second = (
        scorers.load(record("hps", *files, resize=resize))(IMAGES, PROMPTS)
        for resize in ("antialiased", "aliased")
    )
    assert np.abs(first - second).max() > 1e-4


@pytest.mark.parametrize("name", scorers.BUILT_IN)
def test_the_scorers_of_the_shapes_world_need_no_files(name: str):
    assert scorers.load(scorers.BUILT_IN[name]).kind.name == name


def test_a_record_without_files_is_refused_by_its_field(tmp_path: Path):
    with pytest.raises(BadRequest, match="'mine' of kind 'clip' needs a uri"):
        scorers.load(record("clip", None, None))
    with pytest.raises(DataError, match="must be a folder of CLIP"):
        scorers.load(record("clip", tmp_path / "absent", None))


def test_records_are_read_without_torch():
    code = "import sys, services.artifacts.scorers; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
