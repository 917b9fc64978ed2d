"""The estimate's constants are recounted on the real models without weights; its laws; what it refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_args

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig as PeftConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dde_core.conditioning import predict
from dde_core.config import LoraConfig, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.family import Family
from dde_core.models.folder import ModelFolder
from dde_core.models.tokens import tokenize
from dde_core.planning.estimate import estimate, lora_parameters
from dde_core.planning.facts import BENCHED, FACTS, PRECOMPUTES
from dde_core.shapes import MODEL_DIR
from tests.bench.cases import MID_SIZE, MID_SIZE_VAE
from tests.support.activation_bytes import activation_bytes
from tests.support.tiny_folders import sd15_folder
from tests.support.unet_configs import SD15_VAE, TOKENS, conditioning, random_pairs, unet

FAMILIES = ("sd15", "sdxl")
PAPER = TrainConfig(precision="bf16", gradient_checkpointing=True, micro_batch_size=2)
UNIFORM = ObjectiveConfig(method="uniform")
SFT = ObjectiveConfig(method="sft")
LORA = dataclasses.replace(PAPER, lora=LoraConfig(rank=16))


def term(needed, name):
    (value,) = [each.value for each in (*needed.memory, *needed.time) if each.name == name]
    return value


def test_every_family_can_be_estimated():
    assert set(FACTS) == set(get_args(Family))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_shapes_are_those_of_the_real_models(family):
    facts = FACTS[family]
    model = unet(family)
    pairs = random_pairs(family, 1)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.latent_shape == pairs.latents_w.shape[1:]
    assert facts.text_shape == pairs.conditioning_w["encoder_hidden_states"].shape[1:]


def text_encoders():
    """CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 without weights."""
    large = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    huge = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
    )
    with torch.device("meta"):
        return CLIPTextModel(large), CLIPTextModelWithProjection(huge)


def flops(work) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_text_encoders_have_the_parameters_and_flops_of_the_real_ones():
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in text_encoders()]
    assert [FACTS[family].text_encoder_parameters for family in FAMILIES] == [counts[0], sum(counts)]
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    counted = [flops(lambda model=model: model(ids)) for model in text_encoders()]
    assert [FACTS[family].text_flops for family in FAMILIES] == pytest.approx(
        [counted[0], sum(counted)], rel=1e-3
    )


def test_the_vaes_flops_are_counted_at_each_size():
    """Both families have the same VAE, but for its weights."""
    with torch.device("meta"):
        vae = AutoencoderKL(**SD15_VAE)
    known = {256: PRECOMPUTES[1].vae_flops, 512: FACTS["sd15"].vae_flops, 1024: FACTS["sdxl"].vae_flops}
    counted = {px: flops(lambda px=px: vae.encode(torch.empty(1, 3, px, px, device="meta"))) for px in known}
    assert known == pytest.approx(counted, rel=1e-3)
    assert PRECOMPUTES[0].vae_flops == known[512]


def test_the_models_of_the_benchmarks_are_counted(tmp_path):
    shapes, mid_size = BENCHED.values()
    folder = ModelFolder(MODEL_DIR)
    assert shapes.forward_flops == pytest.approx(unet_flops(folder.unet(), 8), rel=1e-3)
    vae = folder.vae().to("meta")
    assert shapes.vae_flops == pytest.approx(
        flops(lambda: vae.encode(torch.empty(1, 3, 32, 32, device="meta"))), rel=1e-3
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel(**MID_SIZE)
        vae = AutoencoderKL(**MID_SIZE_VAE)
    assert mid_size.forward_flops == pytest.approx(unet_flops(unet, 32), rel=1e-3)
    assert mid_size.vae_flops == pytest.approx(
        flops(lambda: vae.encode(torch.empty(1, 3, 256, 256, device="meta"))), rel=1e-3
    )
    for counted, where in ((shapes, folder), (mid_size, ModelFolder(sd15_folder(tmp_path)))):
        (encoder,) = where.text_encoders()
        ids = torch.from_numpy(tokenize(where.tokenizers(), ["a circle"])[:, 0]).long().to("meta")
        assert counted.text_flops == pytest.approx(
            flops(lambda it=encoder.to("meta"), ids=ids: it(ids)), rel=0.1
        )


def test_the_benchmarks_vaes_weigh_no_more_beside_their_unets_than_stable_diffusions():
    """What the public recipe pays for pictures, and ours does not, is not made larger than it is."""
    of_sd15 = FACTS["sd15"].vae_flops / FACTS["sd15"].forward_flops
    assert of_sd15 == pytest.approx(1.39, abs=1e-3)
    proportions = [model.vae_flops / model.forward_flops for model in BENCHED.values()]
    assert proportions == pytest.approx([0.951, 1.001], abs=1e-3)
    assert max(proportions) <= of_sd15


def unet_flops(unet, size) -> int:
    unet = unet.to("meta")
    shape = (1, 16, unet.config.cross_attention_dim)
    x_t, t, text = (torch.empty(each, device="meta") for each in ((1, 4, size, size), (1,), shape))
    return flops(lambda: unet(x_t, t, text))


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_flops_are_counted_and_a_backward_is_two_forwards(family):
    model = unet(family)
    inputs = conditioning(family, 1, "meta")
    x_t = torch.empty(1, *FACTS[family].latent_shape, device="meta")
    t = torch.ones(1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as forward:
        output = predict(model, x_t, t, inputs)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert FACTS[family].forward_flops == pytest.approx(forward.get_total_flops(), rel=1e-3)
    assert backward.get_total_flops() == pytest.approx(2 * forward.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("precision", "checkpointing"), list(FACTS["sd15"].activation_bytes))
@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_activation_bytes_are_counted(family, precision, checkpointing):
    counted = activation_bytes(family, bf16=precision == "bf16", checkpointing=checkpointing)
    assert FACTS[family].activation_bytes[precision, checkpointing] == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activation_bytes_grow_with_samples(checkpointing):
    one, two = (activation_bytes("sd15", bf16=True, checkpointing=checkpointing, samples=n) for n in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "targets",
    [LoraConfig().targets, ("attn2.to_k", "to_out.0"), ("ff.net.0.proj", "ff.net.2"), ("to_q", "attn1.to_q")],
)
def test_lora_parameters_are_those_that_peft_adds(family, targets):
    model = unet(family).requires_grad_(False)
    facts = FACTS[family]
    model.add_adapter(PeftConfig(r=8, target_modules=list(targets)))
    added = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert lora_parameters(facts.blocks, facts.text_shape[1], LoraConfig(rank=8, targets=targets)) == added


@pytest.mark.parametrize("family", FAMILIES)
def test_published_hours_come_back_where_the_vae_is_added(family):
    facts = FACTS[family]
    run = FACTS[family].published
    training = dataclasses.replace(PAPER, steps=run.steps, gradient_checkpointing=run.passes == 5)
    needed = estimate(family, UNIFORM, training, 16)
    vae_hours = run.steps * run.batch_size * 2 * facts.vae_flops / (term(needed, "speed") * 1e12) / 3600
    assert needed.gpu_hours + vae_hours == pytest.approx(run.gpu_hours)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_takes_memory_off_and_a_forward_on(family):
    without = estimate(family, UNIFORM, dataclasses.replace(PAPER, gradient_checkpointing=False), 8)
    with_it = estimate(family, UNIFORM, PAPER, 8)
    assert without.memory_gb > with_it.memory_gb
    assert with_it.gpu_hours / without.gpu_hours == pytest.approx(5 / 4, rel=1e-3), "but for the text"


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_need_less_than_the_whole_unet(family):
    whole, adapters = (estimate(family, UNIFORM, training, 8) for training in (PAPER, LORA))
    assert adapters.memory_gb < whole.memory_gb / 2
    assert adapters.gpu_hours < whole.gpu_hours
    assert "reference" not in {each.name for each in adapters.memory}
    assert (
        term(adapters, "passes") == 4
    )  # the reference is the U-Net with its adapters off: no memory, but a pass


def test_winners_alone_need_no_reference_and_one_side():
    pairs, winners = (estimate("sd15", objective, PAPER, 8) for objective in (UNIFORM, SFT))
    assert "reference" not in {each.name for each in winners.memory}
    assert term(winners, "activations") == term(pairs, "activations") / 2
    assert winners.gpu_hours / pairs.gpu_hours == pytest.approx(4 / 10, rel=5e-3), "the text is the same"


def test_a_run_on_a_ledger_has_no_reference_in_memory_or_time_but_the_pass_that_writes_it():
    cached = dataclasses.replace(PAPER, reference="ledger")
    online, ledger = (estimate("sd15", UNIFORM, training, 8) for training in (PAPER, cached))
    assert online.memory_gb - ledger.memory_gb == pytest.approx(4 * FACTS["sd15"].parameters / 1e9)
    assert (term(online, "passes"), term(ledger, "passes")) == (5, 4)
    text_hours = FACTS["sd15"].text_flops / (term(online, "arithmetic") * 1e12) * online.gpu_hours
    together = ledger.gpu_hours + term(ledger, "ledger")
    assert online.gpu_hours == pytest.approx(together - text_hours), "once; the next run saves it"
    assert "ledger" not in {each.name for each in (*online.time, *estimate("sd15", SFT, cached, 8).time)}


@pytest.mark.parametrize(
    "change", [{"optimizer": "adamw_8bit"}, {"optimizer": "adafactor"}, {"micro_batch_size": 1}]
)
def test_small_moments_and_small_micro_batches_save_memory_and_no_time(change):
    before, after = (
        estimate("sdxl", UNIFORM, training, 8) for training in (PAPER, dataclasses.replace(PAPER, **change))
    )
    assert after.memory_gb < before.memory_gb
    assert after.gpu_hours == before.gpu_hours


def test_a_running_average_costs_a_copy_of_what_is_trained():
    copy = 4 * FACTS["sd15"].parameters / 1e9
    plain, averaged = (
        estimate("sd15", UNIFORM, dataclasses.replace(PAPER, ema_decay=decay), 8) for decay in (0, 0.999)
    )
    assert averaged.memory_gb - plain.memory_gb == pytest.approx(copy)


def test_without_micro_batches_a_worker_runs_all_its_pairs_at_once():
    whole = dataclasses.replace(PAPER, micro_batch_size=0, batch_size=100)
    assert term(estimate("sd15", UNIFORM, whole, 8), "activations") == pytest.approx(13 * 2 * 0.281)
    assert term(
        estimate("sd15", UNIFORM, dataclasses.replace(whole, micro_batch_size=64), 8), "activations"
    ) == pytest.approx(13 * 2 * 0.281)


def test_more_workers_divide_the_hours():
    one, eight = (estimate("sd15", UNIFORM, PAPER, workers) for workers in (1, 8))
    assert one.gpu_hours == eight.gpu_hours
    assert term(eight, "time") == one.gpu_hours / 8


def test_a_gpu_says_what_fits_and_how_fast_it_is():
    a100, h200 = (
        estimate("sdxl", UNIFORM, dataclasses.replace(PAPER, micro_batch_size=16), 8, gpu)
        for gpu in ("a100", "h200")
    )
    assert (a100.fit, h200.fit) == ("does not fit", "fits")
    assert a100.gpu_hours / h200.gpu_hours == pytest.approx(989 / 312)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "sd3"}, "family must be one of sd15, sdxl, got 'sd3'"),
        ({"gpu": "b300"}, "gpu must be one of a100, h100, h200, got 'b300'"),
        ({"workers": 0}, "workers must be greater than 0, got 0"),
        ({"workers": 4096}, "workers must be at most training.batch_size = 2048, got 4096"),
        (
            {"training": TrainConfig(lora=LoraConfig(targets=("conv_in",)))},
            "training.lora.targets must name linear layers of transformer blocks to be estimated, "
            "got 'conv_in'",
        ),
    ],
)
def test_what_cannot_be_estimated_is_refused_by_field_and_value(change, message):
    request = {"family": "sd15", "objective": UNIFORM, "training": PAPER, "workers": 8, **change}
    with pytest.raises(ConfigError) as refused:
        estimate(**request)
    assert str(refused.value) == message


def test_the_estimate_loads_no_torch():
    code = "import sys, dde_core.planning.estimate; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
