"""Student's t distribution for whole degrees of freedom, without scipy."""

from __future__ import annotations

import math
from functools import cache


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) for T with ``df`` degrees of freedom: Abramowitz & Stegun 26.7.3 and 26.7.4, exact."""
    theta = math.atan2(abs(t), math.sqrt(df))
    cos2 = math.cos(theta) ** 2
    term = 1.0 if df % 2 == 0 else math.cos(theta)
    total = term if df > 1 else 0.0
    for k in range(2 + df % 2, df - 1, 2):
        term *= cos2 * (k - 1) / k
        total += term
    if df % 2 == 0:
        inside = math.sin(theta) * total
    else:
        inside = 2 / math.pi * (theta + math.sin(theta) * total)
    return (1 + math.copysign(inside, t)) / 2


@cache
def t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, for 0 < p < 1, by bisection to 1e-12 of its size."""
    if p < 0.5:
        return -t_quantile(1 - p, df)
    high = 1.0
    while t_cdf(high, df) < p:
        high *= 2
    low = 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if t_cdf(middle, df) < p:
            low = middle
        else:
            high = middle
    return high
