"""The counts and digest of a registered dataset, and the report on a sample."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    counts, *_ = inspect(opened(write_pairs(tmp_path / "a.parquet", rows)))
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
    counts, *_ = inspect(opened(write_lines(tmp_path / "a.jsonl", rows)))
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
    counts, *_ = inspect(opened(write_lines(tmp_path / "a.jsonl", rows)))
    assert (counts.rows, counts.pairs, counts.ties) == (2, 2, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_is_the_same_for_the_same_files_at_another_uri(kind, tmp_path):
    first, second = (inspect(opened(KINDS[kind](tmp_path / place / "data")))[:2] for place in ("1", "2"))
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
    found = "no decided pair: 2 rows, 1 ties, 0 without a label, 1 caption_missing"
    with pytest.raises(BadRequest, match=found) as refused:
        inspect(opened(write_lines(tmp_path / "a.jsonl", rows)))
    assert refused.value.code == "no_decided_pair"
    assert str(refused.value).endswith("caption_missing (a.jsonl:0:1: caption = '')")


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
    counts, *_ = inspect(source)
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
        assert all(
            example.row.startswith("a.parquet:") and len(example.detail) <= 200 for example in bad.examples
        )
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
    assert report.bad["image_missing"].examples[0].model_dump() == {"row": "a.jsonl:0:0", "detail": "a.png"}


def test_a_sample_is_spread_over_the_source(tmp_path):
    rows = [
        row | {"caption": "" if number < 200 else row["caption"]} for number, row in enumerate(pair_rows(400))
    ]
    report = validate(opened(write_pairs(tmp_path / "a.parquet", rows, row_group_size=10)), 32)
    assert report.sampled["rows"] == 32
    assert 12 <= report.bad["caption_missing"].count <= 20


# ---- a decided row in words


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        ({"images": ["a.png", "b.png"], "scores": [0, 1]}, "b.png", "a.png"),
        ({"images": ["a.png", "b.png"], "ranks": [2, 1]}, "b.png", "a.png"),
        ({"images": ["a.png", "b.png"]}, "a.png", "b.png"),
        ({"jpg_0": "a.png", "jpg_1": "b.png", "label_0": 0, "label_1": 1}, "b.png", "a.png"),
        ({"chosen": "a.png", "rejected": "b.png"}, "a.png", "b.png"),
    ],
)
def test_a_decided_row_is_shown_with_its_files_and_caption(row, chosen, rejected, tmp_path):
    undecided = {"caption": "y", **row, "has_label": False}
    path = write_lines(tmp_path / "a.jsonl", [undecided, {"caption": "x", **row, "has_label": True}])
    shown = {"row": "a.jsonl:0:1", "chosen": chosen, "rejected": rejected, "caption": "x"}
    for example in (inspect(opened(path)).example, validate(opened(path)).example):
        assert example is not None
        assert example.model_dump() == shown


def test_an_embedded_image_is_shown_by_its_column_and_uid(tmp_path):
    rows = [row | {"label_0": 0.0, "label_1": 1.0} for row in pair_rows(1)]
    example = inspect(opened(write_pairs(tmp_path / "a.parquet", rows))).example
    assert (example.chosen, example.rejected) == ("jpg_1, uid 0-0-1", "jpg_0, uid 0-0-0")
    for row in rows:
        row["image_0_uid"] = row["image_1_uid"] = None
    example = inspect(opened(write_pairs(tmp_path / "a.parquet", rows))).example
    assert (example.chosen, example.rejected) == ("jpg_1", "jpg_0")


# ---- details


@pytest.mark.parametrize(
    ("changes", "cause", "detail"),
    [
        ({"label_0": 0.7, "label_1": 0.5}, "label_sum", "label_0 = 0.7, label_1 = 0.5: they must be shares"),
        ({"label_0": "1"}, "wrong_type", "label_0 = '1', must be a number or a boolean"),
        ({"caption": 3}, "wrong_type", "caption = 3, must be a string"),
        ({"has_label": "yes"}, "wrong_type", "has_label = 'yes', must be a boolean"),
        ({"jpg_0": 3}, "wrong_type", "jpg_0 = 3, must be bytes, a path or a URI"),
        ({"caption": "x" * 10_001}, "caption_too_long", f"caption = '{'x' * 60}'... (10,001 characters)"),
        ({"caption": "a\0b"}, "caption_null_byte", "caption = 'a\\x00b'"),
        ({"caption": "\ud83d"}, "not_unicode", "'\\ud83d'"),
        ({"image_0_uid": "u\0"}, "uid_null_byte", "image_0_uid = 'u\\x00'"),
    ],
)
def test_a_bad_row_is_explained_by_its_columns_and_values(changes, cause, detail, tmp_path):
    good = {"jpg_0": "a", "jpg_1": "b", "label_0": 1, "label_1": 0, "caption": "x", "has_label": True}
    path = write_lines(tmp_path / "a.jsonl", [good | {"image_0_uid": "u"} | changes])
    (example,) = validate(opened(path)).bad[cause].examples
    assert detail in example.detail


def test_every_bad_row_has_a_detail(tmp_path):
    write_hostile(tmp_path / "a.parquet", 400, seed=2)
    report = validate(opened(tmp_path / "a.parquet"), 1000)
    assert len(report.bad) > 10
    assert all(example.detail for bad in report.bad.values() for example in bad.examples)


# ---- uids


def with_uids(path: Path, names: list[tuple[object, object]], rows: list[dict] | None = None) -> Path:
    rows = rows or pair_rows(len(names))
    for row, (first, second) in zip(rows, names, strict=True):
        row["image_0_uid"], row["image_1_uid"] = first, second
    return write_pairs(path, rows, row_group_size=3)


def test_a_uid_of_different_images_is_refused_and_counted_in_a_sample(tmp_path):
    source = opened(with_uids(tmp_path / "a.parquet", [("0", "1")] * 8))
    with pytest.raises(BadRequest, match="image_0_uid '0' names different images") as refused:
        inspect(source)
    assert refused.value.code == "uid_conflict"
    assert "in the rows a.parquet:0:0 and a.parquet:0:1" in str(refused.value)
    assert str(refused.value).endswith("leave it out: --column image_0_uid= --column image_1_uid=")
    report = validate(source)
    assert (report.bad["uid_conflict"].count, report.sampled["decided"]) == (7, 1)
    assert (
        report.bad["uid_conflict"].examples[0].detail
        == "image_0_uid '0' names another image than in row a.parquet:0:0; image_0_uid= leaves it out"
    )


def test_uids_that_are_left_out_are_not_merged(tmp_path):
    path = with_uids(tmp_path / "a.parquet", [("0", "1")] * 8)
    columns = {"image_0_uid": "", "image_1_uid": ""}
    source = open_source(DatasetSource(uri=path.as_uri(), columns=columns))  # type: ignore[arg-type]
    uids = {uid for unit in source.units() for row in source.rows(unit) for uid in row.uids}
    assert (inspect(source)[0].pairs, len(uids)) == (8, 16)


def test_two_images_of_one_uid_in_a_row_are_no_tie(tmp_path):
    source = opened(with_uids(tmp_path / "a.parquet", [(f"{number}", f"{number}") for number in range(6)]))
    with pytest.raises(BadRequest, match="image_1_uid '0' names different images in the rows"):
        inspect(source)
    report = validate(source)
    assert (report.sampled["tie"], report.bad["uid_conflict"].count) == (0, 6)


def test_uids_that_start_again_in_each_file_are_refused(tmp_path):
    for file in range(2):
        names = [(f"{2 * number}", f"{2 * number + 1}") for number in range(5)]
        with_uids(tmp_path / f"{file}.parquet", names, pair_rows(5, seed=file))
    with pytest.raises(BadRequest, match=r"rows 0\.parquet:0:0 and 1\.parquet:0:0"):
        inspect(opened(tmp_path))


def test_one_image_of_several_rows_keeps_its_uid_also_where_its_file_differs(tmp_path):
    rows = pair_rows(6)
    for row in rows[1:]:
        row["jpg_0"] = rows[0]["jpg_0"]
    again = io.BytesIO()
    Image.open(io.BytesIO(rows[0]["jpg_0"])).resize((64, 64)).save(again, "JPEG", quality=95)
    rows[3]["jpg_0"] = again.getvalue()
    names: list[tuple[object, object]] = [("same", f"{number}") for number in range(6)]
    source = opened(with_uids(tmp_path / "a.parquet", names, rows))
    assert inspect(source)[0].pairs == 6
    assert validate(source).bad == {}
