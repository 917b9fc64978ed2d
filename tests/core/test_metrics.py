import math
import subprocess
import sys

import numpy as np
import pytest

from dde_core.errors import DataError
from dde_core.metrics import (
    beat_ratio,
    bradley_terry,
    cmmd,
    diversity,
    drift_between_seeds,
    paired_difference,
    paired_differences,
    pairwise_wins,
    sign_test,
)
from dde_core.student_t import t_cdf, t_quantile
from dde_core.verdict import holm, smallest_visible_effect, verdict


def unit(features):
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_beat_ratio_is_wilsons_as_tabulated_by_newcombe_1998(wins, n, low, high):
    ratio, lower, upper = beat_ratio([1.0] * wins + [-1.0] * (n - wins), [0.0] * n)
    assert ratio == pytest.approx(wins / n)
    assert (lower, upper) == pytest.approx((low, high), abs=5e-5)


def test_ties_count_half_and_turning_the_sides_round_turns_the_ratio_round():
    a, b = [1.0, 2.0, 3.0, 3.0, 0.0], [0.0, 2.0, 3.0, 1.0, 5.0]
    ratio, low, high = beat_ratio(a, b)
    assert ratio == pytest.approx(0.6)
    assert beat_ratio(b, a) == pytest.approx((0.4, 1 - high, 1 - low))
    assert beat_ratio(a, a)[0] == 0.5


def test_a_difference_within_the_dead_zone_is_a_tie():
    base, candidate = np.zeros(4), np.array([0.1, 0.2, -0.1, -0.3])
    assert beat_ratio(candidate, base).value == 0.5
    assert beat_ratio(candidate, base, dead_zone=0.1).value == 0.5
    assert beat_ratio(candidate, base, dead_zone=0.25).value == 0.375
    assert sign_test(candidate, 0.1) == (1, 1, 2, 1.0)
    with pytest.raises(DataError, match=r"dead_zone must not be negative, got -1"):
        beat_ratio(candidate, base, dead_zone=-1.0)


def test_copies_of_an_image_make_no_interval_of_a_beat_ratio_narrower():
    difference = np.random.default_rng(0).normal(0.3, 1, 50)
    once, twice = (np.repeat(difference[:, None], m, axis=1) for m in (1, 8))
    one = beat_ratio(once, np.zeros_like(once))
    eight = beat_ratio(twice, np.zeros_like(twice))
    assert eight.value == one.value
    assert eight.high - eight.low == pytest.approx(one.high - one.low, rel=0.05)  # Student's instead of 1.96
    assert eight.high - eight.low > one.high - one.low


def test_students_distribution_is_as_tabulated():
    quantiles = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 29: 2.04523, 30: 2.04227, 1000: 1.96234}
    for df, quantile in quantiles.items():
        assert t_quantile(0.975, df) == pytest.approx(quantile, abs=6e-6)
        assert t_quantile(0.025, df) == -t_quantile(0.975, df)
    assert t_cdf(1.0, 1) == pytest.approx(0.75)
    assert t_cdf(-1.0, 2) == pytest.approx(0.5 - 1 / math.sqrt(12))
    assert t_cdf(0.0, 7) == 0.5


def test_a_mean_difference_of_normal_prompts_has_nearly_the_t_interval():
    x = np.random.default_rng(0).normal(0.08, 1, (200, 4))
    found = paired_difference(x, np.zeros_like(x))
    means = x.mean(1)
    error = means.std(ddof=1) / math.sqrt(200)
    assert found.value == pytest.approx(means.mean())
    assert found.standard_error == pytest.approx(error)
    for low, high, level in ((found.low, found.high, 0.975), (found.inner_low, found.inner_high, 0.95)):
        half = t_quantile(level, 199) * error
        assert low + high == pytest.approx(2 * found.value)
        assert half <= (high - low) / 2 < 1.05 * half
    assert found.p == pytest.approx(2 * (1 - t_cdf(found.value / error, 199)), rel=0.2)


def test_the_interval_and_the_p_value_agree_about_zero():
    rng = np.random.default_rng(1)
    for found in paired_differences(rng.exponential(1, (40, 60)) - 1 + rng.normal(0, 0.3, 60), 2000):
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


def test_a_single_different_prompt_leaves_a_finite_interval_around_zero():
    difference = np.zeros(30)
    difference[7] = 1.0
    found = paired_difference(difference, np.zeros(30))
    assert found.low <= 0 < found.high < 1
    assert found.p > 0.05


