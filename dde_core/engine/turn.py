"""One turn: one U-Net call for many samples, each at its own timestep; then each takes its own step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from dde_core.conditioning import concatenated
from dde_core.engine.model import BaseModel
from dde_core.engine.sample import Sample, take_step
from dde_core.engine.samplers import scaled_input, shared_step


@torch.no_grad()
def advance(model: BaseModel, samples: Sequence[Sample]) -> None:
    """Take one step with every sample. All have one size; none is finished.

    The rows of the call are every sample's conditional half, then the unconditional halves of those with
    guidance: out = out_u + g (out_c - out_u) (Ho and Salimans 2022, Eq. 6).
    """
    guided = [i for i, sample in enumerate(samples) if sample.uncond is not None]
    scaled = [scaled_input(sample.scheduler, sample.latents) for sample in samples]
    rows = [*range(len(samples)), *guided]
    conditionings = [sample.cond for sample in samples]
    conditionings += [sample.uncond for sample in samples if sample.uncond is not None]
    times = torch.tensor([samples[i].next_timestep for i in rows], dtype=torch.float32)
    scales = torch.tensor([samples[i].guidance_scale for i in guided]).view(-1, 1, 1, 1)
    # Copies to the device come before the call: a copy waits for what the device is doing.
    times, scales, chosen = (each.to(model.device) for each in (times, scales, torch.tensor(guided)))
    outputs = model.predict(
        torch.cat([scaled[i] for i in rows]),
        times,
        concatenated(*conditionings),
        [samples[i].adapter for i in rows],
    )
    with_text = outputs[: len(samples)]
    if guided:
        without = outputs[len(samples) :]
        combined = without + scales * (with_text[chosen] - without)
        with_text = with_text.index_copy(0, chosen, combined)
    for group in stepping_together(samples):
        take_step([samples[i] for i in group], torch.cat([with_text[i : i + 1] for i in group]))


def stepping_together(samples: Sequence[Sample]) -> list[list[int]]:
    """The places of samples that take their next step in one call: the same step, without a state."""
    groups: dict[Hashable, list[int]] = {}
    for i, sample in enumerate(samples):
        shared = shared_step(sample.scheduler)
        groups.setdefault(("alone", i) if shared is None else shared, []).append(i)
    return list(groups.values())
