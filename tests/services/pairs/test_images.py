"""Images that are used, images that are not, and why."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from services.pairs.images import MAX_FILE_BYTES, BadImage, decode
from tests.support.hostile_rows import IMAGES, ODD, drawn, png_of, saved

pytestmark = pytest.mark.filterwarnings("error")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_refused_with_its_cause_and_without_a_warning(name):
    cause, make = IMAGES[name]
    with pytest.raises(BadImage) as refused:
        decode(make(RNG), 32)
    assert refused.value.cause == cause
    again = pickle.loads(pickle.dumps(refused.value))
    assert (again.cause, str(again)) == (cause, str(refused.value))


@pytest.mark.parametrize(("kind", "mode", "options"), ODD)
def test_unusual_kinds_and_modes_become_rgb_as_pil_converts_them(kind, mode, options):
    data = saved(drawn(RNG), kind, mode, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data, 24).pixels, expected)


@pytest.mark.parametrize(("width", "height"), [(40, 24), (24, 40), (41, 24), (24, 24)])
def test_the_center_square_is_cropped_and_its_position_is_returned(width, height):
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = decode(saved(pixels), 24)
    top, left = image.crop
    assert (image.size, top, left) == ((height, width), (height - 24) // 2, (width - 24) // 2)
    assert np.array_equal(image.pixels, pixels[top : top + 24, left : left + 24])


def test_any_size_is_scaled_to_the_requested_size():
    gray = np.full((100, 60, 3), 77, np.uint8)
    for size in (8, 60, 200):
        pixels = decode(saved(gray), size).pixels
        assert (pixels.shape, pixels.dtype, set(pixels.ravel())) == ((size, size, 3), np.uint8, {77})


def test_a_flip_mirrors_the_crop():
    data = saved(RNG.integers(0, 256, (24, 41, 3), dtype=np.uint8))
    plain, flipped = decode(data, 24), decode(data, 24, flip=True)
    assert np.array_equal(flipped.pixels, plain.pixels[:, ::-1])
    assert not np.array_equal(flipped.pixels, plain.pixels)
    assert flipped.crop == plain.crop


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright_by_its_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = decode(data, 24)
    assert image.size == (upright.height, upright.width) == ((24, 32) if orientation < 5 else (32, 24))
    top, left = image.crop
    assert np.array_equal(image.pixels, np.asarray(upright)[top : top + 24, left : left + 24])


def test_a_photo_that_is_followed_by_previews_is_its_first_image():
    frames = [Image.fromarray(np.full((24, 24, 3), gray, np.uint8)) for gray in (50, 200)]
    out = io.BytesIO()
    frames[0].save(out, "MPO", save_all=True, append_images=frames[1:])
    assert abs(decode(out.getvalue(), 24).pixels.astype(int) - 50).max() <= 1


def test_a_bomb_is_refused_before_its_pixels_are_made(tmp_path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_of(9_000, 9_000, bytes(9_000 * 27_001)))
    code = f"""
import resource
from pathlib import Path
from services.pairs.images import BadImage, decode
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, data = peak(), Path({str(bomb)!r}).read_bytes()
try:
    decode(data, 32)
except BadImage as error:
    print(error.cause, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240
    )
    cause, grown_kib = done.stdout.split()
    assert cause == "image_too_large"
    assert int(grown_kib) < 64 * 1024


def test_a_tiff_of_very_many_pages_is_refused_without_counting_them(monkeypatch):
    monkeypatch.setattr(TiffImageFile, "n_frames", property(lambda image: pytest.fail("counts pages")))
    pages = 100_000
    page = b"".join(struct.pack("<HHII", tag, 3, 1, 1) for tag in (256, 257, 258, 262, 273, 277, 278, 279))
    size = 2 + len(page) + 4
    data = b"II*\0" + struct.pack("<I", 8)
    data += b"".join(
        struct.pack("<H", 8) + page + struct.pack("<I", 8 + size * (n + 1)) for n in range(pages)
    )
    with pytest.raises(BadImage) as refused:
        decode(data, 32)
    assert refused.value.cause == "image_animated"


def test_the_content_of_a_file_that_is_no_image_is_not_shown():
    with pytest.raises(BadImage) as refused:
        decode(b"root:x:0:0:secret", 32)
    assert (
        str(refused.value) == "image_not_an_image: 17 bytes that are none of JPEG, PNG, WEBP, GIF, BMP, TIFF"
    )


@pytest.mark.parametrize(("kind", "orientation"), [("RGB", 1), ("RGB", 6), ("RGBA", 1), ("RGBA", 6)])
def test_at_most_two_copies_of_the_largest_images_pixels_are_held(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new(kind, (8192, 8192)).save(tmp_path / "large.png", exif=exif)
    code = f"""
import resource
from pathlib import Path
from services.pairs.images import decode
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data, before = Path({str(tmp_path / "large.png")!r}).read_bytes(), peak()
decode(data, 32)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240
    )
    copies = 1 if (kind, orientation) == ("RGB", 1) else 2
    assert int(done.stdout) < (copies * 256 + 40) * 1024


def test_a_file_that_is_too_long_is_refused_unread():
    with pytest.raises(BadImage, match=f"image_too_large: more than {MAX_FILE_BYTES} bytes"):
        decode(saved(drawn(RNG)) + bytes(MAX_FILE_BYTES), 32)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damaged_bytes_are_decoded_or_refused_as_a_bad_image(kind):
    data = saved(drawn(RNG), kind)
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for index in rng.integers(0, len(damaged), rng.integers(1, 8)):
            damaged[index] = rng.integers(256)
        try:
            assert decode(bytes(damaged[: rng.integers(1, len(damaged) + 1)]), 16).pixels.shape == (16, 16, 3)
        except BadImage:
            refused += 1
    assert refused > 0
