"""How fast a full-size training step is, what it takes in memory, and how noisy its first step is: dde_core alone.

    python -m tests.bench.gpu_step --model sd15 --micro 8 --out results.json
    python -m tests.bench.gpu_step --model sdxl --micro 4 --compile --checkpointing on --out results.json
    python -m tests.bench.gpu_step --model tiny --device cpu --pairs 4 --micro 2

The real U-Net, VAE and text encoders with random weights at their own resolution, bf16 autocast, all weights of the U-Net
trained by fused AdamW. Three sides take turns, each built anew: ours, the public recipe (public_recipe.py) and the floor
(floor.py). No Ray, no exchange between GPUs. Results are merged into the file: {name: {"ratio", "value", "unit", "against",
"machine"}}. With --compile the first steps take minutes.

Step-0 noise: policy and reference have the same weights, so every logit is 0 but for rounding. It is exactly 0 where both
run in the same batch shape and dtype. Where the reference ran pair by pair, or in float32, what is left is the noise that
stored reference errors from such a run would bring: its standard deviation is reported by tenth of 1..T for w = 1/2
(`uniform`) and w = 1/SNR (`dde_single`) at beta 5000. Trained weights round differently: this is a check of the arithmetic.
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
from dde_core.metrics import BUCKETS, bucket_of, bucket_span
from dde_core.planning.estimate import FACTS, estimate, published_mfu
from dde_core.train_step import PairBatch, PairErrors, pair_errors, step_losses
from tests.bench.gpu_speed import Sides
from tests.bench.measure import ceiling, in_turn, machine, ratio, result
from tests.support.unet_configs import UNETS, random_pairs, schedule, unet

SIDES = ["ours", "public recipe", "floor"]
OBJECTIVES = {"1/2": ObjectiveConfig(method="uniform"), "1/SNR": ObjectiveConfig(method="dde_single")}


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, write."""
    asked = parse(arguments)
    torch.manual_seed(0)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the GPU is first used
    if asked.noise_pairs:
        torch.use_deterministic_algorithms(True)
        tell(
            dict(Bench(asked.model, torch.device(asked.device), asked.micro).noise(asked.noise_pairs)),
            asked.out,
        )
    for checkpointing in {"on": [True], "off": [False], "both": [True, False], "none": []}[
        asked.checkpointing
    ]:
        tell(speed(asked, checkpointing), asked.out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What is asked for, in pairs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(UNETS), default="sd15")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--micro", type=int, default=4, help="pairs in one forward and backward")
    parser.add_argument(
        "--pairs", type=int, default=32, help="pairs in one optimizer step, whole micro-batches"
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps of a side in a round, after two that are not"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--noise-pairs", type=int, default=80, help="pairs for the step-0 noise (0: it is left out)"
    )
    parser.add_argument("--checkpointing", choices=["on", "off", "both", "none"], default="both")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=SIDES, help="ours alone gives its pace and memory"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net on all sides")
    parser.add_argument(
        "--decoders", type=int, default=8, help="processes that decode the public recipe's pictures ahead"
    )
    parser.add_argument("--out", type=Path, help="JSON file that the results are merged into")
    return parser.parse_args(arguments)


def tell(results: dict[str, dict[str, Any]], out: Path | None) -> None:
    """Print results and merge them into the file at once: what comes next may run out of memory."""
    for name, each in results.items():
        print(f"{name}: {each['value']:.4g} {each['unit']} (against {each['against']})", flush=True)
    if out:
        before = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(before | results, indent=1, sort_keys=True) + "\n")


