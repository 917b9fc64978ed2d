"""From a table of scores to the report: every statistic of it, and what it says in words. Pure functions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dde_core import metrics, verdict
from dde_core.errors import DataError
from dde_core.metrics import Estimate
from dde_core.score_table import ScoreTable
from dde_core.verdict import Difference, Verdict
from services.api.records import Interval
from services.api.reports import (
    CandidateSummary,
    Case,
    Cases,
    CategoryComparison,
    Comparison,
    Disagreement,
    DriftReport,
    EvaluationReport,
    GamingReport,
    Provenance,
    ReportPrompt,
    SignTestReport,
    Strength,
)
from services.api.requests import CompareSettings
from services.evaluation.published import published_tables

FEW_PROMPTS = 100
EXAMPLES = 3
"""Prompts shown for two scorers that disagree."""
VERDICTS: tuple[Verdict, ...] = ("better", "worse", "no difference that matters", "undecided")


def compare(table: ScoreTable, settings: CompareSettings, provenance: Provenance) -> EvaluationReport:
    """The report of an evaluation. The same numbers whatever the order in which scores arrived.

    Raises DataError for settings of scorers that the table lacks, and for a single prompt.
    """
    _check_names(table, settings)
    comparisons = _comparisons(table, settings)
    drift = _drift(table, settings)
    gaming = [_gaming(table, candidate, comparisons, drift) for candidate in table.models[1:]]
    return EvaluationReport(
        summary=[_summary(table.models[0], comparisons, each) for each in gaming],
        warnings=_warnings(table, settings, comparisons, drift),
        models=list(table.models),
        kinds=dict(table.kinds),
        images_per_prompt=table.images_per_prompt,
        comparisons=comparisons,
        categories=_categories(table, settings),
        strengths=_strengths(table, settings) if len(table.models) > 2 else [],
        drift=drift,
        gaming=gaming,
        cases=_cases(table, settings.cases),
        disagreements=_disagreements(table),
        published=published_tables(table, comparisons),
        prompts=[
            ReportPrompt(text=prompt.text, category=prompt.category, is_truncated=prompt.is_truncated)
            for prompt in table.prompts
        ],
        scores={name: _as_lists(table.scores[name]) for name in sorted(table.scores)},
        settings=settings,
        provenance=provenance,
    )


def _as_lists(scores: np.ndarray) -> list[Any]:
    """Nested lists; JSON has no NaN."""
    found: list[Any] = np.where(np.isnan(scores), np.array(None), scores).tolist()
    return found


def _check_names(table: ScoreTable, settings: CompareSettings) -> None:
    by_prompt = set(table.scorers("image", "prompt"))
    for field, known in (
        ("margins", by_prompt),
        ("dead_zones", by_prompt),
        ("drift_limits", set(table.scorers("model"))),
    ):
        unknown = set(getattr(settings, field)) - known
        if unknown:
            raise DataError(f"{field}: must be of {sorted(known)}, got {sorted(unknown)}")


def _pairs(table: ScoreTable) -> list[tuple[str, int]]:
    """Every comparison: a scorer and a candidate's position."""
    return [(scorer, m) for scorer in table.scorers("image", "prompt") for m in range(1, len(table.models))]


def _gain(table: ScoreTable, scorer: str, model: int) -> np.ndarray:
    """Candidate - base [prompts, images]."""
    scores = table.by_prompt(scorer)
    gain: np.ndarray = scores[model] - scores[0]
    return gain


def _prompt_gains(table: ScoreTable, pairs: Sequence[tuple[str, int]]) -> np.ndarray:
    """Mean of candidate - base [prompts, comparisons]."""
    columns = [metrics.prompt_means(_gain(table, scorer, model)) for scorer, model in pairs]
    return np.stack(columns, axis=1)


def _comparisons(table: ScoreTable, settings: CompareSettings) -> list[Comparison]:
    pairs = _pairs(table)
    if not pairs:
        return []
    gains = _prompt_gains(table, pairs)
    differences = metrics.paired_differences(gains, settings.resamples, settings.seed)
    signs = [metrics.sign_test(gains[:, i]) for i in range(len(pairs))]
    adjusted = verdict.holm([difference.p for difference in differences])
    adjusted_signs = verdict.holm([sign.p for sign in signs])
    return [
        _comparison(
            table,
            settings,
            pair,
            differences[i],
            adjusted[i],
            SignTestReport(**signs[i]._asdict(), adjusted_p=adjusted_signs[i]),
        )
        for i, pair in enumerate(pairs)
    ]


