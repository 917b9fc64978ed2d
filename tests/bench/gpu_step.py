"""Speed, memory and step-0 noise of a full-size training step: dde_core alone.

    python -m tests.bench.gpu_step --model sd15 --micro 8 --out results.json
    python -m tests.bench.gpu_step --model sdxl --micro 4 --compile --checkpointing on --out results.json
    python -m tests.bench.gpu_step --model tiny --device cpu --pairs 4 --micro 2

The real U-Net, VAE and text encoders have random weights and run at their own resolution in bf16 autocast;
fused AdamW trains all weights of the U-Net. Three sides alternate, each built anew: ours, the public recipe
(public_recipe.py) and the floor (floor.py). No Ray, no communication between GPUs. Results are merged into
the file: {name: {"ratio", "value", "unit", "against", "machine"}}. With --compile the first steps take
minutes.

Step-0 noise: policy and reference have the same weights, so every logit is 0 up to rounding. It is exactly
0 if both run in the same batch shape and dtype. If the reference runs pair by pair or in float32, the
logits show the noise that stored reference errors of such a run would bring. Reported is their standard
deviation by tenth of 1..T, for w = 1/2 (`uniform`) and w = 1/SNR (`dde_single`) at beta 5000. Trained
weights round differently: this checks the arithmetic only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.planning.estimate import FACTS, estimate, published_mfu
from dde_core.step_metrics import BUCKETS, bucket_of, bucket_span
from dde_core.train_step import PairBatch, PairErrors, pair_errors, step_losses
from tests.bench.gpu_speed import Sides
from tests.bench.measure import ceiling, in_turn, machine, ratio, result
from tests.support.unet_configs import UNETS, random_pairs, schedule, unet

SIDES = ["ours", "public recipe", "floor"]
OBJECTIVES = {"1/2": ObjectiveConfig(method="uniform"), "1/SNR": ObjectiveConfig(method="dde_single")}


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, record."""
    options = parse(arguments)
    torch.manual_seed(0)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the GPU is first used
    if options.noise_pairs:
        torch.use_deterministic_algorithms(True)
        noise = Noise(options.model, torch.device(options.device), options.micro)
        record_results(dict(noise.results(options.noise_pairs)), options.out)
    choices = {"on": [True], "off": [False], "both": [True, False], "none": []}
    for checkpointing in choices[options.checkpointing]:
        record_results(speed(options, checkpointing), options.out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. All sizes are in pairs."""
    parser = gpu_parser(__doc__)
    parser.add_argument("--micro", type=int, default=4, help="pairs in one forward and backward")
    parser.add_argument(
        "--pairs", type=int, default=32, help="pairs in one optimizer step: whole micro-batches"
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps of a side and round, after two untimed"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--noise-pairs", type=int, default=80, help="pairs for the step-0 noise; 0 skips it")
    parser.add_argument("--checkpointing", choices=["on", "off", "both", "none"], default="both")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="sides to measure")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net on all sides")
    parser.add_argument(
        "--decoders", type=int, default=8, help="processes that decode the public recipe's images"
    )
    return parser.parse_args(arguments)


def gpu_parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of every script for an accelerator; ``doc`` is the script's docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(UNETS), default="sd15")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file that the results are merged into")
    return parser


def record_results(results: dict[str, dict[str, Any]], out: Path | None) -> None:
    """Print results and merge them into the file at once: the next step may run out of memory."""
    for name, each in results.items():
        print(f"{name}: {each['value']:.4g} {each['unit']} (against {each['against']})", flush=True)
    if out:
        before = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(before | results, indent=1, sort_keys=True) + "\n")


class Noise:
    """Step-0 logits of one model and its frozen copy on one device."""

    def __init__(self, model: str, device: torch.device, micro: int) -> None:
        self.model = model
        self.device = device
        self.micro = micro
        self.schedule = schedule(device)
        self.policy = unet(model, device, seed=0)
        self.reference = unet(model, device, seed=0).requires_grad_(False)

    def results(self, num_pairs: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """The largest logit of identical arithmetic, then the logits' deviation for each other arithmetic."""
        self.policy.enable_gradient_checkpointing()
        t = spread_timesteps(num_pairs)
        parts = [self._margins(part, seed) for seed, part in enumerate(t.split(self.micro))]
        margins = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
        largest = max(float(logits(margins["identical"], t, w).abs().max()) for w in OBJECTIVES)
        yield self._row("step-0 logit, identical arithmetic, largest", largest, "", "0, exactly")
        for kind, w in itertools.product(list(margins)[1:], OBJECTIVES):
            values = logits(margins[kind], t, w)
            for first, last, rows in buckets(t):
                name = f"step-0 logit, {kind}, w = {w}, t {first}..{last}, standard deviation"
                against = f"0, but for rounding: {int(rows.sum())} pairs, random weights"
                yield self._row(name, float(values[rows].std()), "", against)

    def _margins(self, t: Tensor, seed: int) -> dict[str, Tensor]:
        """Margins of one micro-batch, on the CPU, for each arithmetic of the reference."""
        pairs = random_pairs(self.model, len(t), self.device, seed=seed)
        part = PairBatch(**{**vars(pairs), "t": t.to(self.device)})
        theta = self._errors(self.policy, part)
        with torch.no_grad():
            references = {
                "identical": self._errors(self.reference, part),
                "reference pair by pair": PairErrors.joined(
                    [self._errors(self.reference, part.rows(slice(i, i + 1))) for i in range(len(t))]
                ),
                "reference in float32": pair_errors(self.reference, self.schedule, part),
            }
        return {kind: margin(theta, ref).cpu() for kind, ref in references.items()}

    def _errors(self, model: Callable[..., Any], part: PairBatch) -> PairErrors:
        with torch.autocast(self.device.type, torch.bfloat16):
            return pair_errors(model, self.schedule, part)

    def _row(self, name: str, value: float, unit: str, against: str) -> tuple[str, dict[str, Any]]:
        row = {**result(None, value, unit, against), "machine": machine_of(self.device)}
        return f"{title_of(self.model)}, {name}", row


def speed(options: argparse.Namespace, checkpointing: bool) -> dict[str, dict[str, Any]]:
    """Pairs/s of ours against the public recipe and the floor, and on a GPU the peak memory of each."""
    device = torch.device(options.device)
    training = TrainConfig(
        steps=1, batch_size=options.pairs, micro_batch_size=options.micro, draws=1, learning_rate=1e-8,
        precision="bf16", gradient_checkpointing=checkpointing, compile=options.compile, reference="ledger",
    )  # fmt: skip
    how = f"micro {options.micro}, {'with' if checkpointing else 'without'} gradient checkpointing"
    head = f"{title_of(options.model)}, {how}{', compiled' if options.compile else ''}"

    def record_speed(side: str, pairs_per_s: float) -> None:
        row = {
            **result(None, pairs_per_s, "pairs/s", published_speed(options.model)),
            "machine": machine_of(device),
        }
        record_results({f"{head}, {side}": row}, options.out)

    with tempfile.TemporaryDirectory() as scratch:
        sides = Sides(options.model, device, training, Path(scratch), options.decoders, options.steps)
        measures = {"ours": sides.ours, "public recipe": sides.public_recipe, "floor": sides.floor}
        chosen = {side: measures[side] for side in options.sides}
        found = in_turn(options.rounds, chosen, on_figure=record_speed)
    results = {}
    if "public recipe" in found:
        name = f"{head}, train_vs_public_recipe"
        recipe = f"the public recipe, {options.decoders} processes that decode"
        against = f"{recipe}; {published_speed(options.model)}{ceiling(name)}"
        results[name] = ratio(found, "ours", "public recipe", "pairs/s", against)
    if "floor" in found:
        results[f"{head}, train_vs_floor"] = ratio(found, "ours", "floor", "pairs/s", "tensors in memory")
    floor_gb = sides.peak_gb.get("floor")
    for side, peak_gb in sides.peak_gb.items():
        against = estimated_memory(training, options.model)
        times_floor = None
        if floor_gb:
            against = f"the floor's {floor_gb:.1f} GB; {against}"
            times_floor = peak_gb / floor_gb
        results[f"{head}, peak memory, {side}"] = result(times_floor, peak_gb, "GB", against)
    return {name: {**each, "machine": machine_of(device)} for name, each in results.items()}


def title_of(model: str) -> str:
    return f"{model} at {UNETS[model]['sample_size'] * 8} px, bf16"


def machine_of(device: torch.device) -> str:
    return machine(torch.cuda.get_device_name(device)) if device.type == "cuda" else machine()


def estimated_memory(training: TrainConfig, model: str) -> str:
    """A run's memory by `dde_core.planning.estimate`, as text."""
    if model not in FACTS:
        return "not estimated"
    terms = estimate(model, OBJECTIVES["1/2"], training, 1).memory
    return f"{sum(term.value for term in terms):.1f} GB of ours estimated by dde_core.planning.estimate"


def published_speed(model: str) -> str:
    """The speed and MFU of the published Diffusion-DPO run, as text."""
    if model not in FACTS:
        return "not published"
    run = FACTS[model].published
    pace = run.steps * run.batch_size / run.gpu_hours / 3600
    percent = 100 * published_mfu(FACTS[model])
    return f"{pace:.3g} pairs/s of Diffusion-DPO on an A100 ({percent:.1f}% of its peak)"


def spread_timesteps(num_pairs: int) -> Tensor:
    """Timesteps over 1..1000, shuffled so that no micro-batch lies within one tenth: int64 [num_pairs]."""
    t = torch.linspace(1, 1000, num_pairs).round().long()
    return t[torch.randperm(num_pairs, generator=torch.Generator().manual_seed(0))]


def margin(theta: PairErrors, ref: PairErrors) -> Tensor:
    """(e_ref^w - e_theta^w) - (e_ref^l - e_theta^l), float64 [b]: 0 if the arithmetic is the same."""
    assert theta.l is not None
    assert ref.l is not None
    return ((ref.w.double() - theta.w.double()) - (ref.l.double() - theta.l.double())).detach()


def logits(margins: Tensor, t: Tensor, w: str) -> Tensor:
    """beta w(t) margin on the CPU, from `step_losses`: e_ref^w is the margin, all other errors are 0."""
    zero = torch.zeros_like(margins)
    terms = step_losses(PairErrors(zero, zero), PairErrors(margins, zero), t, OBJECTIVES[w], schedule())
    assert terms.logit is not None
    return terms.logit


def buckets(t: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """First and last timestep of each tenth of 1..1000, and a mask of its rows."""
    for number in range(BUCKETS):
        yield *bucket_span(number, 1000), bucket_of(t, 1000) == number


if __name__ == "__main__":
    main()
