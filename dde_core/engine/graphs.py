"""CUDA graphs of small U-Net calls.

A U-Net has thousands of kernels. With few rows the GPU waits for Python to launch them: on an H100 a call of
SD1.5 took 28 ms with one row and with four. A captured graph launches all of them at once, and gives the same
bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dde_core.conditioning import Conditioning

MAX_GRAPHS = 32
"""Of one model. Their memory is shared: it is that of the largest call."""

Call = Callable[[Tensor, Tensor, Conditioning], Tensor]
log = logging.getLogger("dde.engine")


class Graphs:
    """``call`` by graphs: one for each number of rows and size, captured when it is first needed."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._max_rows: dict[tuple[int, ...], int] = {}
        self._captured: dict[tuple[int, ...], Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._is_broken = False

    def capture_up_to(self, latent_size: tuple[int, ...], rows: int) -> None:
        """Use graphs for calls of at most so many rows of latents [h w]."""
        self._max_rows[latent_size] = rows

    def applies(self, latents: Float[Tensor, "b c h w"]) -> bool:
        """Whether a call of these latents goes by a graph."""
        shape = tuple(latents.shape)
        if self._is_broken or shape[0] > self._max_rows.get(shape[2:], 0):
            return False
        return shape in self._captured or len(self._captured) < MAX_GRAPHS

    def __call__(
        self, latents: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """The same as ``call``. A capture that fails is logged, and no more are made."""
        shape = tuple(latents.shape)
        if shape not in self._captured:
            try:
                self._captured[shape] = Captured(self._call, self._pool, latents, t, conditioning)
            except RuntimeError as error:
                log.warning("calls go without CUDA graphs: %s", str(error).splitlines()[0])
                self._is_broken = True
                return self._call(latents, t, conditioning)
        return self._captured[shape](latents, t, conditioning)


class Captured:
    """One graph with its fixed input and output tensors."""

    def __init__(self, call: Call, pool: Any, latents: Tensor, t: Tensor, conditioning: Conditioning) -> None:
        self._latents, self._t = latents.clone(), t.clone()
        self._conditioning = {name: rows.clone() for name, rows in conditioning.items()}
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are selected outside of the capture
            for _ in range(2):
                call(self._latents, self._t, self._conditioning)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may load a model meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = call(self._latents, self._t, self._conditioning)

    def __call__(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self._latents.copy_(latents)
        self._t.copy_(t)
        for name, rows in conditioning.items():
            self._conditioning[name].copy_(rows)
        self._graph.replay()
        return self._output.clone()
