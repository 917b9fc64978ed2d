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

from services.pairs.images import MAX_FILE_BYTES, BadImage, decode, decode_whole
from tests.support.hostile_rows import IMAGES, ODD, chunk, drawn, png_of, saved

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


JUNK = {
    "no TIFF header": b"junk junk junk",
    "an IFD that ends early": b"II*\0\x08\0\0\0\xff\xff",
    "an IFD beyond the end": b"MM\0*\xff\xff\xff\xff",
    "an orientation of text": b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0",
    "an orientation of 9": b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",
}
"""Exif data that tells no orientation."""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("name", JUNK)
def test_junk_in_place_of_the_orientation_does_not_cost_the_image(name, kind):
    pixels = drawn(RNG)
    plain, with_junk = (
        saved(pixels, kind, quality=90, exif=exif) for exif in (b"", b"Exif\0\0" + JUNK[name])
    )
    assert np.array_equal(decode(with_junk, 24).pixels, decode(plain, 24).pixels)


@pytest.mark.parametrize(
    "kind", [b"eXIf", b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"iCCP", b"tEXt", b"tIME", b"npVy"]
)
@pytest.mark.parametrize("content", [b"", b"\xff", b"junk junk\0\xff"])
def test_a_junk_chunk_of_metadata_does_not_cost_a_png(kind, content):
    pixels = drawn(RNG)
    data = saved(pixels)
    with_checksum = chunk(kind, content)
    for junk in (with_checksum, with_checksum[:-4] + b"none"):
        for place in (33, len(data) - 12):  # behind the header, before the end
            assert np.array_equal(decode(data[:place] + junk + data[place:], 24).pixels, pixels)


def test_a_chunk_that_changes_the_pixels_is_read_and_not_ignored_where_it_is_broken():
    data = with_color_key("RGB")
    assert decode(data, 24).transparent
    place = data.index(b"tRNS")
    with pytest.raises(BadImage, match="image_broken"):
        decode(data[: place + 4] + b"\xff" + data[place + 5 :], 24)


def test_a_broken_image_with_junk_for_its_orientation_stays_broken():
    data = saved(drawn(RNG), exif=b"Exif\0\0junk")
    with pytest.raises(BadImage, match="image_broken"):
        decode(data[: len(data) // 2], 24)


# ---- transparency


def half_hidden() -> Image.Image:
    """RGBA: red, of which the left half is fully transparent."""
    image = Image.new("RGBA", (24, 24), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 12, 24))
    return image


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def with_color_key(mode: str) -> bytes:
    """A PNG in which one color, or one index of the palette, is transparent: the left half."""
    image = Image.new("RGB", (24, 24), (255, 0, 0))
    image.paste((0, 0, 0), (0, 0, 12, 24))
    key = {"RGB": (0, 0, 0), "L": 0, "1": 0}
    converted = (
        image.convert(mode) if mode != "1" else image.convert("L").point(lambda level: level and 255, "1")
    )
    return file_of(converted, "PNG", transparency=key.get(mode, converted.getpixel((0, 0))))


HALF_HIDDEN = {
    "png with alpha": lambda: file_of(half_hidden(), "PNG"),
    "gray png with alpha": lambda: file_of(half_hidden().convert("LA"), "PNG"),
    "png with a color key": lambda: with_color_key("RGB"),
    "gray png with a color key": lambda: with_color_key("L"),
    "bilevel png with a color key": lambda: with_color_key("1"),
    "png with an index of its palette": lambda: with_color_key("P"),
    "png with alphas of its palette": lambda: file_of(half_hidden().quantize(), "PNG"),
    "webp": lambda: file_of(half_hidden(), "WEBP", lossless=True, exact=True),
    "gif": lambda: file_of(half_hidden(), "GIF"),
    "tiff": lambda: file_of(half_hidden(), "TIFF"),
}


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("gray", 128), ("black", 0)])
@pytest.mark.parametrize("name", HALF_HIDDEN)
def test_transparent_pixels_show_the_background_and_not_what_is_hidden_in_them(name, background, level):
    image = decode(HALF_HIDDEN[name](), 24, background=background)
    assert image.transparent
    assert (image.pixels[:, :12] == level).all()
    seen = image.pixels[:, 12:]
    assert (seen == seen[0, 0]).all()
    assert seen[0, 0, 0] in (76, 255), "red, or its gray"


@pytest.mark.parametrize("alpha", [1, 77, 128, 254])
def test_a_pixel_that_is_partly_transparent_is_mixed_with_the_background(alpha):
    data = file_of(Image.new("RGBA", (8, 8), (200, 100, 0, alpha)), "PNG")
    for background, level in (("white", 255), ("black", 0)):
        mixed = (np.array([200, 100, 0]) * alpha + level * (255 - alpha)) / 255
        assert abs(decode(data, 8, background=background).pixels - mixed).max() <= 1


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("TIFF", "RGBA")]
)
def test_an_image_that_is_opaque_everywhere_is_not_transparent_whatever_its_mode(kind, mode):
    data = saved(drawn(RNG), kind, mode)
    image = decode(data, 24, background="black")
    assert not image.transparent
    assert np.array_equal(image.pixels, decode(data, 24).pixels)


def test_hidden_colors_do_not_bleed_into_the_image_where_it_is_scaled():
    data = file_of(half_hidden(), "PNG")
    on_white = Image.new("RGB", (24, 24), "white")
    on_white.paste((255, 0, 0), (12, 0, 24, 24))
    for size in (8, 16, 60):
        expected = decode(file_of(on_white, "PNG"), size).pixels
        assert np.array_equal(decode(data, size).pixels, expected)


def test_transparency_beside_the_cropped_square_does_not_count():
    image = Image.new("RGBA", (40, 24), (0, 99, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 24))
    assert not decode(file_of(image, "PNG"), 24).transparent
    image.paste((0, 0, 0, 0), (0, 0, 9, 24))
    assert decode(file_of(image, "PNG"), 24).transparent


def test_a_transparent_photo_is_turned_upright_before_it_is_cropped():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGBA", (24, 40), (0, 99, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 24, 10))
    turned = decode(file_of(image, "PNG", exif=exif), 24)
    assert turned.size == (24, 40)
    assert (turned.pixels[:, -2:] == 255).all(), "the top is now at the right"
    assert (turned.pixels[:, :-2] == (0, 99, 0)).all()


def test_a_whole_image_is_neither_cropped_nor_scaled():
    pixels = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    assert np.array_equal(decode_whole(saved(pixels)), pixels)
    assert (decode_whole(file_of(half_hidden(), "PNG"), "black")[:, :12] == 0).all()
    with pytest.raises(BadImage, match="image_not_an_image"):
        decode_whole(b"none")


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
    Image.new(kind, (8192, 8192), (9, 9, 9, 128)[: len(kind)]).save(tmp_path / "large.png", exif=exif)
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
