"""One thread, and shapes in annotations are checked: the maths modules are imported under jaxtyping and beartype."""

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)

CHECKED = ("schedule", "noise", "calibration", "objectives", "train_step", "sampling", "metrics")
with install_import_hook([f"dde_core.{name}" for name in CHECKED], "beartype.beartype"):
    import dde_core.calibration
    import dde_core.metrics
    import dde_core.noise
    import dde_core.objectives
    import dde_core.sampling
    import dde_core.schedule
    import dde_core.train_step  # noqa: F401

import pytest

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


@pytest.fixture
def sd_config() -> dict:
    return dict(SD)


@pytest.fixture(scope="session")
def schedule() -> dde_core.schedule.Schedule:
    return dde_core.schedule.Schedule.from_config(SD)
