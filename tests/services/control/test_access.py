"""Who may do what: every route with no key, a wrong one, another project's and one that lacks the scope.

The matrix is made from the routes: a new one is in it, and fails until it is known how to call it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select

from services.api.requests import ALL_SCOPES
from services.artifacts import models
from services.control import routers
from services.control.app import build_app
from services.control.tables import ApiKey, IdempotencyKey
from services.settings import Settings
from services.stages import layout
from services.storage import files
from tests.services.control.conftest import KEY, Plane, make_plane, write_base, write_pairs
from tests.support.scorers import write_tiny

JOBS = "/v1/alignment/jobs"
NO_KEY_NEEDED = {"/healthz", "/readyz", "/metrics", "/v1/images/files/{file_name}"}
"""The URL of a file is signed."""
CASES = ("no key", "wrong key", "other project", "missing scope")
IMAGE = {"model": "shapes", "prompt": "a red cross"}
SCORES = {"images": ["aa"], "prompts": ["p"]}


def operations() -> list[tuple[str, str, list[str]]]:
    """Method, path and scopes of every route, from the OpenAPI document."""
    document = build_app(Settings(api_key=SecretStr("-"), storage_uri="file:///nowhere")).openapi()
    return [
        (
            method.upper(),
            path,
            [scope for needed in operation.get("security", []) for scope in needed["HTTPBearer"]],
        )
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def new_key(
    plane: Plane, project: str | None = None, scopes: tuple[str, ...] = ALL_SCOPES, **headers
) -> dict:
    body = {"name": "test", "scopes": list(scopes)} | ({"project": project} if project else {})
    return plane.post("/v1/keys", body, headers=headers or None)


def new_scorer(plane: Plane, checkpoint: Path, **fields) -> dict:
    body = {"name": "aligned-with", "kind": "clip", "uri": str(checkpoint), **fields}
    return plane.post("/v1/scorers", body)


@dataclass
class World:
    """A plane whose default project has one of everything, and keys of another project, ``other``."""

    plane: Plane
    ids: dict[str, str]
    other: str

    def send(self, method: str, path: str, key: str | None):
        """Call the route on what the default project has."""
        url = re.sub(r"\{(\w+)\}", lambda match: self.ids[match[1]], path)
        headers = {} if key is None else bearer(key)
        body = self.body(path) if method == "POST" else None
        self.plane.http.headers.pop("authorization", None)
        try:
            return self.plane.http.request(method, url, headers=headers, json=body)
        finally:
            self.plane.http.headers["authorization"] = f"Bearer {KEY}"

    def body(self, path: str) -> dict[str, Any] | None:
        """A body that the route accepts from the default project; a new route must be added here."""
        if path.endswith(("/cancel", "/pause", "/resume", "/revoke")):
            return None
        root = self.plane.root
        return {
            "/v1/models/{model_id}/promote": {},
            "/v1/datasets": {"name": "mine", "uri": str(root / "pairs")},
            "/v1/datasets/validate": {"uri": str(root / "pairs")},
            "/v1/models": {"name": "own", "uri": str(root / "base")},
            "/v1/scorers": {"name": "own", "kind": "clip", "uri": str(root / "clip")},
            JOBS: self.plane.job_body(dataset=self.ids["dataset_id"]),
            "/v1/evaluations": self.plane.evaluation_body(),
            "/v1/studies": self.study_body(),
            "/v1/images/generations": IMAGE,
            "/v1/scores": SCORES,
            "/v1/keys": {"name": "taken-over", "project": "default"},
        }[path]

    def study_body(self) -> dict[str, Any]:
        evaluation = {"prompts_uri": str(self.plane.root / "prompts.txt"), "num_prompts": 2}
        base = self.plane.job_body(dataset=self.ids["dataset_id"])
        grid = {"training.seed": [0, 1]}
        return {"name": "study", "base": base, "grid": grid, "evaluation": evaluation}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("access")
    for plane in make_plane(folder, f"sqlite:///{folder}/dde.db"):
        job = plane.job()
        ids = {
            "dataset_id": plane.dataset["id"],
            "model_id": plane.get("/v1/models/shapes")["id"],
            "job_id": job["id"],
            "evaluation_id": plane.post("/v1/evaluations", plane.evaluation_body())["id"],
            "scorer_id": new_scorer(plane, write_tiny("clip", folder)[0])["id"],
            "key_id": new_key(plane)["id"],
            "file_name": "img_0-0.png?project=default&expires=1&signature=x",
        }
        world = World(plane, ids, new_key(plane, "other")["key"])
        ids["study_id"] = plane.post("/v1/studies", world.study_body())["id"]
        yield world


REFERS = {JOBS, "/v1/evaluations", "/v1/studies", "/v1/images/generations"}
"""Creates whose body names a model or a dataset of the default project."""
OWN = {"/v1/datasets", "/v1/datasets/validate", "/v1/models", "/v1/scorers", "/v1/scores"}
"""Creates whose body names nothing of a project: the other project does it for itself."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("method", "path", "scopes"), operations(), ids=lambda each: each if isinstance(each, str) else ""
)
def test_every_route_answers_only_a_key_of_its_project_that_has_its_scope(world, method, path, scopes, case):
    if path in NO_KEY_NEEDED:
        assert scopes == []
        assert world.send(method, path, None).status_code != 401
        return
    assert len(scopes) == 1, "a route names one scope: READ, SUBMIT, GENERATE or ADMIN"
    if case == "no key":
        answer, status, code = world.send(method, path, None), 401, "invalid_api_key"
    elif case == "wrong key":
        answer, status, code = world.send(method, path, "dde_wrong"), 401, "invalid_api_key"
    elif case == "missing scope":
        others = tuple(scope for scope in ALL_SCOPES if scope not in scopes)
        key = new_key(world.plane, scopes=others)["key"]
        answer, status, code = world.send(method, path, key), 403, "missing_scope"
    else:
        return the_other_project_gets_nothing(world, method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


def the_other_project_gets_nothing(world: World, method: str, path: str) -> None:
    answer = world.send(method, path, world.other)
    if "{" in path or (method == "POST" and path in REFERS):
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["code"].endswith("_not_found")
    elif path == "/v1/keys" and method == "POST":
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "other_project")
    elif method == "GET":
        assert answer.status_code == 200
        assert not set(world.ids.values()) & {each["id"] for each in answer.json()["data"]}
    else:
        assert path in OWN
        is_listed = path in ("/v1/datasets", "/v1/models", "/v1/scorers")
        before = world.plane.get(path)["data"] if is_listed else []
        assert answer.status_code in (200, 503), answer.text
        assert answer.json().get("id") not in {each["id"] for each in before}


