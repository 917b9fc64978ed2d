"""Every refusal: status, the field it names, the value it repeats."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pydantic import TypeAdapter

from services.api.answers import ErrorView
from services.control.dependencies import BODY_BYTES
from tests.services.control.conftest import make_plane, write_base, write_pairs
from tests.support.zero_folder import change

JOBS = "/v1/alignment/jobs"
TABLE = [
    ({"objective": {"beta": -1}}, "objective.beta", "objective.beta: Input should be greater than 0, got -1"),
    (
        {"objective": {"beta": "1"}},
        "objective.beta",
        'objective.beta: Input should be a valid number, got "1"',
    ),
    (
        {"objective": {"beta": True}},
        "objective.beta",
        "objective.beta: Input should be a valid number, got true",
    ),
    (
        {"objective": {"beta": float("nan")}},
        "objective.beta",
        "objective.beta: Input should be a finite number, got NaN",
    ),
    (
        {"objective": {"beta": float("inf")}},
        "objective.beta",
        "objective.beta: Input should be a finite number, got Infinity",
    ),
    ({"objective": {"bta": 1}}, "objective.bta", "objective.bta: Unexpected keyword argument, got 1"),
    (
        {"objective": {"method": "dpo"}},
        "objective.method",
        "objective.method: Input should be 'dde', 'dde_single', 'dde_step',",
    ),
    (
        {"objective": {"gamma": 1.5}},
        "objective.gamma",
        "objective.gamma: Input should be less than or equal to 1, got 1.5",
    ),
    (
        {"objective": {"reduction": "sum"}},
        "objective.reduction",
        "objective.reduction: Input should be 'mean', got \"sum\"",
    ),
    (
        {"objective": {"t_min": 1001}},
        "objective.t_min",
        "objective.t_min: must be at most the 1000 timesteps of shapes, got 1001",
    ),
    (
        {"objective": {"t_min": 9, "t_max": 3}},
        "objective.t_max",
        "objective.t_max: must be 0 or at least t_min = 9, got 3",
    ),
    ({"objective": 3}, "objective", "objective: Input should be an object, got 3"),
    ({"training": {"steps": 0}}, "training.steps", "training.steps: Input should be greater than 0, got 0"),
    (
        {"training": {"steps": 1.5}},
        "training.steps",
        "training.steps: Input should be a valid integer, got 1.5",
    ),
    (
        {"training": {"lora": {"rank": 0}}},
        "training.lora.rank",
        "training.lora.rank: Input should be greater than 0, got 0",
    ),
    (
        {"training": {"batch_size": 4, "lora": {"targets": ["to_q", "norm1"]}}},
        "training.lora.targets",
        'training.lora.targets: matches no linear or convolution layer of shapes\'s U-Net, got "norm1"',
    ),
    (
        {"training": {"lora": {"targets": []}}},
        "training.lora.targets",
        "training.lora.targets: Tuple should have at least 1 item after validation, not 0",
    ),
    (
        {"training": {"lora": {"targets": [""]}}},
        "training.lora.targets.0",
        "training.lora.targets.0: String should have at least 1 character",
    ),
    (
        {"training": {"batch_size": 4, "held_out_pairs": 5}},
        "training.held_out_pairs",
        "training.held_out_pairs: must leave training.batch_size = 4 of the 8 pairs, got 5",
    ),
    (
        {"training": {"precision": "fp16"}},
        "training.precision",
        "training.precision: Input should be 'fp32' or 'bf16'",
    ),
    *(
        (
            {"workers": workers},
            "workers",
            f"workers: must be a number from 1 to 1024, or two of them as [least, most], got {shown}",
        )
        for workers, shown in (
            (0, "0"),
            ("2", '"2"'),
            (1.5, "1.5"),
            (True, "true"),
            ([2, 1], "[2, 1]"),
            ([1], "[1]"),
            ([0, 1], "[0, 1]"),
        )
    ),
    ({"workers": 5}, "workers", "workers: must be at most training.batch_size, got 5"),
    ({"workers": [1, 9]}, "workers", "workers: must be at most training.batch_size, got [1, 9]"),
    *(
        (
            {
                "training": {"batch_size": 4, "parallelism": "fsdp", "optimizer": optimizer},
                "workers": workers,
            },
            "training.optimizer",
            'training.optimizer: cannot be combined with training.parallelism "fsdp" on up to 4 workers, '
            f'got "{optimizer}"',
        )
        for optimizer in ("adamw_8bit", "adafactor")
        for workers in (4, [1, 4])
    ),
    ({"name": "a b"}, "name", "name: String should match pattern"),
    ({"name": "shapes"}, "name", "name: belongs to the base model"),
    ({"name": "model_" + "0" * 24}, "name", "name: must not have the form of an id"),
    ({"modle": "x"}, "modle", 'modle: Extra inputs are not permitted, got "x"'),
    ({"model": None}, "model", "model: Input should be a valid string, got null"),
    ({"metadata": {"a": 1}}, "metadata.a", "metadata.a: Input should be a valid string, got 1"),
    (
        {"metadata": {str(i): "" for i in range(17)}},
        "metadata",
        "metadata: Dictionary should have at most 16 items",
    ),
    ({"metadata": {"a": "x" * 513}}, "metadata.a", "metadata.a: String should have at most 512 characters"),
    ({"metadata": {"a": "\0"}}, "metadata.a", "metadata.a: String should match pattern"),
    ({"evaluation": {}}, "evaluation.prompts_uri", "evaluation.prompts_uri: Field required"),
    (
        {"training": {"batch_size": 9}},
        "training.batch_size",
        "training.batch_size: must be at most the 8 pairs of dataset ds_",
    ),
]


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """One plane for every refusal that leaves nothing behind."""
    folder = tmp_path_factory.mktemp("steady")
    yield from make_plane(folder, f"sqlite:///{folder}/dde.db")


def refused(plane, path: str, body, status: int, param: str | None, message: str) -> dict:
    """The error of a POST, after it was held against what was expected."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = plane.http.post(path, content=content)
    assert answer.status_code == status, answer.text
    TypeAdapter(ErrorView).validate_python(answer.json())
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(message), error["message"]
    return error


