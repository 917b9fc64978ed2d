"""The bodies that the HTTP API accepts: sent by the client, read by the control plane and Ray Serve.

Docstrings of classes are part of the OpenAPI document. Imports no torch and no Ray.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from dde_core.config import (
    Background,
    DataConfig,
    ObjectiveConfig,
    SampleConfig,
    TrainConfig,
)
from dde_core.family import Family
from dde_core.scorers.ranking import Keep
from dde_core.verdict import RESAMPLES

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
ALIAS_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
REFERENCE_PATTERN = rf"{NAME_PATTERN.removesuffix('$')}(@{ALIAS_PATTERN.strip('^$')})?$"
"""What models are called by: a name, an id, or a name and an alias as in ``name@production``."""
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Alias = Annotated[str, Field(pattern=ALIAS_PATTERN)]
PROJECT_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
Project = Annotated[str, Field(pattern=PROJECT_PATTERN)]
DEFAULT_PROJECT = "default"
"""The project of DDE_API_KEY, and of everything that was stored before there were projects."""
PROJECT_HEADER = "x-dde-project"
"""Tells Serve the project of a request. The control plane sets it; callers cannot."""
KEY_HEADER = "x-dde-key"
"""Tells Serve the id of the API key. The control plane sets it; callers cannot."""
OPERATOR_KEY = "operator"
"""The id of DDE_API_KEY, which is no row among the keys."""
TIMEOUT_HEADER = "x-request-timeout-s"
"""How many seconds a request for images or scores may take, from its arrival to its last byte."""
Scope = Literal["read", "submit", "generate", "admin"]
"""What a key may do: list and get; create, change and delete; images and scores; manage keys."""
ALL_SCOPES: tuple[Scope, ...] = ("read", "submit", "generate", "admin")
Uri = Annotated[str, Field(min_length=1, max_length=2048, pattern=r"^[^\x00-\x1f]+$")]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00]+$")]
MetadataValue = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]
Metadata = Annotated[
    dict[MetadataKey, MetadataValue],
    Field(max_length=16, json_schema_extra={"additionalProperties": False}),
]
ScorerKind = Literal["clip", "pickscore", "hps", "aesthetic", "imagereward", "diversity", "drift"]
"""The kinds that a checkpoint can be registered for; all others of dde_core/scorers/kinds.py are built in."""
Resize = Literal["antialiased", "aliased"]
NonNegative = Annotated[float, Field(ge=0)]
Scorers = Annotated[list[Name], Field(json_schema_extra={"uniqueItems": True})]
"""Names of registered scorers and of built-in ones."""
Column = Literal[
    "caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "image_0_uid", "image_1_uid",
    "chosen", "rejected", "chosen_uid", "rejected_uid", "images", "ranks", "scores", "image_uids",
    "pair_id",
]  # fmt: skip
"""The columns that a dataset may have: those of Pick-a-Pic, of chosen/rejected pairs and of rankings."""
Split = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f]+$")]
ALL_SCORERS = ("match", "taste", "fidelity")
"""The scorers of the shapes world, which every request uses by default."""
HELD_OUT_METRICS = ("held_out_accuracy", "held_out_margin")
"""What validation measures on held-out pairs and can choose a checkpoint by."""
HELD_OUT = "held-out:"
"""How a URI of prompts begins that means held-out captions: ``held-out:`` or ``held-out:DATASET?pairs=N``."""
CAPTIONS = "captions:"
"""How a URI of a job's rollouts begins that means all captions of a dataset: ``captions:DATASET``."""
MAX_IMAGES = 16
MAX_PROMPTS = 100_000
MAX_COMPARED = 16
"""Models of one evaluation."""


