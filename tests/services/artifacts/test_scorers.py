"""Scorers as files: proven in a process of their own, fetched by digest, refused once they have changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from dde_core.errors import DataError
from dde_core.scorers import load as loading
from dde_core.scorers.kinds import KINDS
from dde_core.scorers.weights import Weights
from services.api.records import ScorerRecord
from services.api.requests import ALL_SCORERS, ScorerKind
from services.artifacts import models, outline, scorers
from services.errors import BadRequest, NotFound, ServiceError
from services.storage import files
from tests.support.s3_server import Fault, S3Server
from tests.support.s3_server import first as first_time
from tests.support.scorers import write_tiny

PROMPTS = ["a red star", "the big blue star"]
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)


def record_of(kind: str, uri: str | Path, processor: str | Path | None = None, **fields) -> ScorerRecord:
    uri = files.as_uri(uri)
    processor = processor and files.as_uri(processor)
    digest = scorers.digest_of(uri, processor)
    return ScorerRecord(
        id="s", name="ours", kind=kind, uri=uri, processor=processor, digest=digest, created_at=0, **fields
    )


def test_a_checkpoint_can_be_registered_for_every_kind_that_is_not_built_in():
    assert get_args(ScorerKind) == tuple(name for name, kind in KINDS.items() if not kind.is_built_in)
    assert tuple(scorers.BUILT_IN) == ALL_SCORERS


@pytest.mark.parametrize("kind", get_args(ScorerKind))
def test_a_record_loads_as_the_scorer_of_its_files(kind: str, tmp_path: Path):
    checkpoint, processor = write_tiny(kind, tmp_path)
    wanted = loading.load(kind, checkpoint, processor)
    found = scorers.load(record_of(kind, checkpoint, processor))
    assert found.kind.name == kind
    found.check(PROMPTS, 60, 40)
    np.testing.assert_array_equal(found(IMAGES, PROMPTS), wanted(IMAGES, PROMPTS))
    assert found.description == wanted.description


def test_the_resize_of_a_record_is_what_scores_are_made_with(tmp_path: Path):
    checkpoint, processor = write_tiny("hps", tmp_path)
    first, second = (
        scorers.load(record_of("hps", checkpoint, processor, resize=resize))(IMAGES, PROMPTS)
        for resize in ("antialiased", "aliased")
    )
    assert np.abs(first - second).max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "cut"), [("hps", [1]), ("imagereward", [0, 1]), ("aesthetic", []), ("drift", [])]
)
def test_prompts_that_a_scorer_cuts_are_told_without_reading_a_weight(
    kind: str, cut: list[int], tmp_path: Path, monkeypatch
):
    checkpoint, processor = write_tiny(kind, tmp_path)
    record = record_of(kind, checkpoint, processor)
    prompts = ["star " * 40, "star " * 80, "star"]
    assert scorers.load(record).truncated(prompts) == cut
    monkeypatch.setattr(Weights, "values", None)
    assert scorers.truncated(record, prompts) == cut
    assert scorers.truncated(scorers.BUILT_IN["match"], prompts) == []


@pytest.mark.parametrize("name", scorers.BUILT_IN)
def test_the_scorers_of_the_shapes_world_need_no_files(name: str):
    assert scorers.load(scorers.BUILT_IN[name]).kind.name == name


def test_a_record_without_files_is_refused(tmp_path: Path):
    record = ScorerRecord(id="s", name="mine", kind="clip", digest="d", created_at=0)
    with pytest.raises(BadRequest, match="'mine' of kind 'clip' needs a uri"):
        scorers.load(record)


def test_records_are_read_without_torch():
    code = "import sys, services.artifacts.scorers; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("part", ["checkpoint", "processor"])
def test_local_files_that_have_changed_since_registration_are_refused(part: str, tmp_path: Path):
    checkpoint, processor = write_tiny("hps", tmp_path)
    assert processor
    record = record_of("hps", checkpoint, processor)
    changed = checkpoint if part == "checkpoint" else processor / "vocab.json"
    changed.write_bytes(changed.read_bytes() + b" ")
    with pytest.raises(BadRequest, match=r"the files of scorer ours at .* have changed") as refused:
        scorers.load(record)
    assert (refused.value.param, refused.value.code) == ("scorers", "scorer_changed")


def test_the_digest_is_of_the_files_and_of_what_each_is_for(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
        (path / "a").write_bytes(path.name.encode())
    found = {
        scorers.digest_of(str(first), second and str(second))
        for first, second in ((one, None), (one, other), (other, one), (one / "a", None))
    }
    assert len(found) == 4
    moved = shutil.copytree(one, tmp_path / "moved")
    assert scorers.digest_of(str(moved), None) == scorers.digest_of(str(one), None)


def test_only_published_and_built_in_scorers_are_found(tmp_path: Path):
    root = files.as_uri(tmp_path)
    record = ScorerRecord(id="s", name="ours", kind="clip", uri="file:///c", digest="d", created_at=0)
    scorers.publish(root, record)
    assert scorers.find(root, "ours") == record
    assert scorers.find(root, "match") == scorers.BUILT_IN["match"]
    scorers.retract(root, record)
    for name in ("ours", "../scorers/ours", ""):
        with pytest.raises(NotFound, match="does not exist"):
            scorers.find(root, name)


# ---- proofs


def test_a_proof_names_what_differs(tmp_path: Path):
    checkpoint, _ = write_tiny("clip", tmp_path)
    scorers.prove("clip", str(checkpoint), None, "antialiased")
    (checkpoint / "merges.txt").unlink()
    (checkpoint / "vocab.json").unlink()
    with pytest.raises(DataError, match="tokenizer"):
        scorers.prove("clip", str(checkpoint), None, "antialiased")


def dies(*_: object) -> None:
    os._exit(7)


def test_a_proof_that_dies_is_an_error_with_its_exit_code(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scorers, "_prove_here", dies)
    with pytest.raises(ServiceError, match="the check of the scorer's files died with exit code 7"):
        scorers.prove("clip", str(tmp_path), None, "antialiased")


# ---- on a node


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node that has fetched nothing."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    return tmp_path / "node"


@pytest.mark.parametrize("part", ["checkpoint", "processor"])
def test_local_files_are_read_once_on_a_node_and_again_once_they_are_written_to(
    part: str, node: Path, tmp_path: Path, monkeypatch
):
    checkpoint, processor = write_tiny("hps", tmp_path / "tiny")
    assert processor
    record = record_of("hps", checkpoint, processor)
    read: list[str] = []
    digest = models.file_digest
    monkeypatch.setattr(models, "file_digest", lambda *args: read.append(args[0]) or digest(*args))
    assert scorers.fetch(record) == [checkpoint, processor]
    assert len(read) == 1 + len(list(processor.iterdir()))
    models._cache_in.cache_clear()  # as another process of this node
    assert scorers.fetch(record) == [checkpoint, processor]
    assert len(read) == 1 + len(list(processor.iterdir())), "nothing is read again"
    changed = checkpoint if part == "checkpoint" else processor / "vocab.json"
    data = bytearray(changed.read_bytes())
    times = changed.stat()
    data[-1] ^= 1
    changed.write_bytes(data)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(BadRequest, match=r"the files of scorer ours at .* have changed"):
            scorers.fetch(record)


# ---- in an object store


def upload(path: Path, uri: str) -> str:
    if path.is_dir():
        files.copy_folder(files.as_uri(path), uri)
    else:
        files.upload(path, uri)
    return uri


@pytest.mark.parametrize("kind", ["clip", "hps", "imagereward"])
def test_a_remote_scorer_is_proven_fetched_once_and_scores_as_the_local_one(
    kind: str, s3_server: S3Server, bucket: str, node: Path, tmp_path: Path
):
    checkpoint, processor = write_tiny(kind, tmp_path / "tiny")
    uri = upload(checkpoint, f"{bucket}/{checkpoint.name}")
    remote = upload(processor, f"{bucket}/{processor.name}") if processor else None
    scorers.prove(kind, uri, remote, "antialiased")
    assert not list(node.iterdir()), "the proof leaves nothing"
    record = record_of(kind, uri, remote)
    assert record.digest == record_of(kind, checkpoint, processor).digest
    s3_server.inject(Fault("cut_download", first_time(1), "GET"))
    scores = scorers.load(record)(IMAGES, PROMPTS)
    assert s3_server.counts["cut_download"] == 1
    np.testing.assert_array_equal(scores, loading.load(kind, checkpoint, processor)(IMAGES, PROMPTS))
    s3_server.inject()
    scorers.fetch(record)
    assert s3_server.counts == {}, "the copy on the node is used"


def test_a_remote_checkpoint_with_a_local_processor_is_copied_whole(
    s3_server: S3Server, bucket: str, node: Path, tmp_path: Path
):
    checkpoint, processor = write_tiny("hps", tmp_path / "tiny")
    uri = upload(checkpoint, f"{bucket}/{checkpoint.name}")
    paths = scorers.fetch(record_of("hps", uri, processor))
    assert [path.name for path in paths] == [checkpoint.name, "tokenizer"]
    assert all(node in path.parents for path in paths)


def test_a_remote_scorer_whose_files_have_changed_is_refused_and_not_kept(
    s3_server: S3Server, bucket: str, node: Path, tmp_path: Path
):
    checkpoint, _ = write_tiny("clip", tmp_path / "tiny")
    record = record_of("clip", upload(checkpoint, f"{bucket}/clip"))
    files.write_bytes(f"{bucket}/clip/merges.txt", b"#version: 0.2\n")
    with pytest.raises(BadRequest, match="have changed"):
        scorers.load(record)
    assert {path.suffix for path in (node / "dde-models").iterdir()} == {".lock"}


@pytest.mark.parametrize("kind", ["clip", "hps"])
def test_an_outline_of_large_files_has_their_names_and_shapes_and_takes_no_room(
    kind: str, bucket: str, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(outline, "WHOLE_BYTES", 1 << 16)
    monkeypatch.setattr(outline, "START_BYTES", 1 << 10)
    if kind == "hps":
        checkpoint = tmp_path / "big.pt"
        torch.save({"state_dict": {"large": torch.ones(1000, 1000), "small": torch.ones(2)}}, checkpoint)
    else:
        checkpoint, _ = write_tiny("clip", tmp_path / "tiny")
    uri = upload(checkpoint, f"{bucket}/{checkpoint.name}")
    made = outline.outline(uri, node / "outline")
    if kind == "hps":
        found = torch.load(made, map_location="meta", weights_only=True)["state_dict"]
        assert {name: tuple(each.shape) for name, each in found.items()} == {
            "large": (1000, 1000),
            "small": (2,),
        }
        assert made.stat().st_size == checkpoint.stat().st_size
        assert made.stat().st_blocks * 512 < checkpoint.stat().st_size / 10
    else:
        weights = made / "model.safetensors"
        assert weights.stat().st_size == (checkpoint / "model.safetensors").stat().st_size
        assert weights.read_bytes() != (checkpoint / "model.safetensors").read_bytes()
        loading.prove("clip", made)