@pytest.mark.parametrize(
    ("overrides", "param", "message"), TABLE, ids=[message[:48] for _, _, message in TABLE]
)
def test_a_job_is_refused_by_field_and_value(steady, overrides, param, message):
    refused(steady, JOBS, steady.job_body(**overrides), 400, param, message)
    assert steady.get(JOBS)["data"] == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"model=shapes", "the request body is not JSON: expected"),
        (b"", "the request body is not JSON: EOF"),
        (b"\xff\xfe", "the request body is not JSON:"),
        (b"[" * 9000, "the request body is not JSON: recursion limit exceeded"),
        (b'{"model": "\\ud800"}', "the request body is not JSON:"),
        (b"[1]", "the request body: Input should be an object, got [1]"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(steady, raw, message):
    refused(steady, JOBS, raw, 400, None, message)


def test_a_whole_number_may_have_a_fraction_of_zero_as_in_json_schema(plane):
    body = json.dumps(plane.job_body(workers=2.0, training={"steps": 2.0, "batch_size": 4}))
    answer = plane.http.post(JOBS, content=body)
    assert (answer.json()["workers"], answer.json()["training"]["steps"]) == (2, 2)


def test_a_body_beyond_the_limit_is_refused_with_413_declared_or_not(steady):
    refused(
        steady,
        JOBS,
        b" " * (BODY_BYTES + 1),
        413,
        None,
        f"the request body is longer than {BODY_BYTES} bytes",
    )
    chunks = (b" " * 65536 for _ in range(BODY_BYTES // 65536 + 1))
    answer = steady.http.post(JOBS, content=chunks)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_long_value_is_shortened_in_the_message(steady):
    error = refused(
        steady,
        JOBS,
        steady.job_body(workers="9" * 5000),
        400,
        "workers",
        'workers: must be a number from 1 to 1024, or two of them as [least, most], got "999',
    )
    assert len(error["message"]) < 320


@pytest.mark.parametrize("model", ["nobody", "model_" + "0" * 24, "a/b", "\0", "ds_" + "0" * 24])
def test_an_unknown_model_is_a_404_that_names_it(steady, model):
    error = refused(
        steady,
        JOBS,
        steady.job_body(model=model),
        404,
        "model",
        f"model: model {json.dumps(model)} does not exist",
    )
    assert error["code"] == "model_not_found"


@pytest.mark.parametrize("dataset", ["nothing", "ds_" + "0" * 24, "\0"])
def test_an_unknown_dataset_is_a_404_that_names_it(steady, dataset):
    message = f"dataset: dataset {json.dumps(dataset)} does not exist"
    assert (
        refused(steady, JOBS, steady.job_body(dataset=dataset), 404, "dataset", message)["code"]
        == "dataset_not_found"
    )


@pytest.mark.parametrize(("prefix", "path"), [("evaluation.", JOBS), ("", "/v1/evaluations")])
def test_prompts_that_cannot_be_used_are_refused_before_anything_runs(steady, prefix, path):
    def post(message, status=400, **config):
        body = steady.job_body(evaluation=config) if prefix else {"models": ["shapes", "rival"], **config}
        refused(steady, path, body, status, f"{prefix}{next(iter(config))}", message)

    (steady.root / "binary").write_bytes(b"\xff\xfe\xfd")
    nowhere = str(steady.root / "nowhere.txt")
    post(f"{prefix}prompts_uri: '{nowhere}' does not exist", 404, prompts_uri=nowhere)
    for uri in (steady.root, "gopher://x/y", steady.root / "binary"):
        post(f"{prefix}prompts_uri: cannot be read, got '{uri}'", prompts_uri=str(uri))
    uri = str(steady.root / "prompts.txt")
    post(
        f"{prefix}prompts_uri: '{uri}' has 3 prompts, {prefix}num_prompts requires 4",
        prompts_uri=uri,
        num_prompts=4,
    )
    (steady.root / "other.txt").write_text("a red cross\na plaid sphere\n")
    other = {"prompts_uri": str(steady.root / "other.txt"), "num_prompts": 2}
    post(f"{prefix}scorers: caption 'a plaid sphere' is not a sentence", scorers=["match"], **other)
    large = {"prompts_uri": uri, "num_prompts": 2, "sample": {"height": 64}}
    post(f"{prefix}scorers: height must be 32 (or 0) for the scorers", scorers=["match"], **large)
    post(f"{prefix}scorers: must not repeat", scorers=["match", "match"], prompts_uri=uri, num_prompts=2)


VALIDATION = [
    ({"every": 0}, {}, "every", "Input should be greater than 0, got 0"),
    ({"every": 60}, {}, "every", "must be a multiple of training.checkpoint_every = 50, got 60"),
    ({"every": 150}, {}, "every", "must be at most training.steps = 100, got 150"),
    (
        {"num_prompts": 0},
        {},
        "num_prompts",
        "must be above 0 where training.held_out_pairs is 0: nothing is measured, got 0",
    ),
    ({"num_prompts": 257}, {}, "num_prompts", "Input should be less than or equal to 256, got 257"),
    (
        {"best_metric": "loss"},
        {},
        "best_metric",
        'must be one of evaluation.scorers, held_out_accuracy or held_out_margin, got "loss"',
    ),
    (
        {"best_metric": "held_out_accuracy"},
        {},
        "best_metric",
        'needs training.held_out_pairs greater than 0, got "held_out_accuracy"',
    ),
    (
        {"best_metric": "taste"},
        {"scorers": ["match"]},
        "best_metric",
        'must be one of evaluation.scorers, held_out_accuracy or held_out_margin, got "taste"',
    ),
    (
        {"best_metric": "taste", "num_prompts": 0},
        {"held_out_pairs": 2},
        "best_metric",
        'needs validation.num_prompts greater than 0, got "taste"',
    ),
    ({"prompts_uri": "{root}/nowhere.txt"}, {}, "prompts_uri", "'{root}/nowhere.txt' does not exist"),
    (
        {"prompts_uri": "{root}/prompts.txt", "num_prompts": 4},
        {},
        "prompts_uri",
        "'{root}/prompts.txt' has 3 prompts, validation.num_prompts requires 4",
    ),
    (
        {"num_prompts": 2},
        {},
        "num_prompts",
        "'{root}/prompts.txt' has 3 prompts, evaluation.num_prompts requires 2 and "
        "validation.num_prompts requires 2",
    ),
    (
        {"prompts_uri": "{root}/other.txt", "num_prompts": 2},
        {},
        "prompts_uri",
        "caption 'a plaid sphere' is not a sentence",
    ),
    ({"evry": 50}, {}, "evry", "Extra inputs are not permitted, got 50"),
]


@pytest.mark.parametrize(
    ("validation", "other", "field", "message"), VALIDATION, ids=[message[:48] for *_, message in VALIDATION]
)
def test_a_validation_that_could_not_work_is_refused_before_anything_runs(
    steady, validation, other, field, message
):
    root = str(steady.root)
    (steady.root / "other.txt").write_text("a red cross\na plaid sphere\n")
    config = {"every": 50, "num_prompts": 1} | validation
    if "prompts_uri" in config:
        config["prompts_uri"] = config["prompts_uri"].format(root=root)
    training = {"steps": 100, "batch_size": 4, "held_out_pairs": other.get("held_out_pairs", 0)}
    evaluation = {
        "prompts_uri": f"{root}/prompts.txt",
        "num_prompts": 2,
        "scorers": other.get("scorers", ["match", "taste"]),
    }
    body = steady.job_body(validation=config, training=training, evaluation=evaluation)
    status = 404 if message.endswith("does not exist") else 400
    refused(
        steady, JOBS, body, status, f"validation.{field}", f"validation.{field}: {message.format(root=root)}"
    )
    assert steady.get(JOBS)["data"] == []


EVALUATIONS = "/v1/evaluations"


def test_an_evaluation_of_an_unknown_model_names_which(steady):
    for number, models in enumerate((["nobody", "shapes"], ["shapes", "nobody"])):
        message = f'models.{number}: model "nobody" does not exist'
        body = steady.evaluation_body(models=models)
        refused(steady, EVALUATIONS, body, 404, f"models.{number}", message)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (
            {"models": ["shapes"]},
            "models",
            'models: List should have at least 2 items after validation, not 1, got ["shapes"]',
        ),
        ({"models": ["shapes", "shapes"]}, "models", 'models: must have different names, got "shapes" twice'),
        (
            {"models": ["shapes", {"name": "shapes", "images_uri": "/x"}]},
            "models",
            'models: must have different names, got "shapes" twice',
        ),
        (
            {"models": [{"name": name, "images_uri": "/x"} for name in "ab"]},
            "models",
            'models: at least one must be a registered model, got the folders of images "a", "b"',
        ),
        ({"base": "nobody"}, "base", 'base: must be one of the models "shapes", "rival", got "nobody"'),
        (
            {"models": ["shapes", 3]},
            "models.1",
            "models.1: must be the name or id of a model, or an object with name and images_uri or model, "
            "got 3",
        ),
        ({"models": ["shapes", {"name": "x"}]}, "models.1.images_uri", "models.1.images_uri: Field required"),
        (
            {"models": ["shapes", {"name": "shapes", "model": "rival"}]},
            "models",
            'models: must have different names, got "shapes" twice',
        ),
        (
            {"models": ["shapes", {"name": "x", "model": "rival", "images_uri": "/x"}]},
            "models.1.images_uri",
            'models.1.images_uri: Extra inputs are not permitted, got "/x"',
        ),
        (
            {"models": ["shapes", {"name": "x", "model": "rival"}], "base": "rival"},
            "base",
            'base: must be one of the models "shapes", "x", got "rival"',
        ),
        (
            {"models": ["shapes", {"name": "a b", "images_uri": "/x"}]},
            "models.1.name",
            "models.1.name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$', got \"a b\"",
        ),
        (
            {"images_per_prompt": 65},
            "images_per_prompt",
            "images_per_prompt: Input should be less than or equal to 64, got 65",
        ),
        (
            {"images_per_prompt": 0},
            "images_per_prompt",
            "images_per_prompt: Input should be greater than or equal to 1, got 0",
        ),
        (
            {"scorers": ["match", "taste", "match"]},
            "scorers",
            "scorers: must not repeat, got ['match', 'taste', 'match']",
        ),
        (
            {"model": "shapes"},
            "model",
            'model: Extra inputs are not permitted, got "shapes"',
        ),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_by_name(steady, body, param, message):
    before = len(steady.get(EVALUATIONS)["data"])
    refused(steady, EVALUATIONS, steady.evaluation_body(**body), 400, param, message)
    assert len(steady.get(EVALUATIONS)["data"]) == before


def test_one_model_by_its_name_and_its_id_is_one_model(steady):
    body = steady.evaluation_body(models=["shapes", steady.get("/v1/models/shapes")["version"]])
    message = 'models: must have different names, got "shapes" twice'
    refused(steady, EVALUATIONS, body, 400, "models", message)


def test_models_whose_images_differ_in_size_are_refused_unless_the_request_sets_one(plane):
    write_base(plane.root / "wide")
    change(plane.root / "wide", "unet/config.json", sample_size=16)
    plane.post("/v1/models", {"name": "wide", "uri": str(plane.root / "wide")})
    body = plane.evaluation_body(models=["shapes", "wide"], scorers=[])
    message = (
        "models: images must have one size, got 16x16 px of shapes and 32x32 px of wide: "
        "set sample.height and sample.width"
    )
    refused(plane, EVALUATIONS, body, 400, "models", message)
    plane.post(EVALUATIONS, body | {"sample": {"height": 32, "width": 32}})


def test_images_drawn_elsewhere_are_proven_before_the_evaluation_is_created(plane):
    folder = plane.root / "elsewhere"
    compared = ["shapes", {"name": "elsewhere", "images_uri": str(folder)}]
    body = plane.evaluation_body(models=compared, images_per_prompt=2, scorers=[])

    def post(message, status=400):
        refused(plane, EVALUATIONS, body, status, "models.1", f"models.1: images of elsewhere: {message}")

    post(f"{str(folder)!r} is no folder", 404)
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "00000-0.png")
    post(f"{str(folder)!r} lacks 3 of 4 images, the first is 00000-1.png")
    for name in ("00000-1", "00001-0", "00001-1"):
        Image.new("RGB", (16, 16)).save(folder / f"{name}.png")
    (folder / "00001-0.png").write_bytes(b"no image")
    post(f"{str(folder)!r} 00001-0.png is no image: UnidentifiedImageError")
    Image.new("RGB", (24, 16)).save(folder / "00001-0.png")
    post(f"{str(folder)!r} must have one size, got 16x16 px in 00000-0.png and 24x16 px in 00001-0.png")
    Image.new("RGB", (16, 16)).save(folder / "00001-0.png")
    made = plane.post(EVALUATIONS, body | {"base": "elsewhere"})
    assert made["base"] == "elsewhere"
    assert made["models"][1] == {"name": "elsewhere", "model": None, "images_uri": folder.as_uri()}
    plane.settle()
    assert plane.get(f"{EVALUATIONS}/{made['id']}")["status"] == "succeeded"


# ---- datasets


def test_datasets_that_are_not_there_or_not_parquet_are_refused(steady):
    def post(uri, message, status=400):
        return refused(steady, "/v1/datasets", {"name": "d", "uri": str(uri)}, status, "uri", message)

    (steady.root / "empty").mkdir()
    (steady.root / "text.parquet").write_text("not parquet at all")
    post(steady.root / "nowhere", f"uri '{steady.root}/nowhere' does not exist", 404)
    post(steady.root / "empty", f"uri '{steady.root}/empty' holds no files")
    post(steady.root / "text.parquet", f"uri '{steady.root}/text.parquet' is a text file")
    post("gopher://x", "uri 'gopher://x' cannot be opened")
    refused(
        steady, "/v1/datasets", {"name": "d", "uri": "a\0b"}, 400, "uri", "uri: String should match pattern"
    )


def test_a_parquet_file_that_breaks_half_way_is_refused(steady):
    folder = write_pairs(steady.root / "torn")
    path = steady.root / "torn" / "0.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * (len(content) - 4000) + content[len(content) - 3996 :])
    answer = steady.http.post("/v1/datasets", json={"name": "d", "uri": folder})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "uri")


def test_missing_columns_are_all_named_and_wrong_types_too(steady):
    missing = write_pairs(steady.root / "missing", caption=None, label_1=None)
    found = "jpg_0, jpg_1, label_0, image_0_uid, image_1_uid"
    message = f"uri '{missing}' lacks the columns label_1, caption; found: {found}"
    refused(steady, "/v1/datasets", {"name": "d", "uri": missing}, 400, "uri", message)
    wrong = write_pairs(steady.root / "wrong", label_0=pa.array(["1"] * 10))
    message = f"column label_0 of '{wrong}' has the wrong type string"
    refused(steady, "/v1/datasets", {"name": "d", "uri": wrong}, 400, "uri", message)


def test_a_job_on_more_bad_rows_than_it_allows_is_refused_before_anything_is_spent(steady):
    captions = pa.array(["a\0b", "", *["a red circle"] * 8])
    dataset = steady.post(
        "/v1/datasets", {"name": "bad", "uri": write_pairs(steady.root / "bad", caption=captions)}
    )
    body = steady.job_body(dataset=dataset["id"])
    causes = "(caption_missing 1, caption_null_byte 1)"
    message = f"2 of 10 rows are bad {causes}: more than data.max_bad_fraction = 0.01 allows"
    refused(steady, "/v1/alignment/jobs", body, 400, "data.max_bad_fraction", message)
    steady.post("/v1/alignment/jobs", body | {"data": {"max_bad_fraction": 0.2}})


@pytest.mark.parametrize("path", ["/v1/datasets", "/v1/datasets/validate"])
def test_columns_that_cannot_be_mapped_are_refused(steady, path):
    def post(columns, param, message):
        name = {"name": "d"} if path == "/v1/datasets" else {}
        refused(steady, path, {"uri": uri, "columns": columns, **name}, 400, param, message)

    uri = write_pairs(steady.root / "mapped")
    post(
        {"caption": "prompt"},
        "columns",
        f"columns.caption: uri '{uri}' has no column 'prompt'; found: jpg_0, jpg_1",
    )
    post(
        {"capption": "caption"},
        "columns.capption.[key]",
        "columns.capption.[key]: Input should be 'caption', 'jpg_0'",
    )
    post({"caption": 3}, "columns.caption", "columns.caption: Input should be a valid string, got 3")


def test_what_cannot_be_registered_cannot_be_validated_either(steady):
    refused(steady, "/v1/datasets/validate", {"uri": str(steady.root / "nowhere")}, 404, "uri", "uri '")
    refused(
        steady,
        "/v1/datasets/validate",
        {"uri": "a", "name": "d"},
        400,
        "name",
        "name: Extra inputs are not permitted",
    )
    refused(steady, "/v1/datasets/validate", {}, 400, "uri", "uri: Field required")


def test_a_dataset_without_a_decided_pair_is_refused(steady):
    ties = write_pairs(steady.root / "ties", has_label=pa.array([False] * 10))
    message = f"uri '{ties}' has no decided pair: 10 rows, 0 ties, 10 without a label"
    refused(steady, "/v1/datasets", {"name": "d", "uri": ties}, 400, "uri", message)


# ---- models


def test_models_that_are_no_pipeline_of_their_family_are_refused(plane):
    def post(param, message, **body):
        refused(plane, "/v1/models", {"name": "other", "uri": base} | body, 400, param, message)

    base = write_base(plane.root / "base")
    post("family", "family: Input should be 'sd15' or 'sdxl', got \"flux\"", family="flux")
    post("family", f"family: model_index.json of '{base}' says 'sd15', got 'sdxl'", family="sdxl")
    weights = plane.root / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    post("uri", f"uri '{base}' cannot be aligned: unet lacks unet/diffusion_pytorch_model.safetensors")
    write_base(plane.root / "base")
    post(
        "uri",
        f"uri '{plane.root}' is not a diffusers folder that can be aligned: it has no model_index.json",
        uri=str(plane.root),
    )
    other_kind = plane.root / "flux"
    other_kind.mkdir()
    (other_kind / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    unusable = f"uri '{other_kind}' is not a diffusers folder that can be aligned"
    message = f"{unusable}: pipeline 'FluxPipeline' is not supported yet"
    post("uri", message, uri=str(other_kind))
    scheduler = plane.root / "base" / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"num_train_timesteps": 1000, "prediction_type": "flow_prediction"}')
    post(
        "uri",
        f"uri '{base}' cannot be aligned: prediction_type must be one of epsilon, v_prediction, got 'flow_p",
    )
    scheduler.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}')
    post(
        "uri",
        f"uri '{base}' cannot be aligned: _class_name is of flow matching, which is not supported yet, "
        "got 'FlowMatch",
    )
    cosine = {
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.1,
        "beta_end": 0.2,
    }
    scheduler.write_text(json.dumps(cosine))
    post(
        "uri",
        f"uri '{base}' cannot be aligned: beta_schedule must be one of scaled_linear, linear, "
        "got 'squaredcos",
    )
    scheduler.write_text("[]")
    no_object = "scheduler/scheduler_config.json must hold a JSON object, got a list"
    post("uri", f"uri '{base}' cannot be aligned: {no_object}")
    scheduler.write_text("{")
    post("uri", f"uri '{base}' cannot be aligned: scheduler/scheduler_config.json is not JSON")
    scheduler.write_text("{}")
    post(
        "uri",
        f"uri '{base}' cannot be aligned: num_train_timesteps must be in the scheduler's config, got None",
    )
    write_base(plane.root / "base")
    unet = plane.root / "base" / "unet"
    (unet / "config.json").write_text('{"in_channels": 9}')
    post("uri", f"uri '{base}' cannot be aligned: unet.in_channels must be out_channels = 4")
    (unet / "config.json").write_text('{"addition_embed_type": "text_time"}')
    post(
        "uri",
        f"uri '{base}' cannot be aligned: unet.addition_embed_type must be None in a sd15 model, "
        "got 'text_time'",
    )
    write_base(plane.root / "base")
    post("name", "name: is taken by model_", name="shapes")
    post("name", "name: must not have the form of an id", name="model_" + "a" * 24)
    plane.job(name="later")
    post("name", "name: is taken by ajob_", name="later")
    for content in ("[]", "3", "nonsense", '{"unet": 3}'):
        (plane.root / "base" / "model_index.json").write_text(content)
        assert plane.error("/v1/models", {"name": "other", "uri": base})["param"] in ("uri", "family")


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.mark.parametrize("method", ["dde", "dde_single"])
def test_an_infinite_weight_at_zero_terminal_snr_is_refused_naming_both_ways_out(plane, method):
    base = write_base(plane.root / "zero")
    change(Path(base), "scheduler/scheduler_config.json", **ZERO_SNR)
    plane.post("/v1/models", {"name": "zero", "uri": base})
    for objective in ({}, {"t_max": 1000}):
        body = plane.job_body(model="zero", objective={"method": method, **objective})
        message = "objective.max_weight: must be greater than 0, or t_max at most 999: "
        refused(plane, JOBS, body, 400, "objective.max_weight", message)
    for objective in ({"max_weight": 100.0}, {"t_max": 999}):
        plane.job(model="zero", objective={"method": method, **objective})
    plane.job(model="zero", objective={"method": "uniform"})


