"""Images and scores in storage: what is read is what was written, or damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from services.artifacts import image_cache


def test_no_flipped_bit_of_stored_images_or_scores_goes_unseen(tmp_path: Path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    uris = [(tmp_path / name).as_uri() for name in ("images.parquet", "scores.parquet")]
    pngs = image_cache.encode_png(images)
    image_cache.write_images(uris[0], ["a", "b"], [1, 2], pngs)
    image_cache.write_scores(uris[1], rng.random((2, 3)))
    for uri, read in zip(uris, (image_cache.read_images, image_cache.read_scores), strict=True):
        expected = read(uri)
        path = tmp_path / uri.rpartition("/")[2]
        data = path.read_bytes()
        for place in range(0, len(data), 3):
            broken = bytearray(data)
            broken[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(broken)
            try:
                found = read(uri)
            except image_cache.Damaged:
                continue
            np.testing.assert_array_equal(found, expected)
        path.write_bytes(data)
    assert (image_cache.decode_png(pngs) == images).all()
