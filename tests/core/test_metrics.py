import subprocess
import sys

import numpy as np
import pytest
import torch

from dde_core.errors import DataError
from dde_core.metrics import beat_ratio, paired_difference, step_metrics
from dde_core.train_step import PairErrors, StepTerms


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def metrics():
    """Four pairs at t = 1, 100, 101 and 1000."""
    theta = PairErrors(column(0.1, 0.2, 0.3, 0.4), column(0.5, 0.5, 0.5, 0.5))
    ref = PairErrors(column(0.2, 0.2, 0.2, 0.2), column(0.4, 0.6, 0.5, 0.5))
    terms = StepTerms(
        loss=column(1, 2, 3, 6).requires_grad_(),
        logit=column(0, 0, 0, 0),
        margin=column(0.2, -0.1, 0.0, 0.5),
        gradient_weight=column(10, 20, 30, 40),
        gradient_weight_at_zero=column(10, 20, 30, 60),
    )
    return step_metrics(torch.tensor([1, 100, 101, 1000]), theta, ref, terms, 1000)


def test_a_step_is_summed_up_by_means_over_the_global_batch(metrics):
    whole = {name: value for name, value in metrics.items() if "_t" not in name}
    assert whole == pytest.approx(
        {
            "loss": 3.0,
            "implicit_accuracy": 2.5 / 4,  # two wins, a tie, a loss
            "margin": 0.15,
            "winner_error": 0.25,
            "loser_error": 0.5,
            "winner_error_diff": 0.05,
            "loser_error_diff": 0.0,
            "gradient_weight": 25.0,
            "gradient_weight_at_zero": 30.0,
        }
    )
    assert all(type(value) is float for value in metrics.values())


def test_a_gradient_weight_counts_by_its_size_whatever_its_sign():
    one = column(1.0, 1.0)
    terms = StepTerms(loss=one, gradient_weight=column(3, -1), gradient_weight_at_zero=one, margin=one)
    pair = PairErrors(one, one)
    assert step_metrics(torch.tensor([5, 5]), pair, pair, terms, 1000)["gradient_weight"] == 2


def test_each_tenth_of_the_timesteps_has_its_own_means_and_an_empty_one_has_none(metrics):
    assert {name[-6:] for name in metrics if "_t" in name} == {"_t0100", "_t0200", "_t1000"}
    assert [metrics[f"gradient_weight_t{last}"] for last in ("0100", "0200", "1000")] == [15.0, 30.0, 40.0]
    assert [metrics[f"margin_t{last}"] for last in ("0100", "0200", "1000")] == pytest.approx(
        [0.05, 0.0, 0.5]
    )
    assert metrics["implicit_accuracy_t0100"] == 0.5
    assert metrics["winner_error_diff_t1000"] == pytest.approx(0.2)


@pytest.mark.parametrize("timesteps", [3, 10, 37, 1000])
def test_every_timestep_has_a_tenth_named_by_the_last_timestep_in_it(timesteps):
    last = {}
    for t in range(1, timesteps + 1):
        one = column(1.0)
        pair = PairErrors(one, one)
        terms = StepTerms(*[one] * 5)
        named = [n for n in step_metrics(torch.tensor([t]), pair, pair, terms, timesteps) if "loss_t" in n]
        (name,) = named
        last[name] = t
    assert all(name == f"loss_t{t:04d}" for name, t in last.items())
    assert len(last) == min(10, timesteps)


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
