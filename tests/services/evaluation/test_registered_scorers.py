"""An evaluation by a registered scorer: its numbers are those of its files, and what it cuts is reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dde_core.shapes import MODEL_DIR
from services.api.records import ScorerRecord
from services.artifacts import scorers
from services.storage import files
from tests.support.evaluate_here import EvaluateHere, record_of
from tests.support.scorers import write_tiny
from tests.support.tiny_folders import sd15_folder


def test_a_registered_scorer_compares_models_and_reports_the_prompts_that_it_cuts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "prompts.txt").write_text("a red star\n" + "star " * 100 + "\n")
    checkpoint, _ = write_tiny("clip", tmp_path / "scorer")
    uri = checkpoint.as_uri()
    digest = scorers.digest_of(uri, None)
    ours = ScorerRecord(id="s", name="ours", kind="clip", uri=uri, digest=digest, created_at=0)
    evaluate = EvaluateHere(monkeypatch, tmp_path)
    compared = [
        record_of("shapes", MODEL_DIR),
        record_of("other", sd15_folder(tmp_path / "other")),
    ]
    prompts_uri = str(tmp_path / "prompts.txt")
    spec = evaluate.spec(compared, prompts_uri=prompts_uri, num_prompts=2, scorers=[])
    config = spec.evaluation.model_copy(update={"scorers": ["ours"]})
    found = evaluate.run(spec.model_copy(update={"evaluation": config, "scorers": [ours]}))
    assert evaluate.warnings() == ["1 of 2 prompts are longer than ours reads: their ends do not count"]
    means = np.mean(files.read_json(found.report)["scores"]["ours"], axis=(1, 2)).tolist()
    report = found.scores["ours"]["other"]
    assert [report.base, report.candidate] == pytest.approx(means)
    assert means[0] != means[1]
