"""Times GPU products by replays of CUDA graphs, with weights that come from memory.

A graph holds products back to back, each with the next of several copies of its weight that together exceed the L2 cache, as in a
model, where every weight is read once per token; kernels that allow it overlap their start with the end of the one before.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparse_engine.backends.cuda_prefill.shared_tiles import flags_of
from sparse_engine.registry import Layout

__all__ = ["Product", "Replay", "copies_of", "take_turns", "warm_up"]

Product = Callable[[], Any]

_LEAST_PRODUCTS = 12
_GRAPH_US = 2000.0
"""Products that take long need fewer in a graph: its launch is a small part of this time, and so is its end."""
_MOST_COPIES = 256
_CACHES = 2.0
"""Bytes of all copies together, in L2 caches."""


def copies_of(layout: Layout, device: torch.device, caches: float = _CACHES) -> list[dict[str, Tensor]]:
    """``layout`` and as many copies of it as exceed the L2 cache of ``device`` ``caches`` times over (default: twice), at least two."""
    nbytes = sum(t.numel() * t.element_size() for t in layout.values())
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(int(caches * cache) // max(nbytes, 1) + 2, int(_MOST_COPIES * caches / _CACHES))
    return [dict(layout), *({name: t.clone() for name, t in layout.items()} for _ in range(count - 1))]


def _us_of(work: Callable[[], Any]) -> float:
    """Microseconds of what ``work`` launches on the current stream, until its end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: libraries keep a workspace for every stream that they meet."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Replay:
    """A captured graph of ``products`` on the current device, repeated until it holds at least a dozen or 2 ms of them.

    ``pool`` (from ``torch.cuda.graph_pool_handle``) lets graphs whose results nobody reads share their memory.

    Raises:
        RuntimeError: a product cannot be captured.
    """

    def __init__(self, products: Sequence[Product], pool: Any = None) -> None:
        # The graph has the addresses of what the products read, and keeps none of it alive.
        self._products = tuple(products)
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Not torch.cuda.graph, which empties the allocator's cache each time: tuning captures thousands of graphs.
        with torch.cuda.stream(_capture_stream(torch.cuda.current_device())):
            # What is set up at a first call cannot be captured.
            products[0]()
            least = min(_LEAST_PRODUCTS, math.ceil(_GRAPH_US / _us_of(products[-1])))
            self.count = len(products) * -(-least // len(products))
            self._graph.capture_begin(*(() if pool is None else (pool,)))
            try:
                with flags_of(self._graph):
                    for i in range(self.count):
                        products[i % len(products)]()
            finally:
                self._graph.capture_end()

    def us(self) -> float:
        """Microseconds of one product in one replay."""
        return _us_of(self._graph.replay) / self.count

    def start(self) -> None:
        """Replay without waiting for the end."""
        self._graph.replay()

    def median_us(self, replays: int) -> float:
        return statistics.median(self.us() for _ in range(replays))


def warm_up(replay: Replay, seconds: float = 0.02) -> None:
    """Replay for a while: right after other work the clocks are still on the move."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        replay.us()


def take_turns(replays: dict[str, Replay], rounds: int) -> dict[str, float]:
    """Median microseconds of each, replayed in turns so that a drift of the clocks meets all of them; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds + 1):
        for name, replay in replays.items():
            times[name].append(replay.us())
    return {name: statistics.median(spent[1:] or spent) for name, spent in times.items()}
