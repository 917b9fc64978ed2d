"""The report of an evaluation, as stored in ``report.json`` and rendered as HTML."""

from __future__ import annotations

from typing import Any

from dde_core.scorers.kinds import KindName
from dde_core.verdict import Verdict
from services.api.records import Interval
from services.api.requests import CompareSettings, Strict


class Provenance(Strict):
    """What the scores come from: settings of the images, digests of everything read, the command that repeats
    the evaluation."""

    settings: dict[str, Any]
    digests: dict[str, str]
    command: str


class ReportPrompt(Strict):
    """A prompt. ``is_truncated``: a tokenizer cut its end off."""

    text: str
    category: str | None = None
    is_truncated: bool = False


class CandidateSummary(Strict):
    """What the evaluation says about one candidate: a sentence, and its scorers by verdict."""

    candidate: str
    sentence: str
    verdicts: dict[Verdict, list[str]]


class SignTestReport(Strict):
    """Prompts whose mean score rose, fell and stayed; p of the sign test, and after Holm over all."""

    wins: int
    losses: int
    ties: int
    p: float
    adjusted_p: float


class Comparison(Strict):
    """One scorer on one candidate and the base.

    ``base`` and ``mean`` are means over all images, with their standard deviations. ``difference`` is
    candidate - base with its 95% interval, ``p`` of no difference, ``adjusted_p`` after Holm over all
    comparisons. ``smallest_visible`` is the true difference that is found with probability .8, and ``margin``
    the smallest one that matters, both in the scorer's units. ``prompts_needed``: prompts with which the
    smallest visible difference would be the margin.
    """

    scorer: str
    candidate: str
    higher_is_better: bool
    base: float
    base_deviation: float
    mean: float
    deviation: float
    difference: Interval
    p: float
    adjusted_p: float
    beat_ratio: Interval
    sign_test: SignTestReport
    margin: float
    smallest_visible: float
    prompts_needed: int | None
    verdict: Verdict


class CategoryComparison(Strict):
    """The same for the prompts of one category, without a verdict: tests of many small groups find something
    by chance. Intervals are null for a single prompt."""

    category: str
    scorer: str
    candidate: str
    num_prompts: int
    difference: Interval | None
    beat_ratio: Interval | None


class Strength(Strict):
    """A model's place among all by Bradley-Terry: log-odds to beat the base, and the probability to do so."""

    scorer: str
    model: str
    log_odds: Interval
    beats_base: Interval


class DriftReport(Strict):
    """How far a candidate's images have moved from the base's, and from which value on that is too far.

    ``between_seeds`` is what chance gives: the drift between two halves of the base's own images of the same
    prompts, null for one image a prompt. Any training moves images farther than that. ``limit`` is null if
    none was set.
    """

    scorer: str
    candidate: str
    value: float
    between_seeds: float | None
    limit: float | None
    is_beyond: bool


class GamingReport(Strict):
    """Whether a candidate may have learned a scorer's weaknesses instead of what people like.

    ``rose``: scorers on which it is better. ``fell``: other scorers on which it is worse. ``less_diverse``:
    scorers of kind diversity on which it is worse. ``drifted``: scorers of kind drift that are beyond their
    limit. ``is_suspected``: a scorer rose, and at least one of the others holds.
    """

    candidate: str
    rose: list[str]
    fell: list[str]
    less_diverse: list[str]
    drifted: list[str]
    is_suspected: bool


class Case(Strict):
    """An image of a candidate beside the base's of the same prompt and seed: positions and both scores."""

    prompt: int
    image: int
    base: float
    candidate: float


class Cases(Strict):
    """The images that gained and lost most by a scorer, at most one of a prompt."""

    scorer: str
    candidate: str
    best: list[Case]
    worst: list[Case]


class Disagreement(Strict):
    """Two scorers on one candidate: the correlation of the prompts' differences (null if one has none), the
    share of prompts that one raises and the other lowers, and the prompts where they differ most."""

    candidate: str
    first: str
    second: str
    correlation: float | None
    opposite: float
    prompts: list[int]


class PublishedRow(Strict):
    """A row of a printed table, or ours beside it. Null: not printed or not measured."""

    name: str
    is_ours: bool
    values: list[float | None]
    deviations: list[float | None]


class PublishedTable(Strict):
    """A table of a paper with our rows in its units, its source, and the conditions of both."""

    title: str
    source: str
    conditions: str
    columns: list[str]
    rows: list[PublishedRow]


class EvaluationReport(Strict):
    """An evaluation, verdict first. ``models`` has the base first, ``kinds`` every scorer's kind; prompts and
    images count from 0.

    ``scores`` are what all of it is made of: lists [models][prompts][images] by scorer, [models][prompts] or
    [models] for those that score the images of a prompt or of a model together. Null: not measured.
    """

    summary: list[CandidateSummary]
    warnings: list[str]
    models: list[str]
    kinds: dict[str, KindName]
    images_per_prompt: int
    comparisons: list[Comparison]
    categories: list[CategoryComparison]
    strengths: list[Strength]
    drift: list[DriftReport]
    gaming: list[GamingReport]
    cases: list[Cases]
    disagreements: list[Disagreement]
    published: list[PublishedTable]
    prompts: list[ReportPrompt]
    scores: dict[str, list[Any]]
    settings: CompareSettings
    provenance: Provenance
