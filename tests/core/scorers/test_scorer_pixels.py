"""Pixels as a scorer's authors make them, against PIL and against a bicubic kernel in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dde_core.errors import DataError
from dde_core.scorers import load
from dde_core.scorers.pixels import MEAN, STD, Crop, Pad, _product_resized, check_size, read_crop
from tests.support import scorers as tiny

MEANS = np.array([0.48145466, 0.4578275, 0.40821073])
STDS = np.array([0.26862954, 0.26130258, 0.27577711])
HARSH = np.random.default_rng(1).choice(np.array([0, 255], np.uint8), (1, 96, 64, 3))
"""Black and white noise: nothing is harder to make smaller."""


def normalized(pixels: np.ndarray) -> np.ndarray:
    """[h, w, 3] in 0..1 as [3, h, w]."""
    return ((pixels - MEANS) / STDS).transpose(2, 0, 1)


def cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' kernel with the parameter of torch's bicubic interpolation."""
    x = np.abs(x)
    inside = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outside = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, inside, np.where(x < 2, outside, 0))


def aliased(length: int, target: int) -> np.ndarray:
    """The matrix [target, length] that samples a line of pixels at four neighbors, edges repeated."""
    matrix = np.zeros((target, length))
    for i in range(target):
        center = (i + 0.5) * length / target - 0.5
        for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            matrix[i, np.clip(j, 0, length - 1)] += cubic(np.array(center - j))
    return matrix


def test_the_constants_are_those_of_clip():
    np.testing.assert_allclose(MEAN, MEANS, atol=0)
    np.testing.assert_allclose(STD, STDS, atol=0)


@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(96, 64, 7, 0), (64, 101, 0, 8), (28, 28, 0, 0)]
)
def test_a_crop_scales_the_shorter_side_and_cuts_out_the_center(height, width, top, left):
    image = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    scaled = (28, int(28 * height / width)) if width <= height else (int(28 * width / height), 28)
    wanted = np.asarray(Image.fromarray(image).resize(scaled, Image.Resampling.BICUBIC)) / 255
    found = Crop(side=28, shortest=28)(image[None])[0].numpy()
    np.testing.assert_allclose(found, normalized(wanted[top : top + 28, left : left + 28]), atol=1e-6)


def test_half_a_pixel_of_margin_goes_where_each_library_puts_it():
    image = np.random.default_rng(3).integers(0, 256, (1, 31, 28, 3), dtype=np.uint8)
    whole = normalized(image[0] / 255)
    down = Crop(side=28, shortest=28)(image)[0].numpy()
    even = Crop(side=28, shortest=28, center="even")(image)[0].numpy()
    np.testing.assert_allclose(down, whole[:, 1:29], atol=1e-6)
    np.testing.assert_allclose(even, whole[:, 2:30], atol=1e-6)


def test_hps_pads_and_cuts_nothing_away():
    """Against PIL on floats, whose bicubic kernel is the one of torch's antialiasing."""
    found = Pad(side=28)(HARSH)[0].numpy()
    channels = [Image.fromarray((HARSH[0, ..., c] / 255).astype(np.float32)) for c in range(3)]
    size = (round(64 * 28 / 96), 28)
    resized = [np.asarray(channel.resize(size, Image.Resampling.BICUBIC)) for channel in channels]
    wanted = np.zeros((28, 28, 3))
    wanted[:, 4 : 4 + size[0]] = np.stack(resized, axis=-1)
    np.testing.assert_allclose(found, normalized(wanted), atol=1e-4)
    np.testing.assert_allclose(found[:, :, 0], np.repeat(-(MEANS / STDS)[:, None], 28, axis=1), atol=1e-6)


def test_hps_can_alias_as_old_versions_of_its_code():
    found = Pad(side=28, resize="aliased")(HARSH)[0].numpy()
    resized = np.einsum("ij,jkc,lk->ilc", aliased(96, 28), HARSH[0] / 255, aliased(64, 19))
    wanted = np.zeros((28, 28, 3))
    wanted[:, 4:23] = resized
    np.testing.assert_allclose(found, normalized(wanted), atol=1e-4)


def test_aliasing_moves_harsh_images_by_many_gray_levels():
    one = Pad(side=28)(HARSH).numpy()
    other = Pad(side=28, resize="aliased")(HARSH).numpy()
    gray_levels = np.abs(one - other).mean() * STDS.mean() * 255
    assert gray_levels > 15


def test_an_image_of_hps_size_is_not_resized():
    image = np.random.default_rng(4).integers(0, 256, (1, 28, 14, 3), dtype=np.uint8)
    found = Pad(side=28, resize="aliased")(image)[0].numpy()
    np.testing.assert_allclose(found[:, :, 7:21], normalized(image[0] / 255), atol=1e-6)


