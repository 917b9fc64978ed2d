"""Errors against the Gaussians of one step and of one shot, by brute force, in float64, per element."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dde_core.calibration import NAMES, Calibration
from dde_core.config import ObjectiveConfig
from dde_core.noise import draw_evaluation_point
from dde_core.schedule import add_noise, mode_weight, x0_from
from dde_core.train_step import PairBatch, PairErrors, pair_errors

SHAPE = (4, 8, 8)
EVERY_T = list(range(2, 1001))


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(
        *(shape or (1, *SHAPE)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


class Step:
    """Means of q(x_{t-1} | x_t, x0) and p(x_{t-1} | x_t) for the prediction ``eps_hat``; their variance."""

    def __init__(self, schedule, t: int, x0, eps, eps_hat) -> None:
        now, before = schedule.alpha_bar[t].item(), schedule.alpha_bar[t - 1].item()
        alpha, beta = now / before, 1 - now / before
        x_t = math.sqrt(now) * x0 + math.sqrt(1 - now) * eps
        self.x0_hat = (x_t - math.sqrt(1 - now) * eps_hat) / math.sqrt(now)
        on_x0, on_x_t = math.sqrt(before) * beta / (1 - now), math.sqrt(alpha) * (1 - before) / (1 - now)
        self.mean, self.mean_hat = (on_x0 * each + on_x_t * x_t for each in (x0, self.x0_hat))
        self.variance = (1 - before) / (1 - now) * beta

    def kl(self) -> float:
        """Of two normal distributions: log(s_p/s_q) + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2."""
        of_q, of_p = self.variance, self.variance
        each = math.log(of_p / of_q) / 2 + (of_q + (self.mean - self.mean_hat).square()) / (2 * of_p) - 0.5
        return each.mean().item()

    def log_ratio(self, z) -> torch.Tensor:
        """log p - log q at x_{t-1} = mean + sigma z of q, a mean over elements."""
        x = self.mean + math.sqrt(self.variance) * z
        log_q, log_p = (
            -(x - mean).square() / (2 * self.variance) - math.log(2 * math.pi * self.variance) / 2
            for mean in (self.mean, self.mean_hat)
        )
        return (log_p - log_q).mean(dim=(-3, -2, -1))


def test_kappa_times_the_error_is_the_kl_of_one_step_at_every_t(schedule):
    x0, eps, eps_hat = (randn(seed) for seed in range(3))
    e = (eps - eps_hat).square().mean().item()
    kl = [Step(schedule, t, x0, eps, eps_hat).kl() for t in EVERY_T]
    torch.testing.assert_close(
        schedule.kappa[2:] * e, torch.tensor(kl, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_in_terms_of_x0_the_kl_of_one_step_is_half_the_loss_of_snr_times_the_error(schedule):
    x0, eps, eps_hat = (randn(seed) for seed in range(3))
    steps = [Step(schedule, t, x0, eps, eps_hat) for t in EVERY_T]
    of_x0 = torch.tensor([(x0 - step.x0_hat).square().mean().item() for step in steps], dtype=torch.float64)
    kl = torch.tensor([step.kl() for step in steps], dtype=torch.float64)
    torch.testing.assert_close((schedule.snr[1:-1] - schedule.snr[2:]) / 2 * of_x0, kl, rtol=1e-11, atol=0)


@pytest.mark.parametrize("t", [1, 2, 50, 400, 999, 1000])
def test_one_shot_of_ddim_from_t_to_0_misses_by_the_error_over_snr(schedule, t):
    x0, eps, eps_hat = (randn(seed) for seed in range(3))
    x_t, when = add_noise(schedule, x0, eps, torch.tensor([t])), torch.tensor([t])
    x0_hat = x0_from(schedule, eps_hat, x_t, when)
    end = 0  # DDIM to t' with sigma 0: sqrt(alpha_bar_t') x0_hat + sqrt(1 - alpha_bar_t') eps_hat
    mu_hat = schedule.alpha_bar[end].sqrt() * x0_hat + (1 - schedule.alpha_bar[end]).sqrt() * eps_hat
    found = (x0 - mu_hat).square().mean() * schedule.snr[t]
    torch.testing.assert_close(found, (eps - eps_hat).square().mean(), rtol=1e-12, atol=0)


def test_the_distance_of_the_means_is_the_mode_weight_times_the_error_at_every_t(schedule):
    x0, eps, eps_hat = (randn(seed) for seed in range(3))
    steps = [Step(schedule, t, x0, eps, eps_hat) for t in (1, *EVERY_T)]
    halves = torch.tensor(
        [(step.mean_hat - step.mean).square().mean().item() / 2 for step in steps], dtype=torch.float64
    )
    e = (eps - eps_hat).square().mean().item()
    weight = mode_weight(schedule.alpha_bar)
    torch.testing.assert_close(weight[1:] * e, halves, rtol=1e-11, atol=0)
    assert (halves[1:] < 0.1 * schedule.kappa[2:] * e).all(), "and no KL"


# ---- the same as recorded by a calibration


def a_model(seed: int):
    """Predicts noise by its own lights, whatever it is told."""
    weight = randn(seed, 4, 4, 3, 3) / 6
    return lambda x_t, timestep, **_: SimpleNamespace(
        sample=torch.nn.functional.conv2d(x_t, weight, padding=1)
    )


def pairs(t: list[int], z_seed: int) -> PairBatch:
    told = {f"conditioning_{side}": {"encoder_hidden_states": torch.zeros(len(t), 1, 1)} for side in "wl"}
    names = [f"{kind}_{side}" for kind in ("latents", "noise") for side in "wl"]
    drawn = {name: randn(seed, len(t), *SHAPE) for seed, name in enumerate(names)}
    z = {f"z_{side}": randn(z_seed + side_seed, len(t), *SHAPE) for side_seed, side in enumerate("wl")}
    ids = tuple(map(str, range(len(t))))
    return PairBatch(pair_ids=ids, t=torch.tensor(t), share=torch.ones(len(t)), **drawn, **told, **z)


def recorded(
    schedule, point: str, batch: PairBatch, policy, reference, reference_batch: PairBatch | None = None
):
    """The four arrays after one update at rate 1."""
    calibration = Calibration(schedule, ObjectiveConfig(calibration_point=point, ema_rate=1.0))
    theta, ref = (
        pair_errors(policy, schedule, batch),
        pair_errors(reference, schedule, reference_batch or batch),
    )
    calibration.update(batch.t, theta, ref)
    return {name: getattr(calibration, name) for name in NAMES}


@pytest.mark.parametrize("point", ["expected", "sampled", "mode"])
def test_what_is_recorded_is_what_the_gaussians_say_at_the_configured_point(schedule, point):
    t = [2, 3, 50, 500, 999, 1000]
    batch, models = pairs(t, z_seed=10), {"theta": a_model(1), "ref": a_model(2)}
    arrays = recorded(schedule, point, batch, models["theta"], models["ref"])
    for name in NAMES:
        model, side = name.split("_")
        latents, eps, z = (getattr(batch, f"{kind}_{side}") for kind in ("latents", "noise", "z"))
        x_t = add_noise(schedule, latents, eps, batch.t)
        eps_hat = models[model](x_t, batch.t - 1).sample
        for i, each in enumerate(t):
            step = Step(schedule, each, latents[i], eps[i], eps_hat[i])
            value = {
                "expected": -step.kl(),
                "sampled": step.log_ratio(z[i]).item(),
                "mode": (step.mean_hat - step.mean).square().mean().item() / 2,
            }
            assert arrays[name][each - 1].item() == pytest.approx(value[point], rel=1e-9), (name, each)
        assert arrays[name].count_nonzero() == len(t)


@pytest.mark.parametrize("t", [2, 100, 900])
def test_the_sampled_point_averages_to_the_expected_one(schedule, t):
    n, x0, eps, eps_hat = 3000, randn(0), randn(1), randn(1) + 0.5 * randn(2)
    z = torch.stack([draw_evaluation_point(0, "pair", "w", draw, SHAPE) for draw in range(n)]).double()
    e, off = (eps_hat - eps).square().mean().item(), (z * (eps_hat - eps)).mean(dim=(1, 2, 3))
    errors = PairErrors(torch.full((n,), e, dtype=torch.float64), torch.zeros(n), off, torch.zeros(n))
    arrays = {}
    for point in ("sampled", "expected"):
        calibration = Calibration(schedule, ObjectiveConfig(calibration_point=point, ema_rate=1.0))
        calibration.update(torch.full((n,), t), errors, errors)
        arrays[point] = calibration.theta_w[t - 1].item()
    drawn = Step(schedule, t, x0, eps, eps_hat).log_ratio(z)
    assert arrays["sampled"] == pytest.approx(drawn.mean().item(), rel=1e-9)
    standard_error = drawn.std().item() / math.sqrt(n)
    assert standard_error == pytest.approx(
        math.sqrt(2 * schedule.kappa[t] * e / (n * math.prod(SHAPE))), rel=0.05
    )
    assert abs(arrays["sampled"] - arrays["expected"]) < 4 * standard_error
    assert abs(arrays["expected"]) > 8 * standard_error, "it could have been told apart from nothing"


def test_policy_and_reference_share_z_and_with_two_of_them_the_noise_would_drown_the_signal(schedule):
    t, reference = list(range(200, 800)), a_model(1)

    def policy(x_t, timestep, **_):  # a hundredth of a percent away, as after a few steps
        return SimpleNamespace(
            sample=reference(x_t, timestep).sample + 1e-4 * a_model(2)(x_t, timestep).sample
        )

    batch, other_z = pairs(t, z_seed=10), pairs(t, z_seed=20)
    kept = torch.tensor(t) - 1

    def noise(reference_batch: PairBatch) -> torch.Tensor:
        """What is recorded less its expectation, policy less reference."""
        sampled, expected = (
            recorded(schedule, point, batch, policy, reference, reference_batch)
            for point in ("sampled", "expected")
        )
        off = {name: (sampled[name] - expected[name])[kept] for name in NAMES}
        return off["theta_w"] - off["ref_w"]

    ratio = (noise(other_z).std() / noise(batch).std()).item()
    print(f"noise of r_theta - r_ref, two z against one: {ratio:.0f} times")
    assert ratio > 1000
