"""``python -m services.training --spec URI``: the train stage of a job."""

import ray

from services.stages.runner import run_stage
from services.stages.specs import TrainSpec
from services.training.train import train

if __name__ == "__main__":
    ray.init()
    run_stage(TrainSpec, train)
