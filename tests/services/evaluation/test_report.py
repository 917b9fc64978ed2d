import dataclasses
import json

import numpy as np
import pytest

from dde_core.errors import DataError
from dde_core.metrics import beat_ratio, paired_difference
from dde_core.score_table import Prompt, ScoreTable
from dde_core.verdict import holm
from services.api.records import ScorerRecord
from services.api.reports import CompareSettings, EvaluationReport
from services.evaluation.chunks import Chunk, Scored
from services.evaluation.report import compare
from services.evaluation.table import Table
from tests.support.score_tables import PROVENANCE, score_table

QUICK = CompareSettings(resamples=1000)


def report(table=None, settings=QUICK):
    return compare(table or score_table(), settings, PROVENANCE)


def row_of(made, scorer, candidate="tuned"):
    (found,) = [each for each in made.comparisons if (each.scorer, each.candidate) == (scorer, candidate)]
    return found


def test_a_candidate_has_a_verdict_for_every_scorer_and_a_sentence_that_says_it():
    made = report(score_table(500, gains={"tuned": {"pickscore": 0.4, "clip": 0.0, "hps": -0.4}}))
    assert {each.scorer: each.verdict for each in made.comparisons} == {
        "clip": "no difference that matters",
        "hps": "worse",
        "pickscore": "better",
    }
    (summary,) = made.summary
    assert summary.sentence.startswith(
        "tuned against base: better on pickscore; worse on hps; no difference that matters on clip."
    )
    assert summary.verdicts == {
        "better": ["pickscore"],
        "worse": ["hps"],
        "no difference that matters": ["clip"],
    }


def test_every_number_of_a_comparison_is_that_of_the_statistics_on_its_scores():
    table = score_table()
    found = row_of(report(table), "pickscore")
    base, tuned = table.scores["pickscore"]
    difference = paired_difference(tuned, base, 1000)
    assert (found.difference.low, found.difference.high) == (difference.low, difference.high)
    assert found.p == difference.p
    assert found.base == pytest.approx(base.mean())
    assert found.deviation == pytest.approx(tuned.std(ddof=1))
    assert tuple(found.beat_ratio.model_dump().values()) == beat_ratio(tuned, base)
    won = int((tuned.mean(1) > base.mean(1)).sum())
    assert (found.sign_test.wins, found.sign_test.losses, found.sign_test.ties) == (won, 120 - won, 0)
    assert found.margin == pytest.approx(0.1 * base.std(ddof=1))
    again = round(120 * (found.smallest_visible / found.margin) ** 2)
    assert found.prompts_needed == pytest.approx(again, abs=1)


def test_p_values_are_adjusted_over_all_scorers_and_candidates():
    gains = {name: {"pickscore": 0.1, "clip": 0.15} for name in ("one", "two", "three")}
    made = report(score_table(gains=gains))
    assert [each.adjusted_p for each in made.comparisons] == holm([each.p for each in made.comparisons])
    signs = [each.sign_test for each in made.comparisons]
    assert [each.adjusted_p for each in signs] == holm([each.p for each in signs])
    assert len(signs) == 6


def test_a_report_is_the_same_in_whatever_order_the_scores_arrived():
    table = score_table(40, 3, {"tuned": {"pickscore": 0.3, "clip": 0.0}})
    scorers = [ScorerRecord(id=name, name=name, kind=name, digest=name, created_at=0) for name in table.kinds]
    chunks = [
        Chunk(
            model=model,
            first=first,
            image=image,
            prompts=tuple(prompt.text for prompt in table.prompts[first : first + 10]),
            seeds=tuple(range(first, first + 10)),
            size=(8, 8),
            folder="",
        )
        for model in range(2)
        for image in range(3)
        for first in range(0, 40, 10)
    ]
    np.random.default_rng(0).shuffle(chunks)
    arrived = Table(tuple(table.models), tuple(table.prompts), 3)
    for chunk in chunks:
        rows = slice(chunk.first, chunk.first + 10)
        scores = {name: values[chunk.model, rows, chunk.image] for name, values in table.scores.items()}
        arrived.add(Scored(chunk=chunk, uri="", drawn=10, scores=scores, seconds={}), scorers)
    found = report(arrived.score_table(scorers, truncated=()))
    assert found.model_dump_json() == report(table).model_dump_json()


def test_another_scorer_changes_nothing_but_the_adjusted_numbers():
    gains = {"tuned": {"pickscore": 0.3, "clip": 0.0}}
    table = score_table(40, 3, gains)
    alone = ScoreTable(
        models=table.models,
        prompts=table.prompts,
        images_per_prompt=3,
        kinds={"clip": "clip"},
        scores={"clip": table.scores["clip"]},
    )
    both, one = row_of(report(table), "clip"), row_of(report(alone), "clip")
    assert (both.difference, both.beat_ratio, both.p) == (one.difference, one.beat_ratio, one.p)


