"""The `dde` command against a real HTTP server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
from fastapi.responses import Response

from services.api.records import DatasetCounts
from services.api.requests import AlignmentJobCreate
from services.client.processes import free_ports
from services.client.tables import counts_line
from tests.services.client.conftest import (
    EVALUATED,
    KEY,
    PNG,
    SCORES,
    ScriptedServer,
    evaluation,
    job,
    key,
    model,
    scorer,
)

ROOT = Path(__file__).parents[3]
JOBS = "/v1/alignment/jobs"
PAIR = ("jpg_0", "jpg_1", "label_0", "label_1")
REPORT = {
    "uri": "s3://b/pairs",
    "format": "parquet",
    "shape": "pair",
    "columns": {"caption": "prompt", **{name: name for name in PAIR}},
    "split": "train",
    "columns_not_read": ["user_id"],
    "files_not_read": {".md": 1, ".npz": 2_000},
    "parts_missing": 3,
    "rows": 959_040,
    "sampled": {"rows": 256, "decided": 200, "tie": 50, "missing": 0, "bad": 6},
    "pairs": {"pairs": 200, "soft": 90, "duplicates": 3, "contradicting": 4, "long_captions": 0},
    "bad": {
        "image_broken": {"count": 6, "examples": [{"row": "a.parquet:0:7", "detail": "picture 1: OSError"}]}
    },
    "example": {"row": "a.parquet:0:3", "chosen": "a.png", "rejected": "b.png", "caption": "a cat"},
    "pictures": {"count": 400, "min_px": 512, "median_px": 768, "max_px": 1024, "transparent": 7},
    "made_by_a_newer_server": 1,
}


def the_body(server: ScriptedServer, path: str = JOBS) -> dict:
    ((_, _, body),) = server.sent("POST", path)
    return body


def test_an_error_of_the_server_is_one_line_with_field_and_value(server, dde) -> None:
    server.fail(400, "uri 'file:///m' is not a diffusers folder", param="uri")
    result = dde("models", "create", "shapes", "/m")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: uri 'file:///m' is not a diffusers folder\n"


def test_an_error_that_does_not_name_its_field_is_led_by_it(server, dde) -> None:
    server.fail(400, "is taken", param="name")
    assert dde("models", "create", "shapes", "/m").stderr == "error: name: is taken\n"


def test_a_wrong_value_is_refused_before_anything_is_sent(server, dde) -> None:
    result = dde(
        "jobs", "create", "--model", "m", "--dataset", "d", "--prompts", "p.txt", "--steps", -5, "--beta", 0
    )
    assert result.exit_code == 1
    assert "training.steps: Input should be greater than 0, got -5" in result.stderr
    assert "objective.beta: Input should be greater than 0, got 0.0" in result.stderr
    assert result.stderr.count("\n") == 1
    assert server.requests == []


def test_wrong_usage_has_exit_code_2(dde) -> None:
    assert dde("generate", "model").exit_code == 2
    assert dde("generate", "model", "prompt", "-n", 99).exit_code == 2
    assert dde("jobs", "create", "no-such-file.json").exit_code == 2


def test_without_a_key_the_key_file_is_named(dde, tmp_path) -> None:
    result = dde("jobs", "list", DDE_API_KEY="")
    assert result.exit_code == 1
    assert f"there is no key file {tmp_path / 'home' / 'key'}" in result.stderr


def test_the_state_folder_provides_address_and_key(server, dde, tmp_path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "key").write_text(KEY + "\n")
    (home / "url").write_text(server.url + "\n")
    result = dde("jobs", "list", DDE_API_KEY="", DDE_URL="")
    assert result.exit_code == 0, result.stderr
    assert server.sent("GET", JOBS)[0][0]["authorization"] == f"Bearer {KEY}"


def test_an_unreachable_server_is_reported_in_one_line(dde, monkeypatch) -> None:
    monkeypatch.setattr("services.client.api.LONGEST_PAUSE_S", 0.0)
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    result = dde("models", "list", DDE_URL=url)
    assert result.exit_code == 1
    assert (
        result.stderr.startswith(f"error: url: {url} does not answer")
        or f"{url} does not answer" in result.stderr
    )
    assert result.stderr.count("\n") == 1


def test_a_job_comes_from_a_file_and_options_override_it(server, dde, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = dde(
        "jobs",
        "create",
        ROOT / "deploy" / "demo.json",
        "--dataset",
        "ds_1",
        "--prompts",
        "p.txt",
        "--steps",
        7,
    )
    assert (result.exit_code, result.stdout) == (0, "new_1\n"), result.stderr
    body = the_body(server)
    file = json.loads((ROOT / "deploy" / "demo.json").read_text())
    AlignmentJobCreate.model_validate_json(json.dumps(body))
    assert body["training"]["steps"] == 7
    assert body["training"]["batch_size"] == file["training"]["batch_size"]
    assert body["evaluation"]["prompts_uri"] == (tmp_path / "p.txt").as_uri()
    assert body["evaluation"]["sample"] | file["evaluation"]["sample"] == body["evaluation"]["sample"]
    assert body["workers"] == file["workers"]


def test_a_job_file_may_be_yaml(server, dde, tmp_path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: m\ndataset: d\nobjective: {beta: 500}\n"
        "evaluation: {prompts_uri: 's3://b/p.txt', num_prompts: 5}\n"
    )
    assert dde("jobs", "create", file).exit_code == 0
    body = the_body(server)
    assert (body["objective"]["beta"], body["evaluation"]["prompts_uri"]) == (500, "s3://b/p.txt")


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "must hold an object, got list"), ("a: [", "is neither JSON nor YAML")]
)
def test_a_file_that_holds_no_job_is_named(dde, tmp_path, text, message) -> None:
    file = tmp_path / "job.json"
    file.write_text(text)
    result = dde("jobs", "create", file)
    assert result.exit_code == 1
    assert message in result.stderr
    assert str(file) in result.stderr
    assert result.stderr.count("\n") == 1


def test_lists_are_tab_separated_where_stdout_is_no_terminal(server, dde) -> None:
    waiting = {"position": 3, "reason": "slots", "since": 0, "message": "8 of 8 jobs are active"}
    server.items[JOBS] = [job("succeeded", waiting=waiting), job("failed", stage="train")]
    result = dde("jobs", "list", "--status", "failed")
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[:4] for line in lines[1:]] == [
        ["ajob_1", "succeeded", "", "better"],
        ["ajob_1", "failed", "train", "better"],
    ]
    assert lines[1][5].endswith(" min, place 3: 8 of 8 jobs are active")
    assert server.sent("GET", JOBS)[0][1]["status"] == "failed"


@pytest.mark.parametrize(("option", "sent"), [("2", 2), ("1-4", [1, 4])])
def test_workers_are_a_number_or_the_least_and_the_most(server, dde, option, sent) -> None:
    demo = ("jobs", "create", ROOT / "deploy" / "demo.json", "--dataset", "ds_1", "--prompts", "p.txt")
    result = dde(*demo, "--workers", option, "--reference", "ledger")
    assert result.exit_code == 0, result.stderr
    assert (the_body(server)["workers"], the_body(server)["training"]["reference"]) == (sent, "ledger")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        *(
            (option, f"--workers must be a number, or LEAST-MOST, as in 1-4, got {option!r}")
            for option in ("x", "1-2-3", "-4", "1-")
        ),
        ("4-1", "workers: must be a number from 1 to 1024, or two of them as [least, most], got [4, 1]"),
    ],
)
def test_workers_that_are_neither_are_refused_before_anything_is_sent(server, dde, option, message) -> None:
    result = dde(
        "jobs",
        "create",
        ROOT / "deploy" / "demo.json",
        "--dataset",
        "d",
        "--prompts",
        "p",
        f"--workers={option}",
    )
    assert (result.exit_code, result.stderr) == (1, f"error: {message}\n")
    assert server.requests == []


def test_prompts_of_validation_may_be_a_path(server, dde, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.yaml"
    validation = "{every: 50, num_prompts: 4, prompts_uri: v.txt}"
    file.write_text(f"model: m\ndataset: d\nevaluation: {{prompts_uri: p.txt}}\nvalidation: {validation}\n")
    assert dde("jobs", "create", file).exit_code == 0
    assert the_body(server)["validation"]["prompts_uri"] == (tmp_path / "v.txt").as_uri()


def test_pause_and_resume_print_the_status(server, dde) -> None:
    server.single[f"{JOBS}/ajob_1/pause"] = deque([job("running", pause_requested_at=5)])
    server.single[f"{JOBS}/ajob_1/resume"] = deque([job("queued", pause_requested_at=None)])
    assert dde("jobs", "pause", "ajob_1").stdout == "pausing\n"
    assert dde("jobs", "resume", "ajob_1").stdout == "queued\n"
    server.fail(409, "job ajob_1 has ended already: it is failed", param="id", code="job_failed")
    assert dde("jobs", "pause", "ajob_1").stderr == "error: id: job ajob_1 has ended already: it is failed\n"


@pytest.mark.parametrize(
    ("stage", "resumed_from"), [("train", "its last checkpoint"), ("evaluate", "stage evaluate")]
)
def test_watching_a_job_that_fails_ends_with_how_to_resume_it(server, dde, stage, resumed_from) -> None:
    server.single[f"{JOBS}/ajob_1"] = deque(
        [job("failed", stage=stage, reason={"code": "x", "message": "the disk is full", "param": None})]
    )
    result = dde("jobs", "watch", "ajob_1")
    advice = f"fix the cause, then continue from {resumed_from} with `dde jobs resume ajob_1`"
    assert (result.exit_code, result.stderr) == (1, f"error: ajob_1 failed: the disk is full; {advice}\n")


@pytest.mark.parametrize("other", [{"status": "cancelled", "stage": "train"}, {"status": "failed"}])
def test_a_job_that_was_canceled_or_never_started_shows_no_way_to_resume(server, dde, other) -> None:
    server.single[f"{JOBS}/ajob_1"] = deque([job(**other)])
    assert dde("jobs", "watch", "ajob_1").stderr == f"error: ajob_1 {other['status']}\n"


def test_checkpoints_are_listed_with_what_validation_measured(server, dde) -> None:
    record = {
        "object": "alignment.job.checkpoint",
        "pairs_seen": 640,
        "images_seen": 1280,
        "bytes": 26_400_000,
        "workers": 2,
    }
    plain = {**record, "created_at": 1, "metrics": {"loss": 0.5}}
    measured = {
        "step": 20,
        "metrics": {"held_out_accuracy": 0.75, "taste": 0.5},
        "picture": None,
        "seconds": 1.0,
        "error": None,
    }
    broken = {**measured, "step": 30, "metrics": {}, "error": "the scorer's node is gone"}
    server.items[f"{JOBS}/ajob_1/checkpoints"] = [
        {**plain, "step": step, "uri": f"s3://b/{step}", "validation": validation}
        for step, validation in ((10, None), (20, measured), (30, broken))
    ]
    lines = [line.split("\t") for line in dde("jobs", "checkpoints", "ajob_1").stdout.splitlines()]
    assert [line[:6] for line in lines] == [
        ["step", "images", "MB", "workers", "validation", "uri"],
        ["10", "1280", "26.4", "2", "", "s3://b/10"],
        ["20", "1280", "26.4", "2", "held_out_accuracy=0.7500 taste=0.5000", "s3://b/20"],
        ["30", "1280", "26.4", "2", "the scorer's node is gone", "s3://b/30"],
    ]


def test_a_dataset_is_registered_by_path(server, dde, tmp_path) -> None:
    assert dde("datasets", "create", "pairs", tmp_path / "pairs.parquet").stdout == "new_1\n"
    uri = (tmp_path / "pairs.parquet").as_uri()
    assert the_body(server, "/v1/datasets") == {"name": "pairs", "uri": uri, "columns": {}}


def test_columns_are_mapped_by_options(server, dde) -> None:
    mapped = ("--column", "caption=prompt", "--column", "jpg_0=a=b")
    assert dde("datasets", "create", "pairs", "s3://b/pairs", *mapped).exit_code == 0
    assert the_body(server, "/v1/datasets")["columns"] == {"caption": "prompt", "jpg_0": "a=b"}


def test_a_column_is_left_out_and_a_split_chosen_by_options(server, dde) -> None:
    options = ("--column", "image_0_uid=", "--split", "train")
    assert dde("datasets", "create", "pairs", "s3://b/pairs", *options).exit_code == 0
    body = the_body(server, "/v1/datasets")
    assert (body["columns"], body["split"]) == ({"image_0_uid": ""}, "train")
    server.single["/v1/datasets/validate"] = deque([REPORT])
    assert dde("datasets", "validate", "s3://b/pairs", *options).exit_code == 0
    assert the_body(server, "/v1/datasets/validate")["split"] == "train"


@pytest.mark.parametrize("option", ["caption", "=prompt", "="])
def test_a_column_without_a_name_is_refused_before_anything_is_sent(option, server, dde) -> None:
    result = dde("datasets", "create", "pairs", "s3://b/pairs", "--column", option)
    assert result.stderr == f"error: --column must be NAME=COLUMN, as in caption=prompt, got {option!r}\n"
    assert (
        "columns.kaption" in dde("datasets", "validate", "s3://b/pairs", "--column", "kaption=prompt").stderr
    )
    assert server.requests == []


def test_the_line_of_a_registered_dataset_names_what_is_odd_about_its_pairs_and_nothing_else() -> None:
    counts = DatasetCounts(rows=9, pairs=7, ties=1, missing=1)
    plain = "9 rows: 7 pairs, 1 ties, 1 without a label"
    assert counts_line(counts) == plain
    none_odd = {"soft": 0, "duplicates": 0, "contradicting": 0, "long_captions": 0}
    assert counts_line(counts.model_copy(update=none_odd)) == plain
    odd = counts.model_copy(update=none_odd | {"duplicates": 2, "long_captions": 5})
    assert counts_line(odd) == plain.replace(
        "7 pairs", "7 pairs (2 duplicate; 5 with a caption beyond CLIP's 77 tokens)"
    )


def test_a_report_on_a_dataset_shows_columns_rows_and_bad_rows(server, dde) -> None:
    server.single["/v1/datasets/validate"] = deque([REPORT])
    lines = dde("datasets", "validate", "s3://b/pairs", "--column", "caption=prompt").stdout.splitlines()
    assert the_body(server, "/v1/datasets/validate") == {
        "uri": "s3://b/pairs",
        "columns": {"caption": "prompt"},
    }
    assert [line.split("\t") for line in lines] == [
        ["fact", "s3://b/pairs"],
        ["rows", "959,040; parquet, one pair a row"],
        ["columns", "caption = prompt, jpg_0, jpg_1, label_0, label_1"],
        ["columns not read", "user_id"],
        ["split", "train"],
        ["files not read", "1 .md, 2,000 .npz"],
        ["parts missing", "3, by the names of the files"],
        ["sample", "256 rows, 200 decided, 50 tie, 0 missing, 6 bad"],
        [
            "pairs",
            "200: 90 soft, trained on as 1 and 0 unless objective.label is soft; 3 duplicate; "
            "4 contradicted; 0 with a caption beyond CLIP's 77 tokens",
        ],
        ["transparent", "7 of 400 images"],
        ["shorter sides, px", "512 / 768 / 1024 (smallest / median / largest)"],
        ["for example", 'a.png is preferred to b.png for "a cat" (a.parquet:0:3)'],
        ["bad", "rows", "for example", "detail"],
        ["image_broken", "6", "a.parquet:0:7", "picture 1: OSError"],
    ]


def test_images_are_written_as_files_named_by_seed(server, dde, tmp_path) -> None:
    result = dde("generate", "better", "a red star", "-n", 2, "--seed", 5, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["better-5.png", "better-6.png"]
    assert (tmp_path / "out" / "better-6.png").read_bytes() == PNG
    assert result.stdout.splitlines()[1] == f"{tmp_path / 'out' / 'better-6.png'} seed 6"
    assert result.stderr.strip() == "no safety checker: images are not checked"


def test_images_are_requested_with_sampler_negative_prompt_format_and_no_seed(server, dde, tmp_path) -> None:
    options = ("--sampler", "euler_a", "--negative", "text", "--format", "webp", "--out", tmp_path)
    result = dde("generate", "better@production", "a red star", *options)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "better@production-5.webp").read_bytes() == PNG
    body = the_body(server, "/v1/images/generations")
    assert (body["sampler"], body["negative_prompt"], body["output_format"]) == ("euler_a", "text", "webp")
    assert (body["num_inference_steps"], "seed" in body) == (25, False)
    refused = dde("generate", "better", "a red star", "--sampler", "heun")
    assert refused.exit_code == 1
    assert "sampler: Input should be 'ddim'" in refused.stderr


def test_an_evaluation_ends_in_a_table(server, dde) -> None:
    server.single["/v1/evaluations/new_1"] = deque([evaluation("succeeded", result=EVALUATED)])
    result = dde("evaluate", "shapes", "better", "--prompts", "s3://b/p.txt", "--num-prompts", 200)
    assert result.exit_code == 0, result.stderr
    assert "0.640 [0.571, 0.703]" in result.stdout
    assert "+0.100 [+0.050, +0.150]" in result.stdout
    body = the_body(server, "/v1/evaluations")
    assert (body["num_prompts"], body["images_per_prompt"]) == (200, 1)
    assert (body["models"], "base" in body) == (["shapes", "better"], False)


def test_an_evaluation_of_several_models_has_a_table_for_each_candidate(server, dde, tmp_path) -> None:
    models = [{"name": name, "model": "model_1"} for name in ("better", "shapes", "best")]
    scores = {"taste": {"better": SCORES, "best": {**SCORES, "candidate": 0.7}}}
    ended = evaluation(
        "succeeded", models=models, result={**EVALUATED, "scores": scores, "images_per_prompt": 4}
    )
    server.single["/v1/evaluations/new_1"] = deque([ended])
    command = (
        "evaluate",
        "better",
        "shapes",
        f"best={tmp_path}",
        "--base",
        "shapes",
        "--prompts",
        "s3://b/p",
    )
    result = dde(*command, "--images-per-prompt", 4)
    assert result.exit_code == 0, result.stderr
    for name in ("better", "best"):
        assert f"{name} against shapes, 200 held-out prompts x 4 images" in result.stdout
    body = the_body(server, "/v1/evaluations")
    folder = {"name": "best", "images_uri": tmp_path.as_uri()}
    assert (body["models"], body["base"]) == (["better", "shapes", folder], "shapes")
    assert body["images_per_prompt"] == 4


def test_a_failed_evaluation_prints_its_reason(server, dde) -> None:
    reason = {"code": "DataError", "message": "12 prompts, 200 requested", "param": "num_prompts"}
    server.single["/v1/evaluations/new_1"] = deque([evaluation("failed", reason=reason)])
    result = dde("evaluate", "shapes", "better", "--prompts", "s3://b/p.txt")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: new_1 failed: num_prompts: 12 prompts, 200 requested\n",
    )


def test_importing_the_command_loads_neither_torch_nor_ray() -> None:
    heavy = {"torch", "ray", "pyarrow", "diffusers"}
    code = f"import sys, services.client.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_installed_command_answers() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "dde", "--help"], capture_output=True, text=True, check=True
    )
    assert all(
        command in done.stdout
        for command in ("up", "demo", "datasets", "models", "scorers", "jobs", "generate", "evaluate")
    )


# ---- scorers


def test_a_scorer_is_registered_from_paths_and_its_id_is_printed(server, dde, tmp_path) -> None:
    made = dde("scorers", "create", "pick", "pickscore", tmp_path / "p", "--processor", "s3://b/h14")
    assert (made.exit_code, made.stdout) == (0, "new_1\n")
    assert made.stderr == "pick: pickscore, cosine, -1 to 1; digest 0123456789abcdef\n"
    body = {"name": "pick", "kind": "pickscore", "uri": (tmp_path / "p").as_uri(), "processor": "s3://b/h14"}
    assert the_body(server, "/v1/scorers") == body | {"resize": "antialiased"}


def test_an_unknown_kind_or_way_to_resize_is_one_line_that_names_it(server, dde) -> None:
    for arguments, field in ((("mps", "/c"), "kind"), (("hps", "/c", "--resize", "nearest"), "resize")):
        refused = dde("scorers", "create", "s", *arguments)
        assert refused.exit_code == 1
        assert refused.stderr.startswith(f"error: {field}: Input should be '")
    assert server.requests == []


def test_scorers_are_listed_with_their_kind_and_scale(server, dde) -> None:
    built_in = scorer(id="scorer_match", name="match", kind="match", uri=None, digest="match")
    server.items["/v1/scorers"] = [scorer(), built_in]
    columns, first, second = (line.split("\t") for line in dde("scorers", "list").stdout.splitlines())
    assert columns == ["id", "name", "kind", "of each", "scale", "digest", "uri"]
    assert first[1:] == ["pick", "pickscore", "image", "cosine, -1 to 1", "0123456789ab", "file:///c"]
    assert (second[0], second[-1]) == ("scorer_match", "built in")


def test_a_scorer_is_deleted_by_its_name_and_one_in_use_is_one_line(server, dde) -> None:
    server.single["/v1/scorers/pick"] = deque([{"id": "pick", "object": "scorer", "deleted": True}])
    assert dde("scorers", "delete", "pick").stdout == "pick is deleted\n"
    assert len(server.sent("DELETE", "/v1/scorers/pick")) == 1
    server.fail(409, "scorer 'pick' is used by the unfinished ajob_1", "id", "in_use")
    refused = dde("scorers", "delete", "pick")
    assert refused.exit_code == 1
    assert "scorer 'pick' is used by the unfinished ajob_1" in refused.stderr


# ---- keys


def test_a_new_key_is_all_that_is_printed_and_its_id_goes_to_stderr(server, dde) -> None:
    made = dde("keys", "create", "ci", "--project", "team-a", "--scope", "read", "--scope", "submit")
    assert (made.exit_code, made.stdout) == (0, "dde_secret\n")
    assert made.stderr == "new_1: project team-a, read, submit\n"
    assert the_body(server, "/v1/keys") == {"name": "ci", "project": "team-a", "scopes": ["read", "submit"]}


def test_a_new_key_has_all_scopes_but_admin_in_the_project_of_the_key_that_asks(server, dde) -> None:
    assert dde("keys", "create", "ci").exit_code == 0
    assert the_body(server, "/v1/keys") == {"name": "ci", "scopes": ["read", "submit", "generate"]}


def test_an_unknown_scope_or_project_is_one_line_that_names_it(server, dde) -> None:
    for option, value, field in (("--scope", "root", "scopes.0"), ("--project", "Team A", "project")):
        refused = dde("keys", "create", "ci", option, value)
        assert refused.exit_code == 1
        assert refused.stderr.startswith(f"error: {field}: ")
        assert repr(value) in refused.stderr
    assert server.requests == []


def test_keys_are_listed_by_how_they_end(server, dde) -> None:
    server.items["/v1/keys"] = [key(), key(id="key_2", project="team-a", revoked_at=2)]
    columns, first, second = (line.split("\t") for line in dde("keys", "list").stdout.splitlines())
    assert columns == ["id", "name", "project", "scopes", "key", "created", "revoked"]
    assert first[:5] == ["key_1", "ci", "default", "read", "...ab12"]
    assert (first[6], bool(second[6])) == ("", True)


def test_a_key_is_revoked_by_its_id(server, dde) -> None:
    server.single["/v1/keys/key_1/revoke"] = deque([key(revoked_at=2)])
    assert dde("keys", "revoke", "key_1").stdout == "key_1 is revoked\n"


def test_promote_names_the_alias_and_the_version_that_it_refers_to(server, dde) -> None:
    path = "/v1/models/model_1/promote"
    server.single[path] = deque([model(aliases=["canary"])])
    result = dde("models", "promote", "model_1", "--alias", "canary")
    assert result.stdout == "shapes@canary: model_1\n", result.stderr
    assert the_body(server, path) == {"alias": "canary"}
    server.items["/v1/models"] = [model(aliases=["canary", "production"])]
    assert "canary, production" in dde("models", "list").stdout
    assert "alias: " in dde("models", "promote", "model_1", "--alias", "A B").stderr


@pytest.mark.parametrize(
    ("run_id", "path"),
    [
        ("eval_1", "/v1/evaluations/eval_1"),
        ("ajob_1", "/v1/alignment/jobs/ajob_1"),
        ("study_1", "/v1/studies/study_1"),
    ],
)
def test_a_report_is_saved_as_a_page_or_as_data(server, dde, tmp_path, run_id, path):
    page = "<!doctype html><p>ü</p>".encode()
    server.failures.append(Response(page, media_type="text/html"))
    out = tmp_path / "report.html"
    saved = dde("evaluations", "report", run_id, "--out", out)
    assert (saved.exit_code, saved.stdout.strip()) == (0, str(out)), saved.stderr
    assert out.read_bytes() == page
    server.failures.append(Response(b'{"models": []}', media_type="application/json"))
    data = tmp_path / "report.json"
    assert dde("evaluations", "report", run_id, "--out", data).exit_code == 0
    assert data.read_bytes() == b'{"models": []}'
    assert [each[1] for each in server.requests] == [f"{path}/report", f"{path}/report.json"]


def test_a_report_that_cannot_be_saved_is_one_line_and_leaves_the_file(server, dde, tmp_path):
    out = tmp_path / "report.html"
    out.write_text("before")
    server.fail(404, "eval_1 has no page: it is running", code="report_not_found")
    failed = dde("evaluations", "report", "eval_1", "--out", out)
    assert (failed.exit_code, failed.stderr.strip()) == (1, "error: eval_1 has no page: it is running")
    assert out.read_text() == "before"
    wrong_id = dde("evaluations", "report", "ds_1", "--out", out).stderr
    assert "must be of a job, an evaluation or a study, got 'ds_1'" in wrong_id
    wrong_file = dde("evaluations", "report", "eval_1", "--out", "x.pdf").stderr
    assert "--out must end in .html or .json, got 'x.pdf'" in wrong_file
    assert len(server.requests) == 1


def test_a_model_is_compared_under_another_name_and_held_out_captions_are_no_path(server, dde):
    server.single["/v1/evaluations/new_1"] = deque([evaluation("succeeded", result=EVALUATED)])
    model = "model_0123456789abcdef01234567"
    dde("evaluate", "shapes", f"before={model}", "--prompts", "held-out:ds_1?pairs=40")
    [(_, _, body)] = server.sent("POST", "/v1/evaluations")
    assert body["models"] == ["shapes", {"name": "before", "model": model}]
    assert body["prompts_uri"] == "held-out:ds_1?pairs=40"
