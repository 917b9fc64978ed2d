"""File formats of preference pairs: detected, equal in content, and refused where unusable."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.api.requests import DatasetSource
from services.errors import BadRequest, NotFound, ServiceError
from services.pairs import path_based
from services.pairs.images import MAX_FILE_BYTES, BadImage
from services.pairs.row import Row
from services.pairs.source import Source, open_source
from services.pairs.validation import validate
from services.storage import files, sources
from services.storage.sources import SourceRules
from tests.support.pairs_file import write_pairs
from tests.support.s3_server import Fault, serve_s3
from tests.support.source_kinds import (
    ALL_ROWS,
    DECIDED,
    FORMATS,
    KINDS,
    ROWS,
    expected,
    json_lines,
    win_lose,
    write_lines,
)


def opened(uri: Path | str, **columns: str) -> Source:
    return open_source(DatasetSource(uri=files.as_uri(uri), columns=columns))  # type: ignore[arg-type]


def rows_of(source: Source, **kwargs) -> list[Row]:
    return [row for unit in source.units() for row in source.rows(unit, **kwargs)]


def content_of(source: Source) -> list[tuple]:
    """The content of a source without its positions: kind, caption, bytes of winner and loser, labels."""
    found = []
    for row in rows_of(source, with_images=True):
        sides = [
            tuple(source.load(row.images[slot]) for slot in (each.winner, each.loser))
            for each in row.preferences
        ]
        found.append((row.kind, row.caption, sides, [each.label for each in row.preferences]))
    return found


def refused(uri: Path | str, **columns: str) -> ServiceError:
    with pytest.raises((BadRequest, NotFound)) as error:
        rows_of(opened(uri, **columns))
    return error.value


# ---- the same pairs in every format


@pytest.mark.parametrize("kind", ["path_structs", "ranked_path_structs", "saved_paths"])
def test_an_image_that_is_read_by_its_path_has_the_path_as_uid_and_an_embedded_one_has_not(kind, tmp_path):
    for row in rows_of(opened(KINDS[kind](tmp_path / "data")), with_images=True):
        for uid, image in zip(row.uids, row.images, strict=True):
            assert (uid == image) == isinstance(image, str)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_yields_the_same_content_for_the_same_pairs(kind, tmp_path):
    source = opened(KINDS[kind](tmp_path / "data"))
    assert source.format == FORMATS.get(kind, "parquet")
    assert content_of(source) == expected(ROWS if kind in ALL_ROWS else DECIDED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_with_and_without_its_images_and_from_any_start(kind, tmp_path):
    source = pickle.loads(pickle.dumps(opened(KINDS[kind](tmp_path / "data"))))
    for unit in source.units():
        light, full = list(source.rows(unit)), list(source.rows(unit, with_images=True))
        assert [vars(row) | {"images": ()} for row in full] == [vars(row) for row in light]
        part = list(source.rows(pickle.loads(pickle.dumps(unit)), with_images=True, start=2, stop=5))
        assert [vars(row) for row in part] == [vars(row) for row in full[2:5]]
        assert unit.rows in (None, len(full))
    keys = [row.key for row in rows_of(source)]
    assert len(set(keys)) == len(keys)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.env.items():
            environment.setenv(name, value)
        yield server


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"json_lines_uris"}))
def test_a_source_in_an_object_store_yields_the_same_as_on_disk(kind, server, tmp_path):
    local = KINDS[kind](tmp_path / "data")
    uri = f"s3://bucket/{kind}"
    files.copy_folder((tmp_path / "data").as_uri(), uri)
    remote = opened(
        files.join(uri, local.relative_to(tmp_path / "data").as_posix()) if local.is_file() else uri
    )
    assert content_of(remote) == content_of(opened(local))
    assert [vars(row) for row in rows_of(remote)] == [vars(row) for row in rows_of(opened(local))]
    assert remote.load("pictures/nowhere.png") is None
    for path in ("/etc/hostname", "../a.png", "file:///etc/hostname"):
        assert cause_of(remote, path) == "image_outside"


def test_a_small_row_group_without_its_images_takes_one_request_for_bytes(server, tmp_path):
    files.upload(write_pairs(tmp_path / "a.parquet", ROWS, row_group_size=4), "s3://bucket/requests.parquet")
    source = opened("s3://bucket/requests.parquet")
    units = list(source.units())
    server.inject()
    assert sum(1 for unit in units for _ in source.rows(unit)) == 24
    assert server.counts["GET"] == len(units) == 6


def test_a_failing_object_store_is_not_reported_as_a_missing_image(server, tmp_path):
    json_lines(tmp_path / "data")
    files.copy_folder((tmp_path / "data").as_uri(), "s3://bucket/failing")
    lines = opened("s3://bucket/failing/pairs.jsonl")
    (row,) = lines.rows(next(iter(lines.units())), with_images=True, stop=1)
    server.inject(Fault("slow_down"))
    with pytest.raises(OSError, match="AWS Error"):
        lines.load(row.images[0])
    server.inject()
    assert lines.load(row.images[0]) == ROWS[0]["jpg_0"]


# ---- columns


def renamed(path: Path, **names: str) -> Path:
    return write_pairs(path, [{names.get(name, name): value for name, value in row.items()} for row in ROWS])


def test_columns_with_other_names_are_mapped_and_the_rest_is_reported_as_not_read(tmp_path):
    path = renamed(tmp_path / "a.parquet", caption="prompt", jpg_0="left", image_1_uid="second")
    source = opened(path, caption="prompt", jpg_0="left")
    assert content_of(source) == expected(ROWS)
    assert (source.columns["caption"], source.columns["jpg_1"], source.unused_columns) == (
        "prompt",
        "jpg_1",
        ("second",),
    )


def test_a_mapped_column_that_is_missing_is_refused_with_the_columns_found(tmp_path):
    error = refused(renamed(tmp_path / "a.parquet", caption="prompt"), caption="promt")
    assert (error.param, error.code) == ("columns", "missing_columns")
    assert str(error).startswith("columns.caption: ")
    assert "no column 'promt'; found: jpg_0, jpg_1, label_0, label_1, prompt, image_0_uid" in str(error)


@pytest.mark.parametrize("name", ["jpg_0", "jpg_1", "label_0", "label_1", "caption"])
def test_a_required_column_that_is_missing_is_named(name, tmp_path):
    error = refused(renamed(tmp_path / "a.parquet", **{name: "other"}))
    assert (error.param, error.code) == ("uri", "missing_columns")
    assert f"lacks the columns {name}; found: " in str(error)


def test_files_without_a_readable_column_are_refused_with_every_set_of_columns(tmp_path):
    error = refused(write_lines(tmp_path / "a.jsonl", [{"text": "a"}]))
    assert "(jpg_0, jpg_1, label_0, label_1, caption or chosen, rejected, caption or images, caption)" in str(
        error
    )
    assert str(error).endswith("found: text")


def test_a_mapping_decides_between_shapes_of_rows_and_must_fit_the_one_it_decides_for(tmp_path):
    rows = [row | {"a": row["jpg_0"], "rejected": row["jpg_1"], "views": [b"1", b"2"]} for row in ROWS]
    path = write_pairs(tmp_path / "a.parquet", rows)
    assert opened(path).shape == "pair"
    assert opened(path, chosen="a").shape == "chosen"
    assert opened(path, images="views").shape == "ranking"
    error = refused(path, ranks="label_0")
    assert "columns.ranks: is not read beside jpg_0" in str(error)
    assert "a is read for two columns" in str(refused(path, jpg_0="a", jpg_1="a"))


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("caption", pa.array([3] * 24)),
        ("label_0", pa.array(["1"] * 24)),
        ("jpg_1", pa.array([1.0] * 24)),
        ("image_0_uid", pa.array([1.5] * 24)),
        ("has_label", pa.array(["yes"] * 24)),
    ],
)
def test_a_column_of_the_wrong_type_is_refused_by_name(name, column, tmp_path):
    table = pa.Table.from_pylist(ROWS)
    table = table.drop_columns([name] if name in table.column_names else []).append_column(name, column)
    pq.write_table(table, tmp_path / "a.parquet")
    error = refused(tmp_path / "a.parquet")
    assert f"column {name} of " in str(error)
    assert f"has the wrong type {column.type}" in str(error)
    assert error.code == "wrong_column_type"


def test_a_later_file_that_lacks_a_column_is_refused_when_it_is_read(tmp_path):
    write_pairs(tmp_path / "0.parquet", ROWS[:3])
    write_pairs(tmp_path / "1.parquet", [{k: v for k, v in row.items() if k != "caption"} for row in ROWS])
    assert "1.parquet' lacks the columns caption" in str(refused(tmp_path))


def test_a_file_with_two_columns_of_one_name_is_refused(tmp_path):
    names = ["chosen", "rejected", "caption", "caption"]
    pq.write_table(pa.table([pa.array(["x"])] * 4, names=names), tmp_path / "a.parquet")
    error = refused(tmp_path / "a.parquet")
    assert (error.code, "several columns called caption" in str(error)) == ("repeated_columns", True)


def test_columns_that_are_null_throughout_are_read_as_nulls(tmp_path):
    rows = [
        row | {"image_0_uid": None, "image_1_uid": None, "has_label": None, "caption": None} for row in ROWS
    ]
    found = rows_of(opened(write_pairs(tmp_path / "a.parquet", rows)))
    assert [row.cause for row in found] == ["caption_missing"] * 24


def test_text_of_any_arrow_type_is_read_and_a_cell_that_is_not_utf8_affects_no_other(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    broken = pa.array([row["caption"].encode() for row in ROWS[:-1]] + [b"\xff\xfe"]).view(pa.string())
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        captions = table["caption"].cast(kind)
        pq.write_table(table.set_column(4, "caption", captions), tmp_path / "a.parquet")
        assert content_of(opened(tmp_path / "a.parquet")) == expected(ROWS)
    pq.write_table(table.set_column(4, "caption", broken), tmp_path / "a.parquet")
    found = rows_of(opened(tmp_path / "a.parquet"))
    assert [row.cause for row in found] == [""] * 23 + ["not_unicode"]


# ---- folders that are refused


def test_a_folder_of_splits_is_refused_naming_them(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test_unique"]}')
    assert "holds several splits: test_unique, train; name one" in str(refused(tmp_path))
    write_pairs(tmp_path / "hub" / "data" / "valid-00000-of-00001.parquet", ROWS)
    write_pairs(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", ROWS)
    assert "holds several splits: test, validation; name one" in str(refused(tmp_path / "hub"))


@pytest.mark.parametrize(
    "content", ["no json", "[]", '{"splits": []}', '{"splits": [3]}', '{"splits": ["../x"]}']
)
def test_a_list_of_splits_that_is_broken_is_refused(content, tmp_path):
    (tmp_path / "dataset_dict.json").write_text(content)
    assert "dataset_dict.json that names no splits" in str(refused(tmp_path))


@pytest.mark.parametrize(
    "state", ["no json", "{}", '{"_data_files": []}', '{"_data_files": [{"filename": "../x.arrow"}]}']
)
def test_a_saved_dataset_with_a_broken_state_is_refused(state, tmp_path):
    (tmp_path / "state.json").write_text(state)
    assert "state.json" in str(refused(tmp_path))


def test_a_uri_without_usable_files_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "a.parquet.txt").write_text("x")
    assert "holds no file of rows; found: 2 .txt" in str(refused(tmp_path))
    assert refused(tmp_path / "nowhere").code == "not_found"
    assert refused(tmp_path / "note.txt").code == "unknown_format"
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut off")
    assert refused(tmp_path / "cut.parquet").code == "not_parquet"
    assert "is not a complete Parquet file" in str(refused(tmp_path / "cut.parquet"))
    (tmp_path / "a.arrow").write_bytes(b"not arrow")
    assert refused(tmp_path / "a.arrow").code == "not_arrow"
    (tmp_path / "a.jsonl").write_text("[1]\n\n{broken\n")
    assert refused(tmp_path / "a.jsonl").code == "not_jsonl"


# ---- JSON lines


def test_a_broken_line_is_a_bad_row_at_its_position(tmp_path):
    lines = [json.dumps({"chosen": "a", "rejected": "b", "caption": "x"})] * 3
    broken = [
        '{"chosen": ',
        "[1, 2]",
        "null",
        "[" * 100_000,
        '{"caption": ' + "9" * 5000 + "}",
        "\x00",
        "\ufeff",
    ]
    content = (
        "\n".join([lines[0], *broken, "", "   ", lines[1], lines[2]]).encode()
        + b"\n\xff\xfe{}\n"
        + lines[0].encode()
    )
    (tmp_path / "a.jsonl").write_bytes(content)
    found = rows_of(opened(tmp_path / "a.jsonl"))
    assert [row.cause for row in found] == ["", *["json_broken"] * 7, "", "", "json_broken", ""]
    assert found[1].detail == "the line at byte 49: Expecting value at character 12"
    assert found[2].detail == "the line at byte 61 is a list, must be an object"


def test_ranges_of_a_file_hold_every_line_once(tmp_path, monkeypatch):
    rows = [
        {"chosen": f"{i}.png", "rejected": "b" * (i % 7), "caption": "ü" * (i % 50 + 1)} for i in range(300)
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    whole = [row.caption for row in rows_of(opened(path))]
    assert whole == [row["caption"] for row in rows]
    for size in (1, 17, 64, 1000):
        monkeypatch.setattr(path_based, "RANGE_BYTES", size)
        assert [row.caption for row in rows_of(opened(path))] == whole


def test_a_line_longer_than_the_limit_is_one_bad_row_whatever_range_it_ends_in(tmp_path, monkeypatch):
    good = json.dumps({"chosen": "a", "rejected": "b", "caption": "x"})
    monkeypatch.setattr(path_based, "MAX_LINE_BYTES", 1000)
    for size in (64, 300, 1 << 20):
        monkeypatch.setattr(path_based, "RANGE_BYTES", size)
        for length in (999, 1000, 1001, 5000):
            (tmp_path / "a.jsonl").write_text(f"{good}\n{'x' * length}\n{good}\n{'y' * 1500}")
            cause = "json_broken" if length < 1000 else "line_too_long"
            assert [row.cause for row in rows_of(opened(tmp_path / "a.jsonl"))] == [
                "",
                cause,
                "",
                "line_too_long",
            ]


# ---- win and lose folders


def test_an_image_without_partner_or_caption_and_a_stem_with_two_images_are_bad_rows(tmp_path):
    for name in (
        "win/a.png",
        "lose/a.jpg",
        "a.txt",
        "win/b.png",
        "b.txt",
        "lose/c.png",
        "win/d.png",
        "lose/d.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in (
        "win/e.png",
        "win/e.jpg",
        "lose/e.png",
        "win/e.txt",
        "win/.DS_Store",
        "win/f.png",
        "lose/f.png",
    ):
        (tmp_path / name).write_text(name)
    (tmp_path / "win" / "f.txt").write_bytes(b"\xff\xff")
    found = rows_of(opened(tmp_path))
    causes = ["", "partner_missing", "partner_missing", "caption_missing", "stem_twice", "not_unicode"]
    assert [row.cause for row in found] == causes
    assert (found[0].caption, found[0].uids) == ("a.txt", ("win/a.png", "lose/a.jpg"))


def test_sidecars_system_files_and_masks_are_no_images_and_are_reported(tmp_path):
    folder = win_lose(tmp_path / "data")
    for side in ("win", "lose"):
        for name in ("p000.json", "p000.npz", "p001.safetensors", "Thumbs.db", "desktop.ini", ".DS_Store"):
            (folder / side / name).write_bytes(b"x")
        for name in ("p000_mask.png", "p000-masklabel.png", "masks/p001.png", "p001.mask.png"):
            (folder / side / name).parent.mkdir(exist_ok=True)
            (folder / side / name).write_bytes(ROWS[0]["jpg_0"])
    source = opened(folder)
    assert content_of(source) == expected(DECIDED)
    assert source.files_not_read == {
        ".db": 2,
        ".ini": 2,
        ".json": 2,
        ".npz": 2,
        ".safetensors": 2,
        "masks": 8,
    }


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".caption", ".Caption"])
@pytest.mark.parametrize("side", ["win", "lose", ""])
def test_a_caption_may_be_beside_either_image_or_above_with_a_suffix_in_any_case(suffix, side, tmp_path):
    folder = win_lose(tmp_path / "data")
    for file in list(folder.glob("*.txt")):
        file.rename(folder / side / f"{file.stem}{suffix}")
    assert content_of(opened(folder)) == expected(DECIDED)


def test_names_in_either_unicode_form_are_one_stem(tmp_path):
    names = {"win": unicodedata.normalize("NFC", "café ü"), "lose": unicodedata.normalize("NFD", "café ü")}
    for side, stem in names.items():
        (tmp_path / side).mkdir()
        (tmp_path / side / f"{stem}.png").write_bytes(side.encode())
    (tmp_path / f"{names['lose']}.txt").write_text("a cup")
    source = opened(tmp_path)
    (row,) = rows_of(source, with_images=True)
    assert (row.kind, row.caption) == ("decided", "a cup")
    assert [source.load(image) for image in row.images] == [b"win", b"lose"]


def test_images_in_folders_below_the_sides_are_paired_by_their_paths(tmp_path):
    for part in ("a", "b"):
        for side in ("win", "lose"):
            (tmp_path / side / part).mkdir(parents=True)
            (tmp_path / side / part / "1.png").write_bytes(f"{side} {part}".encode())
        (tmp_path / "win" / part / "1.txt").write_text(part)
    assert [(row.caption, row.uids) for row in rows_of(opened(tmp_path))] == [
        (part, (f"win/{part}/1.png", f"lose/{part}/1.png")) for part in ("a", "b")
    ]


@pytest.mark.parametrize("names", [("Win", "LOSE"), ("winner", "loser"), ("preferred", "rejected")])
def test_the_two_folders_may_have_any_of_their_usual_names(names, tmp_path):
    assert content_of(opened(win_lose(tmp_path / "data", names))) == expected(DECIDED)


def test_a_pair_whose_two_captions_differ_is_bad(tmp_path):
    folder = win_lose(tmp_path / "data", captions="win")
    (folder / "lose" / "p000.txt").write_text((folder / "win" / "p000.txt").read_text())
    (folder / "lose" / "p001.txt").write_text("another prompt")
    first, second, *_ = rows_of(opened(folder))
    assert first.kind == "decided"
    assert second.detail == "win/p001.txt and lose/p001.txt hold different captions"


def test_a_side_without_a_readable_image_is_refused_with_what_it_holds(tmp_path):
    folder = win_lose(tmp_path / "data")
    for file in (folder / "lose").iterdir():
        file.rename(file.with_suffix(".heic"))
    error = refused(folder)
    assert error.code == "no_image"
    assert f"lose' holds no image; found: {len(DECIDED)} .heic; images that can be read are JPEG" in str(
        error
    )


def test_every_bad_pair_of_folders_names_its_file(tmp_path):
    for side in ("win", "lose"):
        (tmp_path / side).mkdir()
        for stem in ("empty", "none", "long", "broken", "null", "twice"):
            (tmp_path / side / f"{stem}.png").write_bytes(b"x")
    (tmp_path / "win" / "alone.png").write_bytes(b"x")
    (tmp_path / "lose" / "twice.jpg").write_bytes(b"x")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "win" / "long.txt").write_text("x" * 10_001)
    (tmp_path / "win" / "broken.txt").write_bytes(b"\xff\xff")
    (tmp_path / "win" / "null.caption").write_text("a\0b")
    assert {(row.cause, row.detail) for row in rows_of(opened(tmp_path))} == {
        ("partner_missing", "win/alone.png: no image 'alone' in lose"),
        ("not_unicode", "win/broken.txt is not UTF-8"),
        ("caption_missing", "empty.txt is empty"),
        ("caption_missing", "win/none.txt does not exist"),
        ("caption_too_long", "win/long.txt has more than 10,000 characters"),
        ("caption_null_byte", "win/null.caption holds a null byte"),
        ("stem_twice", "win/twice.png, lose/twice.jpg, lose/twice.png"),
    }


def test_a_caption_file_of_megabytes_is_too_long_and_not_read(tmp_path):
    for name in ("win/a.png", "lose/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "a.txt").write_text("🙂" * 2_000_000)
    (row,) = rows_of(opened(tmp_path))
    assert (row.cause, row.caption) == ("caption_too_long", "")


# ---- images


NOWHERE = ["nowhere.png", ".", "a\0b", "x" * 5000, "a.jsonl/b.png", "sub/../nowhere.png"]
UNREACHABLE = ["ftp://h/a.png", "s3://", "http://[", "file://host/x"]
OUTSIDE = [
    "/dev/zero",
    "/etc/hostname",
    "file:///etc/hostname",
    "../beside.png",
    "file:///{0}/../beside.png",
    "//etc",
    "/\0",
]


def cause_of(source: Source, path: str) -> str:
    with pytest.raises(BadImage) as refused:
        source.load(path)
    return refused.value.cause


@pytest.mark.parametrize("path", NOWHERE)
def test_a_path_that_leads_to_no_file_is_a_missing_image(path, tmp_path):
    source = opened(write_lines(tmp_path / "a.jsonl", [{"chosen": path, "rejected": "b", "caption": "x"}]))
    assert source.load(path) is None


@pytest.mark.parametrize("path", UNREACHABLE)
def test_a_uri_that_cannot_be_opened_is_an_unreachable_image(path, tmp_path):
    source = opened(write_lines(tmp_path / "a.jsonl", [{"chosen": path, "rejected": "b", "caption": "x"}]))
    assert cause_of(source, path) == "image_unreachable"


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("folder", [False, True])
def test_a_row_cannot_name_a_file_outside_of_the_datasets_folder(path, folder, tmp_path):
    (tmp_path / "beside.png").write_bytes(b"secret")
    file = write_lines(tmp_path / "data" / "a.jsonl", [{"chosen": "a", "rejected": "b", "caption": "x"}])
    assert cause_of(opened(file.parent if folder else file), path.format(file.parent)) == "image_outside"


def test_an_image_may_be_named_by_any_path_below_the_folder_also_through_links(tmp_path):
    real = tmp_path / "real"
    link = tmp_path / "link"
    write_lines(real / "a.jsonl", [{"chosen": "a", "rejected": "b", "caption": "x"}])
    link.symlink_to(real)
    (tmp_path / "blob").write_bytes(b"linked")
    (real / "ü a.png").write_bytes(b"plain")
    (real / "b.png").symlink_to(tmp_path / "blob")
    for uri in (real.as_uri(), link.as_uri()):
        source = opened(uri)
        for folder in (real, link):
            image = folder / "ü a.png"
            assert source.load(str(image)) == source.load(image.as_uri()) == b"plain"
        assert (source.load("x/../ü a.png"), source.load("b.png")) == (b"plain", b"linked")


def test_an_unreachable_image_outside_the_dataset_is_a_bad_image(server, tmp_path):
    json_lines(tmp_path / "data")
    lines = opened(tmp_path / "data")
    files.write_bytes("s3://bucket/elsewhere.png", b"there")
    assert lines.load("s3://bucket/elsewhere.png") == b"there"
    assert lines.load("s3://bucket/nowhere.png") is None
    assert cause_of(lines, "s3://no-such-bucket/a.png") == "image_unreachable"
    server.inject(Fault("slow_down"))
    assert cause_of(lines, "s3://bucket/elsewhere.png") == "image_unreachable"
    server.inject()


def test_a_bucket_without_credentials_makes_its_rows_bad_and_is_requested_once(server, tmp_path, monkeypatch):
    requested = []
    resolve = files.resolve

    def refusing(uri: str):
        if uri.startswith("s3://"):
            requested.append(uri)
            raise BadRequest("no credentials", param="uri", code="no_credentials")
        return resolve(uri)

    monkeypatch.setattr(files, "resolve", refusing)
    rows = [{"chosen": f"s3://private/{n}.png", "rejected": "b.png", "caption": "x"} for n in range(5)]
    report = validate(opened(write_lines(tmp_path / "a.jsonl", rows)))
    assert {cause: bad.count for cause, bad in report.bad.items()} == {"image_unreachable": 5}
    assert requested == ["s3://private/0.png"]


def test_no_more_of_an_image_is_read_than_the_limit(tmp_path):
    source = opened(write_lines(tmp_path / "a.jsonl", [{"chosen": "a", "rejected": "b", "caption": "x"}]))
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(4 * MAX_FILE_BYTES)
    assert len(source.load("huge.png") or b"") == MAX_FILE_BYTES + 1
    assert (source.load(b"bytes"), source.load(None)) == (b"bytes", None)


def test_a_process_that_receives_a_source_is_held_to_the_rules_of_the_one_that_opened_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"chosen": "a", "rejected": "b", "caption": "x"}\n')
    rules = SourceRules((str(tmp_path),))
    sources.hold_to(rules)
    sent = pickle.dumps(opened(tmp_path / "a.jsonl"))
    sources.hold_to(SourceRules())
    received = pickle.loads(sent)
    assert sources.rules() == rules
    assert [row.caption for unit in received.units() for row in received.rows(unit)] == ["x"]


# ---- memory


def peak_bytes(uri: Path, with_images: bool) -> tuple[int, int]:
    """Peak memory of Python and of Arrow, each by its own count, while a subprocess reads all rows."""
    code = f"""
