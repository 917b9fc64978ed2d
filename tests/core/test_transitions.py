"""Laws of TailorPO's transition and loss, against torch's own Gaussians in float64."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError
from dde_core.schedule import Schedule, epsilon_from
from dde_core.train_step import PairErrors, StepTerms, step_losses
from dde_core.transitions import Transitions, guided, projection, rank, soft_share

GRID = [1 + 50 * step + 1 for step in reversed(range(20))]
"""952, 902, ..., 2: the paper's timesteps of 20 DDIM steps of diffusers' "leading" spacing."""
SHAPE = (4, 8, 8)
BETA = 10.0


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms(
    schedule: Schedule,
    t: torch.Tensor,
    dz: torch.Tensor,
    theta: torch.Tensor,
    ref: torch.Tensor,
    eta: float = 1.0,
) -> StepTerms:
    """What is trained, of two models' noises."""
    config = ObjectiveConfig(method="tailorpo", beta=BETA, eta=eta)
    errors = [PairErrors(projection(dz, noise)) for noise in (theta, ref)]
    return step_losses(*errors, t, config, schedule)


def numbers(transitions: Transitions, rows: int) -> torch.Tensor:
    return torch.arange(rows) * 7 % len(transitions)


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_logit_is_beta_times_the_difference_of_two_gaussian_log_ratios(
    sd_config, eta: float, prediction_type: str
):
    schedule = Schedule.from_config(sd_config | {"prediction_type": prediction_type})
    transitions = Transitions.of(schedule, GRID, eta)
    number = numbers(transitions, 6)
    t = transitions.t[number]
    x_t = randn(6, *SHAPE)
    theta, ref, rollout = (epsilon_from(schedule, randn(6, *SHAPE, seed=seed), x_t, t) for seed in (1, 2, 3))
    z = randn(6, 2, *SHAPE, seed=4)
    drawn = transitions.candidates(number, transitions.mean(number, x_t, rollout), z)
    sigma = transitions.sigma[number].view(-1, 1, 1, 1)

    def log_probability(noise: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        density = Normal(_mean_as_printed(schedule, transitions, number, x_t, noise), sigma)
        return density.log_prob(sample).mean(dim=(1, 2, 3))

    winner, loser = drawn.unbind(1)
    of_winner = log_probability(theta, winner) - log_probability(ref, winner)
    of_loser = log_probability(theta, loser) - log_probability(ref, loser)
    dz = z[:, 0] - z[:, 1]
    logit = terms(schedule, t, dz, theta, ref, eta).logit
    torch.testing.assert_close(logit, BETA * (of_winner - of_loser), rtol=0, atol=1e-9)


def _mean_as_printed(schedule, transitions, number, x_t, noise):
    """sqrt(ab') x0_hat + sqrt(1 - ab' - sigma^2) e, term by term."""
    before = schedule.alpha_bar[transitions.t[number]].view(-1, 1, 1, 1)
    after = schedule.alpha_bar[transitions.t_next[number]].view(-1, 1, 1, 1)
    sigma = transitions.sigma[number].view(-1, 1, 1, 1)
    x0 = (x_t - (1 - before).sqrt() * noise) / before.sqrt()
    return after.sqrt() * x0 + (1 - after - sigma.square()).clamp(min=0).sqrt() * noise


def test_equal_candidates_cost_log_2_and_move_nothing(schedule):
    transitions = Transitions.of(schedule, GRID)
    theta = randn(3, *SHAPE).requires_grad_()
    dz = torch.zeros(3, *SHAPE, dtype=torch.float64)
    t = transitions.t[numbers(transitions, 3)]
    loss = terms(schedule, t, dz, theta, randn(3, *SHAPE)).loss
    assert torch.equal(loss, torch.full((3,), 2.0, dtype=torch.float64).log())
    loss.sum().backward()
    assert theta.grad is not None
    assert torch.count_nonzero(theta.grad) == 0


def test_swapping_winner_and_loser_changes_the_loss_by_the_logit(schedule):
    t = Transitions.of(schedule, GRID).t[:5]
    dz, theta, ref = (randn(5, *SHAPE, seed=seed) for seed in (1, 2, 3))
    given = terms(schedule, t, dz, theta, ref)
    torch.testing.assert_close(given.loss - terms(schedule, t, -dz, theta, ref).loss, -given.logit)


def test_a_gradient_step_moves_the_mean_from_loser_to_winner(schedule):
    transitions = Transitions.of(schedule, GRID)
    number = numbers(transitions, 5)
    a = transitions.a[number]
    x_t, dz, ref = (randn(5, *SHAPE, seed=seed) for seed in (1, 2, 3))
    theta = randn(5, *SHAPE, seed=4).requires_grad_()
    found = terms(schedule, transitions.t[number], dz, theta, ref)
    found.loss.sum().backward()
    assert theta.grad is not None
    assert found.logit is not None
    expected = BETA * (a * torch.sigmoid(-found.logit)).view(-1, 1, 1, 1) * dz / dz[0].numel()
    torch.testing.assert_close(theta.grad, expected.detach())
    moved = transitions.mean(number, x_t, theta - theta.grad) - transitions.mean(number, x_t, theta)
    cosine = torch.nn.functional.cosine_similarity(moved.flatten(1), dz.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(5, dtype=torch.float64))


def test_a_policy_equal_to_its_reference_has_logit_zero(schedule):
    dz, noise = randn(4, *SHAPE, seed=1), randn(4, *SHAPE, seed=2)
    logit = terms(schedule, Transitions.of(schedule, GRID).t[:4], dz, noise, noise).logit
    assert logit is not None
    assert torch.count_nonzero(logit) == 0


def test_the_weights_that_drew_the_candidates_cancel(schedule):
    transitions = Transitions.of(schedule, GRID)
    number = numbers(transitions, 4)
    z = randn(4, 2, *SHAPE)
    sigma = transitions.sigma[number].view(-1, 1, 1, 1)
    for seed in (1, 2):
        mean = randn(4, *SHAPE, seed=seed)
        winner, loser = transitions.candidates(number, mean, z).unbind(1)
        torch.testing.assert_close((winner - loser) / sigma, z[:, 0] - z[:, 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("candidates", "expected"), [(2, 1.128), (3, 1.693), (4, 2.059), (8, 2.847)])
def test_the_best_candidate_is_as_far_from_the_worst_as_normal_order_statistics_say(
    candidates: int, expected: float
):
    gap = rank(randn(200_000, candidates)).gap
    assert gap.mean().item() == pytest.approx(expected, abs=4 * gap.std().item() / 200_000**0.5 + 5e-4)


def test_a_at_known_timesteps(schedule):
    transitions = Transitions.of(schedule, GRID)
    found = dict(zip(transitions.t.tolist(), transitions.a.tolist(), strict=True))
    assert [found[t] for t in (952, 502, 152, 52)] == pytest.approx([0.853, 0.626, 0.868, 5.43], rel=1e-3)
    ratio = schedule.snr[transitions.t_next] / schedule.snr[transitions.t]
    torch.testing.assert_close(transitions.a, (ratio - 1).sqrt())


def test_of_equal_rewards_the_first_wins_and_the_last_loses():
    ranked = rank(torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [3.0, 3.0, 1.0]], dtype=torch.float64))
    assert ranked.winner.tolist() == [0, 1, 0]
    assert ranked.loser.tolist() == [2, 0, 2]
    assert ranked.gap.tolist() == [0.0, 2.0, 2.0]