class Strict(BaseModel):
    """Rejects unknown fields, implicit conversions and non-finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class DatasetSource(Strict):
    """Where preference pairs are stored: a file or folder, as a path or URI on the server's side.

    The format is detected automatically: Parquet, Arrow, JSON, CSV, webdataset tars, or a folder of win/ and
    lose/ images. A folder that holds several splits needs ``split``: the one to read, such as ``"train"``.
    ``columns`` renames columns, from the expected name to the one in your files: ``{"caption": "prompt"}``;
    a column mapped to ``""`` is not read.
    """

    uri: Uri
    columns: dict[Column, str] = {}
    split: Split | None = None


Cluster = Literal["shared", "own"]
"""Where the stages of a job run: on the Ray cluster that all jobs share, or each on one of its own."""
Weight = Annotated[float, Field(gt=0, le=1e6)]
Margin = Annotated[float, Field(ge=0, le=1e6)]


class GeneratePairs(Strict):
    """Pairs without people: ``model`` draws ``images_per_prompt`` images of each prompt, scorers rank them.

    ``prompts_uri`` is a file of prompts, as of evaluations; the first ``num_prompts`` are used. Do not
    evaluate the aligned model on the same prompts. ``scorers`` has a weight for each scorer's name. A score
    counts in units of the scorer's spread: its standard deviation among images of one prompt. ``keep`` the
    best image against the worst, or all pairs; those whose weighted scores differ by at most ``margin``, in
    the same units, are ties and dropped. Image j of prompt i has the seed ``seed`` + i *
    ``images_per_prompt`` + j.
    """

    model: str
    prompts_uri: Uri
    num_prompts: Annotated[int, Field(ge=1, le=1_000_000)]
    images_per_prompt: Annotated[int, Field(ge=2, le=MAX_IMAGES)] = 4
    scorers: Annotated[
        dict[Name, Weight],
        Field(min_length=1, max_length=8, json_schema_extra={"additionalProperties": False}),
    ]
    keep: Keep = "best_worst"
    margin: Margin = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    sample: SampleConfig = SampleConfig()
    cluster: Cluster | None = None


class Relabel(Strict):
    """The pairs of the registered ``dataset``, labeled by ``scorer`` instead of people.

    Pairs whose scores differ by at most ``margin`` are ties and dropped. Its unit is the scorer's spread: the
    standard deviation between the two images of a pair. Transparent pixels show the ``background``.
    """

    dataset: str
    scorer: Name
    margin: Margin = 0.0
    background: Background = "white"
    cluster: Cluster | None = None


class DatasetCreate(Strict):
    """Register preference pairs under a name. The answer has the dataset's id, which a job refers to.

    Give one of ``uri`` (pairs that exist, as in DatasetSource), ``generate`` and ``relabel``. The last two
    make the pairs on the cluster, whose ``cluster`` is as in an alignment job; the dataset is "generating"
    until they are ready.
    """

    name: Name
    uri: Uri | None = None
    columns: dict[Column, str] = {}
    split: Split | None = None
    generate: GeneratePairs | None = None
    relabel: Relabel | None = None


class ModelCreate(Strict):
    """Register a base model: a diffusers folder at ``uri``. Jobs and requests for images refer to it by
    ``name``.

    ``family`` is detected from model_index.json; if you give it, a model of another family is rejected.
    """

    name: Name
    uri: Uri
    family: Family | None = None


class ScorerCreate(Strict):
    """Register a scorer: a checkpoint at ``uri`` of one of the kinds. Evaluations, validation and requests
    for scores refer to it by ``name``.

    ``uri`` is a folder or a file, as the kind wants; ``processor`` is where the tokenizer and the image
    settings are if they are not beside the checkpoint. ``resize`` is how ``hps`` makes an image smaller;
    other kinds have one way.
    """

    name: Name
    kind: ScorerKind
    uri: Uri
    processor: Uri | None = None
    resize: Resize = "antialiased"


class KeyCreate(Strict):
    """Create an API key for a project, by default the project of the key that asks.

    ``scopes`` is what the key may do: ``read`` lists and gets, ``submit`` creates, changes and deletes,
    ``generate`` draws and scores images, ``admin`` manages the project's keys. A project exists as soon as it
    has a key.
    """

    name: Name
    project: Project | None = None
    scopes: Annotated[list[Scope], Field(min_length=1)] = ["read", "submit", "generate"]


class CompareSettings(Strict):
    """How scores are compared.

    ``margin``: the smallest difference that matters, in the base's standard deviations of a scorer's scores;
    ``margins`` overrides it for single scorers. ``dead_zones``: differences of two images' scores up to which
    they tie, in the scorer's units (0 unless given). ``drift_limits``: the drift from which on a model counts
    as drifted (none unless given).
    ``resamples`` and ``seed`` are those of the bootstrap. ``cases``: best and worst images shown for each
    scorer; ``grid_prompts``: prompts of which all images are shown.
    """

    margin: NonNegative = 0.1
    margins: dict[str, NonNegative] = {}
    dead_zones: dict[str, NonNegative] = {}
    drift_limits: dict[str, NonNegative] = {}
    resamples: Annotated[int, Field(ge=1000, le=1_000_000)] = RESAMPLES
    seed: Annotated[int, Field(ge=0)] = 0
    cases: Annotated[int, Field(ge=0, le=20)] = 3
    grid_prompts: Annotated[int, Field(ge=0, le=100)] = 8


class EvaluationConfig(Strict):
    """How models are compared: each generates ``images_per_prompt`` images of each prompt, all from the same
    seeds.

    ``prompts_uri`` is a file of prompts: text with one a line, PartiPrompts' TSV, DrawBench's CSV, a JSON
    list or JSON lines; the first ``num_prompts`` are used. ``held-out:`` means the captions that the job's
    ``training.held_out_pairs`` keep out of its training; ``held-out:DATASET?pairs=N``, in an evaluation or a
    study, those that N held-out pairs of a registered dataset do. Image j of prompt i is generated from
    ``seed`` + i + 100,000 j. ``scorers`` are names of registered scorers. The built-in ones, which are the
    default, can score only images of the bundled shapes data: with ``[]`` you get the image grid without
    scores.
    """

    prompts_uri: Uri
    num_prompts: Annotated[int, Field(ge=2, le=MAX_PROMPTS)] = 200
    images_per_prompt: Annotated[int, Field(ge=1, le=64)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    scorers: Scorers = list(ALL_SCORERS)
    sample: SampleConfig = SampleConfig()
    compare: CompareSettings = CompareSettings()


MaxWait = Annotated[float, Field(gt=0, le=366 * 86_400)]
"""Seconds that a job may wait for room in all, at most a year."""
MAX_WORKERS = 1024
WorkerCount = Annotated[int, Field(gt=0, le=MAX_WORKERS)]


def _valid_workers(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
    """Report one error at the field itself; pydantic's own for a union are one per member, at paths of its
    own.
    """
    try:
        workers = inner(tuple(value) if isinstance(value, list) else value)
        if least_workers(workers) <= most_workers(workers):
            return workers
    except ValidationError:
        pass
    raise PydanticCustomError(
        "workers", "must be a number from 1 to {most}, or two of them as [least, most]", {"most": MAX_WORKERS}
    )


Workers = Annotated[WorkerCount | tuple[WorkerCount, WorkerCount], WrapValidator(_valid_workers)]
"""A fixed number, or [least, most]: the run then uses as many workers as the cluster has room for."""


def most_workers(workers: Workers) -> int:
    """The largest number that a run may have."""
    return workers if isinstance(workers, int) else workers[1]


def least_workers(workers: Workers) -> int:
    """The smallest number that a run may have."""
    return workers if isinstance(workers, int) else workers[0]


class ValidationConfig(Strict):
    """Validation of checkpoints, in parallel with training: at step 0 and every ``every`` steps.

    ``every`` must be a multiple of ``training.checkpoint_every`` and at most ``training.steps``. Validation
    measures the implicit accuracy on the held-out pairs (if ``training.held_out_pairs`` is above 0) and
    generates ``num_prompts`` images with the evaluation's sampling settings and scorers. Its prompts come
    from ``prompts_uri``; by default they are the ones after the evaluation's in the evaluation's file. Image
    i is generated from ``seed`` + i at every step.

    The aligned model is the checkpoint with the highest ``best_metric``: ``held_out_accuracy``,
    ``held_out_margin`` or one of the evaluation's scorers. Null takes the last checkpoint.
    """

    every: Annotated[int, Field(gt=0)]
    prompts_uri: Uri | None = None
    num_prompts: Annotated[int, Field(ge=0, le=256)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    best_metric: Name | None = None


class Promote(Strict):
    """Let ``NAME@alias`` refer to this version of the model. Promote an earlier one to roll back."""

    alias: Alias = "production"


class PromoteIf(Promote):
    """Promote the aligned model if its evaluation against the base passes.

    The low end of ``scorer``'s beat ratio must be above ``beat_ratio_low``, and no scorer in ``not_worse``
    may be worse than the base's: its difference's interval may not lie below 0. All of them must be among
    ``evaluation.scorers``. A model that does not pass is kept, and served under its own name.
    """

    scorer: Name
    beat_ratio_low: Annotated[float, Field(ge=0, lt=1)] = 0.5
    not_worse: Scorers = []


class Rollouts(Strict):
    """Where an on-policy method gets its pairs: the policy draws them in rounds, and scorers rank them.

    ``prompts_uri`` is a file of prompts, as of evaluations, or ``captions:DATASET``, the captions of a
    registered dataset; the first ``num_prompts`` are used, in an order that ``draw_seed`` determines. None
    of them may be a prompt of the evaluation or of validation, unless you ``allow_evaluation_prompts``. The
    reward is the sum of ``scorers``' scores, each in its own unit, times
    its weight. A round draws ``prompts_per_round`` trajectories with the weights that the policy has at that
    moment, and again as many, up to ``max_blocks`` times, until it has the pairs of ``updates_per_round``
    batches. ``actors`` draw, ``prompts_per_call`` trajectories in one call of the U-Net; ``reward_actors``
    decode and score, or with 0 the actors that draw do. With ``lag`` 1 the next round is drawn while this one
    is trained on, with the weights from before its first update; with 0 the two wait for each other. A round
    fails if more than ``max_bad_fraction`` of its rankings have a reward that is not finite.

    ``guard``: the largest fall of a validation scorer's mean below the base's. When validation finds a larger
    one while the reward's scorers have risen, training ends, and the best checkpoint before that becomes the
    model.
    """

    prompts_uri: Uri
    num_prompts: Annotated[int, Field(ge=1, le=1_000_000)]
    scorers: Annotated[
        dict[Name, Weight],
        Field(min_length=1, max_length=8, json_schema_extra={"additionalProperties": False}),
    ]
    prompts_per_round: Annotated[int, Field(ge=1, le=65_536)] = 32
    updates_per_round: Annotated[int, Field(ge=1, le=1000)] = 1
    max_blocks: Annotated[int, Field(ge=1, le=100)] = 8
    prompts_per_call: Annotated[int, Field(ge=1, le=256)] = 8
    actors: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = 1
    reward_actors: Annotated[int, Field(ge=0, le=MAX_WORKERS)] = 0
    lag: Annotated[int, Field(ge=0, le=1)] = 0
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    allow_evaluation_prompts: bool = False
    guard: Annotated[
        dict[Name, NonNegative],
        Field(max_length=8, json_schema_extra={"additionalProperties": False}),
    ] = {}


class AlignmentJobCreate(Strict):
    """Align a base model with preference pairs: one POST runs encoding, training, evaluation and serving.

    Required: ``model``, the name or id of a registered model; ``dataset``, the id of a registered dataset,
    or, for an on-policy method, ``rollouts`` in its place; and ``evaluation.prompts_uri``. ``name`` is the
    name under which the aligned model is served; by default it combines the base's name, the method and the
    job's id. ``workers`` is a number of training workers, or ``[least, most]`` to use as many as the cluster
    has room for. ``cluster`` is where its stages run: on the Ray cluster that jobs share, or each on its
    ``own``, which ends with it. ``max_wait_s``: a job that has waited longer for room, in all, fails; by
    default the control plane's setting. ``metadata`` is yours: up to 16 strings that lists can filter by.
    """

    model: str
    dataset: str | None = None
    rollouts: Rollouts | None = None
    name: Name | None = None
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainConfig = TrainConfig()
    workers: Workers = 1
    cluster: Cluster | None = None
    max_wait_s: MaxWait | None = None
    evaluation: EvaluationConfig
    validation: ValidationConfig | None = None
    promote_if: PromoteIf | None = None
    metadata: Metadata = {}


class ImageFolder(Strict):
    """Images that were drawn elsewhere, compared under a name like those of a model.

    The folder at ``images_uri`` has image j of prompt i, both counted from 0, as ``{i:05d}-{j}.png``; or an
    ``images.jsonl`` with a line ``{"file": "a.png", "prompt": "a cat"}`` for each image, in which those of
    one prompt are its images 0, 1 and so on. All images have the size of the other models' images.
    """

    name: Name
    images_uri: Uri


class NamedModel(Strict):
    """A registered ``model``, by its name or id, compared under another ``name``: another version of one."""

    name: Name
    model: str


def _one_member(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
    """Report the errors of the one member that is meant; pydantic's own for a union are those of all."""
    if isinstance(value, dict):
        member = NamedModel if "model" in value else ImageFolder
        return member.model_validate(value)
    if isinstance(value, str | ImageFolder | NamedModel):
        return inner(value)
    message = "must be the name or id of a model, or an object with name and images_uri or model"
    raise PydanticCustomError("compared", message)


