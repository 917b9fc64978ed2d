"""Alarms for runs that go wrong although their loss looks well. Imports no torch.

Metrics are noisy means over one batch. An alarm therefore looks at a window of WINDOW steps, and is raised
when the window's mean exceeds its threshold by STANDARD_ERRORS standard errors. It is reported once, and once
more when a whole window has passed without it.

likelihood displacement   Winners' errors rise; the margin grows only because losers' errors rise faster.
saturation                Gradient weights w(t) sigmoid(-logit) are near 0 for nearly all pairs: few pairs
                          still teach anything.
learning backwards        The policy moves away from more winners than losers. With a correction C(t) the loss
                          can still fall.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dde_core.config import ObjectiveConfig

WINDOW = 20
"""Steps. Shorter windows report late because they are less certain, longer ones because they remember better
times."""

STANDARD_ERRORS = 4.0
"""One window in 2,600 exceeds this by chance (Student's t, 19 degrees of freedom)."""

MAX_WINNER_RISE = 0.01
"""How far winners' errors may rise. A model that predicts nothing has an error of 1, the noise's variance.

Measured on the shapes world, whose reference has an error of 0.012 (1,626 decided pairs, batch 64, windows of
20 steps): its demo rises by at most 0.007 in 160 steps; learning rate 3e-4 with beta 500 rises by 0.08 in 20
steps and 0.27 in 100.
"""

SATURATED = 0.05
"""Saturated: gradient weights below this fraction of their value at logit 0, as if 1 pair in 40 counted."""

AlarmName = Literal["likelihood displacement", "saturation", "learning backwards"]

_METRICS = re.compile(
    r"(winner_error|winner_error_diff|loser_error_diff|margin|implicit_accuracy|"
    r"gradient_weight(_at_zero)?(_t\d+)?)$"
)


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """``level`` is "warning" when the condition appears, "info" when it has been absent for a whole
    window."""

    name: AlarmName
    level: Literal["info", "warning"]
    message: str


class Alarms:
    """Reads every step of a run of ``objective``, in order. Store ``state_dict`` in checkpoints: a resumed
    run then reports the same alarms as an uninterrupted one."""

    def __init__(self, objective: ObjectiveConfig) -> None:
        self._beta = objective.beta
        self._window: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._silent_steps: dict[str, int] = {}
        """Steps since each reported alarm was last raised."""

    def step(self, metrics: dict[str, float]) -> list[Alarm]:
        """Alarms to report after one more step. ``metrics``: those of `step_metrics`."""
        self._window.append({name: value for name, value in metrics.items() if _METRICS.match(name)})
        if len(self._window) < WINDOW:
            return []
        findings: dict[AlarmName, str | None] = {
            "likelihood displacement": self._likelihood_displacement(),
            "saturation": self._saturation(),
            "learning backwards": self._learning_backwards(),
        }
        alarms = [self._update(name, finding) for name, finding in findings.items()]
        return [alarm for alarm in alarms if alarm]

    def state_dict(self) -> dict[str, Any]:
        """Everything that later alarms depend on, as JSON values."""
        return {"window": list(self._window), "silent_steps": dict(self._silent_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the result of ``state_dict``."""
        self._window = deque(state["window"], maxlen=WINDOW)
        self._silent_steps = dict(state["silent_steps"])

    def _update(self, name: AlarmName, finding: str | None) -> Alarm | None:
        """Record whether the condition holds now; the alarm if it has just appeared or just ended."""
        is_reported = name in self._silent_steps
        if finding:
            self._silent_steps[name] = 0
            return None if is_reported else Alarm(name=name, level="warning", message=f"{name}: {finding}")
        if not is_reported:
            return None
        self._silent_steps[name] += 1
        if self._silent_steps[name] < WINDOW:
            return None
        del self._silent_steps[name]
        return Alarm(
            name=name, level="info", message=f"{name} has ended: not seen in the last {WINDOW} steps"
        )

    # ---- the three conditions: a message if the condition holds in the window, else None

    def _likelihood_displacement(self) -> str | None:
        if not (self._is_above("winner_error_diff", MAX_WINNER_RISE) and self._is_above("margin", 0.0)):
            return None
        rise_w = self._mean("winner_error_diff")
        rise_l = self._mean("loser_error_diff")
        start_w = self._mean("winner_error") - rise_w
        accuracy = self._mean("implicit_accuracy")
        return (
            f"winners' errors rose by {rise_w:.3g} from {start_w:.3g}, losers' by {rise_l:.3g}. Accuracy is "
            f"{accuracy:.2f} because losers get worse faster, not because winners get better. Lower "
            f"training.learning_rate, or raise objective.beta (now {self._beta:g})"
        )

    def _saturation(self) -> str | None:
        fraction = self._weight_fraction()
        if fraction is None or fraction >= SATURATED:
            return None
        return (
            f"gradient weights are {fraction:.2g} of their value at logit 0, {self._saturated_tenths()}: "
            f"few pairs still teach anything. Lower objective.beta (now {self._beta:g}), or "
            f"training.learning_rate"
        )

    def _learning_backwards(self) -> str | None:
        if not self._is_below("implicit_accuracy", 0.5):
            return None
        return (
            f"implicit accuracy is {self._mean('implicit_accuracy'):.2f}, below chance: the policy moves "
            f"away from winners more than from losers. Check which label means the winner, and lower "
            f"training.learning_rate"
        )

    # ---- statistics of the window

    def _saturated_tenths(self) -> str:
        """Which tenths of t are saturated. Each is named by its last timestep."""
        matches = [_METRICS.match(name) for values in self._window for name in values]
        suffixes = sorted({match[3] for match in matches if match and match[3]})
        fractions = {int(suffix[2:]): self._weight_fraction(suffix) for suffix in suffixes}
        saturated = [t for t, fraction in fractions.items() if fraction is not None and fraction < SATURATED]
        others = [t for t in fractions if t not in saturated]
        if not others:
            return f"below {SATURATED:g} at every t"
        return (
            f"below {SATURATED:g} in the tenths of t up to {', '.join(map(str, saturated))}, "
            f"not in those up to {', '.join(map(str, others))}"
        )

    def _weight_fraction(self, suffix: str = "") -> float | None:
        """Gradient weights over their value at logit 0, in one tenth of t or everywhere. None without such
        pairs."""
        weight = 0.0
        at_zero = 0.0
        for values in self._window:
            if f"gradient_weight{suffix}" in values and f"gradient_weight_at_zero{suffix}" in values:
                weight += values[f"gradient_weight{suffix}"]
                at_zero += values[f"gradient_weight_at_zero{suffix}"]
        return weight / at_zero if at_zero > 0 else None

    def _is_above(self, name: str, threshold: float) -> bool:
        """Whether the window's mean exceeds the threshold beyond chance. False where a step lacks the
        metric."""
        return self._is_positive([values[name] - threshold for values in self._window if name in values])

    def _is_below(self, name: str, threshold: float) -> bool:
        return self._is_positive([threshold - values[name] for values in self._window if name in values])

    @staticmethod
    def _is_positive(differences: list[float]) -> bool:
        if len(differences) < WINDOW:
            return False
        standard_error = np.std(differences, ddof=1) / len(differences) ** 0.5
        return bool(np.mean(differences) > STANDARD_ERRORS * standard_error)

    def _mean(self, name: str) -> float:
        return float(np.mean([values[name] for values in self._window]))
