"""Gates: whether an evaluation lets a model be promoted."""

from __future__ import annotations

from services.api.records import EvaluateResult, GateResult
from services.api.requests import PromoteIf


def judge(gate: PromoteIf, result: EvaluateResult) -> GateResult:
    """Compare the intervals of a job's evaluation, which has one candidate, with the gate's limits.

    ``reasons`` name each limit that fails.
    """
    [candidate] = result.scores[gate.scorer].values()
    ratio = candidate.beat_ratio
    reasons = []
    if not ratio.low > gate.beat_ratio_low:
        interval = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        reasons.append(f"{gate.scorer}: beat ratio {interval} is not surely above {gate.beat_ratio_low:g}")
    for name in gate.not_worse:
        [candidate] = result.scores[name].values()
        difference = candidate.difference
        if difference.high < 0:
            interval = f"{difference.value:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]"
            reasons.append(f"{name}: is worse than the base's by {interval}")
    return GateResult(passed=not reasons, alias=gate.alias, reasons=reasons)