Compared = Annotated[str | ImageFolder | NamedModel, WrapValidator(_one_member)]


class EvaluationCreate(EvaluationConfig):
    """Compare models on held-out prompts: each of ``models`` with the ``base`` among them.

    ``models`` are names or ids of registered models, at least one, and folders of images that were drawn
    elsewhere. Their names differ: ``{"name": "before", "model": ID}`` compares a model under another one.
    ``base`` is the first one by default. ``cluster`` and ``max_wait_s`` are as in an alignment job.
    """

    models: Annotated[
        list[Compared],
        Field(min_length=2, max_length=MAX_COMPARED, json_schema_extra={"uniqueItems": True}),
    ]
    base: str | None = None
    cluster: Cluster | None = None
    max_wait_s: MaxWait | None = None


MAX_CELLS = 200
_FIELD = r"[a-z_0-9]+(\.[a-z_0-9]+)*"
Fields = Annotated[str, Field(pattern=rf"^{_FIELD}(, ?{_FIELD})*$", max_length=200)]
"""A field of a job's body, such as ``objective.beta``, or several that get one value, with commas between."""
Overrides = Annotated[
    dict[Fields, Any], Field(min_length=1, json_schema_extra={"additionalProperties": True})
]


class StudyCell(Strict):
    """One job of a study: its body is the study's ``base`` with these fields changed.

    ``label`` is made from the overrides by default.
    """

    label: Name | None = None
    overrides: Overrides


