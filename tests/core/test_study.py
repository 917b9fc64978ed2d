"""Contrasts over seeds and prompts: their intervals hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from dde_core.errors import DataError
from dde_core.metrics import paired_differences
from dde_core.student_t import t_quantile
from dde_core.study import seed_contrasts, seed_values_contrast

TRUTH = 0.3
STUDIES = 600


def studies(num_seeds: int, num_prompts: int, by_seed: float, by_prompt: float) -> list[np.ndarray]:
    """Differences of many studies whose seeds and prompts each move them, around the truth."""
    random = np.random.default_rng(num_seeds)
    shape = (STUDIES, num_seeds, num_prompts)
    noise = random.normal(size=shape)
    seeds = by_seed * random.normal(size=(STUDIES, num_seeds, 1))
    prompts = by_prompt * random.normal(size=(STUDIES, 1, num_prompts))
    return list(TRUTH + seeds + prompts + noise)


def coverage(contrasts: list) -> float:
    return float(np.mean([each.low <= TRUTH <= each.high for each in contrasts]))


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("by_seed", [0.0, 0.2, 1.0])
def test_intervals_hold_the_truth_at_least_as_often_as_they_say(num_seeds, by_seed):
    tables = studies(num_seeds, 80, by_seed, by_prompt=1.0)
    covered = coverage(seed_contrasts(tables, resamples=1000))
    assert covered >= 0.95 - 3 * (0.95 * 0.05 / STUDIES) ** 0.5


def test_an_interval_over_prompts_alone_misses_the_truth_where_seeds_matter():
    tables = studies(3, 80, by_seed=0.5, by_prompt=1.0)
    over_prompts = paired_differences(np.stack([table.mean(axis=0) for table in tables], axis=1), 1000)
    assert coverage(over_prompts) < 0.75
    assert coverage(seed_contrasts(tables, resamples=1000)) >= 0.92


def test_a_true_difference_of_zero_is_found_significant_in_at_most_5_percent_of_studies():
    tables = [table - TRUTH for table in studies(5, 80, by_seed=0.5, by_prompt=1.0)]
    contrasts = seed_contrasts(tables, resamples=1000)
    assert np.mean([each.p <= 0.05 for each in contrasts]) <= 0.05 + 3 * (0.95 * 0.05 / STUDIES) ** 0.5
    for each in contrasts:
        assert (each.p <= 0.049) <= (each.low > 0 or each.high < 0), each


def test_the_wider_interval_counts():
    seeds_differ = np.array([[0.0] * 50, [1.0] * 50])
    [contrast] = seed_contrasts([seeds_differ], resamples=1000)
    half = t_quantile(0.975, 1) * seeds_differ.mean(axis=1).std(ddof=1) / 2**0.5
    assert contrast.by == "t"
    assert contrast.high - contrast.value == pytest.approx(half)
    prompts_differ = np.tile(np.linspace(-1, 1, 50), (4, 1))
    [contrast] = seed_contrasts([prompts_differ], resamples=1000)
    assert contrast.by == "bootstrap"
    assert contrast.high - contrast.value == pytest.approx(1.96 * prompts_differ[0].std() / 50**0.5, rel=0.1)


def test_a_single_seed_has_the_interval_of_the_evaluation():
    table = np.random.default_rng(0).normal(size=(1, 60))
    [contrast] = seed_contrasts([table])
    [over_prompts] = paired_differences(table.T.copy())
    assert (contrast.low, contrast.high, contrast.p) == (over_prompts.low, over_prompts.high, over_prompts.p)


def test_no_number_depends_on_the_other_contrasts_or_on_the_memory_at_once(monkeypatch):
    tables = studies(3, 40, 0.5, 0.5)[:3]
    together = seed_contrasts(tables, resamples=200)
    assert seed_contrasts(tables[1:2], resamples=200)[0] == together[1]
    monkeypatch.setattr("dde_core.study._DRAWN_AT_ONCE", 40 * 7)
    for one, other in zip(seed_contrasts(tables, resamples=200), together, strict=True):
        assert one.low == pytest.approx(other.low)


def test_tables_without_numbers_or_of_different_prompts_are_refused():
    fine = np.zeros((2, 10))
    for wrong in ([fine, np.zeros((2, 11))], [np.zeros((0, 10))], [np.zeros((2, 1))], [fine * np.nan]):
        with pytest.raises(DataError):
            seed_contrasts(wrong)
    assert seed_contrasts([]) == []


@pytest.mark.parametrize("num_seeds", [2, 3, 8])
def test_the_interval_of_a_number_of_whole_models_holds_the_truth(num_seeds):
    random = np.random.default_rng(num_seeds)
    values = TRUTH + random.normal(size=(4000, num_seeds))
    covered = coverage([seed_values_contrast(each) for each in values])
    assert covered == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / 4000) ** 0.5)
    for each in map(seed_values_contrast, values[:200]):
        assert (each.p <= 0.05) == (each.low > 0 or each.high < 0)


@pytest.mark.parametrize("values", [[0.1], [], [0.1, float("nan")]])
def test_a_number_of_whole_models_needs_two_seeds_and_finite_values(values):
    with pytest.raises(DataError, match=r"at least 2 seeds|finite"):
        seed_values_contrast(np.array(values))