def test_equal_differences_have_an_interval_without_width():
    base = np.random.default_rng(0).integers(0, 9, 30) / 8
    same = paired_difference(base, base)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    more = paired_difference(base + 0.5, base)
    assert (more.value, more.low, more.high) == (0.5, 0.5, 0.5)
    assert more.p == pytest.approx(sign_test(np.full(30, 0.5)).p)


def test_numbers_do_not_depend_on_the_order_of_prompts_images_or_comparisons():
    rng = np.random.default_rng(3)
    candidate, base = rng.normal(size=(2, 57, 5))
    prompts, images = rng.permutation(57), rng.permutation(5)
    moved, moved_base = (scores[prompts][:, images] for scores in (candidate, base))
    assert paired_difference(candidate, base) == paired_difference(moved, moved_base)
    assert beat_ratio(candidate, base) == beat_ratio(moved, moved_base)
    columns = rng.normal(size=(57, 3))
    found = paired_differences(columns)
    assert paired_differences(columns[:, ::-1])[::-1] == found
    assert paired_differences(columns[:, 1:2]) == found[1:2]
    wins = pairwise_wins(rng.normal(size=(3, 57, 5)))
    assert bradley_terry(wins) == bradley_terry(wins[prompts])


def test_another_seed_draws_other_prompts_again():
    x = np.random.default_rng(0).exponential(1, (30, 1))
    assert paired_differences(x, seed=0) == paired_differences(x, seed=0)
    assert paired_differences(x, seed=0)[0].high != paired_differences(x, seed=1)[0].high


@pytest.mark.parametrize("statistic", [beat_ratio, paired_difference])
def test_scores_that_are_not_finite_pairs_are_refused(statistic):
    with pytest.raises(DataError, match=r"scores must come in pairs, got \(2,\) and \(1,\)"):
        statistic([1.0, 2.0], [1.0])
    with pytest.raises(DataError, match="pairs"):
        statistic([], [])
    with pytest.raises(DataError, match="finite"):
        statistic([1.0, float("nan")], [1.0, 2.0])


@pytest.mark.parametrize("statistic", [beat_ratio, paired_difference])
def test_an_interval_over_a_single_prompt_is_refused(statistic):
    with pytest.raises(DataError, match="at least 2 prompts, got 1"):
        statistic(np.ones((1, 2)), np.zeros((1, 2)))


def test_a_sign_test_is_the_exact_binomial_of_the_prompts_that_moved():
    difference = np.array([1.0] * 15 + [-1.0] * 5 + [0.0] * 3)
    exact = 2 * sum(math.comb(20, k) for k in range(6)) / 2**20
    assert sign_test(difference) == (15, 5, 3, pytest.approx(exact))
    assert sign_test(np.array([1.0, -1.0])).p == 1.0
    assert sign_test(np.zeros(4)) == (0, 0, 4, 1.0)
    assert 0 < sign_test(np.array([1.0] * 2700 + [-1.0] * 2300)).p < 1e-7


def test_holm_equals_the_step_down_procedure_at_every_level():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = (rng.uniform(0, 1, rng.integers(1, 9)) ** 3).tolist()
        adjusted = holm(p)
        for level in (0.01, 0.05, 0.2):
            rejected = set()
            for rank, index in enumerate(np.argsort(p)):
                if p[index] > level / (len(p) - rank):
                    break
                rejected.add(int(index))
            assert {i for i, value in enumerate(adjusted) if value <= level} == rejected
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_verdict_follows_from_the_intervals_and_the_adjusted_p():
    found = paired_difference(np.random.default_rng(0).normal(0.5, 1, 400), np.zeros(400))
    assert verdict(found, found.p, margin=0.1) == "better"
    assert verdict(found, 0.06, margin=0.1) == "undecided"
    assert verdict(found, found.p, margin=1.0) == "no difference that matters"
    worse = paired_difference(np.zeros(400), np.random.default_rng(0).normal(0.5, 1, 400))
    assert verdict(worse, worse.p, margin=0.1) == "worse"
    assert verdict(worse, worse.p, margin=0.0) == "worse"


def test_the_smallest_visible_effect_is_the_textbooks_and_grows_with_the_number_of_comparisons():
    assert smallest_visible_effect(1.0, 10_001) == pytest.approx(1.960 + 0.8416, abs=1e-3)
    assert smallest_visible_effect(0.5, 10_001, 10) == pytest.approx((2.807 + 0.8416) / 2, abs=1e-3)
    assert smallest_visible_effect(1.0, 10) > 3.1


