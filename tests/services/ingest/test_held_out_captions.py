"""Held-out captions of the rows are those that training leaves out of the shards made of these rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dde_core.latents.held_out import dataset_keys, hold_out
from dde_core.latents.reader import LatentReader
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR
from services.api.requests import DatasetSource
from services.artifacts import captions
from services.errors import BadRequest
from services.pairs.source import open_source
from services.pairs.validation import captions_of, inspect
from services.storage import files
from tests.support.encode_here import EncodeHere
from tests.support.pairs_file import pair_rows, write_pairs

NUM_PAIRS = 12


def captions_trained(dataset: str, texts: dict[str, str], num_pairs: int) -> set[str]:
    """The captions of the pairs that a job trains on, by the shards themselves."""
    with LatentReader(*files.resolve(dataset), num_pairs) as reader:
        manifest = reader.manifest
        kept = ~hold_out(dataset_keys(*files.resolve(dataset), manifest), num_pairs)
        assert reader.num_held_out == int((~kept).sum())
    tables = [files.read_bytes(files.join(dataset, shard.name)) for shard in manifest.shards]
    uids = [uid for table in tables for uid in pq.read_table(pa.BufferReader(table))["uid_w"].to_pylist()]
    return {texts[uid] for uid in np.array(uids)[kept]}


@pytest.mark.parametrize("bad_rows", [(), (0, 3, 4, 11, 17, 20, 31)])
def test_a_job_never_trains_on_the_captions_that_its_evaluation_gets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bad_rows: tuple[int, ...]
):
    rows = pair_rows(60)
    for number in range(40, 60):  # captions of several pairs
        rows[number]["caption"] = rows[number - 20]["caption"].upper()
    for number in bad_rows:
        rows[number]["jpg_0"] = b"no image"
    path = write_pairs(tmp_path / "pairs.parquet", rows)
    encode = EncodeHere(monkeypatch, ModelFolder(MODEL_DIR), tmp_path / "encoded")
    result = encode(path, max_bad_fraction=0.5)
    assert bool(result.counts["bad"]) == bool(bad_rows)
    source = open_source(DatasetSource(uri=path.as_uri()))
    counted = captions_of(source, inspect(source).digest, "dataset")
    assert sum(counted.values()) == 54  # every tenth row is a tie
    found = captions.held_out(counted, [encode.model], NUM_PAIRS)
    texts = {row[f"image_{side}_uid"]: row["caption"].lower() for row in rows for side in (0, 1)}
    trained = captions_trained(result.dataset, texts, NUM_PAIRS)
    evaluated = {caption.lower() for caption in found}
    assert len(evaluated) == len(found) > 4
    assert not trained & evaluated
    if not bad_rows:
        assert trained | evaluated == {caption.lower() for caption in counted}


def test_rows_that_have_changed_since_registration_give_no_captions(tmp_path: Path):
    rows = pair_rows(6)
    path = write_pairs(tmp_path / "pairs.parquet", rows)
    source = DatasetSource(uri=path.as_uri())
    digest = inspect(open_source(source)).digest
    rows[2]["caption"] = "a red cross"
    write_pairs(path, rows)
    with pytest.raises(BadRequest, match="has changed: digest") as refused:
        captions_of(open_source(source), digest, "evaluation.prompts_uri")
    assert (refused.value.param, refused.value.code) == ("evaluation.prompts_uri", "dataset_changed")
