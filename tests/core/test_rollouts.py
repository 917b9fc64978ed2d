"""Rollouts: what a round holds, how it is ranked, and that training on it has the loss of its formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError, DataError
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy
from dde_core.noise import draw_candidate
from dde_core.reward import Reward
from dde_core.rollouts import Ranking, Roller, Trajectories, look_ahead
from dde_core.rounds import RoundBatches, RoundRows, Tally, kept_pairs
from dde_core.schedule import Schedule
from dde_core.shapes.scorers import NAMES, ShapesScorer, score
from dde_core.train_step import errors_of, step_losses
from tests.support.brightness import Brightness
from tests.support.tiny_folders import sd15_folder, sdxl_folder

OBJECTIVE = ObjectiveConfig(
    method="tailorpo", beta=50.0, guidance_scale=3.0, candidates=3, lookahead=1, t_min=752, t_max=902
)
TRAINING = TrainConfig(batch_size=4, steps=2, learning_rate=1e-3)
CAPTIONS = ["red circle", "small blue square", "", "green triangle"]
SLOTS = [0, 1, 2, 3]
KEY = (3, 5)
TRANSITIONS = 4


@pytest.fixture(scope="module", params=["sd15", "sd15-v", "sdxl", "sdxl-v"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    write = sdxl_folder if "xl" in request.param else sd15_folder
    prediction = "v_prediction" if request.param.endswith("-v") else "epsilon"
    return ModelFolder(write(tmp_path_factory.mktemp(request.param), prediction))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(sd15_folder(tmp_path_factory.mktemp("sd15")))


def roll(
    folder: ModelFolder, objective: ObjectiveConfig = OBJECTIVE, reward: Brightness | None = None
) -> list[Ranking]:
    return Roller(folder, objective, TRAINING)(KEY, SLOTS, CAPTIONS, reward or Brightness())


def same(a: Sequence[Ranking], b: Sequence[Ranking]) -> bool:
    return all(torch.equal(x.x_t, y.x_t) and torch.equal(x.dz, y.dz) for x, y in zip(a, b, strict=True))


def moved(folder: ModelFolder, training: TrainConfig = TRAINING) -> dict[str, torch.Tensor]:
    """Weights of a policy that has moved away from its base."""
    generator = torch.Generator().manual_seed(1)
    weights = Policy(folder, training).weights()
    return {
        name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in weights.items()
    }


# ---- laws


def test_a_rollout_is_the_same_whatever_was_drawn_before(sd15: ModelFolder):
    first = roll(sd15)
    roller = Roller(sd15, OBJECTIVE, TRAINING)
    roller(KEY, [7, 9], ["x", "y"], Brightness())
    assert same(roller(KEY, SLOTS, CAPTIONS, Brightness()), first)
    assert not same(roller((3, 6), SLOTS, CAPTIONS, Brightness()), first)


def test_the_loss_of_a_policy_that_is_its_base_is_log_2(folder: ModelFolder):
    batches, rows = round_of(folder)
    terms = terms_of(folder, Policy(folder, TRAINING), batches, rows)
    torch.testing.assert_close(terms.loss, torch.full_like(terms.loss, 2.0).log(), rtol=0, atol=1e-4)


def test_the_loss_is_that_of_two_gaussians_with_the_means_of_policy_and_base(folder: ModelFolder):
    """Law 1 through the whole path: the stored round, the guided U-Net, the table of a(t, t')."""
    roller = Roller(folder, OBJECTIVE, TRAINING)
    weights = moved(folder)
    roller.load(weights)
    rankings = roller(KEY, SLOTS, CAPTIONS, Brightness())
    rows, _ = kept_pairs(rankings, SLOTS, CAPTIONS, OBJECTIVE)
    batches = RoundBatches(folder, OBJECTIVE, TRAINING, torch.device("cpu"))
    batches.enter(0, RoundRows.from_parquet(rows.to_parquet()))
    policy = Policy(folder, TRAINING)
    with torch.no_grad():
        for name, value in policy.weights().items():
            value.copy_(weights[name] * 1.01)
    part = batches.rows(0, 0, 1)
    terms = terms_of(folder, policy, batches, part)
    torch.testing.assert_close(terms.logit, by_hand(folder, policy, batches, part), rtol=1e-3, atol=1e-4)


def by_hand(folder: ModelFolder, policy: Policy, batches: RoundBatches, part: RoundRows) -> torch.Tensor:
    """beta times the difference of mean log-ratios, of samples drawn from mean 0: it cancels."""
    schedule = folder.schedule()
    batch = batches.make(part)
    stride = 50
    logits = []
    for i in range(len(part)):
        t = int(part.t[i])
        before, after = (float(schedule.alpha_bar[each]) for each in (t, t - stride))
        sigma = ((1 - after) / (1 - before) * (1 - before / after)) ** 0.5

        def mean(unet, i=i, t=t, before=before, after=after, sigma=sigma) -> torch.Tensor:
            one = slice(i, i + 1)
            with torch.no_grad():
                guided = [
                    noise_of(unet, schedule, batch.x_t[one], t, {k: v[one] for k, v in cond.items()})
                    for cond in (batch.conditioning, batch.no_caption)
                ]
            noise = (guided[1] + 3.0 * (guided[0] - guided[1])).double()
            x0 = (batch.x_t[one].double() - (1 - before) ** 0.5 * noise) / before**0.5
            return after**0.5 * x0 + max(1 - after - sigma**2, 0.0) ** 0.5 * noise

        theta, ref = mean(policy.unet), mean(policy.reference)
        dz = batch.dz[i : i + 1].double()
        winner, loser = ref + sigma * dz, ref  # any pair of samples that is dz apart

        def ratio(sample, theta=theta, ref=ref, sigma=sigma) -> torch.Tensor:
            return ((sample - ref).square() - (sample - theta).square()).mean() / (2 * sigma**2)

        logits.append(50.0 * (ratio(winner) - ratio(loser)))
    return torch.stack(logits)


def noise_of(unet, schedule: Schedule, x: torch.Tensor, t: int, cond: dict) -> torch.Tensor:
    added = {name: cond[name] for name in ("text_embeds", "time_ids") if name in cond}
    output = unet(
        x, torch.tensor([t - 1]), cond["encoder_hidden_states"], added_cond_kwargs=added or None
    ).sample
    if schedule.prediction_type == "epsilon":
        return output
    alpha_bar = float(schedule.alpha_bar[t])
    return alpha_bar**0.5 * output + (1 - alpha_bar) ** 0.5 * x


def round_of(folder: ModelFolder, objective: ObjectiveConfig = OBJECTIVE) -> tuple[RoundBatches, RoundRows]:
    rows, _ = kept_pairs(roll(folder, objective), SLOTS, CAPTIONS, objective)
    batches = RoundBatches(folder, objective, TRAINING, torch.device("cpu"))
    batches.enter(0, rows)
    return batches, batches.rows(0, 0, 1)


def terms_of(folder: ModelFolder, policy: Policy, batches: RoundBatches, rows: RoundRows):
    batch = batches.make(rows)
    schedule = folder.schedule()
    theta = errors_of(OBJECTIVE)(policy.unet, schedule, batch)
    return step_losses(theta, batches.anchors(rows), batch.t, OBJECTIVE, schedule, None, batch.share)


def test_training_on_a_round_makes_its_winners_more_probable(folder: ModelFolder):
    batches, rows = round_of(folder)
    policy = Policy(folder, TRAINING)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    before = terms_of(folder, policy, batches, rows)
    before.loss.sum().backward()
    optimizer.step()
    after = terms_of(folder, policy, batches, rows)
    assert after.loss.detach().sum() < before.loss.detach().sum()
    assert after.logit.mean() > 0


# ---- conventions


def test_every_ranked_transition_gives_each_slot_a_pair(sd15: ModelFolder):
    rankings = roll(sd15)
    assert [ranking.t for ranking in rankings] == [902, 852, 802, 752]
    rows, tally = kept_pairs(rankings, SLOTS, CAPTIONS, OBJECTIVE)
    assert len(rows) == TRANSITIONS * len(SLOTS)
    assert list(rows.slots) == [slot for slot in SLOTS for _ in range(TRANSITIONS)]
    assert rows.captions[:5] == ["red circle"] * 4 + ["small blue square"]
    assert tally.metrics()["rollout_kept_share"] == 1.0


def test_the_winner_has_the_greatest_reward_and_the_loser_the_least(sd15: ModelFolder):
    for ranking in roll(sd15):
        assert np.allclose(ranking.gap, ranking.rewards.max(1) - ranking.rewards.min(1))
        for row, slot in enumerate(SLOTS):
            shape = ranking.x_t.shape[1:]
            z = [
                draw_candidate(*KEY, slot, ranking.transition, k, shape) for k in range(OBJECTIVE.candidates)
            ]
            best, worst = ranking.rewards[row].argmax(), ranking.rewards[row].argmin()
            torch.testing.assert_close(ranking.dz[row], z[best] - z[worst])


def test_the_trajectory_goes_on_from_the_winner_only_if_asked(sd15: ModelFolder):
    random = roll(sd15)
    winner = roll(sd15, replace(OBJECTIVE, continue_from="winner"))
    assert torch.equal(random[0].x_t, winner[0].x_t)
    assert not torch.equal(random[1].x_t, winner[1].x_t)
    best = winner[0].rewards.argmax(1)
    again = roll(sd15, replace(OBJECTIVE, continue_from="winner"))
    assert same(again, winner)
    assert len(set(best.tolist())) > 1, "the test needs winners of different places"


def test_the_anchor_is_the_base_or_the_weights_that_drew_the_round(sd15: ModelFolder):
    weights = moved(sd15)
    found = {}
    for anchor in ("base", "round"):
        roller = Roller(sd15, replace(OBJECTIVE, anchor=anchor), TRAINING)
        roller.load(weights)
        found[anchor] = roller(KEY, SLOTS, CAPTIONS, Brightness())
    assert same(found["base"], found["round"])
    assert not torch.allclose(found["base"][0].ref, found["round"][0].ref)
    unmoved = [roll(sd15, replace(OBJECTIVE, anchor=anchor))[0].ref for anchor in ("base", "round")]
    torch.testing.assert_close(unmoved[0], unmoved[1])


def test_by_default_far_candidates_are_rewarded_by_four_passes_and_near_ones_by_one(sd15: ModelFolder):
    everywhere = replace(OBJECTIVE, t_min=452, t_max=552)
    ours, one, four = (roll(sd15, replace(everywhere, lookahead=passes)) for passes in (0, 1, 4))
    assert [ranking.t for ranking in ours] == [552, 502, 452]
    assert np.array_equal(ours[0].rewards, four[0].rewards)
    assert not np.allclose(ours[0].rewards, one[0].rewards)
    assert torch.equal(ours[0].x_t, one[0].x_t)


def test_one_pass_estimates_the_clean_sample_and_more_approach_the_sampler(schedule: Schedule):
    """On a model whose noise is that of a known Gaussian, DDIM in many steps is the exact solution."""
    spread = 0.3

    def noises(x: torch.Tensor, t: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - alpha_bar).sqrt() * x / (alpha_bar * spread**2 + 1 - alpha_bar)

    t = 702
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha_bar = float(schedule.alpha_bar[t])
    exact = x * spread / (alpha_bar * spread**2 + 1 - alpha_bar) ** 0.5
    noise = noises(x, torch.full((2,), t), [0, 1])
    errors = [
        float((look_ahead(schedule, noises, x, noise, t, passes, [0, 1]) - exact).abs().max())
        for passes in (1, 4, 351)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02
    one = look_ahead(schedule, noises, x, noise, t, 1, [0, 1])
    torch.testing.assert_close(one, (x - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5)


def test_pairs_with_a_smaller_gap_are_left_out_and_counted(sd15: ModelFolder):
    rankings = roll(sd15)
    gaps = np.concatenate([ranking.gap for ranking in rankings])
    middle = float(np.median(gaps))
    rows, tally = kept_pairs(rankings, SLOTS, CAPTIONS, replace(OBJECTIVE, min_gap=middle))
    assert len(rows) == (gaps > middle).sum()
    assert tally.metrics()["rollout_kept_share"] == (gaps > middle).mean()


def test_a_soft_label_is_bradley_and_terrys_share(sd15: ModelFolder):
    soft = replace(OBJECTIVE, label="soft", temperature=0.02)
    rows, _ = kept_pairs(roll(sd15), SLOTS, CAPTIONS, soft)
    np.testing.assert_allclose(rows.share, 1 / (1 + np.exp(-rows.gap / 0.02)))
    hard, _ = kept_pairs(roll(sd15), SLOTS, CAPTIONS, OBJECTIVE)
    assert (hard.share == 1).all()


def test_a_row_with_a_reward_that_is_not_finite_has_no_pair_and_is_counted(sd15: ModelFolder):
    rankings = roll(sd15, reward=Brightness(bad=[4]))  # slot 1's second candidate of three
    rows, tally = kept_pairs(rankings, SLOTS, CAPTIONS, OBJECTIVE)
    assert 1 not in rows.slots
    assert len(rows) == TRANSITIONS * 3
    assert tally.metrics()["rollout_bad"] == TRANSITIONS
    assert all(np.isfinite(list(tally.metrics().values())))


def test_guided_winners_have_moved_along_the_rewards_gradient(sd15: ModelFolder):
    plain = roll(sd15)[0]
    guided = roll(sd15, replace(OBJECTIVE, method="tailorpo_g", guidance_strength=0.5))[0]
    assert torch.equal(plain.x_t, guided.x_t)
    difference = (guided.dz - plain.dz).flatten(1)
    torch.testing.assert_close(
        difference.norm(dim=1), torch.full((4,), 0.5 * plain.dz[0].numel() ** 0.5), rtol=1e-4, atol=0
    )


def test_a_winner_whose_gradient_is_not_finite_has_no_pair_and_is_counted(sd15: ModelFolder):
    class Infinite(Brightness):
        def differentiable(self, latents: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
            scale = torch.tensor([1.0, float("inf"), 1.0, float("nan")])
            return super().differentiable(latents, captions) * scale

    objective = replace(OBJECTIVE, method="tailorpo_g")
    rows, tally = kept_pairs(roll(sd15, objective, Infinite()), SLOTS, CAPTIONS, objective)
    assert set(rows.slots) == {0, 2}
    assert np.isfinite(rows.dz).all()
    assert tally.metrics()["rollout_bad"] == 2 * TRANSITIONS


def test_the_gradient_is_that_of_the_reward_through_u_net_and_sampler(sd15: ModelFolder):
    roller = Roller(sd15, OBJECTIVE, TRAINING)
    reward = Brightness()
    with torch.no_grad():
        call = Trajectories(roller, KEY, SLOTS, CAPTIONS, reward)
        t = 702
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(len(SLOTS), *roller.shape, generator=generator)
        direction = torch.randn(x.shape, generator=generator)

        def value(amount: float) -> torch.Tensor:
            x_moved = x + amount * direction
            noise = call.noises(x_moved, torch.full((len(x),), t), call.places)
            clean = look_ahead(roller.schedule, call.noises, x_moved, noise, t, 1, call.places)
            return torch.from_numpy(reward(clean, CAPTIONS))

        slope = (value(1e-2) - value(-1e-2)) / 2e-2
        found = (call.gradient(x, t) * direction).sum(dim=(1, 2, 3)).double()
    torch.testing.assert_close(found, slope, rtol=0.02, atol=1e-3)


def test_lora_adapters_are_the_weights_of_a_round(sd15: ModelFolder):
    from dde_core.config import LoraConfig

    training = replace(TRAINING, lora=LoraConfig(rank=2))
    from_start = replace(OBJECTIVE, t_max=952)
    roller = Roller(sd15, from_start, training)
    before = roller(KEY, SLOTS, CAPTIONS, Brightness())
    assert same(before, roll(sd15, from_start)), "adapters begin as zero"
    roller.load(moved(sd15, training))
    after = roller(KEY, SLOTS, CAPTIONS, Brightness())
    assert not torch.equal(after[1].x_t, before[1].x_t)
    assert torch.allclose(after[0].ref, before[0].ref, atol=1e-6), (
        "the reference is the base without adapters"
    )
    with pytest.raises(DataError, match="belong to another U-Net"):
        roller.load(moved(sd15))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"t_min": 3, "t_max": 40}, "hold none of the transitions"),
        ({"transitions": 600}, "at most half of the schedule"),
        ({"eta": 0.0}, "must be greater than 0"),
        ({"candidates": 1}, "must be at least 2"),
        ({"beta": 5000.0}, "must be at most 1000 for method 'tailorpo'"),
    ],
)
def test_an_objective_without_pairs_is_refused_by_name(sd15: ModelFolder, fields: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Roller(sd15, replace(OBJECTIVE, **fields), TRAINING)


# ---- rounds


def test_a_round_survives_parquet_to_the_bit(sd15: ModelFolder):
    rows, _ = kept_pairs(roll(sd15), SLOTS, CAPTIONS, OBJECTIVE)
    again = RoundRows.from_parquet(rows.to_parquet())
    for name in ("slots", "t", "ref", "gap", "share", "x_t", "dz"):
        assert np.array_equal(getattr(again, name), getattr(rows, name)), name
    assert list(again.captions) == list(rows.captions)
    assert rows.to_parquet() == again.to_parquet()


def test_chunks_joined_in_any_order_are_the_round(sd15: ModelFolder):
    rows, _ = kept_pairs(roll(sd15), SLOTS, CAPTIONS, OBJECTIVE)
    parts = [rows.rows(slice(8, 16)), rows.rows(slice(0, 8))]
    joined = RoundRows.joined(parts)
    assert np.array_equal(joined.x_t, rows.x_t)
    assert list(joined.positions) == list(range(16))


def test_the_workers_batches_are_disjoint_parts_of_the_round(sd15: ModelFolder):
    rows, _ = kept_pairs(roll(sd15), SLOTS, CAPTIONS, OBJECTIVE)
    batches = RoundBatches(sd15, OBJECTIVE, TRAINING, torch.device("cpu"))
    batches.enter(2, rows)
    alone = [batches.rows(update, 0, 1) for update in range(4)]
    seen = [(slot, t) for part in alone for slot, t in zip(part.slots, part.t, strict=True)]
    assert sorted(seen) == sorted(zip(rows.slots, rows.t, strict=True))
    for update in range(4):
        workers = [batches.rows(update, rank, 3) for rank in range(3)]
        positions = np.concatenate([part.positions for part in workers])
        assert sorted(positions) == list(range(4))
        for part in workers:
            assert np.array_equal(part.dz, alone[update].dz[part.positions])


def test_tallies_add_up():
    part = Tally({902: 4.0}, {902: 2.0}, {902: 1.0}, {902: 0.6}, {902: 3.0}).by_name()
    metrics = Tally.joined([part, part]).metrics()
    assert metrics["rollout_kept_share"] == 0.5
    assert metrics["rollout_gap"] == pytest.approx(1.2 / 6)
    assert metrics["rollout_reward_t0902"] == pytest.approx(1.0)
    assert metrics["rollout_bad"] == 2.0


# ---- rewards


@pytest.mark.parametrize("name", NAMES)
def test_the_differentiable_score_of_shapes_is_the_score(name: str):
    from dde_core.shapes.scenes import all_scenes, render

    captions = ["a red circle", "a small blue square", "a large green triangle"]
    generator = np.random.default_rng(0)
    scenes = np.stack([render(scene) for scene in list(all_scenes())[5:1500:600]])
    images = np.clip(scenes + generator.integers(-20, 20, scenes.shape), 0, 255).astype(np.uint8)
    captions = captions[: len(images)]
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255).requires_grad_()
    found = ShapesScorer(name).differentiable(pixels, captions)
    np.testing.assert_allclose(found.detach().numpy(), score(images, captions)[name], atol=1e-9)
    inside = pixels[:1].detach() * 0.8 + 0.1  # at 0 and 1, where values are clamped, there is no gradient
    assert torch.autograd.gradcheck(
        lambda x: ShapesScorer(name).differentiable(x, captions[:1]), (inside.requires_grad_(),),
        atol=1e-4, fast_mode=True,
    )  # fmt: skip


