import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dde_core.calibration import NAMES, Calibration
from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError, DataError, NonFiniteError
from dde_core.train_step import PairErrors

EVERY_T = torch.arange(1, 1001)


def calibration(schedule, **config):
    return Calibration(schedule, ObjectiveConfig(**config))


def feed(calibration, t, theta_w, ref_w, theta_l, ref_l):
    calibration.update(t, PairErrors(theta_w, theta_l), PairErrors(ref_w, ref_l))


def errors(n, seed=0):
    """Four columns of n errors: theta_w, ref_w, theta_l, ref_l."""
    return 0.1 + torch.rand(4, n, generator=torch.Generator().manual_seed(seed))


def with_margin(margin, n=1000):
    """Errors with the same margin everywhere: the policy is better on the winner and equal on the loser."""
    ref = torch.full((n,), 0.25, dtype=torch.float64)
    return ref - margin, ref, ref, ref


def test_c_of_a_constant_margin_has_the_known_values(schedule):
    converged = calibration(schedule, ema_rate=1.0)
    feed(converged, EVERY_T, *with_margin(1e-4))
    c = converged.correction(torch.tensor([1, 50, 200, 500, 799, 1000])) / 1e-4
    torch.testing.assert_close(
        c, torch.tensor([6.528, 4.203, 3.259, 2.214, 1.065, 0.0], dtype=torch.float64), rtol=0, atol=5e-4
    )
    assert c[-1] == 0
    assert c.dtype == torch.float64
    assert (converged.correction(EVERY_T).diff() < 0).all()


def test_c_sums_what_was_recorded_at_t_plus_1_to_the_last_timestep_and_nothing_else(schedule):
    r = calibration(schedule, ema_rate=1.0)
    columns = errors(1000)
    feed(r, EVERY_T, *columns)
    e_theta_w, e_ref_w, e_theta_l, e_ref_l = columns.double()
    step = schedule.kappa[1:] * (
        (e_ref_w - e_theta_w) - (e_ref_l - e_theta_l)
    )  # step[k] was recorded at t = k + 1
    for t in (1, 2, 500, 998, 999):
        torch.testing.assert_close(r.correction(torch.tensor([t]))[0], step[t:].sum(), rtol=1e-9, atol=1e-12)
    assert r.correction(torch.tensor([1000])) == 0
    torch.testing.assert_close(r.correction(torch.tensor([999]))[0], step[999], rtol=1e-12, atol=0)


def test_one_update_moves_the_entry_of_its_timestep_by_the_rate_times_minus_kappa_e(schedule):
    r = calibration(schedule)
    for _ in range(2):
        feed(r, torch.tensor([40]), *torch.tensor([[0.1], [0.2], [0.3], [0.4]]))
    for name, e in zip(NAMES, (0.1, 0.2, 0.3, 0.4), strict=True):
        array = getattr(r, name)
        assert array[39].item() == pytest.approx(-0.19 * schedule.kappa[40].item() * e, rel=1e-6)
        assert array.count_nonzero() == 1
        assert array.shape == (1000,)
        assert array.dtype == torch.float64


def test_several_samples_at_one_timestep_are_one_update_of_their_mean(schedule):
    several, single = calibration(schedule), calibration(schedule)
    columns = errors(3)
    feed(several, torch.tensor([7, 7, 7]), *columns)
    feed(single, torch.tensor([7]), *columns.double().mean(dim=1, keepdim=True))
    torch.testing.assert_close(several.theta_l, single.theta_l, rtol=1e-12, atol=0)


def test_timestep_1_is_never_recorded_and_leaves_no_infinity(schedule):
    r = calibration(schedule, ema_rate=1.0)
    feed(r, torch.tensor([1, 1, 2]), *errors(3))
    assert all(getattr(r, name)[0] == 0 and getattr(r, name).isfinite().all() for name in NAMES)
    assert r.correction(EVERY_T).isfinite().all()
    feed(r, torch.tensor([1]), *errors(1))
    assert r.correction(torch.tensor([1])) == r.correction(torch.tensor([1, 1]))[0] != 0


