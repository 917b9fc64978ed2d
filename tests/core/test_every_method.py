"""Laws that every method of the table obeys, each with its own conventions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from dde_core.calibration import NAMES, Calibration
from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError
from dde_core.methods import METHODS
from dde_core.objectives import OBJECTIVES, importance, uniform_density
from dde_core.schedule import add_noise
from dde_core.train_step import PairBatch, PairErrors, pair_errors, step_losses
from tests.support.methods import OF_DATASETS, PREFERENCE
from tests.support.tiny_unet import TEXT_WIDTH, tiny_unet

POINTS = ("expected", "sampled", "mode")
CASES = [
    (name, point)
    for name, method in OF_DATASETS.items()
    for point in (POINTS if method.corrected else POINTS[:1])
]
WITHOUT_SFT = [(method, point) for method, point in CASES if method in PREFERENCE]


def pairs(t, losers: bool = True, dtype=torch.float64) -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(len(t), 3, TEXT_WIDTH, generator=generator, dtype=dtype)
    sides = {f"conditioning_{side}": {"encoder_hidden_states": text} for side in "wl"[: 1 + losers]}
    for name in ("latents", "noise", "z"):
        for side in "wl"[: 1 + losers]:
            sides[f"{name}_{side}"] = torch.randn(len(t), 4, 8, 8, generator=generator, dtype=dtype)
    ids = tuple(f"pair-{i}" for i in range(len(t)))
    return PairBatch(pair_ids=ids, t=torch.tensor(t), share=torch.ones(len(t), dtype=dtype), **sides)


@pytest.mark.parametrize("name", METHODS)
def test_the_table_tells_which_methods_draw_t_unevenly(name):
    """A ledger draws t uniformly: without the flag another density would read errors of other timesteps."""
    assert METHODS[name].discounted == (OBJECTIVES[name].density is not uniform_density)


def turned_round(batch: PairBatch) -> PairBatch:
    """The same pairs with the preference turned round."""
    names = ("latents", "noise", "conditioning", "z")
    sides = {f"{name}_{to}": getattr(batch, f"{name}_{of}") for name in names for to, of in ("wl", "lw")}
    return dataclasses.replace(batch, **sides)


def errors_of(policy, reference, schedule, batch: PairBatch) -> tuple[PairErrors, PairErrors]:
    with torch.no_grad():
        ref = pair_errors(reference, schedule, batch)
    return pair_errors(policy, schedule, batch), ref


def moved(unet: torch.nn.Module, amount: float = 0.02) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += amount * torch.randn_like(parameter)
    return unet


# ---- a policy that is its reference


@pytest.mark.parametrize("t_sampling", ["method", "uniform"])
@pytest.mark.parametrize(("method", "point"), WITHOUT_SFT)
def test_a_policy_that_is_its_reference_has_logit_0_and_loses_log_2_exactly(
    schedule, method, point, t_sampling
):
    config = ObjectiveConfig(method=method, calibration_point=point, t_sampling=t_sampling)
    batch, calibration = pairs([1, 2, 50, 500, 999, 1000], dtype=torch.float32), Calibration(schedule, config)
    for _ in range(2):  # and what it records keeps C at 0
        theta, ref = errors_of(tiny_unet(), tiny_unet(), schedule, batch)
        terms = step_losses(theta, ref, batch.t, config, schedule, calibration.correction(batch.t))
        assert (terms.margin == 0).all()
        assert (terms.logit == 0).all()
        ratio = importance(config, schedule)[batch.t]
        assert torch.equal(terms.loss.detach(), ratio * math.log(2))
        assert t_sampling == "uniform" or (ratio == 1).all()
        calibration.update(batch.t, theta, ref)
    assert calibration.theta_w.count_nonzero() >= 5, "something was recorded"
    assert (calibration.correction(torch.arange(1, 1001)) == 0).all()


@pytest.mark.parametrize("method", PREFERENCE)
def test_what_is_given_to_a_method_counts(schedule, method):
    """So that the laws around this one are about something: another policy has another loss."""
    batch = pairs([2, 500, 999])
    theta, ref = errors_of(moved(tiny_unet().double()), tiny_unet().double(), schedule, batch)
    terms = step_losses(
        theta, ref, batch.t, ObjectiveConfig(method=method), schedule, torch.zeros(3, dtype=torch.float64)
    )
    assert ((terms.loss - math.log(2)).abs() > 1e-3).all()
    assert not any(value.requires_grad for value in (terms.margin, terms.logit, terms.gradient_weight))
    assert terms.loss.requires_grad


# ---- winner and loser


@pytest.mark.parametrize(("method", "point"), WITHOUT_SFT)
def test_turning_the_preference_round_turns_logits_and_corrections_round(schedule, method, point):
    config = ObjectiveConfig(method=method, calibration_point=point, beta=50.0)
    policy, reference, batch = (
        moved(tiny_unet().double()),
        tiny_unet().double(),
        pairs([2, 50, 500, 999, 1000]),
    )
    found = []
    for each in (batch, turned_round(batch)):
        calibration = Calibration(schedule, config)
        for _ in range(2):
            with torch.no_grad():
                theta, ref = errors_of(policy, reference, schedule, each)
            correction = calibration.correction(each.t)
            terms = step_losses(theta, ref, each.t, config, schedule, correction)
            calibration.update(each.t, theta, ref)
        found.append((terms, correction))
    (terms, correction), (turned, turned_correction) = found
    assert terms.logit.abs().min() > 1e-6
    torch.testing.assert_close(turned.logit, -terms.logit, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(turned_correction, -correction, rtol=1e-9, atol=1e-12)
    assert (correction[:-1] != 0).all()
    both = torch.exp(-terms.loss) + torch.exp(-turned.loss)
    torch.testing.assert_close(both, torch.ones(5, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", PREFERENCE)
def test_a_preference_without_reference_or_loser_is_refused(schedule, method):
    batch, config = pairs([500]), ObjectiveConfig(method=method)
    with torch.no_grad():
        theta, ref = errors_of(tiny_unet().double(), tiny_unet().double(), schedule, batch)
    for given in ((theta, None), (theta, PairErrors(ref.w)), (PairErrors(theta.w), ref)):
        with pytest.raises(ConfigError, match=f"are needed by method '{method}'"):
            step_losses(*given, batch.t, config, schedule, torch.zeros(1, dtype=torch.float64))


# ---- soft labels


@pytest.mark.parametrize("method", PREFERENCE)
def test_a_soft_label_loses_p_times_the_preference_and_1_minus_p_times_its_opposite(schedule, method):
    hard = ObjectiveConfig(method=method, beta=50.0)
    soft = dataclasses.replace(hard, label="soft")
    batch, t = pairs([2, 50, 500, 999, 1000]), torch.tensor([2, 50, 500, 999, 1000])
    p = torch.tensor([1.0, 0.9, 0.75, 0.6, 0.51], dtype=torch.float64)
    with torch.no_grad():
        theta, ref = errors_of(moved(tiny_unet().double()), tiny_unet().double(), schedule, batch)
    correction = torch.linspace(-1, 1, 5, dtype=torch.float64) / 50 * METHODS[method].corrected
    terms = step_losses(theta, ref, t, soft, schedule, correction, p)
    own = step_losses(theta, ref, t, hard, schedule, correction).loss
    turned = PairErrors(theta.l, theta.w), PairErrors(ref.l, ref.w)
    opposite = step_losses(*turned, t, hard, schedule, -correction).loss
    torch.testing.assert_close(terms.loss, p * own + (1 - p) * opposite, rtol=1e-9, atol=1e-12)
    assert (terms.loss[1:] - own[1:]).abs().min() > 1e-6


@pytest.mark.parametrize("method", OF_DATASETS)
def test_a_whole_label_has_the_same_loss_and_gradient_soft_or_hard_to_the_bit(schedule, method):
    losers = METHODS[method].has_loser
    batch = pairs([1, 2, 500, 999, 1000], losers, dtype=torch.float32)
    found = []
    for label in ("hard", "soft"):
        policy = moved(tiny_unet())
        theta, ref = errors_of(policy, tiny_unet(), schedule, batch)
        config = ObjectiveConfig(method=method, label=label)
        correction = torch.full((5,), 1e-5, dtype=torch.float64)
        terms = step_losses(theta, ref, batch.t, config, schedule, correction, batch.share)
        terms.loss.mean().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        found.append((terms.loss.detach(), terms.gradient_weight, terms.gradient_weight_at_zero, gradient))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("method", OF_DATASETS)
def test_a_hard_label_and_sft_do_not_read_the_share(schedule, method):
    losers = METHODS[method].has_loser
    batch, nan = pairs([500], losers), torch.full((1,), float("nan"))
    with torch.no_grad():
        theta, ref = errors_of(tiny_unet().double(), tiny_unet().double(), schedule, batch)
    zero = torch.zeros(1, dtype=torch.float64)
    config = ObjectiveConfig(method=method, label="hard" if losers else "soft")
    terms = step_losses(theta, ref, batch.t, config, schedule, zero, nan)
    assert terms.loss.isfinite().all()
    assert terms.share is None


@pytest.mark.parametrize("method", PREFERENCE)
def test_a_soft_label_without_the_shares_is_refused(schedule, method):
    zero, config = torch.zeros(1, dtype=torch.float64), ObjectiveConfig(method=method, label="soft")
    errors = PairErrors(zero, zero)
    with pytest.raises(ConfigError, match="share of each pair is needed"):
        step_losses(errors, errors, torch.tensor([500]), config, schedule, zero)


# ---- sft


def test_sft_is_plain_denoising_on_winners_and_has_its_gradient(schedule):
    ours, plain, batch = (
        tiny_unet().double(),
        tiny_unet().double(),
        pairs([1, 2, 500, 999, 1000], losers=False),
    )
    calls = []
    hook = ours.register_forward_hook(lambda module, arguments, output: calls.append(len(arguments[0])))
    theta = pair_errors(ours, schedule, batch)
    hook.remove()
    assert calls == [5], "winners alone went through the U-Net"
    terms = step_losses(theta, None, batch.t, ObjectiveConfig(method="sft"), schedule)
    noisy = add_noise(schedule, batch.latents_w, batch.noise_w, batch.t)
    loss = F.mse_loss(
        plain(noisy, batch.t - 1, batch.conditioning_w["encoder_hidden_states"]).sample, batch.noise_w
    )
    torch.testing.assert_close(terms.loss.mean(), loss, rtol=1e-12, atol=0)
    assert (terms.gradient_weight == 1).all()
    assert terms.margin is terms.logit is None
    terms.loss.mean().backward()
    loss.backward()
    gradient, expected = (torch.cat([p.grad.flatten() for p in unet.parameters()]) for unet in (ours, plain))
    assert expected.norm() > 1e-3
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-12


def test_sft_reads_neither_losers_nor_reference_nor_beta_where_they_are_given(schedule):
    batch, nan = pairs([500]), torch.full((1,), float("nan"))
    with torch.no_grad():
        theta = pair_errors(tiny_unet().double(), schedule, batch)
    alone = step_losses(theta, None, batch.t, ObjectiveConfig(method="sft"), schedule).loss
    config = ObjectiveConfig(method="sft", beta=1.0, max_weight=1e-3)
    among = step_losses(
        PairErrors(theta.w, nan), PairErrors(nan, nan), batch.t, config, schedule, nan.double()
    ).loss
    assert torch.equal(alone, among)


# ---- t = 1


@pytest.mark.parametrize(("method", "point"), CASES)
def test_t_1_leaves_no_infinity_in_loss_gradient_coefficients_or_correction(schedule, method, point):
    config, losers = ObjectiveConfig(method=method, calibration_point=point), method in PREFERENCE
    policy, calibration = moved(tiny_unet()), Calibration(schedule, config)
    for t in ([1, 1, 1], [1, 2, 1000], [1, 1, 1]):
        batch = pairs(t, losers, dtype=torch.float32)
        theta, ref = errors_of(policy, tiny_unet(), schedule, batch)
        correction = calibration.correction(batch.t)
        terms = step_losses(theta, ref, batch.t, config, schedule, correction)
        policy.zero_grad()
        terms.loss.mean().backward()
        if METHODS[method].corrected:
            calibration.update(batch.t, theta, ref)
        assert correction.isfinite().all()
        assert terms.loss.isfinite().all()
        assert terms.gradient_weight.isfinite().all()
        gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        assert gradient.isfinite().all()
        assert gradient.norm() > 0 or terms.logit.min() > 30, "or every sigmoid is saturated"
    assert all(getattr(calibration, name).isfinite().all() for name in NAMES)
    assert calibration.correction(torch.arange(1, 1001)).isfinite().all()
    if METHODS[method].corrected:
        assert (calibration.theta_w[0] != 0) == (point == "mode")
        assert calibration.theta_w[1] != 0
        assert calibration.correction(torch.tensor([1])) != 0
