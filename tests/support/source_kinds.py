"""The same 24 pairs in every supported format. Each function writes files and returns the path to read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.pairs_file import pair_rows, write_pairs

ROWS = pair_rows(24, seed=3)
DECIDED = [row for row in ROWS if row["label_0"] != row["label_1"]]


def winner(row: dict) -> int:
    return 0 if row["label_0"] > row["label_1"] else 1


def as_paths(folder: Path, rows: list[dict]) -> list[dict]:
    """The rows with their images in separate files below ``folder``."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    written = []
    for number, row in enumerate(rows):
        names = {side: f"pictures/ü {number}-{side}.png" for side in ("jpg_0", "jpg_1")}
        for side, name in names.items():
            (folder / name).write_bytes(row[side])
        written.append({name: value for name, value in row.items() if "uid" not in name} | names)
    return written


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_structs(rows: list[dict]) -> list[dict]:
    """As Hugging Face's Image feature writes cells."""
    return [
        row | {side: {"bytes": row[side], "path": "image.png"} for side in ("jpg_0", "jpg_1")} for row in rows
    ]


def parquet(folder: Path) -> Path:
    return write_pairs(folder / "pairs.parquet", ROWS, row_group_size=7)


def parquet_folder(folder: Path) -> Path:
    write_pairs(folder / "a b" / "0.parquet", ROWS[:10])
    write_pairs(folder / "ä%" / "1.parquet", ROWS[10:], row_group_size=3)
    return folder


def parquet_structs(folder: Path) -> Path:
    return write_pairs(folder / "pairs.parquet", as_structs(ROWS))


def parquet_paths(folder: Path) -> Path:
    write_pairs(folder / "pairs.parquet", as_paths(folder, ROWS))
    return folder


def hub_layout(folder: Path) -> Path:
    write_pairs(folder / "data" / "train-00000-of-00002.parquet", as_structs(ROWS[:10]))
    write_pairs(folder / "data" / "train-00001-of-00002-0123456789abcdef.parquet", as_structs(ROWS[10:]))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def saved_to_disk(folder: Path) -> Path:
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    table = pa.Table.from_pylist(as_structs(ROWS))
    for name, part in zip(names, (table.slice(0, 11), table.slice(11)), strict=True):
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(part, max_chunksize=4)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"})
    )
    (folder / "dataset_info.json").write_text("{}")
    return folder


def json_lines(folder: Path) -> Path:
    return write_lines(folder / "pairs.jsonl", as_paths(folder, ROWS))


def json_lines_folder(folder: Path) -> Path:
    for name, rows in (("a", ROWS[:5]), ("b", ROWS[5:])):
        write_lines(folder / name / "pairs.jsonl", as_paths(folder / name, rows))
    return folder


def json_lines_uris(folder: Path) -> Path:
    rows = [
        row | {side: (folder / row[side]).as_uri() for side in ("jpg_0", "jpg_1")}
        for row in as_paths(folder, ROWS)
    ]
    write_lines(folder / "lists" / "pairs.jsonl", rows)
    return folder


def image_folder(folder: Path) -> Path:
    rows = [
        {f"{name}_file_name" if "jpg" in name else name: row[name] for name in row}
        for row in as_paths(folder, ROWS)
    ]
    write_lines(folder / "metadata.jsonl", rows)
    return folder


def json_list(folder: Path) -> Path:
    (folder / "pairs.json").parent.mkdir(parents=True)
    (folder / "pairs.json").write_text(json.dumps(as_paths(folder, ROWS), indent=1))
    return folder / "pairs.json"


def hpd_json(folder: Path) -> Path:
    """As HPDv2 has its training rows: the images of `train.json` are in `train/`, and more is better."""
    rows = [
        {
            "prompt": row["caption"],
            "file_path": [row["jpg_0"], row["jpg_1"]],
            "human_preference": [row["label_0"], row["label_1"]],
        }
        for row in as_paths(folder / "train", ROWS)
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def image_reward_json(folder: Path) -> Path:
    """As ImageReward has its rows: rank 1 is the best, the images of `test.json` are in `test_images/`."""
    rows = [
        {
            "id": f"{number}",
            "prompt": row["caption"],
            "generations": [row["jpg_0"], row["jpg_1"]],
            "ranking": [2 - row["label_0"], 2 - row["label_1"]],
        }
        for number, row in enumerate(as_paths(folder / "test_images", ROWS))
    ]
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def json_lines_gz(folder: Path) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in as_paths(folder, ROWS))
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    return folder / "pairs.jsonl.gz"


