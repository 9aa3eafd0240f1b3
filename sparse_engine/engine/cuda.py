"""The decoder on an NVIDIA GPU: a whole step, the choice of the token included, is one CUDA graph per batch bucket and choice.

The graph of a single row may hold other kernels than that of more rows: one for each product, its LayerNorm included
(:mod:`sparse_engine.engine.rows`), two for each layer (:mod:`sparse_engine.engine.halves`) or one for the whole step
(:mod:`sparse_engine.engine.whole`), where the model has such a step that was measured to be faster, or where the environment variable
SPARSE_ENGINE_STEP says so.
"""

from __future__ import annotations

import gc
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_engine.engine.capture import captured
from sparse_engine.engine.choice import Choice
from sparse_engine.engine.halves import half_layers
from sparse_engine.engine.kernels import DecodeState, Embedding, embed
from sparse_engine.engine.kernels.decode_model import WholeStep
from sparse_engine.engine.kernels.half_layers import HalfLayers
from sparse_engine.engine.kernels.row_layers import RowLayers
from sparse_engine.engine.packed_layers import packed_layers
from sparse_engine.engine.prefill import pass_through
from sparse_engine.engine.prompt_graphs import PromptGraphs, bucket_of
from sparse_engine.engine.rows import row_layers
from sparse_engine.engine.runner import Cache, Runner
from sparse_engine.engine.weights import DecoderWeights
from sparse_engine.engine.whole import whole_step
from sparse_engine.errors import InputError

__all__ = ["KEPT_CACHES", "VARIABLE", "CudaRunner"]

VARIABLE = "SPARSE_ENGINE_STEP"
"""Environment variable: "auto" (default), "kernels" (none of these), or "rows", "half-layers" or "one-kernel", which refuse a model that
has no such step."""

_FORMS = {
    "rows": ("a kernel per product", row_layers),
    "half-layers": ("layers in two kernels", half_layers),
    "one-kernel": ("a step in one kernel", whole_step),
}
"""What the variable may ask for beside: its name in sentences, and what makes it."""

_FASTEST: dict[int, dict[int, str]] = {
    4: {768: "half-layers", 2048: "rows", 2560: "rows", 4096: "rows", 5120: "rows", 7168: "rows"},
    8: {768: "rows", 2048: "rows", 2560: "rows", 4096: "rows", 5120: "rows", 7168: "rows"},
    0: {768: "rows", 2048: "rows", 2560: "rows", 4096: "rows", 5120: "rows"},
}
"""By the pattern's group (0: unstructured), then by the model's width, the form of a single row that was measured to be the fastest;
kernels elsewhere.

In ms behind a prompt of 512 tokens, on an H200, rows and kernels: 2:4 0.139 and 0.155 (125M), 0.539 and 0.574 (1.3B), 1.07 and 1.14 (2.7B),
1.90 and 1.94 (6.7B), 3.52 and 3.67 (13B), 7.91 and 8.11 (30B); 4:8 0.150 and 0.169, 0.612 and 0.680, 1.23 and 1.28, 2.05 and 2.15, 3.87
and 3.96, 8.47 and 8.64; half of the weights, unstructured, 0.147 and 0.162, 0.678 and 0.703, 1.387 and 1.388, 2.33 and 2.39, 4.23 and 4.36.
Half-layers 0.135 (125M, 2:4), 0.160 (125M, 4:8), 0.696 (1.3B, 2:4). One kernel 0.627 (1.3B, 2:4), 0.783 (1.3B, 4:8), 5.48 (13B, 2:4); on
an H100 0.214 (125M, 2:4), 3.12 (6.7B, 2:4).
"""

KEPT_CACHES = 2
"""Caches, with their graphs, that stay allocated between calls."""

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(eq=False)
class _Captured(Cache):
    prompts: PromptGraphs
    graphs: dict[tuple[Choice, int], torch.cuda.CUDAGraph] = field(default_factory=dict)


