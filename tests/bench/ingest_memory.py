"""Does memory grow with the data? The peak of encoding ten times the rows, against that of the rows once.

The peak is of summed PSS, with Ray's processes and object store. Each side has a process and a Ray cluster of
its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.measure import Result, Stopwatch, peak_memory, result

ROWS = 10_000
TIMES = 10


def ingest_memory(rows: int = ROWS) -> dict[str, Result]:
    """``ingest_memory_10x_vs_1x``: 1.1 means 10% more."""
    once = _in_a_process(rows)
    ten = _in_a_process(TIMES * rows)
    against = "; ".join(
        f"{count} rows: {side['peak'] / 1e6:.0f} MB, {side['images']:.0f} images in {side['seconds']:.0f} s"
        for count, side in ((rows, once), (TIMES * rows, ten))
    )
    return {"ingest_memory_10x_vs_1x": result(ten["peak"] / once["peak"], ten["peak"] / 1e6, "MB", against)}


def _in_a_process(rows: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.ingest_memory", "--rows", str(rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {rows} rows: peak {found['peak'] / 1e6:.0f} MB, {found['seconds']:.0f} s", flush=True)
    return found


def _measure(rows: int) -> dict[str, float]:
    import ray

    from services.ingest.encode import encode
    from services.stages.journal import Journal
    from services.storage import sources
    from tests.support.open_sources import EVERYWHERE
    from tests.support.stage_runs import StageRuns, shapes_record
    from tests.support.synthetic_pairs import synthetic_rows, write_stream

    sources.hold_to(EVERYWHERE)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = write_stream(Path(scratch) / "pairs.parquet", synthetic_rows(rows))
        spec = StageRuns(scratch, {}).encode_spec("bench", pairs.as_uri(), shapes_record())
        ray.init(num_cpus=4, object_store_memory=500_000_000, log_to_driver=False, include_dashboard=False)
        watch = Stopwatch()
        with peak_memory() as peak:
            counts = encode(spec, Journal(spec.prefix)).counts
        ray.shutdown()
        assert counts["pairs"] == rows, counts
        return {"peak": peak["bytes"], "seconds": watch(), "images": counts["images"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, required=True)
    print(json.dumps(_measure(parser.parse_args().rows)))
