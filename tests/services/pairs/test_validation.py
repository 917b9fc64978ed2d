"""The counts and digest of a registered dataset, and the report on a sample."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from services.api.records import DatasetReport
from services.api.requests import DatasetSource
from services.errors import BadRequest
from services.pairs.images import BadImage, decode
from services.pairs.source import Source, open_source
from services.pairs.validation import inspect, validate
from tests.support.hostile_rows import CELLS, IMAGES, hostile_rows
from tests.support.pairs_file import pair_rows, png, write_pairs
from tests.support.source_kinds import KINDS, win_lose, write_lines

UNDECIDED = ("", "tie", "missing")


def opened(path: Path) -> Source:
    return open_source(DatasetSource(uri=path.as_uri()))


def write_hostile(path: Path, count: int, seed: int = 0) -> list[str]:
    rows, ends = zip(*hostile_rows(count, seed), strict=True)
    write_pairs(path, list(rows))
    return list(ends)


def test_rows_are_counted_by_kind_and_bad_ones_by_cause(tmp_path):
    rows = [row | {"has_label": True} for row in pair_rows(40)]
    rows[0]["label_0"] = None
    rows[1]["has_label"] = False
    rows[2]["caption"] = rows[3]["caption"] = " "
    rows[4]["label_1"] = 0.25
    counts, _ = inspect(opened(write_pairs(tmp_path / "a.parquet", rows)))
    assert counts.model_dump() == {
        "rows": 40,
        "pairs": 31,
        "ties": 4,
        "missing": 2,
        "bad": {"caption_missing": 2, "label_sum": 1},
        "soft": 0,
        "duplicates": 0,
        "contradicting": 0,
        "long_captions": 0,
    }


def test_soft_labels_repetitions_contradictions_and_long_captions_are_counted(tmp_path):
    def line(first: str, second: str, label: float, caption: str = "a cat") -> dict:
        return {"jpg_0": first, "jpg_1": second, "label_0": label, "label_1": 1 - label, "caption": caption}

    rows = [line("a", "b", 1.0), line("a", "b", 0.67), line("b", "a", 1.0), line("a", "c", 0.25)]
    rows += [line("a", "b", 0.0, "a dog"), line("a", "b", 0.5), line("d", "e", 1.0, "word " * 76)]
    counts, _ = inspect(opened(write_lines(tmp_path / "a.jsonl", rows)))
    found = (counts.pairs, counts.soft, counts.duplicates, counts.contradicting, counts.long_captions)
    assert found == (6, 2, 1, 3, 1)


def test_a_sample_compares_images_by_content_and_counts_transparent_ones(tmp_path):
    rows = pair_rows(4)
    again = rows[0] | {"image_0_uid": "x", "image_1_uid": "y"}
    turned = rows[1] | {"label_0": rows[1]["label_1"], "label_1": rows[1]["label_0"]}
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[:4, :, 3] = 255
    rows[3] |= {"jpg_0": png(hidden)}
    report = validate(opened(write_pairs(tmp_path / "a.parquet", [*rows, again, turned])))
    assert report.pairs.model_dump() == {
        "pairs": 6,
        "soft": 0,
        "duplicates": 1,
        "contradicting": 2,
        "long_captions": 0,
    }
    assert report.pictures is not None
    assert (report.pictures.count, report.pictures.transparent) == (12, 1)


def test_a_rankings_pairs_and_equal_ranks_are_counted(tmp_path):
    rows = [
        {"images": ["a", "b", "c"], "ranks": [1, 1, 2], "caption": "x"},
        {"images": ["a", "b"], "ranks": [1, 1], "caption": "x"},
    ]
    counts, _ = inspect(opened(write_lines(tmp_path / "a.jsonl", rows)))
    assert (counts.rows, counts.pairs, counts.ties) == (2, 2, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_is_the_same_for_the_same_files_at_another_uri(kind, tmp_path):
    first, second = (inspect(opened(KINDS[kind](tmp_path / place / "data"))) for place in ("1", "2"))
    assert (first == second) == (kind != "json_lines_uris")
    assert first[0] == second[0]


def test_the_digest_changes_with_captions_labels_uids_and_images(tmp_path):
    def digest(**changes) -> str:
        rows = pair_rows(5)
        rows[2] |= changes
        return inspect(opened(write_pairs(tmp_path / "pairs.parquet", rows)))[1]

    other = pair_rows(9, seed=5)[7]
    changed = [
        digest(caption="a red circle"),
        digest(label_0=0.25, label_1=0.75),
        digest(image_0_uid="another"),
        digest(jpg_0=other["jpg_1"]),
    ]
    assert len({digest(), *changed}) == 5


def test_a_dataset_without_a_decided_pair_is_refused_with_its_counts(tmp_path):
    rows = [{"chosen": "a", "rejected": "a", "caption": "x"}, {"chosen": "a", "rejected": "b", "caption": ""}]
    with pytest.raises(
        BadRequest, match="no decided pair: 2 rows, 1 ties, 0 without a label, 1 caption_missing"
    ) as refused:
        inspect(opened(write_lines(tmp_path / "a.jsonl", rows)))
    assert refused.value.code == "no_decided_pair"


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_rows_get_their_kind_and_cause_and_none_is_lost(count, tmp_path):
    ends = write_hostile(tmp_path / "a.parquet", count)
    source, found = opened(tmp_path / "a.parquet"), []
    for unit in source.units():
        for row in source.rows(unit, with_images=True):
            cause = row.cause or ("" if row.kind == "decided" else row.kind)
            for image in row.images if row.kind == "decided" else ():
                try:
                    decode(source.load(image), 16)
                except BadImage as error:
                    cause = error.cause
            found.append(cause)
    assert found == ends
    assert set(ends) >= {cause for cause, _ in [*IMAGES.values(), *CELLS.values()]}
    counts, _ = inspect(source)
    expected = Counter(end for end in ends if end not in UNDECIDED and not end.startswith("image_"))
    assert counts.bad == expected
    assert counts.pairs + counts.ties + counts.missing + sum(counts.bad.values()) == counts.rows == count


# ---- a sample


def test_a_sample_of_a_whole_small_source_counts_what_is_bad_with_examples(tmp_path):
    ends = write_hostile(tmp_path / "a.parquet", 200, seed=1)
    report = validate(opened(tmp_path / "a.parquet"), 1000)
    kinds = Counter({"": "decided", "tie": "tie", "missing": "missing"}.get(end, "bad") for end in ends)
    assert report.sampled == {"rows": 200, **kinds}
    assert {cause: bad.count for cause, bad in report.bad.items()} == Counter(
        end for end in ends if end not in UNDECIDED
    )
    for bad in report.bad.values():
        assert len(bad.examples) == min(3, bad.count)
        assert all(example.row.startswith(":") and len(example.detail) <= 200 for example in bad.examples)
    assert DatasetReport.model_validate_json(report.model_dump_json()) == report


def test_a_report_lists_the_columns_read_and_the_sizes_of_images(tmp_path):
    rows = [row | {"created_at": 3} for row in pair_rows(50)]
    report = validate(opened(write_pairs(tmp_path / "a.parquet", rows)))
    assert (report.format, report.shape, report.rows, report.columns_not_read) == (
        "parquet",
        "pair",
        50,
        ["created_at"],
    )
    assert report.columns["caption"] == "caption"
    assert report.pictures is not None
    assert report.pictures.model_dump() == {
        "count": 90,
        "min_px": 32,
        "median_px": 32,
        "max_px": 32,
        "transparent": 0,
    }
    assert validate(opened(win_lose(tmp_path / "folders"))).rows is not None
    lines = write_lines(tmp_path / "a.jsonl", [{"chosen": "a.png", "rejected": "b.png", "caption": "x"}])
    report = validate(opened(lines))
    assert (report.rows, report.pictures) == (None, None)
    assert report.bad["image_missing"].examples[0].model_dump() == {"row": ":0:0", "detail": "a.png"}


def test_a_sample_is_spread_over_the_source(tmp_path):
    rows = [
        row | {"caption": "" if number < 200 else row["caption"]} for number, row in enumerate(pair_rows(400))
    ]
    report = validate(opened(write_pairs(tmp_path / "a.parquet", rows, row_group_size=10)), 32)
    assert report.sampled["rows"] == 32
    assert 12 <= report.bad["caption_missing"].count <= 20