def test_a_report_survives_json_and_has_the_verdict_first():
    made = report(score_table(drift=(0.1, 0.5)))
    written = made.model_dump_json()
    assert EvaluationReport.model_validate_json(written) == made
    assert next(iter(json.loads(written))) == "summary"


def test_identical_models_have_no_difference_that_matters():
    scores = score_table().scores["clip"]
    table = ScoreTable(
        models=["base", "copy"],
        prompts=score_table().prompts,
        images_per_prompt=4,
        kinds={"clip": "clip"},
        scores={"clip": np.stack([scores[0], scores[0]])},
    )
    (found,) = report(table).comparisons
    assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0)
    assert (found.p, found.verdict, found.beat_ratio.value) == (1, "no difference that matters", 0.5)
    assert report(table).cases[0].best == []


def test_margins_dead_zones_and_limits_are_those_of_each_scorer():
    table = score_table(500, gains={"tuned": {"pickscore": 0.4, "clip": 0.0}}, drift=(0.1, 0.5))
    found = report(table, CompareSettings(resamples=1000, margins={"pickscore": 0.6}))
    assert row_of(found, "pickscore").verdict == "no difference that matters"
    assert row_of(found, "clip").margin == pytest.approx(0.1 * table.scores["clip"][0].std(ddof=1))
    tied = report(table, CompareSettings(resamples=1000, dead_zones={"clip": 9.0}))
    assert row_of(tied, "clip").beat_ratio.value == 0.5
    assert row_of(tied, "pickscore").beat_ratio.value > 0.55


@pytest.mark.parametrize(
    ("field", "value"),
    [("margins", {"clap": 1.0}), ("dead_zones", {"drift": 0.1}), ("drift_limits", {"clip": 1.0})],
)
def test_settings_of_a_scorer_that_was_not_used_are_refused(field, value):
    with pytest.raises(DataError, match=rf"{field}: must be of .*got \['{next(iter(value))}'\]"):
        report(score_table(drift=(0.1, 0.5)), CompareSettings(resamples=1000, **{field: value}))


@pytest.mark.parametrize(
    ("drift", "limits", "expected"),
    [
        ((0.1, 0.5), {}, (0.1, None, False)),
        ((0.1, 0.5), {"drift": 0.4}, (0.1, 0.4, True)),
        ((0.1, 0.5), {"drift": 0.6}, (0.1, 0.6, False)),
        ((float("nan"), 0.5), {"drift": 0.4}, (None, 0.4, True)),
    ],
)
def test_drift_is_too_far_beyond_a_set_limit_and_shown_beside_what_chance_gives(drift, limits, expected):
    made = report(score_table(drift=drift), CompareSettings(resamples=1000, drift_limits=limits))
    (found,) = made.drift
    assert (found.between_seeds, found.limit, found.is_beyond) == expected
    assert any("drift has no limit" in warning for warning in made.warnings) == (found.limit is None)


@pytest.mark.parametrize(
    ("gain", "drift", "expected"),
    [
        ({"pickscore": 0.5, "clip": 0.0, "diversity": 0.0}, (0.1, 0.05), ([], [], [], False)),
        ({"pickscore": 0.5, "clip": -0.5, "diversity": 0.0}, (0.1, 0.05), (["clip"], [], [], True)),
        ({"pickscore": 0.5, "clip": 0.0, "diversity": -1.0}, (0.1, 0.05), ([], ["diversity"], [], True)),
        ({"pickscore": 0.5, "clip": 0.0, "diversity": 0.0}, (0.1, 0.5), ([], [], ["drift"], True)),
        (
            {"pickscore": 0.0, "clip": -0.5, "diversity": -1.0},
            (0.1, 0.5),
            (["clip"], ["diversity"], ["drift"], False),
        ),
    ],
)
def test_gaming_is_suspected_where_a_scorer_rises_at_the_cost_of_something_else(gain, drift, expected):
    limits = CompareSettings(resamples=1000, drift_limits={"drift": 0.1})
    (found,) = report(score_table(300, gains={"tuned": gain}, drift=drift), limits).gaming
    assert (found.fell, found.less_diverse, found.drifted, found.is_suspected) == expected
    assert found.rose == (["pickscore"] if gain["pickscore"] else [])


def test_a_category_has_the_numbers_of_its_prompts_alone():
    table = score_table()
    made = report(table)
    rows = [i for i, prompt in enumerate(table.prompts) if prompt.category == "people"]
    base, tuned = table.scores["clip"][:, rows]
    (found,) = [each for each in made.categories if (each.category, each.scorer) == ("people", "clip")]
    assert found.num_prompts == len(rows) == 40
    assert found.difference.low == paired_difference(tuned, base, 1000).low
    assert found.beat_ratio.high == beat_ratio(tuned, base).high
    assert {each.category for each in made.categories} == {"animals", "people"}


