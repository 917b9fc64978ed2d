"""``python -m services.evaluation --spec URI``: the evaluate stage of a job."""

import ray

from services.contracts import EvaluateSpec
from services.evaluation.evaluate import evaluate
from services.stage import run_stage

if __name__ == "__main__":
    ray.init(log_to_driver=False)
    run_stage(EvaluateSpec, evaluate)