def test_a_reward_is_the_weighted_sum_and_nan_where_an_image_is_not_finite():
    from dde_core.shapes import MODEL_DIR

    folder = ModelFolder(MODEL_DIR)
    vae = folder.vae()
    captions = ["a red circle", "a blue square"]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    single = {name: Reward(vae, {name: (ShapesScorer(name), 1.0)}) for name in NAMES}
    both = Reward(vae, {"taste": (ShapesScorer("taste"), 2.0), "match": (ShapesScorer("match"), 0.5)})
    expected = 2.0 * single["taste"](latents, captions) + 0.5 * single["match"](latents, captions)
    np.testing.assert_allclose(both(latents, captions), expected)
    spoiled = latents.clone()
    spoiled[1] = float("inf")
    found = both(spoiled, captions)
    assert np.isnan(found[1])
    assert found[0] == pytest.approx(expected[0])


def test_a_scorer_without_gradients_is_refused_by_name():
    from dde_core.shapes import MODEL_DIR

    class Plain:
        def __init__(self) -> None:
            scorer = ShapesScorer("taste")
            self.kind, self.description = scorer.kind, scorer.description
            self.check, self.truncated = scorer.check, scorer.truncated

        def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
            return np.zeros(len(images))

    reward = Reward(ModelFolder(MODEL_DIR).vae(), {"plain": (Plain(), 1.0)})
    with pytest.raises(ConfigError, match="plain"):
        reward.differentiable(torch.zeros(1, 4, 8, 8), ["a red circle"])


def test_paths_of_layout_name_rounds(tmp_path: Path):
    """Kept beside the rounds: what `store.prune` deletes is decided by these names."""
    from services.stages import layout

    assert layout.round_number("00000012/round.json") == 12
    assert layout.round_number("notes/round.json") is None
    uri = layout.round_file_uri(tmp_path.as_uri(), 12, "a.parquet")
    assert uri.endswith("rounds/00000012/a.parquet")