class StudyEvaluation(EvaluationConfig):
    """The comparison that ends a study: every aligned model with ``base`` (a name or an id).

    ``base`` is the model that the cells align, by default; required if they align several.
    """

    base: str | None = None


class StudyCreate(Strict):
    """Run a grid of alignment jobs, its cells, and compare all of their models.

    ``base`` is the body of an alignment job without ``name``. ``grid`` maps fields of it, such as
    ``objective.method``, to lists of values: every combination is a cell, except those that match an item of
    ``exclude``. ``"training.seed, training.draw_seed"`` gives two fields one value. ``cells`` adds single
    cells. A cell's model is named STUDY-LABEL, where the label is made from the cell's values. At most
    ``parallel`` cells run at a time. After a cell that failed the study goes on, or with ``on_failure:
    "stop"`` cancels the others. Every cell is checked before the first one starts.
    """

    name: Name
    base: dict[str, Any]
    grid: dict[Fields, Annotated[list[Any], Field(min_length=1)]] = {}
    cells: Annotated[list[StudyCell], Field(max_length=MAX_CELLS)] = []
    exclude: Annotated[list[Overrides], Field(max_length=100)] = []
    parallel: Annotated[int, Field(ge=1, le=MAX_CELLS)] = 2
    on_failure: Literal["continue", "stop"] = "continue"
    evaluation: StudyEvaluation