def test_the_matrix_has_every_route_of_every_router():
    known = {(method, path) for method, path, _ in operations()}
    for module in pkgutil.iter_modules(routers.__path__):
        router = importlib.import_module(f"{routers.__name__}.{module.name}").router
        for route in router.routes:
            assert {(method, route.path) for method in route.methods} <= known, route.path


# ---- keys


def test_a_key_is_shown_once_and_stored_as_a_hash(any_plane):
    plane = any_plane
    created = new_key(plane, "team-a", ("read",))
    assert created["key"].startswith("dde_")
    assert created["key"].endswith(created["hint"])
    assert (created["project"], created["scopes"], created["revoked_at"]) == ("team-a", ["read"], None)
    listed = plane.get("/v1/keys")["data"]
    assert listed == [{name: value for name, value in created.items() if name != "key"}]
    with plane.database.read() as session:
        row = session.scalar(select(ApiKey))
        assert created["key"] not in map(str, vars(row).values())
        assert session.scalars(select(IdempotencyKey)).all() == []


def test_a_revoked_key_is_refused_at_once_and_stays_listed(each_plane):
    plane = each_plane
    created = new_key(plane)
    assert plane.http.get("/v1/models", headers=bearer(created["key"])).status_code == 200
    revoked = plane.post(f"/v1/keys/{created['id']}/revoke", None)
    assert revoked["revoked_at"] is not None
    assert plane.post(f"/v1/keys/{created['id']}/revoke", None) == revoked
    answer = plane.http.get("/v1/models", headers=bearer(created["key"]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert plane.get("/v1/keys")["data"] == [revoked]


def test_an_admin_of_a_project_manages_its_keys_alone_and_one_of_the_default_project_all(plane):
    team = bearer(new_key(plane, "team-a")["key"])
    mine = plane.post("/v1/keys", {"name": "mine"}, headers=team)
    assert mine["project"] == "team-a"
    assert mine["scopes"] == ["read", "submit", "generate"]
    foreign = new_key(plane, "team-b")
    refused = plane.post("/v1/keys", {"name": "x", "project": "team-b"}, 403, headers=team)["error"]
    assert (refused["code"], refused["param"]) == ("other_project", "project")
    plane.post(f"/v1/keys/{foreign['id']}/revoke", None, 404, headers=team)
    assert {key["project"] for key in plane.get("/v1/keys", headers=team)["data"]} == {"team-a"}
    assert {key["project"] for key in plane.get("/v1/keys")["data"]} == {"team-a", "team-b"}
    plane.post(f"/v1/keys/{mine['id']}/revoke", None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "k", "project": "../up"}, "project"),
        ({"name": "k", "project": "Team"}, "project"),
        ({"name": "k", "project": ""}, "project"),
        ({"name": "k", "scopes": []}, "scopes"),
        ({"name": "k", "scopes": ["root"]}, "scopes.0"),
        ({"scopes": ["read"]}, "name"),
    ],
)
def test_a_key_with_an_unusable_field_is_refused_naming_it(plane, body, param):
    assert plane.error("/v1/keys", body)["param"] == param