def _comparison(
    table: ScoreTable,
    settings: CompareSettings,
    pair: tuple[str, int],
    difference: Difference,
    adjusted_p: float,
    sign_test: SignTestReport,
) -> Comparison:
    scorer, model = pair
    scores = table.by_prompt(scorer)
    base_mean, base_deviation = _mean_and_deviation(scores[0])
    mean, deviation = _mean_and_deviation(scores[model])
    margin = settings.margins.get(scorer, settings.margin) * base_deviation
    visible = verdict.smallest_visible_effect(
        difference.standard_error, difference.num_prompts, len(_pairs(table))
    )
    higher_is_better = table.kind(scorer).higher_is_better
    dead_zone = settings.dead_zones.get(scorer, 0.0)
    return Comparison(
        scorer=scorer,
        candidate=table.models[model],
        higher_is_better=higher_is_better,
        base=base_mean,
        base_deviation=base_deviation,
        mean=mean,
        deviation=deviation,
        difference=_of_difference(difference),
        p=difference.p,
        adjusted_p=adjusted_p,
        beat_ratio=_of_estimate(metrics.beat_ratio(scores[model], scores[0], dead_zone)),
        sign_test=sign_test,
        margin=margin,
        smallest_visible=visible,
        prompts_needed=_prompts_needed(difference.num_prompts, visible, margin),
        verdict=verdict.verdict(difference, adjusted_p, margin, higher_is_better),
    )


def _prompts_needed(num_prompts: int, visible: float, margin: float) -> int | None:
    """The smallest visible effect falls like the root of the number of prompts."""
    if margin == 0 or visible == 0:
        return None
    return max(2, math.ceil(num_prompts * (visible / margin) ** 2))


def _mean_and_deviation(scores: np.ndarray) -> tuple[float, float]:
    values = np.sort(scores, axis=None)
    return float(values.mean()), float(values.std(ddof=1))


def _categories(table: ScoreTable, settings: CompareSettings) -> list[CategoryComparison]:
    categories = [prompt.category for prompt in table.prompts]
    return [
        comparison
        for category in sorted({name for name in categories if name is not None})
        for comparison in _category(table, settings, category, [name == category for name in categories])
    ]


def _category(
    table: ScoreTable, settings: CompareSettings, category: str, is_in: Sequence[bool]
) -> list[CategoryComparison]:
    pairs = _pairs(table)
    rows = np.flatnonzero(is_in)
    if not pairs:
        return []
    has_interval = len(rows) > 1
    found: list[Difference | None] = [None] * len(pairs)
    if has_interval:
        gains = _prompt_gains(table, pairs)[rows]
        found = [*metrics.paired_differences(gains, settings.resamples, settings.seed)]
    return [
        CategoryComparison(
            category=category,
            scorer=scorer,
            candidate=table.models[model],
            num_prompts=len(rows),
            difference=None if difference is None else _of_difference(difference),
            beat_ratio=_category_ratio(table, settings, scorer, model, rows) if has_interval else None,
        )
        for (scorer, model), difference in zip(pairs, found, strict=True)
    ]


def _category_ratio(
    table: ScoreTable, settings: CompareSettings, scorer: str, model: int, rows: np.ndarray
) -> Interval:
    scores = table.by_prompt(scorer)[:, rows]
    return _of_estimate(metrics.beat_ratio(scores[model], scores[0], settings.dead_zones.get(scorer, 0.0)))


def _strengths(table: ScoreTable, settings: CompareSettings) -> list[Strength]:
    """By scorer, the strongest model first."""
    strengths = []
    for scorer in table.scorers("image", "prompt"):
        wins = metrics.pairwise_wins(table.by_prompt(scorer), settings.dead_zones.get(scorer, 0.0))
        found = zip(table.models, metrics.bradley_terry(wins), strict=True)
        for model, odds in sorted(found, key=lambda each: -each[1].value):
            beats = Estimate(*(1 / (1 + math.exp(-each)) for each in odds))
            strengths.append(
                Strength(
                    scorer=scorer, model=model, log_odds=_of_estimate(odds), beats_base=_of_estimate(beats)
                )
            )
    return strengths


def _drift(table: ScoreTable, settings: CompareSettings) -> list[DriftReport]:
    reports = []
    for scorer in table.scorers("model"):
        scores = [float(score) for score in table.scores[scorer]]
        limit = settings.drift_limits.get(scorer)
        between_seeds = scores[0] if math.isfinite(scores[0]) else None
        for candidate, value in zip(table.models[1:], scores[1:], strict=True):
            is_beyond = limit is not None and value > limit
            reports.append(
                DriftReport(
                    scorer=scorer,
                    candidate=candidate,
                    value=value,
                    between_seeds=between_seeds,
                    limit=limit,
                    is_beyond=is_beyond,
                )
            )
    return reports


def _gaming(
    table: ScoreTable, candidate: str, comparisons: Sequence[Comparison], drift: Sequence[DriftReport]
) -> GamingReport:
    mine = [each for each in comparisons if each.candidate == candidate]
    level = {each.scorer: table.kind(each.scorer).level for each in mine}
    rose = [each.scorer for each in mine if each.verdict == "better" and level[each.scorer] == "image"]
    fell = [each.scorer for each in mine if each.verdict == "worse" and level[each.scorer] == "image"]
    less_diverse = [
        each.scorer for each in mine if each.verdict == "worse" and level[each.scorer] == "prompt"
    ]
    drifted = [each.scorer for each in drift if each.candidate == candidate and each.is_beyond]
    return GamingReport(
        candidate=candidate,
        rose=rose,
        fell=fell,
        less_diverse=less_diverse,
        drifted=drifted,
        is_suspected=bool(rose) and bool(fell or less_diverse or drifted),
    )


