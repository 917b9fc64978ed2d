"""What the pages name exists: paths, functions, commands, settings, routes, links. Nothing is started.

Each check yields one line for every mistake on a page. The made-up pages at the end show that each can fail.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from pydantic import SecretStr, TypeAdapter, ValidationError

from services.api.requests import AlignmentJobCreate
from services.client.bodies import PLACEHOLDERS
from services.client.cli import app
from services.client.recipes import merged
from services.control.app import build_app
from services.settings import ClientSettings, Settings, TrainingSettings

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "k8s" / "README.md",
]
README_LINES = 100
ARCHITECTURE_WIDTH = 100
STORAGE_FOLDERS = ("jobs", "pairs", "datasets", "models", "aliases", "scorers", "images", "projects")
"""Folders of the storage root: pages name places there with a placeholder, as in `jobs/{job}/spec.json`."""
FILE_SUFFIXES = (".py", ".md", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".txt", ".png", ".parquet", ".sh")
SECTIONS = ("data", "objective", "training", "evaluation", "validation")


@dataclass(frozen=True)
class Page:
    """A Markdown page: where it is stored (relative paths and links start there) and its text."""

    path: Path
    text: str

    @property
    def prose(self) -> str:
        """The text without its code blocks (fenced, or indented by four spaces after an empty line)."""
        return "\n".join(line for line, is_code in self._lines() if not is_code)

    @property
    def blocks(self) -> list[str]:
        """The lines of all code blocks, continued lines joined."""
        code = "\n".join(line.strip() for line, is_code in self._lines() if is_code)
        return code.replace("\\\n", " ").splitlines()

    @property
    def bodies(self) -> list[str]:
        """Parts of a job's body as YAML: code blocks that begin with one of its sections."""
        code = "\n".join(line if is_code else "" for line, is_code in self._lines())
        blocks = (textwrap.dedent(block) for block in re.split(r"\n\s*\n", code))
        return [block for block in blocks if re.match(rf"({'|'.join(SECTIONS)}):", block)]

    @property
    def spans(self) -> list[str]:
        """What the prose has in backticks."""
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose)]

    def _lines(self) -> Iterator[tuple[str, bool]]:
        """Every line, and whether it is code."""
        is_fenced = is_code = in_list = False
        is_after_gap = True
        for line in self.text.splitlines():
            if line.lstrip().startswith("```"):
                is_fenced = not is_fenced
                continue
            in_list = bool(re.match(r"\s*([-*]|\d+\.) ", line)) or (in_list and line.startswith((" ", "\t")))
            is_indented = line.startswith("    ") and not in_list
            is_code = is_fenced or (is_indented and (is_after_gap or is_code))
            yield line, is_code
            is_after_gap = not line.strip()


def page(path: Path) -> Page:
    return Page(path, path.read_text())


each_page = pytest.mark.parametrize(
    "page", [page(path) for path in PAGES], ids=lambda page: str(page.path.relative_to(ROOT))
)


# ---- paths and functions


def wrong_paths(page: Page) -> Iterator[str]:
    """Paths that do not exist; functions (`file.py::name`, `file.py::Class.name`) that their file lacks."""
    for span in page.spans:
        path, _, name = span.partition("::")
        if not is_path(path):
            continue
        found = repository_path(page, path)
        if found is None and not is_in_storage(path):
            yield f"`{span}`: no such file or folder"
        elif found is not None and name and name not in definitions(found):
            yield f"`{span}`: {path} does not define {name}"


def is_path(span: str) -> bool:
    """Whether a span in backticks means a file or folder: not a route, a URI, an option or a command."""
    if not re.fullmatch(r"[\w.][\w.{}*/-]*", span):
        return False
    return span.endswith(FILE_SUFFIXES) or ("/" in span and not re.fullmatch(r"\d+/\d+", span))


def repository_path(page: Page, path: str) -> Path | None:
    places = (root / path.rstrip("/") for root in (ROOT, page.path.parent))
    return next((place for place in places if place.exists()), None)