def test_the_key_of_the_deployment_stays_the_admin_key_of_the_default_project(plane):
    assert plane.get("/v1/keys")["data"] == []
    job = plane.job()
    key = bearer(new_key(plane)["key"])
    assert plane.get(f"{JOBS}/{job['id']}", headers=key)["id"] == job["id"]


# ---- projects


@pytest.fixture
def team(any_plane):
    """Headers of a key of project team-a, which has a base model of the same name and a dataset."""
    headers = bearer(new_key(any_plane, "team-a")["key"])
    any_plane.post("/v1/models", {"name": "shapes", "uri": str(any_plane.root / "base")}, headers=headers)
    return headers


def test_two_projects_have_models_of_one_name_and_neither_sees_the_others(any_plane, team):
    plane = any_plane
    theirs, ours = plane.get("/v1/models/shapes", headers=team), plane.get("/v1/models/shapes")
    assert theirs["version"] != ours["version"]
    assert [model["version"] for model in plane.get("/v1/models", headers=team)["data"]] == [
        theirs["version"]
    ]
    assert [model["version"] for model in plane.get("/v1/models")["data"]] == [ours["version"]]
    plane.post("/v1/models", {"name": "shapes", "uri": str(plane.root / "base")}, 400, headers=team)


def test_a_projects_files_are_below_its_own_folder_and_the_default_projects_where_they_were(any_plane, team):
    plane, storage = any_plane, any_plane.app_settings.storage_uri
    dataset = plane.post(
        "/v1/datasets", {"name": "d", "uri": write_pairs(plane.root / "pairs")}, headers=team
    )
    job = plane.post(JOBS, plane.job_body(dataset=dataset["id"], name="aligned"), headers=team)
    ours = plane.job(dataset=plane.dataset["id"], name="aligned")
    plane.settle(80)
    done = plane.get(f"{JOBS}/{job['id']}", headers=team)
    assert done["status"] == plane.get(f"{JOBS}/{ours['id']}")["status"] == "succeeded"
    for project, headers, each in (("team-a", team, job), ("default", None, ours)):
        root = layout.project_root(storage, project)
        assert root == (storage if project == "default" else f"{storage}/projects/team-a")
        specs = [
            plane.launcher.specs[f"{each['id']}-{stage}-a1"] for stage in ("encode", "train", "evaluate")
        ]
        assert all(spec.prefix.startswith(f"{root}/jobs/{each['id']}/") for spec in specs)
        assert specs[0].output == f"{root}/datasets"
        assert specs[1].output.startswith(f"{root}/models/model_")
        model = plane.get("/v1/models/aligned", headers=headers)
        assert models.find(root, "aligned").id == model["version"]
    written = files.list_files(storage, recursive=True)
    assert {name.split("/")[1] for name in written if name.startswith("projects/")} == {"team-a"}


@pytest.mark.parametrize("where", ["the storage", "a link to it", "a folder around it", "a link in a folder"])
def test_a_project_cannot_read_anothers_files_by_their_uri(plane, where):
    """Though the operator allows the folder that the storage is in."""
    job = plane.job(name="aligned")
    plane.settle(80)
    stored = files.local_path(plane.get("/v1/models/aligned")["uri"])
    assert stored is not None
    write_pairs(Path(stored) / "pairs")
    team = bearer(new_key(plane, "team-a")["key"])
    uri = str(stored)
    if where == "a link to it":
        uri = str(plane.root / "link")
        Path(uri).symlink_to(stored)
    elif where == "a folder around it":
        uri = str(Path(files.local_path(plane.app_settings.storage_uri) or "").parent)
    elif where == "a link in a folder":
        uri = str(plane.root / "own")
        Path(uri).mkdir()
        (Path(uri) / "pairs.parquet").symlink_to(f"{stored}/pairs/0.parquet")
    for path, body, param in (
        ("/v1/models", {"name": "m", "uri": uri}, "uri"),
        ("/v1/scorers", {"name": "s", "kind": "clip", "uri": uri}, "uri"),
        ("/v1/datasets", {"name": "d", "uri": uri}, "uri"),
        ("/v1/datasets/validate", {"uri": uri}, "uri"),
        (JOBS, plane.job_body(evaluation={"prompts_uri": f"{stored}/x"}), "evaluation.prompts_uri"),
        ("/v1/evaluations", {"models": ["m", "n"], "prompts_uri": f"{stored}/x"}, "prompts_uri"),
    ):
        answer = plane.http.post(path, json=body, headers=team)
        assert 400 <= answer.status_code < 500, (path, answer.text)
        error = answer.json()["error"]
        if where != "a link in a folder" or path.startswith("/v1/datasets"):
            assert (answer.status_code, error["code"], error["param"]) == (403, "other_project", param), path
    assert plane.get(f"{JOBS}/{job['id']}")["status"] == "succeeded"
    theirs = layout.project_root(plane.app_settings.storage_uri, "team-a")
    error = plane.error("/v1/datasets", {"name": "d", "uri": f"{theirs}/jobs"}, 403)
    assert error["code"] == "other_project", "nor does the default project read theirs"


