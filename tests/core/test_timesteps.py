"""How t is drawn: each method's density, uniform draws that are weighted with it, and ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dde_core.calibration import NAMES, Calibration
from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError
from dde_core.methods import METHODS
from dde_core.noise import draw_timestep
from dde_core.objectives import importance, method_distribution, sampling_distribution
from dde_core.schedule import Schedule
from dde_core.train_step import PairErrors, step_losses
from tests.support.methods import OF_DATASETS

EVERY_T = torch.arange(1, 1001)
RANGES = [{}, {"t_min": 200, "t_max": 700}, {"t_min": 990}, {"t_max": 1}]


def inside(config: ObjectiveConfig) -> torch.Tensor:
    """bool [T + 1]."""
    t = torch.arange(1001)
    return (t >= config.t_min) & (t <= (config.t_max or 1000))


# ---- densities


def test_discounted_draws_t_in_proportion_to_a_power_of_what_09_in_50_steps_is_in_1000(schedule):
    p = method_distribution(ObjectiveConfig(method="discounted"), schedule)
    gamma = 0.9 ** (50 / 1000)
    assert gamma == pytest.approx(0.99475, abs=5e-6)
    powers = torch.tensor([gamma ** (1000 - t) for t in range(1, 1001)], dtype=torch.float64)
    torch.testing.assert_close(p[1:], powers / powers.sum(), rtol=1e-12, atol=0)
    assert p[0] == 0
    ratio = p[1:] * 1000
    assert ratio.max().item() == pytest.approx(5.28, abs=5e-3)
    assert ratio.argmax() == 999
    assert (ratio.mean() ** 2 / ratio.square().mean()).item() == pytest.approx(0.38, abs=5e-3), (
        "effective sample size"
    )
    halved = method_distribution(ObjectiveConfig(method="discounted", gamma=0.5), schedule)
    assert (halved[1000] / halved[980]).item() == pytest.approx(2, rel=1e-9), (
        "20 timesteps are one of 50 steps"
    )


def test_the_discount_of_a_shorter_schedule_is_the_same_over_its_whole_length(sd_config):
    short = method_distribution(
        ObjectiveConfig(method="discounted"), Schedule.from_config(sd_config | {"num_train_timesteps": 100})
    )
    assert (short[100] / short[98]).item() == pytest.approx(1 / 0.9, rel=1e-9)


@pytest.mark.parametrize("limits", RANGES, ids=str)
@pytest.mark.parametrize("t_sampling", ["method", "uniform"])
@pytest.mark.parametrize("method", OF_DATASETS)
def test_a_range_keeps_the_density_inside_it_and_renormalises(schedule, method, t_sampling, limits):
    config = ObjectiveConfig(method=method, t_sampling=t_sampling, **limits)
    within, whole = inside(config), method_distribution(ObjectiveConfig(method=method), schedule)
    p, drawn = method_distribution(config, schedule), sampling_distribution(config, schedule)
    torch.testing.assert_close(p, torch.where(within, whole, 0) / whole[within].sum(), rtol=1e-12, atol=0)
    if t_sampling == "uniform" or method != "discounted":
        torch.testing.assert_close(drawn, within.double() / within.sum(), rtol=1e-12, atol=0)
    else:
        assert torch.equal(drawn, p)
    ratio = importance(config, schedule)
    assert (ratio[~within] == 0).all()
    torch.testing.assert_close(ratio * drawn, p, rtol=1e-12, atol=0)
    assert (ratio[within] == 1).all() or (method, t_sampling) == ("discounted", "uniform")


# ---- uniform draws that are weighted


def expected(config: ObjectiveConfig, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """The expected loss over t and its gradient, summed over every t: three pairs, two parameters."""
    parameters = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    generator, loss = torch.Generator().manual_seed(0), torch.zeros((), dtype=torch.float64)
    drawn = sampling_distribution(config, schedule)[1:]
    for _ in range(3):
        slopes, ref = (
            torch.rand(2, 1000, 2, generator=generator).double(),
            torch.rand(2, 1000, generator=generator).double(),
        )
        theta = 0.01 * (slopes @ parameters) + ref
        terms = step_losses(PairErrors(*theta), PairErrors(*ref), EVERY_T, config, schedule, ref[0] * 1e-3)
        loss = loss + (drawn * terms.loss).sum() / 3
    (gradient,) = torch.autograd.grad(loss, parameters)
    return loss.detach(), gradient


@pytest.mark.parametrize("limits", RANGES, ids=str)
@pytest.mark.parametrize("method", OF_DATASETS)
def test_uniform_draws_that_are_weighted_have_the_expectation_of_drawing_by_the_density(
    schedule, method, limits
):
    drawn, weighted = (
        expected(ObjectiveConfig(method=method, t_sampling=how, beta=500.0, **limits), schedule)
        for how in ("method", "uniform")
    )
    for of_drawn, of_weighted in zip(drawn, weighted, strict=True):
        assert of_drawn.norm() > 0
        torch.testing.assert_close(of_weighted, of_drawn, rtol=1e-12, atol=0)


def test_uniform_draws_without_the_weights_would_not(schedule):
    discounted, uniform = (
        expected(ObjectiveConfig(method=m, beta=500.0), schedule) for m in ("discounted", "uniform")
    )
    assert ((discounted[0] - uniform[0]) / discounted[0]).abs() > 1e-3
    assert ((discounted[1] - uniform[1]).norm() / discounted[1].norm()) > 1e-3


def chi_square(drawn: np.ndarray, p: np.ndarray, cells: int = 10) -> float:
    """Of as many cells of about equal probability; cells - 1 degrees of freedom."""
    cell = np.minimum((np.cumsum(p) - p / 2) * cells, cells - 1).astype(int)
    counts, wanted = (
        np.bincount(cell[drawn], minlength=cells),
        len(drawn) * np.bincount(cell, weights=p, minlength=cells),
    )
    return float(((counts - wanted) ** 2 / wanted).sum())


@pytest.mark.parametrize("limits", RANGES[:2], ids=str)
@pytest.mark.parametrize(
    ("method", "t_sampling"), [("dde", "method"), ("discounted", "method"), ("discounted", "uniform")]
)
def test_draws_follow_the_density(schedule, method, t_sampling, limits):
    config = ObjectiveConfig(method=method, t_sampling=t_sampling, **limits)
    p = sampling_distribution(config, schedule).numpy()
    cumulative = p.cumsum() / p.sum()
    drawn = np.array([draw_timestep(0, f"pair-{i}", 0, cumulative) for i in range(5000)])
    assert inside(config)[drawn].all()
    assert chi_square(drawn, p) < 27.9  # p = .001 with 9 degrees of freedom
    other = ObjectiveConfig(
        method="dde" if t_sampling == "method" and method == "discounted" else "discounted", **limits
    )
    assert chi_square(drawn, sampling_distribution(other, schedule).numpy()) > 100, "and not another one"


# ---- ranges


@pytest.mark.parametrize("point", ["expected", "sampled", "mode"])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.corrected])
def test_coefficients_outside_of_the_range_stay_as_they_are(schedule, method, point):
    config = ObjectiveConfig(method=method, calibration_point=point, ema_rate=1.0, t_min=200, t_max=700)
    free, ranged = (
        Calibration(schedule, ObjectiveConfig(calibration_point=point, ema_rate=1.0)),
        Calibration(schedule, config),
    )
    start = {name: torch.full((1000,), 7.0, dtype=torch.float64) for name in NAMES}
    columns = torch.rand(8, 1000, generator=torch.Generator().manual_seed(0))
    for calibration in (free, ranged):
        calibration.load_state_dict(start)
        calibration.update(EVERY_T, PairErrors(*columns[:4]), PairErrors(*columns[4:]))
    within = inside(config)[1:]
    for name in NAMES:
        assert (getattr(ranged, name)[~within] == 7).all()
        assert torch.equal(getattr(ranged, name)[within], getattr(free, name)[within])
        assert (getattr(free, name)[within] != 7).all()
    correction = ranged.correction(EVERY_T)
    assert (correction[:199] == correction[198]).all(), "nothing is summed outside"
    assert (correction[699:] == 0).all()


@pytest.mark.parametrize("of", [method_distribution, sampling_distribution, importance])
@pytest.mark.parametrize("method", OF_DATASETS)
def test_a_range_that_the_schedule_does_not_have_is_refused_with_its_end(schedule, method, of):
    for end in ("t_min", "t_max"):
        with pytest.raises(ConfigError, match=f"{end} must be at most T = 1000, got 1001"):
            of(ObjectiveConfig(method=method, **{end: 1001}), schedule)


def test_no_discount_is_so_small_that_a_range_is_empty(schedule):
    p = sampling_distribution(ObjectiveConfig(method="discounted", gamma=1e-8, t_max=100), schedule)
    assert p.sum() == pytest.approx(1)
    assert p[100] > 0.3
    assert p[101:].sum() == p[0] == 0


@pytest.mark.parametrize("method", OF_DATASETS)
def test_an_empty_range_is_refused(method):
    with pytest.raises(ConfigError, match="t_max must be 0 or at least t_min = 700, got 699"):
        ObjectiveConfig(method=method, t_min=700, t_max=699)