def test_the_correction_follows_an_update_and_not_before(schedule):
    r = calibration(schedule)
    t = torch.tensor([10])
    assert r.correction(t) == 0
    feed(r, torch.tensor([20]), *with_margin(1e-3, n=1))
    assert r.correction(t) > 0
    assert r.correction(torch.tensor([20])) == 0


def test_a_policy_equal_to_its_reference_has_no_correction_at_all(schedule):
    r = calibration(schedule)
    e_w, e_l = errors(1000)[:2]
    feed(r, EVERY_T, e_w, e_w, e_l, e_l)
    assert r.theta_w.count_nonzero() == 999
    assert (r.correction(EVERY_T) == 0).all()


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 10, 1000]))
def test_the_arrays_do_not_depend_on_the_order_in_which_workers_were_gathered_to_the_bit(
    schedule, seed, bins
):
    g = torch.Generator().manual_seed(seed)
    t, columns = torch.randint(1, 21, (256,), generator=g), errors(256, seed)
    shuffle = torch.randperm(256, generator=g)
    one, other = calibration(schedule, calibration_bins=bins), calibration(schedule, calibration_bins=bins)
    for _ in range(2):
        feed(one, t, *columns)
        feed(other, t[shuffle], *columns[:, shuffle])
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in NAMES)
    assert one.theta_w.count_nonzero() > 0


def test_errors_that_are_not_finite_are_refused_and_change_nothing(schedule):
    r = calibration(schedule)
    feed(r, EVERY_T, *errors(1000))
    before = r.state_dict()
    bad = errors(1000, seed=1)
    bad[2, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="calibration"):
        feed(r, EVERY_T, *bad)
    assert all(torch.equal(before[name], r.state_dict()[name]) for name in NAMES)


def test_a_restored_calibration_continues_to_the_bit(schedule):
    run, resumed = calibration(schedule), calibration(schedule)
    feed(run, EVERY_T, *errors(1000))
    saved = run.state_dict()
    resumed.correction(EVERY_T)
    resumed.load_state_dict(saved)
    assert torch.equal(run.correction(EVERY_T), resumed.correction(EVERY_T))
    for r in (run, resumed):
        feed(r, EVERY_T, *errors(1000, seed=1))
    assert all(torch.equal(getattr(run, name), getattr(resumed, name)) for name in NAMES)
    assert not torch.equal(saved["theta_w"], run.theta_w)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(schedule):
    r, binned = calibration(schedule), calibration(schedule, calibration_bins=10)
    feed(r, EVERY_T, *errors(1000))
    with pytest.raises(DataError, match=r"theta_w must have 10 entries, got \[1000\]"):
        binned.load_state_dict(r.state_dict())
    with pytest.raises(DataError, match="must hold theta_w, ref_w, theta_l, ref_l, got theta_w"):
        binned.load_state_dict({"theta_w": binned.theta_w})
    assert binned.theta_w.count_nonzero() == 0


