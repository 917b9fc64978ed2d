"""Models in memory: names take effect at the next lease, running ones keep what they have, errors name the
model."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dde_core.engine.model import BaseModel
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR
from services.api.records import ModelRecord
from services.artifacts import models
from services.errors import NotFound, ServiceError, Unavailable
from services.serving import names
from services.serving.loaded import LoadedModels, adapter_bytes, weight_bytes
from services.serving.memory import Memory
from services.stages import layout
from services.storage import files
from tests.support.blocks import Recorder
from tests.support.folder_base import FolderBase, drawn
from tests.support.tiny_folders import FOLDERS, lora_folder, sd15_folder, sdxl_folder

AMPLE = 1 << 30


class Bases:
    """Loads bases of real folders, when the gate is open."""

    def __init__(self) -> None:
        self.all: list[FolderBase] = []
        self.reads: list[Path] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, folder: Path) -> FolderBase:
        self.reads.append(folder)
        assert self.gate.wait(30)
        self.all.append(FolderBase(folder))
        return self.all[-1]


@pytest.fixture
def root(tmp_path: Path) -> str:
    return files.as_uri(tmp_path / "storage")


@pytest.fixture
def bases() -> Bases:
    return Bases()


def publish(
    root: str, name: str, folder: Path, base: ModelRecord | None = None, **changes: Any
) -> ModelRecord:
    """Register a folder as ``name``; the name refers to it from now on."""
    uri = changes.pop("uri", folder.as_uri())
    fields = {"id": f"id-{name}", "digest": models.folder_digest(uri), "family": "sd15"} | changes
    record = ModelRecord(name=name, uri=uri, adapter_of=base, created_at=0, **fields)
    models.publish(root, record)
    models.set_alias(root, name, record.id)
    return record


def copy_of_shapes(target: Path) -> Path:
    shutil.copytree(MODEL_DIR, target)
    return target


def drawn_alone(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """An image by a model of its own, into which the adapter is merged."""
    return drawn(BaseModel(ModelFolder(folder, adapter)).model)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def lease_once(loaded: LoadedModels, name: str, project: str = "default") -> ModelRecord:
    async with loaded.lease(project, name) as lease:
        return lease.record


@pytest.mark.parametrize("family", sorted(FOLDERS))
def test_the_estimate_from_headers_is_the_measured_size(family: str, tmp_path: Path):
    folder = FOLDERS[family](tmp_path / "base")
    lora = lora_folder(folder, tmp_path / "lora")
    base = FolderBase(folder)
    assert base.num_bytes == weight_bytes(folder) > 0
    assert 2 * adapter_bytes(lora) == base.load_adapter("first", lora).num_bytes > 0, (
        "beside rows without one"
    )
    assert adapter_bytes(lora) == base.load_adapter("second", lora).num_bytes
    assert weight_bytes(folder, 2) * 2 == weight_bytes(folder)


def test_names_ids_and_aliases_are_looked_up_in_their_project_at_each_lease(root, bases, tmp_path):
    record = publish(root, "m", MODEL_DIR)
    models.set_alias(root, "m@production", record.id)
    theirs = layout.project_root(root, "team-a")
    other = publish(theirs, "m", copy_of_shapes(tmp_path / "theirs"), id="id-theirs")

    async def main() -> None:
        loaded = LoadedModels(root, Memory(AMPLE), bases)
        for name in ("m", "id-m", "m@production"):
            assert await lease_once(loaded, name) == record
        assert await lease_once(loaded, "m", "team-a") == other
        assert len(bases.all) == 2
        for name, project in (("m@staging", "default"), ("id-theirs", "default"), ("id-m", "team-a")):
            with pytest.raises(NotFound, match=name):
                await lease_once(loaded, name, project)

    asyncio.run(main())


def test_a_base_is_loaded_once_for_itself_and_its_adapters_which_draw_as_merged_ones(root, bases, tmp_path):
    folder = copy_of_shapes(tmp_path / "base")
    base = publish(root, "base", folder)
    loras = [lora_folder(folder, tmp_path / f"lora{i}", seed=i) for i in range(2)]
    for i, lora in enumerate(loras):
        publish(root, f"lora{i}", lora, base)
    recorder = Recorder()

    async def main() -> None:
        memory = Memory(AMPLE, recorder)
        loaded = LoadedModels(root, memory, bases)

        async def draw(name: str) -> np.ndarray:
            async with loaded.lease("default", name) as lease:
                return await asyncio.to_thread(drawn, lease.model)

        images = await asyncio.gather(*(draw(name) for name in ("lora0", "base", "lora1", "lora0")))
        assert np.array_equal(images[0], images[3])
        for image, adapter in zip(images, (loras[0], None, loras[1]), strict=False):
            assert np.abs(image - drawn_alone(folder, adapter).astype(float)).max() <= 1
        assert not np.array_equal(images[0], images[1]), "adapters change the image"
        assert recorder.loads == 3
        assert len(bases.all) == 1
        held = bases.all[0].num_bytes + bases.all[0]._adapters.num_bytes
        assert memory.num_bytes == held == recorder.held[-1]
        await memory.close()
        assert bases.all[0].is_closed

    asyncio.run(main())


def test_a_name_that_refers_to_another_model_takes_effect_for_the_next_lease_alone(root, bases, tmp_path):
    first = publish(root, "m", copy_of_shapes(tmp_path / "first"))
    second = copy_of_shapes(tmp_path / "second")

    async def main() -> None:
        loaded = LoadedModels(root, Memory(AMPLE), bases)
        async with loaded.lease("default", "m") as running:
            bases.gate.clear()
            publish(root, "other", copy_of_shapes(tmp_path / "other"))
            models.set_alias(root, "m", "id-other")
            waiting = asyncio.ensure_future(lease_once(loaded, "m"))
            await until(lambda: len(bases.reads) == 2)
            publish(root, "m", second, id="id-second")
            bases.gate.set()
            assert (await waiting).id == "id-other", "what waited is what the name referred to when it came"
            assert (await lease_once(loaded, "m")).id == "id-second"
            assert running.record == first
            assert np.array_equal(drawn(running.model), drawn_alone(MODEL_DIR))

    asyncio.run(main())


def test_files_that_are_deleted_or_overwritten_do_not_change_a_loaded_model(root, bases, tmp_path):
    folder = copy_of_shapes(tmp_path / "m")
    publish(root, "m", folder, job="job_1")
    wanted = drawn_alone(MODEL_DIR)

    async def main() -> None:
        loaded = LoadedModels(root, Memory(AMPLE), bases)
        async with loaded.lease("default", "m") as lease:
            for weights in folder.rglob("*.safetensors"):
                size = weights.stat().st_size
                with weights.open("r+b") as file:
                    file.write(b"\xff" * (size // 2))
                    file.truncate(size // 2)
            assert np.array_equal(drawn(lease.model), wanted)
            models.retract(root, lease.record)
            shutil.rmtree(folder)
            assert np.array_equal(drawn(lease.model), wanted)
            with pytest.raises(NotFound, match="'m'"):
                await lease_once(loaded, "m")

    asyncio.run(main())


def test_a_model_that_is_deleted_while_its_files_are_read_draws_for_those_who_waited(root, bases, tmp_path):
    record = publish(root, "m", MODEL_DIR)

    async def main() -> None:
        loaded = LoadedModels(root, Memory(AMPLE), bases)
        bases.gate.clear()
        waiting = [asyncio.ensure_future(lease_once(loaded, "m")) for _ in range(5)]
        await until(lambda: len(bases.reads) == 1)
        models.retract(root, record)
        bases.gate.set()
        assert await asyncio.gather(*waiting) == [record] * 5
        with pytest.raises(NotFound):
            await lease_once(loaded, "m")

    asyncio.run(main())


def in_bucket(root: str, name: str, **changes: Any) -> ModelRecord:
    """An aligned model in storage, as training leaves it."""
    uri = layout.model_folder(root, f"id-{name}")
    files.copy_folder(files.as_uri(MODEL_DIR), uri)
    return publish(root, name, MODEL_DIR, uri=uri, job="job_1", **changes)


@pytest.fixture
def deleting(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What happens once, right before a model's files are copied to this node."""
    actions: list[Callable[[], None]] = []
    copy_folder = files.copy_folder

    def copied(source: str, target: str) -> None:
        while actions:
            actions.pop()()
        copy_folder(source, target)

    monkeypatch.setattr(files, "copy_folder", copied)
    return actions


