"""What a worker's batch holds: draws by their keys, t by its density, text and sizes of each side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError
from dde_core.methods import METHODS
from dde_core.models.folder import ModelFolder
from dde_core.models.text import TextEncoders
from dde_core.models.tokens import tokenize
from dde_core.noise import draw_caption_dropout, draw_evaluation_point, draw_noise
from dde_core.objectives import method_distribution
from dde_core.train_step import PairBatch
from tests.support.encoded_pairs import SHAPE, SIZE_PX, batch_maker, write_encoded
from tests.support.methods import OF_DATASETS
from tests.support.tiny_folders import FOLDERS

PAIRS, SEED = 16, 5


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def model(request, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(FOLDERS[request.param](tmp_path_factory.mktemp("models") / request.param))


@pytest.fixture(scope="module")
def encoded(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoded(tmp_path_factory.mktemp("encoded") / "pairs", model, PAIRS)


def one_batch(
    model: ModelFolder, encoded: Path, objective: ObjectiveConfig, step: int = 0, **training
) -> PairBatch:
    """The whole of a global batch. A batch of PAIRS is an epoch: its step is the number of the visit."""
    training = {"batch_size": PAIRS, "draw_seed": SEED} | training
    maker = batch_maker(model, encoded, objective, **training)
    return maker.make(maker.rows(step, 0, 1))


def rows_of(batch: PairBatch) -> dict[str, dict]:
    """What belongs to each pair, by its id."""
    return {batch.pair_ids[i]: vars(batch.rows(slice(i, i + 1))) for i in range(len(batch))}


def same(a, b) -> bool:
    if isinstance(a, dict):
        return all(same(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- draws


@pytest.mark.parametrize("noise", ["independent", "shared"])
def test_noise_and_evaluation_points_are_those_of_seed_pair_side_and_visit(model, encoded, noise):
    objective = ObjectiveConfig(noise=noise, calibration_point="sampled")
    for visit in (0, 1):
        batch = one_batch(model, encoded, objective, visit)
        for i, pair in enumerate(batch.pair_ids):
            for side in "wl":
                key = (SEED, pair, "shared" if noise == "shared" else side, visit)
                assert torch.equal(getattr(batch, f"noise_{side}")[i], draw_noise(*key, SHAPE))
                z = draw_evaluation_point(SEED, pair, side, visit, SHAPE)
                assert torch.equal(getattr(batch, f"z_{side}")[i], z)
                assert not torch.equal(z, draw_noise(*key, SHAPE))


def test_draws_do_not_depend_on_the_runs_seed_and_begin_again_after_as_many_as_there_are(model, encoded):
    objective = ObjectiveConfig(calibration_point="sampled")
    visits = [rows_of(one_batch(model, encoded, objective, visit, draws=2, seed=visit)) for visit in range(5)]
    for pair, first in visits[0].items():
        for visit, rows in enumerate(visits):
            again = [
                same(rows[pair][name], first[name]) for name in ("t", "noise_w", "noise_l", "z_w", "z_l")
            ]
            assert all(again[1:]) == (visit % 2 == 0), (pair, visit)
            assert again[0] or visit % 2 == 1


def test_each_method_has_the_noise_of_its_own_source(model, encoded):
    for name, method in OF_DATASETS.items():
        batch = one_batch(model, encoded, ObjectiveConfig(method=name))
        if not method.has_loser:
            assert batch.noise_l is batch.latents_l is batch.conditioning_l is None, (
                "losers are not even made"
            )
        else:
            assert torch.equal(batch.noise_w, batch.noise_l) == (method.noise == "shared")


@pytest.mark.parametrize("method", OF_DATASETS)
@pytest.mark.parametrize("point", ["expected", "sampled", "mode"])
def test_evaluation_points_are_drawn_where_they_are_read_and_nowhere_else(model, encoded, method, point):
    batch = one_batch(model, encoded, ObjectiveConfig(method=method, calibration_point=point))
    assert (
        (batch.z_w is not None)
        == (batch.z_l is not None)
        == (METHODS[method].corrected and point == "sampled")
    )


def test_a_pairs_row_does_not_depend_on_the_number_of_workers(model, encoded):
    objective = ObjectiveConfig(calibration_point="sampled")
    maker = batch_maker(model, encoded, objective, batch_size=PAIRS, draw_seed=SEED, caption_dropout=0.5)
    whole = rows_of(maker.make(maker.rows(1, 0, 1)))
    for rank in range(3):
        for pair, row in rows_of(maker.make(maker.rows(1, rank, 3))).items():
            text = [
                conditioning.pop("encoder_hidden_states")
                for conditioning in (row["conditioning_w"], whole[pair]["conditioning_w"])
            ]
            torch.testing.assert_close(*text, rtol=1e-5, atol=1e-5)  # encoded beside other captions
            for name in ("t", "latents_w", "latents_l", "noise_w", "noise_l", "z_w", "z_l"):
                assert same(row[name], whole[pair][name]), name


# ---- t


@pytest.mark.parametrize("method", OF_DATASETS)
def test_t_is_drawn_inside_of_the_range_alone_and_all_over_it(model, encoded, method):
    objective = ObjectiveConfig(method=method, t_min=200, t_max=209)
    t = one_batch(model, encoded, objective, batch_size=400).t
    assert t.unique().tolist() == list(range(200, 210))
    for end in ("t_min", "t_max"):
        with pytest.raises(ConfigError, match=f"{end} must be at most T = 1000, got 1001"):
            batch_maker(model, encoded, ObjectiveConfig(method=method, **{end: 1001}))


@pytest.mark.parametrize(
    ("method", "t_sampling"), [("dde", "method"), ("discounted", "method"), ("discounted", "uniform")]
)
def test_t_follows_the_methods_density(model, encoded, method, t_sampling):
    objective = ObjectiveConfig(method=method, t_sampling=t_sampling)
    drawn = one_batch(model, encoded, objective, batch_size=2000).t.numpy()
    p = (
        np.full(1000, 1 / 1000)
        if objective.t_sampling == "uniform"
        else method_distribution(objective, model.schedule())[1:].numpy()
    )
    counts, wanted = (
        np.add.reduceat(each, range(0, 1000, 100))
        for each in (np.bincount(drawn, minlength=1001)[1:], 2000 * p)
    )
    assert ((counts - wanted) ** 2 / wanted).sum() < 27.9  # chi-square, 9 degrees of freedom, p = .001


# ---- the conditioning of a side


def test_winner_and_loser_get_the_same_text_and_their_own_sizes(model, encoded):
    table = pq.read_table(next(encoded.glob("*.parquet"))).to_pylist()
    by_pair = {row["pair_id"]: row for row in table}
    batch = one_batch(model, encoded, ObjectiveConfig())
    names = {"encoder_hidden_states"} | ({"text_embeds", "time_ids"} if model.family == "sdxl" else set())
    assert set(batch.conditioning_w) == set(batch.conditioning_l) == names
    for name in names - {"time_ids"}:
        assert torch.equal(batch.conditioning_w[name], batch.conditioning_l[name])
        assert len({row.numpy().tobytes() for row in batch.conditioning_w[name]}) > PAIRS // 2, (
            "captions differ"
        )
    if model.family == "sd15":
        return
    for side in "wl":
        for time_ids, pair in zip(
            getattr(batch, f"conditioning_{side}")["time_ids"].tolist(), batch.pair_ids, strict=True
        ):
            (height, width), (top, left) = by_pair[pair][f"size_{side}"], by_pair[pair][f"crop_{side}"]
            scale = SIZE_PX / min(height, width)
            assert time_ids == [height, width, round(top * scale), round(left * scale), SIZE_PX, SIZE_PX]
    assert (batch.conditioning_w["time_ids"] != batch.conditioning_l["time_ids"]).any(dim=1).all()


def test_a_dropped_caption_is_dropped_for_both_sides_and_for_no_other_pair(model, encoded):
    batch = one_batch(model, encoded, ObjectiveConfig(), caption_dropout=0.5)
    kept = one_batch(model, encoded, ObjectiveConfig())
    dropped = torch.tensor([draw_caption_dropout(SEED, pair, 0, 0.5) for pair in batch.pair_ids])
    assert 0 < dropped.sum() < PAIRS
    empty = TextEncoders(model)(tokenize(model.tokenizers(), [""]))
    for conditioning in (batch.conditioning_w, batch.conditioning_l):
        for name, nothing in empty.items():
            assert (nothing == 0).all() == (model.family == "sdxl"), "no caption is zeros in SDXL"
            torch.testing.assert_close(
                conditioning[name][dropped],
                nothing.expand_as(conditioning[name][dropped]),
                rtol=1e-5,
                atol=1e-5,
            )
            torch.testing.assert_close(
                conditioning[name][~dropped], kept.conditioning_w[name][~dropped], rtol=1e-5, atol=1e-5
            )
            assert (conditioning[name][~dropped] - nothing).abs().amax(
                dim=tuple(range(1, nothing.ndim))
            ).min() > 1e-3
    if model.family == "sdxl":
        assert torch.equal(batch.conditioning_w["time_ids"], kept.conditioning_w["time_ids"]), "sizes stay"
