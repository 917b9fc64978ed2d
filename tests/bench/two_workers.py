"""Are two workers twice as fast as one? Pairs/s of the train stage on Ray Train with the same global batch.

Where the rest of a step goes is measured without Ray: ``half a batch`` is a step of half the pairs with the
whole optimizer. ``at once`` is the slowdown while both halves share the machine's caches and memory.
``communication`` adds up all gradients over gloo. What remains belongs to Ray, the data and the loop.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import socket
import statistics
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed

from dde_core.models.policy import use_deterministic_kernels
from services.stages.journal import Journal
from services.stages.specs import JournalEvent
from services.training.train import train
from tests.bench.cases import WARM_UP, Case, step_entries, step_seconds
from tests.bench.measure import Result, Stopwatch, in_turn, ratio, result
from tests.bench.train_speed import make_floor, median_step

WORKERS = 2


def two_workers(scratch: Path, rounds: int = 2, steps: int = 5) -> dict[str, Result]:
    """``two_workers_vs_one`` on the mid-size U-Net, 8 pairs a step, and a result for each part of a step."""
    case = Case.mid_size(scratch / "mid", batch_size=8)
    ledger = case.write_ledger()
    runs = itertools.count()
    steps += WARM_UP
    metrics: dict[int, list[dict[str, float]]] = {1: [], WORKERS: []}

    def pairs_per_s(workers: int) -> float:
        entries = _trained(case, f"run-{next(runs)}", steps, ledger, workers)
        metrics[workers] += [entry.metrics or {} for entry in entries[WARM_UP:]]
        return case.batch_size / statistics.median(step_seconds(entries))

    found = in_turn(rounds, {"two": lambda: pairs_per_s(WORKERS), "one": lambda: pairs_per_s(1)})
    what = f"one worker, steps of {case.batch_size} pairs of the mid-size U-Net on {os.cpu_count()} cores"
    step_s = case.batch_size / statistics.median(found["two"])
    waited_s = step_s * statistics.median(step["data_wait"] for step in metrics[WORKERS])
    return {
        "two_workers_vs_one": ratio(found, "two", "one", "pairs/s", what),
        **_parts(case, steps, step_s, waited_s),
    }


def _trained(case: Case, name: str, steps: int, ledger: str, workers: int) -> list[JournalEvent]:
    """Run the train stage; return the journal's entry of each step."""
    spec = case.spec(name, case.training(steps, reference="ledger"))
    spec = spec.model_copy(update={"ledger": ledger, "workers": workers})
    train(spec, Journal(spec.prefix))
    return step_entries(spec.prefix)


def _parts(case: Case, steps: int, step_s: float, waited_s: float) -> dict[str, Result]:
    """The parts of a step of two workers, in seconds."""
    whole_s = _alone(case, 1, steps)
    half_s = _alone(case, WORKERS, steps)
    at_once = _together(case, steps)
    together_s = max(seconds for seconds, _ in at_once)
    communication_s = max(seconds for _, seconds in at_once)
    parts = {
        "half a batch": (
            half_s,
            f"{whole_s:.3g} s of a whole one: at best {whole_s / half_s:.2f} times as fast",
        ),
        "at once": (together_s - half_s, "what two halves at once take longer than one alone"),
        "communication": (communication_s, "adding all gradients over gloo, with nothing else to do"),
        "data": (
            waited_s,
            "waiting for rows, text and draws, as the loop measures (the text is in half a batch, too)",
        ),
        "rest": (
            step_s - together_s - communication_s,
            "Ray, collecting errors, logging, and waiting for the slower worker",
        ),
    }
    return {
        f"two_workers_vs_one, {part}": result(
            seconds / step_s, seconds, "s", f"a step of {step_s:.3g} s; {what}"
        )
        for part, (seconds, what) in parts.items()
    }


def _alone(case: Case, parts: int, steps: int) -> float:
    """Median seconds of the floor's step on 1 / ``parts`` of the batch, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_floor_step, (case, parts, steps))


def _together(case: Case, steps: int) -> list[tuple[float, float]]:
    """Of each of two processes that run at once: median seconds of the floor's step and of its all-reduce."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        return pool.starmap(
            _floor_and_sum, [(case, steps, rank, address) for rank in range(WORKERS)], chunksize=1
        )


def _floor_step(case: Case, parts: int, steps: int) -> float:
    use_deterministic_kernels()
    smaller = replace(case, batch_size=case.batch_size // parts)
    return median_step(make_floor(smaller).step, steps)


def _floor_and_sum(case: Case, steps: int, rank: int, address: str) -> tuple[float, float]:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=WORKERS)
    torch.distributed.barrier()
    step_s = _floor_step(case, WORKERS, steps)
    gradients = torch.zeros(sum(parameter.numel() for parameter in case.folder.unet().parameters()))
    seconds = []
    for _ in range(WARM_UP + 3):
        torch.distributed.barrier()
        watch = Stopwatch()
        torch.distributed.all_reduce(gradients)
        seconds.append(watch())
    torch.distributed.destroy_process_group()
    return step_s, statistics.median(seconds[WARM_UP:])


if __name__ == "__main__":
    import tempfile

    import ray

    ray.init(num_cpus=8, log_to_driver=False, include_dashboard=False)
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(two_workers(Path(scratch), rounds=1, steps=2), indent=1))