def test_a_category_of_one_prompt_has_no_intervals():
    prompts = [
        Prompt("a cat", "animals"),
        *(Prompt(f"person {i}", "people") for i in range(9)),
        Prompt("air"),
    ]
    made = report(score_table(prompts=prompts))
    (found,) = [each for each in made.categories if (each.category, each.scorer) == ("animals", "clip")]
    assert (found.num_prompts, found.difference, found.beat_ratio) == (1, None, None)


def test_models_are_ranked_from_three_on_the_strongest_first():
    gains = {"weak": {"clip": -0.5}, "strong": {"clip": 0.5}}
    made = report(score_table(gains=gains))
    assert [each.model for each in made.strengths] == ["strong", "base", "weak"]
    assert made.strengths[0].beats_base.low > 0.5
    assert made.strengths[1].log_odds.value == 0
    assert report(score_table()).strengths == []


def test_cases_are_the_images_that_gained_and_lost_most_each_of_another_prompt():
    table = score_table()
    (found,) = [each for each in report(table).cases if each.scorer == "clip"]
    gain = table.scores["clip"][1] - table.scores["clip"][0]
    assert [case.candidate - case.base for case in found.best] == pytest.approx(
        sorted(gain.max(axis=1), reverse=True)[:3]
    )
    assert [case.candidate - case.base for case in found.worst] == pytest.approx(sorted(gain.min(axis=1))[:3])
    assert len({case.prompt for case in found.best}) == 3
    case = found.worst[0]
    assert gain[case.prompt, case.image] == pytest.approx(gain.min())
    assert report(table, CompareSettings(resamples=1000, cases=0)).cases == []


def test_scorers_disagree_on_prompts_that_one_raises_and_the_other_lowers():
    table = score_table()
    (found,) = [each for each in report(table).disagreements if {each.first, each.second} == {"clip", "hps"}]
    clip, hps = ((table.scores[name][1] - table.scores[name][0]).mean(1) for name in ("clip", "hps"))
    assert found.opposite == pytest.approx(float((clip * hps < 0).mean()))
    assert found.correlation == pytest.approx(float(np.corrcoef(clip, hps)[0, 1]))
    assert len(found.prompts) == 3
    assert all(clip[i] * hps[i] < 0 for i in found.prompts)


def test_the_papers_tables_stand_beside_our_rows_on_their_scale():
    table = score_table()
    second, third, fourth = report(table).published
    assert [each.source[-7:] for each in (second, third, fourth)] == ["Table 2", "Table 3", "Table 4"]
    rows = {row.name: row for row in second.rows}
    assert rows["DDE"].values == [3.414, 2.725, 2.112]
    assert rows["tuned"].is_ours
    assert rows["tuned"].values[0] == pytest.approx(10 * table.scores["clip"][1].mean())
    won = {row.name: row for row in fourth.rows}
    assert won["DDE"].values == [0.6564, 0.7669, 0.7270]
    assert all(round(ratio * 326) == pytest.approx(ratio * 326, abs=0.02) for ratio in won["DDE"].values)
    base, tuned = (table.scores["pickscore"][m].mean(1) for m in (0, 1))
    assert won["tuned"].values[2] == pytest.approx(float((tuned > base).mean()))
    assert "base" not in won


def test_scorers_that_no_paper_printed_have_no_published_tables():
    assert report(score_table(gains={"tuned": {"taste": 0.2, "match": 0.1}})).published == []
    one = report(score_table(gains={"tuned": {"pickscore": 0.2}})).published[0].rows[-1]
    assert one.values[:2] == [None, None]


def test_a_report_warns_of_what_makes_its_numbers_weak():
    prompts = [Prompt("a cat", is_truncated=True), Prompt("a cat"), Prompt("a dog")]
    warnings = " ".join(report(score_table(prompts=prompts)).warnings)
    assert "Only 3 prompts" in warnings
    assert "1 of 3 prompts repeat an earlier one" in warnings
    assert "1 of 3 prompts are longer than a tokenizer reads" in warnings
    assert report(score_table(100)).warnings == []


def test_a_scorer_without_spread_on_the_base_is_named_in_a_warning():
    scores = np.ones((2, 100, 4))
    scores[1, :50] = 2.0
    table = dataclasses.replace(score_table(100), kinds={"clip": "clip"}, scores={"clip": scores})
    made = report(table)
    assert made.comparisons[0].verdict == "better"
    assert "clip gives the base one score for every image" in made.warnings[0]


def test_a_single_prompt_is_refused():
    with pytest.raises(DataError, match="at least 2 prompts, got 1"):
        report(score_table(prompts=[Prompt("a cat")]))
