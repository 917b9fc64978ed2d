"""How often intervals hold the truth and verdicts err, by simulation.

Seeds are fixed, so a result is the same on every run. Each case allows 1 point around 95% and two standard
deviations of its own simulation: quick ones 2.4 points (1,000 evaluations), slow ones 1.4 (10,000).
``python -m tests.core.test_metrics_coverage`` prints the tables.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest

from dde_core.metrics import (
    beat_ratio,
    bradley_terry,
    paired_difference,
    paired_differences,
    pairwise_wins,
)
from dde_core.verdict import holm, smallest_visible_effect, verdict

PROMPTS = (30, 100, 326)
IMAGES = (1, 4, 8)
SHAPES = ("normal", "skewed", "heavy", "mostly zero")
RATIOS = ((0.4, 0.6), (0.6, 0.8), (0.8, 0.95))
MARGIN = 0.1
AT_ONCE = 500

sizes = pytest.mark.parametrize(("num_prompts", "num_images"), [*itertools.product(PROMPTS, IMAGES)])
few_sizes = pytest.mark.parametrize(("num_prompts", "num_images"), [*zip(PROMPTS, IMAGES, strict=True)])


def differences(rng, shape, evaluations, num_prompts, num_images):
    """Candidate - base with mean 0 [evaluations, prompts, images]: half of the variance is the prompt's."""
    prompt, image = (evaluations, num_prompts, 1), (evaluations, num_prompts, num_images)
    noise = rng.standard_normal(image)
    if shape == "normal":
        return (rng.standard_normal(prompt) + noise) / 2**0.5
    if shape == "skewed":
        return (rng.exponential(1, prompt) - 1 + noise) / 2**0.5
    if shape == "heavy":
        return (rng.standard_t(4, prompt) + rng.standard_t(4, image)) / 2
    return rng.integers(-2, 3, image) * (rng.random(prompt) < 0.25) / 5