def test_a_model_whose_weights_are_a_variant_has_it_in_its_lineage(plane):
    base = Path(write_base(plane.root / "half"))
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    model = plane.post("/v1/models", {"name": "half", "uri": str(base)})
    assert model["lineage"] == {"weights": {"unet": "variant fp16, loaded as float32"}}
    assert plane.get("/v1/models/half") == model


# ---- paths, queries and what nobody expected


@pytest.mark.parametrize(
    "path",
    [
        "/v1/datasets/x",
        "/v1/models/ds_" + "0" * 24,
        JOBS + "/%00",
        JOBS + "/ajob_" + "0" * 24 + "/events",
        "/v1/evaluations/x",
    ],
)
def test_an_unknown_id_is_a_404(steady, path):
    assert steady.get(path, 404)["error"]["code"].endswith("_not_found")


def test_an_id_of_another_kind_is_a_404(plane):
    plane.get(f"/v1/evaluations/{plane.job()['id']}", 404)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            "&".join(f"metadata[k{number}]=v" for number in range(17)),
            "metadata: Dictionary should have at most 16 items after validation, not more",
        ),
        ("metadata[a]=1&metadata[a]=2", 'metadata[a]: is given twice, got "2"'),
        ("metadata.a=1", 'metadata: must have the form metadata[key]=value, got "metadata.a"'),
        (f"metadata[{'k' * 65}]=v", f"metadata.{'k' * 65}.[key]: String should have at most 64 characters"),
        ("limit=0", 'limit: Input should be greater than or equal to 1, got "0"'),
        ("limit=101", 'limit: Input should be less than or equal to 100, got "101"'),
        ("limit=ten", "limit: Input should be a valid integer"),
        ("status=done", "status: Input should be 'validating',"),
        ("metadata[a]=%00", "metadata.a: String should match pattern"),
    ],
)
def test_bad_queries_are_refused(steady, query, message):
    assert steady.get(f"{JOBS}?{query}", 400)["error"]["message"].startswith(message)


