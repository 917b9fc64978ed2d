"""Which files of a dataset are read: splits are never mixed, and what cannot be read is named."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest

from services.api.requests import DatasetSource
from services.errors import BadRequest, NotFound, ServiceError
from services.pairs.source import Source, open_source
from services.pairs.splits import split_of_name
from services.pairs.validation import inspect, validate
from services.storage import files
from tests.support.pairs_file import pair_rows, png, write_pairs
from tests.support.source_kinds import (
    add_member,
    as_paths,
    image_folder,
    json_list,
    saved_to_disk,
    webdataset,
    win_lose,
    write_lines,
)

ROWS = pair_rows(12, seed=8)
PAIR = {"chosen": "a", "rejected": "b", "caption": "x"}


def opened(uri: Path | str, split: str | None = None, **columns: str) -> Source:
    return open_source(DatasetSource(uri=files.as_uri(uri), columns=columns, split=split))  # type: ignore[arg-type]


def refused(uri: Path | str, split: str | None = None, **columns: str) -> ServiceError:
    with pytest.raises((BadRequest, NotFound)) as error:
        inspect(opened(uri, split, **columns))
    return error.value


def causes(source: Source) -> list[str]:
    return [row.cause for unit in source.units() for row in source.rows(unit, with_images=True)]


# ---- splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.parquet", "train"),
        ("data/train-00000-of-00003.parquet", "train"),
        ("data/train-00000-of-00003-0123456789abcdef.parquet", "train"),
        ("pick-a-pic-train-00000-of-00002.arrow", "train"),
        ("pick-validation.arrow", "validation"),
        ("data/test_unique-00000-of-00001.parquet", "test_unique"),
        ("my_dev_set.jsonl.gz", "validation"),
        ("Training/0.parquet", "train"),
        ("test/metadata.jsonl", "test"),
        ("eval.json", "test"),
        ("test/train.csv", "train"),
        ("trainPairs.parquet", "train"),
        ("held_out/0.parquet", "test"),
        ("split=validation/0.parquet", "validation"),
        ("train-000001.tar", "train"),
        ("pairs.parquet", None),
        ("contest/trained.parquet", None),
        ("a b/0.parquet", None),
    ],
)
def test_a_file_belongs_to_the_split_that_its_name_or_folder_names(name, split):
    assert split_of_name(name) == split


def two_files(folder: Path, first: str, second: str) -> Path:
    write_pairs(folder / first, ROWS[:8])
    write_pairs(folder / second, ROWS[8:])
    return folder


def arrow_file(path: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def datasets_cache(folder: Path) -> Path:
    """As `load_dataset` caches a dataset, with the result of a `map`."""
    arrow_file(folder / "pick-train-00000-of-00002.arrow", ROWS[:4])
    arrow_file(folder / "pick-train-00001-of-00002.arrow", ROWS[4:8])
    arrow_file(folder / "pick-test.arrow", ROWS[8:])
    arrow_file(folder / "cache-0123456789abcdef.arrow", ROWS[:6])
    (folder / "dataset_info.json").write_text("{}")
    return folder


def saved_splits(folder: Path, with_dict: bool = True) -> Path:
    for split, rows in (("train", ROWS[:8]), ("test", ROWS[8:])):
        arrow_file(folder / split / "data-00000-of-00001.arrow", rows)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / split / "state.json").write_text(json.dumps(state))
    if with_dict:
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder


def image_folders(folder: Path) -> Path:
    write_lines(folder / "train" / "metadata.jsonl", as_paths(folder / "train", ROWS[:8]))
    write_lines(folder / "test" / "metadata.jsonl", as_paths(folder / "test", ROWS[8:]))
    return folder


def tars(folder: Path) -> Path:
    for split, rows in (("train", ROWS[:8]), ("test", ROWS[8:])):
        webdataset(folder / split, rows)
    return folder


def declared(folder: Path) -> Path:
    two_files(folder, "most.parquet", "rest.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: most.*\n"
        "  - split: test\n    path: [rest.parquet]\n---\n# Pairs\n"
    )
    return folder


SPLITS: dict[str, Callable[[Path], Path]] = {
    "two files": lambda folder: two_files(folder, "train.parquet", "test.parquet"),
    "two folders": lambda folder: two_files(folder, "train/0.parquet", "test/0.parquet"),
    "the hub's names": lambda folder: two_files(
        folder, "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"
    ),
    "a datasets cache": datasets_cache,
    "saved splits": saved_splits,
    "saved splits without their list": lambda folder: saved_splits(folder, with_dict=False),
    "image folders": image_folders,
    "tars": tars,
    "declared in README.md": declared,
}


@pytest.mark.parametrize("kind", SPLITS)
def test_several_splits_are_refused_by_name_and_one_is_read_on_request(kind, tmp_path):
    folder = SPLITS[kind](tmp_path / "data")
    error = refused(folder)
    assert error.code == "splits"
    assert "holds several splits: test, train; name one of them as split (--split train)" in str(error)
    for split, rows in (("train", 8), ("test", 4)):
        source = opened(folder, split)
        assert (inspect(source)[0].rows, source.split) == (rows, split)
        assert validate(source).split == split
        assert validate(source).bad == {}
    error = refused(folder, "unknown")
    assert (error.param, error.code) == ("split", "splits")
    assert "split 'unknown' is not in" in str(error)
    assert "found: test, train" in str(error)


def test_win_and_lose_folders_of_several_splits_are_refused_and_one_is_read_on_request(tmp_path):
    for split in ("train", "validation"):
        win_lose(tmp_path / split)
    assert "several splits: train, validation" in str(refused(tmp_path))
    source = opened(tmp_path, "val")
    assert (source.split, set(causes(source))) == ("validation", {""})
    (row, *_) = source.rows(next(source.units()), with_images=True)
    assert source.load(row.images[0]) == (tmp_path / "validation/win/p000.png").read_bytes()


def test_rows_that_name_images_in_win_and_lose_folders_are_read_as_rows(tmp_path):
    win_lose(tmp_path / "images")
    row = {"chosen": "images/win/p000.png", "rejected": "images/lose/p000.jpeg", "caption": "x"}
    write_lines(tmp_path / "pairs.jsonl", [row])
    (tmp_path / "images" / "win" / "p000.json").write_text("{}")
    assert (opened(tmp_path).format, inspect(opened(tmp_path))[0].rows) == ("jsonl", 1)
    (tmp_path / "pairs.jsonl").unlink()
    assert opened(tmp_path).format == "folders"


def test_a_split_beside_files_of_no_split_is_refused(tmp_path):
    two_files(tmp_path, "pairs.parquet", "test.parquet")
    assert "several splits: test, and files of no split (pairs.parquet)" in str(refused(tmp_path))


def test_a_folder_of_one_split_is_read_and_the_report_names_it(tmp_path):
    two_files(tmp_path, "train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    source = opened(tmp_path)
    assert (inspect(source)[0].rows, source.split) == (12, "train")
    two_files(tmp_path / "other", "part-00000-of-00002.parquet", "part-00001-of-00002.parquet")
    assert opened(tmp_path / "other").split is None


def test_rows_of_several_splits_in_one_file_are_refused(tmp_path):
    rows = [row | {"split": "train" if number < 9 else "test"} for number, row in enumerate(ROWS)]
    path = write_pairs(tmp_path / "a.parquet", rows)
    for read in (inspect, validate):
        with pytest.raises(BadRequest, match="by its column 'split': test, train; write a file of each"):
            read(opened(path))
    one = write_pairs(tmp_path / "b.parquet", rows[:9])
    assert inspect(opened(one))[0].rows == 9
    lines = write_lines(tmp_path / "c.jsonl", [PAIR | {"Subset": "train"}, PAIR | {"Subset": "val"}, PAIR])
    assert "by its column 'Subset': train, validation" in str(refused(lines))
    styles = [PAIR | {"subset": style} for style in ("anime", "photo")]
    assert inspect(opened(write_lines(tmp_path / "d.jsonl", styles)))[0].rows == 2


def test_parts_that_are_missing_are_reported(tmp_path):
    two_files(
        tmp_path, "data/train-00000-of-00005.parquet", "data/train-00003-of-00005-0123456789abcdef.parquet"
    )
    assert validate(opened(tmp_path)).parts_missing == 3


def test_a_saved_selection_is_refused_for_its_files_hold_other_rows(tmp_path):
    folder = saved_to_disk(tmp_path / "data")
    state = json.loads((folder / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    assert "save it again after `flatten_indices()`" in str(refused(folder))


def test_a_split_of_a_single_file_is_refused(tmp_path):
    error = refused(write_pairs(tmp_path / "train.parquet", ROWS), "train")
    assert (error.param, error.code) == ("split", "splits")


def test_a_folder_of_several_datasets_revisions_or_configurations_is_refused(tmp_path):
    for name in ("a", "b"):
        saved_to_disk(tmp_path / "saved" / name)
        arrow_file(tmp_path / "cached" / name / "pick.arrow", ROWS)
        write_pairs(tmp_path / "hub" / "snapshots" / (name * 40) / "pairs.parquet", ROWS)
        write_pairs(tmp_path / "configs" / name / "pairs.parquet", ROWS)
        win_lose(tmp_path / "sides" / name)
    readme = "---\nconfigs:\n- config_name: a\n- config_name: b\n---\n"
    (tmp_path / "configs" / "README.md").write_text(readme)
    for folder in ("saved", "cached", "sides", "configs"):
        error = refused(tmp_path / folder)
        assert error.code == "several_datasets"
        assert "a, b; name the folder of one of them" in str(error)
    assert "several revisions of a dataset: snapshots/aaaa" in str(refused(tmp_path / "hub"))


# ---- files that cannot be read


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", "x")
    return out.getvalue()


def feather() -> bytes:
    out = io.BytesIO()
    pyarrow.feather.write_feather(pa.table({"a": [1]}), out)
    return out.getvalue()


UNREADABLE = {
    "a.zip": (zipped(), "is a zip archive; unpack it"),
    "a.xlsx": (zipped(), "is an Excel workbook; save the sheet as CSV"),
    "a.pt": (zipped(), "is a PyTorch file"),
    "a.feather": (feather(), "is an Arrow file (Feather); write its rows as Parquet"),
    "a.db": (b"SQLite format 3\0" + bytes(100), "is an SQLite database; export the table: `sqlite3 -json"),
    "a.h5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
    "a.pkl": (b"\x80\x04\x95" + bytes(10), "is a Python pickle"),
    "a.png": (
        png(np.zeros((8, 8, 3), np.uint8)),
        "is a PNG image; one image; name the folder",
    ),
    "a.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    "b.parquet": (b"<!DOCTYPE html><html>sign in</html>", "is a web page; download the file itself"),
    "c.parquet": (b"", "is an empty file"),
    "a.csv": ("a,b".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
    "a.txt": (b"a red circle\n", "is a text file; write one JSON object a line, or a table"),
    "a.xml": (b"<?xml version='1.0'?><rows/>", "is an XML file"),
    "a.json": (b'{\n "a": 1\n}', "is one JSON object, not a list of rows"),
    "b.json": (b'{"info": {}, "pairs": [{"caption": "x"}]}', "`jq -c '.[\"pairs\"][]' FILE > rows.jsonl`"),
    "d.json": (b'{"prompt": {"0": "x"}, "images": {"0": []}}', "is one JSON object of columns, not of rows"),
    "c.json": (b"[1, 2]", "is a JSON list of values that are no objects"),
    "a.bin": (bytes(range(256)), "is a file of an unknown kind"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_with_what_can_and_what_to_do(name, tmp_path):
    content, expected = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path / name)
    assert error.param == "uri"
    assert expected in str(error)
    assert "can be read: Parquet, " in str(error)
    assert expected.removeprefix("is ") in str(refused(tmp_path))  # also where the folder is named


def test_json_files_that_describe_images_are_not_taken_for_rows(tmp_path):
    csv_file(tmp_path, "chosen,rejected,caption\na.png,b.png,x\n")
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text('{"prompt": "x", "seed": 1}')
    source = opened(tmp_path)
    assert (source.format, source.files_not_read) == ("csv", {".json": 2})


def test_a_file_is_read_by_its_content_whatever_its_name(tmp_path):
    write_pairs(tmp_path / "pairs.data", ROWS)
    write_lines(tmp_path / "lines.json", [PAIR])
    (tmp_path / "list.jsonl").write_text(json.dumps([PAIR, PAIR]))
    found = [opened(tmp_path / name).format for name in ("pairs.data", "lines.json", "list.jsonl")]
    assert found == ["parquet", "jsonl", "json"]


def test_a_pointer_among_parquet_files_is_refused_by_name(tmp_path):
    two_files(tmp_path, "0.parquet", "1.parquet")
    (tmp_path / "1.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "1.parquet' is a Git LFS pointer in place of the file; run `git lfs pull`" in str(
        refused(tmp_path)
    )


def test_a_folder_without_rows_is_refused_with_what_it_holds(tmp_path):
    assert "holds no files" in str(refused(tmp_path))
    for number in range(3):
        (tmp_path / f"{number}.zip").write_bytes(zipped())
    (tmp_path / "note.md").write_text("x")
    assert "found: 3 .zip, 1 .md; 0.zip is a zip archive; unpack it" in str(refused(tmp_path))


def test_what_is_no_regular_file_is_refused_or_passed_over_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for uri in (tmp_path / "pipe", Path("/dev/zero")):
        assert refused(uri).code == "not_a_file"
    (tmp_path / "pipe").unlink()
    for name in ("README.md", "state.json", "dataset_dict.json", "metadata.csv", "a.parquet"):
        os.mkfifo(tmp_path / name)
    write_lines(tmp_path / "pairs.jsonl", [PAIR])
    assert inspect(opened(tmp_path))[0].rows == 1


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", [PAIR])
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).touch()
    assert refused(tmp_path).code == "name_not_utf8"
    folder = win_lose(tmp_path / "data")
    Path(os.fsdecode(os.fsencode(folder / "win") + b"/\xff.png")).touch()
    assert refused(folder).code == "name_not_utf8"


def test_a_broken_description_of_a_folder_is_no_crash(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", [PAIR])
    for text in ("[" * 50_000, "- : [", "date: 2020-99-99", "x"):
        (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
        assert inspect(opened(tmp_path))[0].rows == 1
    for name in ("dataset_dict.json", "state.json"):
        (tmp_path / name).write_text("[" * 100_000)
        assert name in str(refused(tmp_path))
        (tmp_path / name).unlink()


def test_a_delta_table_is_refused_for_its_files_hold_deleted_rows(tmp_path):
    write_pairs(tmp_path / "0.parquet", ROWS)
    (tmp_path / "_delta_log").mkdir()
    assert "is a Delta table" in str(refused(tmp_path))


@pytest.mark.parametrize("uri", ["hf://datasets/me/pairs", "https://huggingface.co/datasets/me/pairs"])
def test_a_dataset_of_the_hub_is_refused_with_the_command_that_downloads_it(uri):
    assert "`hf download --repo-type dataset me/pairs --local-dir FOLDER`" in str(refused(uri))
    assert "copy it there first" in str(refused("https://example.com/a.parquet"))
    assert "hf download" in str(refused("me/pairs"))


def test_files_that_are_not_read_are_reported(tmp_path):
    image_folder(tmp_path)
    write_lines(tmp_path / "more.jsonl", [PAIR])
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".hidden").write_text("x")
    assert validate(opened(tmp_path)).files_not_read == {".jsonl": 1, ".md": 1}


# ---- columns


def test_a_column_that_may_order_a_rankings_images_is_not_ignored(tmp_path):
    row = {"images": ["a", "b"], "human_preference": [0, 1], "caption": "x"}
    path = write_lines(tmp_path / "a.jsonl", [row])
    error = refused(path)
    assert error.code == "order_unclear"
    assert "a column 'human_preference' that may say which image is better" in str(error)
    for columns, winner in (({"scores": "human_preference"}, 1), ({"ranks": ""}, 0)):
        (row_read,) = opened(path, **columns).rows(next(opened(path, **columns).units()))
        assert row_read.preferences[0].winner == winner


@pytest.mark.parametrize(
    ("name", "may_order"),
    [
        ("rank", True),
        ("humanPreference", True),
        ("overall_rating", True),
        ("border_color", False),
        ("id", False),
    ],
)
def test_a_column_may_order_images_if_a_word_of_its_name_says_so(name, may_order, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"images": ["a", "b"], name: 1, "caption": "x"}])
    if may_order:
        assert refused(path).code == "order_unclear"
    else:
        assert inspect(opened(path))[0].pairs == 1


def test_a_required_column_that_is_left_out_is_missing(tmp_path):
    assert refused(write_lines(tmp_path / "a.jsonl", [PAIR]), caption="").code == "missing_columns"


# ---- JSON lists


def json_file(folder: Path, text: str) -> Path:
    (folder / "a.json").write_text(text)
    return folder / "a.json"


@pytest.mark.parametrize("size", [1, 2, 7, 100, 1 << 16])
def test_a_list_is_read_whole_whatever_the_chunks(size, tmp_path, monkeypatch):
    monkeypatch.setattr("services.pairs.documents.CHUNK_CHARS", size)
    rows = [PAIR | {"caption": f"ü {number} ]}}", "n": number / 3} for number in range(40)]
    for text in (json.dumps(rows), json.dumps(rows, indent=2), f"\ufeff \n{json.dumps(rows)}\n\n"):
        source = opened(json_file(tmp_path, text))
        found = [row.caption for unit in source.units() for row in source.rows(unit)]
        assert found == [row["caption"] for row in rows]


@pytest.mark.parametrize(
    "cut",
    [lambda text: text[:-1], lambda text: text[:-30], lambda text: text + "x", lambda text: text[:-1] + ",]"],
)
def test_a_list_that_is_cut_off_or_broken_is_refused_and_not_read_in_part(cut, tmp_path):
    error = refused(json_file(tmp_path, cut(json.dumps([PAIR] * 50))))
    assert error.code == "not_json"
    assert "is not a complete JSON list: " in str(error)


def test_an_element_that_is_no_object_is_a_bad_row(tmp_path):
    source = opened(json_file(tmp_path, json.dumps([PAIR, 3, None, PAIR])))
    assert causes(source) == ["", "json_broken", "json_broken", ""]
    details = [row.detail for row in source.rows(next(source.units()))]
    assert details[1:3] == ["row 1 is a number, must be an object", "row 2 is null, must be an object"]


def test_a_row_longer_than_the_limit_ends_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("services.pairs.documents.MAX_ROW_CHARS", 1000)
    monkeypatch.setattr("services.pairs.documents.CHUNK_CHARS", 100)
    path = json_file(tmp_path, json.dumps([PAIR, PAIR | {"caption": "x" * 3000}]))
    assert "longer than 1,000 characters" in str(refused(path))


# ---- CSV


def csv_file(folder: Path, text: str | bytes) -> Path:
    (folder / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "a.csv"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_may_have_any_of_the_usual_delimiters_and_fields_over_several_lines(delimiter, tmp_path):
    text = '\ufeffchosen,rejected,caption\na.png,b.png,"two\nlines"\n\nc.png,d.png,x\n'.replace(
        ",", delimiter
    )
    source = opened(csv_file(tmp_path, text))
    rows = [(row.uids, row.caption) for row in source.rows(next(source.units()))]
    assert rows == [(("a.png", "b.png"), "two\nlines"), (("c.png", "d.png"), "x")]


def test_fields_are_read_as_their_columns_need_them(tmp_path):
    text = (
        "images,ranks,caption,has_label\n"
        '"[""a"", ""b""]","[2, 1]",x,TRUE\n"[\'a\', \'b\']","[1, 2]",y,1\n"[""a""]",,z,\na,1,v,no\n'
    )
    source = opened(csv_file(tmp_path, text))
    rows = list(source.rows(next(source.units())))
    assert [row.kind for row in rows] == ["decided", "decided", "missing", "bad"]
    assert [row.preferences[0].winner for row in rows[:2]] == [1, 0]
    assert rows[3].cause == "wrong_type"
    assert "has_label = 'no', must be a boolean" in rows[3].detail


def test_a_broken_line_of_a_table_is_a_bad_row_with_its_number(tmp_path):
    text = b"chosen,rejected,caption\na,b,x\na,b\na,b,x,y\na,b,\xff\xfe\na,b,x\n"
    source = opened(csv_file(tmp_path, text))
    rows = list(source.rows(next(source.units())))
    assert [row.cause for row in rows] == ["", "csv_broken", "csv_broken", "not_unicode", ""]
    assert rows[1].detail == "line 3 has 2 fields, the header 3"


@pytest.mark.parametrize("rows", ['a,b,"big cat\nc,d,x\ne,f,y\n', 'a,b,"big cat\nc,d,"x"\ne,f,y\n'])
def test_a_quote_that_is_not_closed_is_refused_for_it_takes_rows_in(rows, tmp_path):
    error = refused(csv_file(tmp_path, f"chosen,rejected,caption\n{rows}"))
    assert error.code == "not_csv"
    assert "has a quote that is not closed in the row of lines 2 to " in str(error)


def test_a_field_beyond_the_limit_is_one_bad_row(tmp_path):
    text = f"chosen,rejected,caption\na,b,{'x' * 200_000}\nc,d,x\n"
    assert causes(opened(csv_file(tmp_path, text))) == ["csv_broken", ""]


def test_a_table_with_a_repeated_column_or_no_header_is_refused(tmp_path):
    assert refused(csv_file(tmp_path, "caption,caption\na,b\n")).code == "not_csv"
    assert refused(csv_file(tmp_path, "one column\n")).code == "not_csv"


# ---- compressed files


@pytest.mark.parametrize("compression", ["gzip", "zstd", "bz2"])
def test_text_may_be_compressed_and_a_file_that_is_cut_off_is_refused(compression, tmp_path):
    lines = "".join(json.dumps(PAIR | {"caption": f"{number}"}) + "\n" for number in range(2000)).encode()
    path = tmp_path / "a.jsonl.gz"
    with pa.CompressedOutputStream(str(path), compression) as out:
        out.write(lines)
    assert inspect(opened(path))[0].rows == 2000
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises((OSError, BadRequest)):
        inspect(opened(path))


def test_several_compressed_parts_in_one_file_are_all_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(2 * gzip.compress(json.dumps(PAIR).encode() + b"\n"))
    assert inspect(opened(tmp_path / "a.jsonl.gz"))[0].rows == 2


# ---- webdataset tars


def tar_file(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add_member(tar, name, content)
    return path


def test_a_row_of_a_tar_may_hold_chosen_rejected_and_text(tmp_path):
    path = tar_file(
        tmp_path / "a.tar",
        {
            "x/1.chosen.png": b"1",
            "x/1.rejected.jpg": b"2",
            "x/1.txt": b"a cat\n",
            "x/1.cls": b"3",
            "README": b"r",
        },
    )
    source = opened(path)
    (row,) = source.rows(next(source.units()), with_images=True)
    assert (row.kind, row.caption, row.images) == ("decided", "a cat", (b"1", b"2"))
    assert source.unused_columns == ("cls",)


def test_a_compressed_tar_is_read_like_a_plain_one(tmp_path):
    folder = webdataset(tmp_path / "data", ROWS)
    plain = opened(folder / "000000.tar")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((folder / "000000.tar").read_bytes()))
    packed = opened(tmp_path / "a.tar.gz")
    for with_images in (False, True):
        rows = [
            [
                (row.uids, row.caption, row.images)
                for row in each.rows(next(each.units()), with_images=with_images)
            ]
            for each in (plain, packed)
        ]
        assert len(rows[0]) == 10
        assert rows[0] == rows[1]


def test_a_row_of_a_tar_without_its_labels_is_undecided_and_a_broken_one_bad(tmp_path):
    images = {"jpg_0": b"1", "jpg_1": b"2"}
    rest = json.dumps({"label_0": 1, "label_1": 0, "caption": "x"}).encode()
    rows = {
        "1": images | {"json": rest},
        "2": images,
        "3": images | {"json": b"{"},
        "4": {"jpg_0": b"1", "json": rest},
    }
    members = {f"{key}.{name}": content for key, row in rows.items() for name, content in row.items()}
    source = opened(tar_file(tmp_path / "a.tar", members))
    found = list(source.rows(next(source.units()), with_images=True))
    assert [row.kind for row in found] == ["decided", "missing", "bad", "decided"]
    assert found[2].detail.startswith("3.json: Expecting property name")
    assert found[3].images == (b"1", None)


@pytest.mark.parametrize(
    "damage", ["cut in a file", "cut between files", "a broken header", "another tar behind it"]
)
def test_a_tar_that_is_broken_or_cut_off_is_refused_and_not_read_in_part(damage, tmp_path):
    path = webdataset(tmp_path / "data", ROWS[:10]) / "000000.tar"
    (path.parent / "000001.tar").unlink()
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[15].offset
    data = path.read_bytes()
    broken = {
        "cut in a file": data[: middle + 600],
        "cut between files": data[:middle],
        "a broken header": data[:middle] + b"x" * 512 + data[middle + 512 :],
        "another tar behind it": data + data,
    }
    path.write_bytes(broken[damage])
    error = refused(path)
    assert error.code == "not_tar"
    assert "is not a complete tar" in str(error)


# ---- large lists


def test_a_published_dataset_is_read_by_its_own_column_names(tmp_path):
    assert opened(json_list(tmp_path / "a")).columns["caption"] == "caption"
    rows = [{"prompt": "x", "image_path": ["a", "b", "c"], "rank": [2, 1, 3], "raw_annotations": []}]
    source = opened(json_file(tmp_path, json.dumps(rows)))
    assert source.columns == {"images": "image_path", "ranks": "rank", "caption": "prompt"}
    (row,) = source.rows(next(source.units()))
    assert [(each.winner, each.loser) for each in row.preferences] == [(1, 0), (0, 2), (1, 2)]


def test_the_images_of_a_published_dataset_are_looked_for_beside_the_file_and_in_its_own_folder(tmp_path):
    for folder, names in (
        ("a/train", "{}.png"),
        ("b/train_images", "{}.png"),
        ("c", "train/{}.png"),
        ("d", "{}.png"),
    ):
        rows = [{"prompt": "x", "file_path": [names.format(0), names.format(1)], "human_preference": [0, 1]}]
        home = tmp_path / folder[0]
        for number in (0, 1):
            image = home / folder[2:] / names.format(number)
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(b"%d" % number)
        (home / "train.json").write_text(json.dumps(rows))
        source = opened(home / "train.json", caption="prompt")
        (row,) = source.rows(next(source.units()), with_images=True)
        assert [source.load(row.images[slot]) for slot in (row.preferences[0].winner, 0)] == [b"1", b"0"]
