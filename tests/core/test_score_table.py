import numpy as np
import pytest

from dde_core.errors import DataError
from dde_core.score_table import Prompt, ScoreTable


def table(**changes):
    given = {
        "models": ["base", "tuned"],
        "prompts": [Prompt("a cat"), Prompt("a dog", "animals")],
        "images_per_prompt": 3,
        "kinds": {"clip": "clip", "spread": "diversity", "away": "drift"},
        "scores": {
            "clip": np.zeros((2, 2, 3)),
            "spread": np.zeros((2, 2)),
            "away": np.array([np.nan, 0.5]),
        },
    }
    return ScoreTable(**(given | changes))


def test_scorers_are_listed_by_the_level_of_their_kind():
    assert table().scorers("image", "prompt") == ["clip", "spread"]
    assert table().scorers("model") == ["away"]
    assert table().by_prompt("spread").shape == (2, 2, 1)
    assert table().by_prompt("clip").shape == (2, 2, 3)
    assert not table().kind("away").higher_is_better


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["base"]}, r"at least one candidate, got \['base'\]"),
        ({"models": ["a", "a"]}, "different names"),
        ({"prompts": []}, "0 prompts"),
        ({"kinds": {"clip": "clip"}}, r"kinds are of scorers \['clip'\]"),
        (
            {"kinds": {"clip": "clip"}, "scores": {"clip": np.zeros((2, 3, 2))}},
            r"scorer 'clip': scores must be float64 \[2, 2, 3\], got float64 \[2, 3, 2\]",
        ),
        (
            {"kinds": {"away": "drift"}, "scores": {"away": np.array([0.1, np.nan])}},
            r"scorer 'away': scores must be finite, got nan at \[1\]",
        ),
    ],
)
def test_scores_that_do_not_fit_are_refused_by_scorer_and_place(changes, message):
    with pytest.raises(DataError, match=message):
        table(**changes)
