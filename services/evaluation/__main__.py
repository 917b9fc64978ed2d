"""``python -m services.evaluation --spec URI``: the evaluate stage of a job."""

import ray

from services.evaluation.evaluate import evaluate
from services.stages.runner import run_stage
from services.stages.specs import EvaluateSpec

if __name__ == "__main__":
    ray.init(log_to_driver=False)
    run_stage(EvaluateSpec, evaluate)
