"""Hidden defects of preference trainers. Ours obeys each law; a defect, rebuilt in a few lines, breaks it."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from dde_core import train_step
from dde_core.config import ObjectiveConfig
from dde_core.latents.reader import LatentReader
from dde_core.models.folder import ModelFolder, encode_images
from dde_core.models.text import TextEncoders
from dde_core.models.tokens import tokenize
from dde_core.train_step import PairBatch, PairErrors, pair_errors, step_losses
from services.pairs.images import decode
from services.storage import files
from tests.support.encode_here import EncodeHere
from tests.support.encoded_pairs import SIZE_PX, batch_maker, train_here, write_encoded
from tests.support.pairs_file import png, write_pairs
from tests.support.tiny_folders import sd15_folder

PAIRS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(sd15_folder(tmp_path_factory.mktemp("models") / "sd15"))


@pytest.fixture(scope="module")
def encoded(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoded(tmp_path_factory.mktemp("encoded") / "pairs", model, PAIRS)


def one_batch(
    model: ModelFolder, encoded: Path, method: str, size: int = PAIRS, dropout: float = 0.0
) -> PairBatch:
    objective = ObjectiveConfig(method=method)
    maker = batch_maker(model, encoded, objective, batch_size=size, caption_dropout=dropout)
    return maker.make(maker.rows(0, 0, 1))


# ---- caption dropout drawn separately for the two halves


def test_winner_and_loser_drop_their_caption_together(model, encoded):
    empty = TextEncoders(model)(tokenize(model.tokenizers(), [""]))["encoder_hidden_states"]

    def dropped(batch: PairBatch) -> list[list[bool]]:
        texts = (batch.conditioning_w["encoder_hidden_states"], batch.conditioning_l["encoder_hidden_states"])
        return [[torch.allclose(text, empty[0], atol=1e-5) for text in side] for side in texts]

    ours, kept = (one_batch(model, encoded, "dde", dropout=dropout) for dropout in (0.5, 0.0))
    w, l = dropped(ours)  # noqa: E741
    assert 0 < sum(w) < PAIRS
    assert w == l

    torch.manual_seed(0)
    apart = (torch.rand(PAIRS) < 0.5).view(-1, 1, 1)
    text_l = torch.where(apart, empty, kept.conditioning_l["encoder_hidden_states"])
    w, l = dropped(dataclasses.replace(ours, conditioning_l={"encoder_hidden_states": text_l}))  # noqa: E741
    assert w != l


# ---- the reference with fresh noise, and its error in half precision: what the training loop does at step 0


def first_step(model: ModelFolder, encoded: Path, folder: Path, **training) -> dict[str, float]:
    return train_here(
        folder, model, encoded, ObjectiveConfig(method="uniform"), steps=1, batch_size=PAIRS, **training
    )[0]


def on_reference(change: Callable[..., PairErrors]) -> Callable[..., PairErrors]:
    """``pair_errors`` with another function for the reference."""

    def errors(unet, schedule, batch, error="noise"):
        is_reference = getattr(unet, "__name__", "") == "reference"
        return (change if is_reference else pair_errors)(unet, schedule, batch)

    return errors


def starts_as_its_reference(step: dict[str, float]) -> bool:
    return step["margin"] == 0 and step["loss"] == pytest.approx(math.log(2), rel=1e-15)


def with_fresh_noise(unet, schedule, batch: PairBatch) -> PairErrors:
    noise = {f"noise_{side}": torch.randn_like(batch.noise_w) for side in "wl"}
    return pair_errors(unet, schedule, dataclasses.replace(batch, **noise))


def reduced_in_half_precision(unet, schedule, batch: PairBatch) -> PairErrors:
    exact = pair_errors(unet, schedule, batch)
    return PairErrors(exact.w.bfloat16().float(), exact.l.bfloat16().float())


def in_half_precision(unet, schedule, batch: PairBatch) -> PairErrors:
    with torch.autocast("cpu", torch.bfloat16):
        return pair_errors(unet, schedule, batch)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_sees_the_policys_noise_and_has_its_precision(
    model, encoded, tmp_path, monkeypatch, precision
):
    ours = first_step(model, encoded, tmp_path / "ours", precision=precision)
    assert starts_as_its_reference(ours)
    defects = [
        with_fresh_noise,
        reduced_in_half_precision,
        *([in_half_precision] if precision == "fp32" else []),
    ]
    for defect in defects:
        monkeypatch.setattr(train_step, "pair_errors", on_reference(defect))
        theirs = first_step(model, encoded, tmp_path / defect.__name__, precision=precision)
        assert not starts_as_its_reference(theirs), defect.__name__
        assert theirs["winner_error"] == ours["winner_error"], "the policy's own error does not show it"


# ---- uniform noise instead of Gaussian noise


def looks_normal(noise: torch.Tensor) -> bool:
    """Mean, variance and fourth moment within five standard errors of the standard normal ones."""
    off = (noise.mean(), noise.var() - 1, noise.pow(4).mean() - 3)
    return all(
        abs(each) < 5 * (variance / noise.numel()) ** 0.5
        for each, variance in zip(off, (1, 2, 96), strict=True)
    )


@pytest.mark.parametrize("method", ["dde", "uniform"])
def test_noise_is_gaussian(model, encoded, method):
    batch = one_batch(model, encoded, method, size=200)
    for noise in (batch.noise_w, batch.noise_l):
        assert noise.numel() == 200 * 256
        assert looks_normal(noise)
        assert not looks_normal(torch.rand_like(noise))
        assert not looks_normal((torch.rand_like(noise) - 0.5) * math.sqrt(12)), "of the right variance"


# ---- log-sigmoid before the mean over pixels


def test_the_mean_over_pixels_is_taken_before_the_log_sigmoid(model, encoded):
    batch, config, schedule = (
        one_batch(model, encoded, "uniform"),
        ObjectiveConfig(method="uniform", beta=50.0),
        model.schedule(),
    )
    b, pixels, level = len(batch), 256, 0.2
    noise = torch.cat([batch.noise_w, batch.noise_l])
    even = torch.full((b, 4, 8, 8), level)
    peak = torch.zeros(b, pixels).index_fill(1, torch.tensor([0]), level * pixels**0.5).view(b, 4, 8, 8)
    reference = torch.cat([even, even])

    def ours(off: torch.Tensor) -> torch.Tensor:
        errors = [
            pair_errors(lambda *_, each=each, **__: SimpleNamespace(sample=noise + each), schedule, batch)
            for each in (off, reference)
        ]
        return step_losses(*errors, batch.t, config, schedule).loss.mean()

    def theirs(off: torch.Tensor) -> torch.Tensor:
        (theta_w, theta_l), (ref_w, ref_l) = (each.square().chunk(2) for each in (off, reference))
        return -F.logsigmoid(-0.5 * config.beta * ((theta_w - theta_l) - (ref_w - ref_l))).mean()

    def depends_on_where_the_error_is(loss: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        spread, gathered = loss(torch.cat([even, 2 * even])), loss(torch.cat([peak, 2 * even]))
        return (spread - gathered).abs().item() > 1e-4

    assert not depends_on_where_the_error_is(ours)
    assert depends_on_where_the_error_is(theirs)


# ---- independent flips


def tilted(shade: int) -> np.ndarray:
    """An image whose left, right, top and bottom differ."""
    ramp = np.tile(np.linspace(20, 230, SIZE_PX).astype(np.uint8), (SIZE_PX, 1))
    return np.dstack([ramp, np.full_like(ramp, 40 * shade), ramp.T])


def keeps_orientation(decoder: Callable[[bytes, int], np.ndarray]) -> bool:
    images = [tilted(shade) for shade in range(4)] * 5
    return all((decoder(png(image), SIZE_PX) == image).all() for image in images)


def test_images_are_decoded_without_a_flip_every_time():
    rng = np.random.default_rng(0)

    def flipping(data: bytes, size: int) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        return np.asarray(ImageOps.mirror(image) if rng.random() < 0.5 else image)

    assert keeps_orientation(lambda data, size: decode(data, size).pixels)
    assert not keeps_orientation(flipping)


def test_ingest_encodes_both_sides_unflipped_and_records_it_in_its_manifest(model, tmp_path, monkeypatch):
    captions = ["a red circle", "a green circle", "a blue circle"]
    rows = [
        {
            "jpg_0": png(tilted(n)),
            "jpg_1": png(tilted(n + 3)),
            "label_0": 1.0,
            "label_1": 0.0,
            "caption": captions[n],
        }
        | {name: f"{n}-{name}" for name in ("image_0_uid", "image_1_uid")}
        for n in range(3)
    ]
    path = write_pairs(tmp_path / "pairs.parquet", rows)
    result = EncodeHere(monkeypatch, model, tmp_path / "encoded")(path)
    reader = LatentReader(*files.resolve(result.dataset))
    settings = {
        "resolution": SIZE_PX,
        "crop": "centre",
        "flip": "none",
        "background": "white",
        "posterior": "mean",
    }
    assert reader.manifest.settings == settings
    batch, vae = reader.batch(seed=0, step=0, batch_size=3), model.vae()
    shades = (
        (batch.token_ids[:, None] == tokenize(model.tokenizers(), captions)).all(axis=(2, 3)).argmax(axis=1)
    )
    assert sorted(shades) == [0, 1, 2]
    for side, more in (("w", 0), ("l", 3)):
        images = np.stack([tilted(shade + more) for shade in shades])
        straight, mirrored = (
            encode_images(vae, each).astype(np.float32) for each in (images, images[:, :, ::-1].copy())
        )
        found = getattr(batch, f"latents_{side}").astype(np.float32)
        assert np.abs(found - straight).max() < 0.01
        assert np.abs(found - mirrored).max() > 0.1
