"""``make bench``: run the benchmarks, print a table, merge the results into results.json.

python -m tests.bench                       # all of them
python -m tests.bench ingest_vs_bare_vae    # some of them, by name
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import ray
import torch
from rich.console import Console
from rich.table import Table

from services.storage import sources
from tests.bench.api_speed import api_list, api_submit
from tests.bench.checkpoint_stall import checkpoint_stall
from tests.bench.disk import bytes_on_disk
from tests.bench.evaluate_speed import evaluate_speed
from tests.bench.ingest_memory import ingest_memory
from tests.bench.ingest_speed import ingest_speed
from tests.bench.ledger_speed import ledger_speed
from tests.bench.measure import Result
from tests.bench.rollout_speed import early_rounds, rollout_speed, transition_training
from tests.bench.scorer_speed import scorer_speed
from tests.bench.serve_speed import serve_in_process, serve_over_http
from tests.bench.train_memory import train_memory
from tests.bench.train_speed import train_speed
from tests.bench.two_workers import two_workers
from tests.support.open_sources import EVERYWHERE

RESULTS = Path(__file__).parent / "results.json"
BENCHES: dict[str, Callable[[Path], dict[str, Result]]] = {
    "bytes_a_pair": bytes_on_disk,
    "ledger_vs_online": ledger_speed,
    "ingest_vs_bare_vae": ingest_speed,
    "ingest_memory_10x_vs_1x": lambda scratch: ingest_memory(),
    "evaluate_two_actors_vs_one": evaluate_speed,
    "evaluate_overhead": evaluate_speed,
    "train_vs_public_recipe": train_speed,
    "train_vs_floor": train_speed,
    "train_memory_vs_floor": train_memory,
    "two_workers_vs_one": two_workers,
    "checkpoint_stall": checkpoint_stall,
    "scorer_vs_bare": scorer_speed,
    "rollout_vs_bare": rollout_speed,
    "rollout_reward_share": rollout_speed,
    "lag_vs_strict": early_rounds,
    "transition_vs_four_forwards": transition_training,
    "serve_vs_sequential": serve_in_process,
    "serve_vs_request_batching": serve_in_process,
    "serve_lonely_overhead": serve_in_process,
    "serve_three_adapters": serve_in_process,
    "serve_http_vs_sequential": serve_over_http,
    "serve_lonely_overhead_ms": serve_over_http,
    "serve_overload_p99_s": serve_over_http,
    "api_submit_p99_ms": api_submit,
    "api_list_100k_p99_ms": api_list,
}
"""By the name of a result. A function named twice runs once: it returns both results."""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Run benchmarks and merge their results into results.json.")
    parser.add_argument("names", nargs="*", help=f"benchmarks to run, of {', '.join(BENCHES)} (default: all)")
    names = parser.parse_args().names or list(BENCHES)
    unknown = sorted(set(names) - set(BENCHES))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {', '.join(BENCHES)}")
    torch.set_num_threads(1)
    sources.hold_to(EVERYWHERE)
    ray.init(num_cpus=8, log_to_driver=False, include_dashboard=False, object_store_memory=1_000_000_000)
    results: dict[str, Result] = {}
    for bench in dict.fromkeys(BENCHES[name] for name in names):
        print(", ".join(name for name in BENCHES if BENCHES[name] is bench), flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            results |= bench(Path(scratch))
        merge(results)
    Console(width=180).print(table(results))


def merge(results: dict[str, Result]) -> None:
    """Merge into results.json after each benchmark: the next one may fail."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(before | results, indent=1, sort_keys=True) + "\n")


def table(results: dict[str, Result]) -> Table:
    """One row for each result."""
    rows = Table("benchmark", "ratio", "value", "against", box=None)
    for name, each in results.items():
        ratio = "" if each["ratio"] is None else f"{each['ratio']:.3f}"
        rows.add_row(name, ratio, f"{each['value']:.4g} {each['unit']}", each["against"])
    return rows


if __name__ == "__main__":
    main()