def test_a_stage_is_held_to_the_files_of_its_jobs_project(any_plane, team):
    plane = any_plane
    dataset = plane.post(
        "/v1/datasets", {"name": "d", "uri": write_pairs(plane.root / "pairs")}, headers=team
    )
    job = plane.post(JOBS, plane.job_body(dataset=dataset["id"], name="aligned"), headers=team)
    plane.settle(80)
    storage = plane.app_settings.storage_uri
    for stage in ("encode", "train", "evaluate"):
        rules = plane.launcher.specs[f"{job['id']}-{stage}-a1"].sources
        assert (rules.of_others, rules.own) == (storage, f"{storage}/projects/team-a")


def test_a_loop_of_links_leads_to_no_source(plane):
    loop = plane.root / "loop"
    loop.symlink_to(loop)
    team = bearer(new_key(plane, "team-a")["key"])
    error = plane.post("/v1/datasets", {"name": "d", "uri": loop.as_uri()}, 404, headers=team)["error"]
    assert error["param"] == "uri"


def test_the_same_idempotency_key_means_another_request_in_another_project(any_plane, team):
    plane = any_plane
    body = {"name": "d", "uri": write_pairs(plane.root / "pairs")}
    sent = {"Idempotency-Key": "once"}
    ours = plane.post("/v1/datasets", body, headers=sent)
    theirs = plane.post("/v1/datasets", body, headers={**team, **sent})
    assert ours["id"] != theirs["id"]
    assert plane.post("/v1/datasets", body, headers=sent)["id"] == ours["id"]
    assert plane.post("/v1/datasets", body, headers={**team, **sent})["id"] == theirs["id"]
    assert [each["id"] for each in plane.get("/v1/datasets", headers=team)["data"]] == [theirs["id"]]


def test_the_metadata_status_and_page_of_a_list_stay_within_the_project(any_plane, team):
    plane = any_plane
    dataset = plane.post(
        "/v1/datasets", {"name": "d", "uri": write_pairs(plane.root / "pairs")}, headers=team
    )
    body = plane.job_body(dataset=dataset["id"], metadata={"run": "a"})
    theirs = plane.post(JOBS, body, headers=team)
    ours = plane.job(dataset=plane.dataset["id"], metadata={"run": "a"})
    for query in ("", "?metadata[run]=a", "?status=validating"):
        assert [each["id"] for each in plane.get(f"{JOBS}{query}", headers=team)["data"]] == [theirs["id"]]
        assert [each["id"] for each in plane.get(f"{JOBS}{query}")["data"]] == [ours["id"]]
    assert plane.get(f"{JOBS}?after={ours['id']}", 404, headers=team)["error"]["param"] == "after"


def test_a_running_jobs_events_stream_to_its_own_project_alone(plane):
    job = plane.job()
    headers = {**bearer(new_key(plane, "team-a")["key"]), "accept": "text/event-stream"}
    assert plane.get(f"{JOBS}/{job['id']}/events", 404, headers=headers)["error"]["code"] == "job_not_found"


def test_keys_created_at_once_are_all_accepted(plane):
    made: list[dict] = []
    threads = [threading.Thread(target=lambda: made.append(new_key(plane))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({key["id"] for key in made}) == 6
    assert all(plane.http.get("/v1/models", headers=bearer(key["key"])).status_code == 200 for key in made)


def test_what_a_new_project_registers_from_the_same_files_is_its_own(plane):
    team = bearer(new_key(plane, "team-a")["key"])
    uri = write_base(plane.root / "theirs")
    model = plane.post("/v1/models", {"name": "own", "uri": uri}, headers=team)
    plane.get(f"/v1/models/{model['id']}", 404)
    assert plane.http.delete(f"/v1/models/{model['id']}").status_code == 404
    assert plane.http.delete(f"/v1/models/{model['id']}", headers=team).status_code == 200
