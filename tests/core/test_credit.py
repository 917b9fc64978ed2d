from dataclasses import replace

import pytest
import torch

from dde_core.calibration import NAMES, Calibration
from dde_core.config import ObjectiveConfig
from dde_core.credit import STABLE_DIFFUSION, curves, remaining_fraction, replay
from dde_core.errors import ConfigError, DataError
from dde_core.methods import METHODS
from dde_core.objectives import gradient_weight, preference_logit
from dde_core.schedule import Schedule
from dde_core.step_metrics import bucket_of, bucket_span, step_metrics
from dde_core.train_step import PairErrors, step_losses
from tests.support.methods import OF_DATASETS

CORRECTED = [name for name, method in METHODS.items() if method.corrected]
SHOWN = [1, 50, 200, 500, 799, 1000]


def of(schedule, method="dde", margin=1e-4, **config):
    return curves(ObjectiveConfig(method=method, **config), schedule, margin)


def at(curve, timesteps):
    return [curve[t - 1].item() for t in timesteps]


def test_the_schedule_of_stable_diffusion_is_the_one_that_its_files_give(schedule):
    assert torch.equal(Schedule.from_config(STABLE_DIFFUSION).alpha_bar, schedule.alpha_bar)


# ---- curves at one margin


@pytest.mark.parametrize("method", CORRECTED)
def test_c_is_the_sum_of_the_steps_behind_t_and_has_the_known_values(schedule, method):
    summed = [0.0]
    for t in range(schedule.T - 1, 0, -1):
        summed.append(summed[-1] + schedule.kappa[t + 1].item() * 1e-4)
    c = of(schedule, method).correction
    torch.testing.assert_close(c, torch.tensor(summed[::-1], dtype=torch.float64), rtol=1e-12, atol=0)
    assert at(c / 1e-4, SHOWN) == pytest.approx([6.528, 4.203, 3.259, 2.214, 1.065, 0.0], abs=5e-4)


@pytest.mark.parametrize(("margin", "peak"), [(1e-5, 799), (1e-4, 504), (1e-3, 303)])
def test_the_gradient_weight_of_dde_peaks_where_it_is_known_to(schedule, margin, peak):
    assert of(schedule, margin=margin).gradient_weight.argmax().item() + 1 == peak


def test_the_gradient_weight_of_dde_is_small_at_both_ends(schedule):
    g = of(schedule).gradient_weight
    assert (g[49] / g.max()).item() == pytest.approx(0.0247, abs=5e-5)
    assert 0 < (g[999] / g.max()).item() < 1e-40


def test_without_the_correction_the_peak_is_at_497_and_uniform_is_flat(schedule):
    single = of(schedule, "dde_single")
    uniform = of(schedule, "uniform")
    assert single.gradient_weight.argmax().item() + 1 == 497
    assert (uniform.gradient_weight == uniform.gradient_weight[0]).all()
    assert 0.2 < uniform.gradient_weight[0].item() < 0.25
    assert single.correction.count_nonzero() == uniform.correction.count_nonzero() == 0


def test_the_correction_moves_credit_towards_late_timesteps_by_the_known_ratio(schedule):
    ratio = of(schedule).gradient_weight / of(schedule, "dde_single").gradient_weight
    assert at(ratio, [1, 50, 200, 500]) == pytest.approx([0.0737, 0.216, 0.311, 0.386], abs=5e-4)
    assert ratio[999].item() == pytest.approx(1, abs=1e-12)
    assert (ratio.diff() > 0).all()


def test_a_correction_of_the_wrong_sign_and_that_of_the_mode_would_raise_the_weight(schedule):
    dde = of(schedule)
    single = of(schedule, "dde_single")
    mode = of(schedule, calibration_point="mode")
    margins = torch.full_like(dde.weight, 1e-4)
    wrong = gradient_weight(dde.weight, preference_logit(5000.0, dde.weight, margins, -dde.correction))
    for g in (wrong, mode.gradient_weight):
        assert (g[:999] > single.gradient_weight[:999]).all()
    assert (mode.correction[:999] < 0).all()
    assert mode.correction.abs().max() < 0.01 * dde.correction.max()


def test_the_sampled_point_converges_to_the_expected_one(schedule):
    assert torch.equal(
        of(schedule, calibration_point="sampled").gradient_weight, of(schedule).gradient_weight
    )


