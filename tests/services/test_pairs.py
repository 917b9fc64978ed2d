"""What a row of preference pairs means, and which files are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services import pairs
from services.errors import BadRequest
from services.pairs import PairRow
from tests.pairs_file import pair_rows, write_pairs

KINDS = [
    (1.0, 0.0, True, "pair"),
    (0.0, 1.0, True, "pair"),
    (0.7, 0.3, True, "pair"),
    (0.5, 0.5, True, "tie"),
    (None, 1.0, True, "missing"),
    (math.nan, 1.0, True, "missing"),
    (1.0, 0.0, False, "missing"),
    (1.0, 0.5, True, "missing"),
    (2.0, -1.0, True, "missing"),
]


def row(label_0, label_1, has_label=True) -> PairRow:
    return PairRow("", 0, 0, "a", "b", "text", label_0, label_1, has_label)


@pytest.mark.parametrize(("label_0", "label_1", "has_label", "kind"), KINDS)
def test_a_row_is_a_pair_a_tie_or_missing(label_0, label_1, has_label, kind):
    assert row(label_0, label_1, has_label).kind == kind


def test_a_row_without_a_caption_is_missing_and_a_picture_against_itself_is_a_tie():
    assert PairRow("", 0, 0, "a", "b", "", 1.0, 0.0).kind == "missing"
    assert PairRow("", 0, 0, "a", "a", "text", 1.0, 0.0).kind == "tie"


def test_the_winner_is_the_one_with_the_larger_label():
    assert row(1.0, 0.0).winner_first == ("a", "b", 1.0)
    assert row(0.2, 0.8).winner_first == ("b", "a", 0.8)


def test_a_dataset_is_counted_in_one_file_or_many(tmp_path: Path):
    rows = pair_rows(40)
    rows[1]["label_0"] = None
    one = write_pairs(tmp_path / "one" / "all.parquet", rows)
    write_pairs(tmp_path / "two" / "with space" / "ä%.parquet", rows[25:])
    write_pairs(tmp_path / "two" / "deeper" / "a.parquet", rows[:25], row_group_size=7)
    counts = pairs.inspect(one.as_uri())[0]
    assert counts.model_dump() == {"rows": 40, "pairs": 35, "ties": 4, "missing": 1}
    assert pairs.inspect((tmp_path / "two").as_uri())[0] == counts
    assert pairs.inspect(str(tmp_path / "two"))[0] == counts


def test_the_digest_changes_with_captions_labels_and_pictures(tmp_path: Path):
    def digest(**changes) -> str:
        rows = pair_rows(5)
        rows[2] |= changes
        return pairs.inspect(write_pairs(tmp_path / "pairs.parquet", rows).as_uri())[1]

    unchanged = digest()
    assert digest() == unchanged
    changed = [
        digest(caption="a red circle"),
        digest(label_0=0.25, label_1=0.75),
        digest(jpg_0=pair_rows(9, seed=5)[7]["jpg_1"]),
    ]
    assert len({unchanged, *changed}) == 4


def test_a_column_of_the_wrong_type_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([{**each, "caption": 3} for each in pair_rows(2)]), path)
    with pytest.raises(BadRequest, match=r"column caption .* int64") as refused:
        pairs.inspect(str(path))
    assert refused.value.code == "wrong_column_type"


def test_has_label_false_is_missing_whatever_the_labels_say(tmp_path: Path):
    rows = [{**each, "has_label": i > 0} for i, each in enumerate(pair_rows(5))]
    assert pairs.inspect(write_pairs(tmp_path / "pairs.parquet", rows).as_uri())[0].missing == 1


def test_an_empty_folder_is_refused_with_its_uri(tmp_path: Path):
    with pytest.raises(BadRequest, match=r"holds no \.parquet file"):
        pairs.inspect(tmp_path.as_uri())