def is_in_storage(path: str) -> bool:
    """A place in storage has a placeholder (`jobs/{job}/...`); a bare file name is a literal of the code."""
    folder, _, rest = path.partition("/")
    if rest:
        return folder in STORAGE_FOLDERS and "{" in rest
    return f'"{path}"' in code() or f"/{path}" in code()


@cache
def code() -> str:
    paths = [path for room in ("dde_core", "services") for path in sorted((ROOT / room).rglob("*.py"))]
    return "\n".join(path.read_text() for path in paths)


def definitions(path: Path) -> set[str]:
    """Functions, classes, their methods, and names that are assigned at the top of a module."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            inside = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {node.name, *(f"{node.name}.{each.name}" for each in inside)}
    return found


@each_page
def test_every_path_and_function_that_a_page_names_exists(page: Page):
    assert list(wrong_paths(page)) == []


# ---- commands


def commands(page: Page) -> Iterator[tuple[list[str], bool]]:
    """The words of every command, and whether it is whole (a line to type) or mentioned in a sentence."""
    for line in page.blocks:
        yield from ((words, True) for words in split(line))
    for span in page.spans:
        yield from ((words, False) for words in split(span))


def split(line: str) -> Iterator[list[str]]:
    """A line's commands without variables before them, comments and placeholders such as `...`."""
    try:
        words = shlex.split(re.sub(r"\s#.*", "", line).replace("$(", " ( "))
    except ValueError:  # a line of a block that is no command
        return
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words:
        yield [words[0].rpartition("/")[2], *(word for word in words[1:] if word not in ("...", "|", "["))]


def wrong_dde_commands(page: Page) -> Iterator[str]:
    """`dde` commands that do not exist, and options or arguments that they do not take."""
    for words, is_whole in commands(page):
        if words[0] == "dde":
            yield from wrong_dde(words[1:], is_whole)


def wrong_dde(words: list[str], is_whole: bool) -> Iterator[str]:
    command, rest, said = typer.main.get_command(app), words, "dde"
    while hasattr(command, "commands"):
        if not rest:
            return  # a group, named as such
        if rest[0] not in command.commands:
            yield f"`{' '.join(['dde', *words])}`: {said} has no command {rest[0]!r}"
            return
        command, said, rest = command.commands[rest[0]], f"{said} {rest[0]}", rest[1:]
    yield from (f"`{' '.join(['dde', *words])}`: {why}" for why in misuse(command, rest, is_whole))


def misuse(command: Any, rest: list[str], is_whole: bool) -> Iterator[str]:
    """What the command's own parser refuses. Types are converted but for files, which the reader has."""
    context = command.context_class(command, info_name=command.name)
    try:
        values, extra, _ = command.make_parser(context).parse_args(list(rest))
    except Exception as error:
        yield str(error) or type(error).__name__
        return
    if extra:
        yield f"takes no argument {extra[0]!r}"
    for parameter in command.params:
        value = values.get(parameter.name)
        if value is None or value == ():
            if parameter.required and is_whole:
                yield f"lacks {parameter.name}"
        elif parameter.type_descriptor.annotation in (int, float):
            try:
                parameter.process_value(context, value)
            except Exception as error:
                yield f"{parameter.name}: {error}"


@each_page
def test_every_dde_command_is_one_that_the_command_line_interface_takes(page: Page):
    assert list(wrong_dde_commands(page)) == []


def wrong_kubectl_commands(page: Page) -> Iterator[str]:
    """`kubectl` commands whose words or options its own parser refuses; files to apply that do not exist."""
    for words, _ in commands(page):
        if words[0] == "kubectl" and len(words) > 1:
            yield from (f"`{' '.join(words)}`: {why}" for why in wrong_kubectl(tuple(words[1:])))