class Bench:
    """One model and its frozen copy on one device. Every result is {name: what the module's docstring says}."""

    def __init__(self, model: str, device: torch.device, micro: int) -> None:
        self.model, self.device, self.micro = model, device, micro
        self.schedule = schedule(device)
        self.policy, self.reference = (unet(model, device, seed=0) for _ in range(2))
        self.reference.requires_grad_(False)

    def noise(self, num_pairs: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """The largest logit of identical arithmetic, and the logits' spread for each other arithmetic of the reference."""
        self.policy.enable_gradient_checkpointing()
        t = spread(num_pairs)
        found = [self._margins(each, seed) for seed, each in enumerate(t.split(self.micro))]
        margins = {kind: torch.cat([part[kind] for part in found]) for kind in found[0]}
        largest = max(float(logits(margins["identical"], t, w).abs().max()) for w in OBJECTIVES)
        yield self._row("step-0 logit, identical arithmetic, largest", largest, "", "0, exactly")
        for kind, w in itertools.product(list(margins)[1:], OBJECTIVES):
            values = logits(margins[kind], t, w)
            for first, last, rows in buckets(t):
                name = f"step-0 logit, {kind}, w = {w}, t {first}..{last}, standard deviation"
                yield self._row(
                    name,
                    float(values[rows].std()),
                    "",
                    f"0, but for rounding: {int(rows.sum())} pairs, random weights",
                )

    def _margins(self, t: Tensor, seed: int) -> dict[str, Tensor]:
        """Margins of one micro-batch on the CPU, by how the reference ran."""
        pairs = random_pairs(self.model, len(t), self.device, seed=seed)
        part = PairBatch(**{**vars(pairs), "t": t.to(self.device)})
        theta = self._errors(self.policy, part)
        with torch.no_grad():
            references = {
                "identical": self._errors(self.reference, part),
                "reference pair by pair": joined(
                    [self._errors(self.reference, part.rows(slice(i, i + 1))) for i in range(len(t))]
                ),
                "reference in float32": pair_errors(self.reference, self.schedule, part),
            }
        return {kind: margin(theta, ref).cpu() for kind, ref in references.items()}

    def _errors(self, model: Callable[..., Any], part: PairBatch) -> PairErrors:
        with torch.autocast(self.device.type, torch.bfloat16):
            return pair_errors(model, self.schedule, part)

    def _row(self, name: str, value: float, unit: str, against: str) -> tuple[str, dict[str, Any]]:
        return f"{headed(self.model)}, {name}", {
            **result(None, value, unit, against),
            "machine": machine_of(self.device),
        }


def speed(asked: argparse.Namespace, checkpointing: bool) -> dict[str, dict[str, Any]]:
    """Pairs/s of ours against the public recipe and the floor, and on a GPU what each takes in memory."""
    device = torch.device(asked.device)
    training = TrainConfig(
        steps=1, batch_size=asked.pairs, micro_batch_size=asked.micro, draws=1, learning_rate=1e-8, precision="bf16",
        gradient_checkpointing=checkpointing, compile=asked.compile, reference="ledger",
    )  # fmt: skip
    how = f"micro {asked.micro}, {'with' if checkpointing else 'without'} gradient checkpointing"
    head = f"{headed(asked.model)}, {how}{', compiled' if asked.compile else ''}"

    def told_at_once(side: str, pairs_per_s: float) -> None:
        row = {**result(None, pairs_per_s, "pairs/s", published(asked.model)), "machine": machine_of(device)}
        tell({f"{head}, {side}": row}, asked.out)

    with tempfile.TemporaryDirectory() as scratch:
        sides = Sides(asked.model, device, training, Path(scratch), asked.decoders, asked.steps)
        measured = {"ours": sides.ours, "public recipe": sides.public_recipe, "floor": sides.floor}
        found = in_turn(asked.rounds, {side: measured[side] for side in asked.sides}, on_figure=told_at_once)
    results = {}
    name = f"{head}, train_vs_public_recipe"
    public = (
        f"the public recipe, {asked.decoders} processes that decode; {published(asked.model)}{ceiling(name)}"
    )
    if "public recipe" in found:
        results[name] = ratio(found, "ours", "public recipe", "pairs/s", public)
    if "floor" in found:
        results[f"{head}, train_vs_floor"] = ratio(found, "ours", "floor", "pairs/s", "tensors in memory")
    floor_gb = sides.peak_gb.get("floor")
    for side, peak_gb in sides.peak_gb.items():
        against = (
            f"the floor's {floor_gb:.1f} GB; {counted(training, asked.model)}"
            if floor_gb
            else counted(training, asked.model)
        )
        results[f"{head}, peak memory, {side}"] = result(
            peak_gb / floor_gb if floor_gb else None, peak_gb, "GB", against
        )
    return {name: {**each, "machine": machine_of(device)} for name, each in results.items()}


def headed(model: str) -> str:
    return f"{model} at {UNETS[model]['sample_size'] * 8} px, bf16"


def machine_of(device: torch.device) -> str:
    return machine(torch.cuda.get_device_name(device)) if device.type == "cuda" else machine()


def counted(training: TrainConfig, model: str) -> str:
    """What `dde_core.planning.estimate` says of a run's memory."""
    if model not in FACTS:
        return "not counted"
    terms = estimate(model, OBJECTIVES["1/2"], training, 1).memory
    return f"{sum(term.value for term in terms):.1f} GB of ours counted by dde_core.planning.estimate"


def published(model: str) -> str:
    """The pace of the published run."""
    if model not in FACTS:
        return "not published"
    run = FACTS[model].published
    pace = run.steps * run.batch_size / run.gpu_hours / 3600
    return f"{pace:.3g} pairs/s of Diffusion-DPO on an A100 ({100 * published_mfu(FACTS[model]):.1f}% of its peak)"


def spread(num_pairs: int) -> Tensor:
    """Timesteps over 1..1000 in an order that mixes them, so that no micro-batch holds one tenth alone."""
    t = torch.linspace(1, 1000, num_pairs).round().long()
    return t[torch.randperm(num_pairs, generator=torch.Generator().manual_seed(0))]


def margin(theta: PairErrors, ref: PairErrors) -> Tensor:
    """(e_ref^w - e_theta^w) - (e_ref^l - e_theta^l), float64 [b]: 0 where the arithmetic is the same."""
    assert theta.l is not None
    assert ref.l is not None
    return ((ref.w.double() - theta.w.double()) - (ref.l.double() - theta.l.double())).detach()


def joined(parts: list[PairErrors]) -> PairErrors:
    return PairErrors(
        torch.cat([part.w for part in parts]), torch.cat([part.l for part in parts if part.l is not None])
    )


def logits(margins: Tensor, t: Tensor, w: str) -> Tensor:
    """beta w(t) margin on the CPU, by `step_losses` itself: a margin is the reference's error on winners, all else 0."""
    zero = torch.zeros_like(margins)
    terms = step_losses(PairErrors(zero, zero), PairErrors(margins, zero), t, OBJECTIVES[w], schedule())
    assert terms.logit is not None
    return terms.logit


def buckets(t: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """First and last timestep of each tenth of 1..1000, and which rows lie there."""
    for number in range(BUCKETS):
        yield *bucket_span(number, 1000), bucket_of(t, 1000) == number


if __name__ == "__main__":
    main()
