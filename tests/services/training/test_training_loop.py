"""The training loop in this process: the inputs of policy and reference, and the results of a step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs

from dde_core import train_step
from dde_core.config import LoraConfig, ObjectiveConfig, SampleConfig
from dde_core.generation import TextToImage
from dde_core.latents.reader import LatentReader
from dde_core.models.folder import ModelFolder
from dde_core.train_step import pair_errors
from services.api.records import ScorerRecord, Validated
from services.api.requests import EvaluationConfig, ValidationConfig
from services.artifacts import scorers
from services.stages import layout
from services.stages.journal import Journal, read_journal
from services.storage import files
from services.training import pair_log
from services.training.selection import best_step
from services.training.train import log_soft_labels
from services.training.validation.validate import validate
from tests.support.encoded_pairs import batch_maker, train_here, train_spec, write_encoded
from tests.support.methods import PREFERENCE
from tests.support.scorers import write_tiny
from tests.support.tiny_folders import FOLDERS

BATCH = 7


@pytest.fixture(scope="module", params=["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def model(request, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The fast suite has SDXL's inputs in tests/core, and trains it in services/ingest/test_ledger.py."""
    return ModelFolder(FOLDERS[request.param](tmp_path_factory.mktemp("models") / request.param))


@pytest.fixture(scope="module")
def encoded(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoded(tmp_path_factory.mktemp("encoded") / "pairs", model)


class Calls:
    """Replaces ``pair_errors``: records the model, the pairs and the U-Net's inputs of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[str, ...], list[torch.Tensor]]] = []
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, unet, schedule, batch, error="noise"):
        def recording(x_t, timestep, **inputs):
            added = inputs.get("added_cond_kwargs") or {}
            self.calls.append(
                (name, batch.pair_ids, [x_t, timestep, inputs["encoder_hidden_states"], *added.values()])
            )
            output = unet(x_t, timestep, **inputs)
            self.dtypes.add(output.sample.dtype)
            return output

        name = "reference" if getattr(unet, "__name__", "") == "reference" else "policy"
        return pair_errors(recording, schedule, batch)


@pytest.mark.parametrize("method", ["dde", "uniform", "sft"])
def test_reference_and_policy_get_identical_inputs_part_by_part(
    model, encoded, tmp_path, monkeypatch, method
):
    seen, objective = Calls(), ObjectiveConfig(method=method)
    monkeypatch.setattr(train_step, "pair_errors", seen)
    training = {
        "steps": 2,
        "batch_size": BATCH,
        "micro_batch_size": 3,
        "caption_dropout": 0.5,
        "learning_rate": 1e-3,
    }
    train_here(tmp_path, model, encoded, objective, precision="bf16", **training)
    assert seen.dtypes == {torch.bfloat16}, "and in the same arithmetic"
    expected, models = [], ["reference", "policy"] if method in PREFERENCE else ["policy"]
    maker = batch_maker(model, encoded, objective, **training)
    for step in range(2):
        pairs = maker.rows(step, 0, 1).pair_ids
        expected += [(name, pairs[start:end]) for start, end in ((0, 2), (2, 4), (4, 7)) for name in models]
    assert [(name, pairs) for name, pairs, _ in seen.calls] == expected
    sides = 2 if method in PREFERENCE else 1
    for i in range(0, len(seen.calls), len(models)):
        (_, pairs, given), *others = seen.calls[i : i + len(models)]
        assert len(given) == (5 if model.family == "sdxl" else 3)
        assert all(len(each) == sides * len(pairs) for each in given), "no losers for sft"
        for _, _, also in others:
            assert all(map(torch.equal, given, also))


@pytest.mark.parametrize(
    ("method", "lora"), [("dde", None), ("uniform", LoraConfig(rank=4))], ids=["whole", "lora"]
)
def test_the_first_step_loses_log_2_exactly_and_the_next_one_does_not(model, encoded, tmp_path, method, lora):
    objective = ObjectiveConfig(method=method, beta=500.0)
    training = {
        "batch_size": BATCH,
        "micro_batch_size": 3,
        "learning_rate": 1e-2,
        "precision": "bf16",
        "lora": lora,
    }
    first, second = train_here(tmp_path, model, encoded, objective, steps=2, **training)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-15)
    assert first["margin"] == first["winner_error_diff"] == first["loser_error_diff"] == 0
    assert abs(second["loss"] - math.log(2)) > 1e-3
    assert abs(second["margin"]) > 1e-6


def test_a_soft_label_trains_on_the_stored_share_and_a_hard_one_on_the_winner(model, tmp_path):
    encoded = write_encoded(tmp_path / "encoded", model, label=0.75)
    training = {"steps": 2, "batch_size": BATCH, "micro_batch_size": 3, "learning_rate": 1e-2}
    found = {}
    for label in ("hard", "soft"):
        objective = ObjectiveConfig(method="uniform", beta=500.0, label=label)
        found[label] = train_here(tmp_path / label, model, encoded, objective, **training)
    first = {label: steps[0] for label, steps in found.items()}
    assert first["hard"]["loss"] == pytest.approx(first["soft"]["loss"], rel=1e-12), "log 2, whatever p is"
    assert first["hard"]["gradient_weight"] == 0.25
    assert first["soft"]["gradient_weight"] == 0.125, "w (p - 1/2)"
    assert first["soft"]["grad_norm"] == pytest.approx(first["hard"]["grad_norm"] / 2, rel=1e-4)
    assert found["soft"][1]["loss"] != pytest.approx(found["hard"][1]["loss"], rel=1e-3)
    shares = {label: pair_log.read((tmp_path / label / "run").as_uri()).share for label in found}
    assert shares["hard"] is None
    assert shares["soft"].tolist() == [0.75] * 2 * BATCH


@pytest.mark.parametrize(
    ("method", "label", "soft", "event"),
    [
        ("dde", "hard", 5, ("warning", "5 of 16 pairs have a soft label and are trained on as if all")),
        ("dde", "soft", 5, ("info", "5 of 16 pairs have a soft label: the loss uses the winner's share")),
        ("dde", "hard", 0, None),
        ("sft", "hard", 5, None),
    ],
)
def test_a_run_logs_what_is_done_with_soft_labels(model, encoded, tmp_path, method, label, soft, event):
    spec = train_spec(tmp_path, model, encoded, ObjectiveConfig(method=method, label=label))
    manifest = LatentReader(fs.LocalFileSystem(), str(encoded)).manifest
    journal = Journal(spec.prefix)
    log_soft_labels(spec, replace(manifest, counts={"pairs": 16, "soft": soft}), journal)
    log_soft_labels(spec, replace(manifest, counts={"pairs": 16}), journal)  # of an earlier version
    journal.flush()
    entries = [entry for _, some in read_journal(spec.prefix, 0) for entry in some]
    assert len(entries) == (event is not None)
    if event:
        assert entries[0].level == event[0]
        assert entries[0].message.startswith(event[1])


@pytest.mark.parametrize("method", ["dde", "uniform", "sft"])
def test_held_out_pairs_are_measured_in_the_same_way_for_every_method(model, encoded, tmp_path, method):
    objective = ObjectiveConfig(method=method, beta=50.0, t_min=500)
    found = []
    for size in (0, 2):
        training = {
            "steps": 1,
            "batch_size": BATCH,
            "held_out_pairs": 5,
            "micro_batch_size": size,
            "learning_rate": 1e-9,
        }
        train_here(tmp_path / str(size), model, encoded, objective, **training)
        found.append(
            validate(train_spec(tmp_path / str(size), model, encoded, objective, **training), 1).metrics
        )
    assert found[0]["held_out_pairs"] == 5
    assert (
        found[0]["held_out_accuracy_low"]
        <= found[0]["held_out_accuracy"]
        <= found[0]["held_out_accuracy_high"]
    )
    assert found[0]["held_out_margin"] == pytest.approx(found[1]["held_out_margin"], abs=1e-6)


def test_held_out_visits_do_not_depend_on_method_seed_or_range(model, encoded):
    visits = []
    for objective, seed in ((ObjectiveConfig(), 0), (ObjectiveConfig(method="sft", t_min=900), 7)):
        maker = batch_maker(model, encoded, objective, seed=seed, held_out_pairs=5, caption_dropout=0.9)
        rows = LatentReader(fs.LocalFileSystem(), str(encoded), 5).held_out()
        visits.append([maker.held_out(rows, draw, 8) for draw in range(8)])
    for draw, (one, other) in enumerate(zip(*visits, strict=True)):
        assert torch.equal(one.t, other.t)
        assert torch.equal(one.noise_l, other.noise_l)
        assert not torch.equal(one.noise_w, one.noise_l)
        text = [batch.conditioning_w["encoder_hidden_states"] for batch in (one, other)]
        assert torch.equal(*text)
        assert ((one.t > draw * 125) & (one.t <= (draw + 1) * 125)).all()


def test_the_base_has_no_margin_on_held_out_pairs(model, encoded, tmp_path):
    spec = train_spec(tmp_path, model, encoded, ObjectiveConfig(), steps=1, held_out_pairs=5)
    found = validate(spec, 0)
    assert (found.metrics["held_out_margin"], found.metrics["held_out_accuracy"]) == (0, 0.5)
    assert found == Validated.model_validate_json(files.read_bytes(layout.outcome_uri(spec.run, 0)))


def test_validation_scores_its_images_with_every_registered_scorer_of_single_images(model, encoded, tmp_path):
    prompts = ["a red star", "a blue star on the text", "star " * 100]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    checkpoint, _ = write_tiny("clip", tmp_path / "scorer")
    uri = checkpoint.as_uri()
    fields = {"uri": uri, "digest": scorers.digest_of(uri, None), "created_at": 0}
    ours = ScorerRecord(id="s1", name="ours", kind="clip", **fields)
    sets = ScorerRecord(id="s2", name="sets", kind="diversity", **fields)
    evaluation = EvaluationConfig(
        prompts_uri=str(tmp_path / "prompts.txt"),
        scorers=["ours", "sets"],
        sample=SampleConfig(steps=2, height=32, width=32),
    )
    validation = ValidationConfig(
        every=1, prompts_uri=evaluation.prompts_uri, num_prompts=3, seed=5, best_metric="ours"
    )
    fields = {"evaluation": evaluation, "validation": validation, "scorers": [ours, sets]}
    spec = train_spec(tmp_path, model, encoded, ObjectiveConfig(), steps=1).model_copy(update=fields)
    found = validate(spec, 0)
    images = TextToImage(model)(prompts, [5, 6, 7], evaluation.sample)
    wanted = float(np.mean(scorers.load(ours)(images, prompts)))
    assert found.metrics == {"ours": wanted}
    assert best_step({3: found}, "ours") == 3
    warnings = [entry.message for _, some in read_journal(spec.prefix, 0) for entry in some]
    assert warnings == [
        "1 of 3 validation prompts have more than the 77 tokens that ours reads: their ends do not count"
    ]


@pytest.mark.parametrize("method", ["dde", "sft"])
def test_micro_batches_with_a_remainder_change_no_gradient(model, encoded, tmp_path, method):
    norms = []
    for size in (0, 3, 1):
        objective = ObjectiveConfig(method=method, beta=50.0)
        training = {"steps": 1, "batch_size": BATCH, "micro_batch_size": size}
        norms.append(train_here(tmp_path / str(size), model, encoded, objective, **training)[0]["grad_norm"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)
    assert norms[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["whole", "lora"])
def test_compiled_training_is_the_same_up_to_rounding_and_resumes_from_its_checkpoint(
    model, encoded, tmp_path, lora
):
    objective, losses = ObjectiveConfig(method="uniform", beta=500.0), {}
    training = {"batch_size": BATCH, "learning_rate": 1e-5, "lora": lora, "checkpoint_every": 2}
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        for steps in (2, 4):
            found = train_here(folder, model, encoded, objective, compile=compiled, steps=steps, **training)
        losses[compiled] = [step["loss"] for step in found]
    print(losses)
    assert len(losses[True]) == 4
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert losses[True] != losses[False], "other kernels"
