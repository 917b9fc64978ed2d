"""``python -m services.ingest encode|ledger|generate|relabel --spec URI``: the stages that prepare data.

Each imports its own libraries alone: generate and relabel start without torch.
"""

import argparse

import ray

from services.stages.runner import run_stage
from services.stages.specs import EncodeSpec, GenerateSpec, LedgerSpec, RelabelSpec

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("stage", choices=("encode", "ledger", "generate", "relabel"))
    options, rest = parser.parse_known_args()
    ray.init(log_to_driver=False)
    if options.stage == "encode":
        from services.ingest.encode import encode

        run_stage(EncodeSpec, encode, rest)
    elif options.stage == "ledger":
        from services.ingest.ledger import ledger

        run_stage(LedgerSpec, ledger, rest)
    elif options.stage == "generate":
        from services.ingest.generate import generate

        run_stage(GenerateSpec, generate, rest)
    else:
        from services.ingest.relabel import relabel

        run_stage(RelabelSpec, relabel, rest)
