"""The reference ledger from the pass to the training loop.

It holds the errors of the frozen model for every worker, however often the pass was killed. A run uses the
ledger that fits, and reports why another does not.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from pyarrow import fs

from dde_core import train_step
from dde_core.config import LoraConfig, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError, DataError, NonFiniteError
from dde_core.latents.ledger import Ledger, LedgerRecord
from dde_core.latents.reader import LatentReader
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy
from dde_core.shapes import MODEL_DIR
from dde_core.train_step import pair_errors
from services.api.records import LedgerResult
from services.artifacts import ledgers, models
from services.errors import BadRequest
from services.ingest import ledger as ledger_stage
from services.ingest.ledger import ReferencePass, ledger
from services.stages.journal import Journal, read_journal
from services.stages.specs import LedgerSpec, TrainSpec
from services.storage import files
from services.training.driver.reference import lineage, resolve
from tests.support.encoded_pairs import batch_maker, train_here, train_spec, write_encoded
from tests.support.methods import PREFERENCE
from tests.support.tiny_folders import FOLDERS

PAIRS, PER_SHARD, BATCH = 20, 8, 7
NOISES = ("independent", "shared")
FAST = [
    *((method, "expected", NOISES[number % 2]) for number, method in enumerate(PREFERENCE)),
    ("dde_step", "sampled", "shared"),
    ("dde", "mode", "independent"),
]
"""Every method, noise mode and calibration point at least once."""

ALL = [(method, "expected", noise) for method in PREFERENCE for noise in NOISES]
ALL += [*FAST[-2:], ("dde", "sampled", "independent")]
CASES = [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in ALL]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def model(request, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(FOLDERS[request.param](tmp_path_factory.mktemp("models") / request.param))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(FOLDERS["sd15"](tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture
def in_process(monkeypatch) -> list[tuple[int, int]]:
    """Runs the pass in this process with the real actor. Returns the (shard, draw) that were computed."""
    computed: list[tuple[int, int]] = []

    def compute(units, *arguments):
        frozen = ReferencePass(*arguments)
        for unit in units:
            computed.append((unit["shard"], unit["draw"]))
            (row,) = frozen({name: np.array([value]) for name, value in unit.items()}).to_pylist()
            yield row

    monkeypatch.setattr(ledger_stage, "compute", compute)
    yield computed
    torch.use_deterministic_algorithms(False)


attempts = count(1)


def requested(
    folder: Path, model: ModelFolder, encoded: Path, objective: ObjectiveConfig, **training
) -> TrainSpec:
    """A run on the real digest of its model."""
    spec = train_spec(folder / f"run-{next(attempts)}", model, encoded, objective, **training)
    digest = models.folder_digest(model.path.as_uri())
    return spec.model_copy(update={"model": spec.model.model_copy(update={"digest": digest})})


def ledger_spec(run: TrainSpec, **arguments) -> LedgerSpec:
    shared = ("job", "attempt", "prefix", "dataset", "model", "objective", "training", "use_gpu")
    return LedgerSpec(**{name: getattr(run, name) for name in shared}, **arguments)


def write(run: TrainSpec) -> LedgerResult:
    return ledger(ledger_spec(run), Journal(run.prefix))


def resolved(run: TrainSpec) -> TrainSpec:
    journal = Journal(run.prefix)
    found = resolve(run, journal)
    journal.flush()
    return found


def events(run: TrainSpec) -> list[str]:
    return [entry.message for _, some in read_journal(run.prefix, 0) for entry in some if entry.message]


def opened(uri: str) -> Ledger:
    return Ledger(*files.resolve(uri))


def ledger_files(uri: str) -> dict[str, bytes]:
    folder = Path(files.resolve(uri)[1]).parent
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def same_loss(cached: list[dict], online: list[dict], rel: float) -> None:
    print("\nstep     ledger     online  difference")
    for step, (one, other) in enumerate(zip(cached, online, strict=True), 1):
        print(f"{step:>4} {one['loss']:10.6f} {other['loss']:10.6f} {one['loss'] - other['loss']:11.1e}")
        assert one["loss"] == pytest.approx(other["loss"], rel=rel), step
    assert len({round(each["loss"], 3) for each in online}) > 1, "the model moved"


# ---- what it holds


@pytest.mark.parametrize(
    "objective", [ObjectiveConfig(calibration_point="sampled"), ObjectiveConfig(method="uniform")]
)
def test_the_ledger_holds_the_frozen_models_errors_of_every_draw(in_process, tmp_path, model, objective):
    encoded = write_encoded(tmp_path / "pairs", model, PAIRS, PER_SHARD)
    training = {
        "steps": 9,
        "batch_size": BATCH,
        "micro_batch_size": 3,
        "caption_dropout": 0.5,
        "draw_seed": 3,
    }
    result = write(requested(tmp_path, model, encoded, objective, **training))
    assert (result.draws, result.pairs, result.reused) == (4, PAIRS, False)  # 63 visits of 20 pairs
    cached, maker = opened(result.ledger), batch_maker(model, encoded, objective, **training)
    policy, schedule, visits = Policy(model, TrainConfig()), model.schedule(), set()
    for step in range(9):
        rows = maker.rows(step, 0, 1)
        visits |= set(zip(rows.pair_ids, rows.draws.tolist(), strict=True))
        found, batch = cached.errors(rows), maker.make(rows)
        with torch.no_grad():
            wanted = pair_errors(policy.unet, schedule, batch)
        for name in ("w", "l", *(("z_w", "z_l") if batch.z_w is not None else ())):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)
    assert len(visits) == 63


def test_the_pass_has_the_arithmetic_of_the_run_to_the_bit_where_the_batches_are_the_same(
    in_process, tmp_path, small
):
    encoded, objective = write_encoded(tmp_path / "pairs", small, PAIRS), ObjectiveConfig()
    run = requested(tmp_path, small, encoded, objective, steps=1, batch_size=PAIRS, precision="bf16")
    cached, maker = opened(write(run).ledger), batch_maker(small, encoded, objective)
    with LatentReader(fs.LocalFileSystem(), str(encoded)) as reader:
        rows = reader.shard(0)
    batch = maker.make(rows)
    for precision in ("bf16", "fp32"):
        policy = Policy(small, TrainConfig(precision=precision))
        with torch.no_grad(), policy.autocast():
            found = pair_errors(policy.unet, small.schedule(), batch)
        assert torch.equal(found.w, cached.errors(rows).w) == (precision == "bf16")


def test_workers_see_the_reference_errors_that_one_sees(in_process, tmp_path, small):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    run = requested(tmp_path, small, encoded, ObjectiveConfig(), steps=3, batch_size=BATCH)
    cached = opened(write(run).ledger)
    maker = batch_maker(small, encoded, ObjectiveConfig(), batch_size=BATCH)
    for step in range(3):
        whole = cached.errors(maker.rows(step, 0, 1)).w
        together = torch.full((BATCH,), torch.nan)
        for rank in range(2):
            rows = maker.rows(step, rank, 2)
            together[rows.positions] = cached.errors(rows).w
        assert torch.equal(together, whole)


def test_a_unit_whose_errors_are_no_numbers_stops_the_pass_and_is_not_written(
    in_process, tmp_path, small, monkeypatch
):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    run = requested(tmp_path, small, encoded, ObjectiveConfig(), steps=1, batch_size=BATCH)
    real = ledger_stage.pair_errors

    def broken(unet, schedule, batch, error="noise"):
        errors = real(unet, schedule, batch)
        errors.l[[pair == "pair-9" for pair in batch.pair_ids]] = math.inf
        return errors

    monkeypatch.setattr(ledger_stage, "pair_errors", broken)
    with pytest.raises(
        NonFiniteError, match="reference error l of shard 1 at draw 0 is not finite in 1 of 8 values"
    ):
        write(run)
    folder = Path(files.resolve(run.dataset)[1]) / "ledgers"
    assert [path.name[:11] for path in folder.rglob("*.*")] == ["00000-0000-"]


# ---- the pass


def test_a_killed_pass_is_resumed_and_computes_nothing_twice(in_process, tmp_path, small, monkeypatch):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    run = requested(tmp_path, small, encoded, ObjectiveConfig(), steps=9, batch_size=BATCH)
    whole = ledger_stage.compute

    def killed(units, *arguments):
        for number, row in enumerate(whole(units, *arguments)):
            yield row
            if number == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(ledger_stage, "compute", killed)
    with pytest.raises(KeyboardInterrupt):
        write(run)
    assert ledgers.find(ledgers.requirements_of(run)) is None, "without its record it does not exist"
    monkeypatch.setattr(ledger_stage, "compute", whole)
    result = write(run)
    assert in_process == [(shard, draw) for shard in range(3) for draw in range(4)], (
        "a shard is not fetched again for each draw"
    )

    undisturbed = write_encoded(tmp_path / "again", small, PAIRS, PER_SHARD)
    other = write(requested(tmp_path, small, undisturbed, ObjectiveConfig(), steps=9, batch_size=BATCH))
    assert ledger_files(other.ledger) == ledger_files(result.ledger)
    assert LedgerResult.model_validate(other).ledger != result.ledger


def test_draws_that_are_added_are_those_of_a_pass_over_all_of_them(in_process, tmp_path, small):
    at_once, bit_by_bit = (
        write_encoded(tmp_path / name, small, PAIRS, PER_SHARD) for name in ("one", "other")
    )
    wanted = write(requested(tmp_path, small, at_once, ObjectiveConfig(), steps=1, batch_size=BATCH, draws=3))
    del in_process[:]
    found = [
        write(requested(tmp_path, small, bit_by_bit, ObjectiveConfig(), batch_size=BATCH, draws=k))
        for k in (1, 3, 2)
    ]
    assert [(each.draws, each.reused) for each in found] == [(1, False), (3, False), (3, True)]
    assert in_process == [(shard, 0) for shard in range(3)] + [
        (shard, draw) for shard in range(3) for draw in (1, 2)
    ]
    assert ledger_files(found[1].ledger) == ledger_files(wanted.ledger)
    assert opened(found[0].ledger).record.draws == 1, "a run that started with fewer draws keeps them"


def test_jobs_may_write_one_ledger_at_the_same_time(in_process, tmp_path, small, monkeypatch):
    encoded, whole = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD), ledger_stage.compute
    few, many = (
        requested(tmp_path, small, encoded, ObjectiveConfig(), batch_size=BATCH, draws=draws)
        for draws in (1, 2)
    )
    others: list[LedgerResult] = []

    def overtaken(units, *arguments):
        yield from whole(units, *arguments)
        if not others:
            monkeypatch.setattr(ledger_stage, "compute", whole)
            others.append(write(many))
            for path in Path(files.resolve(others[0].ledger)[1]).parent.glob("00000-0000-*"):
                path.with_name(f"00000-0000-{'f' * 64}.parquet").write_bytes(b"of another machine")

    monkeypatch.setattr(ledger_stage, "compute", overtaken)
    result = write(few)
    assert result.draws >= 1
    for uri, draws in ((result.ledger, 1), (others[0].ledger, 2)):
        rows = batch_maker(small, encoded, ObjectiveConfig(), batch_size=PAIRS).rows(draws - 1, 0, 1)
        assert opened(uri).errors(rows).w.isfinite().all()


def test_a_complete_ledger_is_found_and_a_changed_model_is_refused_before_anything_is_computed(
    in_process, tmp_path, small
):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    run = requested(tmp_path, small, encoded, ObjectiveConfig(), steps=3, batch_size=BATCH)
    first, again = write(run), write(run)
    assert (first.reused, again.reused) == (False, True)
    assert dataclasses.replace(opened(first.ledger).record) == opened(again.ledger).record
    assert len(in_process) == 6
    bad = run.model_copy(update={"model": run.model.model_copy(update={"digest": "other"})})
    with pytest.raises(BadRequest, match="have changed"):
        write(bad)
    assert len(in_process) == 6


def test_more_draws_than_a_ledger_holds_are_refused_before_anything_is_computed(in_process, tmp_path, small):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    with pytest.raises(ConfigError, match=r"training\.draws .* must be at most 1000, got 1001"):
        write(requested(tmp_path, small, encoded, ObjectiveConfig(), steps=1001, batch_size=PAIRS))
    assert not in_process
    assert not (encoded / "ledgers").exists()
    online = resolved(requested(tmp_path, small, encoded, ObjectiveConfig(), steps=1001, batch_size=PAIRS))
    assert (online.ledger, online.training.reference) == (None, "online")


def test_progress_in_pairs_and_the_rounding_are_reported(in_process, tmp_path, small):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    run = requested(tmp_path, small, encoded, ObjectiveConfig(), steps=6, batch_size=BATCH)
    journal = Journal(run.prefix)
    result = ledger(ledger_spec(run), journal)
    journal.flush()
    rows = [entry for _, some in read_journal(run.prefix, 0) for entry in some if entry.metrics]
    assert rows[-1].step == rows[-1].metrics["pairs"] == rows[-1].metrics["pairs_total"] == 3 * PAIRS
    assert rows[-1].metrics["pairs_per_s"] > 0
    assert rows[-1].metrics["eta_s"] == 0
    assert any("reference errors of 60 of 60 pairs" in message for message in events(run))
    assert 0 < result.noise["step0_logit_std_half"] < 0.01
    assert {name for name in result.noise if "snr" in name} > {"step0_logit_std_snr_t1000"}
    assert result.noise == opened(result.ledger).record.noise


# ---- training on it


@pytest.mark.parametrize(("method", "point", "noise"), CASES)
def test_cached_is_online_for_every_method_and_noise_mode(in_process, tmp_path, small, method, point, noise):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    objective = ObjectiveConfig(
        method=method, calibration_point=point, noise=noise, beta=5.0, t_sampling="uniform"
    )
    training = {
        "steps": 6,
        "batch_size": BATCH,
        "micro_batch_size": 3,
        "learning_rate": 1e-4,
        "caption_dropout": 0.3,
    }
    uri = write(requested(tmp_path, small, encoded, objective, **training | {"micro_batch_size": 0})).ledger
    cached = train_here(tmp_path / "cached", small, encoded, objective, ledger=uri, **training)
    online = train_here(tmp_path / "online", small, encoded, objective, **training)
    assert online[0]["step0_logit_std_half"] == 0, "the same kernels, the same shapes of batches"
    assert all(value == 0 for name, value in online[0].items() if name.startswith("step0"))
    assert 0 < cached[0]["step0_logit_std_half"] < 0.01, "the pass had batches of another shape"
    assert not any(name.startswith("step0") for name in cached[1])
    same_loss(cached, online, rel=2e-4)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["whole", "lora"])
def test_a_run_on_a_ledger_never_runs_the_reference(in_process, tmp_path, model, monkeypatch, lora):
    encoded, objective = write_encoded(tmp_path / "pairs", model, PAIRS, PER_SHARD), ObjectiveConfig(beta=5.0)
    training = {
        "steps": 4,
        "batch_size": BATCH,
        "learning_rate": 1e-2 if lora else 1e-3,
        "lora": lora,
        "micro_batch_size": 4,
    }
    uri = write(requested(tmp_path, model, encoded, objective, **training)).ledger
    online = train_here(tmp_path / "online", model, encoded, objective, **training)
    loaded: list[ModelFolder] = []
    real = ModelFolder.unet
    monkeypatch.setattr(ModelFolder, "unet", lambda folder: loaded.append(folder) or real(folder))
    monkeypatch.setattr(Policy, "reference", lambda *arguments, **more: pytest.fail("the reference ran"))
    cached = train_here(tmp_path / "cached", model, encoded, objective, ledger=uri, **training)
    assert len(loaded) == 1
    assert cached[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    same_loss(cached, online, rel=2e-4)


def test_one_draw_is_used_again_in_every_epoch(in_process, tmp_path, small, monkeypatch):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    training = {"steps": 4, "batch_size": PAIRS, "draws": 1}
    result = write(requested(tmp_path, small, encoded, ObjectiveConfig(), **training))
    assert result.draws == 1
    seen: list[dict[str, int]] = []

    def noting(unet, schedule, batch, error="noise"):
        seen.append(dict(zip(batch.pair_ids, batch.t.tolist(), strict=True)))
        return pair_errors(unet, schedule, batch)

    monkeypatch.setattr(train_step, "pair_errors", noting)
    train_here(tmp_path / "cached", small, encoded, ObjectiveConfig(), ledger=result.ledger, **training)
    assert len(seen) == 4
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert len(set(seen[0].values())) > PAIRS // 2


def test_at_step_0_rounding_moves_the_logit_of_the_shapes_model_by_less_than_a_hundredth(
    in_process, tmp_path
):
    model = ModelFolder(MODEL_DIR)
    encoded, objective = write_encoded(tmp_path / "pairs", model, 128, 50), ObjectiveConfig(method="uniform")
    training = {"steps": 1, "batch_size": 120, "micro_batch_size": 5}
    result = write(requested(tmp_path, model, encoded, objective, **training | {"micro_batch_size": 0}))
    (cached,) = train_here(tmp_path / "cached", model, encoded, objective, ledger=result.ledger, **training)
    noise = {name: value for name, value in cached.items() if name.startswith("step0")}
    print(f"\nbeta {objective.beta:g}: the run beside the pass' own report")
    for name, value in noise.items():
        print(f"{name:<28} {value:10.2e} {result.noise.get(name, math.nan):10.2e}")
    assert 0 < noise["step0_logit_std_half"] < 0.01
    assert len(noise) == 11
    assert noise["step0_logit_std_snr_t1000"] > noise["step0_logit_std_snr_t0100"], "1/SNR grows with t"


# ---- which one a run takes


def names_no_noise(**training) -> dict:
    return {"steps": 3, "batch_size": BATCH} | training


def test_auto_takes_the_ledger_that_fits_and_reports_it(in_process, tmp_path, small):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    run = requested(
        tmp_path, small, encoded, ObjectiveConfig(beta=7.0), learning_rate=0.1, **names_no_noise()
    )
    alone = resolved(run)
    assert (alone.ledger, alone.training.reference) == (None, "online")
    uri = write(run).ledger
    assert resolved(run).ledger is None, "a resumed run keeps what it started with"
    other = requested(
        tmp_path, small, encoded, ObjectiveConfig(method="dde_step", beta=9.0), **names_no_noise(seed=4)
    )
    found = resolved(other)
    assert (found.ledger, found.training.reference, found.training.draws) == (uri, "ledger", 2)
    assert any(f"reference errors from ledger {uri}, 2 draws" in message for message in events(other))
    assert lineage(found)["key"] == LedgerRecord.from_json(files.read_bytes(uri)).key.name
    assert lineage(found) | {"from": "online"} != lineage(alone) == {"from": "online"}
    assert (
        resolved(
            requested(tmp_path, small, encoded, ObjectiveConfig(), **names_no_noise(reference="online"))
        ).ledger
        is None
    )


def test_a_job_that_names_no_noise_mode_follows_the_ledger_that_exists(in_process, tmp_path, small):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    shared = write(
        requested(tmp_path, small, encoded, ObjectiveConfig(method="uniform"), **names_no_noise())
    ).ledger
    follows = resolved(requested(tmp_path, small, encoded, ObjectiveConfig(method="dde"), **names_no_noise()))
    assert (follows.ledger, follows.objective.noise_mode) == (shared, "shared")
    assert any("the default of method 'dde' is independent" in event for event in events(follows))
    insists = resolved(
        requested(tmp_path, small, encoded, ObjectiveConfig(noise="independent"), **names_no_noise())
    )
    assert (insists.ledger, insists.objective.noise_mode) == (None, "independent")
    assert (
        write(
            requested(tmp_path, small, encoded, ObjectiveConfig(), **names_no_noise(reference="ledger"))
        ).ledger
        == shared
    )
    own = write(
        requested(tmp_path, small, encoded, ObjectiveConfig(noise="independent"), **names_no_noise())
    ).ledger
    again = resolved(requested(tmp_path, small, encoded, ObjectiveConfig(method="dde"), **names_no_noise()))
    assert (again.ledger, again.objective.noise_mode) == (own, "independent"), "its own goes first"


def test_discounted_draws_t_uniformly_on_a_ledger_and_sft_has_none(in_process, tmp_path, small):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    uri = write(
        requested(tmp_path, small, encoded, ObjectiveConfig(method="uniform"), **names_no_noise())
    ).ledger
    run = requested(tmp_path, small, encoded, ObjectiveConfig(method="discounted"), **names_no_noise())
    assert (resolved(run).ledger, resolved(run).objective.t_sampling) == (uri, "uniform")
    assert any("weighted by p(t)/u(t)" in message for message in events(run))
    winners = resolved(
        requested(
            tmp_path, small, encoded, ObjectiveConfig(method="sft"), **names_no_noise(reference="ledger")
        )
    )
    assert (winners.ledger, lineage(winners)) == (None, {"from": "none"})


def test_a_ledger_with_points_serves_a_run_without_but_not_vice_versa(in_process, tmp_path, small):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    sampled, plain = ObjectiveConfig(calibration_point="sampled"), ObjectiveConfig()
    write(requested(tmp_path, small, encoded, plain, **names_no_noise()))
    assert resolved(requested(tmp_path, small, encoded, sampled, **names_no_noise())).ledger is None
    encoded = write_encoded(tmp_path / "others", small, PAIRS, PER_SHARD)
    uri = write(requested(tmp_path, small, encoded, sampled, **names_no_noise())).ledger
    assert resolved(requested(tmp_path, small, encoded, plain, **names_no_noise())).ledger == uri


REFUSED = [
    ({"precision": "bf16"}, {}, "ledger.precision must be 'bf16' to match the run, got 'fp32'"),
    ({"caption_dropout": 0.25}, {}, "ledger.caption_dropout must be 0.25 to match the run, got 0.0"),
    ({"draw_seed": 5}, {}, "ledger.draw_seed must be 5 to match the run, got 0"),
    ({"steps": 30}, {}, "ledger.draws must be 11 to match the run, got 2"),
    ({}, {"noise": "shared"}, "ledger.noise must be 'shared' to match the run, got 'independent'"),
    ({}, {"t_min": 200}, "ledger.t_min must be 200 to match the run, got 1"),
    ({}, {"t_max": 700}, "ledger.t_max must be 700 to match the run, got 1000"),
    (
        {},
        {"calibration_point": "sampled"},
        "ledger.evaluation_points must be True to match the run, got False",
    ),
]


@pytest.mark.parametrize(
    ("training", "objective", "message"), REFUSED, ids=[message.split()[0] for *_, message in REFUSED]
)
def test_a_ledger_that_does_not_fit_is_refused_by_the_field_that_differs(
    in_process, tmp_path, small, training, objective, message
):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    uri = write(
        requested(tmp_path, small, encoded, ObjectiveConfig(noise="independent"), **names_no_noise())
    ).ledger
    wanted = ObjectiveConfig(**{"noise": "independent"} | objective)
    handed = requested(tmp_path, small, encoded, wanted, **names_no_noise(**training)).model_copy(
        update={"ledger": uri}
    )
    with pytest.raises(ConfigError) as refused:
        resolved(handed)
    assert str(refused.value) == message
    field = message.split()[0].removeprefix("ledger.")
    without = requested(tmp_path, small, encoded, wanted, **names_no_noise(**training))
    assert resolved(without).ledger is None
    assert any(f"no ledger fits; the nearest, {uri} has {field} " in each for each in events(without))
    with pytest.raises(
        ConfigError, match=f"training.reference needs a ledger that fits; .* has {field} .*, got 'ledger'"
    ):
        resolved(
            requested(tmp_path, small, encoded, wanted, **names_no_noise(**training, reference="ledger"))
        )


@pytest.mark.parametrize(
    "harm", [lambda data: data.replace(b'"format_version": 1', b'"format_version": 2'), lambda data: data[:9]]
)
def test_a_ledger_that_cannot_be_read_is_skipped_unless_the_job_names_it(in_process, tmp_path, small, harm):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    run = requested(tmp_path, small, encoded, ObjectiveConfig(), **names_no_noise())
    uri = write(run).ledger
    path, whole = Path(files.resolve(uri)[1]), files.read_bytes(uri)
    path.write_bytes(harm(whole))
    with pytest.raises(
        DataError, match=f"ledger '{uri}': ledger('s record cannot be read| has format_version 2)"
    ):
        resolved(run.model_copy(update={"ledger": uri}))
    alone = requested(tmp_path, small, encoded, ObjectiveConfig(), **names_no_noise())
    assert resolved(alone).ledger is None
    assert f"no ledger fits; the nearest, {uri}, cannot be read" in events(alone)
    neighbour = write(
        requested(tmp_path, small, encoded, ObjectiveConfig(), **names_no_noise(draw_seed=5))
    ).ledger
    other = requested(tmp_path, small, encoded, ObjectiveConfig(), **names_no_noise())
    assert resolved(other).ledger is None
    assert any(
        f"no ledger fits; the nearest, {neighbour} has draw_seed 5 " in message for message in events(other)
    )
    again = write(requested(tmp_path, small, encoded, ObjectiveConfig(), **names_no_noise()))
    assert (again.ledger, again.reused, len(in_process)) == (uri, False, 12), (
        "its files exist, its record is written again"
    )
    assert LedgerRecord.from_json(files.read_bytes(uri)).files == LedgerRecord.from_json(whole).files


def test_a_ledger_of_another_model_or_dataset_is_refused(in_process, tmp_path, small):
    encoded = write_encoded(tmp_path / "pairs", small, PAIRS, PER_SHARD)
    run = requested(tmp_path, small, encoded, ObjectiveConfig(), **names_no_noise())
    uri = write(run).ledger
    other = run.model_copy(update={"model": run.model.model_copy(update={"digest": "other"}), "ledger": uri})
    with pytest.raises(ConfigError, match=r"ledger\.reference must be 'other' to match the run"):
        resolved(other)
    adapted = run.model.model_copy(update={"digest": "adapters", "adapter_of": run.model})
    assert ledgers.reference_digest(adapted) == f"{run.model.digest}+adapters"
    elsewhere = write_encoded(tmp_path / "others", small, PAIRS, PER_SHARD - 1)
    with pytest.raises(ConfigError, match=r"ledger\.shards must be"):
        resolved(run.model_copy(update={"dataset": elsewhere.as_uri(), "ledger": uri}))
    with pytest.raises(ConfigError, match="needs a ledger that fits; the dataset has none"):
        resolved(
            requested(tmp_path, small, elsewhere, ObjectiveConfig(), **names_no_noise(reference="ledger"))
        )


# ---- on a real cluster


@pytest.fixture(scope="module")
def cluster():
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["address"]
    ray.shutdown()


@pytest.mark.slow
def test_a_killed_driver_costs_what_was_not_yet_written(cluster, tmp_path):
    model = ModelFolder(MODEL_DIR)
    encoded = write_encoded(tmp_path / "pairs", model, 240, 40)
    run = requested(tmp_path, model, encoded, ObjectiveConfig(), steps=1, batch_size=BATCH, draws=2)
    spec = ledger_spec(run, actors=2)
    files.write_json(f"{run.prefix}/spec.json", spec.model_dump(mode="json"))
    command = [sys.executable, "-m", "services.ingest", "ledger", "--spec", f"{run.prefix}/spec.json"]
    driver = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": cluster}, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(before := list((encoded / "ledgers").rglob("*.parquet"))) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert 3 <= len(before) < 12
    written = {path: path.stat().st_mtime_ns for path in before}
    result = ledger(spec, Journal(run.prefix))
    assert not result.reused
    assert (result.draws, result.pairs) == (2, 240)
    assert {path: path.stat().st_mtime_ns for path in before} == written, "nothing was written twice"
    assert len(ledger_files(result.ledger)) == 12
    maker = batch_maker(model, encoded, ObjectiveConfig(), batch_size=6, micro_batch_size=6)
    rows, policy = maker.rows(0, 0, 1), Policy(model, TrainConfig())
    with torch.no_grad():
        wanted = pair_errors(policy.unet, model.schedule(), maker.make(rows))
    torch.testing.assert_close(opened(result.ledger).errors(rows).w, wanted.w, rtol=1e-5, atol=1e-6)