def test_crop_instead_of_pad_gives_other_scores(tmp_path: Path):
    """The planted mistake: HPS through CLIP's own preprocessing."""
    checkpoint, processor = tiny.write_tiny("hps", tmp_path)
    scorer = load.load("hps", checkpoint, processor)
    pixels, text = scorer.prepare(HARSH, ["a red star"])
    cropped = Crop(side=tiny.SIDE, shortest=tiny.SIDE)(HARSH)
    assert abs(float(scorer.model(pixels, text) - scorer.model(cropped, text))) > 1e-3


def test_both_ways_of_resizing_are_described_and_give_other_scores(tmp_path: Path):
    checkpoint, processor = tiny.write_tiny("hps", tmp_path)
    scorers = [load.load("hps", checkpoint, processor, resize=each) for each in ("antialiased", "aliased")]
    assert [each.description["preprocessing"]["resize"] for each in scorers] == ["antialiased", "aliased"]
    first, second = (each(HARSH, ["a red star"])[0] for each in scorers)
    assert abs(first - second) > 1e-3


@pytest.mark.parametrize("kind", ["clip", "hps", "aesthetic", "imagereward"])
def test_a_description_is_json_and_says_how_images_are_prepared(kind: str, tmp_path: Path):
    checkpoint, processor = tiny.write_tiny(kind, tmp_path)
    found = load.prove(kind, checkpoint, processor)
    prepared = found["preprocessing"]
    assert prepared["mode"] == ("pad" if kind == "hps" else "crop")
    assert prepared["side"] == tiny.SIDE
    assert prepared["mean"] == list(MEANS)
    assert found["token_limit"] == {"clip": 77, "hps": 77, "aesthetic": None, "imagereward": 35}[kind]
    assert load.load(kind, checkpoint, processor).description == {**found, "dtype": "float32"}


@pytest.mark.parametrize(
    ("kind", "center"),
    [
        ("clip", "down"),
        ("pickscore", "down"),
        ("drift", "down"),
        ("aesthetic", "even"),
        ("imagereward", "even"),
    ],
)
def test_each_kind_centers_as_the_library_of_its_authors(kind: str, center: str, tmp_path: Path):
    assert load.prove(kind, *tiny.write_tiny(kind, tmp_path))["preprocessing"]["center"] == center


def test_sizes_that_cannot_be_resized_are_refused():
    check_size(1, 50)
    with pytest.raises(DataError, match="1 x 51"):
        check_size(1, 51)
    with pytest.raises(DataError, match="0 x 5"):
        check_size(0, 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_center_crop": False}, "do_center_crop must be True"),
        ({"resample": 2}, "resample must be 3"),
        ({"rescale_factor": 1.0}, "rescale_factor must be 1/255"),
        ({"crop_size": 24}, "crop_size must be 28"),
        ({"crop_size": {"height": 28, "width": 24}}, "crop_size must be a square"),
        ({"size": {"height": 28, "width": 28}}, "size must be a whole number"),
        ({"size": 20}, "size must be at least"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std must be three numbers above 0"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type must be one of CLIP"),
    ],
)
def test_a_preprocessing_that_is_not_done_is_refused_by_its_field(change, words, tmp_path: Path):
    folder = tiny.write_clip(tmp_path / "clip")
    tiny.change_json(folder / "preprocessor_config.json", **change)
    with pytest.raises(DataError, match=rf"preprocessor_config\.json\.{words}"):
        load.prove("clip", folder)


def test_old_and_new_files_of_preprocessing_are_read(tmp_path: Path):
    folder = tiny.write_clip(tmp_path / "clip")
    path = folder / "preprocessor_config.json"
    tiny.change_json(path, size=40, crop_size=28, image_mean=[0.5, 0.5, 0.5])
    old = read_crop(folder, 28)
    assert (old.shortest, old.side, old.mean) == (40, 28, (0.5, 0.5, 0.5))
    (folder / "processor_config.json").write_text('{"image_processor": ' + path.read_text() + "}")
    path.unlink()
    assert read_crop(folder, 28) == old


@pytest.mark.parametrize("shape", [(64, 64), (300, 200), (32, 48)])
def test_resizing_with_gradients_by_products_is_torchs_own_resizing(shape: tuple[int, int]):
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    size = [57, 91]
    ours = _product_resized(images, size)
    theirs = torch.nn.functional.interpolate(
        images, size=size, mode="bicubic", align_corners=False, antialias=True
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    weights = torch.rand(ours.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((each * weights).sum(), images)[0] for each in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4)
