"""Whether layers may keep a dense copy of their weight for the numbers of rows where the dense product is faster than every packed one,
or the weight in two packed layouts.

A dense copy takes 16/9 of the packed bytes, which gives up the memory that packing saved; a second layout as much as the first. So they
are made only where measured times say that it pays, and by default only while at least half of the device's memory stays free for
activations, caches and other models.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from sparse_engine.errors import InputError

if TYPE_CHECKING:
    from sparse_engine.registry import Problem

__all__ = ["UNLIMITED", "Dense", "Policy"]

Dense = Literal["auto", "never", "always"]

_VARIABLE = "SPARSE_ENGINE_DENSE"
_KEPT_FREE = 0.5
"""Share of a device's memory that stays free under "auto"."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Where a dense copy is allowed.

    ``dense`` is "never", and then no weight is held in two layouts either; "always", wherever the dense product is measurably faster; or
    "auto", which is "always" as long as the copy, or a second layout, fits into ``room`` bytes.
    """

    dense: Dense = "auto"
    room: float = math.inf

    def holds_once(self, problem: Problem) -> bool:
        """Whether the weight stays in one layout, however much faster another kernel's would make some products."""
        return self.dense == "never" or (self.dense == "auto" and problem.packed_nbytes > self.room)

    @classmethod
    def here(cls, device: torch.device, dense: str | None = None) -> Policy:
        """The policy on ``device`` now: ``dense``, else the environment variable SPARSE_ENGINE_DENSE, else "auto".

        Raises:
            InputError: it is none of the three.
        """
        given = dense if dense is not None else os.environ.get(_VARIABLE) or "auto"
        for choice in get_args(Dense):
            if given == choice:
                return cls(choice, _room(device) if choice == "auto" else math.inf)
        where = "dense" if dense is not None else _VARIABLE
        raise InputError(f"{where} is {given!r}: use {', '.join(get_args(Dense))}")

    def forbids(self, problem: Problem) -> str | None:
        """Why a dense copy of ``problem``'s weight may not be kept (a phrase that can follow a kernel's name), or None when it may."""
        if self.dense == "never":
            return "keeps a dense copy, which the policy never allows"
        if self.dense == "auto" and problem.dense_nbytes > self.room:
            return (
                f"keeps a dense copy of {problem.dense_nbytes / 1e6:.0f} MB, which would leave less than half of the device's memory free"
            )
        return None


UNLIMITED = Policy()
"""A dense copy is allowed wherever it is faster: what a choice is made under where no device is at hand to ask for memory."""


def _room(device: torch.device) -> float:
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    # What torch holds without using it is as good as free.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free - _KEPT_FREE * total
