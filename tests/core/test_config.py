"""A config refuses nonsense with field and value, in Python and as part of an API body alike."""

from __future__ import annotations

import pickle

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.errors import ConfigError

BAD = [
    (ObjectiveConfig, {"beta": 0.0}, "beta must be greater than 0, got 0.0"),
    (ObjectiveConfig, {"beta": float("inf")}, "beta must be a finite number, got inf"),
    (
        ObjectiveConfig,
        {"method": "ppo"},
        "method must be one of 'dde', 'dde_single', 'dde_step', 'uniform', 'discounted', 'sft', "
        "'tailorpo', 'tailorpo_g', got 'ppo'",
    ),
    (ObjectiveConfig, {"label": "firm"}, "label must be one of 'hard', 'soft', got 'firm'"),
    (ObjectiveConfig, {"ema_rate": 1.5}, "ema_rate must be at most 1, got 1.5"),
    (ObjectiveConfig, {"t_min": 500, "t_max": 200}, "t_max must be 0 or at least t_min = 500, got 200"),
    (TrainConfig, {"steps": 0}, "steps must be greater than 0, got 0"),
    (TrainConfig, {"learning_rate": -1e-4}, "learning_rate must be greater than 0, got -0.0001"),
    (TrainConfig, {"caption_dropout": 1.0}, "caption_dropout must be less than 1, got 1.0"),
    (SampleConfig, {"height": 33}, "height must be a multiple of 8, got 33"),
]


@pytest.mark.parametrize(("config", "fields", "message"), BAD)
def test_nonsense_is_refused_with_field_and_value(config, fields, message):
    with pytest.raises(ConfigError) as refused:
        config(**fields)
    assert str(refused.value) == message
    assert str(pickle.loads(pickle.dumps(refused.value))) == message, "errors cross processes"


def test_the_same_ranges_hold_in_an_api_body_and_are_located_at_the_field():
    class Body(BaseModel):
        model_config = ConfigDict(strict=True)
        objective: ObjectiveConfig

    with pytest.raises(ValidationError) as refused:
        Body.model_validate_json('{"objective": {"beta": -1}}')
    assert refused.value.errors()[0]["loc"] == ("objective", "beta")
    with pytest.raises(ValidationError, match="valid number"):
        Body.model_validate_json('{"objective": {"beta": true}}')


def test_each_method_has_its_own_sources_noise_by_default():
    assert ObjectiveConfig(method="dde").noise_mode == "independent"
    assert ObjectiveConfig(method="uniform").noise_mode == "shared"
    assert ObjectiveConfig(method="uniform", noise="independent").noise_mode == "independent"