@cache
def wrong_kubectl(words: tuple[str, ...]) -> tuple[str, ...]:
    """With --help kubectl reads its options, does nothing, and prints the usage of the command it knows."""
    program = Path(sys.executable).parent / "kubectl"
    done = subprocess.run([program, *words, "--help"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        return (done.stderr.splitlines()[0],)
    rest = list(words[2:]) if words[0] in ("-n", "--namespace") else list(words)
    usage = re.search(r"^Usage:\n  kubectl ([a-z -]*)(SUBCOMMAND)?", done.stdout, re.MULTILINE)
    if usage is None:
        return ("no such command",)
    understood = usage[1].split()
    is_group = usage[2] is not None and rest != understood
    if is_group or rest[: len(understood)] != understood:
        return (f"understood as kubectl {usage[1].strip() or 'alone'}",)
    places = [place for option, place in pairwise(rest) if option in ("-f", "-k") and not place.isupper()]
    return tuple(f"{place}: no such file or folder" for place in places if not (ROOT / place).exists())


@each_page
def test_every_kubectl_command_is_one_that_kubectl_takes(page: Page):
    assert list(wrong_kubectl_commands(page)) == []


def wrong_make_targets(page: Page) -> Iterator[str]:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words, _ in commands(page):
        if words[0] == "make":
            named = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            yield from (f"`make {name}`: no such target" for name in named if name not in targets)


@each_page
def test_every_make_target_exists(page: Page):
    assert list(wrong_make_targets(page)) == []


def wrong_modules(page: Page) -> Iterator[str]:
    """Modules after `python -m`, and `module:function` or `module.name` of ours that cannot be found."""
    for words, _ in commands(page):
        if (
            words[0].startswith("python")
            and words[1:2] == ["-m"]
            and len(words) > 2
            and not is_found(words[2])
        ):
            yield f"`python -m {words[2]}`: no such module"
    for span in page.spans:
        match = re.fullmatch(r"((?:services|dde_core|tests)(?:\.\w+)+)(?::(\w+))?", span)
        if match and not has(match[1], match[2]):
            yield f"`{span}`: no such module or function"


def is_found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def has(module: str, function: str | None) -> bool:
    path = ROOT.joinpath(*module.split("."))
    if path.is_dir():
        return function is None
    file = path.with_suffix(".py")
    return file.is_file() and (function is None or function in definitions(file))


@each_page
def test_every_module_that_a_page_runs_or_names_is_found(page: Page):
    assert list(wrong_modules(page)) == []


# ---- settings, variables, routes


def wrong_settings(page: Page) -> Iterator[str]:
    """Fields of a job's body (`training.lora.rank`) that a job does not have."""
    for span in page.spans:
        if re.fullmatch(rf"({'|'.join(SECTIONS)})(\.\w+)+", span) and not is_field(job_schema(), span):
            yield f"`{span}`: a job has no such field"


@cache
def job_schema() -> dict[str, Any]:
    return TypeAdapter(AlignmentJobCreate).json_schema()


def is_field(schema: dict[str, Any], name: str) -> bool:
    places = [schema]
    for part in name.split("."):
        places = [each for place in places for each in properties(schema, place).get(part, [])]
    return bool(places)


def properties(root: dict[str, Any], place: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """A schema's fields with their schemas; references and alternatives are followed."""
    if "$ref" in place:
        return properties(root, root["$defs"][place["$ref"].rpartition("/")[2]])
    found = {name: [each] for name, each in place.get("properties", {}).items()}
    for alternative in place.get("anyOf", []):
        found |= properties(root, alternative)
    return found


@each_page
def test_every_field_of_a_job_that_a_page_names_exists(page: Page):
    assert list(wrong_settings(page)) == []


def wrong_bodies(page: Page) -> Iterator[str]:
    """Parts of a job that the API refuses."""
    for body in page.bodies:
        try:
            whole = merged(PLACEHOLDERS, yaml.safe_load(body))
            AlignmentJobCreate.model_validate_json(json.dumps(whole))
        except (yaml.YAMLError, ValidationError) as error:
            yield f"{body.splitlines()[0]}: {error}"


@each_page
def test_every_part_of_a_job_that_a_page_shows_is_accepted(page: Page):
    assert list(wrong_bodies(page)) == []


def wrong_variables(page: Page) -> Iterator[str]:
    """Environment variables that nothing reads."""
    for name in sorted(set(re.findall(r"\b(?:DDE|KUBERAY)_[A-Z_]+\b", page.text))):
        if name not in variables():
            yield f"{name}: nothing reads this variable"


@cache
def variables() -> set[str]:
    settings = (Settings, ClientSettings, TrainingSettings)
    fields = {f"DDE_{field.upper()}" for each in settings for field in each.model_fields}
    own = [ROOT / "Makefile", *(path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))]
    return fields | {name for path in own for name in re.findall(r"\b[A-Z]+_[A-Z_]+\b", path.read_text())}


@each_page
def test_every_environment_variable_is_read_by_something(page: Page):
    assert list(wrong_variables(page)) == []


def wrong_routes(page: Page) -> Iterator[str]:
    """Paths below /v1 that the control plane does not answer, or not by that method."""
    for span in page.spans:
        match = re.fullmatch(r"(?:((?:GET|POST|DELETE)(?:/(?:GET|POST|DELETE))*) )?(/v1/[\w/{}]+)", span)
        if match is None:
            continue
        answered = routes().get(re.sub(r"\{\w+\}", "{}", match[2]), set())
        wanted = set(match[1].split("/")) if match[1] else set()
        if not answered or not wanted <= answered:
            yield f"`{span}`: the control plane has no such route"


@cache
def routes() -> dict[str, set[str]]:
    control = build_app(Settings(api_key=SecretStr("-"), storage_uri="file:///nowhere"))
    paths = control.openapi()["paths"]
    return {re.sub(r"\{\w+\}", "{}", path): {each.upper() for each in item} for path, item in paths.items()}


@each_page
def test_every_route_that_a_page_names_is_answered(page: Page):
    assert list(wrong_routes(page)) == []


def test_the_table_of_routes_names_every_route():
    named = "\n".join(page(ROOT / "docs" / "api.md").spans)
    below = {re.sub(r"\{\w+\}", "{}", name) for name in re.findall(r"/v1/[\w/{}]+(?:\.json)?", named)}
    assert {route for route in routes() if route.startswith("/v1/")} - below == set()


# ---- links


def wrong_links(page: Page) -> Iterator[str]:
    """Links within the repository to a file or a heading that does not exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.prose):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.path.parent / path).resolve() if path else page.path
        if path and not file.exists():
            yield f"({target}): no such file"
        elif anchor and anchor not in anchors(page.text if not path else file.read_text()):
            yield f"({target}): no such heading"


def anchors(text: str) -> set[str]:
    """As GitHub makes them of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_somewhere(page: Page):
    assert list(wrong_links(page)) == []


def test_every_page_of_docs_is_linked_from_the_readme():
    linked = re.findall(r"\]\((docs/\w+\.md)\)", (ROOT / "README.md").read_text())
    assert set(linked) == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}


# ---- form


def test_the_readme_is_short_and_architecture_fits_a_terminal():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
    assert too_wide((ROOT / "ARCHITECTURE.md").read_text()) == []


def too_wide(text: str) -> list[int]:
    """Numbers of the lines that are too long."""
    return [number for number, line in enumerate(text.splitlines(), 1) if len(line) > ARCHITECTURE_WIDTH]


def test_the_newest_entry_of_the_changelog_is_the_packages_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert newest_entry((ROOT / "CHANGELOG.md").read_text()) == project["version"]


def newest_entry(changelog: str) -> str:
    return re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0]


