"""How much memory does training take beyond the minimum? The peak of the real loop against that of the floor.

Each runs in a process of its own with the same imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from services.training.worker.step_timer import peak_resident_bytes
from tests.bench.cases import Case
from tests.bench.measure import Result, result
from tests.bench.train_speed import make_floor

STEPS = 4


def train_memory(scratch: Path) -> dict[str, Result]:
    """``train_memory_vs_floor`` on the shapes model and on the mid-size U-Net."""
    found: dict[str, Result] = {}
    for case in (Case.shapes(scratch / "shapes"), Case.mid_size(scratch / "mid")):
        ledger = case.write_ledger()
        imports, floor, ours = (_in_a_process(case, side, ledger) for side in ("imports", "floor", "ours"))
        baselines = f"the floor's {floor['peak_mb']:.0f} MB; imports alone {imports['peak_mb']:.0f} MB"
        against = f"{baselines}; {case.batch_size} pairs a step"
        name = f"train_memory_vs_floor{case.title}"
        found[name] = result(ours["peak_mb"] / floor["peak_mb"], ours["peak_mb"], "MB", against)
    return found


def _in_a_process(case: Case, side: str, ledger: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.train_memory", "--side", side, "--ledger", ledger, "--case"]
    done = subprocess.run([*command, json.dumps(asdict(case))], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {side}{case.title}: peak {found['peak_mb']:.0f} MB", flush=True)
    return found


def _measure(case: Case, side: str, ledger: str) -> dict[str, float]:
    torch.set_num_threads(1)
    if side == "ours":
        case.train("memory", STEPS, ledger)
    elif side == "floor":
        floor = make_floor(case)
        for _ in range(STEPS):
            floor.step()
    return {"peak_mb": peak_resident_bytes() / 1e6}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", choices=["imports", "floor", "ours"], required=True)
    parser.add_argument("--ledger", required=True)
    parser.add_argument("--case", type=json.loads, required=True)
    options = parser.parse_args()
    print(json.dumps(_measure(Case(**options.case), options.side, options.ledger)))
