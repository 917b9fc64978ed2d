import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from jaxtyping import TypeCheckError

from dde_core.errors import ConfigError
from dde_core.schedule import Schedule, add_noise, epsilon_from, x0_from


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"num_train_timesteps": 100},
        {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
    ],
)
def test_alpha_bar_at_t_is_diffusers_alphas_cumprod_at_t_minus_1(sd_config, change):
    config = sd_config | change
    theirs = DDIMScheduler(**config)
    ours = Schedule.from_config(config)
    assert config["num_train_timesteps"] == ours.T
    assert ours.alpha_bar.dtype == torch.float64
    assert ours.alpha_bar[0].item() == 1
    torch.testing.assert_close(ours.alpha_bar[1:], theirs.alphas_cumprod.double(), rtol=2e-6, atol=0)


def test_a_saved_scheduler_config_is_read_as_it_stands(sd_config):
    ours = Schedule.from_config(DDIMScheduler(**sd_config, prediction_type="v_prediction").config)
    assert ours.prediction_type == "v_prediction"


def test_snr_and_kappa_are_infinite_only_where_there_is_no_noise_and_no_variance(schedule):
    assert schedule.snr[0] == float("inf")
    assert schedule.kappa[1] == float("inf")
    assert schedule.kappa[0].isnan()
    assert schedule.snr[1:].isfinite().all()
    assert schedule.kappa[2:].isfinite().all()
    assert (schedule.kappa[2:] > 0).all()
    assert (schedule.snr.diff() < 0).all()
    assert (1 / schedule.snr)[1000].item() == pytest.approx(213.588, abs=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_true_output_converts_to_the_true_noise_and_the_true_sample(sd_config, prediction_type):
    schedule = Schedule.from_config(sd_config | {"prediction_type": prediction_type})
    theirs = DDIMScheduler(**sd_config, prediction_type=prediction_type)
    x0, eps = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    t = torch.tensor([1, 400, 1000])
    x_t = add_noise(schedule, x0, eps, t)
    output = eps if prediction_type == "epsilon" else theirs.get_velocity(x0, eps, t - 1)
    torch.testing.assert_close(epsilon_from(schedule, output, x_t, t), eps, rtol=0, atol=1e-5)
    torch.testing.assert_close(x0_from(schedule, output, x_t, t), x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "squaredcos_cap_v2"),
        ("beta_start", None),
        ("num_train_timesteps", None),
        ("prediction_type", "sample"),
        ("rescale_betas_zero_snr", True),  # with epsilon prediction
        ("thresholding", True),
        ("timestep_spacing", "karras"),
        ("use_flow_sigmas", True),
        ("timestep_type", "continuous"),
        ("steps_offset", 1000),
        ("beta_end", "0.012"),
        ("beta_end", 1.5),
        ("num_train_timesteps", 10**9),
        ("clip_sample", True),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("_class_name", "LCMScheduler"),
    ],
)
def test_what_is_not_implemented_is_refused_by_field_and_value(sd_config, field, value):
    with pytest.raises(ConfigError, match=field) as refusal:
        Schedule.from_config(sd_config | {field: value})
    assert (refusal.value.field, refusal.value.value) == (field, value)


ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.mark.parametrize("change", [{}, {"beta_schedule": "linear"}, {"num_train_timesteps": 50}])
def test_zero_terminal_snr_is_diffusers_and_leaves_nothing_of_an_image_at_T(sd_config, change):
    config = sd_config | ZERO | change
    ours = Schedule.from_config(config)
    theirs = DDIMScheduler(**config).alphas_cumprod.double()
    torch.testing.assert_close(ours.alpha_bar[1:], theirs, rtol=1e-4, atol=1e-6)
    assert ours.has_zero_terminal_snr
    assert (ours.alpha_bar[-1], ours.snr[-1]) == (0, 0)
    plain = Schedule.from_config(sd_config | change)
    assert ours.alpha_bar[1].item() == pytest.approx(plain.alpha_bar[1].item(), rel=1e-12)
    assert not plain.has_zero_terminal_snr
    assert ours.kappa[2:-1].isfinite().all()
    assert (ours.snr.diff() < 0).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("change", "field", "value", "first"),
    [
        ({"beta_schedule": "linear", "beta_end": 0.5}, "beta_end", 0.5, 561),
        ({"beta_end": 0.99}, "beta_end", 0.99, 598),
        ({"num_train_timesteps": 4, "trained_betas": [0.5, *[1 - 1e-15] * 3]}, "trained_betas", 1 - 1e-15, 4),
    ],
)
def test_a_schedule_that_loses_the_image_before_its_end_is_refused(
    sd_config, prediction_type, change, field, value, first
):
    config = sd_config | {"prediction_type": prediction_type} | change
    timesteps = config["num_train_timesteps"]
    with pytest.raises(
        ConfigError, match=f"leaves nothing of an image at t = {first} of {timesteps}"
    ) as raised:
        Schedule.from_config(config)
    assert (raised.value.field, raised.value.value) == (field, value)


def test_a_last_beta_of_1_is_zero_terminal_snr(sd_config):
    """As diffusers saves betas that it has rescaled."""
    rescaled = Schedule.from_config(sd_config | ZERO)
    alpha = rescaled.alpha_bar[1:] / rescaled.alpha_bar[:-1]
    change = {"rescale_betas_zero_snr": False, "trained_betas": (1 - alpha).tolist()}
    saved = Schedule.from_config(sd_config | ZERO | change)
    assert saved.has_zero_terminal_snr
    torch.testing.assert_close(saved.alpha_bar, rescaled.alpha_bar, rtol=1e-9, atol=0)
    with pytest.raises(ConfigError, match=r"betas must be between 0 and 1, got 1\.0"):
        Schedule.from_config(sd_config | change)  # with epsilon prediction


def test_zero_terminal_snr_turns_v_into_noise_and_sample_at_T(sd_config):
    schedule = Schedule.from_config(sd_config | ZERO)
    x0, eps = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    t = torch.tensor([1000, 1000])
    x_t = add_noise(schedule, x0, eps, t)
    assert torch.equal(x_t, eps)
    v = -x0
    assert torch.equal(x0_from(schedule, v, x_t, t), x0)
    assert torch.equal(epsilon_from(schedule, v, x_t, t), eps)


def test_trained_betas_must_match_the_timesteps_and_lie_between_0_and_1(sd_config):
    with pytest.raises(ConfigError, match="trained_betas must hold num_train_timesteps = 1000 values, got 3"):
        Schedule.from_config(sd_config | {"trained_betas": [0.1, 0.2, 0.3]})
    with pytest.raises(ConfigError, match=r"betas must be between 0 and 1, got 1\.0"):
        Schedule.from_config(sd_config | {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 1.0]})


def test_shapes_in_annotations_are_checked(schedule):
    with pytest.raises(TypeCheckError):
        add_noise(schedule, randn(2, 4, 8, 8), randn(2, 4, 8, 8), torch.tensor([1, 2, 3]))
