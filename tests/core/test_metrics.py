import subprocess
import sys

import numpy as np
import pytest

from dde_core.errors import DataError
from dde_core.metrics import beat_ratio, paired_difference


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


def test_a_paired_difference_is_the_mean_with_its_normal_interval():
    base = [0.0, 1.0, 2.0, 3.0]
    mean, low, high = paired_difference([1.0, 2.0, 3.0, 6.0], base)
    assert (mean, low, high) == pytest.approx((1.5, 1.5 - 0.97998, 1.5 + 0.97998), abs=1e-4)  # sd 1, n 4
    assert paired_difference([v + 2 for v in base], base) == (2.0, 2.0, 2.0)


def test_the_interval_of_a_difference_covers_the_truth_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        _, low, high = paired_difference(rng.normal(0.3, 1, 200), np.zeros(200))
        covered += low < 0.3 < high
    assert 930 < covered < 970  # standard deviation 7


@pytest.mark.parametrize("statistic", [beat_ratio, paired_difference])
def test_scores_that_are_not_finite_pairs_are_refused(statistic):
    with pytest.raises(DataError, match=r"scores must come in pairs, got \(2,\) and \(1,\)"):
        statistic([1.0, 2.0], [1.0])
    with pytest.raises(DataError, match="pairs"):
        statistic([], [])
    with pytest.raises(DataError, match="finite"):
        statistic([1.0, float("nan")], [1.0, 2.0])


def test_an_interval_of_one_difference_is_refused():
    with pytest.raises(DataError, match="at least 2"):
        paired_difference([1.0], [0.0])


def test_evaluation_statistics_need_no_torch():
    code = "import sys, dde_core.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