@pytest.fixture(autouse=True)
def own_node_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of models on this node that other tests do not share."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_a_model_that_is_deleted_before_its_files_are_copied_is_not_found_by_name(bucket, bases, deleting):
    record = in_bucket(bucket, "m", digest=models.folder_digest(MODEL_DIR.as_uri()))

    async def main() -> None:
        loaded = LoadedModels(bucket, Memory(AMPLE), bases)
        deleting.append(lambda: models.retract(bucket, record))
        with pytest.raises(NotFound, match="model 'm' does not exist") as refused:
            await lease_once(loaded, "m")
        assert refused.value.code == "model_not_found"

    asyncio.run(main())


def test_who_waits_for_a_model_that_is_replaced_and_deleted_gets_the_new_one(
    bucket, bases, deleting, tmp_path
):
    old = in_bucket(bucket, "m")

    def replace() -> None:
        publish(bucket, "m", MODEL_DIR, id="id-new")
        models.retract(bucket, old)

    async def main() -> None:
        loaded = LoadedModels(bucket, Memory(AMPLE), bases)
        deleting.append(replace)
        assert (await lease_once(loaded, "m")).id == "id-new"

    asyncio.run(main())


def test_a_copy_whose_digest_differs_is_an_error_of_that_model_by_name(bucket, bases):
    in_bucket(bucket, "m", digest="0" * 64)

    async def main() -> None:
        with pytest.raises(
            ServiceError, match=r"model 'm' cannot be loaded: the files .* have changed"
        ) as failure:
            await lease_once(LoadedModels(bucket, Memory(AMPLE), bases), "m")
        assert (failure.value.status, failure.value.code) == (500, "model_unusable")

    asyncio.run(main())