def test_after_100_steps_of_2048_pairs_coefficients_have_left_their_start_and_stand_at_their_values(schedule):
    mu, steps, pairs, spread = 0.1, 100, 2048, 0.2
    law = (
        1 - mu * (1 - (1 - 1 / 1000) ** pairs)
    ) ** steps  # the share of the start that is left, in expectation over t
    assert law == pytest.approx(1.1e-4, rel=0.01)
    truth, generator = errors(1000).double(), torch.Generator().manual_seed(1)
    value = torch.where(EVERY_T > 1, -schedule.kappa[1:] * truth, 0.0)
    starts = {"zero": torch.zeros(4, 1000, dtype=torch.float64), "far": 5 * value}
    runs = {name: calibration(schedule, ema_rate=mu) for name in starts}
    for name, start in starts.items():
        runs[name].load_state_dict(dict(zip(NAMES, start, strict=True)))
    for _ in range(steps):
        t = torch.randint(1, 1001, (pairs,), generator=generator)
        drawn = truth[:, t - 1] * (1 + spread * torch.randn(4, pairs, generator=generator))
        for r in runs.values():
            feed(r, t, *drawn)
    zero, far = (
        torch.stack([getattr(r, name) for name in NAMES])[:, 1:] / value[:, 1:] for r in runs.values()
    )
    left = (far - zero) / 5  # the noise is the same in both
    assert left.mean().item() == pytest.approx(law, rel=0.1)
    assert left.max() < 10 * law
    off = zero - 1
    noise = (
        spread * (mu / (2 - mu)) ** 0.5
    )  # of a running mean of single values; batches hold about two of a timestep
    assert off.mean().abs() < law + 4 * noise / off.numel() ** 0.5
    assert 0.6 * noise < off.std() < noise
    assert off.abs().max() < 5 * noise
    c = runs["zero"].correction(EVERY_T[:-1])
    sums = torch.stack([value[0] - value[1] - value[2] + value[3], (noise * value).square().sum(dim=0)])
    wanted, variance = sums.flip(1).cumsum(1).flip(1)[:, 1:]
    assert ((c - wanted).abs() < 5 * variance.sqrt()).all()
    assert (wanted.abs() > 5 * variance.sqrt()).any()


def test_as_many_bins_as_timesteps_are_the_same_as_no_bins(schedule):
    plain, binned = calibration(schedule), calibration(schedule, calibration_bins=1000)
    for r in (plain, binned):
        feed(r, EVERY_T, *errors(1000))
    assert torch.equal(plain.correction(EVERY_T), binned.correction(EVERY_T))
    assert plain.correction(EVERY_T).count_nonzero() == 999


@pytest.mark.parametrize("bins", [1, 7, 50])
def test_bins_that_saw_every_timestep_keep_the_whole_sum_and_c_at_their_edges(schedule, bins):
    plain, binned = (
        calibration(schedule, ema_rate=1.0),
        calibration(schedule, ema_rate=1.0, calibration_bins=bins),
    )
    for r in (plain, binned):
        feed(r, EVERY_T, *with_margin(1e-4))
    assert binned.theta_w.shape == (bins,)
    edges = torch.tensor(
        [t for t in range(1, 1001) if t == 1 or t == 1000 or (t - 1) * bins // 999 != (t - 2) * bins // 999]
    )
    assert len(edges) == bins + 1
    torch.testing.assert_close(binned.correction(edges), plain.correction(edges), rtol=1e-9, atol=1e-14)


def test_one_sample_in_a_bin_speaks_for_all_of_its_timesteps(schedule):
    r = calibration(
        schedule, calibration_bins=9, ema_rate=1.0
    )  # 999 timesteps: bins of 111, the last 890..1000
    feed(r, torch.tensor([900]), *with_margin(1e-4, n=1))
    value = schedule.kappa[900] * 1e-4
    c = r.correction(torch.tensor([1, 889, 890, 999, 1000]))
    torch.testing.assert_close(c, value * torch.tensor([111, 111, 110, 1, 0]), rtol=1e-9, atol=0)


def test_within_a_timestep_range_bins_cover_that_range_and_nothing_outside_counts(schedule):
    r = calibration(schedule, t_min=200, t_max=700, calibration_bins=5, ema_rate=1.0)
    feed(r, EVERY_T, *with_margin(1e-4))
    c = (r.correction(torch.tensor([1, 199, 200, 700, 1000])) / 1e-4).tolist()
    whole, first_bin = schedule.kappa[200:701].sum().item(), schedule.kappa[200:301].mean().item()
    assert c == pytest.approx([whole, whole, whole - first_bin, 0, 0], rel=1e-9)


def test_more_bins_than_timesteps_are_refused(schedule):
    with pytest.raises(ConfigError, match="calibration_bins must be at most T = 1000, got 1001"):
        calibration(schedule, calibration_bins=1001)
