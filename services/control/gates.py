"""Gates: whether an evaluation lets a model be promoted."""

from __future__ import annotations

from services.api.records import EvaluateResult, GateResult
from services.api.requests import PromoteIf


def judge(gate: PromoteIf, result: EvaluateResult, candidate: str) -> GateResult:
    """Compare the evaluation's numbers of a candidate with the gate's limits; ``reasons`` name each one that
    fails.
    """
    ratio = result.scores[gate.scorer][candidate].beat_ratio
    reasons = []
    if not ratio.low > gate.beat_ratio_low:
        interval = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        reasons.append(f"{gate.scorer}: beat ratio {interval} is not surely above {gate.beat_ratio_low:g}")
    for name in gate.not_worse:
        why = _why_worse(result, name, candidate)
        reasons += [f"{name}: {why}"] if why else []
    return GateResult(passed=not reasons, alias=gate.alias, reasons=reasons)


def _why_worse(result: EvaluateResult, name: str, candidate: str) -> str | None:
    """Why the candidate is worse than the base by one scorer; None if nothing shows that it is."""
    if name in result.drift:
        drift = result.drift[name][candidate]
        return f"drift {drift.value:.3g} is beyond {drift.limit}" if drift.is_beyond else None
    difference = result.scores[name][candidate].difference
    if difference.high >= 0:
        return None
    interval = f"{difference.value:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]"
    return f"is worse than the base's by {interval}"