def test_soft_shares_follow_the_gap():
    gap = torch.tensor([0.0, 1.0, 50.0], dtype=torch.float64)
    assert soft_share(gap, 0.5).tolist() == pytest.approx([0.5, 0.8807970779778823, 1.0])


def test_guidance_moves_a_winner_along_its_gradient_by_the_strength():
    noise, gradient = randn(3, *SHAPE, seed=1), randn(3, *SHAPE, seed=2)
    gradient[2] = 0
    moved = guided(noise, gradient, 0.5) - noise
    size = 0.5 * noise[0].numel() ** 0.5
    assert moved.flatten(1).norm(dim=1).tolist() == pytest.approx([size, size, 0.0])
    cosine = torch.nn.functional.cosine_similarity(moved[:2].flatten(1), gradient[:2].flatten(1))
    torch.testing.assert_close(cosine, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("timesteps", "eta", "field"),
    [
        (GRID, 0.0, "eta"),
        ([2, 0], 1.0, "transitions"),
        ([502], 1.0, "timesteps"),
        ([402, 502], 1.0, "timesteps"),
        ([1001, 502], 1.0, "timesteps"),
    ],
)
def test_transitions_without_noise_or_order_are_refused_by_name(schedule, timesteps, eta, field):
    with pytest.raises(ConfigError) as error:
        Transitions.of(schedule, timesteps, eta)
    assert error.value.field == field


def test_one_candidate_is_refused():
    with pytest.raises(ConfigError, match="candidates"):
        rank(torch.zeros(3, 1, dtype=torch.float64))