import tracemalloc, pyarrow
from services.api.requests import DatasetSource
from services.pairs.source import open_source
from services.storage import sources
from tests.support.open_sources import EVERYWHERE
sources.hold_to(EVERYWHERE)
source = open_source(DatasetSource(uri={str(uri)!r}))
tracemalloc.start()
rows = sum(1 for unit in source.units() for row in source.rows(unit, with_images={with_images}))
print(tracemalloc.get_traced_memory()[1], pyarrow.default_memory_pool().max_memory())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    python, arrow = map(int, done.stdout.split())
    return python, arrow


@pytest.mark.parametrize("with_images", [False, True])
def test_a_row_group_of_any_size_is_read_in_bounded_memory(with_images, tmp_path):
    rows = [
        {"chosen": bytes([i % 251]) * 4000, "rejected": b"1" * 4000, "caption": f"caption {i}"}
        for i in range(20_000)
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=len(rows), use_dictionary=False, compression="none"
    )
    assert path.stat().st_size > 160_000_000
    assert pq.ParquetFile(path).num_row_groups == 1
    python, arrow = peak_bytes(path, with_images)
    assert python < 8 << 20
    assert arrow < 32 << 20


def test_a_line_of_many_megabytes_is_not_kept_in_memory(tmp_path):
    good = json.dumps({"chosen": "a", "rejected": "b", "caption": "x"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{'x' * 100_000_000}\n{good}\n")
    python, _ = peak_bytes(tmp_path / "a.jsonl", False)
    assert python < 16 << 20
