"""``python -m services.ingest encode|ledger --spec URI``: the stages of a job that prepare its data."""

import argparse

import ray

from services.ingest.encode import encode
from services.ingest.ledger import ledger
from services.stages.runner import run_stage
from services.stages.specs import EncodeSpec, LedgerSpec

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("stage", choices=("encode", "ledger"))
    options, rest = parser.parse_known_args()
    ray.init(log_to_driver=False)
    if options.stage == "encode":
        run_stage(EncodeSpec, encode, rest)
    else:
        run_stage(LedgerSpec, ledger, rest)
