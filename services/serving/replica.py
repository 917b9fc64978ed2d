"""What one replica holds, put together. Ray Serve is not known here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from fastapi import FastAPI

from dde_core.engine.batching import StepEngine
from dde_core.engine.model import BaseModel
from dde_core.models.folder import ModelFolder
from services.serving.admission import Admission
from services.serving.args import ServeArgs
from services.serving.images import Images
from services.serving.loaded import LoadedModels
from services.serving.memory import Memory, memory_of
from services.serving.metrics import Metrics
from services.serving.routes import image_routes, install_errors, score_routes
from services.serving.scoring import Scoring


class Replica:
    """One engine, the models and scorers in memory, and who may enter."""

    def __init__(self, args: ServeArgs, metrics: Metrics) -> None:
        torch.set_num_threads(1)
        self._args = args
        self._dtype = torch.bfloat16 if args.use_gpu else torch.float32
        self._engine = StepEngine(on_turn=metrics.turn)
        self._memory = Memory(args.max_bytes or _half_of_its_memory(args), observer=metrics)
        self._models = LoadedModels(
            args.storage_uri, self._memory, self._load, value_bytes=self._dtype.itemsize
        )
        self.admission = Admission(args.limits, self._engine.load, metrics.refused)
        self._images = Images(self._engine, self._models, args.storage_uri, self.admission, metrics)
        self._scoring = Scoring(args.storage_uri, self._memory, args.device)

    async def start(self) -> None:
        """Load the models of ``preload``."""
        await self._models.preload(self._args.preload)

    async def close(self) -> None:
        """Refuse what comes, and end what is not finished: its callers get an error to send it again."""
        self.admission.close()
        await asyncio.to_thread(self._engine.close)
        await self._memory.close()

    def api(self) -> FastAPI:
        """Images and scores over HTTP. Its end closes the replica."""

        @asynccontextmanager
        async def lifespan(api: FastAPI) -> AsyncIterator[None]:
            yield
            await self.close()

        api = FastAPI(title="dde-align serving", lifespan=lifespan)
        install_errors(api)
        api.include_router(image_routes(self._images))
        api.include_router(score_routes(self._scoring))

        @api.get("/healthz")
        async def healthz() -> dict[str, str]:
            return {"status": "ok"}

        return api

    def _load(self, folder: Path) -> BaseModel:
        base = BaseModel(ModelFolder(folder), self._args.device, self._dtype)
        self._engine.prepare(base)
        return base


def _half_of_its_memory(args: ServeArgs) -> int:
    """Half of the device's bytes, or of its part of a GPU that it shares."""
    part = args.num_gpus or 1.0
    return int(memory_of(args.device) * part / 2)