@pytest.mark.parametrize("after", ["x", "ajob_" + "0" * 24, "ds_" + "0" * 24, "%00"])
def test_a_page_after_an_unknown_id_is_a_404(steady, after):
    for path in (JOBS, "/v1/datasets", "/v1/models", "/v1/evaluations"):
        assert steady.get(f"{path}?after={after}", 404)["error"]["param"] == "after"


def test_sixteen_metadata_filters_are_as_many_as_a_job_may_have(plane):
    metadata = {f"k{number}": "v" for number in range(16)}
    job = plane.job(metadata=metadata)
    query = "&".join(f"metadata[{key}]={value}" for key, value in metadata.items())
    assert [found["id"] for found in plane.get(f"{JOBS}?{query}")["data"]] == [job["id"]]


def test_text_that_no_database_keeps_is_refused_and_not_looked_up(each_plane):
    plane = each_plane
    plane.get(f"{JOBS}?metadata[a]=%00", 400)
    plane.get(f"{JOBS}/%00", 404)
    plane.get("/v1/models/%00", 404)
    for body in (plane.job_body(model="\0"), plane.job_body(dataset="\0")):
        plane.post(JOBS, body, 404)


def test_unknown_urls_and_methods_have_the_error_body_too(steady):
    assert steady.get("/v1/nothing", 404)["error"]["message"] == "Not Found: GET /v1/nothing"
    answer = steady.http.put("/v1/datasets")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/datasets", "GET, POST"),
        ("/v1/datasets/ds_0", "DELETE, GET"),
        ("/v1/models/shapes", "DELETE, GET"),
        ("/v1/alignment/jobs/x/cancel", "POST"),
        ("/healthz", "GET"),
    ],
)
def test_a_405_lists_every_method_of_the_url(steady, path, methods):
    answer = steady.http.patch(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, methods)


def test_an_unexpected_error_is_a_500_without_a_traceback(plane, monkeypatch):
    monkeypatch.setattr(plane.http.app.state.database, "read", lambda: 1 / 0)
    answer = plane.http.get("/v1/models", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"] == {
        "message": "internal error; find mine in the server's log",
        "type": "server_error",
        "param": None,
        "code": "server_error",
    }