def metadata_csv(folder: Path) -> Path:
    rows = [
        {f"{name}_file_name" if "jpg" in name else name: row[name] for name in row}
        for row in as_paths(folder, ROWS)
    ]
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def webdataset(folder: Path, rows: list[dict] = ROWS) -> Path:
    """Two tars of rows: an image in each column, and the rest in JSON."""
    folder.mkdir(parents=True)
    for number, part in enumerate((rows[:10], rows[10:])):
        with tarfile.open(folder / f"{number:06}.tar", "w") as tar:
            for index, row in enumerate(part):
                rest = {name: row[name] for name in ("label_0", "label_1", "caption")}
                add_member(tar, f"{index:04}.jpg_0", row["jpg_0"])
                add_member(tar, f"{index:04}.jpg_1.png", row["jpg_1"])
                add_member(tar, f"{index:04}.json", json.dumps(rest).encode())
    return folder


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def win_lose(folder: Path, names: tuple[str, str] = ("win", "lose"), captions: str = "") -> Path:
    for side, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number, row in enumerate(DECIDED):
            image = row["jpg_0"] if winner(row) == side else row["jpg_1"]
            (folder / name / f"p{number:03}.{('png', 'jpeg')[side]}").write_bytes(image)
    for number, row in enumerate(DECIDED):
        (folder / captions / f"p{number:03}.txt").write_text(row["caption"] + "\n")
    return folder


def chosen_rejected(folder: Path) -> Path:
    return win_lose(folder, ("chosen", "rejected"), "chosen")


def path_structs(folder: Path) -> Path:
    """As Hugging Face writes cells whose images are not embedded. In the last row group some are."""
    rows = [
        row | {side: {"bytes": None, "path": row[side]} for side in ("jpg_0", "jpg_1")}
        for row in as_paths(folder, ROWS)
    ]
    rows[-2] |= {side: {"bytes": ROWS[-2][side], "path": "image.png"} for side in ("jpg_0", "jpg_1")}
    write_pairs(folder / "pairs.parquet", rows, row_group_size=20)
    return folder


def rankings(folder: Path) -> Path:
    """Rankings of two images. Equal ranks are a tie."""
    rows = [
        {
            "images": [row["jpg_0"], row["jpg_1"]],
            "ranks": [2 - row["label_0"], 2 - row["label_1"]],
            "caption": row["caption"],
        }
        for row in ROWS
    ]
    return write_pairs(folder / "rankings.parquet", rows)


def ranked_structs(folder: Path) -> Path:
    sides = [(row, (winner(row), 1 - winner(row))) for row in DECIDED]
    rows = [
        {
            "images": [{"bytes": row[f"jpg_{side}"], "path": "x.png"} for side in both],
            "caption": row["caption"],
        }
        for row, both in sides
    ]
    return write_pairs(folder / "rankings.parquet", rows)


def ranked_path_structs(folder: Path) -> Path:
    rows = [
        {
            "images": [
                {"bytes": None, "path": row[f"jpg_{side}"]} for side in (winner(row), 1 - winner(row))
            ],
            "caption": row["caption"],
        }
        for row in as_paths(folder, DECIDED)
    ]
    rows[0]["images"] = [cell | {"bytes": (folder / cell["path"]).read_bytes()} for cell in rows[0]["images"]]
    write_pairs(folder / "rankings.parquet", rows, row_group_size=5)
    return folder


def saved_paths(folder: Path) -> Path:
    """Rankings of paths, as `save_to_disk` writes them."""
    ranked_path_structs(folder)
    table = pq.read_table(folder / "rankings.parquet")
    (folder / "rankings.parquet").unlink()
    with pa.ipc.new_stream(folder / "data.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return folder


def chosen_parquet(folder: Path) -> Path:
    rows = [
        {
            "chosen": row[f"jpg_{winner(row)}"],
            "rejected": row[f"jpg_{1 - winner(row)}"],
            "caption": row["caption"],
        }
        for row in DECIDED
    ]
    return write_pairs(folder / "pairs.parquet", rows)


ALL_ROWS = {
    each.__name__: each
    for each in (
        parquet,
        parquet_folder,
        parquet_structs,
        parquet_paths,
        hub_layout,
        saved_to_disk,
        json_lines,
        json_lines_folder,
        json_lines_uris,
        image_folder,
        path_structs,
        rankings,
        json_list,
        hpd_json,
        image_reward_json,
        json_lines_gz,
        metadata_csv,
        webdataset,
    )
}
"""Formats that can hold every row, ties too."""
DECIDED_ROWS = {
    each.__name__: each
    for each in (win_lose, chosen_rejected, ranked_structs, ranked_path_structs, saved_paths, chosen_parquet)
}
KINDS = ALL_ROWS | DECIDED_ROWS
FORMATS = {
    **dict.fromkeys(("saved_to_disk", "saved_paths"), "arrow"),
    **dict.fromkeys(
        ("json_lines", "json_lines_folder", "json_lines_uris", "image_folder", "json_lines_gz"), "jsonl"
    ),
    **dict.fromkeys(("json_list", "hpd_json", "image_reward_json"), "json"),
    "metadata_csv": "csv",
    "webdataset": "tar",
    **dict.fromkeys(("win_lose", "chosen_rejected"), "folders"),
}


def expected(rows: list[dict]) -> list[tuple]:
    found = []
    for row in rows:
        first = winner(row)
        tie = row["label_0"] == row["label_1"]
        sides = [] if tie else [(row[f"jpg_{first}"], row[f"jpg_{1 - first}"])]
        found.append(("tie" if tie else "decided", row["caption"], sides, [] if tie else [1.0]))
    return found