def _summary(base: str, comparisons: Sequence[Comparison], gaming: GamingReport) -> CandidateSummary:
    candidate = gaming.candidate
    verdicts = {
        name: [c.scorer for c in comparisons if c.candidate == candidate and c.verdict == name]
        for name in VERDICTS
    }
    words = {
        "better": "better on {}",
        "worse": "worse on {}",
        "no difference that matters": "no difference that matters on {}",
        "undecided": "undecided on {}",
    }
    said = [words[name].format(", ".join(scorers)) for name, scorers in verdicts.items() if scorers]
    sentence = f"{candidate} against {base}: {'; '.join(said) or 'not scored'}."
    if gaming.is_suspected:
        sentence += " It may be gaming a scorer: see the gaming panel."
    return CandidateSummary(
        candidate=candidate,
        sentence=sentence,
        verdicts={name: scorers for name, scorers in verdicts.items() if scorers},
    )


def _cases(table: ScoreTable, count: int) -> list[Cases]:
    found = []
    for scorer, model in _pairs(table):
        if table.kind(scorer).level != "image" or not count:
            continue
        gain = _gain(table, scorer, model)
        best = _extremes(table, scorer, model, gain, count)
        worst = _extremes(table, scorer, model, -gain, count)
        if not table.kind(scorer).higher_is_better:
            best, worst = worst, best
        found.append(Cases(scorer=scorer, candidate=table.models[model], best=best, worst=worst))
    return found


def _extremes(table: ScoreTable, scorer: str, model: int, gain: np.ndarray, count: int) -> list[Case]:
    """The image of each prompt with the largest positive gain, for the prompts where that is largest."""
    images = gain.argmax(axis=1)
    largest = gain.max(axis=1)
    scores = table.scores[scorer]
    return [
        Case(
            prompt=int(prompt),
            image=int(images[prompt]),
            base=float(scores[0, prompt, images[prompt]]),
            candidate=float(scores[model, prompt, images[prompt]]),
        )
        for prompt in np.argsort(-largest, kind="stable")[:count]
        if largest[prompt] > 0
    ]


def _disagreements(table: ScoreTable) -> list[Disagreement]:
    return [
        _disagreement(table, model, first, second)
        for model in range(1, len(table.models))
        for first, second in itertools.combinations(table.scorers("image"), 2)
    ]


def _disagreement(table: ScoreTable, model: int, first: str, second: str) -> Disagreement:
    gains = [metrics.prompt_means(_gain(table, scorer, model)) for scorer in (first, second)]
    deviations = [gain.std() for gain in gains]
    is_opposite = gains[0] * gains[1] < 0
    correlation = None
    examples: list[int] = []
    if all(deviations):
        scaled = [gain / deviation for gain, deviation in zip(gains, deviations, strict=True)]
        correlation = float(np.clip(np.corrcoef(gains[0], gains[1])[0, 1], -1, 1))
        extent = np.where(is_opposite, np.minimum(np.abs(scaled[0]), np.abs(scaled[1])), 0)
        examples = [int(i) for i in np.argsort(-extent, kind="stable")[:EXAMPLES] if is_opposite[i]]
    return Disagreement(
        candidate=table.models[model],
        first=first,
        second=second,
        correlation=correlation,
        opposite=float(is_opposite.mean()),
        prompts=examples,
    )


def _warnings(
    table: ScoreTable,
    settings: CompareSettings,
    comparisons: Sequence[Comparison],
    drift: Sequence[DriftReport],
) -> list[str]:
    texts = Counter(prompt.text for prompt in table.prompts)
    repeated = sum(texts.values()) - len(texts)
    truncated = sum(prompt.is_truncated for prompt in table.prompts)
    has_limits: Mapping[str, bool] = {each.scorer: each.limit is not None for each in drift}
    warnings = []
    if len(table.prompts) < FEW_PROMPTS:
        warnings.append(
            f"Only {len(table.prompts)} prompts: small differences stay undecided; "
            "see the smallest visible difference of each scorer."
        )
    if repeated:
        warnings.append(
            f"{repeated} of {len(table.prompts)} prompts repeat an earlier one and are not independent: "
            "intervals are too narrow."
        )
    if truncated:
        warnings.append(f"{truncated} of {len(table.prompts)} prompts are longer than a tokenizer reads.")
    if len(comparisons) > 0.05 * (settings.resamples + 1):
        warnings.append(
            f"{len(comparisons)} comparisons with {settings.resamples} resamples: no p value can be small "
            "enough after Holm; raise resamples."
        )
    warnings += [
        f"{each.scorer} gives the base one score for every image: {each.candidate} has no margin on it."
        for each in comparisons
        if each.base_deviation == 0
    ]
    warnings += [
        f"{scorer} has no limit, so no drift is too far: set drift_limits."
        for scorer, has_limit in has_limits.items()
        if not has_limit
    ]
    return warnings


def _of_difference(difference: Difference) -> Interval:
    return Interval(value=difference.value, low=difference.low, high=difference.high)


def _of_estimate(estimate: Estimate) -> Interval:
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high)
