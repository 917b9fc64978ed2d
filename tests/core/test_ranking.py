"""Preference pairs from scores: what the scale of a scorer may not change, and what is no preference."""

from __future__ import annotations

import numpy as np
import pytest

from dde_core.errors import DataError
from dde_core.scorers.ranking import KEEP, Keep, all_pairs, best_worst, num_candidates, spreads, utilities

BOTH: list[Keep] = ["best_worst", "all_pairs"]


def drawn(prompts: int = 40, images: int = 4, scorers: int = 3, seed: int = 0):
    """Scores [prompts * images, scorers] with a level for each prompt, and the prompt of each image."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(size=(prompts, 1, scorers)) * 5
    scores = levels + rng.normal(size=(prompts, images, scorers)) * np.array([0.01, 1.0, 7.0])[:scorers]
    return scores.reshape(-1, scorers), np.repeat(np.arange(prompts), images)


def preferences(keep: Keep, scores, groups, weights, margin: float = 0.0):
    """(group, winner, loser) of all groups."""
    spread = spreads(scores, groups)
    return [
        (int(group), each.winner, each.loser)
        for group in np.unique(groups)
        for each in KEEP[keep](utilities(scores[groups == group], weights, spread), margin)
    ]


def test_the_spread_is_that_among_images_of_one_prompt_whatever_their_prompts_levels():
    scores, groups = drawn(prompts=4000)
    np.testing.assert_allclose(spreads(scores, groups), [0.01, 1.0, 7.0], rtol=0.03)
    moved = scores + np.random.default_rng(1).normal(size=4000)[groups][:, None] * 100
    np.testing.assert_allclose(spreads(moved, groups), spreads(scores, groups), rtol=1e-9)


def test_two_images_a_prompt_spread_by_their_difference_over_the_root_of_two():
    spread = spreads(np.array([[1.0], [4.0], [10.0], [7.0]]), np.array([5, 5, 9, 9]))
    np.testing.assert_allclose(spread, [3 / 2**0.5])


@pytest.mark.parametrize("keep", BOTH)
def test_a_scorers_unit_and_zero_change_no_preference(keep: Keep):
    scores, groups = drawn()
    rescaled = scores * np.array([1000.0, 0.125, 3.0]) + np.array([7.0, -2.0, 0.5])
    weights = [1.0, 2.0, 0.5]
    found = preferences(keep, scores, groups, weights, 0.3)
    assert found == preferences(keep, rescaled, groups, weights, 0.3)
    assert 0 < len(found) < 40 * num_candidates(keep, 4)


@pytest.mark.parametrize("keep", BOTH)
def test_only_the_ratio_of_weights_counts(keep: Keep):
    scores, groups = drawn()
    assert preferences(keep, scores, groups, [1, 2, 3], 0.2) == preferences(
        keep, scores, groups, [10, 20, 30], 0.2
    )


@pytest.mark.parametrize("keep", BOTH)
def test_negated_scores_swap_winner_and_loser(keep: Keep):
    scores, groups = drawn()
    swapped = [
        (group, loser, winner) for group, winner, loser in preferences(keep, -scores, groups, [1, 1, 1])
    ]
    assert swapped == preferences(keep, scores, groups, [1, 1, 1])


def test_one_scorer_prefers_by_its_scores_alone():
    scores, groups = drawn(scorers=1)
    for group, winner, loser in preferences("all_pairs", scores, groups, [0.3]):
        of_group = scores[groups == group, 0]
        assert of_group[winner] > of_group[loser]
    assert len(preferences("all_pairs", scores, groups, [0.3])) == 40 * 6


def test_equal_weights_give_scorers_of_different_scales_an_equal_say():
    """Utilities follow the first and the last scorer equally, though one is 700 times as wide."""
    scores, groups = drawn(prompts=2000)
    pair = scores[:, [0, 2]]
    utility = utilities(pair, [1, 1], spreads(pair, groups))
    centered = pair - pair.reshape(-1, 4, 2).mean(axis=1)[groups]
    within = utility - utility.reshape(-1, 4).mean(axis=1)[groups]
    follows = [np.corrcoef(within, centered[:, i])[0, 1] for i in range(2)]
    np.testing.assert_allclose(follows, 0.5**0.5, atol=0.03)


def test_best_worst_is_the_widest_of_all_pairs():
    rng = np.random.default_rng(3)
    for _ in range(50):
        utility = rng.normal(size=5)
        assert best_worst(utility, 0.0) == [max(all_pairs(utility, 0.0), key=lambda each: each.margin)]


@pytest.mark.parametrize("keep", BOTH)
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -17.3])
def test_images_that_are_all_equally_good_make_no_pair(keep: Keep, value: float):
    scores = np.full((12, 2), value)
    groups = np.repeat([0, 1, 2], 4)
    np.testing.assert_array_equal(spreads(scores, groups), 0.0)
    assert preferences(keep, scores, groups, [1, 1]) == []


def test_a_difference_of_exactly_the_margin_is_a_tie():
    utility = np.array([0.0, 0.5, 1.0])
    assert [each[:2] for each in all_pairs(utility, 0.5)] == [(2, 0)]
    assert best_worst(utility, 1.0) == []
    assert best_worst(utility, 0.99)[0].margin == 1.0


def test_equal_images_at_the_top_and_the_bottom_give_two_different_images():
    assert best_worst(np.array([1.0, 1.0, 0.0, 0.0]), 0.0) == [(0, 3, 1.0)]
    assert best_worst(np.array([2.0, 2.0]), 0.0) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad: float):
    scores = np.array([[1.0], [bad]])
    with pytest.raises(DataError, match="finite"):
        spreads(scores, np.array([0, 0]))
    with pytest.raises(DataError, match="finite"):
        utilities(scores, [1.0], np.array([1.0]))
    with pytest.raises(DataError, match="finite"):
        all_pairs(scores[:, 0], 0.0)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, np.nan]])
def test_weights_that_are_not_one_positive_number_a_scorer_are_refused(weights: list[float]):
    with pytest.raises(DataError, match="2 positive numbers"):
        utilities(np.ones((2, 2)), weights, np.ones(2))


def test_too_few_images_and_a_margin_below_zero_are_refused():
    with pytest.raises(DataError, match="at least 2 images"):
        all_pairs(np.array([1.0]), 0.0)
    with pytest.raises(DataError, match="at least 2 images"):
        spreads(np.ones((3, 1)), np.arange(3))
    for margin in (-0.1, np.nan):
        with pytest.raises(DataError, match="margin must be at least 0"):
            best_worst(np.array([1.0, 2.0]), margin)