def coverage_of_differences(shape, num_prompts, num_images, evaluations, resamples):
    """The fraction of 95% intervals of a mean difference that hold the truth."""
    rng = np.random.default_rng([1, num_prompts, num_images, SHAPES.index(shape)])
    covered = 0
    for _ in range(evaluations // AT_ONCE):
        columns = differences(rng, shape, AT_ONCE, num_prompts, num_images).mean(2).T
        found = paired_differences(columns, resamples, seed=int(rng.integers(1 << 30)))
        covered += sum(each.low <= 0 <= each.high for each in found)
    return covered / evaluations


def coverage_of_beat_ratios(low, high, num_prompts, num_images, evaluations):
    """The fraction of 95% intervals that hold the true ratio, which is drawn between ``low`` and ``high``."""
    rng = np.random.default_rng([2, num_prompts, num_images, int(100 * low)])
    covered = 0
    for _ in range(evaluations):
        truth = rng.uniform(low, high)
        scores = NormalDist().inv_cdf(truth) + differences(rng, "normal", 1, num_prompts, num_images)[0]
        found = beat_ratio(scores, np.zeros_like(scores))
        covered += found.low <= truth <= found.high
    return covered / evaluations


def verdicts(effect, num_prompts, num_images, evaluations, comparisons=1, resamples=1000):
    """Verdicts of evaluations with ``comparisons`` equal, independent scorers of deviation 1 [evaluations]
    [comparisons], and the smallest visible effect of each."""
    rng = np.random.default_rng([3, num_prompts, num_images, comparisons, int(1000 * effect)])
    columns = (
        differences(rng, "normal", evaluations * comparisons, num_prompts, num_images).mean(2).T + effect
    )
    found = paired_differences(columns, resamples)
    grouped = [found[i : i + comparisons] for i in range(0, len(found), comparisons)]
    effects = [smallest_visible_effect(d.standard_error, num_prompts, comparisons) for d in found]
    return [
        [verdict(d, p, MARGIN) for d, p in zip(group, holm([d.p for d in group]), strict=True)]
        for group in grouped
    ], effects


@few_sizes
@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_intervals_of_a_mean_difference_hold_the_truth_in_95_of_100_evaluations(
    shape, num_prompts, num_images
):
    covered = coverage_of_differences(shape, num_prompts, num_images, 1000, 1000)
    assert covered == pytest.approx(0.95, abs=0.024)


@few_sizes
def test_intervals_of_a_beat_ratio_hold_the_truth_in_95_of_100_evaluations(num_prompts, num_images):
    covered = coverage_of_beat_ratios(0.4, 0.8, num_prompts, num_images, 1000)
    assert covered == pytest.approx(0.95, abs=0.024)


@pytest.mark.slow
@sizes
@pytest.mark.parametrize("shape", ["normal", "skewed", "heavy"])
def test_over_10000_evaluations_intervals_of_a_mean_difference_hold_the_truth(shape, num_prompts, num_images):
    covered = coverage_of_differences(shape, num_prompts, num_images, 10_000, 2000)
    assert covered == pytest.approx(0.95, abs=0.014)


@pytest.mark.slow
@sizes
def test_where_most_prompts_do_not_change_intervals_are_too_wide_rather_than_too_narrow(
    num_prompts, num_images
):
    covered = coverage_of_differences("mostly zero", num_prompts, num_images, 10_000, 2000)
    assert 0.936 <= covered <= 0.995
    assert num_prompts < 100 or covered <= 0.965


@pytest.mark.slow
@sizes
@pytest.mark.parametrize("ratios", RATIOS[:2])
def test_over_10000_evaluations_intervals_of_a_beat_ratio_hold_the_truth(ratios, num_prompts, num_images):
    covered = coverage_of_beat_ratios(*ratios, num_prompts, num_images, 10_000)
    assert covered == pytest.approx(0.95, abs=0.014)


def test_intervals_over_images_instead_of_prompts_hold_the_truth_far_less_often():
    rng = np.random.default_rng(4)
    covered = {"prompts": 0, "images": 0}
    for scores in differences(rng, "normal", 300, 100, 8):
        for unit, shaped in (("prompts", scores), ("images", scores.reshape(-1))):
            found = beat_ratio(shaped, np.zeros_like(shaped))
            covered[unit] += found.low <= 0.5 <= found.high
    assert covered["prompts"] / 300 > 0.92
    assert covered["images"] / 300 < 0.85


def test_without_a_true_difference_a_verdict_errs_in_at_most_5_of_100_evaluations():
    found, _ = verdicts(0, 60, 4, evaluations=300, comparisons=6)
    wrong = sum(any(each in ("better", "worse") for each in group) for group in found)
    assert wrong / 300 <= 0.05 + 2 * 0.0126


def test_a_difference_of_the_margin_is_said_not_to_matter_in_at_most_5_of_100_evaluations():
    found, _ = verdicts(MARGIN, 1000, 1, evaluations=1000, resamples=500)
    said = Counter(each for group in found for each in group)
    assert 0.02 < said["no difference that matters"] / 1000 <= 0.05 + 2 * 0.0069
    assert said["worse"] == 0


def test_the_smallest_visible_effect_is_found_in_80_of_100_evaluations():
    _, effects = verdicts(0, 100, 4, evaluations=200)
    effect = float(np.mean(effects))
    found, _ = verdicts(effect, 100, 4, evaluations=1000)
    assert sum(group == ["better"] for group in found) / 1000 == pytest.approx(0.8, abs=0.03)


def test_with_enough_prompts_equal_models_have_no_difference_that_matters():
    found, _ = verdicts(0, 3000, 1, evaluations=200, resamples=500)
    said = Counter(each for group in found for each in group)
    assert said["no difference that matters"] / 200 > 0.95


def test_intervals_of_strengths_hold_the_truth_though_images_of_a_prompt_are_alike():
    rng = np.random.default_rng(5)
    covered = []
    for _ in range(400):
        liking = rng.gumbel(size=(3, 100, 1)) + np.array([0.0, 0.5, -0.3])[:, None, None]
        strengths = bradley_terry(pairwise_wins(np.repeat(liking, 4, axis=2)))
        covered += [
            strengths[1].low <= 0.5 <= strengths[1].high,
            strengths[2].low <= -0.3 <= strengths[2].high,
        ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.024)


def test_5000_prompts_with_8_images_take_seconds():
    scores = np.random.default_rng(0).normal(0.01, 1, (5000, 8))
    began = time.process_time()
    found = paired_difference(scores, np.zeros_like(scores))
    assert time.process_time() - began < 10  # 1 s on an idle core
    assert found.num_prompts == 5000
    assert found.low < found.value < found.high


def tables() -> None:
    """Print the tables of the long simulation: coverage in percent, for 1, 4 and 8 images a prompt."""
    print("mean difference, 10,000 evaluations, 2,000 resamples")
    for shape, num_prompts in itertools.product(SHAPES, PROMPTS):
        row = [coverage_of_differences(shape, num_prompts, m, 10_000, 2000) for m in IMAGES]
        print(f"{shape:12} {num_prompts:4} prompts ", *(f"{100 * each:.1f}" for each in row), flush=True)
    print("beat ratio, 10,000 evaluations")
    for (low, high), num_prompts in itertools.product(RATIOS, PROMPTS):
        row = [coverage_of_beat_ratios(low, high, num_prompts, m, 10_000) for m in IMAGES]
        print(f"{low} to {high} {num_prompts:4} prompts ", *(f"{100 * each:.1f}" for each in row), flush=True)
    print("verdicts in percent, 2,000 evaluations, one comparison, margin .1 of the deviation")
    for num_prompts, effect in itertools.product((100, 326, 1000, 3000), (0.0, 0.05, 0.1, 0.2, 0.4)):
        said = Counter(each for group in verdicts(effect, num_prompts, 4, 2000)[0] for each in group)
        row = [f"{name} {said[name] / 20:.1f}" for name in sorted(said)]
        print(f"{num_prompts:4} prompts x 4, true difference {effect}: ", ", ".join(row), flush=True)
    for num_prompts, comparisons in itertools.product((30, 100, 326), (1, 6, 12)):
        found = verdicts(0, num_prompts, 4, 2000, comparisons)[0]
        wrong = sum(any(each in ("better", "worse") for each in group) for group in found)
        print(
            f"{num_prompts:4} prompts, {comparisons} comparisons, no difference: any error {wrong / 20:.1f}"
        )


if __name__ == "__main__":
    tables()