def test_copies_on_the_node_may_be_evicted_once_they_are_loaded(bucket, bases):
    in_bucket(bucket, "m", digest=models.folder_digest(MODEL_DIR.as_uri()))

    async def main() -> None:
        loaded = LoadedModels(bucket, Memory(AMPLE), bases)
        async with loaded.lease("default", "m") as lease:
            folder = bases.all[0].folder
            assert folder.exists()
            models.node_cache().evict_unused()
            assert not folder.exists()
            assert np.array_equal(drawn(lease.model), drawn_alone(MODEL_DIR))

    asyncio.run(main())


def test_a_damaged_model_is_an_error_by_its_name_and_is_not_read_again_until_it_changes(
    root, bases, tmp_path
):
    publish(root, "good", MODEL_DIR)
    folder = copy_of_shapes(tmp_path / "bad")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    (folder / "vae" / "config.json").write_text("{}")
    bad = publish(root, "bad", folder)
    publish(root, "same", folder)

    async def main() -> None:
        loaded = LoadedModels(root, Memory(AMPLE, retry_s=60), bases)
        for name in ("bad", "bad", "same"):
            with pytest.raises(ServiceError, match=f"model '{name}' cannot be loaded: ") as failure:
                await lease_once(loaded, name)
            error = failure.value
            assert (error.status, error.code, error.param) == (500, "model_unusable", "model")
        assert bases.reads == [folder]
        assert await lease_once(loaded, "good")
        shutil.copy(MODEL_DIR / "vae" / "config.json", folder / "vae")
        weights.write_bytes(whole[:-8])
        publish(root, "bad", folder, id="id-again")
        with pytest.raises(ServiceError, match=r"model 'bad' cannot be loaded: .*cut off"):
            await lease_once(loaded, "bad")
        weights.write_bytes(whole)
        repaired = publish(root, "bad", folder, id="id-repaired")
        assert repaired.digest != bad.digest
        assert await lease_once(loaded, "bad") == repaired

    asyncio.run(main())


def test_adapters_of_another_base_are_an_error_of_that_model_alone(root, bases, tmp_path):
    base = publish(root, "base", sd15_folder(tmp_path / "base"))
    other = sdxl_folder(tmp_path / "other")
    publish(root, "alien", lora_folder(other, tmp_path / "alien"), base)
    publish(root, "lora", lora_folder(tmp_path / "base", tmp_path / "lora"), base)

    async def main() -> None:
        memory = Memory(AMPLE)
        loaded = LoadedModels(root, memory, bases)
        with pytest.raises(ServiceError, match="model 'alien' cannot be loaded: ") as failure:
            await lease_once(loaded, "alien")
        assert failure.value.code == "model_unusable"
        assert memory.num_bytes == bases.all[0].num_bytes, "the base stays"
        assert await lease_once(loaded, "lora")
        assert len(bases.all) == 1

    asyncio.run(main())


def test_a_model_that_can_never_fit_is_refused_with_its_size(root, bases):
    publish(root, "m", MODEL_DIR)

    async def main() -> None:
        loaded = LoadedModels(root, Memory(1000), bases)
        message = (
            rf"model 'm' cannot be loaded now: .* {weight_bytes(MODEL_DIR)} bytes .* the 1000 of max_bytes"
        )
        with pytest.raises(Unavailable, match=message) as refused:
            await lease_once(loaded, "m")
        assert (refused.value.param, refused.value.code) == ("model", "out_of_memory")
        assert not bases.reads

    asyncio.run(main())


