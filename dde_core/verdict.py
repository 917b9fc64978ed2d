"""What the statistics of a comparison say: verdicts, and their error rates over many comparisons.

Imports neither torch nor numpy: the API's records use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dde_core.student_t import t_quantile

Verdict = Literal["better", "worse", "no difference that matters", "undecided"]

LEVEL = 0.95
"""Of every interval; tests are at 1 - LEVEL."""
POWER = 0.8
"""With which the smallest visible effect is found."""
RESAMPLES = 10_000
"""Of the bootstrap, unless requested otherwise."""


@dataclass(frozen=True)
class Difference:
    """The mean over prompts of candidate - base.

    ``low`` and ``high`` end the 95% interval, ``inner_low`` and ``inner_high`` the 90% interval of the
    equivalence test; ``p`` is that of the two-sided test of no difference.
    """

    value: float
    low: float
    high: float
    inner_low: float
    inner_high: float
    standard_error: float
    p: float
    num_prompts: int


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of simultaneous tests, in the given order (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1; none is below a smaller one's, none above 1. Rejecting
    what is at most .05 rejects any true hypothesis in at most 5% of evaluations.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def smallest_visible_effect(standard_error: float, num_prompts: int, num_comparisons: int = 1) -> float:
    """The true mean difference that is found with probability .8: (t_(1 - a/2) + t_.8) standard errors.

    a is .05 over the number of comparisons, which is what Holm's rule asks of the first (Cohen, Statistical
    Power Analysis, 1988, chapter 2, with paired means).
    """
    level = 1 - (1 - LEVEL) / num_comparisons / 2
    return (t_quantile(level, num_prompts - 1) + t_quantile(POWER, num_prompts - 1)) * standard_error


def verdict(
    difference: Difference, adjusted_p: float, margin: float, higher_is_better: bool = True
) -> Verdict:
    """What a comparison says about a scorer.

    1. ``no difference that matters``: the 90% interval is inside of -margin..margin: two one-sided tests at
       5% (Schuirmann 1987). A true difference of the margin or more is called so in at most 5% of cases,
       for each comparison.
    2. ``better`` or ``worse``: the p value after Holm is at most .05. Without any true difference, one of all
       comparisons is called so in at most 5% of evaluations.
    3. ``undecided``: neither; more prompts would tell.
    """
    if -margin <= difference.inner_low and difference.inner_high <= margin:
        return "no difference that matters"
    if adjusted_p > 1 - LEVEL:
        return "undecided"
    return "better" if (difference.value > 0) == higher_is_better else "worse"
