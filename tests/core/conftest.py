"""One thread for torch, one profile for hypothesis, and Stable Diffusion's schedule."""

import hypothesis
import pytest
import torch

from dde_core.schedule import Schedule

SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""What Stable Diffusion's scheduler_config.json says."""

torch.set_num_threads(1)
hypothesis.settings.register_profile("core", deadline=None, database=None)
hypothesis.settings.load_profile("core")


@pytest.fixture
def sd_config() -> dict:
    return dict(SD)


@pytest.fixture(scope="session")
def schedule():
    return Schedule.from_config(SD)
