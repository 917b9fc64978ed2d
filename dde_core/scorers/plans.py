"""All of a scorer but the values of its weights: what ``prove`` checks and ``load`` builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dde_core.scorers.pixels import Crop, Pad
from dde_core.scorers.prompts import Prompts


@dataclass(frozen=True)
class Plan:
    """``build`` reads the weights and returns a model on the CPU whose encoders have the given dtype.

    ``prompts`` is None for a scorer that reads images alone.
    """

    build: Callable[[torch.dtype], nn.Module]
    pixels: Crop | Pad
    prompts: Prompts | None
