"""CUDA graphs of what a runner launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from sparse_engine.backends.cuda_prefill.shared_tiles import flags_of

__all__ = ["captured"]

T = TypeVar("T")


def captured(run: Callable[[], T], first: Callable[[], object], device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what ``run`` launches on ``device``, and what it gave, whose memory every replay fills anew.

    ``first`` is run before, and not recorded: with it kernels are compiled and libraries set up. ``pool`` is shared with graphs that never
    run at the same time as this one.
    """
    here, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        first()
    here.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), flags_of(graph), torch.cuda.graph(graph, pool=pool, stream=stream):
        given = run()
    return graph, given
