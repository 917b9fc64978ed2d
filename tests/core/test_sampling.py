"""Images equal those of diffusers' pipelines, whatever the folder's scheduler says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from dde_core.config import SampleConfig
from dde_core.engine.model import to_pixels
from dde_core.errors import NonFiniteError
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from dde_core.noise import initial_latents
from dde_core.shapes import MODEL_DIR

ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
PROMPTS = ["a small red circle at the left", "a big blue square"]
SEEDS = [11, 12]


class ChangedFolder(ModelFolder):
    """The shipped folder with other settings of its scheduler."""

    def __init__(self, change: dict[str, Any]) -> None:
        super().__init__(MODEL_DIR)
        self._change = change

    def scheduler_config(self) -> dict[str, Any]:
        return super().scheduler_config() | self._change


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(str(MODEL_DIR), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, folder: ModelFolder, sample: SampleConfig) -> np.ndarray:
    known = set(DDIMScheduler.load_config(str(MODEL_DIR), subfolder="scheduler")) | {"trained_betas"}
    config = {name: value for name, value in folder.scheduler_config().items() if name in known}
    # The pipeline's constructor, not its attribute, takes steps_offset 1 whatever the folder says.
    pipeline.scheduler = DDIMScheduler(
        **{name: value for name, value in config.items() if not name.startswith("_")}
        | {"clip_sample": False, "steps_offset": 1}
    )
    images = pipeline(
        PROMPTS,
        latents=torch.stack([initial_latents(seed, (4, 8, 8)) for seed in SEEDS]),
        num_inference_steps=sample.steps,
        guidance_scale=sample.guidance_scale,
        output_type="np",
    ).images
    return (images * 255).round().astype(int)


@pytest.mark.parametrize(
    ("steps", "guidance", "change"),
    [
        (10, 5.0, {}),
        (7, 1.5, {}),  # 1000 is no multiple of 7
        (1, 5.0, {}),
        (5, 1.0, {}),
        (5, 0.0, {}),
        (5, 5.0, {"set_alpha_to_one": True}),
        (5, 5.0, {"prediction_type": "v_prediction"}),
        (5, 5.0, {"num_train_timesteps": 100, "beta_end": 0.1}),
        (5, 5.0, {"num_train_timesteps": 10, "beta_end": 0.5}),
        (9, 5.0, {"num_train_timesteps": 10, "beta_end": 0.5, "set_alpha_to_one": True}),
        (7, 5.0, {"timestep_spacing": "trailing"}),
        (10, 5.0, {"timestep_spacing": "linspace"}),
        (2, 5.0, {"timestep_spacing": "linspace"}),
        (7, 5.0, {"timestep_spacing": "trailing", **ZERO}),
        (6, 5.0, {"timestep_spacing": "linspace", "set_alpha_to_one": True, **ZERO}),
        (10, 5.0, ZERO),
        (5, 3.0, {"_class_name": "PNDMScheduler", "skip_prk_steps": True}),
        (5, 3.0, {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()}),
    ],
)
def test_images_equal_the_stable_diffusion_pipelines(
    pipeline: Any, steps: int, guidance: float, change: dict[str, Any]
):
    folder = ChangedFolder(change)
    sample = SampleConfig(steps=steps, guidance_scale=guidance)
    expected = theirs(pipeline, folder, sample)
    images = TextToImage(folder)(PROMPTS, SEEDS, sample)
    assert expected.std() > 5
    off = np.abs(images.astype(int) - expected)
    assert off.max() <= 1
    assert (off > 0).mean() < 0.01


def test_values_outside_of_the_image_range_are_clamped_and_channels_come_last():
    images = torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    pixels = to_pixels(images)
    assert pixels.shape == (1, 2, 4, 3)
    assert (pixels == [0, 128, 255]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_no_images(value: float):
    images = torch.zeros(3, 3, 2, 2)
    images[1, 2, 0, 1] = value
    with pytest.raises(NonFiniteError, match="decoded images are not finite in 1 of 3 images"):
        to_pixels(images)
