"""Decoding refuses what is no picture and says why; every image is planned once."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dde_core.shapes.scenes import all_scenes, render
from services.ingest.decoding import decode, decode_unit
from services.ingest.encode import plan_units
from services.pairs import PairRow
from tests.pairs_file import pair_rows, png, write_pairs


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_a_picture_of_the_right_size_keeps_its_pixels():
    picture = render(all_scenes()[0])
    found = decode(png(picture), 32)
    assert (found.pixels == picture).all()
    assert (found.size, found.crop) == ((32, 32), (0, 0))


def test_a_wide_picture_is_cut_at_the_centre_and_resized():
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = 200
    found = decode(png(wide), 32)
    assert found.pixels.shape == (32, 32, 3)
    assert (found.pixels == 200).all()
    assert (found.size, found.crop) == ((40, 100), (0, 30))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_rgb(mode: str):
    image = Image.fromarray(render(all_scenes()[0])).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode(encoded(image, kind), 32).pixels.shape == (32, 32, 3)


GOOD = encoded(Image.fromarray(render(all_scenes()[0])), "JPEG")


@pytest.mark.parametrize(
    ("data", "cause"),
    [(None, "not an image"), (b"", "not an image"), (b"<html>", "not an image"), (GOOD[: len(GOOD) // 2], "broken image")],
)
def test_what_is_no_picture_is_refused_with_its_cause(data, cause):
    with pytest.raises(ValueError, match=cause):
        decode(data, 32)


def test_a_unit_reads_its_rows_and_marks_the_broken_ones(tmp_path):
    rows = pair_rows(6)
    rows[4]["jpg_1"] = b"no"
    path = write_pairs(tmp_path / "pairs.parquet", rows, row_group_size=3)
    wanted = [{"row": 0, "column": "jpg_0", "uid": "y"}, {"row": 1, "column": "jpg_1", "uid": "x"}]
    unit = {"uri": np.array([str(path)]), "file": np.array([""]), "row_group": np.array([1]), "wanted": [wanted]}
    (block,) = decode_unit(unit, 32)
    assert block["uid"].tolist() == ["y", "x"]
    assert block["error"].tolist() == ["", "not an image"]
    assert (block["pixels"][0] == decode(rows[3]["jpg_0"], 32).pixels).all()
    assert block["pixels"].dtype == np.uint8


def test_every_image_is_planned_once_however_many_pairs_hold_it():
    rows = [PairRow("f", i // 300, i % 300, f"image-{i}", "shared", "text", 1.0, 0.0) for i in range(600)]
    units = plan_units("uri", rows)
    uids = [want["uid"] for unit in units for want in unit["wanted"]]
    assert len(uids) == 601
    assert sorted(set(uids)) == sorted(uids)
    assert [unit["row_group"] for unit in units] == [0, 1]
