"""The plan of rounds: its sums are those that are derived by hand, its constants are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from dde_core.config import LoraConfig, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.models.folder import ModelFolder
from dde_core.planning import mfu
from dde_core.planning.cluster import Cluster
from dde_core.planning.estimate import Term, estimate
from dde_core.planning.facts import FACTS, SCORER, VAE_PARAMETERS
from dde_core.planning.plan import Plan, Run, plan, value
from dde_core.planning.rounds import Rounds, actor_memory, prompt_terms, store_terms
from dde_core.rollouts import Roller
from dde_core.transitions import all_transitions, ranked_transitions
from tests.support.activation_bytes import LiveBytes, like_a_gpu
from tests.support.brightness import Brightness
from tests.support.tiny_folders import sd15_folder
from tests.support.unet_configs import SD15_VAE, TOKENS, conditioning, schedule, unet

SD15 = FACTS["sd15"]
TAILORPO = ObjectiveConfig(method="tailorpo", beta=10.0, t_min=202, lookahead=1)
"""16 transitions, 2 candidates, guidance."""
GUIDED = dataclasses.replace(TAILORPO, method="tailorpo_g")
WHOLE = TrainConfig(precision="bf16", batch_size=128, micro_batch_size=8)
LORA = dataclasses.replace(WHOLE, lora=LoraConfig(rank=4))
ROUNDS = Rounds(prompts_per_round=32, updates_per_round=2, prompts_per_call=8, actors=4, reward_actors=0)


def parts(objective: ObjectiveConfig, training: TrainConfig = WHOLE) -> dict[str, float]:
    return {term.name: term.value for term in prompt_terms(SD15, objective, training)}


def planned(rounds: Rounds = ROUNDS, objective: ObjectiveConfig = TAILORPO, workers: int = 4) -> Plan:
    cluster = Cluster(gpus=workers, gpu="h100")
    return plan(
        Run(
            family="sd15",
            objective=objective,
            training=LORA,
            cluster=cluster,
            mfu=mfu.published("sd15"),
            rounds=rounds,
        )
    )


def without_scorer(found: dict[str, float]) -> float:
    return found["prompt"] - found["scorer"]


def test_a_trajectory_of_16_transitions_costs_294_forwards_and_its_scores():
    found = parts(TAILORPO)
    assert (found["rollout"], found["reference"], found["training"]) == (66, 32, 96)
    assert found["decode"] == pytest.approx(100, abs=0.5)
    assert found["lookahead"] == 0
    assert without_scorer(found) == pytest.approx(294, abs=0.5)
    assert without_scorer(found) * SD15.forward_flops == pytest.approx(0.24e15, rel=0.02)


def test_each_further_pass_of_lookahead_costs_64_forwards():
    found = [without_scorer(parts(dataclasses.replace(TAILORPO, lookahead=passes))) for passes in (1, 2, 4)]
    assert found[1] - found[0] == pytest.approx(64)
    assert found[2] == pytest.approx(486, abs=0.5)
    by_default = parts(dataclasses.replace(TAILORPO, lookahead=0))
    far = sum(t > 500 for t in TAILORPO.ranked_starts(1000))
    assert by_default["lookahead"] == 3 * far * 2 * 2, "4 passes above t = 500, of 2 candidates with guidance"


def test_the_gradient_of_the_reward_costs_about_six_tenths_more():
    more = without_scorer(parts(GUIDED)) / without_scorer(parts(TAILORPO))
    assert more == pytest.approx(1.6, abs=0.05)
    assert "gradient" not in parts(TAILORPO)


def test_what_is_not_run_costs_nothing():
    assert parts(TAILORPO, LORA)["training"] == 64, "one backward forward for frozen weights, not two"
    assert parts(dataclasses.replace(TAILORPO, anchor="round"))["reference"] == 0
    unguided = parts(dataclasses.replace(TAILORPO, guidance_scale=1.0))
    assert (unguided["rollout"], unguided["training"]) == (33, 48)
    later = dataclasses.replace(TAILORPO, t_min=2, t_max=752)
    assert parts(later)["rollout"] == 2 * (1 + 4 + 15 * 2), "4 transitions before the first that is ranked"
    four = parts(dataclasses.replace(TAILORPO, candidates=4))
    assert four["decode"] == pytest.approx(2 * parts(TAILORPO)["decode"])
    assert four["training"] == parts(TAILORPO)["training"], "one pair of a transition all the same"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(sd15_folder(tmp_path_factory.mktemp("sd15")))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"anchor": "round"},
        {"lookahead": 3},
        {"lookahead": 0, "t_min": 402, "t_max": 602},
        {"candidates": 4, "t_max": 852},
        {"guidance_scale": 1.0},
    ],
    ids=str,
)
def test_an_actor_runs_as_many_forwards_as_are_planned(folder: ModelFolder, change: dict[str, Any]):
    objective = dataclasses.replace(TAILORPO, **{"t_min": 752, "t_max": 902, **change})
    roller = Roller(folder, objective, TrainConfig())
    rows = []

    def count(_: object, inputs: tuple[torch.Tensor, ...], given: dict[str, torch.Tensor]) -> None:
        rows.append(len(inputs[0] if inputs else given["sample"]))

    for each in (roller.policy.unet, roller.policy._frozen_copy):
        each.register_forward_pre_hook(count, with_kwargs=True)
    captions = ["a red star", "a blue cross"]
    roller((0, 0), [0, 1], captions, Brightness())
    found = parts(objective)
    assert sum(rows) == 2 * (found["rollout"] + found["lookahead"] + found["reference"])


def test_a_round_that_is_drawn_early_takes_as_long_as_the_longer_part():
    strict, early = (planned(dataclasses.replace(ROUNDS, lag=lag)).round for lag in (0, 1))
    drawing = value(strict, "round") - value(strict, "training")
    assert value(early, "round") == pytest.approx(max(value(strict, "training"), drawing))
    assert value(early, "round") < value(strict, "round")


@pytest.mark.parametrize("change", [{}, {"t_min": 500}, {"t_max": 752, "t_min": 2}, {"transitions": 50}])
def test_the_planned_transitions_are_those_of_the_method(change):
    objective = dataclasses.replace(TAILORPO, **change)
    assert objective.ranked_starts(1000) == ranked_transitions(objective, schedule()).t.tolist()
    assert objective.starts(1000) == all_transitions(objective, schedule()).t.tolist()


# ---- constants


def counted(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(**SD15_VAE).requires_grad_(False)


@pytest.mark.parametrize("family", FACTS)
def test_the_decoders_flops_and_bytes_are_counted_and_a_backward_to_its_latents_is_one_forward(family):
    facts = FACTS[family]
    decoder = vae()
    assert sum(parameter.numel() for parameter in decoder.parameters()) == VAE_PARAMETERS
    latents = torch.empty(1, *facts.latent_shape, device="meta", requires_grad=True)
    images: list[torch.Tensor] = []
    assert facts.decode_flops == pytest.approx(
        counted(lambda: images.append(decoder.decode(latents).sample)), 1e-3
    )
    assert counted(lambda: images[0].sum().backward()) == pytest.approx(facts.decode_flops, rel=0.06)
    images.clear()
    live = LiveBytes()
    live.ignore(*decoder.parameters(), latents)
    with like_a_gpu({}), live:
        decoder.decode(latents).sample.float().square().mean().backward()
    assert facts.decode_bytes == pytest.approx(live.peak, rel=0.01)


def test_a_backward_to_the_sample_through_a_frozen_unet_is_about_one_forward():
    model = unet("sd15").requires_grad_(False)
    x = torch.empty(1, *SD15.latent_shape, device="meta", requires_grad=True)
    text = conditioning("sd15", 1, "meta")["encoder_hidden_states"]
    outputs: list[torch.Tensor] = []
    forward = counted(lambda: outputs.append(model(x, torch.ones(1, device="meta"), text).sample))
    assert forward == pytest.approx(SD15.forward_flops, rel=1e-3)
    assert counted(lambda: outputs[0].sum().backward()) == pytest.approx(forward, rel=0.16)


def test_the_scorer_is_the_real_one():
    sizes = {"num_attention_heads": 16, "projection_dim": 1024}
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "patch_size": 14,
    } | sizes
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24} | sizes
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024))
    assert sum(parameter.numel() for parameter in model.parameters()) == SCORER.parameters
    pixels = torch.empty(1, 3, 224, 224, device="meta")
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    with torch.no_grad():
        found = counted(lambda: (model.vision_model(pixels), model.text_model(ids)))
    assert found == pytest.approx(SCORER.flops, rel=1e-3)


# ---- rounds, actors, hours


def test_a_round_is_the_sum_of_its_parts_and_more_actors_draw_faster():
    one, four = (planned(dataclasses.replace(ROUNDS, actors=actors)).round for actors in (1, 4))
    assert (value(one, "turns"), value(four, "turns")) == (4, 1)
    assert value(one, "rollout") == pytest.approx(4 * value(four, "rollout"))
    assert value(one, "training") == value(four, "training")
    names = ["rollout", "lookahead", "reference", "decode", "scorer", "weights", "training"]
    assert value(four, "round") == pytest.approx(sum(value(four, name) for name in names))
    speed = mfu.published("sd15").value * 989e12
    assert value(four, "rollout") == pytest.approx(8 * 66 * SD15.forward_flops / speed)
    assert value(planned(dataclasses.replace(ROUNDS, actors=8)).round, "turns") == 1, "there are 4 calls"
    assert value(four, "pace") == pytest.approx(256 / value(four, "round"))


def test_a_round_draws_as_many_blocks_as_its_batches_need():
    assert value(planned().round, "blocks") == 1
    three = planned(dataclasses.replace(ROUNDS, updates_per_round=9)).round
    assert value(three, "blocks") == 3, "9 x 128 pairs of 32 x 16"
    assert value(three, "decode") == pytest.approx(3 * value(planned().round, "decode"))


def test_actors_that_share_a_reward_actor_wait_for_it():
    local, one, four = (
        planned(dataclasses.replace(ROUNDS, reward_actors=number)).round for number in (0, 1, 4)
    )
    assert value(one, "decode") == pytest.approx(4 * value(four, "decode"))
    assert value(four, "decode") == pytest.approx(value(local, "decode")), "a call waits for its scores"
    assert value(one, "rollout") == value(local, "rollout")


def test_hours_and_price_count_the_gpus_of_actors():
    hours = planned(dataclasses.replace(ROUNDS, actors=6, reward_actors=2)).hours
    assert value(hours, "GPUs") == 4 + 6 + 2
    assert value(hours, "rounds") == LORA.steps / 2
    assert value(hours, "price") == pytest.approx(3.0 * 12 * value(hours, "total"))


def gigabytes(terms: Sequence[Term]) -> dict[str, float]:
    return {term.name: term.value for term in terms}


def test_an_actor_holds_policy_reference_encoders_decoder_and_scorer():
    held = gigabytes(actor_memory(SD15, TAILORPO, WHOLE, ROUNDS)["rollout actor"])
    unet_gb = 4 * SD15.parameters / 1e9
    assert held["policy"] == held["reference"] == pytest.approx(unet_gb)
    assert held.keys() == {"policy", "reference", "text encoders", "VAE", "scorer"}
    adapted = gigabytes(actor_memory(SD15, TAILORPO, LORA, ROUNDS)["rollout actor"])
    assert adapted.keys() == {"policy", "adapters", "text encoders", "VAE", "scorer"}, (
        "adapters are switched off"
    )
    moving = dataclasses.replace(TAILORPO, anchor="round")
    assert "reference" not in gigabytes(actor_memory(SD15, moving, WHOLE, ROUNDS)["rollout actor"])


def test_reward_actors_take_decoder_and_scorer_from_those_that_draw():
    apart = actor_memory(SD15, TAILORPO, WHOLE, dataclasses.replace(ROUNDS, reward_actors=1))
    assert gigabytes(apart["reward actor"]).keys() == {"VAE", "scorer"}
    assert not {"VAE", "scorer"} & gigabytes(apart["rollout actor"]).keys()
    assert actor_memory(SD15, TAILORPO, WHOLE, ROUNDS).keys() == {"rollout actor"}


def test_gradients_of_the_reward_keep_unet_and_decoder_of_a_call():
    of_eight, of_four = (
        gigabytes(
            actor_memory(SD15, GUIDED, LORA, dataclasses.replace(ROUNDS, prompts_per_call=number))[
                "rollout actor"
            ]
        )["gradient"]
        for number in (8, 4)
    )
    assert of_eight == pytest.approx(2 * of_four)
    assert of_four == pytest.approx(4 * (2 * 1.261 + 6.105))


def test_a_stored_pair_is_two_float32_samples():
    stored = gigabytes(store_terms(SD15, TAILORPO, ROUNDS))
    assert stored["pair"] == 2 * 64 * 1024
    assert stored["round store"] == pytest.approx(32 * 16 * 2 * 64 * 1024 / 1e9)


def test_the_trainer_of_rounds_has_no_reference_and_one_pass_with_guidance():
    found = planned()
    assert "reference" not in gigabytes(found.memory["ddp"])
    assert value(found.step, "arithmetic") == pytest.approx(
        2 * 2 * SD15.forward_flops / 1e12 + SD15.text_flops / 1e12
    )
    whole = estimate("sd15", TAILORPO, WHOLE, 4)
    assert "reference" not in gigabytes(whole.memory)


def test_rounds_are_planned_for_methods_that_draw_and_for_no_others():
    run = planned().run
    with pytest.raises(ConfigError, match="rollouts are needed by method 'tailorpo', got None"):
        dataclasses.replace(run, rounds=None)
    with pytest.raises(ConfigError, match="rollouts must be left out for method 'uniform'"):
        dataclasses.replace(run, objective=ObjectiveConfig(method="uniform"))
    with pytest.raises(ConfigError, match="actors must be at least 1, got 0"):
        dataclasses.replace(ROUNDS, actors=0)
