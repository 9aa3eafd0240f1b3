"""A decode kernel over slabs of as many activation rows as it takes: the form for little more than one slab."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor

from sparse_engine.backends.cuda_decode import Gpu, run_decode
from sparse_engine.backends.cuda_prefill import Call, Form, register
from sparse_engine.backends.cuda_tiles import choose
from sparse_engine.registry import Config

_KERNEL_OF = {"2:4": "cuda_nm", "4:8": "cuda_nm", "unstructured": "cuda_unstructured"}
_SLAB = {True: 128, False: 64}
"""Activation rows of a launch, on Hopper and elsewhere."""
_MOST_SLABS = 4
"""Each slab reads the weight again; an expanded one is written and read once, which costs about as much as three slabs."""


class SlabsForm(Form):
    name: ClassVar[str] = "slabs"
    patterns: ClassVar[frozenset[str]] = frozenset(_KERNEL_OF)

    def configs(self, pattern: str, rows: int, columns: int, m: int, here: Gpu) -> Sequence[Config]:
        return [(self.name,)] if m <= _MOST_SLABS * _SLAB[here.hopper] else []

    def estimate_us(self, pattern: str, rows: int, columns: int, m: int, here: Gpu) -> float:
        slab = _SLAB[here.hopper]
        return -(-m // slab) * (2.0 + rows * columns * (9 / 8) / (4.0e6 / (1 if slab == 64 else 1.5)))

    def run(self, call: Call, config: Config) -> Tensor:
        chooser = partial(choose, _KERNEL_OF[call.pattern], call.pattern)
        return run_decode(chooser, call.x, call.weight, call.bias, call.residual, call.rows, call.columns, call.relu, call.streams)


register(SlabsForm())
