"""What each method needs, in one table for configuration, planning, training and control. Imports no torch.

The weights w(t) of the same methods are in `dde_core/objectives.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MethodName = Literal[
    "dde", "dde_single", "dde_step", "uniform", "discounted", "sft", "tailorpo", "tailorpo_g"
]
NoiseMode = Literal["independent", "shared"]
ErrorKind = Literal["noise", "velocity"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method reads and trains on.

    ``noise`` is the default: winner and loser have independent noises, or share one. ``corrected``
    methods add the calibrated correction C(t) to the logit, ``discounted`` ones draw t in proportion to
    powers of gamma. The formulas of ``noise_errors_only`` methods hold for errors of the noise. Without
    a reference and a loser, the loss is the policy's error on winners.

    ``on_policy`` methods need no dataset: the policy draws its own pairs, which scorers rank, and a pair is
    two samples of one denoising step (`dde_core/transitions.py`). ``reward_gradient``: winners are moved
    along the gradient of the reward.
    """

    noise: NoiseMode
    corrected: bool = False
    discounted: bool = False
    noise_errors_only: bool = False
    has_reference: bool = True
    has_loser: bool = True
    on_policy: bool = False
    reward_gradient: bool = False

    @property
    def samples(self) -> int:
        """The samples of a pair that go through the U-Net."""
        return 2 if self.has_loser and not self.on_policy else 1


METHODS: dict[MethodName, Method] = {
    "dde": Method(noise="independent", corrected=True, noise_errors_only=True),
    "dde_single": Method(noise="independent", noise_errors_only=True),
    "dde_step": Method(noise="independent", corrected=True, noise_errors_only=True),
    "uniform": Method(noise="shared"),
    "discounted": Method(noise="shared", discounted=True),
    "sft": Method(noise="independent", has_reference=False, has_loser=False),
    "tailorpo": Method(noise="independent", noise_errors_only=True, on_policy=True),
    "tailorpo_g": Method(noise="independent", noise_errors_only=True, on_policy=True, reward_gradient=True),
}
"""Default noise follows each method's source: DDE draws two noises (Algorithm 1 line 3); Diffusion-DPO, of
which `discounted` is a variant, draws one for both sides."""
