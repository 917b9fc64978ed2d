"""Conventions in which trainers differ: what each choice changes, and that nothing else does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionXLPipeline
from pyarrow import fs

from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.generation import TextToImage
from dde_core.latents.ledger import LedgerKey
from dde_core.latents.reader import LatentReader
from dde_core.methods import METHODS
from dde_core.models.folder import ModelFolder, encode_images
from dde_core.noise import draw_posterior, initial_latents
from dde_core.objectives import conventions, weights
from dde_core.schedule import Schedule
from dde_core.train_step import PairBatch, pair_errors
from tests.support.encoded_pairs import batch_maker, write_encoded
from tests.support.pair_batches import random_pairs
from tests.support.tiny_folders import sd15_folder, sdxl_folder

T = 1000


def model(x: torch.Tensor, t: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(sample=torch.sin(x + t.view(-1, 1, 1, 1)))


# ---- error


def test_velocity_errors_are_those_of_diffusers_target(sd_config: dict[str, Any]):
    schedule = Schedule.from_config(sd_config | {"prediction_type": "v_prediction"})
    batch = random_pairs([1, 40, 500, T], torch.float64)
    theirs = DDPMScheduler(
        **{k: v for k, v in sd_config.items() if k not in ("set_alpha_to_one", "steps_offset")}
    )
    target = theirs.get_velocity(batch.latents_w, batch.noise_w, batch.t - 1)
    noisy = theirs.add_noise(batch.latents_w, batch.noise_w, batch.t - 1)
    expected = (model(noisy, batch.t - 1).sample - target).square().mean(dim=(1, 2, 3))
    errors = pair_errors(model, schedule, batch, "velocity")
    torch.testing.assert_close(errors.w, expected, rtol=1e-4, atol=1e-6)


def test_a_velocity_error_is_the_error_of_the_noise_over_alpha_bar(sd_config: dict[str, Any]):
    schedule = Schedule.from_config(sd_config | {"prediction_type": "v_prediction"})
    batch = random_pairs([1, 40, 500, T], torch.float64)
    noise = pair_errors(model, schedule, batch)
    velocity = pair_errors(model, schedule, batch, "velocity")
    torch.testing.assert_close(velocity.l, noise.l / schedule.alpha_bar[batch.t])


def test_without_signal_only_the_velocity_tells_models_apart(sd_config: dict[str, Any]):
    zero = Schedule.from_config(
        sd_config | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    )
    batch = random_pairs([T], torch.float64)
    assert pair_errors(model, zero, batch).w.item() == pytest.approx(0, abs=1e-30)
    assert pair_errors(model, zero, batch, "velocity").w.item() > 0.1


def test_velocity_errors_are_refused_where_they_are_not_defined(schedule: Schedule):
    for name, method in METHODS.items():
        if method.noise_errors_only:
            with pytest.raises(ConfigError, match="not defined") as error:
                ObjectiveConfig(method=name, beta=10.0, error="velocity")
            assert error.value.field == "error"
        else:
            with pytest.raises(ConfigError, match="v_prediction"):
                weights(ObjectiveConfig(method=name, beta=10.0, error="velocity"), schedule)


# ---- sizes and dropped captions


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    make = {"sd15": sd15_folder, "sdxl": sdxl_folder}[request.param]
    return ModelFolder(make(tmp_path_factory.mktemp("models") / request.param))


@pytest.fixture(scope="module")
def encoded(folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoded(tmp_path_factory.mktemp("encoded") / "pairs", folder, 8)


def batch_of(folder: ModelFolder, encoded: Path, dropout: float = 0.0, **objective: Any) -> PairBatch:
    maker = batch_maker(
        folder, encoded, ObjectiveConfig(**objective), batch_size=8, caption_dropout=dropout, draw_seed=1
    )
    return maker.make(maker.rows(0, 0, 1))


def test_fixed_time_ids_leave_winner_and_loser_no_difference_but_the_image(
    folder: ModelFolder, encoded: Path
):
    per_side = batch_of(folder, encoded)
    fixed = batch_of(folder, encoded, time_ids="fixed")
    if folder.family == "sd15":
        assert "time_ids" not in fixed.conditioning_w
        return
    assert not torch.equal(per_side.conditioning_w["time_ids"], per_side.conditioning_l["time_ids"])
    expected = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).expand(8, 6)
    assert torch.equal(fixed.conditioning_w["time_ids"], expected)
    assert torch.equal(fixed.conditioning_l["time_ids"], expected)
    assert torch.equal(fixed.noise_w, per_side.noise_w)


def test_a_dropped_caption_is_none_or_the_empty_one(folder: ModelFolder, encoded: Path):
    kept = batch_of(folder, encoded)
    zeros, empty = (
        batch_of(folder, encoded, 0.5, dropped_caption=choice).conditioning_w for choice in ("model", "empty")
    )
    text = "encoder_hidden_states"
    dropped = [not torch.equal(zeros[text][i], kept.conditioning_w[text][i]) for i in range(8)]
    assert 0 < sum(dropped) < 8
    for i in range(8):
        is_zero = bool((zeros[text][i] == 0).all())
        assert is_zero == (dropped[i] and folder.family == "sdxl")
        assert torch.equal(zeros[text][i], empty[text][i]) == (not dropped[i] or folder.family == "sd15")
        assert not (empty[text][i] == 0).all()


def test_a_ledger_is_of_one_convention_and_older_ones_are_still_found(folder: ModelFolder, encoded: Path):
    manifest = LatentReader(fs.LocalFileSystem(), str(encoded)).manifest

    def key(**objective: Any) -> LedgerKey:
        return LedgerKey.of_run("r", manifest, folder, ObjectiveConfig(**objective), TrainConfig())

    default = key()
    is_sdxl = folder.family == "sdxl"
    assert set(key(time_ids="fixed").mismatches(default)) == ({"time_ids"} if is_sdxl else set())
    assert set(key(dropped_caption="empty").mismatches(default)) == ({"no_caption"} if is_sdxl else set())
    velocity = key(method="uniform", error="velocity")
    assert set(velocity.mismatches(key(method="uniform"))) == {"error"}
    assert velocity.name != key(method="uniform").name
    stored = {name: value for name, value in vars(default).items() if name not in ("error", "time_ids")}
    assert LedgerKey(**stored) == default, "a record of an earlier version lacks the fields"


# ---- latents of an image


def test_sampled_latents_are_diffusers_own_sample_with_the_noise_of_the_file(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
):
    vae = folder.vae()
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    digests = [f"{n:064x}" for n in range(3)]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    noise = torch.stack([draw_posterior(digest, tuple(posterior.mean.shape[1:])) for digest in digests])
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda *_, **__: noise)
    theirs = posterior.sample() * vae.config.scaling_factor
    ours = torch.from_numpy(encode_images(vae, images, digests)).float()
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    for wrong in (posterior.logvar, posterior.var):
        assert not torch.allclose(
            (posterior.mean + wrong * noise) * vae.config.scaling_factor, ours, atol=0.05
        )
    assert 0.9 < noise.std() < 1.1


def test_the_sample_of_an_image_depends_on_its_file_alone(folder: ModelFolder):
    vae = folder.vae()
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    digests = [f"{n:064x}" for n in range(4)]
    together = encode_images(vae, images, digests)
    alone = np.concatenate([encode_images(vae, images[n : n + 1], digests[n : n + 1]) for n in range(4)])
    means = encode_images(vae, images)
    np.testing.assert_allclose(together.astype(float), alone.astype(float), atol=0.005)
    assert (np.abs(together - means) > 0.005).mean() > 0.5
    assert not np.allclose(encode_images(vae, images, digests[::-1]), together, atol=0.05)


@pytest.mark.parametrize("prompt", ["", "a red circle"])
def test_a_prompt_that_is_empty_is_encoded_as_diffusers_encodes_it(tmp_path: Path, prompt: str):
    path = sdxl_folder(tmp_path / "model")
    pipeline = StableDiffusionXLPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    sample = SampleConfig(steps=4, guidance_scale=3.0)
    ours = TextToImage(ModelFolder(path))([prompt], [7], sample)[0].astype(int)
    side = pipeline.unet.config.sample_size
    latents = initial_latents(7, (4, side, side))[None]
    theirs = pipeline(
        prompt, num_inference_steps=4, guidance_scale=3.0, latents=latents, output_type="np"
    ).images[0]
    assert np.abs(ours - np.rint(theirs * 255)).max() <= 1


def test_the_choices_are_told_to_whoever_reads_the_model_card(schedule: Schedule):
    told = [
        conventions(ObjectiveConfig(time_ids=choice), schedule)["time_ids"]
        for choice in ("per_side", "fixed")
    ]
    assert told[0] != told[1]