def test_two_models_have_the_log_odds_of_their_wins_with_one_tie_added():
    wins = np.zeros((100, 2, 2))
    wins[:70, 1, 0] = 1
    wins[70:, 0, 1] = 1
    base, other = bradley_terry(wins)
    assert base == (0, 0, 0)
    assert other.value == pytest.approx(math.log(70.5 / 30.5))
    error = math.sqrt(1 / 70.5 + 1 / 30.5)
    assert (other.high - other.low) / 2 == pytest.approx(t_quantile(0.975, 99) * error, rel=0.02)


def test_strengths_of_several_models_equal_those_of_fords_iteration():
    scores = np.random.default_rng(0).normal(size=(4, 60, 3)) + np.array([0, 0.2, 0.5, -0.4])[:, None, None]
    wins = pairwise_wins(scores)
    total = wins.sum(0) * (1 - np.eye(4)) + (1 - np.eye(4)) / 2
    gamma = np.ones(4)
    for _ in range(5000):
        pairs = (total + total.T) / (gamma[:, None] + gamma[None, :])
        gamma = total.sum(1) / (pairs * (1 - np.eye(4))).sum(1)
        gamma /= gamma[0]
    found = bradley_terry(wins)
    assert [strength.value for strength in found] == pytest.approx(np.log(gamma).tolist(), abs=1e-9)
    assert all(strength.low < strength.value < strength.high for strength in found[1:])


def test_a_model_that_always_wins_has_a_finite_strength_with_a_wide_interval():
    scores = np.stack([np.zeros((100, 1)), np.ones((100, 1)), np.full((100, 1), 2.0)])
    _, second, third = bradley_terry(pairwise_wins(scores))
    assert second.value == pytest.approx(math.log(201) * 0.73, rel=0.3)
    assert third.value > second.value
    assert third.high - third.low > 3
    with pytest.raises(DataError, match="got 1 and 3"):
        bradley_terry(np.zeros((1, 3, 3)))


def test_cmmd_equals_the_sums_written_out_and_needs_no_more_than_blocks():
    rng = np.random.default_rng(0)
    x, y = unit(rng.normal(size=(1100, 4))), unit(rng.normal(size=(300, 4)) + 0.3)

    def mean_kernel(a, b):
        return np.exp(-np.square(a[:, None] - b[None, :]).sum(-1) / 200).mean()

    written_out = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(x, y) == pytest.approx(written_out, rel=1e-6)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-12)


def test_cmmd_of_two_points_is_the_closed_form():
    x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert cmmd(x, y) == pytest.approx(2000 * (1 - math.exp(-2 / 200)), rel=1e-12)


def test_features_that_are_not_finite_or_not_of_length_one_are_refused():
    with pytest.raises(DataError, match=r"length 1, got one of 2"):
        cmmd(np.array([[2.0, 0.0]]), np.array([[1.0, 0.0]]))
    with pytest.raises(DataError, match="finite"):
        diversity(np.full((1, 2, 3), np.nan))
    with pytest.raises(DataError, match="2 images a prompt, got 1"):
        diversity(np.ones((3, 1, 1)))
    with pytest.raises(DataError, match="2 images a prompt, got 1"):
        drift_between_seeds(np.ones((3, 1, 1)))


def test_diversity_is_the_mean_cosine_distance_over_pairs_of_images():
    features = unit(np.random.default_rng(0).normal(size=(5, 4, 6)))
    pairs = [(i, j) for i in range(4) for j in range(i)]
    expected = [np.mean([1 - prompt[i] @ prompt[j] for i, j in pairs]) for prompt in features]
    assert diversity(features).tolist() == pytest.approx(expected)
    assert diversity(np.repeat(features[:, :1], 4, axis=1)) == pytest.approx(0, abs=1e-12)


def test_drift_between_seeds_compares_the_even_images_with_the_odd_ones():
    features = unit(np.random.default_rng(0).normal(size=(6, 5, 4)))
    even, odd = features[:, [0, 2]].reshape(-1, 4), features[:, [1, 3]].reshape(-1, 4)
    assert drift_between_seeds(features) == cmmd(even, odd)


def test_evaluation_statistics_need_no_torch():
    code = "import sys, dde_core.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