# ---- each check can fail


def made_up(text: str, folder: str = ".") -> Page:
    return Page(ROOT / folder / "made_up.md", text)


@pytest.mark.parametrize(
    ("check", "text", "says"),
    [
        (wrong_paths, "see `dde_core/no_such.py`", "no such file"),
        (wrong_paths, "see `dde_cor/config.py`", "no such file"),
        (wrong_paths, "in `folder/{job}/spec.json`", "no such file"),
        (wrong_paths, "written as `nobody_writes_this.json`", "no such file"),
        (wrong_paths, "see `dde_core/config.py::NoSuchConfig`", "does not define NoSuchConfig"),
        (
            wrong_paths,
            "see `dde_core/config.py::SampleConfig.no_such`",
            "does not define SampleConfig.no_such",
        ),
        (wrong_dde_commands, "run `dde job list`", "no command 'job'"),
        (wrong_dde_commands, "run `dde jobs start`", "no command 'start'"),
        (wrong_dde_commands, "run `dde plan --gpu-count 3`", "--gpu-count"),
        (wrong_dde_commands, "run `dde recipes sd15_dde`", "takes no argument 'sd15_dde'"),
        (wrong_dde_commands, "so:\n\n    .venv/bin/dde datasets create my-pairs\n", "lacks uri"),
        (wrong_dde_commands, "so:\n\n    KEY=1 dde plan --gpus many  # how many\n", "gpus"),
        (wrong_kubectl_commands, "run `kubectl -n dde rollout statuss deployment/x`", "kubectl rollout"),
        (wrong_kubectl_commands, "run `kubectl explode`", "unknown command"),
        (wrong_kubectl_commands, "run `kubectl drain NODE --ignore-demonsets`", "--ignore-demonsets"),
        (wrong_kubectl_commands, "so:\n\n    kubectl get pods --since\n", "--since"),
        (wrong_kubectl_commands, "run `kubectl apply -k k8s/bass`", "k8s/bass: no such file"),
        (wrong_make_targets, "```\nmake no-such-target\n```", "no such target"),
        (wrong_modules, "`python -m services.no_such --spec URI`", "no such module"),
        (wrong_modules, "`services.serving.app:no_such`", "no such module or function"),
        (wrong_settings, "set `training.lora.ranks`", "no such field"),
        (wrong_settings, "set `objective.betta`", "no such field"),
        (wrong_bodies, "so:\n\n    training: {stepz: 3}\n", "stepz"),
        (wrong_bodies, "so:\n\n    training:\n      steps: 0\n", "greater than 0"),
        (wrong_variables, "set DDE_NO_SUCH_THING", "nothing reads"),
        (wrong_routes, "`POST /v1/alignment/job`", "no such route"),
        (wrong_routes, "`DELETE /v1/evaluations/{id}`", "no such route"),
        (wrong_links, "[here](no_such.md)", "no such file"),
        (wrong_links, "[here](README.md#no-such-heading)", "no such heading"),
        (wrong_links, "# One\n[here](#two)", "no such heading"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_check_catches_its_fault(check: Any, text: str, says: str):
    found = list(check(made_up(text)))
    assert any(says in each for each in found), found


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (wrong_paths, "`dde_core/config.py::SampleConfig` writes `jobs/{job}/train/run/` and `done.json`"),
        (wrong_paths, "a share of `1/2`, the route `/v1/models`, `--out FILE`, `s3://bucket/x.parquet`"),
        (
            wrong_dde_commands,
            "`dde jobs`, `dde jobs create --recipe NAME`, and\n\n    dde generate shapes 'a b' -n 2\n",
        ),
        (
            wrong_kubectl_commands,
            "`kubectl -n dde logs deployment/x --since 15m`, `kubectl apply -k OVERLAY`",
        ),
        (wrong_make_targets, "```\nmake test ARGS='-x'\n```"),
        (wrong_modules, "`python -m services.training --spec URI`, `services.serving.app:build_app`"),
        (wrong_settings, "`training.lora.rank`, `data.resolution`, `evaluation.sample.steps`"),
        (wrong_bodies, "so:\n\n    training: {steps: 3}    # few\n    workers: [1, 4]\n"),
        (wrong_variables, "DDE_API_KEY, DDE_URL and DDE_STORAGE_URI"),
        (wrong_routes, "`POST/GET /v1/datasets` and `GET /v1/alignment/jobs/{id}/credit`"),
        (wrong_links, "# Some Heading: one\n[a](https://x.org) [b](README.md) [c](#some-heading-one)"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_check_passes_what_exists(check: Any, text: str):
    assert list(check(made_up(text))) == []


def test_a_path_may_start_at_the_pages_own_folder():
    assert list(wrong_paths(made_up("`base/control.yaml`", "k8s"))) == []
    assert list(wrong_paths(made_up("`base/control.yaml`"))) != []


def test_the_form_checks_catch_long_lines_and_other_versions():
    assert too_wide("short\n" + "x" * (ARCHITECTURE_WIDTH + 1)) == [2]
    assert newest_entry("# Changelog\n\n## 9.9.9\n\n- a\n\n## 0.1.0\n") == "9.9.9"
