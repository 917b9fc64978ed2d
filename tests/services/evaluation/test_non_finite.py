"""A model whose images are not finite fails its evaluation once, by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from services.evaluation.compare import Comparer

from dde_core.config import SampleConfig
from dde_core.errors import NonFiniteError
from services.api.records import ModelRecord
from services.api.requests import EvaluationConfig
from services.artifacts import models
from services.control.review import TRANSIENT
from services.stages.runner import failure_of
from services.stages.specs import EvaluateSpec
from tests.support.open_sources import EVERYWHERE
from tests.support.tiny_folders import sd15_folder


def record(name: str, folder) -> ModelRecord:
    uri = folder.as_uri()
    digest = models.folder_digest(uri)
    return ModelRecord(id=name, name=name, uri=uri, family="sd15", digest=digest, created_at=0)


def test_a_model_that_gives_nan_images_is_named_and_evaluated_once(tmp_path):
    base = sd15_folder(tmp_path / "base")
    broken = sd15_folder(tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.full_like(each, torch.nan) for name, each in load_file(weights).items()}, weights)
    evaluation = EvaluationConfig(
        prompts_uri="p", scorers=[], sample=SampleConfig(steps=1, height=32, width=32)
    )
    comparer = Comparer(
        EvaluateSpec(
            job="job",
            attempt=1,
            prefix=tmp_path.as_uri(),
            sources=EVERYWHERE,
            candidate=record("poisoned", broken),
            base=record("shapes", base),
            evaluation=evaluation,
            output=tmp_path.as_uri(),
        )
    )
    rows = [{"index": index, "prompt": "a red star", "seed": index} for index in range(2)]
    with pytest.raises(NonFiniteError) as raised:
        comparer({"rows": np.array([rows])})
    failure = failure_of(raised.value)
    assert failure.message == "candidate poisoned: latents are not finite in 2 of 2 images"
    assert failure.code == "non_finite_error"
    assert failure.code not in TRANSIENT
