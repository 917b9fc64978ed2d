"""Alarms about a run that goes wrong although its loss does not say so, from the metrics of its steps. Imports no torch.

A step's metrics are means over one batch, and noisy; so an alarm looks at a window of steps, and rings where the mean is beyond
its threshold by STANDARD_ERRORS of the mean. It is told once, and once more when it has been silent for a whole window.

Loser-fleeing   winners' errors rise, and the margin grows only because losers' rise faster. Loss and accuracy look well.
Saturation      nearly all gradient weights w(t) sigmoid(-logit) are near 0: no pair but a few teaches anything.
Learning backwards   the policy moves away from more winners than losers. With a correction C(t) the loss can fall all the same.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from dde_core.config import ObjectiveConfig

WINDOW = 20
"""Steps. Shorter ones ring late for lack of certainty, longer ones because they remember better times."""

STANDARD_ERRORS = 4.0
"""Of a window's mean. One window in 2,600 exceeds it by chance (Student's t, 19 degrees of freedom)."""

RISE = 0.01
"""By how much winners' errors may rise: 1% of the noise's variance, which is the error of a model that predicts nothing.

Measured on the shapes world, whose reference has an error of 0.012 (its 1,626 decided pairs, batch 64, windows of 20 steps): in
its demo they rise by 0.007 at most in 160 steps; at learning rate 3e-4 and beta 500 by 0.08 in 20 steps and 0.27 in 100.
"""

SATURATED = 0.05
"""Gradient weights over what they would be at logit 0, where the sigmoid is 1/2: so much is left if 1 pair in 40 counts."""

_READ = re.compile(
    r"(winner_error|winner_error_diff|loser_error_diff|margin|implicit_accuracy|gradient_weight(_at_zero)?(_t\d+)?)$"
)


class Alarms:
    """Fed with every step of a run of ``objective``, in order. ``state_dict`` goes into checkpoints, so that a run that goes on
    warns alike."""

    def __init__(self, objective: ObjectiveConfig) -> None:
        self._beta = objective.beta
        self._window: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._silent_steps: dict[str, int] = {}  # of the alarms that were told

    def step(self, metrics: dict[str, float]) -> list[str]:
        """What there is to be told after one more step, whose metrics are those of `dde_core.metrics.step_metrics`."""
        self._window.append({name: value for name, value in metrics.items() if _READ.match(name)})
        if len(self._window) < WINDOW:
            return []
        alarms: dict[str, Callable[[], str | None]] = {
            "loser-fleeing": self._loser_fleeing,
            "saturation": self._saturation,
            "learning backwards": self._backwards,
        }
        told = [self._told(name, alarm()) for name, alarm in alarms.items()]
        return [message for message in told if message]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step's alarms depend on, as JSON can hold it."""
        return {"window": list(self._window), "silent_steps": dict(self._silent_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self._window = deque(state["window"], maxlen=WINDOW)
        self._silent_steps = dict(state["silent_steps"])

    def _told(self, name: str, ringing: str | None) -> str | None:
        if ringing:
            is_new = name not in self._silent_steps
            self._silent_steps[name] = 0
            return f"{name}: {ringing}" if is_new else None
        if name in self._silent_steps:
            self._silent_steps[name] += 1
            if self._silent_steps[name] == WINDOW:
                del self._silent_steps[name]
                return f"{name} is over: nothing of it in the last {WINDOW} steps"
        return None

    def _loser_fleeing(self) -> str | None:
        if not (self._is_above("winner_error_diff", RISE) and self._is_above("margin", 0.0)):
            return None
        rise, rise_l, accuracy = map(
            self._mean, ("winner_error_diff", "loser_error_diff", "implicit_accuracy")
        )
        return (
            f"winners' errors rose by {rise:.3g} from {self._mean('winner_error') - rise:.3g}, losers' {rise_l:.3g}: "
            f"accuracy is {accuracy:.2f} because losers get worse faster, not because winners get better. Lower "
            f"training.learning_rate, or raise objective.beta (now {self._beta:g})"
        )

    def _saturation(self) -> str | None:
        left = self._weight_left("")
        if left is None or left >= SATURATED:
            return None
        return (
            f"gradient weights are {left:.2g} of what they would be at logit 0, {self._saturated_tenths()}: few pairs still "
            f"teach anything. Lower objective.beta (now {self._beta:g}), or training.learning_rate"
        )

    def _saturated_tenths(self) -> str:
        ends = sorted(
            {
                match[3]
                for values in self._window
                for name in values
                if (match := _READ.match(name)) and match[3]
            }
        )
        left = {int(end[2:]): self._weight_left(end) for end in ends}
        dead = [str(end) for end, part in left.items() if part is not None and part < SATURATED]
        if len(dead) == len(left):
            return f"below {SATURATED:g} at every t"
        alive = [str(end) for end in left if str(end) not in dead]
        return f"below {SATURATED:g} in the tenths of t up to {', '.join(dead)}, not in those up to {', '.join(alive)}"

    def _backwards(self) -> str | None:
        if not self._is_above("implicit_accuracy", 0.5, sign=-1):
            return None
        return (
            f"implicit accuracy is {self._mean('implicit_accuracy'):.2f}, below chance: the policy moves away from winners "
            f"more than from losers. Look at the labels' direction, and lower training.learning_rate"
        )

    def _weight_left(self, bucket: str) -> float | None:
        """Of the gradient weights at logit 0 in the window, in one tenth of t or everywhere; None where there is none."""
        names = f"gradient_weight{bucket}", f"gradient_weight_at_zero{bucket}"
        pairs = [
            (values[names[0]], values[names[1]])
            for values in self._window
            if names[0] in values and names[1] in values
        ]
        weight, at_zero = np.sum(pairs, axis=0) if pairs else (0.0, 0.0)
        return float(weight / at_zero) if at_zero > 0 else None

    def _is_above(self, name: str, threshold: float, sign: int = 1) -> bool:
        """Whether the window's mean is certainly above (``sign`` -1: below) the threshold."""
        values = [values[name] for values in self._window if name in values]
        if len(values) < WINDOW:
            return False
        above = sign * (np.array(values) - threshold)
        return bool(above.mean() > STANDARD_ERRORS * above.std(ddof=1) / len(values) ** 0.5)

    def _mean(self, name: str) -> float:
        return float(np.mean([values[name] for values in self._window]))