class CudaRunner(Runner):
    """
    Attributes:
        whole: the step in one kernel that serves single rows, or None where the model has none.
        layers: the layers in two kernels each, or product by product, that serve single rows, or None where the model has none or
            has ``whole``.
    """

    name = "cuda graphs"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # Steps of one model never run at once and leave nothing but the state: their graphs share their memory.
        self._pool = torch.cuda.graph_pool_handle()
        self._kept: OrderedDict[tuple[int, int], _Captured] = OrderedDict()
        self._seen: set[int] = set()
        self._has_room = True
        self.whole, self.layers = _single(self.weights)

    def path(self, batch: int) -> str:
        if batch > 1 or (self.whole is None and self.layers is None):
            return self.name
        if self.whole is not None:
            return "one kernel per step"
        return "two kernels per layer" if isinstance(self.layers, HalfLayers) else "a kernel per product"

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
        run = partial(pass_through, self.weights, made.k, made.v)
        kept = _Captured(made.k, made.v, made.state, PromptGraphs(run, self.device, self._pool))
        self._kept[batch, eos] = kept
        return kept

    def prefill(self, cache: Cache, rows: Sequence[int], prompts: Sequence[Tensor]) -> Tensor:
        """Single prompts run as graphs from the second of their bucket on: what is made once need not be captured."""
        assert isinstance(cache, _Captured)
        bucket = bucket_of(len(prompts[0])) if len(prompts) == 1 and self._has_room else None
        if bucket is None or bucket > min(cache.capacity, self.max_positions):
            return super().prefill(cache, rows, prompts)
        if bucket not in self._seen:
            self._seen.add(bucket)
            return super().prefill(cache, rows, prompts)
        try:
            return cache.prompts(rows[0], prompts[0], bucket)
        except torch.cuda.OutOfMemoryError:
            # A graph holds its activations, which without one are anybody's memory afterwards.
            self._has_room = False
            return super().prefill(cache, rows, prompts)

    def logits(self, cache: Cache) -> Tensor:
        if cache.batch == 1 and self.whole is not None:
            return self.whole(cache.k, cache.v, cache.state, greedy=False)
        if cache.batch == 1 and self.layers is not None:
            w, state = self.weights, cache.state
            h = self._empty(1, w.hidden)
            embed(state.tokens, state.lengths, Embedding(w.tokens, w.positions, h))
            return w.head(self.layers(h, cache.k, cache.v, state.lengths))
        return super().logits(cache)

    def _once(self, cache: Cache, choice: Choice) -> None:
        if cache.batch == 1 and self.whole is not None and choice == Choice():
            self.whole(cache.k, cache.v, cache.state, greedy=True)
        else:
            super().step(cache, choice)

    def step(self, cache: Cache, choice: Choice) -> None:
        assert isinstance(cache, _Captured)
        key = (choice, cache.state.pad)
        graph = cache.graphs.get(key)
        if graph is None:
            graph = cache.graphs[key] = self._capture(cache, choice)
        graph.replay()

    def _capture(self, cache: Cache, choice: Choice) -> torch.cuda.CUDAGraph:
        """A step's graph. The step that is run first has a state of its own."""
        state = cache.state
        trial = Cache(cache.k, cache.v, DecodeState(**{f.name: _copy(getattr(state, f.name)) for f in fields(state)}))
        # Finished rows append nothing when their length is the capacity, so that the trial leaves the cache as it is.
        trial.state.finished.fill_(True)
        trial.state.lengths.fill_(cache.capacity)
        return captured(lambda: self._once(cache, choice), lambda: self._once(trial, choice), self.device, self._pool)[0]


def _single(weights: DecoderWeights) -> tuple[WholeStep | None, HalfLayers | RowLayers | None]:
    """What serves single rows: a step in one kernel, or layers in few, or neither."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "kernels", *_FORMS):
        raise InputError(f"{VARIABLE} is {wanted!r}: use auto, rows, half-layers, one-kernel or kernels")
    form = _fastest(weights) if wanted == "auto" else wanted
    if form == "kernels":
        return None, None
    name, make = _FORMS[form]
    made = make(weights)
    if isinstance(made, str):
        if wanted == "auto":
            return None, None
        raise InputError(f"{VARIABLE} asks for {name}, and the model {made}; auto runs what it has")
    return (made, None) if isinstance(made, WholeStep) else (None, made)


def _fastest(weights: DecoderWeights) -> str:
    packed = packed_layers(weights, unstructured=True)
    return "kernels" if isinstance(packed, str) else _FASTEST[packed.group].get(weights.hidden, "kernels")


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
