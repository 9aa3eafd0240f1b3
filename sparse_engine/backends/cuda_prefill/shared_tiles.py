"""Memory in which clusters meet that share tiles (csrc/cuda/include/prefill_ranges.cuh): the sums that they leave, and flags."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

__all__ = ["flags", "sharers", "workspace"]

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

    Launches of one stream come one behind the other and share theirs. A captured launch has its own, since nobody knows beside which
    others its graph will run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_stream: dict[int, Tensor] = {}
        self.spare: list[Tensor] = []

    def take(self) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            # Those of a graph that has no spare ones are cleared by the graph.
            return self.spare.pop() if self.spare else torch.zeros(_FLAGS, dtype=torch.int32, device=self.device)
        if len(self.spare) < _CHUNK // 2:
            self.spare += torch.zeros(_CHUNK, _FLAGS, dtype=torch.int32, device=self.device).unbind()
            # Once in hundreds of launches: other streams use them.
            torch.cuda.current_stream(self.device).synchronize()
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if stream not in self.of_stream:
            self.of_stream[stream] = self.spare.pop()
        return self.of_stream[stream]


@cache
def _of_device(device: torch.device) -> _Flags:
    return _Flags(device)


def flags(device: torch.device) -> Tensor:
    """Int32 flags for one launch on the current stream of ``device``, which is the current device."""
    return _of_device(device).take()
