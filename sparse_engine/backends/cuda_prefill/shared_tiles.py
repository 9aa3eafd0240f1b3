"""Memory in which clusters meet that share tiles (csrc/cuda/include/prefill_ranges.cuh): the sums that they leave, and flags."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

__all__ = ["flags", "flags_of", "sharers", "workspace"]

_FLAGS = 1024
"""Of one launch: more than a GPU has resident warpgroups that multiply."""
_CHUNK = 512


def sharers(units: int, join_units: float) -> int:
    """Clusters that should share a tile of so many units: further ones take longer to join than to multiply what they take over.

    Joined one behind the other, s of them take the time of units / s + join_units (s - 1), which is least at the root of the quotient.
    """
    return max(2, int(math.sqrt(units / join_units)))


def workspace(blocks: int, tile_elements: int, device: torch.device) -> Tensor:
    """Room for the sums of ``blocks`` tiles, 32 bits each."""
    return torch.empty(blocks, tile_elements, dtype=torch.int32, device=device)


class _Flags:
    """Flags that are 0, as each launch leaves them: nobody has to clear them, which would take a launch of its own.

    Launches of one stream come one behind the other and share theirs, and so do those of one stream in a graph. A captured launch of
    which no graph is known has its own for good, since nobody knows beside which others it will run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_stream: dict[int, Tensor] = {}
        self.of_graph: dict[int, Tensor] | None = None
        self.spare: list[Tensor] = []

    def take(self) -> Tensor:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if torch.cuda.is_current_stream_capturing():
            return self._captured(stream)
        if len(self.spare) < _CHUNK // 2:
            self.spare += torch.zeros(_CHUNK, _FLAGS, dtype=torch.int32, device=self.device).unbind()
            # Once in hundreds of launches: other streams use them.
            torch.cuda.current_stream(self.device).synchronize()
        if stream not in self.of_stream:
            self.of_stream[stream] = self.spare.pop()
        return self.of_stream[stream]

    def _captured(self, stream: int) -> Tensor:
        if self.of_graph is not None and stream in self.of_graph:
            return self.of_graph[stream]
        if not self.spare:
            # These the graph itself clears.
            return torch.zeros(_FLAGS, dtype=torch.int32, device=self.device)
        found = self.spare.pop()
        if self.of_graph is not None:
            self.of_graph[stream] = found
        return found


@cache
def _of_device(index: int) -> _Flags:
    return _Flags(torch.device("cuda", index))


def flags() -> Tensor:
    """Int32 flags for one launch on the current stream of the current device."""
    return _of_device(torch.cuda.current_device()).take()


@contextmanager
def flags_of(graph: object) -> Iterator[None]:
    """Launches that are captured inside, all for ``graph`` on the current device, share flags stream by stream, for as long as it lives."""
    own = _of_device(torch.cuda.current_device())
    outer, own.of_graph = own.of_graph, {}
    try:
        yield
    finally:
        held, own.of_graph = list(own.of_graph.values()), outer
        if held:
            weakref.finalize(graph, own.spare.extend, held)