def test_dde_step_is_uniform_with_the_correction_of_dde(schedule):
    step = of(schedule, "dde_step")
    dde = of(schedule)
    assert torch.equal(step.correction, dde.correction)
    expected = 0.5 * torch.sigmoid(-5000.0 * (0.5 * 1e-4 + dde.correction))
    torch.testing.assert_close(step.gradient_weight, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("margin", [-1.0, 0.0, 1e-4])
def test_sft_weighs_every_timestep_alike_whatever_the_margin(schedule, margin):
    sft = of(schedule, "sft", margin)
    assert (sft.gradient_weight == 1).all()
    assert (sft.correction == 0).all()


def test_discounted_draws_late_timesteps_more_often(schedule):
    density = of(schedule, "discounted").density
    torch.testing.assert_close(
        density[1:] / density[:-1], torch.full((999,), 0.9 ** (1 / 20), dtype=torch.float64) ** -1
    )
    assert density.mean().item() == pytest.approx(1, rel=1e-12)
    assert density.max().item() == pytest.approx(5.28, abs=5e-3)
    assert (1 / density.square().mean()).item() == pytest.approx(0.38, abs=5e-3)
    assert (of(schedule).density == 1).all()


def test_credit_is_the_same_whether_t_is_drawn_by_its_density_or_weighted_with_it(schedule):
    drawn, weighted = (of(schedule, "discounted", t_sampling=how) for how in ("method", "uniform"))
    torch.testing.assert_close(drawn.credit, weighted.credit, rtol=1e-12, atol=0)
    assert (weighted.density == 1).all()
    assert weighted.gradient_weight.max() > 4 * drawn.gradient_weight.max()


@pytest.mark.parametrize("method", OF_DATASETS)
def test_within_a_range_all_credit_is_inside_and_the_density_grows(schedule, method):
    c = of(schedule, method, t_min=200, t_max=700)
    inside = (torch.arange(1, 1001) >= 200) & (torch.arange(1, 1001) <= 700)
    for curve in (c.gradient_weight, c.density):
        assert (curve[inside] > 0).all()
        assert (curve[~inside] == 0).all()
    assert c.density.sum().item() == pytest.approx(1000, rel=1e-12)
    assert c.correction[700:].count_nonzero() == 0


@pytest.mark.parametrize("method", OF_DATASETS)
@pytest.mark.parametrize("margin", [-1e6, -1.0, 0.0, 1.0, 1e6])
def test_no_margin_leaves_an_infinity(schedule, method, margin):
    c = curves(ObjectiveConfig(method=method, beta=1e300), schedule, margin)
    assert all(curve.isfinite().all() for curve in (c.correction, c.gradient_weight, c.density))


@pytest.mark.parametrize("margin", [float("nan"), float("inf"), -float("inf"), 2e6])
def test_a_margin_that_is_no_margin_is_refused(schedule, margin):
    with pytest.raises(ConfigError, match=f"margin must lie between -1e6 and 1e6, got {margin}"):
        of(schedule, margin=margin)


def test_timesteps_that_the_schedule_does_not_have_are_refused(schedule):
    with pytest.raises(ConfigError, match="t_max must be at most T = 1000, got 1001"):
        of(schedule, t_max=1001)


# ---- convergence of the coefficients


def test_coefficients_converge_within_100_steps_of_2048_pairs_and_481_of_64(schedule):
    dde = ObjectiveConfig()
    left = remaining_fraction(dde, schedule, 2048, torch.tensor([0, 1, 100]))
    assert left.tolist() == pytest.approx([1, 0.9129, 1.1e-4], rel=1e-2)
    assert remaining_fraction(dde, schedule, 64, torch.tensor([481])).item() == pytest.approx(0.05, abs=3e-4)
    assert (
        remaining_fraction(replace(dde, calibration_bins=50), schedule, 64, torch.tensor([60])).item() < 0.05
    )
    half = replace(dde, t_min=201, t_max=700)
    inside = replace(dde, calibration_bins=500)
    steps = torch.tensor([30])
    assert torch.equal(
        remaining_fraction(half, schedule, 64, steps), remaining_fraction(inside, schedule, 64, steps)
    )


@pytest.mark.parametrize("bins", [0, 50])
def test_the_law_of_convergence_is_what_a_calibration_does(schedule, bins):
    config = ObjectiveConfig(calibration_bins=bins)
    calibration = Calibration(schedule, config)
    calibration.load_state_dict({name: torch.ones(bins or 1000, dtype=torch.float64) for name in NAMES})
    generator = torch.Generator().manual_seed(0)
    none = torch.zeros(64)
    for _ in range(100):
        t = torch.randint(1, 1001, (64,), generator=generator)
        calibration.update(t, PairErrors(none, none), PairErrors(none, none))
    recorded = calibration.theta_w if bins else calibration.theta_w[1:]
    law = remaining_fraction(config, schedule, 64, torch.tensor([100])).item()
    assert recorded.mean().item() == pytest.approx(law, rel=0.05)


# ---- a run from its margins


def straight_run(schedule, config, steps=40, pairs=32):
    """(step, t, margin, g) of a run as in training: random errors, C(t) updated after each step."""
    generator = torch.Generator().manual_seed(1)
    calibration = Calibration(schedule, config)
    rows = []
    for step in range(1, steps + 1):
        t = torch.randint(config.t_min, (config.t_max or 1000) + 1, (pairs,), generator=generator)
        ref = 0.2 + 0.1 * torch.rand(2, pairs, generator=generator, dtype=torch.float64)
        theta = ref + 3e-4 * torch.randn(2, pairs, generator=generator, dtype=torch.float64)
        z = torch.zeros(pairs)
        theta_errors = PairErrors(theta[0], theta[1], z, z)
        ref_errors = PairErrors(ref[0], ref[1], z, z)
        terms = step_losses(theta_errors, ref_errors, t, config, schedule, calibration.correction(t))
        calibration.update(t, theta_errors, ref_errors)
        margin = (ref[0] - theta[0]) - (ref[1] - theta[1])
        rows.append((torch.full((pairs,), step), t, margin, terms.gradient_weight))
    return [torch.cat(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("method", OF_DATASETS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"calibration_bins": 7},
        {"calibration_point": "mode"},
        {"calibration_point": "sampled", "ema_rate": 0.5},
        {"t_min": 100, "t_max": 300, "calibration_bins": 20, "t_sampling": "uniform", "max_weight": 0.1},
    ],
    ids=str,
)
def test_a_replay_of_the_margins_gives_the_weights_of_the_run(schedule, method, settings):
    config = ObjectiveConfig(method=method, **settings)
    step, t, margin, g = straight_run(schedule, config)
    predicted = replay(config, schedule, step, t, margin)
    assert predicted.dtype == torch.float64
    torch.testing.assert_close(predicted, g, rtol=1e-12, atol=1e-12)
    assert g.count_nonzero() > 0


def test_a_replay_needs_the_history_of_a_corrected_method(schedule):
    config = ObjectiveConfig(ema_rate=0.5)
    step, t, margin, g = straight_run(schedule, config)
    late = step > 20
    forgetful = replay(config, schedule, step[late], t[late], margin[late])
    assert ((forgetful - g[late]).abs() > 0.01 * g[late]).any()


def test_sft_needs_no_margins_and_others_do(schedule):
    t = torch.tensor([1, 500, 1000])
    step = torch.tensor([1, 1, 2])
    assert replay(ObjectiveConfig(method="sft"), schedule, step, t).tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match="margin is needed by method 'uniform', got None"):
        replay(ObjectiveConfig(method="uniform"), schedule, step, t)


def test_steps_out_of_order_are_refused(schedule):
    t = torch.tensor([1, 500, 1000])
    with pytest.raises(DataError, match="step must not decrease, got 1 after 2"):
        replay(ObjectiveConfig(), schedule, torch.tensor([1, 2, 1]), t, torch.zeros(3))


# ---- tenths of the timesteps


@pytest.mark.parametrize("timesteps", [1000, 25, 7])
def test_a_bucket_is_that_of_the_metrics_and_holds_its_span(schedule, timesteps):
    for t in range(1, timesteps + 1):
        one = torch.tensor([t])
        first, last = bucket_span(bucket_of(one, timesteps).item(), timesteps)
        assert first <= t <= last
        errors = PairErrors(torch.zeros(1), torch.zeros(1))
        terms = step_losses(errors, errors, one, ObjectiveConfig(method="uniform"), schedule)
        assert f"margin_t{last:04d}" in step_metrics(one, errors, errors, terms, timesteps)
