"""The decoder on an NVIDIA GPU: a whole step, the choice of the token included, is one CUDA graph per batch bucket and choice."""

from __future__ import annotations

import gc
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from sparse_engine.engine.choice import Choice
from sparse_engine.engine.kernels import DecodeState
from sparse_engine.engine.runner import Cache, Runner

__all__ = ["KEPT_CACHES", "CudaRunner"]

KEPT_CACHES = 2
"""Caches, with their graphs, that stay allocated between calls."""

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(eq=False)
class _Captured(Cache):
    graphs: dict[tuple[Choice, int], torch.cuda.CUDAGraph] = field(default_factory=dict)


class CudaRunner(Runner):
    name = "cuda graphs"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # Steps of one model never run at once and leave nothing but the state: their graphs share their memory.
        self._pool = torch.cuda.graph_pool_handle()
        self._kept: OrderedDict[tuple[int, int], _Captured] = OrderedDict()

    def batch_bucket(self, batch: int) -> int:
        return next(bucket for bucket in _BUCKETS if bucket >= batch)

    def allocate(self, batch: int, capacity: int, eos: int) -> Cache:
        for key, kept in self._kept.items():
            # A cache somewhat larger than asked for serves as well: a step reads what a row holds, not what it could.
            if key[0] == batch and capacity <= kept.capacity <= 4 * capacity and key[1] == eos:
                self._kept.move_to_end(key)
                return kept
        for key in [key for key in self._kept if key == (batch, eos)] or list(self._kept)[: max(0, len(self._kept) + 1 - KEPT_CACHES)]:
            del self._kept[key]
        try:
            made = super().allocate(batch, capacity, eos)
        except torch.cuda.OutOfMemoryError:
            self._kept.clear()
            gc.collect()
            made = super().allocate(batch, capacity, eos)
        kept = _Captured(made.k, made.v, made.state)
        self._kept[batch, eos] = kept
        return kept

    def step(self, cache: Cache, choice: Choice) -> None:
        assert isinstance(cache, _Captured)
        key = (choice, cache.state.pad)
        graph = cache.graphs.get(key)
        if graph is None:
            graph = cache.graphs[key] = self._capture(cache, choice)
        graph.replay()

    def _capture(self, cache: Cache, choice: Choice) -> torch.cuda.CUDAGraph:
        """Record a step. Kernels are compiled and libraries set up by a step that is run first, on a state of its own."""
        state = cache.state
        trial = Cache(cache.k, cache.v, DecodeState(**{f.name: _copy(getattr(state, f.name)) for f in fields(state)}))
        # Finished rows append nothing when their length is the capacity, so that the trial leaves the cache as it is.
        trial.state.finished.fill_(True)
        trial.state.lengths.fill_(cache.capacity)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            super().step(trial, choice)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            super().step(cache, choice)
        return graph


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
