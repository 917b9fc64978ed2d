"""The shipped study, made tiny, on real Ray: a grid of jobs and one comparison of their models."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
from services.client.api import Client
from services.client.bodies import study_body
from services.storage import files

PAPER = Path(__file__).parents[2] / "deploy" / "studies" / "paper.yaml"
TIMEOUT_S = 1200.0


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_the_shipped_study_made_tiny_ends_with_contrasts_and_curves(client: Client, pairs_file: Path):
    base = client.create_model("study-base", MODEL_DIR.as_uri()).name
    dataset = client.create_dataset("scenes", pairs_file.as_uri()).id
    paper = study_body(PAPER, {"model": base, "dataset": dataset, "prompts": PROMPTS_FILE.as_uri()})
    training = {**paper.base["training"], "steps": 4, "batch_size": 16, "checkpoint_every": 2}
    training["held_out_pairs"] = 8
    evaluation = {**paper.base["evaluation"], "num_prompts": 4, "sample": {"steps": 2}}
    tiny = paper.model_copy(
        update={
            "name": "tiny",
            "base": {
                **paper.base,
                "training": training,
                "validation": {"every": 2, "num_prompts": 2},
                "evaluation": evaluation,
            },
            "grid": {"objective.method": ["sft", "dde"], "training.seed, training.draw_seed": [0]},
            "evaluation": paper.evaluation.model_copy(update={"num_prompts": 6, "images_per_prompt": 2}),
        }
    )
    study = client.create_study(tiny)
    began = time.monotonic()
    while not (study := client.study(study.id)).finished:
        assert time.monotonic() - began < TIMEOUT_S, study
        time.sleep(2)
    assert study.status == "succeeded", [event.message for event in client.study_events(study.id)]
    assert [cell.status for cell in study.cells] == ["succeeded", "succeeded"]
    jobs = [client.job(cell.job or "") for cell in study.cells]
    encoded = [job.result.encode for job in jobs]
    assert encoded[0] is not None
    assert encoded[1] is not None
    assert encoded[0].dataset == encoded[1].dataset, "cells share the encoded dataset"
    [evaluated] = study.evaluations
    compared = client.evaluation(evaluated)
    assert [each.name for each in compared.models] == [base, "tiny-sft-seed0", "tiny-dde-seed0"]
    assert study.result is not None
    contrasts = study.result.contrasts
    pairs = {(each.setting, each.against) for each in contrasts}
    assert pairs == {("sft", None), ("dde", None), ("sft", "dde")}
    assert {each.scorer for each in contrasts} == {"taste", "match", "fidelity"}
    assert compared.result is not None
    for each in contrasts:
        assert (each.prompts, each.seeds) == (6, 1)
        assert each.difference.low <= each.difference.value <= each.difference.high
        if each.against is None:
            of_model = compared.result.scores[each.scorer][f"tiny-{each.setting}-seed0"]
            assert each.difference.value == pytest.approx(of_model.difference.value)
    curves = files.read_json(study.result.report)["curves"]
    assert set(curves) == {"loss", "held_out_accuracy", "taste", "match", "fidelity"}
    assert [step for step, _ in curves["loss"]["dde-seed0"]] == [1, 2, 3, 4]
    assert [step for step, _ in curves["taste"]["dde-seed0"]] == [0, 2, 4]
    page = files.read_bytes(study.result.page).decode()
    assert "<polyline" in page
    assert "sft - dde" in page
    print(f"{time.monotonic() - began:.0f} s; {study.result.model_dump_json()}")
