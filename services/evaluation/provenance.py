"""Where the scores of an evaluation come from, and the command that repeats it."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import version
from typing import Any

from services.api.records import ModelRecord
from services.api.reports import Provenance
from services.api.requests import ImageFolder
from services.stages.specs import EvaluateSpec

CONVENTIONS = "image j of prompt i has the seed `seed` + i + 100,000 j, for all models the same"
SOFTWARE = ("torch", "diffusers", "transformers")


def provenance(spec: EvaluateSpec) -> Provenance:
    """Settings of the images, digests of every model and scorer, and the command."""
    config = spec.evaluation.model_dump(mode="json", exclude={"compare"})
    software = {name: version(name) for name in SOFTWARE}
    device = "cuda" if spec.use_gpu else "cpu"
    digests: dict[str, str] = {}
    for model in spec.models:
        if isinstance(model, ModelRecord):
            digests[f"model {model.name}"] = model.digest
            if model.adapter_of is not None:
                digests[f"model {model.name}, adapted from {model.adapter_of.name}"] = model.adapter_of.digest
    digests |= {f"scorer {scorer.name} ({scorer.kind})": scorer.digest for scorer in spec.scorers}
    return Provenance(
        settings=config | {"seeds": CONVENTIONS, "software": software | {"device": device}},
        digests=digests,
        command=_command(spec),
    )


def _command(spec: EvaluateSpec) -> str:
    """A request for the same evaluation. Models are given by their versions, which never change."""
    body: dict[str, Any] = {
        "models": [
            model.model_dump(mode="json")
            if isinstance(model, ImageFolder)
            else {"name": model.name, "model": model.id}
            for model in spec.models
        ],
        "base": spec.base,
        **spec.evaluation.model_dump(mode="json", exclude_defaults=True),
    }
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return (
        'curl "$DDE_URL/v1/evaluations" -H "Authorization: Bearer $DDE_API_KEY" '
        f"-H 'Content-Type: application/json' -d {data}"
    )
