"""N:M packed form: the kept values row by row in column order, and a little-endian bitmask."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_engine.formats import register
from sparse_engine.formats.base import Format, PackedWeight
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types.base import TensorSpec


class NMFormat(Format):
    """``values`` (rows, columns·N/M), halved and rounded up for int4, and ``bitmask`` uint8 (rows, ceil(columns/8)).

    A group with fewer than N non-zero weights still fills N slots, so every row has the same stride.
    """

    name = "nm"

    def accepts(self, pattern: SparsityPattern) -> bool:
        return pattern.is_nm

    def _layout(
        self, shape: tuple[int, int], pattern: SparsityPattern, slots: int, nnz: int | None
    ) -> tuple[tuple[int, ...], dict[str, TensorSpec]]:
        n, m = pattern.group
        return (shape[0], -(-(shape[1] // m * n) // slots)), {}

    def _locate(self, counts: Tensor) -> dict[str, Tensor]:
        return {}

    def _check_bits(self, packed: PackedWeight, rows: slice, keep: Tensor, counts: Tensor) -> str | None:
        n, m = packed.pattern.group
        kept = keep.view(keep.shape[0], -1, m).sum(-1, dtype=torch.int32)
        if bool((kept != n).any()):
            return f"the bitmask does not keep exactly {n} of every {m} columns as {packed.pattern} asks"
        spare = packed.shape[1] % 8
        if spare and bool((packed.tensors["bitmask"][rows, -1] >> spare).any()):
            return "the bitmask has bits set behind its last column"
        return None


register(NMFormat())