def test_preloading_logs_what_it_cannot_hold_and_goes_on(root, bases, tmp_path, caplog):
    publish(root, "first", copy_of_shapes(tmp_path / "first"))
    publish(layout.project_root(root, "team-a"), "second", copy_of_shapes(tmp_path / "second"))
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    ample = asyncio.run(preloaded(root, AMPLE, bases))
    assert [folder.name for folder in bases.reads] == ["first", "second"]
    assert ample == 2
    assert "preload: nobody: model 'nobody' does not exist" in caplog.text
    assert "made room" not in caplog.text
    assert asyncio.run(preloaded(root, weight_bytes(MODEL_DIR) * 3 // 2, bases)) == 1
    assert "preload: first made room for those after it" in caplog.text


async def preloaded(root: str, max_bytes: int, bases: Bases) -> int:
    """How many models are in memory then."""
    memory = Memory(max_bytes)
    await LoadedModels(root, memory, bases).preload(["first", "nobody", "team-a/second"])
    return len(memory.keys)


def test_names_change_while_many_lease_models_and_adapters_with_little_room(root, bases, tmp_path):
    chance = random.Random(0)
    folders = [copy_of_shapes(tmp_path / f"base{i}") for i in range(3)]
    records = [publish(root, f"base{i}", folder) for i, folder in enumerate(folders)]
    for i, folder in enumerate(folders):
        publish(root, f"lora{i}", lora_folder(folder, tmp_path / f"lora{i}", i), records[i])
    names = [f"{kind}{i}" for kind in ("base", "lora") for i in range(3)] + ["any@production"]
    models.set_alias(root, "any@production", "id-base0")
    room = weight_bytes(MODEL_DIR) * 5 // 2
    recorder = Recorder()

    async def client(loaded: LoadedModels) -> None:
        for _ in range(5):
            name = chance.choice(names)
            async with loaded.lease("default", name) as lease:
                await asyncio.sleep(chance.random() * 0.002)
                model, record = lease.model, lease.record
                base = model.base
                assert not base.is_closed
                assert base.folder.as_uri() == (record.adapter_of or record).uri
                if record.adapter_of:
                    assert base.adapters[model.adapter].as_uri() == record.uri, "unloaded under a lease"
                if name == "any@production":
                    models.set_alias(root, name, f"id-{chance.choice(names[:6])}")

    async def main() -> None:
        memory = Memory(room, recorder, patience_s=0.01)
        loaded = LoadedModels(root, memory, bases)
        await asyncio.gather(*(client(loaded) for _ in range(8)))
        await memory.close()

    asyncio.run(main())
    assert max(recorder.held) <= room
    assert recorder.held[-1] == 0
    assert recorder.loads == recorder.evictions
    assert len(bases.all) > 3, "bases were evicted and loaded again"
    assert all(base.is_closed and not base.adapters for base in bases.all)


def test_while_storage_hangs_or_fails_names_refer_to_what_they_did_before(root, bases, tmp_path, monkeypatch):
    async def main() -> None:
        monkeypatch.setattr(names, "PATIENCE_S", 0.05)
        record = publish(root, "m", MODEL_DIR)
        loaded = LoadedModels(root, Memory(AMPLE), bases)
        assert await lease_once(loaded, "m") == record
        find = models.find
        back = threading.Event()
        looks: list[str] = []

        def hanging(root: str, name: str) -> ModelRecord:
            looks.append(name)
            assert back.wait(30)
            raise Unavailable("storage is away", param="uri")

        monkeypatch.setattr(models, "find", hanging)
        for _ in range(5):
            assert await lease_once(loaded, "m") == record
        assert looks == ["m"], "later requests do not wait for a look-up that hangs"
        back.set()
        assert await lease_once(loaded, "m") == record
        with pytest.raises(Unavailable, match="storage is away"):
            await lease_once(loaded, "other")
        monkeypatch.setattr(models, "find", find)
        other = publish(root, "m", MODEL_DIR, id="id-newer")
        await until(lambda: not loaded._names._late)
        assert await lease_once(loaded, "m") == other
        models.retract(root, other)
        with pytest.raises(NotFound):
            await lease_once(loaded, "m")

    asyncio.run(main())
