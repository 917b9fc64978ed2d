import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dde_core.noise import (
    draw_caption_dropout,
    draw_evaluation_point,
    draw_noise,
    draw_timestep,
    initial_latents,
    permutation,
    step_generator,
)

SHAPE = (4, 8, 8)
PAIRS = [f"pair-{i}" for i in range(4000)]

GOLDEN_NOISE = [-0.4594362676143646, 2.1466915607452393, -0.24307875335216522, 0.9056166410446167]
GOLDEN_T = [191, 352, 837, 325, 839]
GOLDEN_DROPPED = [True, False, True, True, True, True, True, False]
GOLDEN_PERMUTATION = [1, 7, 5, 6, 2, 4, 3, 0]
GOLDEN_LATENTS = [0.03206483647227287, -1.1303058862686157, 0.08186296373605728]


def test_draws_do_not_depend_on_what_was_drawn_before_or_on_global_seeds():
    keys = [(pair, side, draw) for pair in PAIRS[:3] for side in ("w", "l", "shared") for draw in (0, 1)]
    forwards = {key: draw_noise(7, *key, SHAPE) for key in keys}
    torch.manual_seed(1)
    np.random.seed(1)
    backwards = {key: draw_noise(7, *key, SHAPE) for key in reversed(keys)}
    assert all(torch.equal(forwards[key], backwards[key]) for key in keys)


@pytest.mark.parametrize("draw", [draw_noise, draw_evaluation_point])
def test_every_part_of_the_key_matters(draw):
    base = draw(7, "a", "w", 0, SHAPE)
    assert torch.equal(base, draw(7, "a", "w", 0, SHAPE))
    others = [
        draw(8, "a", "w", 0, SHAPE),
        draw(7, "b", "w", 0, SHAPE),
        draw(7, "a", "l", 0, SHAPE),
        draw(7, "a", "shared", 0, SHAPE),
        draw(7, "a", "w", 1, SHAPE),
        initial_latents(7, SHAPE),
        (draw_evaluation_point if draw is draw_noise else draw_noise)(7, "a", "w", 0, SHAPE),
    ]
    for other in others:
        assert abs(np.corrcoef(base.flatten(), other.flatten())[0, 1]) < 0.25


def test_golden_draws_so_that_stored_errors_stay_valid():
    noise = draw_noise(0, "pair", "w", 0, (1, 2, 2)).flatten().tolist()
    assert noise == pytest.approx(GOLDEN_NOISE, rel=1e-6)
    assert [draw_timestep(0, "pair", draw, uniform(1, 1000)) for draw in range(5)] == GOLDEN_T
    assert [draw_caption_dropout(0, "pair", draw, 0.5) for draw in range(8)] == GOLDEN_DROPPED
    assert permutation(0, 0, 8).tolist() == GOLDEN_PERMUTATION
    assert initial_latents(0, (1, 1, 3)).flatten().tolist() == pytest.approx(GOLDEN_LATENTS, rel=1e-6)


def test_noise_is_standard_normal_in_float32():
    noise = draw_noise(0, "pair", "l", 3, (4, 256, 256))
    assert noise.dtype == torch.float32
    assert noise.shape == (4, 256, 256)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)  # standard error 0.002
    assert noise.var().item() == pytest.approx(1, abs=0.014)  # standard error 0.003
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=0.1)  # standard error 0.02


def uniform(low, high):
    """The cumulative distribution over t = 0..2000 that is uniform over low..high."""
    t = np.arange(2001)
    return np.clip((t - low + 1) / (high - low + 1), 0, 1)


def test_timesteps_are_uniform_over_the_range_with_both_ends():
    drawn = np.array([draw_timestep(0, pair, 0, uniform(11, 20)) for pair in PAIRS])
    counts = np.bincount(drawn, minlength=21)
    assert counts[:11].sum() == 0
    assert len(counts) == 21
    assert ((counts[11:] - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, p = .001


@given(
    seed=st.integers(0, 2**63),
    pair=st.text(),
    draw=st.integers(0, 10**6),
    low=st.integers(1, 1000),
    more=st.integers(0, 999),
)
def test_a_timestep_is_never_outside_its_range(seed, pair, draw, low, more):
    assert low <= draw_timestep(seed, pair, draw, uniform(low, low + more)) <= low + more


def test_captions_are_dropped_with_the_given_probability():
    dropped = sum(draw_caption_dropout(0, pair, 0, 0.1) for pair in PAIRS)
    assert abs(dropped - 400) < 4 * 19  # standard deviation 19
    assert not any(draw_caption_dropout(0, pair, 0, 0.0) for pair in PAIRS[:100])
    assert all(draw_caption_dropout(0, pair, 0, 1.0) for pair in PAIRS[:100])


def test_timestep_and_dropout_of_a_draw_are_independent():
    low = np.array([draw_timestep(0, pair, 0, uniform(1, 1000)) <= 500 for pair in PAIRS])
    dropped = np.array([draw_caption_dropout(0, pair, 0, 0.5) for pair in PAIRS])
    assert abs(np.corrcoef(low, dropped)[0, 1]) < 0.06  # standard error 0.016


def test_each_epoch_visits_every_pair_once_in_an_order_of_its_own():
    first, second = permutation(3, 0, 100), permutation(3, 1, 100)
    assert sorted(first) == sorted(second) == list(range(100))
    assert (first != second).any()
    assert (first == permutation(3, 0, 100)).all()
    assert (first != permutation(4, 0, 100)).any()


def test_the_noise_between_steps_is_a_function_of_the_seed_and_a_stream_of_its_own():
    first, again, other = (torch.randn(4, 8, 8, generator=step_generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(np.corrcoef(first.flatten(), initial_latents(3, (4, 8, 8)).flatten())[0, 1]) < 0.3
    assert abs(np.corrcoef(first.flatten(), other.flatten())[0, 1]) < 0.3
    assert step_generator(3).device.type == "cpu"
    assert torch.equal(
        torch.randn(4, generator=torch.Generator().manual_seed(5)),
        torch.randn(4, generator=torch.Generator().manual_seed(5 + 2**32)),
    ), "torch keeps 32 bits of a seed"
