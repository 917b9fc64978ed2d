"""``python -m services.ingest --spec URI``: the encode stage of a job."""

import ray

from services.contracts import EncodeSpec
from services.ingest.encode import encode
from services.stage import run_stage

if __name__ == "__main__":
    ray.init(log_to_driver=False)
    run_stage(EncodeSpec, encode)
